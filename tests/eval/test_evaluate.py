"""Test `evaluate` on small trained runs: what it writes, that it repeats itself, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.eval import ring
from fastdistill.eval.digits import DigitJudge
from fastdistill.eval.evaluate import describe, evaluate
from fastdistill.eval.exact import Ring
from fastdistill.paths import ICFM, OTCFM
from fastdistill.train import train
from fastdistill.train.sampling import Sampling
from tests.eval.conftest import small_config

METRICS = {"frechet", "accuracy", "sliced_wasserstein", "seconds_per_sample"}


def without_timings(result: Any) -> Any:
    """Return the result without the times that a clock gave."""
    if not isinstance(result, dict):
        return result
    return {name: without_timings(value) for name, value in result.items() if name != "seconds_per_sample"}


def test_a_digits_run_is_measured_beside_its_references(flow_run: Path, judge: DigitJudge) -> None:
    result = evaluate(flow_run, n=100, judge=judge)
    assert list(result["steps"]) == ["1", "2", "4", "8", "32"]
    assert list(result["references"]) == ["bootstrap", "held_out", "class_gaussian", "noise"]
    assert all(set(row) == METRICS for group in ("steps", "references") for row in result[group].values())
    assert json.loads((flow_run / "summary.json").read_text()) == result


def test_a_second_evaluation_finds_the_same(flow_run: Path, judge: DigitJudge) -> None:
    first, second, other = (evaluate(flow_run, [2], n=100, seed=seed, judge=judge) for seed in (0, 0, 1))
    assert without_timings(first) == without_timings(second)
    assert without_timings(first) != without_timings(other)


def test_guidance_changes_what_a_teacher_draws(tmp_path: Path, judge: DigitJudge) -> None:
    data = {"name": "digits", "batch": 8, "label_dropout": 0.5}
    run = train(small_config(tmp_path / "run", "digits", "flow_matching", data=data, optim={"lr": 0.1}))
    plain, guided = (evaluate(run, [1], n=100, guidance=scale, judge=judge)["steps"]["1"] for scale in (1.0, 9.0))
    assert plain["frechet"] != guided["frechet"]


def test_a_ring_run_is_held_against_the_exact_flow(tmp_path: Path) -> None:
    run = train(small_config(tmp_path / "run", "ring", "meanflow"))
    result = evaluate(run, n=256)
    assert list(result["steps"]) == ["1", "2", "4", "8"]
    assert list(result["references"]) == [
        *("euler 1", "euler 2", "euler 4", "euler 8", "data"),
        *(f"exact map {number}" for number in (1, 2, 4, 8)),
    ]
    assert result["steps"]["1"]["map_error"] > 0.3
    assert "meanflow, 2 steps" in describe(result)
    assert "its flow is not the one" not in describe(result)


def test_a_run_of_coupled_noise_and_data_is_measured_by_its_law(tmp_path: Path) -> None:
    """Check a coupling by the path, and one on another path; in one step, because more would take fresh noise."""
    for name, more in (("path", {"path": {"name": "ot_cfm"}}), ("coupling", {"coupling": "optimal_transport"})):
        result = evaluate(train(small_config(tmp_path / name, "ring", "ect", **more)), n=256)
        assert list(result["steps"]) == ["1"]
        assert "its flow is not the one that map error" in describe(result)
    same = [ring.references([1], count=256, path=path)["data"]["map_error"] for path in (OTCFM(), ICFM())]
    assert same[0] == same[1]


def test_the_exact_average_velocity_has_no_map_error_in_one_step(tmp_path: Path) -> None:
    """Check that Euler on the exact velocity needs many steps for the same."""
    config = small_config(tmp_path / "run", "ring", "meanflow")
    rows = ring.evaluate_network(ExactMap(), config, [1, 4], count=256)
    floors = ring.references([1, 4, 32], count=256)
    assert max(row["map_error"] for row in rows.values()) < 1e-4
    assert max(row["sliced_wasserstein"] for row in rows.values()) < 1e-4
    assert floors["euler 1"]["map_error"] > 0.9 > floors["euler 4"]["map_error"] > floors["euler 32"]["map_error"]
    assert 0 < floors["data"]["sliced_wasserstein"] < 0.3


class ExactMap(nn.Module):
    """Stand for a trained network: it computes the ring's exact average velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return Ring().average_velocity(x.double(), t.double(), s.double()).float()


@pytest.mark.parametrize("how", [Sampling("consistency"), Sampling("gamma", gamma=0.5), Sampling("gamma", gamma=0.0)])
def test_the_exact_map_has_no_error_by_any_sampler(tmp_path: Path, how: Sampling) -> None:
    """Check that a sampler that renoises has an error against the flow, since its points differ, but not in its law."""
    config = small_config(tmp_path / "run", "ring", "meanflow")
    rows = ring.evaluate_network(ExactMap(), config, [1, 2, 4], count=512, how=how)
    assert max(row["map_error"] for row in rows.values()) < 1e-4
    assert max(row["sliced_wasserstein"] for row in rows.values()) < 1e-4
    floors = ring.exact_rows(config, [1, 2, 4], count=512, how=how)
    assert all(floors[f"exact map {number}"]["sliced_wasserstein"] == 0 for number in (1, 2, 4))
    against = {name: row for name, row in floors.items() if "against the flow" in name}
    assert len(against) == (0 if how.parameters.get("gamma") == 0 else 3)
    if against:
        one, two, four = against.values()
        assert one["map_error"] < 1e-4
        assert min(two["map_error"], four["map_error"]) > 0.3
        assert 0.01 < min(two["sliced_wasserstein"], four["sliced_wasserstein"]) < 0.3


def test_a_wrong_map_that_renoises_is_found(tmp_path: Path) -> None:
    """Check a map that stops short of the data by a tenth, at every number of steps."""

    class Short(ExactMap):
        def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
            return 0.9 * super().forward(x, t, s)

    config = small_config(tmp_path / "run", "ring", "meanflow")
    rows = ring.evaluate_network(Short(), config, [1, 2, 4], count=512, how=Sampling("consistency"))
    assert min(row["map_error"] for row in rows.values()) > 0.03


def test_another_sampler_gives_other_samples(tmp_path: Path) -> None:
    """Check samplers by name, or by gamma; the summary names them, and has the flow's straightness if there is one."""
    run = train(small_config(tmp_path / "run", "ring", "meanflow"))
    own, renoised, half = (evaluate(run, [2], n=256, **how) for how in ({}, {"sampler": "consistency"}, {"gamma": 0.5}))
    assert [result["sampler"] for result in (own, renoised, half)] == ["average_velocity", "consistency", "gamma"]
    errors = {result["steps"]["2"]["map_error"] for result in (own, renoised, half)}
    assert len(errors) == 3
    assert own["straightness"] == half["straightness"] >= 0
    assert "straightness of its flow" in describe(own)


def test_what_can_not_be_evaluated_is_refused(flow_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: expected positive"):
        evaluate(flow_run, [0])
    with pytest.raises(ValueError, match="n: expected at least 64"):
        evaluate(flow_run, n=1)
    student = train(small_config(tmp_path / "run", "digits", "meanflow"))
    with pytest.raises(ValueError, match="guidance: a network of meanflow has its guidance built in"):
        evaluate(student, guidance=2.0)
    with pytest.raises(ValueError, match="no config"):
        evaluate(tmp_path / "nothing")
