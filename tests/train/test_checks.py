"""Combinations that can't be trained: refused before anything is made, with what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdistill.train import ConfigError, load_config, train
from fastdistill.train.checks import check_config, check_teacher
from fastdistill.train.load import choose_method
from fastdistill.train.methods import METHODS
from tests.train.conftest import MakeConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "dmd"}}, ["teacher: dmd needs a teacher", "train ring-flow", "--teacher runs/ring-flow"]),
        ({"method": {"name": "dmd"}, "init_from_teacher": True}, ["teacher: dmd needs a teacher", "train ring-flow"]),
        ({"init_from_teacher": True}, ["init_from_teacher: needs `teacher`"]),
        ({"method": {"name": "ayf_emd"}}, ["teacher: ayf_emd needs a teacher"]),
        ({"method": {"name": "ayf_lmd"}}, ["teacher: ayf_lmd needs a teacher"]),
        ({"method": {"name": "reflow"}}, ["teacher: reflow needs a teacher"]),
        ({"method": {"name": "rcm"}}, ["teacher: rcm needs a teacher"]),
        (
            {"method": {"name": "ect"}, "teacher": "x"},
            ["teacher: ect learns without", "by --init-from-teacher, or choose a method.name", "facm"],
        ),
        ({"method": {"name": "ect"}, "teacher": "x", "init_from_teacher": True}, []),
        ({"weak_teacher": "x", "teacher": "y", "method": {"name": "ect"}}, ["ect learns without"]),
        (
            {"path": {"name": "edm"}, "method": {"name": "scm"}},
            ["path.name: scm fits the paths cosine, icfm, linear, ot_cfm, trig, vp_si, got 'edm'"],
        ),
        (
            {"path": {"name": "fm"}, "method": {"name": "scm"}},
            ["path.name: scm fits", "method.parameterization average"],
        ),
        ({"path": {"name": "ve"}, "method": {"name": "rcm"}, "teacher": "x"}, ["path.name: rcm fits", "average"]),
        *(
            ({"path": {"name": path}, "method": {"name": name, "parameterization": "average"}, "teacher": "x"}, [])
            for name in ("scm", "rcm")
            for path in ("fm", "edm", "ve", "linear")
        ),
        (
            {"path": {"name": "ot_cfm"}, "method": {"name": "dmd"}, "teacher": "x"},
            ["path.name: dmd fits", "these, or another"],
        ),
        ({"path": {"name": "liner"}}, ["path.name: expected one of", "'liner'", "did you mean 'linear'?"]),
        ({"path": {"name": "gaussian"}}, ["path.name: expected one of", "'gaussian'"]),
        ({"path": {"name": "linear", "sigma": 0.1}}, ["path: ", "linear", "sigma"]),
        ({"path": {"name": "fm", "sigma": -1.0}}, ["path: sigma: expected a finite number in [0, 1], got -1"]),
        (
            {"path": {"name": "icfm", "sigma": 0.1}, "method": {"name": "ect"}},
            ["method.name: ect", "share their noise"],
        ),
        ({"method": {"name": "imm", "group": 3}}, ["method.group: expected a divisor of data.batch, 8, got 3"]),
        ({"method": {"name": "imm", "high": 1.0}}, ["method.name: imm can't be trained so", "finite noise level"]),
        ({"method": {"name": "shortcut", "finest": 100}}, ["method.name: shortcut", "finest: expected a power of 2"]),
        ({"method": {"name": "consistency", "guidance": {"scale": 2.0}}}, ["method.guidance: ring has no labels"]),
        ({"method": {"name": "consistency", "intervals": [8, 4]}}, ["method.intervals: expected 1 <= first"]),
        (
            {"method": {"name": "consistency", "gap": "level"}},
            ["method.gap: got level on path linear", "infinite", "expected time, or path.name edm or ve"],
        ),
        ({"method": {"name": "consistency", "gap": "level"}, "path": {"name": "cosine"}}, ["method.gap: got level"]),
        ({"method": {"name": "consistency", "gap": "level"}, "path": {"name": "edm"}}, []),
        ({"method": {"name": "consistency", "gap": "level"}, "path": {"name": "ve"}}, []),
        ({"method": {"name": "ect", "learned_weight": True}, "path": {"name": "edm"}}, []),
        ({"method": {"name": "meanflow", "learned_weight": True}}, ["method.learned_weight: meanflow has no use"]),
        ({"method": {"name": "meanflow", "target_ema": 0.9}}, ["method.target_ema: meanflow has no use"]),
        ({"method": {"name": "meanflow", "velocity_head": True}}, ["method.velocity_head: meanflow has no use"]),
        ({"method": {"name": "imm", "sample_guidance": 2.0}}, ["method.sample_guidance: ring has no labels"]),
        ({"method": {"name": "dmd", "generator_times": [0.5]}, "teacher": "x"}, ["method.generator_times"]),
        ({"method": {"name": "dmd", "critic": {"levels": [0.5, 0.2]}}, "teacher": "x"}, ["method.critic.levels"]),
        ({"method": {"name": "reflow"}, "teacher": "x", "coupling": "optimal_transport"}, ["coupling: reflow couples"]),
        (
            {"method": {"name": "reflow", "distil": True, "sample_steps": 1}, "teacher": "x", "path": {"name": "edm"}},
            ["method.distil: its one step", "expected path.name linear, fm or icfm, got edm"],
        ),
        ({"method": {"name": "reflow", "distil": True, "sample_steps": 1}, "teacher": "x", "path": {"name": "fm"}}, []),
        (
            {"method": {"name": "scm", "sampler": "euler"}},
            ["method.sampler: a network of scm serves consistency, got euler"],
        ),
        (
            {"path": {"name": "ot_cfm"}, "method": {"name": "ect", "sample_steps": 2}},
            ["method.sample_steps: consistency adds fresh noise between steps", "expected 1, got 2"],
        ),
        ({"path": {"name": "ot_cfm"}, "method": {"name": "ect"}}, []),
        (
            {"method": {"name": "ayf_emd", "sample_guidance": 2.0}, "teacher": "x"},
            ["method.sample_guidance", "expected"],
        ),
        ({"method": {"name": "ayf_emd"}, "teacher": "x", "weak_teacher": "y"}, ["weak_teacher: at", "has no effect"]),
        (
            {"method": {"name": "ayf_emd", "guidance": {"scale": 2.0}}, "teacher": "x", "weak_teacher": "y"},
            [],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_refused_by_name(tiny: MakeConfig, changes: dict[str, Any], words: list[str]) -> None:
    """Check that it is refused, or accepted where no words are expected."""
    if not words:
        check_config(tiny(**changes))
        return
    with pytest.raises(ConfigError) as caught:
        check_config(tiny(**changes))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_method_meets_the_nearest_name() -> None:
    """Check it on the command line, and in a file."""
    with pytest.raises(ConfigError, match=r"method.name: expected one of .*, got 'meanflo'; did you mean 'meanflow'\?"):
        load_config("ring", ["--method.name", "meanflo"])
    with pytest.raises(ConfigError, match=r"got 'facmm'; did you mean 'facm'\?"):
        load_config("ring", ["--method.name=facmm"])
    with pytest.raises(ConfigError, match=r"method.name: expected a value"):
        load_config("ring", ["--method.name"])


@pytest.mark.parametrize("data", ["ring", "digits"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe_that_can_be_trained(name: str, data: str) -> None:
    """Check both data sets, once the teacher is there; the run gets a folder of its own."""
    config = load_config(data, ["--method.name", name])
    assert config.method.name == name
    assert config.out == Path("runs/ring" if (name, data) == ("meanflow", "ring") else f"runs/{data}-{name}").with_name(
        data if name == "meanflow" else f"{data}-{name}"
    )
    assert config.teacher in (None, Path(f"runs/{data}-flow"))


def test_a_recipe_changes_its_groups_and_keeps_the_rest() -> None:
    """Check that the file's own method settings don't leak into another method."""
    given = {"method": {"name": "meanflow", "p": 0.5}, "optim": {"lr": 1.0, "ema": 0.5}, "seed": 3}
    chosen = choose_method(given, "esd", {"esd": {"method": {"distinct": 0.1}, "optim": {"lr": 2.0}, "teacher": "x"}})
    assert chosen == {
        "method": {"distinct": 0.1, "name": "esd"},
        "optim": {"lr": 2.0, "ema": 0.5},
        "seed": 3,
        "teacher": "x",
    }
    assert choose_method(given, "esd", {})["method"] == {"name": "esd"}


def test_a_teacher_must_know_a_velocity_on_the_same_path(tiny: MakeConfig) -> None:
    """Check that a consistency model, which knows none, is refused; and that a velocity holds on its own path only."""
    ect, curved = train(tiny("ect", method={"name": "ect"}, steps=1)), {"path": {"name": "cosine"}}
    with pytest.raises(
        ConfigError, match="learnt ect, whose network knows no velocity to follow; expected a run of fl"
    ):
        check_teacher(tiny("s", teacher=str(ect)))
    flow = train(tiny("flow", method={"name": "flow_matching"}, steps=1, **curved))
    with pytest.raises(ConfigError, match="learnt on the path cosine, and path is linear"):
        check_teacher(tiny("s", teacher=str(flow)))
    check_teacher(tiny("s", teacher=str(flow), **curved))
    check_teacher(tiny("s", teacher=str(flow), method={"name": "reflow"}))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "dmd", "guidance": {"scale_to": 2.0}}, "method.guidance.scale_to: dmd has one scale"),
        ({"name": "rcm", "guidance": {"scale_to": 2.0}}, "method.guidance.scale_to: rcm has one scale"),
        ({"name": "improved_meanflow", "guidance": {"scale": 2.0, "kappa": 0.5}}, "method.guidance.kappa: improved"),
        ({"name": "meanflow", "sample_guidance": 2.0}, "method.sample_guidance: a network of meanflow has its"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_guidance_without_effect_is_refused(method: dict[str, Any], words: str, tiny_digits: MakeConfig) -> None:
    """Check a scale that the generator isn't told, an estimate's share that is computed, and guided maps' samples."""
    model = {"preset": "mlp-digits", "width": 8, "depth": 1, "guidance": True}
    teacher = {"teacher": "x"} if METHODS[method["name"]].has_critic else {}
    with pytest.raises(ConfigError) as caught:
        check_config(tiny_digits(method=method, model=model, **teacher))
    assert words in str(caught.value)


def test_guidance_that_the_network_is_told_needs_its_input(tiny_digits: MakeConfig) -> None:
    """Check that the same settings train once the network has the input."""
    method = {"name": "improved_meanflow", "guidance": {"scale": 1.0, "scale_to": 3.0}}
    config = tiny_digits(method=method)
    with pytest.raises(ConfigError, match=r"model.guidance: improved_meanflow gives the network a guidance scale"):
        check_config(config)
    model = {"preset": "mlp-digits", "width": 16, "depth": 1, "guidance": True}
    train(tiny_digits(method=method, model=model))
