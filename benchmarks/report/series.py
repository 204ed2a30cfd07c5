"""Group the records of benchmark files into curves: which belong into one picture, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from fastdistill.benchmarks.report.records import KINDS, Record

# A curve runs along one of these, in order of preference.
LENGTHS = {"n": "tokens N", "px": "side of the image, pixels", "d": "head dim D", "width": "channels C"}
BATCH = "batch"  # The batch may change along a curve, because it fills the device.
LABEL = "model"  # The label names the size too ("DiT-XL/2-256px"), so it doesn't tell which records belong together.
MODE_NAMES = {
    "forward": "forward with tangent",
    "primal": "backward of the primal",
    "mixed": "backward of primal and tangent",
    "step": "training step",
}
COMPUTE_BOUND = 5.0  # Above this many flops a byte a throughput is given in TFLOP/s, below it in GB/s.


class Throughput(NamedTuple):
    """Describe a throughput: its unit, its field in `extra_info` (None means calls a second), and a factor."""

    unit: str
    field: str | None
    factor: float = 1.0

    def of(self, record: Record) -> float | None:
        """Return the throughput of a record."""
        if self.field is None:
            return None if record.median is None else 1 / record.median
        value = record.number(self.field)
        return None if value is None else value * self.factor


@dataclass(frozen=True)
class Curve:
    """Hold one provider in one mode; `records` are by length, and include those that were not timed."""

    provider: str
    kind: str
    records: Mapping[int, Record]


@dataclass(frozen=True)
class Series:
    """Hold one picture: all records that differ only in length, mode and provider.

    Args:
        length: the key of `LENGTHS` along which the curves run.
        panels: mode -> curves, ours first and floors last.
    """

    suite: str
    op: str
    shape: str
    dtype: str
    length: str
    throughput: Throughput
    panels: Mapping[str, tuple[Curve, ...]] = field(hash=False)

    @property
    def title(self) -> str:
        """Return the title of the picture."""
        return ", ".join(filter(None, [self.op, self.shape, self.dtype]))


def gather(records: Iterable[Record]) -> list[Series]:
    """Return the series of these records, in their order; records without a length to run along make no picture."""
    left, found = list(records), []
    for length in LENGTHS:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in left:
            groups.setdefault(_belongs(record, length), []).append(record)
        left = []
        for group in groups.values():
            for members in _without_collisions(group, length):
                if len({record.sizes().get(length) for record in members if record.median is not None}) > 1:
                    found.append(_series(members, length))
                else:
                    left += members
    return found


def throughput_of(records: Iterable[Record]) -> Throughput:
    """Return operations a second if arithmetic bounds the work, bytes if memory does, and calls if neither is known."""
    timed = [record for record in records if record.median is not None]
    flops, moved = (sum(record.number(name) or 0 for record in timed) for name in ("flops", "bytes"))
    if flops and flops >= COMPUTE_BOUND * moved and any(record.number("tflops") for record in timed):
        return arithmetic(timed)
    if moved and any(record.number("gbs") for record in timed):
        return Throughput("GB/s", "gbs")
    return Throughput("calls/s", None)


def arithmetic(records: Iterable[Record]) -> Throughput:
    """Return TFLOP/s, or GFLOP/s if no record reaches one TFLOP/s."""
    large = max((record.number("tflops") or 0 for record in records), default=0) >= 1
    return Throughput("TFLOP/s", "tflops") if large else Throughput("GFLOP/s", "tflops", 1000.0)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sort records by case; within a case ours come first, floors last, and each kind goes from fast to slow."""

    def place(record: Record) -> tuple[object, ...]:
        return (KINDS.index(record.kind), record.median is None, record.median or 0, record.key.provider)

    cases: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        cases.setdefault(record.key[:-1], []).append(record)
    return [record for members in cases.values() for record in sorted(members, key=place)]


def _kept(record: Record, length: str) -> dict[str, int | str]:
    """Return the parts of a record's shape that stay the same along its curve; m is left out if it equals n."""
    shape, sizes = record.shape, record.sizes()
    follows = {length, BATCH, LABEL, *(["m"] if sizes.get("m") == sizes.get("n") else [])}
    return {name: value for name, value in shape.items() if name not in follows}


def _belongs(record: Record, length: str) -> tuple[str, ...]:
    kept = sorted(f"{name}={value}" for name, value in _kept(record, length).items())
    return (record.key.suite, record.key.op, record.key.dtype, *kept, str(length in record.sizes()))


def _without_collisions(records: Sequence[Record], length: str) -> list[list[Record]]:
    """Return the records as one group, or by their label if one provider has two records at the same length."""
    places = [(record.key.mode, record.key.provider, record.sizes().get(length)) for record in records]
    if len(set(places)) == len(places):
        return [list(records)]
    by_label: dict[object, list[Record]] = {}
    for record in records:
        by_label.setdefault(record.shape.get(LABEL, record.key.case), []).append(record)
    return list(by_label.values())


def _series(records: Sequence[Record], length: str) -> Series:
    first = records[0]
    panels = {mode: _curves(records, mode, length) for mode in _modes(records)}
    shape = ", ".join(filter(None, [_label(records), *map(_words, *zip(*_kept(first, length).items()))]))
    return Series(first.key.suite, first.key.op, shape, first.key.dtype, length, throughput_of(records), panels)


def _label(records: Iterable[Record]) -> str:
    """Return the leading words that all labels share: DiT-XL/2 of DiT-XL/2-256px and DiT-XL/2-512px."""
    labels = [str(record.shape.get(LABEL, "")).split("-") for record in records]
    common = [words[0] for words in zip(*labels) if len(set(words)) == 1]
    return "-".join(common)


def _words(name: str, value: int | str) -> str:
    names = {"d": "head dim", "n": "N", "m": "keys", "width": "channels", "px": "side"}
    return value if isinstance(value, str) else f"{names.get(name, name)} {value:,}"


def _modes(records: Iterable[Record]) -> list[str]:
    there = dict.fromkeys(record.key.mode for record in records)
    return [mode for mode in MODE_NAMES if mode in there] + [mode for mode in there if mode not in MODE_NAMES]


def _curves(records: Iterable[Record], mode: str, length: str) -> tuple[Curve, ...]:
    def provider(record: Record) -> str:
        return record.key.provider

    members = sorted((record for record in records if record.key.mode == mode), key=provider)
    curves = []
    for name, part in groupby(members, provider):
        mine = sorted(part, key=lambda record: record.sizes()[length])
        curves.append(Curve(name, mine[0].kind, {record.sizes()[length]: record for record in mine}))
    return tuple(sorted(curves, key=lambda curve: KINDS.index(curve.kind)))
