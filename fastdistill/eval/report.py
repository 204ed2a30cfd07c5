"""Write the demo's report, one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fastdistill.eval import figures
from fastdistill.eval.evaluate import HEADINGS, format_value, row_name
from fastdistill.train.files import replacing, write_text

Samples = Mapping[str, Mapping[str, Tensor]]  # {"teacher" | "meanflow" | "real": {steps or "": images}}


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    samples: Samples,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write the report, and the grid that leads it as `grid.png` beside it.

    Args:
        path: path of the HTML file.
        summary: what `fastdistill.demo` writes as summary.json; every number in the report comes from it.
        samples: images (N, 1, 8, 8), N a multiple of ten, every class in turn, all from the same noise.
        curves: {"teacher": ..., "meanflow": ...}, as `fastdistill.eval.records.read_metrics` returns them.
    """
    frechet = {run: {name: row["frechet"] for name, row in summary[run].items()} for run in ("teacher", "meanflow")}
    known = {row_name("", name): summary["references"][name]["frechet"] for name in ("bootstrap", "held_out", "noise")}
    headline = figures.draw_headline(samples, frechet)
    with replacing(path.with_name("grid.png")) as temporary:
        temporary.write_bytes(headline)
    page = Environment(
        loader=PackageLoader("fastdistill.eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = page.get_template("report.html.jinja").render(
        summary=summary,
        reading=read_numbers(summary),
        headline=inline(headline),
        distances=inline(figures.draw_distances(frechet, known)),
        curves=inline(figures.draw_curves(curves)),
        panels=_panels(samples, summary),
        table=_table(summary),
    )
    write_text(path, html)


def read_numbers(summary: Mapping[str, Any]) -> list[str]:
    """Summarise the numbers in two sentences that follow from them, whichever way they came out."""
    teacher, references, one = summary["teacher"], summary["references"], summary["meanflow"]["1"]
    enough = [int(steps) for steps, row in teacher.items() if row["frechet"] <= one["frechet"]]
    if enough:
        against = f"its teacher comes as close to the real digits in {_steps(min(enough))}"
    else:
        against = f"its teacher doesn't come as close in {_steps(max(map(int, teacher)))}"
    floors = {name: f"{references[name]['frechet']:.1f}" for name in ("bootstrap", "held_out", "class_gaussian")}
    copies = summary["checks"]["meanflow"]["1"]["nearest_neighbour_ratio"]
    reached = (
        f"In one step MeanFlow reaches a Fréchet distance of {one['frechet']:.1f}, with {one['accuracy']:.1%} of its "
        f"digits recognised as the class that was asked for; {against}."
    )
    floor = (
        f"Zero is out of reach: real digits drawn again at random score {floors['bootstrap']}, unseen ones "
        f"{floors['held_out']}, one Gaussian a class {floors['class_gaussian']}; below these a distance says nothing "
        f"more about quality, so look at the pictures, and at the nearest-neighbour ratio of {copies:.2f} (1: as far "
        f"from the training digits as unseen ones are, 0: copies of them)."
    )
    return [reached, floor]


def _steps(number: int) -> str:
    return "one step" if number == 1 else f"{number} steps"


def _panels(samples: Samples, summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return each network's name and its grids (image, title, numbers), with the real digits at the end."""
    groups = []
    for group in ("teacher", "meanflow"):
        panels = []
        for steps, images in samples[group].items():
            row = summary[group][steps]
            numbers = f"Fréchet {row['frechet']:.1f}, {row['accuracy']:.1%} recognised"
            panels.append((inline(figures.draw_panel(images)), _steps(int(steps)), numbers))
        groups.append((figures.NAMES[group], panels))
    groups[-1][1].append((inline(figures.draw_panel(samples["real"][""])), "real digits", "for comparison"))
    return groups


def _table(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headings and, for each group, the names and formatted cells of its rows."""
    checks = {"precision": "precision", "recall": "recall", "nearest_neighbour_ratio": "neighbour ratio"}
    groups = []
    for group in ("teacher", "meanflow", "references"):
        rows = []
        for name, row in summary[group].items():
            check: Mapping[str, float] = summary["checks"].get(group, {}).get(name, {})
            cells = [format_value(metric, row[metric]) for metric in row]
            cells += [f"{check[metric]:.2f}" if check else "" for metric in checks]
            rows.append((_steps(int(name)) if name.isdigit() else row_name(group, name), cells))
        groups.append((figures.NAMES.get(group, "References"), rows))
    headings = [HEADINGS[metric] for metric in next(iter(summary["teacher"].values()))]
    return {"headings": [*headings, *checks.values()], "groups": groups}


def inline(png: bytes) -> str:
    """Return a PNG as a data URL for a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
