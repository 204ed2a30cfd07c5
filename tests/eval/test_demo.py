"""Run the demo from end to end on networks far too small, and check that a second run doesn't train again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastdistill import demo
from fastdistill.eval.digits import DigitJudge
from fastdistill.train import TrainConfig, load_config

METRICS = {"frechet", "accuracy", "sliced_wasserstein", "seconds_per_sample"}
TINY = ["--steps", "2", "--log.log-every", "1", "--data.batch", "8", "--model.patch-size", "4", "--model.depth", "1"]
TINY += ["--model.width", "16", "--model.heads", "2"]


@pytest.fixture
def out(tmp_path: Path, judge: DigitJudge, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a demo's folder with the classifier in it, and cut the shipped configurations down to two tiny steps."""

    def load_tiny(source: str, overrides: Sequence[str] = (), *, out: Path | None = None) -> TrainConfig:
        return load_config(source, [*overrides, *TINY], out=out)

    monkeypatch.setattr(demo, "load_config", load_tiny)
    (tmp_path / "demo").mkdir()
    shutil.copy(judge.folder / "classifier.safetensors", tmp_path / "demo")
    return tmp_path / "demo"


def test_the_demo_trains_once_and_reports_each_time(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the content of `summary.json`, which others rely on."""
    report = demo.main(out)
    summary = json.loads((out / "summary.json").read_text())
    assert {name: list(summary[name]) for name in ("teacher", "meanflow", "references")} == {
        "teacher": ["1", "2", "4", "8", "32"],
        "meanflow": ["1", "2", "4", "8"],
        "references": ["bootstrap", "held_out", "class_gaussian", "noise"],
    }
    assert all(set(row) == METRICS for name in ("teacher", "meanflow", "references") for row in summary[name].values())
    assert re.search(r"dit-digits, [1-9][0-9,]+ parameters, 2 steps of 8", summary["settings"]["meanflow"])
    printed = capsys.readouterr().out
    assert report.resolve().as_uri() in printed
    assert "meanflow, 1 step" in printed
    assert "NOT reached" in printed  # Two steps of training teach nothing.

    points = {path: path.read_text() for path in out.glob("*/metrics.jsonl")}
    report.unlink()
    monkeypatch.setattr("fastdistill.train.loop.train_step", lambda *_: pytest.fail("it trained again"))
    monkeypatch.setattr(demo, "summarise", lambda configs: summary)
    assert demo.main(out) == report
    assert report.is_file()
    assert {path: path.read_text() for path in out.glob("*/metrics.jsonl")} == points
