"""Methods that mean something else than in an older version: their runs are refused rather than continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.data import Ring, generator_at
from fastdistill.objectives.rcm import ConsistentCriticSettings
from fastdistill.objectives.scores import CriticSettings, ScoreMethod
from fastdistill.objectives.settings import Context, KarrasLevels, Metrics, ShiftedLevels, TimeLevels
from fastdistill.paths import EDM, LINEAR
from fastdistill.train import CheckpointError, ConfigError, TrainConfig, train
from fastdistill.train.checked import checked
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.config import run_of
from fastdistill.train.critic import Critic
from fastdistill.train.loop import make_batch, make_context
from fastdistill.train.methods import METHODS
from fastdistill.train.state import new_state
from tests.train.conftest import MakeConfig

FLOW = {"name": "flow_matching"}


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ({"name": "ect"}, {"name": "edm"}),
        ({"name": "consistency", "intervals": (4, 16)}, {"name": "edm"}),
        ({"name": "dmd", "critic": {"updates": 1}}, {"name": "linear"}),
        ({"name": "rcm", "critic": {"updates": 1}}, {"name": "linear"}),
    ],
    ids=lambda value: value["name"],
)
def test_a_run_of_an_older_definition_is_refused(
    tiny: MakeConfig, method: dict[str, Any], way: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a run whose settings are the same and whose checkpoint holds no number: it would be another method."""
    teacher = {} if method["name"] == "ect" else {"teacher": str(train(tiny("teacher", method=FLOW, path=way)))}
    steps = {"log": {"log_every": 1, "checkpoint_every": 2}}
    with monkeypatch.context() as before:
        before.setattr(METHODS[method["name"]], "definition", lambda self, config: None)
        train(tiny(method=method, path=way, steps=2, **teacher, **steps))
    with pytest.raises(CheckpointError, match=r"what the method computes changed .* \(None -> 2\): choose another"):
        train(tiny(method=method, path=way, steps=2, **teacher, **steps))


def test_where_a_method_means_what_it_meant_its_runs_go_on(tiny: MakeConfig) -> None:
    """Check ECT and consistency distillation on a path from the data to pure noise, and training on any."""
    for method, way, teacher in (
        ({"name": "ect"}, "linear", None),
        ({"name": "consistency"}, "linear", Path("x")),
        ({"name": "consistency"}, "edm", None),
        ({"name": "consistency", "solver": "heun_in_time"}, "edm", Path("x")),
    ):
        config = tiny(method=method, path={"name": way}, teacher=teacher)
        assert config.method.definition(run_of(config)) is None


# rCM: what its scores wait for


def test_scores_and_their_network_wait_for_the_end_of_the_warm_up(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the loss has one term until then and the fake score stays the teacher's, whose warm-up follows."""
    teacher = train(tiny("teacher", method=FLOW, steps=1))
    seen: list[tuple[str, int]] = []
    kind, learn, loss = METHODS["rcm"], Critic._train, METHODS["rcm"].loss

    def of_critic(self: Critic, context: Context, method: Any, precision: Any, numbers: range) -> Metrics:
        seen.extend([("critic", context.step)] * len(numbers))
        return learn(self, context, method, precision, numbers)

    def of_generator(self: Any, context: Context) -> Any:
        result = loss(self, context)
        seen.append(("both terms" if "terms" in result[1] else "one term", context.step))
        return result

    monkeypatch.setattr(Critic, "_train", of_critic)
    monkeypatch.setattr(kind, "loss", of_generator)
    method = {"name": "rcm", "tangent_warmup": 2, "critic": {"updates": 1, "warmup_updates": 1}}
    log = {"log_every": 1, "checkpoint_every": 2, "sample_every": 100}
    run = train(tiny(method=method, teacher=str(teacher), steps=3, log=log))
    assert seen[0] == ("both terms", 2), "the configuration's check looks at all of it"
    assert seen[1:] == [("one term", 0), ("one term", 1), ("critic", 2), ("both terms", 2), ("critic", 2)]
    fakes = [read_checkpoint(path)["critic"]["fake"] for path in list_checkpoints(run)]
    start = read_checkpoint(list_checkpoints(teacher)[0])["ema"]
    assert all(torch.equal(value, start[f"module.{name}"]) for name, value in fakes[1].items())
    assert not all(torch.equal(value, start[f"module.{name}"]) for name, value in fakes[0].items())


def test_the_preset_is_the_authors() -> None:
    """Check weights 100 and 1 of sums, no learned weight, four updates of the fake score to one, and the times."""
    preset = METHODS["rcm"]()
    assert (preset.score_weight, preset.learned_weight, preset.tangent_warmup) == (0.02, False, 1000)
    assert (preset.times.mean, preset.times.std, preset.times.sigma_data) == (-0.8, 1.6, 1.0)
    assert preset.critic == checked(ConsistentCriticSettings)(updates=4, levels={"law": "shifted", "shift": 5.0})
    given = METHODS["rcm"].model_validate({"critic": {"lr": 0.1}})
    assert given.critic == checked(ConsistentCriticSettings)(lr=0.1), "a recipe that names one field keeps the others"


# The laws of levels


def test_two_numbers_are_times_as_they_were() -> None:
    """Check that an older configuration, which says no law, loads, and that an empty range is refused by name."""
    critic, karras, times = map(checked, (CriticSettings, KarrasLevels, TimeLevels))
    assert critic(levels=(0.1, 0.9)).levels == times(low=0.1, high=0.9)
    assert critic().levels == karras(low=0.02, high=0.98)
    assert critic().trained_levels == karras(low=0.0, high=1.0)
    assert critic(levels=(0.1, 0.9), fake_levels={"law": "same"}).trained_levels == times(low=0.1, high=0.9)
    with pytest.raises(ConfigError, match=r"^method.critic.fake_levels: expected low < high, got 0.5, 0.5"):
        critic(fake_levels={"law": "karras", "low": 0.5, "high": 0.5}).check()
    with pytest.raises(ValueError, match="law"):
        TrainConfig.model_validate({"out": "x", "steps": 1, "data": {"name": "ring"}, "model": {"preset": "mlp-ring"},
                                    "method": {"name": "dmd", "critic": {"levels": {"law": "other"}}}})  # fmt: skip


def test_each_law_draws_times_of_the_run_s_own_path() -> None:
    for settings, path in ((KarrasLevels(), EDM()), (ShiftedLevels(), LINEAR), (TimeLevels(), LINEAR)):
        t = settings.sampler(path)(1000, torch.Generator().manual_seed(0))
        expected = 5 / 6 if isinstance(settings, ShiftedLevels) else 0.5
        assert abs(t.median().item() - expected) < 0.03


@pytest.mark.parametrize("name", ["dmd", "rcm"])
def test_samples_for_the_critic_start_from_noise_alone(name: str, tiny: MakeConfig) -> None:
    """Check that the same noise gives the same samples whatever the data, also where data don't fade."""
    teacher = train(tiny("teacher", method=FLOW, steps=1, path={"name": "edm"}))
    method = {"name": name} | ({"parameterization": "average"} if name == "rcm" else {})
    config = tiny(method=method, teacher=str(teacher), path={"name": "edm"})
    assert isinstance(config.method, ScoreMethod)
    state = new_state(config, torch.device("cpu"))
    samples = []
    for step in (0, 1):
        context = make_context(state, config, make_batch(Ring(), config, step, torch.device("cpu")))
        samples.append(config.method.draw_samples(context, generator_at(0, "critic", 0)))
    assert torch.equal(*samples)
