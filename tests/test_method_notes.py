"""Test `explain` for every method."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import fastdistill
from fastdistill.method_notes import explain
from fastdistill.objectives import OBJECTIVES
from fastdistill.objectives.metric import WEIGHTS
from fastdistill.train import ConfigError, load_config
from fastdistill.train.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_explained_in_full(name: str) -> None:
    """Check what the registry holds and what the trainer adds, each under its heading."""
    text = explain(name)
    words = " ".join(text.split())
    objective = METHODS[name].objective()
    for heading in ("formula", "identity", "tangent", "times", "reduction", "path", "needs", "sampler", "defaults"):
        assert f"\n{heading} " in text
    for value in (objective.formula, objective.tangent, objective.reduction, *objective.sources):
        assert " ".join(value.split()) in words
    assert text.startswith(f"{name}: ")
    assert f"fastdistill.objectives.{objective.function.__module__.split('.')[-1]}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_every_objective_has_a_method_and_the_table_has_a_line_for_each() -> None:
    """Check that the registry and the trainer know the same names; reflow is flow matching on other data."""
    assert set(METHODS) == {*OBJECTIVES, "reflow"}
    lines = explain().splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(METHODS)]] == list(METHODS)


def test_recipes_are_said_by_name_where_a_method_has_them() -> None:
    """Check the two that the article gives for MeanFlow."""
    said = " ".join(explain("meanflow").split())
    assert "recipes by method.recipe: cifar10_paper: times.law=logit_normal, times.mean=-2.0, times.std=2.0, " in said
    assert "; cifar10_code: times.law=logit_normal, times.mean=-0.6" in said and "end_times.mean=-4.0" in said
    assert "\nrecipes " not in explain("improved_meanflow")


def test_needs_are_said() -> None:
    """Check a teacher, pairs, and a second network."""
    assert "a teacher: a finished run" in " ".join(explain("dmd").split())
    assert "a second network" in explain("dmd")
    assert "whose flow makes the pairs" in " ".join(explain("reflow").split())
    assert "with --teacher RUN it follows" in " ".join(explain("meanflow").split())
    assert "needs       nothing" in explain("ect")


def test_guidance_is_said() -> None:
    """Check guidance in the target, of samples, and nowhere."""
    said = {name: " ".join(explain(name).split()) for name in ("imm", "flow_matching", "meanflow", "ect")}
    assert "guidance of samples, by two evaluations of the jumps, u_null + scale (u_y - u_null)" in said["imm"]
    assert "guidance of samples, by two evaluations of the velocity" in said["flow_matching"]
    assert "guidance learnt: inside the velocity" in said["meanflow"]
    assert "guidance none" in said["ect"]


def test_weights_of_the_times_are_said_where_they_can_be_chosen() -> None:
    """Check that each is named."""
    said = " ".join(explain("flow_matching").split())
    assert all(f"{name} = {meaning}" in said for name, meaning in WEIGHTS.items())
    assert "\nweight " in explain("reflow") and "\nweight " not in explain("meanflow")


def test_paths_are_said() -> None:
    """Check any path, some paths, and some paths that an option widens to any."""
    assert "path        any" in explain("meanflow")
    assert "vp_si; any with parameterization=average" in " ".join(explain("scm").split())
    assert "any with" not in explain("dmd")


@pytest.mark.parametrize("name", METHODS)
def test_the_command_to_try_is_a_valid_one(name: str) -> None:
    """Check that it makes a configuration as printed, and that it names the teacher that the ring's recipe follows."""
    words = explain(name).split("\ntry ")[1].split()
    assert words[:2] == ["fastdistill", "train"]
    config = load_config(words[2], words[3:])
    assert config.method.name == name
    assert (config.teacher is not None) == ("--teacher" in words)


def test_an_unknown_method_meets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'facm'"):
        explain("facn")


def test_no_module_hides_a_public_name() -> None:
    """Check that no imported submodule takes the place of a public function of its name."""
    folder = Path(fastdistill.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    functions = {name for name in fastdistill.__all__ if not isinstance(getattr(fastdistill, name), ModuleType)}
    assert functions & modules == {"jvp"}, "jvp is imported with the package, before its function"
    assert callable(fastdistill.jvp)
