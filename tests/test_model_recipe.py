"""Follow the recipe for a model in CONTRIBUTING.md in a copy of the package: trained, sampled, differentiated."""

from __future__ import annotations

from pathlib import Path

from tests.recipes import copy_of_package, run_python, shown_in

PRESET = '    "residual-ring": Preset(ResidualMLP, {"dim": 2, "width": 8, "depth": 2}),\n'
IMPORT = "from fastdistill.models.residual_mlp import ResidualMLP\n"
USED = """
import sys
import numpy as np
import torch
import fastdistill as fd
from fastdistill.cli import main
from fastdistill.models import ResidualMLP, create
from fastdistill.train import load_config, load_run, train

assert fd.__file__.startswith(sys.argv[1]), fd.__file__
tiny = ["--steps", "2", "--data.batch", "8", "--device", "cpu", "--out", "run"]
train(load_config("ring", ["--model.preset", "residual-ring", "--model.width", "16", *tiny]))
net, _ = load_run("run")
assert isinstance(net, ResidualMLP) and net.config["width"] == 16
assert main(["sample", "run", "--n", "5", "--out", "points.npy"]) == 0 and np.load("points.npy").shape == (5, 2)
assert main(["train", "ring", "--model.preset", "residual-rign", "--out", "other"]) == 2

net, x, t = create("residual-ring").double(), torch.randn(4, 2).double(), torch.rand(4).double()
fn, point, direction = (lambda x, t: net(x, t, 0.5 * t)), (x, t), (torch.randn_like(x), torch.ones_like(t))
torch.testing.assert_close(fd.jvp(fn, point, direction), torch.func.jvp(fn, point, direction))
"""


def test_four_files_are_a_model(tmp_path: Path) -> None:
    """Check that the network shown trains under a changed setting, samples, and has a tangent; its test is this one."""
    models = copy_of_package(tmp_path) / "models"
    (models / "residual_mlp.py").write_text(shown_in("Add a model"), encoding="utf-8")
    presets, exports = models / "presets.py", models / "__init__.py"
    text = presets.read_text(encoding="utf-8")
    for before, line in (("from fastdistill.models.mlp import MLP\n", IMPORT), ("str, Preset] = {\n", PRESET)):
        text = text.replace(before, before + line, 1)
    presets.write_text(text, encoding="utf-8")
    exports.write_text(exports.read_text(encoding="utf-8") + IMPORT, encoding="utf-8")
    told = run_python(tmp_path, "-c", USED, str(tmp_path))
    assert "model.preset: expected one of residual-ring, mlp-ring" in told and "got 'residual-rign'" in told
