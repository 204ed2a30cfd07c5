"""Test the runs of `make evidence`: who trains what, within which time, and what the gates say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import objectives
from fastdistill.benchmarks.methods import evidence
from fastdistill.benchmarks.methods.evidence import MUTANTS, Job
from fastdistill.eval.digits import DigitJudge
from fastdistill.train import NonFiniteError
from fastdistill.train.methods import METHODS
from tests.benchmarks.methods.summaries import method, ring


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the runs that were trained, in order; training writes an empty result."""
    names: list[str] = []

    def train(config: Any) -> Path:
        names.append(config.out.name)
        if config.out.name == "diverges":
            raise NonFiniteError("loss: NaN at step 3")
        (config.out / "export").mkdir(parents=True)
        (config.out / "export" / "ema.safetensors").touch()
        return config.out

    monkeypatch.setattr(evidence, "train", train)
    monkeypatch.setattr(evidence, "stored_or_evaluated", lambda *arguments, **keywords: {})
    return names


def test_controls_come_first_and_mutants_last_on_one_seed() -> None:
    jobs = evidence.list_jobs(["ring", "digits"], [0, 1], ["meanflow", "meanflow, wrong sign"])
    assert jobs[:4] == [Job(data, seed, "flow_matching") for data in ("ring", "digits") for seed in (0, 1)]
    assert jobs[4:8] == [Job(data, seed, "meanflow") for seed in (0, 1) for data in ("ring", "digits")]
    assert jobs[8:] == [Job("ring", 0, "meanflow, wrong sign")]


def test_finished_and_claimed_runs_are_left_alone(tmp_path: Path, trained: list[str]) -> None:
    jobs = [Job("ring", 0, name) for name in ("flow_matching", "meanflow")]
    evidence.work(jobs, tmp_path, seconds=1e9)
    evidence.work(jobs, tmp_path, seconds=1e9)
    assert trained == ["flow_matching", "meanflow"]
    other = Job("ring", 1, "flow_matching")
    lock = evidence.lock_of(other.configure(tmp_path).out)
    lock.parent.mkdir(parents=True)
    lock.write_text(str(os.getpid()))
    evidence.work([other], tmp_path, seconds=1e9)
    assert trained == ["flow_matching", "meanflow"], "a living process has it"
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    lock.write_text(gone.stdout.strip())
    evidence.work([other], tmp_path, seconds=1e9)
    assert trained[2:] == ["flow_matching"], "its process is gone"
    assert not lock.exists()


def test_no_run_starts_after_the_budget(tmp_path: Path, trained: list[str]) -> None:
    evidence.work([Job("ring", 0, "flow_matching")], tmp_path, seconds=-1.0)
    assert trained == []


def test_a_run_that_diverges_is_noted_and_not_tried_again(tmp_path: Path, trained: list[str]) -> None:
    config = Job("ring", 0, "flow_matching").configure(tmp_path).model_copy(update={"out": tmp_path / "diverges"})
    config.out.mkdir()
    evidence.run(Job("ring", 0, "flow_matching"), config)
    assert evidence.failure(config) == "loss: NaN at step 3"
    assert not evidence.finished(config)


def test_a_student_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the teacher isn't trained, and nobody is training it"):
        evidence.wait_for(Job("ring", 0, "flow_matching").configure(tmp_path))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_its_method_with_another_tangent_for_as_long_as_it_runs(name: str) -> None:
    job = Job("ring", 0, name)
    right = objectives.OBJECTIVES[job.method]
    with evidence.mutated(job):
        mutant = objectives.get(job.method)
        assert mutant.function is not right.function
        assert mutant.takes == right.takes
        assert METHODS[job.method].objective() is mutant, "it is what the trainer trains"
    assert objectives.OBJECTIVES[job.method] is right


