"""Networks u(x, t, s, y): the average velocity from t to s. See `create` and `PRESETS`."""

from __future__ import annotations

from fastdistill.models.dit import DiT
from fastdistill.models.mlp import MLP
from fastdistill.models.presets import PRESETS, Preset, count_parameters, create
from fastdistill.models.weighting import LogVariance

__all__ = ["MLP", "PRESETS", "DiT", "LogVariance", "Preset", "count_parameters", "create"]
