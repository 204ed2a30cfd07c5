"""Check that the report says what the numbers say, shows every grid, and needs nothing beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdistill.demo import judge_goals
from fastdistill.eval.report import read_numbers, write_report

STEPS = {"teacher": ("1", "2", "4", "8", "32"), "meanflow": ("1", "2", "4", "8")}


def row(frechet: float, accuracy: float = 0.95) -> dict[str, float]:
    """Return a row of the table."""
    return {"frechet": frechet, "accuracy": accuracy, "sliced_wasserstein": 0.1, "seconds_per_sample": 1e-4}


def make_summary(teacher: list[float], student: list[float], accuracy: float = 0.95) -> dict[str, Any]:
    """Return what the demo measures, with these Fréchet distances."""
    rows = {
        name: {number: row(value, accuracy) for number, value in zip(STEPS[name], values, strict=True)}
        for name, values in (("teacher", teacher), ("meanflow", student))
    }
    check = {"precision": 0.5, "recall": 0.6, "nearest_neighbour_ratio": 0.87}
    references = {"bootstrap": row(2.8), "held_out": row(5.2), "class_gaussian": row(8.7), "noise": row(1006.4, 0.1)}
    return rows | {
        "references": references,
        "checks": {name: dict.fromkeys(STEPS[name], check) for name in STEPS},
        "goals": judge_goals(rows["teacher"], rows["meanflow"]),
        "samples": 1797,
        "held_out": 295,
        "settings": {"teacher": "small <network>"},
        "timings": {"evaluation": 12.0},
        "environment": {"torch": "2"},
    }


SUMMARY = make_summary([71.1, 20.5, 9.4, 5.4, 3.4], [16.3, 3.6, 3.5, 3.3])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report on made-up digits."""
    samples: dict[str, dict[str, Tensor]] = {
        name: {number: torch.randn(20, 1, 8, 8) for number in numbers} for name, numbers in STEPS.items()
    }
    points = [{"step": step, "loss": 1 / step, "raw_error": 2 / step} for step in range(1, 5)]
    curves = {"teacher": points, "meanflow": [point | {"tangent_norm": 0.3} for point in points]}
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, SUMMARY, samples | {"real": {"": torch.randn(20, 1, 8, 8)}}, curves)
    return path


def test_every_number_and_picture_is_in_the_report(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    for value in ("71.1", "20.5", "16.3", "1006.4", "0.87", "12 s"):
        assert value in html
    images = re.findall(r'<img src="data:image/png;base64,([A-Za-z0-9+/=]+)"', html)
    assert len(images) == 3 + 9 + 1  # The images are headline, distances and curves, then nine grids, then real digits.
    assert "small &lt;network&gt;" in html


def test_the_report_asks_for_nothing_from_outside(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(", html)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', html))


def test_the_headline_grid_lies_beside_the_report(report: Path) -> None:
    with Image.open(report.with_name("grid.png")) as image:
        assert image.width > 1200
        assert image.width > image.height


def test_goals_follow_from_the_numbers() -> None:
    """Check that each of the three goals can fail alone."""

    def reached(summary: dict[str, Any]) -> list[bool]:
        return [goal["reached"] for goal in summary["goals"]]

    assert reached(SUMMARY) == [True, True, True]
    assert reached(make_summary([71, 16, 9, 5.4, 3.4], [16.3, 3.6, 3.5, 3.3])) == [False, True, True]
    assert reached(make_summary([71, 20, 3.6, 5.4, 3.4], [16.3, 3.6, 3.5, 3.3])) == [True, False, True]
    assert reached(make_summary([71, 20, 9, 5.4, 3.4], [16.3, 3.6, 3.5, 3.3], accuracy=0.8)) == [True, True, False]


def test_a_goal_that_is_missed_is_shown_as_missed(report: Path, tmp_path: Path) -> None:
    assert "not reached" not in report.read_text(encoding="utf-8")
    missed = make_summary([71, 16, 9, 5.4, 3.4], [16.3, 3.6, 3.5, 3.3])
    images = {name: {number: torch.zeros(20, 1, 8, 8) for number in numbers} for name, numbers in STEPS.items()}
    points = [{"step": 1, "loss": 1.0, "raw_error": 1.0, "tangent_norm": 1.0}]
    path = tmp_path / "report.html"
    write_report(path, missed, images | {"real": {"": torch.zeros(20, 1, 8, 8)}}, {"meanflow": points})
    assert path.read_text(encoding="utf-8").count("not reached") == 1


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ([71, 20, 9, 5, 3], "its teacher comes as close to the real digits in 4 steps"),
        ([10, 9, 8, 5, 3], "its teacher comes as close to the real digits in one step"),
        ([71, 60, 50, 40, 30], "its teacher doesn't come as close in 32 steps"),
    ],
)
def test_the_first_sentence_compares_one_step_with_the_teachers(teacher: list[float], words: str) -> None:
    sentences = read_numbers(make_summary(teacher, [16.3, 3.6, 3.5, 3.3]))
    assert len(sentences) == 2
    assert words in sentences[0]
