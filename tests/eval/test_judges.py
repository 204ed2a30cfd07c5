"""Check that a user's own judge measures, that a missing judge is asked for, and that a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill import cli
from fastdistill.compare import comparable, compare
from fastdistill.eval.digits import DigitJudge
from fastdistill.eval.evaluate import after_training, describe, evaluate
from fastdistill.eval.judges import headline_of, judged, make_judge
from fastdistill.eval.ring import RingJudge
from fastdistill.train import ConfigError, TrainConfig, load_config, train
from tests.eval.conftest import small_config

HERE = "tests.data.own_sets:"


def on(out: Path, name: str) -> TrainConfig:
    """Return a small run on points of a set of one's own."""
    return small_config(out, "ring", "meanflow", data={"name": f"{HERE}{name}", "batch": 8})


def test_the_sets_that_come_along_name_their_judges(tmp_path: Path) -> None:
    digits, ring = (make_judge(load_config(name), tmp_path) for name in ("digits", "ring"))
    assert isinstance(digits, DigitJudge) and isinstance(ring, RingJudge)
    assert {"digits", "ring"} <= set(judged())
    assert comparable() == ["ring", "digits"]
    assert headline_of("digits") == ("frechet", "accuracy")


def test_a_judge_of_ones_own_measures_a_run(tmp_path: Path) -> None:
    """Check that the table has the judge's metrics; a judge without `at_once` isn't called right after training."""
    config = on(tmp_path / "run", "Points()")
    result = evaluate(train(config), [1, 2])
    assert set(result["steps"]["2"]) == {"off_line", "spread", "seconds_per_sample"}
    assert "off line" in describe(result).splitlines()[0]
    assert after_training(config.out, config) == []


def test_a_set_without_a_judge_is_told_what_to_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(on(tmp_path / "run", "Series()"))
    assert cli.main(["eval", str(run)]) == 2
    told = capsys.readouterr().err
    assert f"data.name: {HERE}Series() has no judge" in told
    assert "give the set an attribute judge = 'package.module:attribute'" in told and "headline" in told
    assert not (run / "summary.json").exists()


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    run = train(on(tmp_path / "run", "JudgedByNothing()"))
    with pytest.raises(ConfigError, match=r"the judge of .*: expected what makes .* without headline and evaluate"):
        evaluate(run)


def test_methods_are_compared_on_a_set_of_ones_own(tmp_path: Path) -> None:
    """Check that a configuration file sets the steps, and that the judge's first metric ranks the methods."""
    file = tmp_path / "mine.yaml"
    ring = "steps: 2\nmodel: {preset: mlp-ring, width: 8, depth: 1}\nmethod: {name: meanflow}\ndevice: cpu\n"
    file.write_text(f"{ring}data: {{name: '{HERE}Points()', batch: 8}}\n", encoding="utf-8")
    summary = compare(["flow_matching", "meanflow"], str(file), tmp_path / "out", samples=64)
    assert summary["budget"]["steps"] == 2
    assert summary["headline"] == ["off_line", "spread"]
    assert (tmp_path / "out" / "report.html").is_file()
    file.write_text(f"{ring}data: {{name: '{HERE}Series()', batch: 8}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Series\(\) has no judge"):
        compare(["meanflow"], str(file), tmp_path / "none")
    assert not (tmp_path / "none").exists()
