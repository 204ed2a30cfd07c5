"""Share one judge, since its classifier takes seconds to train, and small trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdistill.eval.digits import DigitJudge
from fastdistill.train import TrainConfig, train

SMALL_DIT = {"preset": "dit-digits", "patch_size": 4, "width": 16, "depth": 1, "heads": 2}


def small_config(out: Path, name: str, method: str, **more: Any) -> TrainConfig:
    """Return the configuration of three steps of a small network."""
    model = SMALL_DIT if name == "digits" else {"preset": "mlp-ring", "width": 8, "depth": 1}
    fields = {"out": out, "steps": 3, "data": {"name": name, "batch": 8}, "model": model, "method": {"name": method}}
    return TrainConfig.model_validate(fields | {"log": {"log_every": 1}, "device": "cpu"} | more)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> DigitJudge:
    """Return a judge that is trained once a session, in `judge.folder`."""
    return DigitJudge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def flow_run(tmp_path: Path) -> Path:
    """Return a finished flow matching run on digits."""
    return train(small_config(tmp_path / "teacher", "digits", "flow_matching"))
