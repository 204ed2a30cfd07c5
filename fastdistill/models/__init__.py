"""Define networks u(x, t, s, y), the average velocity from t to s; see `create` and `PRESETS`."""

from __future__ import annotations

from fastdistill.models.dit import DiT
from fastdistill.models.mlp import MLP
from fastdistill.models.presets import PRESETS, Preset, count_parameters, create

__all__ = ["MLP", "PRESETS", "DiT", "Preset", "count_parameters", "create"]
