"""Follow the recipe for a data set in CONTRIBUTING.md, in a copy of the package and as a module of the user."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.recipes import ROOT, copy_of_package, run_python, shown_in

USED = """
import sys
import fastdistill
from fastdistill.cli import main
from fastdistill.data import make_data_set
from fastdistill.data.protocol import try_data_set
from fastdistill.train import load_run

folder, name = sys.argv[1:]
assert fastdistill.__file__.startswith(folder), fastdistill.__file__
assert main(["train", "moons.yaml", "--data.name", name, "--data.std", "0.1"]) == 0
try_data_set(name, make_data_set(name))
config = load_run("runs/moons")[1]
assert (config.data.name, config.data.std, config.data.build().num_classes) == (name, 0.1, 2)
assert main(["sample", "runs/moons", "--label", "1", "--n", "5", "--out", "five.npy"]) == 0
assert main(["sample", "runs/moons", "--n", "5"]) == 0
assert main(["eval", "runs/moons"]) == 2
"""
CONFIGURATION = """
steps: 2
device: cpu
data: {name: ring, batch: 8}
model: {preset: mlp-digits, width: 8, depth: 1}
method: {name: flow_matching}
"""


def test_a_file_is_a_data_set(tmp_path: Path) -> None:
    """Check that the set keeps the protocol, and that training, samples of a class and pictures know its name."""
    (copy_of_package(tmp_path) / "data" / "moons.py").write_text(shown_in("Add a data set"), encoding="utf-8")
    (tmp_path / "moons.yaml").write_text(CONFIGURATION, encoding="utf-8")
    told = run_python(tmp_path, "-c", USED, str(tmp_path), "moons")
    assert "data.name: moons has no judge" in told


def test_a_file_of_ones_own_is_a_data_set_without_touching_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that `package.module:attribute` names the set if its folder is in PYTHONPATH."""
    (tmp_path / "mine.py").write_text(shown_in("Add a data set"), encoding="utf-8")
    (tmp_path / "moons.yaml").write_text(CONFIGURATION, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-", str(ROOT), "mine:Moons()"])
    exec(compile(USED, "used", "exec"), {})
    assert "data.name: mine:Moons() has no judge" in capsys.readouterr().err
