"""Format numbers for readers of the report, the text tables and the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def seconds(value: float) -> str:
    """Format a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def size(value: float) -> str:
    """Format bytes in the unit that suits them, from KiB to GiB."""
    power = 3 if value >= 10 * 2**30 else 2 if value >= 2**20 else 1
    return f"{number(value / 1024**power)} {('KiB', 'MiB', 'GiB')[power - 1]}"


def errors(value: Any) -> str:
    """Format a relative error, or those of output and tangent; return an empty text if there is none."""
    if isinstance(value, Mapping):
        parts = [f"{x:.1e}" if isinstance(x, int | float) else "–" for x in value.values()]
        return " / ".join(parts) if any(part != "–" for part in parts) else ""
    return f"{value:.1e}" if isinstance(value, int | float) else ""


def number(value: float | None) -> str:
    """Format a number with three digits, or all digits before the point; return an empty text for None."""
    return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
