"""`fastdistill report --bench FILE ...`: benchmark files as one page that needs nothing beside it, and as pictures.

Everything in the files is on the page: what was timed, with its error beside its time, and what was not, with the
reason. The pictures are written beside the page too, for a README.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastdistill.benchmarks.charts import draw_roofline, draw_series, looks
from fastdistill.benchmarks.rows import FLOOR, OURS, PEER, Key, Results, Row, load
from fastdistill.benchmarks.series import MODE_NAMES, gather, in_order

TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = (
    "", "median", "20 % to 80 %", "TFLOP/s", "GB/s", "peak memory", "error, tangent's", "allowed", "time / floor",
    "time / ours", "SM clock", "energy",
)  # fmt: skip


@dataclass
class Machine:
    """All that was measured on one device.

    rows: by key; of what several files have, the newest.
    """

    device: str
    files: list[Results]
    rows: dict[Key, Row] = field(default_factory=dict)
    repeated: int = 0

    @property
    def ceilings(self) -> dict[str, float]:
        """Of the newest file that has any."""
        return next((results.ceilings for results in reversed(self.files) if results.ceilings), {})


def write_report(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the page and its pictures; returns what was written, the page first.

    Args:
        files: benchmark files, of one device or of several, which are kept apart.
        out: of the page; pictures go beside it, as <its stem>-<what they show>.svg.

    Raises:
        DamagedResults: a file can't be read.
        ValueError: no files, or a name that doesn't end in .html.
    """
    if not files:
        raise ValueError("bench: expected one file or more, got none")
    if out.suffix != ".html":
        raise ValueError(f"out: expected a name in .html, got {out}")
    machines = by_device([load(path) for path in files])
    out.parent.mkdir(parents=True, exist_ok=True)
    sections, pictures = [], []
    for machine in machines:
        prefix = f"{_slug(machine.device)}-" if len(machines) > 1 else ""
        drawn = draw(machine)
        sections.append(_section(machine, drawn))
        for title, svg in drawn.items():
            path = out.with_name(f"{out.stem}-{prefix}{_slug(title)}.svg")
            path.write_text(svg, encoding="utf-8")
            pictures.append(path)
    page = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html = page.get_template("bench.html.jinja").render(sections=sections, headings=HEADINGS)
    out.write_text(html, encoding="utf-8")
    return [out, *pictures]


def by_device(files: Iterable[Results]) -> list[Machine]:
    """The files of each device, from old to new, and their rows."""
    machines: dict[str, Machine] = {}
    for results in sorted(files, key=lambda results: results.date):
        machine = machines.setdefault(results.device, Machine(results.device, []))
        machine.files.append(results)
        for row in results.rows:
            machine.repeated += row.key in machine.rows
            machine.rows[row.key] = row
    return list(machines.values())


def draw(machine: Machine) -> dict[str, str]:
    """Title -> SVG of every picture there is to draw of a device."""
    rows = list(machine.rows.values())
    look = looks(rows)
    drawn = {f"{series.suite}: {series.title}": draw_series(series, look) for series in gather(rows)}
    roofline = draw_roofline(rows, machine.ceilings, look)
    return drawn | ({"roofline": roofline} if roofline else {})


def read_rows(rows: Iterable[Row]) -> list[str]:
    """What to read in the numbers, in sentences that follow from them, whichever way they came out."""
    rows = list(rows)
    if any(row.info.get("quick") for row in rows):
        return ["These are tiny shapes (--quick): they show that everything runs, and say nothing about speed."]
    ours = [row for row in rows if row.kind == OURS]
    wrong = [row for row in ours if row.status in ("failed parity", "error")]
    sentences = [
        f"Every run of ours that could run passed the comparison with float64 ({_count(ours, 'ok')} were timed)."
        if not wrong
        else f"{len(wrong)} runs of ours failed the comparison with float64 or ended in an error, and were not timed."
    ]
    ratios = [best_peer / best for best, best_peer in _contests(rows)]
    if ratios:
        faster = sum(ratio > 1 for ratio in ratios)
        sentences.append(
            f"Ours is faster than the fastest peer that passed in {faster} of {len(ratios)} cases: the peer's time is "
            f"{min(ratios):.2f} to {max(ratios):.2f} times ours, {median(ratios):.2f} in the middle."
        )
    to_floor = [x for row in ours if row.median is not None and (x := row.number("ratio_to_floor"))]
    if to_floor:
        sentences.append(
            f"Against the floor, an implementation without any tangent, it takes {min(to_floor):.2f} to "
            f"{max(to_floor):.2f} times as long, {median(to_floor):.2f} in the middle."
        )
    slowed = [row for row in rows if _throttle(row)]
    if slowed:
        sentences.append(f"The GPU was throttled in {len(slowed)} of {_count(rows, 'ok')} runs; the tables mark them.")
    return sentences


