"""Test `compare` on two methods and a shared teacher, trained for a few steps each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdistill.compare import compare, configure, describe_method, measure_cost
from fastdistill.eval.comparison import describe, recipe, verdicts
from fastdistill.train import ConfigError, NonFiniteError
from fastdistill.train.methods import METHODS

TINY = ["--model.width", "8", "--data.batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished comparison on the ring: one method from data, one that needs the teacher, two seeds."""
    out = tmp_path_factory.mktemp("compare")
    compare(["esd", "facm"], "ring", out, steps=3, seeds=2, samples=64, overrides=TINY)
    return out


def test_the_folder_holds_report_summary_and_figures(folder: Path) -> None:
    """Check that each method and seed has a run, and so has the teacher that they share."""
    for name in ("report.html", "summary.json", "quality.png", "cost.png", "samples.png", "curves.png"):
        assert (folder / name).stat().st_size > 1000
    runs = {str(path.parent.relative_to(folder)) for path in folder.rglob("config.yaml")}
    assert runs == {f"seed{seed}/{name}" for seed in (0, 1) for name in ("esd", "facm", "flow_matching")}


def test_the_summary_has_quality_and_cost_over_the_seeds(folder: Path) -> None:
    """Check mean, deviation and values of every metric at 1, 2, 4 and 8 steps."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["methods"]) == ["esd", "facm"]
    assert summary["budget"]["seeds"] == [0, 1]
    assert summary["budget"]["steps"] == 3
    for row in summary["methods"].values():
        assert row["failed"] is None
        assert list(row["quality"]) == ["1", "2", "4", "8"]
        for spread in (*row["quality"]["1"].values(), *row["cost"].values(), row["straightness"]):
            assert len(spread["values"]) == 2
            assert min(spread["values"]) <= spread["mean"] <= max(spread["values"])
        assert row["cost"]["peak_bytes"]["values"][0] == row["cost"]["peak_bytes"]["values"][1] > 0
    assert summary["methods"]["facm"]["settings"]["teacher"]
    assert not summary["methods"]["esd"]["settings"]["teacher"]


def test_a_method_is_measured_in_the_steps_that_it_learnt(tmp_path: Path) -> None:
    """Check DMD, which learns one time: other steps are dashes in the table and have no verdict; figures are drawn."""
    folder = tmp_path / "dmd"
    summary = compare(["dmd", "imm"], "ring", folder, steps=2, samples=64, overrides=TINY)
    assert list(summary["methods"]["dmd"]["quality"]) == ["1"]
    assert list(summary["methods"]["imm"]["quality"]) == ["1", "2", "4", "8"]
    line = next(line for line in describe(summary).splitlines() if line.startswith("dmd"))
    assert line.split()[2:5] == ["-", "-", "-"]
    said = verdicts(summary)
    assert "learnt one step alone" in said["dmd"]["cons"]
    assert not any("2 steps" in words for words in said["dmd"]["pros"] + said["dmd"]["cons"])
    assert "best at 8 steps" in said["imm"]["pros"]
    assert (folder / "samples.png").stat().st_size > 1000


def test_a_method_that_the_overrides_do_not_suit_is_refused_before_any_trains(tmp_path: Path) -> None:
    """Check a method that comes last: no run may exist when it is refused."""
    with pytest.raises(ConfigError, match=r"path\.name: scm fits the paths"):
        compare(["meanflow", "scm"], "ring", tmp_path / "none", steps=2, overrides=[*TINY, "--path.name", "ve"])
    assert not (tmp_path / "none").exists()


def test_a_finished_comparison_trains_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the numbers are the same, except times; a name or a seed given twice counts once."""
    before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    exports = {path: path.stat().st_mtime_ns for path in folder.rglob("ema.safetensors")}
    summary = compare(["esd", "facm", "esd"], "ring", folder, steps=3, seeds=[0, 1, 0], samples=64, overrides=TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("ema.safetensors")} == exports
    assert list(summary["methods"]) == ["esd", "facm"]
    for name, row in summary["methods"].items():
        assert row["cost"].keys() == before["methods"][name]["cost"].keys()
        assert len(row["straightness"]["values"]) == 2
        for number, metrics in row["quality"].items():
            assert metrics["map_error"] == before["methods"][name]["quality"][number]["map_error"]


