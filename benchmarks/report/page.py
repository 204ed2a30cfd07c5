"""Write `fastdistill report --bench FILE ...`: benchmark files as one self-contained page, and as pictures.

Everything in the files is on the page: each time with its error beside it, and the reason of each that was not timed.
The pictures are also written beside the page, for a README.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastdistill.benchmarks.ops.timed_op import FLOOR, OURS, PEER, BenchError
from fastdistill.benchmarks.report.charts import draw_roofline, draw_series, looks
from fastdistill.benchmarks.report.records import LOST, Machine, Record, Results, by_device, load
from fastdistill.benchmarks.report.series import MODE_NAMES, Throughput, arithmetic, gather, in_order
from fastdistill.benchmarks.run.numbers import errors, number, seconds, size

TEMPLATES = Path(__file__).parent / "templates"


def write_report(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the page and its pictures; return the paths that were written, the page first.

    Args:
        files: benchmark files of one device or of several; devices are kept apart.
        out: path of the page; pictures go beside it, as <stem of the page>-<title of the picture>.svg.

    Raises:
        DamagedResults: a file can't be read.
        BenchError: there are no files, or the name doesn't end in .html.
    """
    if not files:
        raise BenchError("--bench: expected one file or more, got none")
    if out.suffix != ".html":
        raise BenchError(f"--out: expected a name in .html, got {out}")
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
    html = page.get_template("bench.html.jinja").render(sections=sections)
    out.write_text(html, encoding="utf-8")
    return [out, *pictures]


def main(files: Sequence[Path], out: Path) -> int:
    """Write the report and print the paths that were written."""
    for path in write_report(files, out):
        print(path)
    return 0


def draw(machine: Machine) -> dict[str, str]:
    """Return every picture of a device: title -> SVG."""
    records = list(machine.records.values())
    look = looks(records)
    drawn = {f"{series.suite}: {series.title}": draw_series(series, look) for series in gather(records)}
    roofline = draw_roofline(records, machine.ceilings, look)
    return drawn | ({"roofline": roofline} if roofline else {})


def read_records(records: Iterable[Record]) -> list[str]:
    """Summarise the numbers in sentences that follow from them, whichever way they came out."""
    records = list(records)
    if any(record.info.get("quick") for record in records):
        return ["These are tiny shapes (--quick): they show that everything runs, and say nothing about speed."]
    ours = [record for record in records if record.kind == OURS]
    wrong = [record for record in ours if record.status in ("failed parity", "error")]
    sentences = [
        f"Every run of ours that could run passed the comparison with float64 ({_count(ours, 'ok')} were timed)."
        if not wrong
        else f"{len(wrong)} runs of ours failed the comparison with float64 or ended in an error, and were not timed."
    ]
    ratios = [best_peer / best for best, best_peer in _contests(records)]
    if ratios:
        faster = sum(ratio > 1 for ratio in ratios)
        sentences.append(
            f"Ours is faster than the fastest peer that passed in {faster} of {len(ratios)} cases: the peer's time is "
            f"{min(ratios):.2f} to {max(ratios):.2f} times ours, {median(ratios):.2f} in the middle."
        )
    to_floor = [x for record in ours if record.median is not None and (x := record.number("ratio_to_floor"))]
    if to_floor:
        sentences.append(
            f"Against the floor, an implementation without any tangent, it takes {min(to_floor):.2f} to "
            f"{max(to_floor):.2f} times as long, {median(to_floor):.2f} in the middle."
        )
    slowed = [record for record in records if _throttle(record)]
    if slowed:
        sentences.append(
            f"The GPU was throttled in {len(slowed)} of {_count(records, 'ok')} runs; the tables mark them."
        )
    return sentences


def _contests(records: Iterable[Record]) -> list[tuple[float, float]]:
    """Return the best time of ours and of the peers, for each case in which both were timed."""
    best: dict[tuple[str, ...], dict[str, float]] = {}
    for record in records:
        if record.median is not None and record.status == "ok":
            case = best.setdefault(record.key[:-1], {})
            case[record.kind] = min(record.median, case.get(record.kind, record.median))
    return [(case[OURS], case[PEER]) for case in best.values() if OURS in case and PEER in case]


def _count(records: Iterable[Record], status: str) -> int:
    return sum(record.status == status for record in records)


def _section(machine: Machine, drawn: Mapping[str, str]) -> dict[str, Any]:
    """Return the data of one device for the template."""
    records = in_order(machine.records.values())
    newest = machine.files[-1]
    return {
        "device": machine.device,
        "when": f"{newest.date[:10] or 'undated'}, commit {newest.commit[:10] or 'unknown'}",
        "repeated": machine.repeated,
        "reading": read_records(records),
        "pictures": [(title, _inline(svg)) for title, svg in drawn.items()],
        "ceilings": _ceilings(machine),
        "suites": _tables(records),
        "not_timed": _not_timed(records),
        "environments": [(results.path.name, _environment(results)) for results in machine.files],
        "clocks": _clocks(records),
    }


