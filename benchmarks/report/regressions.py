"""Compare two benchmark files: the gate against regressions.

    python -m fastdistill.benchmarks.report.regressions OLD NEW                       # medians; fails over 1.05
    python -m fastdistill.benchmarks.report.regressions OLD NEW --metric peak_memory --ratio 1.01
    python -m fastdistill.benchmarks.report.regressions OLD NEW --metric bytes_moved  # of op_counts.json

A record of ours fails if NEW / OLD is over the ratio. It also fails if OLD has a number, and in NEW it failed parity,
ran out of memory or ended in an error. Peers and floors that moved as much are printed, because they show whether the
machine changed; they fail nothing. Records of only one file are listed. Status 0 means that nothing is over the ratio,
1 that something is, by name, and 2 that the files can't be compared (damaged, of different devices, or with no record
of ours in common).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastdistill.benchmarks.ops.timed_op import OURS, BenchError
from fastdistill.benchmarks.report.records import LOST, Key, Record, Results, load
from fastdistill.benchmarks.run.numbers import seconds

# Maps each value of --metric to how it is read from a record, and to whether it depends on the machine.
METRICS: dict[str, tuple[Callable[[Record], float | None], bool]] = {
    "median": (lambda record: record.median, True),
    "peak_memory": (lambda record: record.number("peak_memory_bytes"), True),
    "instructions": (lambda record: record.number("instructions"), True),
    "aten_ops": (lambda record: record.number("aten_ops"), False),
    "matmul_flops": (lambda record: record.number("matmul_flops"), False),
    "bytes_moved": (lambda record: record.number("bytes_moved"), False),
    "peak_bytes": (lambda record: record.number("peak_bytes"), False),
}


class Incomparable(BenchError):
    """Report two files that can't be compared; the message says why."""


@dataclass
class Comparison:
    """Collect the findings of a comparison, a line each; `failures` decide its outcome."""

    compared: int = 0
    failures: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)


def find_regressions(
    old: Results, new: Results, *, metric: str = "median", ratio: float = 1.05, across_devices: bool = False
) -> Comparison:
    """Compare the records of two files.

    Args:
        metric: one of `METRICS`.
        ratio: largest NEW / OLD that passes, 1 or more.
        across_devices: compares files of different devices too.

    Raises:
        Incomparable: the devices differ, or no record of ours has the metric in both files.
        BenchError: the metric is unknown, or the ratio is below 1.
    """
    if metric not in METRICS:
        raise BenchError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not 1 <= ratio < math.inf:
        raise BenchError(f"ratio: expected a number from 1 up, got {ratio}")
    read, of_machine = METRICS[metric]
    if of_machine and old.device != new.device and not across_devices:
        raise Incomparable(
            f"{old.path} was measured on {old.device}, {new.path} on {new.device}; --across-devices compares them all "
            "the same"
        )
    records: tuple[Mapping[Key, Record], ...] = tuple(
        {record.key: record for record in each.records} for each in (old, new)
    )
    found = Comparison()
    for key, before, after in _matched(*records):
        if before is None or after is None:
            record = before or after
            assert record is not None
            if read(record) is not None:
                (found.only_old if after is None else found.only_new).append(_line(key, record, read(record), metric))
            continue
        _judge(found, key, before, after, (read(before), read(after)), metric, ratio)
    if not found.compared:
        raise Incomparable(f"no record of ours has a {metric} in both {old.path} and {new.path}: nothing was compared")
    return found


def _matched(
    old: Mapping[Key, Record], new: Mapping[Key, Record]
) -> Iterator[tuple[Key, Record | None, Record | None]]:
    for key in {**old, **new}:
        yield key, old.get(key), new.get(key)


def _judge(
    found: Comparison,
    key: Key,
    before: Record,
    after: Record,
    values: tuple[float | None, float | None],
    metric: str,
    ratio: float,
) -> None:
    """Sort a record that both files have into the comparison."""
    old, new = values
    ours = after.kind == OURS
    worse = found.failures if ours else found.moved
    if old is None and new is None:
        return
    if new is None and after.status in LOST:
        found.compared += ours
        worse.append(f"{key}: {metric} was {_value(metric, old)}, now {after.status}: {after.reason or 'no reason'}")
    elif new is None:
        found.only_old.append(_line(key, after, old, metric))
    elif old is None:
        found.only_new.append(_line(key, before, new, metric))
    else:
        found.compared += ours
        change = new / old if old else (1.0 if new == old else math.inf)
        text = f"{key}: {metric} {_value(metric, old)} -> {_value(metric, new)}, {change:.3f}x"
        if change > ratio:
            worse.append(text)
        elif change < 1 / ratio:
            found.better.append(text)


def _line(key: Key, other: Record, value: float | None, metric: str) -> str:
    text = f"{key}: {metric} {_value(metric, value)}"
    return text if other.status == "ok" else f"{text}; in the other: {other.status}: {other.reason or 'no reason'}"


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return "absent"
    return seconds(value) if metric == "median" else f"{value:,.0f}"


def describe(found: Comparison, ratio: float) -> str:
    """Return a whole comparison as text."""
    parts = [
        (f"Over {ratio:g}:", found.failures),
        ("Peers and floors that moved as much; they say that the machine did, or they:", found.moved),
        ("Better by as much:", found.better),
        ("Only in OLD:", found.only_old),
        ("Only in NEW:", found.only_new),
    ]
    lines = [line for title, items in parts if items for line in (title, *(f"  {item}" for item in items))]
    return "\n".join([*lines, f"{found.compared} records of ours compared, {len(found.failures)} over {ratio:g}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", type=Path)
    parser.add_argument("new", metavar="NEW", type=Path)
    parser.add_argument(
        "--ratio", type=float, default=1.05, help="largest NEW / OLD that passes (default: %(default)s)"
    )
    parser.add_argument("--metric", choices=METRICS, default="median", help="(default: %(default)s)")
    parser.add_argument("--across-devices", action="store_true", help="compare files of different devices too")
    args = parser.parse_args(arguments)
    try:
        old, new = load(args.old), load(args.new)
        found = find_regressions(old, new, metric=args.metric, ratio=args.ratio, across_devices=args.across_devices)
    except BenchError as error:
        print(f"regressions: {error}", file=sys.stderr)
        return 2
    print(describe(found, args.ratio))
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
