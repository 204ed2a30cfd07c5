"""Training: a typed configuration in, a run folder out. See `TrainConfig`, `train` and `load_run`."""

from __future__ import annotations

from fastdistill.settings import ConfigError
from fastdistill.train.checkpoint import CheckpointError
from fastdistill.train.config import TrainConfig
from fastdistill.train.load import load_config, shipped_configs
from fastdistill.train.loop import NonFiniteError, train
from fastdistill.train.run import load_run
from fastdistill.train.sampling import generate

__all__ = [
    "CheckpointError",
    "ConfigError",
    "NonFiniteError",
    "TrainConfig",
    "generate",
    "load_config",
    "load_run",
    "shipped_configs",
    "train",
]
