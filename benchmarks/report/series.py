"""Records as curves: what of a benchmark file belongs into one picture, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from fastdistill.benchmarks.report.records import KINDS, Record

# What a curve may run along, in order of preference.
LENGTHS = {"n": "tokens N", "px": "side of the image, pixels", "d": "head dim D", "width": "channels C"}
BATCH = "batch"  # may change along a curve: it fills the device
LABEL = "model"  # names the size, too ("DiT-XL/2-256px"), so it says nothing about what belongs together
MODE_NAMES = {
    "forward": "forward with tangent",
    "primal": "backward of the primal",
    "mixed": "backward of primal and tangent",
    "step": "training step",
}
COMPUTE_BOUND = 5.0  # flops a byte, above which a throughput is said in TFLOP/s, below in GB/s


class Throughput(NamedTuple):
    """How a throughput is said: the unit, the field of `extra_info` that has it (None: calls a second), a factor."""

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
    """One provider in one mode. records: by the length that they have, those that were not timed, too."""

    provider: str
    kind: str
    records: Mapping[int, Record]


@dataclass(frozen=True)
class Series:
    """Everything that differs in nothing but length, mode and provider: a picture.

    length: the key of `LENGTHS` that the curves run along.
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
        """What the picture shows."""
        return ", ".join(filter(None, [self.op, self.shape, self.dtype]))


def gather(records: Iterable[Record]) -> list[Series]:
    """The series of these records, in their order; those with nothing to run along make no picture."""
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
    """Operations a second where the work is arithmetic, bytes where it is moving data, calls where neither is known."""
    timed = [record for record in records if record.median is not None]
    flops, moved = (sum(record.number(name) or 0 for record in timed) for name in ("flops", "bytes"))
    if flops and flops >= COMPUTE_BOUND * moved and any(record.number("tflops") for record in timed):
        return arithmetic(timed)
    if moved and any(record.number("gbs") for record in timed):
        return Throughput("GB/s", "gbs")
    return Throughput("calls/s", None)


def arithmetic(records: Iterable[Record]) -> Throughput:
    """TFLOP/s, or GFLOP/s where none of the rows reaches one."""
    large = max((record.number("tflops") or 0 for record in records), default=0) >= 1
    return Throughput("TFLOP/s", "tflops") if large else Throughput("GFLOP/s", "tflops", 1000.0)


def in_order(records: Iterable[Record]) -> list[Record]:
    """By what they throughput, and there ours first, floors last, each kind from fast to slow."""

    def place(record: Record) -> tuple[object, ...]:
        return (KINDS.index(record.kind), record.median is None, record.median or 0, record.key.provider)

    cases: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        cases.setdefault(record.key[:-1], []).append(record)
    return [record for members in cases.values() for record in sorted(members, key=place)]


def _kept(record: Record, length: str) -> dict[str, int | str]:
    """What of a row's shape stays the same along its curve; m is only said where it isn't n."""
    shape, sizes = record.shape, record.sizes()
    follows = {length, BATCH, LABEL, *(["m"] if sizes.get("m") == sizes.get("n") else [])}
    return {name: value for name, value in shape.items() if name not in follows}


def _belongs(record: Record, length: str) -> tuple[str, ...]:
    kept = sorted(f"{name}={value}" for name, value in _kept(record, length).items())
    return (record.key.suite, record.key.op, record.key.dtype, *kept, str(length in record.sizes()))


def _without_collisions(records: Sequence[Record], length: str) -> list[list[Record]]:
    """The rows as one group; by their label, if one provider has two rows at the same length."""
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
    """The words at their beginning that all labels share: of DiT-XL/2-256px and DiT-XL/2-512px, DiT-XL/2."""
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
