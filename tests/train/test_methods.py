"""Methods through the trainer: each learns something finite, resumes exactly, and knows its objective's options."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from fastdistill.data import Ring, generator_at
from fastdistill.objectives.scores import ScoreMethod
from fastdistill.paths import EDM
from fastdistill.times import LogitNormal, pair_times
from fastdistill.train import ConfigError, TrainConfig, generate, load_config, load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.loop import make_batch, make_context
from fastdistill.train.methods import METHODS
from fastdistill.train.state import new_state
from tests.train.conftest import MakeConfig, tiny_fields
from tests.train.test_resume import assert_same_run, assert_same_state, killed, train_and_die

# Few pairs, few steps: what a method's defaults would make long.
SMALL: dict[str, dict[str, Any]] = {
    "reflow": {"pairs": 40, "pair_steps": 2},
    "dmd": {"critic": {"updates": 2, "gan": True}, "generator_times": (1.0, 0.5)},
    "consistency": {"intervals": (4, 16), "target_ema": 0.9},
    "scm": {"tangent_warmup": 2},
    "rcm": {"tangent_warmup": 2, "critic": {"updates": 1}},
    "ayf_emd": {"tangent_warmup": 2},
    "ayf_lmd": {"tangent_warmup": 2},
    "shortcut": {"distinct": 0.5},
    "improved_meanflow": {"velocity_head": True},
}
# What an objective offers and a configuration file can't hold, or the trainer decides.
NOT_SETTINGS = {"y", "path", "jvp", "generator", "teacher", "weak_teacher", "target", "weighting", "warmup", "alpha",
                "distinct_rows", "undropped", "factor", "fake", "gan", "gan_weight", "levels",
                "weight", "midpoint", "score_gradient"}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finish a run for the methods that follow one."""
    fields = tiny_fields(tmp_path_factory.mktemp("teacher") / "run")
    return train(TrainConfig.model_validate(fields | {"method": {"name": "flow_matching"}, "steps": 4}))


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finish the same on digits, with dropped labels."""
    fields = tiny_fields(
        tmp_path_factory.mktemp("teacher") / "digits",
        data={"name": "digits", "batch": 8, "label_dropout": 0.5},
        model={"preset": "mlp-digits", "width": 8, "depth": 1},
        method={"name": "flow_matching"},
        steps=2,
    )
    return train(TrainConfig.model_validate(fields))


def config_of(name: str, out: Path, teacher: Path, **changes: Any) -> TrainConfig:
    """Return a tiny run of a method on the ring, with a teacher where it can't do without."""
    method = {"name": name, **SMALL.get(name, {})}
    needs = METHODS[name].makes_pairs or METHODS[name].has_critic or "teacher" in METHODS[name].objective().needs
    fields = tiny_fields(out) | {"method": method, "steps": 3} | ({"teacher": str(teacher)} if needs else {})
    return TrainConfig.model_validate(fields | changes)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_samples(name: str, teacher: Path, tmp_path: Path) -> None:
    """Check three steps on the ring: finite metrics, other weights than at first, and samples by its own sampler."""
    config = config_of(name, tmp_path / "run", teacher, log={"log_every": 1}, optim={"lr": 0.01, "warmup_steps": 0})
    run = train(config)
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [point["step"] for point in points] == [1, 2, 3]
    assert all(math.isfinite(value) for point in points for value in point.values())
    assert all(point["grad_norm"] > 0 for point in points)
    net, config = load_run(run)
    for steps in (1, 2):
        assert generate(net, config, 16, steps=steps).isfinite().all()


GUIDED = {"scale": 1.0, "scale_to": 3.0}


