"""Test the whole budget of a result: every network's rows, the teacher's steps, pairs and critic updates."""

from __future__ import annotations

import pytest
import torch

from fastdistill.compare import configure, measure_cost
from fastdistill.eval.budget import counting_rows, distinct_share, exponent, whole_budget
from fastdistill.models import MLP
from fastdistill.train import TrainConfig, load_run, train

TINY = ["--model.width", "8", "--data.batch", "16", "--device", "cpu", "--steps", "4"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Train a teacher of four steps, in the folder where its students look for it."""
    config = configure("flow_matching", "ring", tmp_path_factory.mktemp("budget"), TINY)
    train(config)
    return config


@pytest.mark.parametrize(
    ("name", "per_row"),
    [
        ("flow_matching", 1.0),
        ("meanflow", 1.0),  # A jvp is one evaluation, and so is a plain call.
        ("improved_meanflow", 1.25),  # 25 % of the rows ask for a direction first.
        ("ect", 2.0),
        ("scm", 2.0),  # These are the teacher's velocity and the jvp.
        ("consistency", 4.0),  # Heun's step takes two of the teacher, and the student takes two.
    ],
)
def test_every_networks_rows_are_counted(name: str, per_row: float, teacher: TrainConfig) -> None:
    config = configure(name, "ring", teacher.out.parent, TINY)
    assert measure_cost(config)["evaluations_per_step"] == per_row * 16


def test_counting_ends_with_its_block() -> None:
    net = MLP(dim=2, width=8)
    t = torch.ones(3)
    with counting_rows(net) as rows:
        net(torch.ones(3, 2), t=t, s=t)
        MLP(dim=2, width=8)(x=torch.ones(3, 2), t=t, s=t)
        net.forward(torch.ones(3, 2), t=t, s=t)
    net(torch.ones(3, 2), t=t, s=t)
    assert rows == [3, 3]
    assert not torch.nn.modules.module._has_any_global_hook(), "torch.compile would warn of what is left"


def test_pairs_and_critics_and_the_teacher_are_in_the_sum(teacher: TrainConfig) -> None:
    """Check that a method from data spends nothing before its first step."""
    net, of = load_run(teacher.out, device="cpu")
    cost = {"seconds_per_step": 0.5, "evaluations_per_step": 10.0}
    alone = whole_budget(teacher, cost, None)
    assert (alone["evaluations"], alone["seconds"], alone["prior_seconds"], alone["teacher_steps"]) == (40, 2, 0, 0)
    pairs = ["--method.pairs", "64", "--method.pair_steps", "3"]
    reflow = whole_budget(configure("reflow", "ring", teacher.out.parent, [*TINY, *pairs]), cost, (of, cost, net))
    assert (reflow["pairs"], reflow["teacher_steps"]) == (64, 4)
    assert reflow["prior_evaluations"] == 40 + 64 * 3 * 2
    assert reflow["evaluations"] == reflow["prior_evaluations"] + 40
    assert reflow["seconds"] > reflow["prior_seconds"] > 2
    dmd = whole_budget(configure("dmd", "ring", teacher.out.parent, TINY), cost, (of, cost, net))
    assert dmd["critic_updates"] >= 4 * 5


def test_the_exponent_and_the_share_are_those_of_the_settings() -> None:
    """Check that FACM's own p, the exponent of a schedule, isn't taken for the exponent of the loss."""

    def settings(**method: object) -> dict[str, object]:
        return {"method": method}

    assert exponent(settings(name="meanflow", p=0.75)) == "0.75"
    assert exponent(settings(name="facm", p=0.3)) == "0.5"
    assert exponent(settings(name="alpha_flow")) == "1"
    assert exponent(settings(name="scm", c=0.1)) == "0.5"
    assert exponent(settings(name="scm", c=None)) == exponent(settings(name="esd")) == "0"
    assert exponent(settings(name="consistency", distance="huber")) == "0.5"
    assert exponent(settings(name="imm")) == "-"
    assert distinct_share(settings(name="meanflow", distinct=0.75)) == "75 %"
    assert distinct_share(settings(name="scm")) == "100 %"
    assert distinct_share(settings(name="flow_matching")) == "0 %"
