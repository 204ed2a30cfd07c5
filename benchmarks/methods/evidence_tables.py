"""Write what `make evidence` measured, in words and tables: evidence.md, and the marked blocks of methods.md.

    python -m fastdistill.benchmarks.methods.evidence_tables        # write both again from docs/evidence/summary.json

A summary is {"ring": COMPARISON, "digits": COMPARISON}, each as `fastdistill.compare` returns it, with `gates`,
`mutants` and `plots` added. A data set that was not measured is absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.benchmarks.run.environment import ROOT
from fastdistill.eval import comparison

Summary = Mapping[str, Any]
EVIDENCE, ARTICLE = ROOT / "docs" / "evidence", ROOT / "docs" / "methods.md"
STEPS = comparison.NUMBERS
BLOCK = re.compile(r"(<!-- compare:begin ([\w ]+) -->\n)(.*?)(<!-- compare:end \2 -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure:begin (\w+) -->\n)(.*?)(<!-- figure:end \2 -->)", re.DOTALL)
FIGURES = {
    "reflow": "Trajectories before and after ReFlow, and where one Euler step ends",
    "ring_methods": "The ring by each method in 1, 2, 4 and 8 steps, in the colours of where the exact flow ends",
    "digits_methods": "Digits by each method in 1, 2, 4 and 8 steps, from the same noise",
}
NOT_DRAWN = "*Not yet drawn: `make evidence` does.*"
NOT_YET = "**Measured.** Not yet measured."
NO_TABLE = "Not yet measured: `make evidence` fills this block."
DATA = ("ring", "digits")
# A table of results must say how its recipes were found.
PROTOCOL = {
    "ring": "Tuning: the recipes of MeanFlow and improved MeanFlow (p and the share of s != t) on seeds 7 and 8, which "
    "aren't reported; the others on seed 0, which is. Steps, batch, network, optimiser and rate are the same for all "
    "but where a recipe names its own. SW2 and map error are to the exact map by the method's own sampler, from the "
    "same noise.",
    "digits": "Tuning: ECT, IMM, Shortcut and TVM on seeds 7 and 8, which aren't reported; no other. Steps, batch, "
    "network, optimiser and rate are the same for all but where a recipe names its own. All rows, references too, are "
    "compared with the 1,501 training digits; where more samples were drawn, it is the mean over such sets.",
}
# For each data set: the metric that ranks methods, and the metrics that a table shows at every number of steps and at
# one step.
Column = tuple[str, str, int]  # The metric, its name, and the digits after the point.
# Map errors are shown for one step only, to keep the table narrow; summary.json has those of all.
HEADLINE: dict[str, Column] = {"ring": ("sliced_wasserstein", "SW2", 3), "digits": ("frechet", "Fréchet distance", 1)}
EVERY: dict[str, list[Column]] = {
    "ring": [("sliced_wasserstein", "SW2", 3)],
    "digits": [("frechet", "Fréchet", 1)],
}
ONE_STEP: dict[str, list[Column]] = {
    "ring": [("map_error", "map error", 3)],
    "digits": [
        ("accuracy", "accuracy", 3),
        ("c2st", "C2ST", 3),
        ("precision", "precision", 2),
        ("recall", "recall", 2),
        ("nearest_neighbour_ratio", "neighbour ratio", 2),
    ],
}


def main() -> None:
    """Write evidence.md and the article's blocks from the stored summary."""
    summary = read_summary()
    (EVIDENCE / "evidence.md").write_text(evidence_page(summary), encoding="utf-8")
    ARTICLE.write_text(fill_article(ARTICLE.read_text(encoding="utf-8"), summary), encoding="utf-8")


