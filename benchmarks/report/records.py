"""Benchmark files as records: what the report, the comparison and the README's tables read.

A file is pytest-benchmark's JSON, with what it doesn't know in each benchmark's `extra_info`, and the records that were
not timed in a list of their own:

    machine_info, commit_info, datetime, version
    benchmarks    [{name, fullname, group, params, stats {min, max, mean, stddev, median, rounds, ...}, extra_info}]
    not_timed     [{name, fullname, group, params, extra_info}], or the extra_info alone

    extra_info    suite, op, case, mode, provider, kind, status, reason, shape, dtype, device, flops, bytes, tflops,
                  gbs, p20_s, p80_s, peak_memory_bytes, error, allowed_error, floor_provider, ratio_to_floor,
                  sm_clock_mhz, throttle, power_w, energy_j, ...

Whatever is damaged raises `DamagedResults`, which names the file and the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastdistill.benchmarks.ops.timed_op import FLOOR, OURS, PEER
from fastdistill.benchmarks.run.gate import ERROR, FAILED, OK, OOM, UNAVAILABLE, UNSUPPORTED
from fastdistill.benchmarks.run.result_file import DamagedResults, read

KINDS = (OURS, PEER, FLOOR)
LOST = (FAILED, OOM, ERROR)  # what could have been timed, had it been right
STATUSES = (OK, UNAVAILABLE, UNSUPPORTED, *LOST)


class Key(NamedTuple):
    """What makes a record the same in two files."""

    suite: str
    op: str
    case: str
    dtype: str
    mode: str
    provider: str

    def __str__(self) -> str:
        return f"{self.suite}: {self.op}, {self.case}, {self.dtype}, {self.mode}: {self.provider}"


@dataclass(frozen=True)
class Record:
    """One provider on one case.

    info: its `extra_info`, whole. median: seconds, None where it was not timed.
    """

    key: Key
    kind: str
    status: str
    info: Mapping[str, Any] = field(hash=False)
    median: float | None = None
    rounds: int | None = None

    @property
    def reason(self) -> str:
        """Why it was not timed, or an empty string."""
        return str(self.info.get("reason") or "")

    def number(self, name: str) -> float | None:
        """A number of `extra_info`, where there is one."""
        value = self.info.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def shape(self) -> dict[str, int | str]:
        """The sizes and names that describe the case, by their names."""
        shape = self.info.get("shape")
        items = shape.items() if isinstance(shape, Mapping) else ()
        return {str(name): value if type(value) is int else str(value) for name, value in items}

    def sizes(self) -> dict[str, int]:
        """The sizes alone."""
        return {name: value for name, value in self.shape.items() if isinstance(value, int)}


@dataclass(frozen=True)
class Results:
    """A file. device: what it was measured on, such as "NVIDIA H100 80GB HBM3"."""

    path: Path
    machine: Mapping[str, Any]
    commit: str
    date: str
    records: tuple[Record, ...]

    @property
    def device(self) -> str:
        """The GPU's name, or the processor's, with its number of threads."""
        gpu = _first(self.machine, "gpu", "gpu_name")
        if isinstance(gpu, Mapping):
            gpu = gpu.get("name")
        if gpu:
            return str(gpu)
        cpu = _first(self.machine, "processor_name", "processor", "cpu") or self.machine.get("device")
        if isinstance(cpu, Mapping):
            cpu = cpu.get("brand_raw")
        threads = self.machine.get("threads")
        return f"{cpu or 'unknown device'}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")

    @property
    def ceilings(self) -> dict[str, float]:
        """What was measured of the device at its best: "tflops" of a large matmul, "gbs" of a copy; or less."""
        found = self.machine.get("ceilings")
        found = found if isinstance(found, Mapping) else {}
        tflops, gbs = found.get("matmul_tflops"), found.get("copy_gbs")
        return {name: float(x) for name, x in (("tflops", tflops), ("gbs", gbs)) if isinstance(x, int | float)}


@dataclass
class Machine:
    """All that was measured on one device.

    records: by key; of what several files have, the newest.
    """

    device: str
    files: list[Results]
    records: dict[Key, Record] = field(default_factory=dict)
    repeated: int = 0

    @property
    def ceilings(self) -> dict[str, float]:
        """Of the newest file that has any."""
        return next((results.ceilings for results in reversed(self.files) if results.ceilings), {})


def load(path: Path) -> Results:
    """Read a file.

    Raises:
        DamagedResults: it is missing, is not JSON, or is not what a benchmark writes.
    """
    table = read(path)
    records = [_timed(path, f"benchmarks[{i}]", x) for i, x in enumerate(table["benchmarks"])]
    for i, entry in enumerate(table.get("not_timed", [])):
        info = entry.get("extra_info", entry) if isinstance(entry, dict) else entry
        records.append(_record(path, f"not_timed[{i}]", info))
    _refuse_duplicates(path, records)
    machine, commit = (_mapping(path, table, name) for name in ("machine_info", "commit_info"))
    named = str(commit.get("id") or machine.get("commit") or "")
    return Results(
        path, machine, named + "+" * bool(commit.get("dirty")), str(table.get("datetime") or ""), tuple(records)
    )


def by_device(files: Iterable[Results]) -> list[Machine]:
    """The files of each device, from old to new, and their records."""
    machines: dict[str, Machine] = {}
    for results in sorted(files, key=lambda results: results.date):
        machine = machines.setdefault(results.device, Machine(results.device, []))
        machine.files.append(results)
        for record in results.records:
            machine.repeated += record.key in machine.records
            machine.records[record.key] = record
    return list(machines.values())


def _mapping(path: Path, table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = table.get(name) or {}
    if not isinstance(value, Mapping):
        raise DamagedResults(f"{path}: {name}: expected an object, got {type(value).__name__}")
    return value


def _timed(path: Path, where: str, entry: Any) -> Record:
    if not isinstance(entry, dict):
        raise DamagedResults(f"{path}: {where}: expected an object, got {type(entry).__name__}")
    stats = entry.get("stats")
    if not isinstance(stats, dict):
        raise DamagedResults(f"{path}: {where}: no 'stats' in it")
    median = stats.get("median")
    if isinstance(median, bool) or not isinstance(median, int | float) or not (0 < median < math.inf):
        raise DamagedResults(f"{path}: {where}: stats.median: expected a positive number of seconds, got {median!r}")
    record = _record(path, where, entry.get("extra_info"))
    return Record(record.key, record.kind, record.status, record.info, float(median), stats.get("rounds"))


def _record(path: Path, where: str, info: Any) -> Record:
    if not isinstance(info, dict):
        raise DamagedResults(f"{path}: {where}: no 'extra_info' in it")
    if missing := [name for name in (*Key._fields, "kind", "status") if not isinstance(info.get(name), str)]:
        raise DamagedResults(f"{path}: {where}: extra_info has no {', '.join(missing)}")
    for name, known in (("kind", KINDS), ("status", STATUSES)):
        if info[name] not in known:
            raise DamagedResults(f"{path}: {where}: {name}: expected one of {', '.join(known)}, got {info[name]!r}")
    return Record(Key(*(info[name] for name in Key._fields)), info["kind"], info["status"], info)


def _refuse_duplicates(path: Path, records: Sequence[Record]) -> None:
    seen = set()
    for record in records:
        if record.key in seen:
            raise DamagedResults(f"{path}: twice in the file: {record.key}")
        seen.add(record.key)


def _first(table: Mapping[str, Any], *names: str) -> Any:
    return next((table[name] for name in names if table.get(name)), None)
