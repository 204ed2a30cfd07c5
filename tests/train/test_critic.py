"""Second networks: when they learn, and that they stop the run when they break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.objectives.settings import Context, Metrics
from fastdistill.train import NonFiniteError, TrainConfig, train
from fastdistill.train import critic as critic_module
from fastdistill.train.checkpoint import list_checkpoints
from fastdistill.train.critic import Critic
from fastdistill.train.methods import METHODS
from tests.train.conftest import MakeConfig


@pytest.fixture
def dmd(tiny: MakeConfig) -> TrainConfig:
    """Run three steps of DMD with two updates of its critic each and three more at the start; a checkpoint each."""
    teacher = train(tiny("teacher", method={"name": "flow_matching"}, steps=1))
    method = {"name": "dmd", "critic": {"updates": 2, "warmup_updates": 3}}
    log = {"log_every": 1, "sample_every": 100, "checkpoint_every": 1}
    return tiny("dmd", method=method, teacher=str(teacher), steps=3, log=log)


def test_the_critic_learns_first_and_then_after_each_step(dmd: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that its warm-up comes before the generator's first loss, as the setting says, and not again."""
    order: list[str] = []
    loss, kind = critic_module.fake_score_loss, METHODS["dmd"]
    of_generator = kind.loss

    def of_critic(*args: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        order.append("critic")
        return loss(*args, **options)

    def noted(self: Any, context: Context) -> tuple[Tensor, Metrics]:
        order.append("generator")
        return of_generator(self, context)

    monkeypatch.setattr(critic_module, "fake_score_loss", of_critic)
    monkeypatch.setattr(kind, "loss", noted)
    train(dmd)
    trial, *steps = order  # the first is that of the configuration's check
    assert trial == "generator"
    assert steps == ["critic"] * 3 + ["generator", "critic", "critic"] * 3


def test_a_critic_that_breaks_stops_the_run_before_it_is_saved(
    dmd: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that it names its own step, and that the last good checkpoint is the one before."""
    update = Critic.update

    def broken(self: Critic, context: Context, method: Any, precision: torch.autocast) -> Metrics:
        if context.step == 1:
            with torch.no_grad():
                next(self.fake.parameters()).fill_(float("nan"))
        return update(self, context, method, precision)

    monkeypatch.setattr(Critic, "update", broken)
    with pytest.raises(NonFiniteError, match=r"step 2: critic_loss is nan \(in the critic's own update\)") as caught:
        train(dmd)
    newest: Path = list_checkpoints(dmd.out)[0]
    assert newest.name == "step_00000001.pt"
    assert str(newest) in str(caught.value)
