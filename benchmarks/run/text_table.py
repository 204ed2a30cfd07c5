"""Print results as a text table: every time with its error, and everything that was not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdistill.benchmarks.run.numbers import errors, seconds, size

HEADS = ("provider", "time", "p20 to p80", "rate", "memory", "error", "of tangent", "x floor")


def text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a block of text for each case.

    It has a line for each provider, then those that were not timed with the reason; absent providers are listed at the
    end.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["group"], []).append(entry)
    blocks = [_block(group, members) for group, members in groups.items()]
    absent = {x["extra_info"]["provider"]: x["extra_info"]["reason"] for x in entries if _is_absent(x)}
    if absent:
        blocks.append("\n".join(["Not on this machine:", *(f"  {name}: {why}" for name, why in absent.items())]) + "\n")
    return "\n".join(blocks)


def _is_absent(entry: Mapping[str, Any]) -> bool:
    return bool(entry["extra_info"]["status"] == "unavailable")


def _block(group: str, members: Sequence[Mapping[str, Any]]) -> str:
    rows = [_cells(entry) for entry in members if "stats" in entry]
    widths = [max(len(row[i]) for row in (HEADS, *rows)) for i in range(len(HEADS))]
    lines = [group]
    for row in (HEADS, *rows) if rows else ():
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    for entry in members:
        if "stats" not in entry and not _is_absent(entry):
            info = entry["extra_info"]
            lines.append(f"  {info['provider']}: {info['status']}" + (f": {info['reason']}" if info["reason"] else ""))
    return "\n".join(lines) + "\n"


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    info = entry["extra_info"]
    rate = "-"
    if info["flops"] is not None and info["op"] in ("attention", "block", "step") and info["tflops"] is not None:
        rate = f"{info['tflops']:.3g} TFLOP/s"
    elif info["gbs"] is not None:
        rate = f"{info['gbs']:.3g} GB/s"
    return (
        info["provider"],
        seconds(entry["stats"]["median"]),
        f"{seconds(info['p20_s'])} to {seconds(info['p80_s'])}",
        rate,
        _or_dash(size, info["peak_memory_bytes"]),
        _or_dash(errors, info["error"]["output"]),
        _or_dash(errors, info["error"]["tangent"]),
        _or_dash("{:.2f}".format, info["ratio_to_floor"]),
    )


def _or_dash(form: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else form(value)