@pytest.mark.parametrize("mutant", [evidence.wrong_sign, evidence.no_time_tangent, evidence.swapped_times])
def test_a_mutants_tangent_is_wrong_and_its_output_right(mutant: Any) -> None:
    x, t, s = torch.randn(5, 2), torch.rand(5), torch.rand(5)

    def net(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x.sin() * (t + 2 * s)[:, None]

    tangents = (torch.ones_like(x), 1.0, None)
    (u, du_dt), (same, other) = evidence.jvp(net, (x, t, s), tangents), mutant(net, (x, t, s), tangents)
    assert torch.equal(u, same)
    assert (du_dt - other).abs().max() > 0.1


def test_gates_pass_and_fail_by_the_one_step_map_error() -> None:
    good, bad, worse = (0.2, 0.2, 0.2, 0.2), (0.7, 0.2, 0.2, 0.2), (1.0, 0.2, 0.2, 0.2)
    result = ring(flow_matching=method(bad), meanflow=method(good), ect=method(bad), imm=method(bad), dmd=method(worse))
    result["mutants"] = {"meanflow, wrong sign": 1.2, "scm, wrong sign": 0.1}
    verdicts = {gate["gate"]: gate["passed"] for gate in evidence.judge_gates(result)}
    assert verdicts == {
        "meanflow below 0.45 in one step": True,
        "flow_matching, the control, above 0.6 in one step": True,
        "ect below 0.45 in one step": False,
        "imm below SW2 0.45 in one step": True,
        "dmd below SW2 0.45 in one step": False,
        "the mutant meanflow, wrong sign above 0.45": True,
        "the mutant scm, wrong sign above 0.45": False,
    }


def test_floors_of_the_ring_are_small_and_not_zero() -> None:
    floors = evidence.distances_between_laws(count=2000)
    assert all(0.01 < row["sliced_wasserstein"] < 0.2 for row in floors.values())


def test_a_measurement_is_kept_until_the_run_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a newer network, other steps, or another way of measuring are measured again."""
    calls: list[tuple[int, ...]] = []

    def evaluate(run: Path, steps: tuple[int, ...], **keywords: Any) -> dict[str, Any]:
        calls.append(steps)
        found = {"measuring": evidence.MEASURING, "steps": {str(number): {"map_error": 0.1} for number in steps}}
        (run / "summary.json").write_text(json.dumps(found))
        return found

    monkeypatch.setattr(evidence, "evaluate", evaluate)
    run = tmp_path / "ring" / "seed0" / "meanflow"
    (run / "export").mkdir(parents=True)
    weights = run / "export" / "ema.safetensors"
    weights.touch()
    os.utime(weights, (1, 1))
    assert evidence.stored_or_evaluated(run, (1,)) == evidence.stored_or_evaluated(run, (1,))
    assert calls == [(1,)]
    evidence.stored_or_evaluated(run, (1, 2))
    assert calls == [(1,), (1, 2)]
    for older in ({"measuring": evidence.MEASURING - 1}, {}):
        (run / "summary.json").write_text(json.dumps({"steps": {"1": {"map_error": 0.2}}} | older))
        assert evidence.stored_or_evaluated(run, (1,))["steps"]["1"]["map_error"] == 0.1
    assert calls == [(1,), (1, 2), (1,), (1,)]
    os.utime(weights, (4e9, 4e9))
    evidence.stored_or_evaluated(run, (1,))
    assert calls == [(1,), (1, 2), (1,), (1,), (1,)]


def test_references_of_digits_tell_copies_and_means_from_unseen_digits(tmp_path: Path) -> None:
    """Check that copies have distance 0 and are found out, and that means are right in class but have no spread."""
    references: dict[str, dict[str, float]] = {"held_out": {"frechet": 4.6}}
    evidence.add_references(references, DigitJudge(tmp_path))
    unseen, copies, means = (references[name] for name in ("held_out", "training_digits", "class_mean"))
    assert copies["frechet"] < unseen["frechet"] < 0.1 * means["frechet"]
    assert copies["nearest_neighbour_ratio"] == 0
    assert copies["c2st"] < 0.35 < 0.4 < unseen["c2st"] < 0.6 < means["c2st"]
    assert means["recall"] < 0.1 < 0.7 < unseen["recall"]
