"""Read and write result files in the format of pytest-benchmark, so that `pytest-benchmark compare` reads them.

`benchmarks` has an entry for each provider that was timed. `not_timed` has the others, with the same `extra_info`,
whose `status` and `reason` say why they were not timed. A run that stopped goes on from its file.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.benchmarks.ops.timed_op import FLOOR, BenchError, TimedCase
from fastdistill.benchmarks.run.environment import now
from fastdistill.benchmarks.run.gate import OK, worst
from fastdistill.benchmarks.run.in_turns import Outcome, quantile

Entry = dict[str, Any]


class DamagedResults(BenchError):
    """Report a benchmark file that can't be read; the message names the file and what is wrong."""


class ResumeError(BenchError):
    """Report a result file to which this run can't be added."""


def entries(case: TimedCase, outcomes: Sequence[Outcome], device: str) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of a case: those that were timed, and the others. The file adds the ratios to the floor."""
    timed, others = [], []
    for outcome in outcomes:
        info = _extra_info(case, outcome, device)
        name = f"{case.op}[{case.name}-{case.dtype}-{case.mode}-{outcome.provider.name}]"
        entry = {
            "group": case.group,
            "name": name,
            "fullname": f"benchmarks/{case.suite}::{name}",
            "params": {"case": case.name, "dtype": case.dtype, "mode": case.mode, "provider": outcome.provider.name},
            "param": f"{case.name}-{case.dtype}-{case.mode}-{outcome.provider.name}",
            "extra_info": info,
        }
        if outcome.status != OK:
            others.append(entry)
            continue
        options: Entry = {"disable_gc": False, "timer": "events" if device == "cuda" else "clock", "min_rounds": 1}
        options |= {"max_time": 0.0, "min_time": 0.0, "warmup": True}
        timed.append({**entry, "options": options, "stats": _stats(outcome.samples)})
    return timed, others


def _stats(samples: Sequence[float]) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample in samples:
        stats.update(sample)
    return {**stats.as_dict(), "iterations": 1, "data": list(samples)}


def _extra_info(case: TimedCase, outcome: Outcome, device: str) -> dict[str, Any]:
    verdict, samples, cost, load = outcome.verdict, outcome.samples, outcome.cost, outcome.load
    median = statistics.median(samples) if samples else None
    return {
        "suite": case.suite,
        "op": case.op,
        "case": case.name,
        "mode": case.mode,
        "provider": outcome.provider.name,
        "kind": outcome.provider.kind,
        "status": outcome.status,
        "reason": outcome.reason,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "device": device,
        "quick": case.quick,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "tflops": _rate(cost.flops, median, 1e12),
        "gbs": _rate(cost.bytes, median, 1e9),
        "p20_s": quantile(samples, 0.2) if samples else None,
        "p80_s": quantile(samples, 0.8) if samples else None,
        "host_s": outcome.host_seconds if samples else None,
        "in_turns": outcome.in_turns,
        "peak_memory_bytes": outcome.peak_bytes,
        "error": {"output": worst(verdict.errors, False), "tangent": worst(verdict.errors, True)},
        "allowed_error": {"output": worst(verdict.allowed, False), "tangent": worst(verdict.allowed, True)},
        "error_at_size": outcome.at_size,
        "errors": _finite(verdict.errors),
        "floor_provider": None,
        "ratio_to_floor": None,
        **load._asdict(),
    }


def _rate(amount: float | None, seconds: float | None, unit: float) -> float | None:
    return None if amount is None or not seconds else amount / seconds / unit


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class ResultFile:
    """Keep results in a file that grows case by case; each time it is written anew and moved into place.

    Args:
        path: path of the file; None keeps everything in memory. Results that are already there are not measured again.
        machine, commit: describe this run.

    Raises:
        ResumeError: the file is no result file, or comes from another device, torch or commit.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], commit: Mapping[str, Any]) -> None:
        self.path = path
        self.content = new(machine, commit)
        if path is not None and path.exists():
            self.content = load(path)
            _check_same(path, self.content, machine, commit)
            self.content["commit_info"]["dirty"] |= bool(commit.get("dirty"))

    def statuses(self, group: str) -> dict[str, str]:
        """Return the status of each provider that has an entry for a case, timed or not."""
        infos = [entry["extra_info"] for entry in self.of_groups({group})]
        return {info["provider"]: info["status"] for info in infos}

    def of_groups(self, groups: set[str]) -> list[Entry]:
        """Return all entries of some cases, those that were not timed last."""
        every = (*self.content["benchmarks"], *self.content["not_timed"])
        return [entry for entry in every if entry["group"] in groups]

    def add(self, timed: Sequence[Entry], others: Sequence[Entry]) -> None:
        """Add the entries of a case, replace those of the same providers, and save the file."""
        fresh = {entry["fullname"] for entry in (*timed, *others)}
        for name, added in (("benchmarks", timed), ("not_timed", others)):
            kept = [entry for entry in self.content[name] if entry["fullname"] not in fresh]
            self.content[name] = [*kept, *added]
        for group in {entry["group"] for entry in timed}:
            _compare_with_floor([entry for entry in self.content["benchmarks"] if entry["group"] == group])
        self.content["datetime"] = now()
        if self.path is not None:
            save(self.content, self.path)


