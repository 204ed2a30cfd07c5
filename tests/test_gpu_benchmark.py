"""The GPU benchmark where there is none: from the command line to the JSON, and its gate."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_attention
from benchmarks.gpu_attention import MODES, Shape, Way


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mode of ours and of the baseline passes the gate and is timed; nothing claims to be a GPU's speed."""
    out = tmp_path / "new folder" / "result.json"
    gpu_attention.main(["--smoke", "--out", str(out), "--commit", "abc"])
    table = json.loads(out.read_text())
    assert table["environment"]["gpu"] is None and table["environment"]["commit"] == "abc"
    assert {(row["mode"], row["way"]) for row in table["results"]} == {
        (mode, way) for mode in MODES for way in ("fastdistill", "math, torch.func.jvp")
    }
    assert all(row["ms"] > 0 and "tflops" not in row for row in table["results"])
    assert len(capsys.readouterr().out.splitlines()) == len(table["results"])


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tangent that is a thousandth off ends the program with its error, and no time is reported."""
    contenders = gpu_attention.ways("cpu")

    def off(primals: Any, tangents: Any, mixed: bool) -> tuple[Tensor, Tensor | None]:
        o, t_o = contenders["fastdistill"].run(primals, tangents, mixed)
        assert t_o is not None
        return o, t_o * 1.001

    wrong = Way(off, lambda shape, mode: None)
    monkeypatch.setattr(gpu_attention, "ways", lambda device: {"fastdistill": wrong})
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="t_o: error"):
        gpu_attention.main(["--smoke", "--modes", "forward", "--out", str(out)])
    (row,) = json.loads(out.read_text())["results"]
    assert "t_o: error" in row["wrong"] and "ms" not in row


def test_a_way_that_raises_is_wrong() -> None:
    """Not the end of the benchmark."""

    def run(primals: Any, tangents: Any, mixed: bool) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("only 64")

    way = Way(run, lambda shape, mode: None)
    assert gpu_attention.parity(way, "forward", 8, torch.float32, "cpu", 16) == "AssertionError: only 64"


def test_what_others_cannot_do_is_said() -> None:
    """Before anything runs."""
    limit = gpu_attention._limit_of_jvp_flash_attention
    assert limit(Shape(1, 1, 256, 72), "forward") == "head dims 16, 32, 64, 128 and 256 only"
    assert limit(Shape(1, 1, 255, 64), "forward") == "lengths that 32 divides only"
    assert limit(Shape(1, 1, 256, 64), "mixed") is not None
    assert limit(Shape(1, 1, 256, 64), "primal") is None


def test_operations_are_counted_as_published() -> None:
    """12·B·H·N·M·D for the forward with its tangent."""
    assert Shape(2, 3, 5, 7).operations(MODES["forward"]) == 12 * 2 * 3 * 5 * 5 * 7


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One message, status 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu_attention.main([])
    assert caught.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_script_for_a_gpu_machine_says_what_it_does() -> None:
    """Without a piece to run it prints its pieces and their variables; what it calls is there."""
    root = Path(gpu_attention.__file__).parents[1]
    script = root / "benchmarks" / "run_gpu.sh"
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(word in done.stdout for word in ("parity", "tune", "attention", "OUT", "WHEELS", "CONFIGS"))
    folders = re.findall(r"tests/\w+", script.read_text())
    assert folders and all((root / folder).is_dir() for folder in folders)