@pytest.mark.parametrize(
    ("method", "teachers"),
    [
        ({"name": "improved_meanflow", "guidance": GUIDED}, ()),
        ({"name": "improved_meanflow", "guidance": GUIDED, "velocity_head": True}, ()),
        ({"name": "meanflow", "guidance": {"scale": 2.0, "kappa": 0.5}}, ()),
        ({"name": "ayf_emd", "guidance": GUIDED}, ("teacher", "weak_teacher")),
        ({"name": "ayf_lmd", "guidance": {"scale": 2.0}}, ("teacher",)),
        ({"name": "dmd", "guidance": {"scale": 2.0}, "critic": {"updates": 1, "gan": True}}, ("teacher",)),
        ({"name": "scm", "guidance": {"scale": 2.0}}, ("teacher",)),
        ({"name": "reflow", "pairs": 20, "pair_steps": 1, "pair_guidance": 2.0}, ("teacher",)),
        ({"name": "imm", "group": 4, "sample_guidance": 2.0}, ()),
        ({"name": "shortcut", "distinct": 0.5, "target_ema": 0.9}, ()),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_digits_with_labels_and_guidance(
    method: dict[str, Any], teachers: tuple[str, ...], digits_teacher: Path, tiny_digits: MakeConfig
) -> None:
    """Check labels, a weak teacher, and a scale of each row's own, which the network is told."""
    told = "scale_to" in method.get("guidance", {})
    model = {"preset": "mlp-digits", "width": 8, "depth": 2, "guidance": told}
    run = train(tiny_digits(method=method, model=model, steps=2, **dict.fromkeys(teachers, str(digits_teacher))))
    net, config = load_run(run)
    assert generate(net, config, 10, guidance=2.0 if told else None).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_settings_cover_its_objective_s_options(name: str) -> None:
    """Check that each keyword of the objective is a field, or is known to be none."""
    fields, takes = set(METHODS[name].model_fields), METHODS[name].objective().takes
    assert not takes - fields - NOT_SETTINGS


def test_consistency_weighs_by_the_gap_of_times_or_of_noise_levels() -> None:
    """Check iCT's levels by hand, on Karras's grid of three intervals, where the gap of times is one and the same."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = [(low + i / 3 * (high - low)) ** 7 for i in range(4)]
    grid = torch.linspace(0, 1, 4)
    t, r = grid[1:], grid[:-1]
    by_level, by_time = (METHODS["consistency"](gap=gap).weight(EDM()) for gap in ("level", "time"))
    assert by_level is not None and by_time is not None and METHODS["consistency"](gap=None).weight(EDM()) is None
    assert by_level(t, r).tolist() == pytest.approx([1 / (b - a) for a, b in pairwise(sigma)], rel=1e-5)
    assert by_time(t, r).tolist() == pytest.approx([3.0] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["scm", "consistency", "dmd", "reflow", "improved_meanflow"])
def test_extra_state_resumes_bit_for_bit(name: str, teacher: Path, tmp_path: Path) -> None:
    """Check a learned weight, an averaged target, a critic with all its parts, made pairs, and a velocity head."""
    changes = {"steps": 6, "log": {"log_every": 1, "sample_every": 100, "checkpoint_every": 2}}
    whole = train(config_of(name, tmp_path / "whole", teacher, **changes))
    config = config_of(name, tmp_path / "killed", teacher, **changes)
    killed(train_and_die, config, "before the rename", 4)
    assert [path.name for path in list_checkpoints(config.out)] == ["step_00000002.pt"]
    assert_same_run(train(config), whole)


def test_checkpoints_hold_each_part_that_learns(teacher: Path, tmp_path: Path) -> None:
    """Check that there is nothing for the parts that a method doesn't have."""
    held = {}
    parts = {"target", "weighting", "critic", "velocity_layer"}
    for name in ("scm", "consistency", "dmd", "improved_meanflow"):
        run = train(config_of(name, tmp_path / name, teacher, steps=1))
        held[name] = set(read_checkpoint(list_checkpoints(run)[0])) & parts
    assert held == {
        "scm": {"weighting"},
        "consistency": {"target"},
        "dmd": {"critic"},
        "improved_meanflow": {"velocity_layer"},
    }


def test_the_critic_moves_and_its_teacher_does_not(teacher: Path, tmp_path: Path) -> None:
    """Check that the fake score starts as the teacher and ends elsewhere."""
    config = config_of("dmd", tmp_path / "run", teacher)
    assert isinstance(config.method, ScoreMethod)
    before = load_run(teacher, device="cpu")[0].state_dict()
    state = read_checkpoint(list_checkpoints(train(config))[0])["critic"]
    assert all(not torch.equal(state["fake"][name], before[name]) for name in before if "weight" in name)
    after = load_run(teacher, device="cpu")[0].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(state) == {"fake", "gan", "optimizer"}


def test_pairs_are_made_once_and_damaged_ones_again(teacher: Path, tmp_path: Path) -> None:
    """Check that whole shards are kept byte for byte, and hold where the teacher's flow takes the noise."""
    run = train(config_of("reflow", tmp_path / "run", teacher))
    shard = run / "pairs" / "pairs_00000000.safetensors"
    before, pairs = (shard.stat().st_mtime_ns, shard.read_bytes()), load(shard.read_bytes())
    train(config_of("reflow", tmp_path / "run", teacher, steps=4))
    assert (shard.stat().st_mtime_ns, shard.read_bytes()) == before
    shard.write_bytes(before[1][:100])
    train(config_of("reflow", tmp_path / "run", teacher, steps=5))
    assert_same_state(load(shard.read_bytes()), pairs)


def test_a_round_of_reflow_can_be_the_teacher_of_the_next(teacher: Path, tmp_path: Path) -> None:
    """Check it, and that of a distillation, which trains at t = 1 alone."""
    first = train(config_of("reflow", tmp_path / "first", teacher))
    small = {"name": "reflow", "pairs": 40, "pair_steps": 2, "distil": True, "sample_steps": 1}
    second = train(config_of("reflow", tmp_path / "second", first, method=small))
    assert (second / "export" / "ema.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"teacher: .* was distilled to t = 1 \(method.distil\)"):
        train(config_of("reflow", tmp_path / "third", second))
    with pytest.raises(ConfigError, match=r"method.sample_steps: with method.distil .* expected 1, got 16"):
        train(config_of("reflow", tmp_path / "third", first, method=small | {"sample_steps": 16}))


def test_the_two_times_can_have_laws_of_their_own(tiny: MakeConfig) -> None:
    """Check the CIFAR-10 recipe of MeanFlow's code; without `end_times` both draws have the one law, as ever."""
    recipe = {"times": {"mean": -0.6, "std": 1.6}, "end_times": {"mean": -4.0, "std": 1.6}, "distinct": 0.75}
    laws = {key: value | {"law": "logit_normal"} for key, value in recipe.items() if isinstance(value, dict)}
    for name in ("meanflow", "improved_meanflow", "alpha_flow"):
        config = tiny(method={"name": name} | recipe | laws)
        context = make_context(
            new_state(config, torch.device("cpu")), config, make_batch(Ring(), config, 0, torch.device("cpu"))
        )
        seeded = generator_at(config.seed, "times", 0)
        expected = pair_times(8, LogitNormal(-0.6, 1.6), 0.75, end_sampler=LogitNormal(-4.0, 1.6), generator=seeded)
        t, s = config.method.draw_times(context)
        assert torch.equal(t, expected[0])
        assert torch.equal(s, expected[1])
        assert (t != s).sum() == 6
    train(config)
    assert load_run(config.out)[1].method == config.method
    assert tiny(method={"name": "meanflow"}).method.end_times is None


def test_the_method_is_chosen_on_the_command_line(tmp_path: Path) -> None:
    """Check that the file's recipe for it comes with it, under a name of its own, and any of its fields can follow."""
    config = load_config("ring", ["--method.name", "esd", "--method.distinct", "0.5", "--steps", "9"])
    assert (config.method.name, config.method.distinct, config.out) == ("esd", 0.5, Path("runs/ring-esd"))


def test_a_method_without_a_teacher_can_start_from_one(teacher: Path, tmp_path: Path) -> None:
    """Check ECT, which tunes a finished diffusion model."""
    changes = {"teacher": str(teacher), "init_from_teacher": True}
    config = TrainConfig.model_validate(
        tiny_fields(tmp_path / "run") | {"method": {"name": "ect"}, "steps": 3} | changes
    )
    start, learnt = new_state(config, torch.device("cpu"))["net"].state_dict(), load_run(teacher, device="cpu")[0]
    assert all(torch.equal(start[name], value) for name, value in learnt.state_dict().items())
    tuned = load_run(train(config), device="cpu")[0].state_dict()
    assert any(not torch.equal(tuned[name], value) for name, value in start.items())