def _compare_with_floor(timed: Sequence[Entry]) -> None:
    """Add to each entry of a case its ratio to the time of the fastest floor."""
    floors = [entry for entry in timed if entry["extra_info"]["kind"] == FLOOR and entry["stats"]["median"] > 0]
    if not floors:
        return
    floor = min(floors, key=lambda entry: entry["stats"]["median"])
    for entry in timed:
        ratio = entry["stats"]["median"] / floor["stats"]["median"]
        entry["extra_info"] |= {"floor_provider": floor["extra_info"]["provider"], "ratio_to_floor": ratio}


def new(machine: Mapping[str, Any], commit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a result file without entries."""
    import pytest_benchmark

    return {
        "machine_info": dict(machine),
        "commit_info": dict(commit),
        "benchmarks": [],
        "not_timed": [],
        "datetime": now(),
        "version": pytest_benchmark.__version__,
    }


def read(path: Path) -> dict[str, Any]:
    """Return what a benchmark file holds: an object whose `benchmarks`, and `not_timed` if it has one, are lists.

    Raises:
        DamagedResults: the file is missing, is not JSON, or is not what a benchmark writes.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedResults(f"{path}: can't be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedResults(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise DamagedResults(f"{path}: expected an object with 'benchmarks', got {type(table).__name__}")
    if "benchmarks" not in table:
        raise DamagedResults(f"{path}: no 'benchmarks' in it; expected pytest-benchmark's JSON")
    for name in ("benchmarks", "not_timed"):
        if not isinstance(part := table.get(name, []), list):
            raise DamagedResults(f"{path}: {name}: expected a list, got {type(part).__name__}")
    return table


def load(path: Path) -> dict[str, Any]:
    """Return the content of a result file of ours, to which a run can be added.

    Raises:
        ResumeError: it is no such file.
    """
    try:
        content = read(path)
    except DamagedResults as error:
        raise ResumeError(f"{path}: expected a result file of `fastdistill bench`: {error}") from error
    if not {"not_timed", "machine_info"} <= content.keys():
        raise ResumeError(f"{path}: expected a result file of `fastdistill bench`, got another kind of JSON")
    return content


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a file so that it is always whole: a partial file is moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names that results must share to stand in one file."""
    machine, commit = content["machine_info"], content["commit_info"]
    gpu = machine.get("gpu") or {}
    names = {"device": machine.get("device"), "GPU": gpu.get("name"), "torch": machine.get("torch")}
    return {**names, "commit": commit.get("id")}


def _check_same(path: Path, there: Mapping[str, Any], machine: Mapping[str, Any], commit: Mapping[str, Any]) -> None:
    old, here = identity(there), identity({"machine_info": machine, "commit_info": commit})
    differing = [f"{name} {old[name]} there, {here[name]} here" for name in here if old[name] != here[name]]
    if differing:
        raise ResumeError(
            f"{path}: results of another setting can't be mixed in: {'; '.join(differing)}. Name another file"
        )
