"""Follow the recipe for a sampler in CONTRIBUTING.md in a copy of the package, where its one file is enough."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipes import ROOT, copy_of_package, run_python, shown_in

USED = """
import sys
import numpy as np
import fastdistill
from fastdistill.cli import main
from fastdistill.train import load_config, load_run, train

assert fastdistill.__file__.startswith(sys.argv[1]), fastdistill.__file__
tiny = ["--steps", "2", "--data.batch", "8", "--model.width", "8", "--device", "cpu", "--out", "run"]
own = ["--method.sampler", "runge_kutta", "--method.sample-stage", "0.5"]
train(load_config("ring-flow", [*tiny, *own]))  # the command would measure it too, for seconds
assert load_run("run")[1].method.sample_stage == 0.5
drawn = {}
for name, how in {"own": [], "stage": ["--stage", "1"], "heun": ["--sampler", "heun"]}.items():
    assert main(["sample", "run", "--n", "5", "--steps", "3", "--out", f"{name}.npy", *how]) == 0
    drawn[name] = np.load(f"{name}.npy")
assert np.array_equal(drawn["stage"], drawn["heun"]) and not np.array_equal(drawn["own"], drawn["heun"])
assert main(["sample", "run", "--stage", "2"]) == 2
assert main(["sample", "run", "--sampler", "euler", "--stage", "1"]) == 2
assert main(["eval", "run", "--n", "64", "--steps", "1", "--stage", "0.9"]) == 0
assert main(["explain"]) == 0
try:
    main(["train", "ring-flow", "--method.sample-stage", "7"])
except SystemExit as stop:
    assert stop.code == 2
"""

TEST = """
from __future__ import annotations

import torch

from fastdistill import samplers
from tests.samplers.fields import exact_samples


def test_it_is_of_second_order(law, noise):
    truth = exact_samples(law, noise)
    errors = [(samplers.runge_kutta(law.velocity, noise, n, stage=0.4) - truth).norm() for n in (64, 128)]
    assert 3.6 < errors[0] / errors[1] < 4.4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy of the package with the sampler's file."""
    folder = tmp_path_factory.mktemp("sampler")
    (copy_of_package(folder) / "samplers" / "runge_kutta.py").write_text(shown_in("Add a sampler"), encoding="utf-8")
    return folder


def test_a_file_is_a_sampler_of_the_command_line(folder: Path) -> None:
    """Check the sampler's setting, option and place in lists; numbers out of range are refused by name."""
    told = " ".join(run_python(folder, "-c", USED, str(folder)).split())
    for words in (
        "--stage: expected in [0.1, 1], got 2.0",
        "--stage: expected none with the sampler euler, for only the sampler runge_kutta takes it; got 1.0",
        "flow_matching, 1 step",
        "runge_kutta velocity 2 no stage 0.1 to 1: where in a step the velocity is looked at again",
    ):
        assert words in told


def test_its_specification_is_tested_by_itself(folder: Path) -> None:
    """Check that the tests of all samplers try the new sampler, and that its own test passes."""
    shutil.copytree(ROOT / "tests" / "samplers", folder / "tests" / "samplers")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "samplers" / "test_runge_kutta.py").write_text(TEST, encoding="utf-8")
    names = [f"tests/samplers/test_{name}.py" for name in ("registry", "guidance", "runge_kutta")]
    told = run_python(folder, "-m", "pytest", "-v", "-p", "no:cacheprovider", *names)
    assert "test_a_specification_tells_evaluations_and_noise[runge_kutta] PASSED" in told
    assert "test_guidance_as_an_input_reaches_the_network[runge_kutta] PASSED" in told
    assert "test_it_is_of_second_order PASSED" in told
