"""Rows as curves: what of a benchmark file belongs into one picture, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from fastdistill.benchmarks.rows import KINDS, Row

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


class Measure(NamedTuple):
    """How a throughput is said: the unit, the field of `extra_info` that has it (None: calls a second), a factor."""

    unit: str
    field: str | None
    factor: float = 1.0

    def of(self, row: Row) -> float | None:
        """A row's throughput."""
        if self.field is None:
            return None if row.median is None else 1 / row.median
        value = row.number(self.field)
        return None if value is None else value * self.factor


@dataclass(frozen=True)
class Curve:
    """One provider in one mode. rows: by the length that they have, those that were not timed, too."""

    provider: str
    kind: str
    rows: Mapping[int, Row]


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
    measure: Measure
    panels: Mapping[str, tuple[Curve, ...]] = field(hash=False)

    @property
    def title(self) -> str:
        """What the picture shows."""
        return ", ".join(filter(None, [self.op, self.shape, self.dtype]))


def gather(rows: Iterable[Row]) -> list[Series]:
    """The series of these rows, in their order; rows with nothing to run along make no picture and are left out."""
    left, found = list(rows), []
    for length in LENGTHS:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in left:
            groups.setdefault(_belongs(row, length), []).append(row)
        left = []
        for group in groups.values():
            for members in _without_collisions(group, length):
                if len({row.sizes().get(length) for row in members if row.median is not None}) > 1:
                    found.append(_series(members, length))
                else:
                    left += members
    return found


def measure_of(rows: Iterable[Row]) -> Measure:
    """Operations a second where the work is arithmetic, bytes where it is moving data, calls where neither is known."""
    timed = [row for row in rows if row.median is not None]
    flops, moved = (sum(row.number(name) or 0 for row in timed) for name in ("flops", "bytes"))
    if flops and flops >= COMPUTE_BOUND * moved and any(row.number("tflops") for row in timed):
        return arithmetic(timed)
    if moved and any(row.number("gbs") for row in timed):
        return Measure("GB/s", "gbs")
    return Measure("calls/s", None)


def arithmetic(rows: Iterable[Row]) -> Measure:
    """TFLOP/s, or GFLOP/s where none of the rows reaches one."""
    large = max((row.number("tflops") or 0 for row in rows), default=0) >= 1
    return Measure("TFLOP/s", "tflops") if large else Measure("GFLOP/s", "tflops", 1000.0)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By what they measure, and there ours first, floors last, each kind from fast to slow."""

    def place(row: Row) -> tuple[object, ...]:
        return (KINDS.index(row.kind), row.median is None, row.median or 0, row.key.provider)

    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.key[:-1], []).append(row)
    return [row for members in cases.values() for row in sorted(members, key=place)]


def _kept(row: Row, length: str) -> dict[str, int | str]:
    """What of a row's shape stays the same along its curve; m is only said where it isn't n."""
    shape, sizes = row.shape, row.sizes()
    follows = {length, BATCH, LABEL, *(["m"] if sizes.get("m") == sizes.get("n") else [])}
    return {name: value for name, value in shape.items() if name not in follows}


def _belongs(row: Row, length: str) -> tuple[str, ...]:
    kept = sorted(f"{name}={value}" for name, value in _kept(row, length).items())
    return (row.key.suite, row.key.op, row.key.dtype, *kept, str(length in row.sizes()))


def _without_collisions(rows: Sequence[Row], length: str) -> list[list[Row]]:
    """The rows as one group; by their label, if one provider has two rows at the same length."""
    places = [(row.key.mode, row.key.provider, row.sizes().get(length)) for row in rows]
    if len(set(places)) == len(places):
        return [list(rows)]
    by_label: dict[object, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.shape.get(LABEL, row.key.case), []).append(row)
    return list(by_label.values())


def _series(rows: Sequence[Row], length: str) -> Series:
    first = rows[0]
    panels = {mode: _curves(rows, mode, length) for mode in _modes(rows)}
    shape = ", ".join(filter(None, [_label(rows), *map(_words, *zip(*_kept(first, length).items()))]))
    return Series(first.key.suite, first.key.op, shape, first.key.dtype, length, measure_of(rows), panels)


def _label(rows: Iterable[Row]) -> str:
    """The words at their beginning that all labels share: of DiT-XL/2-256px and DiT-XL/2-512px, DiT-XL/2."""
    labels = [str(row.shape.get(LABEL, "")).split("-") for row in rows]
    common = [words[0] for words in zip(*labels) if len(set(words)) == 1]
    return "-".join(common)


def _words(name: str, value: int | str) -> str:
    names = {"d": "head dim", "n": "N", "m": "keys", "width": "channels", "px": "side"}
    return value if isinstance(value, str) else f"{names.get(name, name)} {value:,}"


def _modes(rows: Iterable[Row]) -> list[str]:
    there = dict.fromkeys(row.key.mode for row in rows)
    return [mode for mode in MODE_NAMES if mode in there] + [mode for mode in there if mode not in MODE_NAMES]


def _curves(rows: Iterable[Row], mode: str, length: str) -> tuple[Curve, ...]:
    def provider(row: Row) -> str:
        return row.key.provider

    members = sorted((row for row in rows if row.key.mode == mode), key=provider)
    curves = []
    for name, part in groupby(members, provider):
        mine = sorted(part, key=lambda row: row.sizes()[length])
        curves.append(Curve(name, mine[0].kind, {row.sizes()[length]: row for row in mine}))
    return tuple(sorted(curves, key=lambda curve: KINDS.index(curve.kind)))
