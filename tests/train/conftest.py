"""Runs small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill.train import TrainConfig

MakeConfig = Callable[..., TrainConfig]


def tiny_fields(out: Path, **changes: Any) -> dict[str, Any]:
    """Return the fields of a run of 12 steps on the ring, a checkpoint every 4.

    Nested changes replace a group's fields, and another method replaces the method.
    """
    fields: dict[str, Any] = {
        "out": str(out),
        "steps": 12,
        "device": "cpu",
        "data": {"name": "ring", "batch": 8},
        "model": {"preset": "mlp-ring", "width": 8, "depth": 1},
        "method": {"name": "meanflow", "distinct": 0.5},
        "optim": {"warmup_steps": 3},
        "log": {"log_every": 2, "sample_every": 100, "checkpoint_every": 4},
    }
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(fields.get(name), dict)
        nested = nested and (name != "method" or value.get("name", "meanflow") == "meanflow")
        fields[name] = fields[name] | value if nested else value
    return fields


@pytest.fixture
def tiny(tmp_path: Path) -> MakeConfig:
    """Make a tiny configuration: `tiny(steps=4, optim={"lr": 1.0})`; its run folder is `tmp_path / name`."""

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate(tiny_fields(tmp_path / name, **changes))

    return make


@pytest.fixture
def tiny_digits(tiny: MakeConfig) -> MakeConfig:
    """Return the same on digits, by flow matching, with a one-block DiT."""

    def make(name: str = "digits", **changes: Any) -> TrainConfig:
        parts: dict[str, Any] = {
            "data": {"name": "digits", "batch": 8, "label_dropout": 0.5},
            "model": {"preset": "dit-digits", "width": 16, "depth": 1, "heads": 2},
            "method": {"name": "flow_matching", "sample_steps": 1},
            "steps": 2,
        }
        config = tiny(name).model_dump()
        return TrainConfig.model_validate(config | parts | changes)

    return make
