"""Write the report of a comparison as one HTML file: a table, pros and cons of each method, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fastdistill.eval import comparison_figures as figures
from fastdistill.eval.budget import distinct_share, exponent
from fastdistill.eval.evaluate import format_value, heading, row_name
from fastdistill.eval.judges import headline_of
from fastdistill.eval.report import inline
from fastdistill.train import sampling
from fastdistill.train.config import flat
from fastdistill.train.files import replacing, write_text
from fastdistill.train.methods import METHODS

NUMBERS = tuple(map(str, sampling.NUMBERS))
CONTROL = "flow_matching"


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    grids: Mapping[str, Mapping[str, Tensor]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write the report, and its figures as PNG files beside it.

    Args:
        path: path of the HTML file.
        summary: what `fastdistill.compare` writes as summary.json; every number in the report comes from it.
        grids: samples of each method by number of steps, all from the same noise.
        curves: points of each method, as `fastdistill.eval.records.read_metrics` returns them.
    """
    first, second = headline(summary)
    names = {"quality": heading(first), "second": heading(second)}
    drawn = {
        "quality": figures.draw_quality(ranked(summary), first, names["quality"], summary["references"]),
        "cost": figures.draw_cost(ranked(summary), first, names["quality"]),
        "samples": figures.draw_samples({name: grids[name] for name in ranked(summary)}),
        "curves": figures.draw_curves({name: curves[name] for name in ranked(summary)}),
    }
    for name, png in drawn.items():
        with replacing(path.with_name(f"{name}.png")) as temporary:
            temporary.write_bytes(png)
    page = Environment(
        loader=PackageLoader("fastdistill.eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = page.get_template("comparison.html.jinja").render(
        summary=summary,
        caption=summary.get("caption", ""),
        main=names,
        table=table(summary),
        budget_heads=BUDGET,
        verdicts=verdicts(summary),
        recipes={name: recipe(row["settings"]) for name, row in summary["methods"].items()},
        failed={name: row["failed"] for name, row in summary["methods"].items() if row["failed"]},
        references=[
            (row_name("", name), [format_value(metric, row[metric]) for metric in (first, second)])
            for name, row in summary["references"].items()
        ],
        **{f"{name}_png": inline(png) for name, png in drawn.items()},
    )
    write_text(path, html)


def headline(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the two metrics that the report shows.

    An old summary doesn't name them; then they are those of the judge of its data set.
    """
    first, second = summary.get("headline") or headline_of(summary["data"])
    return first, second


def ranked(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the methods that were measured, the best at one step first."""
    first = headline(summary)[0]
    done = {name: row for name, row in summary["methods"].items() if not row["failed"]}
    return dict(sorted(done.items(), key=lambda item: item[1]["quality"]["1"][first]["mean"]))


def table(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a method, and its cells as text, the best at one step first."""
    first, second = headline(summary)
    rows = []
    for name, row in ranked(summary).items():
        cells = [_cell(first, row["quality"].get(number, {}).get(first)) for number in NUMBERS]
        cells += [_cell(second, row["quality"]["1"][second])]
        cells += [f"{1000 * row['cost']['seconds_per_step']['mean']:.1f}"]
        cells += [f"{row['cost']['peak_bytes']['mean'] / 2**20:.2f}"]
        cells += ["yes" if row["settings"]["teacher"] else "", *budget_cells(row), row["settings"]["tangent"]]
        rows.append((name, cells))
    return rows


BUDGET = ("s != t", "p", "teacher's steps", "pairs", "critic updates", "evaluations, 10^6", "seconds")


def budget_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of `BUDGET`, a result's whole cost; brackets hold the part spent before the first step."""
    whole = {name: spread["mean"] for name, spread in row["whole"].items()}
    cells = [distinct_share(row["settings"]), exponent(row["settings"])]
    cells += [f"{whole[name]:,.0f}" if whole[name] else "" for name in ("teacher_steps", "pairs", "critic_updates")]
    for name, scale, digits in (("evaluations", 1e-6, 2), ("seconds", 1.0, 0)):
        before = f" ({scale * whole[f'prior_{name}']:.{digits}f})" if whole[f"prior_{name}"] else ""
        cells.append(f"{scale * whole[name]:.{digits}f}{before}")
    return cells


def describe(summary: Mapping[str, Any]) -> str:
    """Return the same table as text."""
    first, second = headline(summary)
    heads = [f"{heading(first)}@{number}" for number in NUMBERS]
    heads += [f"{heading(second)}@1", "ms/step", "MiB", "teacher", *BUDGET]
    lines = [["", *heads]] + [[name, *cells[: len(heads)]] for name, cells in table(summary)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    failed = [f"{name}: {row['failed']}" for name, row in summary["methods"].items() if row["failed"]]
    return "\n".join(text + failed)


def verdicts(summary: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the pros and cons of each method, in words that follow from the numbers alone.

    Quality is ranked among all methods. Cost is compared with that of flow matching, if it took part.
    """
    first = headline(summary)[0]
    field = ranked(summary)
    found: dict[str, dict[str, list[str]]] = {}
    control = field.get(CONTROL)
    for name, row in field.items():
        pros, cons = [], []
        for number in row["quality"]:
            values = sorted(
                other["quality"][number][first]["mean"] for other in field.values() if number in other["quality"]
            )
            value, steps = row["quality"][number][first]["mean"], f"{number} step{'s' * (number != '1')}"
            if value == values[0]:
                pros.append(f"best at {steps}")
            elif value <= values[len(values) // 4]:
                pros.append(f"in the best quarter at {steps}")
            elif len(values) > 3 and value > values[-1 - len(values) // 4]:
                cons.append(f"in the worst quarter at {steps}")
        one, *more = (spread[first]["mean"] for spread in row["quality"].values())
        if more:
            last = f"{list(row['quality'])[-1]} steps give {more[-1] / one:.2f} times the {heading(first)} of one"
            (pros if more[-1] < 0.9 * one else cons).append(last)
        else:
            cons.append("learnt one step alone")
        spread = row["quality"]["1"][first]
        if len(spread["values"]) > 1 and spread["std"] > 0.2 * spread["mean"]:
            cons.append(f"seeds differ by {spread['std'] / spread['mean']:.0%}")
        if control is not None and name != CONTROL:
            time, memory = (
                row["cost"][cost]["mean"] / control["cost"][cost]["mean"] for cost in ("seconds_per_step", "peak_bytes")
            )
            (pros if time < 1.3 else cons).append(f"{time:.1f} times flow matching's time a step")
            (pros if memory < 1.3 else cons).append(f"{memory:.1f} times its memory")
        cons += ["needs a teacher"] * row["settings"]["teacher"]
        cons += ["trains a second network"] * row["settings"]["second_network"]
        found[name] = {"pros": pros, "cons": cons}
    return found


def recipe(settings: Mapping[str, Any]) -> str:
    """Describe a method's settings in a line: those that differ from its defaults, the learning rate and the path."""
    given = flat(settings["method"])
    name = given.pop("name")
    usual = flat(METHODS[name](name=name).model_dump(mode="json"))
    changed = [f"{key} {_value(value)}" for key, value in given.items() if usual.get(key) != value]
    return ", ".join([*changed, f"learning rate {settings['learning_rate']:g}", f"path {settings['path']}"])


def _value(value: Any) -> str:
    """Return a setting as one word, or a list as one word for each number."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return " ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(metric: str, spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "-"
    text = format_value(metric, spread["mean"])
    return text if len(spread["values"]) == 1 else f"{text} ± {format_value(metric, spread['std'])}"
