"""Load benchmark files as records, for the report, the comparison and the README's tables.

A file is pytest-benchmark's JSON. `extra_info` of each benchmark has what that format lacks, and the records that were
not timed have a list of their own:

    machine_info, commit_info, datetime, version
    benchmarks    [{name, fullname, group, params, stats {min, max, mean, stddev, median, rounds, ...}, extra_info}]
    not_timed     [{name, fullname, group, params, extra_info}], or the extra_info alone

    extra_info    suite, op, case, mode, provider, kind, status, reason, shape, dtype, device, flops, bytes, tflops,
                  gbs, p20_s, p80_s, peak_memory_bytes, error, allowed_error, floor_provider, ratio_to_floor,
                  sm_clock_mhz, throttle, power_w, energy_j, ...

A damaged file raises `DamagedResults`, which names the file and the place.
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
LOST = (FAILED, OOM, ERROR)  # These failed although they could have been timed.
STATUSES = (OK, UNAVAILABLE, UNSUPPORTED, *LOST)


class Key(NamedTuple):
    """Identify a record: records with equal keys in two files are compared."""

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
    """Hold the result of one provider on one case.

    Args:
        info: the whole `extra_info`.
        median: seconds; None if it was not timed.
    """

    key: Key
    kind: str
    status: str
    info: Mapping[str, Any] = field(hash=False)
    median: float | None = None
    rounds: int | None = None

    @property
    def reason(self) -> str:
        """Return why it was not timed, or an empty string."""
        return str(self.info.get("reason") or "")

    def number(self, name: str) -> float | None:
        """Return a number of `extra_info`, or None if it has none."""
        value = self.info.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def shape(self) -> dict[str, int | str]:
        """Return the sizes and names that describe the case."""
        shape = self.info.get("shape")
        items = shape.items() if isinstance(shape, Mapping) else ()
        return {str(name): value if type(value) is int else str(value) for name, value in items}

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the shape alone."""
        return {name: value for name, value in self.shape.items() if isinstance(value, int)}


@dataclass(frozen=True)
class Results:
    """Hold the content of a file; `device` names where it was measured, such as "NVIDIA H100 80GB HBM3"."""

    path: Path
    machine: Mapping[str, Any]
    commit: str
    date: str
    records: tuple[Record, ...]

    @property
    def device(self) -> str:
        """Return the GPU's name, or the processor's name with its number of threads."""
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
        """Return the measured ceilings of the device, if any: "tflops" of a large matmul, "gbs" of a copy."""
        found = self.machine.get("ceilings")
        found = found if isinstance(found, Mapping) else {}
        tflops, gbs = found.get("matmul_tflops"), found.get("copy_gbs")
        return {name: float(x) for name, x in (("tflops", tflops), ("gbs", gbs)) if isinstance(x, int | float)}


@dataclass
class Machine:
    """Hold all that was measured on one device.

    Args:
        records: records by key; where several files have the same key, the newest.
    """

    device: str
    files: list[Results]
    records: dict[Key, Record] = field(default_factory=dict)
    repeated: int = 0

    @property
    def ceilings(self) -> dict[str, float]:
        """Return the ceilings of the newest file that has any."""
        return next((results.ceilings for results in reversed(self.files) if results.ceilings), {})


def load(path: Path) -> Results:
    """Load a file.

    Raises:
        DamagedResults: the file is missing, is not JSON, or is not what a benchmark writes.
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
    """Group the files by device, from old to new, with their records."""
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
