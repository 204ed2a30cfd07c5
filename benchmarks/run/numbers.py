"""Numbers as people read them, in the report and in the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def size(value: float) -> str:
    """Bytes in the unit that suits them, from KiB to GiB."""
    power = 3 if value >= 10 * 2**30 else 2 if value >= 2**20 else 1
    return f"{number(value / 1024**power)} {('KiB', 'MiB', 'GiB')[power - 1]}"


def errors(value: Any) -> str:
    """A relative error, or those of output and tangent; empty if there is none."""
    if isinstance(value, Mapping):
        parts = [f"{x:.1e}" if isinstance(x, int | float) else "–" for x in value.values()]
        return " / ".join(parts) if any(part != "–" for part in parts) else ""
    return f"{value:.1e}" if isinstance(value, int | float) else ""


def number(value: float | None) -> str:
    """Three digits, or as many as stand before the point; empty for None."""
    return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