def read_summary(folder: Path = EVIDENCE) -> dict[str, Any]:
    """Load the stored summary; it is empty where nothing was measured yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fill_article(text: str, summary: Summary, figures: Path = ARTICLE.parent / "figures") -> str:
    """Write every marked block of the article anew, and leave everything else as it is.

    A block names the methods that it is about, or `table` for the closing table. It may also name a figure, which is
    shown once it is drawn.
    """

    def block(match: re.Match[str]) -> str:
        names = match[2].split()
        content = closing_tables(summary) if names == ["table"] else measured(names, summary)
        return f"{match[1]}{content}\n{match[4]}"

    def figure(match: re.Match[str]) -> str:
        name = match[2]
        drawn = (figures / f"{name}.png").is_file()
        content = f"![{FIGURES[name]}](figures/{name}.png)" if drawn else NOT_DRAWN
        return f"{match[1]}{content}\n{match[4]}"

    return FIGURE.sub(figure, BLOCK.sub(block, text))


def measured(names: Sequence[str], summary: Summary) -> str:
    """Return what was measured of some methods: numbers, and the pros and cons that follow from them by rule."""
    lines = [
        measured_line(name, data, summary[data])
        for data in DATA
        for name in names
        if name in comparison.ranked(summary.get(data, {"data": data, "methods": {}}))
    ]
    return "\n".join(["**Measured.**", *(f"- {line}" for line in lines)]) if lines else NOT_YET


def measured_line(name: str, data: str, result: Mapping[str, Any]) -> str:
    """Describe one method on one data set, in a few sentences."""
    metric, words, digits = HEADLINE[data]
    values = " / ".join(cell(result["methods"][name], steps, metric, digits) for steps in STEPS)
    said = comparison.verdicts(result)[name]
    found = [f"{title}: {', '.join(said[key])}." for title, key in (("For", "pros"), ("Against", "cons")) if said[key]]
    row = result["methods"][name]
    # It is the straightness of the flow by which the method samples.
    if row["settings"]["identity"] == "fm" and "straightness" in row:
        found.insert(0, f"Straightness, averaged over elements: {row['straightness']['mean']:.4f}.")
    return " ".join([f"`{name}`, {data}: {words} {values} at {' / '.join(STEPS)} steps.", *found])


def closing_tables(summary: Summary) -> str:
    """Return the tables of each measured data set, best method first."""
    parts = [part for data in DATA if data in summary for part in tables_of(data, summary[data])]
    return "\n\n".join(parts) if parts else NO_TABLE


def tables_of(data: str, result: Mapping[str, Any]) -> list[str]:
    """Return the paragraph that explains the numbers of a data set and their tuning, then its two tables."""
    if "samples" not in result["budget"]:  # The summary was made before the whole budget was measured.
        return [results_table(data, result)]
    words = f"{PROTOCOL[data]} Every number is one of {result['budget']['samples']:,} samples, references' too."
    return [words, results_table(data, result), budget_table(data, result)]


def results_table(data: str, result: Mapping[str, Any]) -> str:
    """Return a GitHub table of the methods by their one-step error, then of the references."""
    every = EVERY[data]
    columns = [(metric, f"{words}, {steps}", digits, steps) for metric, words, digits in every for steps in STEPS]
    columns += [(metric, f"{words}, 1", digits, "1") for metric, words, digits in ONE_STEP[data]]
    lines = [[data, *(heading for _, heading, _, _ in columns), "ms a training step", "peak MiB"]]
    lines.append(["---", *["--:"] * (len(lines[0]) - 1)])
    for name, row in comparison.ranked(result).items():
        cells = [cell(row, steps, metric, digits) for metric, _, digits, steps in columns]
        price = row["cost"]
        cells += [f"{1000 * price['seconds_per_step']['mean']:.1f}", f"{price['peak_bytes']['mean'] / 2**20:.2f}"]
        lines.append([name, *cells])
    for name, rows in by_steps(result.get("references", {})).items():
        found = [(rows.get(steps, {}).get(metric), digits) for metric, _, digits, steps in columns]
        cells = ["" if value is None else f"{value:.{digits}f}" for value, digits in found]
        lines.append([f"*{name.replace('_', ' ')}*", *cells, "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_steps(references: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group the references by name and number of steps; `euler 4` has four steps, and a name without a number one."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in references.items():
        match = re.fullmatch(r"(.+) (\d+)", name)
        found.setdefault(match[1] if match else name, {})[match[2] if match else "1"] = row
    return found


def budget_table(data: str, result: Mapping[str, Any]) -> str:
    """Return a table of each method's whole cost, with its share of s != t and its exponent, in the same order."""
    lines = [[f"{data}: the whole budget", "learns from", "steps", *comparison.BUDGET]]
    lines.append(["---", "---", *["--:"] * (len(lines[0]) - 2)])
    for name, row in comparison.ranked(result).items():
        source = "teacher" if row["settings"]["teacher"] else "data"
        steps = f"{row['whole']['steps']['mean']:,.0f}"
        lines.append([name, source, steps, *comparison.budget_cells(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evidence_page(summary: Summary) -> str:
    """Return docs/evidence/evidence.md: budget, gates, tables, plots, and the machine they were measured on."""
    parts = ["# Evidence", "Written by `make evidence`; do not edit. Mean over the seeds ± their standard deviation."]
    if not summary:
        parts.append("Not yet measured.")
    for data in (data for data in DATA if data in summary):
        result = summary[data]
        parts += [f"## {data.capitalize()}", describe(result["budget"])]
        parts.append("\n".join(gate_line(gate) for gate in result.get("gates", [])))
        parts += tables_of(data, result)
        failed = {name: row["failed"] for name, row in result["methods"].items() if row["failed"]}
        parts.append("\n".join(f"- {name} failed: {why}" for name, why in failed.items()))
        parts += [f"![{title}]({file})" for title, file in result.get("plots", {}).items()]
        parts.append(f"Measured on: {describe(result['environment'])}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(settings: Mapping[str, Any]) -> str:
    """Return names and values in a line."""
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def gate_line(gate: Mapping[str, Any]) -> str:
    """Return a gate's verdict, as an item of a list."""
    return f"- **{'pass' if gate['passed'] else 'FAIL'}**: {gate['gate']} ({gate['found']})"


def cell(row: Mapping[str, Any], steps: str, metric: str, digits: int) -> str:
    """Return mean ± standard deviation of a metric, or a dash where it was not measured."""
    spread = row["quality"].get(steps, {}).get(metric)
    if spread is None:
        return "-"
    middle = f"{spread['mean']:.{digits}f}"
    return f"{middle} ± {spread['std']:.{digits}f}" if len(spread["values"]) > 1 else middle


if __name__ == "__main__":
    main()