def _tables(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return for each suite its filled columns, and a block of lines for each case that could be timed."""
    suites: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        key = record.key
        case = f"{key.op}, {key.case}, {key.dtype}, {MODE_NAMES.get(key.mode, key.mode)}"
        suites.setdefault(key.suite, {}).setdefault(case, []).append(record)
    tables = []
    for suite, cases in suites.items():
        throughput = arithmetic([record for members in cases.values() for record in members])
        blocks = [(case, _lines(members, throughput)) for case, members in cases.items()]
        filled = {name for _, lines in blocks for line in lines for name, text in line["cells"].items() if text}
        columns = [name for _, lines in blocks for line in lines for name in line["cells"] if name in filled]
        tables.append({"suite": suite, "columns": list(dict.fromkeys(columns)), "cases": blocks})
    return tables


def _lines(records: Sequence[Record], throughput: Throughput) -> list[dict[str, Any]]:
    """Return the lines of a case; providers that this machine lacks are left to the list of those not timed."""
    ours = min((record.median for record in records if record.kind == OURS and record.median is not None), default=None)
    return [
        {
            "name": record.key.provider,
            "kind": record.kind,
            "cells": {} if record.median is None else _cells(record, record.median, ours, throughput),
            "why": f"{record.status}: {record.reason or 'no reason given'}" if record.median is None else "",
            "lost": record.status in LOST,
            "throttle": _throttle(record),
        }
        for record in records
        if record.status != "unavailable"
    ]


def _cells(record: Record, time: float, ours: float | None, throughput: Throughput) -> dict[str, str]:
    """Return the cells of a line: column -> text."""
    low, high, peak = (record.number(name) for name in ("p20_s", "p80_s", "peak_memory_bytes"))
    clock, energy = record.number("sm_clock_mhz"), record.number("energy_j")
    return {
        "median": seconds(time),
        "20 % to 80 %": f"{seconds(low)} – {seconds(high)}" if low is not None and high is not None else "",
        throughput.unit: number(throughput.of(record)),
        "GB/s": number(record.number("gbs")),
        "peak memory": "" if peak is None else size(peak),
        "error, tangent's": errors(record.info.get("error")),
        "allowed": errors(record.info.get("allowed_error")),
        "time / floor": "" if record.kind == FLOOR else number(record.number("ratio_to_floor")),
        "time / ours": "" if ours is None or record.kind == OURS else number(time / ours),
        "SM clock": "" if clock is None else f"{clock:.0f} MHz",
        "energy": "" if energy is None else f"{energy:.3g} J",
    }


def _throttle(record: Record) -> str:
    """Return in words why the clocks were held down; empty if they weren't, or if it is unknown."""
    reasons = record.info.get("throttle")
    if isinstance(reasons, str):
        return reasons
    return ", ".join(map(str, reasons)) if isinstance(reasons, list | tuple) else ""


def _not_timed(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return provider, status, reason and cases of all records without a time, those of ours first."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for record in records:
        if record.median is None:
            group = (record.kind, record.key.provider, record.status, record.reason or "no reason given")
            groups.setdefault(group, []).append(
                f"{record.key.op}, {record.key.case}, {record.key.dtype}, {record.key.mode}"
            )
    order = {kind: i for i, kind in enumerate((OURS, PEER, FLOOR))}
    return [
        {"provider": provider, "status": status, "reason": reason, "cases": cases}
        for (_, provider, status, reason), cases in sorted(groups.items(), key=lambda item: order[item[0][0]])
    ]


def _clocks(records: Iterable[Record]) -> str:
    """Say in a sentence how the clocks ran under load, and where they were throttled."""
    records = [record for record in records if record.median is not None]
    clocks = [clock for record in records if (clock := record.number("sm_clock_mhz")) is not None]
    if not clocks:
        return "Clocks, power and throttling: not measured."
    reasons = sorted({reason for record in records if (reason := _throttle(record))})
    throttled = sum(bool(_throttle(record)) for record in records)
    said = f"throttled in {throttled} runs ({'; '.join(reasons)})" if throttled else "never throttled"
    return f"SM clock under load {min(clocks):.0f} to {max(clocks):.0f} MHz in {len(clocks)} runs; {said}."


def _ceilings(machine: Machine) -> str:
    found, throughput = machine.ceilings, arithmetic(machine.records.values())
    said = []
    if "tflops" in found:
        said.append(f"{found['tflops'] * throughput.factor:,.4g} {throughput.unit} of a large matmul")
    if "gbs" in found:
        said.append(f"{found['gbs']:,.4g} GB/s of a copy")
    if not said:
        return "The ceilings of this device were not measured, so none is drawn."
    return f"Ceilings, measured on this device in the same run: {', '.join(said)}."


def _environment(results: Results) -> list[tuple[str, str]]:
    """Return machine_info and the rest of a file's description as a flat list."""
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