def _contests(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """The best time of ours and of the peers, wherever both were timed."""
    best: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row.median is not None and row.status == "ok":
            case = best.setdefault(row.key[:-1], {})
            case[row.kind] = min(row.median, case.get(row.kind, row.median))
    return [(case[OURS], case[PEER]) for case in best.values() if OURS in case and PEER in case]


def _count(rows: Iterable[Row], status: str) -> int:
    return sum(row.status == status for row in rows)


def _section(machine: Machine, drawn: Mapping[str, str]) -> dict[str, Any]:
    """What the template says of one device."""
    rows = in_order(machine.rows.values())
    newest = machine.files[-1]
    return {
        "device": machine.device,
        "when": f"{newest.date[:10] or 'undated'}, commit {newest.commit[:10] or 'unknown'}",
        "repeated": machine.repeated,
        "reading": read_rows(rows),
        "pictures": [(title, _inline(svg)) for title, svg in drawn.items()],
        "ceilings": _ceilings(machine),
        "suites": _tables(rows),
        "not_timed": _not_timed(rows),
        "environments": [(results.path.name, _environment(results)) for results in machine.files],
        "clocks": _clocks(rows),
    }


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """Suite -> case -> lines of the table, all rows, timed or not."""
    suites: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        key = row.key
        case = f"{key.op}, {key.case}, {key.dtype}, {MODE_NAMES.get(key.mode, key.mode)}"
        suites.setdefault(key.suite, {}).setdefault(case, []).append(row)
    return [(suite, [(case, _lines(members)) for case, members in cases.items()]) for suite, cases in suites.items()]


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    ours = min((row.median for row in rows if row.kind == OURS and row.median is not None), default=None)
    return [
        {
            "name": row.key.provider,
            "kind": row.kind,
            "cells": _cells(row, ours) if row.median is not None else [],
            "why": f"{row.status}: {row.reason or 'no reason given'}" if row.median is None else "",
            "lost": row.status in ("failed parity", "oom", "error"),
            "throttle": _throttle(row),
        }
        for row in rows
    ]


def _cells(row: Row, ours: float | None) -> list[str]:
    """As `HEADINGS`, without the name."""
    low, high, peak = (row.number(name) for name in ("p20_s", "p80_s", "peak_memory_bytes"))
    clock, energy = row.number("sm_clock_mhz"), row.number("energy_j")
    assert row.median is not None
    return [
        seconds(row.median),
        f"{seconds(low)} – {seconds(high)}" if low is not None and high is not None else "",
        _number(row.number("tflops")),
        _number(row.number("gbs")),
        f"{peak / 2**20:,.1f} MiB" if peak is not None else "",
        errors(row.info.get("error")),
        errors(row.info.get("allowed_error")),
        _number(row.number("ratio_to_floor")) if row.kind != FLOOR else "",
        _number(row.median / ours) if ours is not None and row.kind != OURS else "",
        f"{clock:.0f} MHz" if clock is not None else "",
        f"{energy:.3g} J" if energy is not None else "",
    ]


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def errors(value: Any) -> str:
    """A relative error, or those of output and tangent."""
    if isinstance(value, Mapping):
        parts = [f"{x:.1e}" if isinstance(x, int | float) else "–" for x in value.values()]
        return " / ".join(parts) if any(part != "–" for part in parts) else ""
    return f"{value:.1e}" if isinstance(value, int | float) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _throttle(row: Row) -> str:
    """Why the clocks were held down, in words; empty if they weren't, or if nobody knows."""
    reasons = row.info.get("throttle")
    if isinstance(reasons, str):
        return reasons
    return ", ".join(map(str, reasons)) if isinstance(reasons, list | tuple) else ""


def _not_timed(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Provider, status and reason of all rows without a time, those of ours first; with the cases that they concern."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row.median is None:
            group = (row.kind, row.key.provider, row.status, row.reason or "no reason given")
            groups.setdefault(group, []).append(f"{row.key.op}, {row.key.case}, {row.key.dtype}, {row.key.mode}")
    order = {kind: i for i, kind in enumerate((OURS, PEER, FLOOR))}
    return [
        {"provider": provider, "status": status, "reason": reason, "cases": cases}
        for (_, provider, status, reason), cases in sorted(groups.items(), key=lambda item: order[item[0][0]])
    ]


def _clocks(rows: Iterable[Row]) -> str:
    """The clocks under load and the throttling, in a sentence."""
    rows = [row for row in rows if row.median is not None]
    clocks = [clock for row in rows if (clock := row.number("sm_clock_mhz")) is not None]
    if not clocks:
        return "Clocks, power and throttling: not measured."
    reasons = sorted({reason for row in rows if (reason := _throttle(row))})
    throttled = sum(bool(_throttle(row)) for row in rows)
    said = f"throttled in {throttled} runs ({'; '.join(reasons)})" if throttled else "never throttled"
    return f"SM clock under load {min(clocks):.0f} to {max(clocks):.0f} MHz in {len(clocks)} runs; {said}."


def _ceilings(machine: Machine) -> str:
    found = machine.ceilings
    parts = {"tflops": "TFLOP/s of a large matmul", "gbs": "GB/s of a copy"}
    if not found:
        return "The ceilings of this device were not measured, so none is drawn."
    said = [f"{found[name]:,.4g} {text}" for name, text in parts.items() if name in found]
    return f"Ceilings, measured on this device in the same run: {', '.join(said)}."


def _environment(results: Results) -> list[tuple[str, str]]:
    """machine_info and what else describes a file, flat."""
    flat = {"measured": results.date or "undated", "commit": results.commit or "unknown"}
    for name, value in results.machine.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}: {inner}": x for inner, x in value.items()}
        else:
            flat[name] = value
    return [(name, "none" if value is None else str(value)) for name, value in flat.items()]


def _inline(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
