"""Follow the recipe of a method in CONTRIBUTING.md in a copy of the package: its file, and its tests' file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipes import ROOT, copy_of_package, run_python, shown_in

USED = """
import sys
import fastdistill
from fastdistill.cli import main
from fastdistill.objectives import OBJECTIVES, short_meanflow
from fastdistill.train import load_config, load_run, train

assert fastdistill.__file__.startswith(sys.argv[1]), fastdistill.__file__
assert OBJECTIVES["short_meanflow"].function is short_meanflow
tiny = ["--method.name", "short_meanflow", "--steps", "2", "--data.batch", "8", "--model.width", "8", "--device", "cpu"]
train(load_config("ring", [*tiny, "--out", "run"]))  # the command would measure it too, for seconds
method = load_run("run")[1].method
assert (method.name, method.reach, method.distinct) == ("short_meanflow", 0.5, 0.25)
assert main(["sample", "run", "--n", "5", "--steps", "3", "--out", "samples.npy"]) == 0
assert main(["explain", "short_meanflow"]) == 0
assert main(["explain"]) == 0
assert main(["explain", "short_meanflo"]) == 2
open("own.yaml", "w").write("method: {name: short_meanflow, reach: 0}\\nsteps: 1\\ndata: {name: ring}\\n"
                            "model: {preset: mlp-ring}\\nout: x\\n")
assert main(["train", "own.yaml"]) == 2
"""

TEST = """
from __future__ import annotations

from tests.objectives.cases import WIDTH
from tests.objectives.descent import Case, diagonal, share

TAUGHT = {"short_meanflow": {}}
FROM_DATA = {"short_meanflow": {}}
DESCENT = {
    "short meanflow": Case("short_meanflow", lambda g, d: 2 * d**2 * 3 * d**2 / (1 + d)),
    "short meanflow, diagonal": Case("short_meanflow", lambda g, d: 2 * share(g), diagonal),
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy of the package with the method's file."""
    folder = tmp_path_factory.mktemp("method")
    path = copy_of_package(folder) / "objectives" / "short_meanflow.py"
    path.write_text(shown_in("Add a method"), encoding="utf-8")
    return folder


def test_a_file_is_a_method_of_the_command_line(folder: Path) -> None:
    """Check its settings, its recipe and its notes; a number out of its bounds is refused by name."""
    told = " ".join(run_python(folder, "-c", USED, str(folder)).split())
    for words in (
        "short_meanflow: the network learns the average velocity, and that of short jumps above all.",
        "recipe on the ring: reach=0.5",
        "defaults learned_weight=False",
        "did you mean 'short_meanflow'?",
        "method.reach: expected greater than 0, got 0",
    ):
        assert words in told


def test_its_own_test_file_is_enough_for_the_tests_of_all_methods(folder: Path) -> None:
    """Check its exact solutions, planted errors, the sign of descent, the registry, and training."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "ops", "kernels*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "objectives" / "test_short_meanflow.py").write_text(TEST, encoding="utf-8")
    objectives = [f"objectives/test_{name}.py" for name in ("registry", "descent", "exact", "mutations")]
    names = [*objectives, "train/test_methods.py", "test_method_notes.py", "test_layers.py"]
    chosen = "short_meanflow or (short and descent) or has_ or imports_only"
    files = [f"tests/{name}" for name in names]
    told = run_python(folder, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", chosen, *files)
    for test in (
        "test_every_regression_method_has_its_gates",
        "test_every_method_has_a_case",
        "test_residual_and_gradient_vanish_with_the_exact_teacher[short_meanflow-Linear]",
        "test_a_wrong_tangent_of_the_start_is_found[short_meanflow-wrong_sign-Linear]",
        "test_descent_leads_back_to_the_exact_solution[short meanflow]",
        "test_every_method_trains_and_samples[short_meanflow]",
        "test_every_module_imports_only_what_its_layer_may",
    ):
        assert f"{test} PASSED" in told, test