def test_a_step_costs_the_mean_of_the_medians_over_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check by a planted clock that costly first steps and interruptions don't count, and that a costly end does."""
    import fastdistill.compare as module

    now, steps = [0.0], []

    def train_step(state: dict[str, Any], *_: Any) -> None:
        steps.append(state["step"])
        cost = 3.0 if state["step"] > 60 else 1.0
        now[0] += 100.0 if state["step"] in (0, 1, 25, 27, 50, 75, 94) else cost
        state["step"] += 1

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = configure("flow_matching", "ring", tmp_path, ["--steps", "100", *TINY])
    assert measure_cost(config)["seconds_per_step"] == pytest.approx((1 + 1 + 1 + 3 + 3) / 5)
    assert steps == [0, 1, 99, *range(1, 7), *range(25, 31), *range(50, 56), *range(75, 81), *range(94, 100)]


def test_memory_is_that_of_the_dearest_part_of_a_curriculum(tmp_path: Path) -> None:
    """Check alpha-Flow, which starts without a tangent and ends as MeanFlow: the step at its end counts."""
    same = ["--method.distinct", "0.75"]
    peaks = {
        name: measure_cost(configure(name, "ring", tmp_path, ["--steps", "100", *TINY, *share]))["peak_bytes"]
        for name, share in (("flow_matching", []), ("alpha_flow", same), ("meanflow", same))
    }
    assert peaks["alpha_flow"] == pytest.approx(peaks["meanflow"], rel=0.05)
    assert peaks["alpha_flow"] > 1.2 * peaks["flow_matching"]


@pytest.mark.parametrize("name", ["alpha_flow", "consistency", "ect"])
def test_the_shortest_run_has_a_cost(name: str, tmp_path: Path) -> None:
    """Check a run of one step, in which all points of measurement coincide, also for methods with a curriculum."""
    cost = measure_cost(configure(name, "ring", tmp_path, ["--steps", "1", *TINY, "--teacher", "None"]))
    assert cost["seconds_per_step"] > 0 and cost["peak_bytes"] > 0


def test_verdicts_follow_from_the_numbers(folder: Path) -> None:
    """Check the best method, a teacher as a price, and the table as text."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = verdicts(summary)
    rows = summary["methods"]
    best = min(rows, key=lambda name: rows[name]["quality"]["1"]["sliced_wasserstein"]["mean"])
    assert "best at 1 step" in found[best]["pros"]
    assert "needs a teacher" in found["facm"]["cons"]
    assert "needs a teacher" not in found["esd"]["cons"]
    assert "map error@1" in describe(summary)


def test_a_recipe_is_what_differs_from_the_defaults(folder: Path, tmp_path: Path) -> None:
    """Check that a recipe is short pairs of name and value, always with the learning rate and the path."""
    options = ["--method.guidance.interval", "0", "0.5", "--method.sample-steps", "2", "--method.target-ema", "0.9"]
    config = configure("psd", "ring", tmp_path, [*TINY, "--optim.lr", "3e-4", *options])
    settings = describe_method(config)
    expected = "target_ema 0.9, sample_steps 2, guidance.interval 0 0.5, learning rate 0.0003, path linear"
    assert recipe(settings) == expected
    plain = settings | {"method": {"name": "psd"}}
    assert recipe(plain) == "learning rate 0.0003, path linear"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert recipe(describe_method(configure("facm", "ring", tmp_path, TINY))) in page
    assert "&#39;name&#39;" not in page


def test_a_method_that_diverges_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the reason of the failure is in the summary, the table and the report."""
    import fastdistill.compare as module

    original = module.train

    def fails(config: Any) -> Path:
        if config.method.name == "psd":
            raise NonFiniteError("step 1: loss is nan")
        return original(config)

    monkeypatch.setattr(module, "train", fails)
    summary = compare(["psd", "flow_matching"], "ring", tmp_path, steps=2, samples=64, overrides=TINY)
    assert summary["methods"]["psd"]["failed"] == "step 1: loss is nan"
    assert "psd: step 1" in describe(summary)
    assert "psd did not finish" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_unknown_names_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Check methods, data and seeds."""
    with pytest.raises(ConfigError, match=r"methods: .*'meanflo', did you mean 'meanflow'"):
        compare(["meanflo"], "ring", tmp_path)
    with pytest.raises(ConfigError, match="data: expected one of ring, digits, got 'cifar'"):
        compare(None, "cifar", tmp_path)
    with pytest.raises(ConfigError, match="expected at least one of each"):
        compare(list(METHODS), "ring", tmp_path, seeds=0)
    assert list(tmp_path.iterdir()) == []
