"""What `make evidence` measured, in words and tables: docs/evidence/evidence.md, and the marked blocks of methods.md.

    python -m benchmarks.evidence_tables        # write both again from docs/evidence/summary.json

A summary is

    {"ring": {"settings": {...}, "references": {name: {metric: value}}, "methods": {name: METHOD}, "gates": [GATE]},
     "digits": {...}, "machine": {...}}

with METHOD = {"seeds": {seed: {"quality": {steps: {metric: value}}, "cost": {...}}}}: `cost` holds `seconds_per_step`,
`peak_mib`, `parameters` and `steps`, where they were measured. A dataset that was not measured is absent.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

Summary = Mapping[str, Any]
EVIDENCE, ARTICLE = ROOT / "docs" / "evidence", ROOT / "docs" / "methods.md"
STEPS = ("1", "2", "4", "8")
BLOCK = re.compile(r"(<!-- compare:begin ([\w ]+) -->\n)(.*?)(<!-- compare:end \2 -->)", re.DOTALL)
NOT_YET = "**Measured.** Not yet measured."
NO_TABLE = "Not yet measured: `make evidence` fills this block."
DATA = ("ring", "digits")
# The metric by which a data set ranks methods, and how it is written.
HEADLINE = {"ring": ("map_error", "map error", 3), "digits": ("frechet", "Fréchet distance", 1)}
TABLE_COLUMNS = {
    "ring": (("map_error", "map error", 3), ("sliced_wasserstein", "sliced W2", 3)),
    "digits": (("frechet", "Fréchet", 1),),
}
ONE_STEP_COLUMNS = {
    "ring": (),
    "digits": (
        ("accuracy", "accuracy", 3),
        ("c2st", "C2ST", 3),
        ("precision", "precision", 2),
        ("recall", "recall", 2),
        ("nearest_neighbour_ratio", "neighbour ratio", 2),
    ),
}


def main() -> None:
    """Write evidence.md and the article's blocks from the stored summary."""
    summary = read_summary()
    (EVIDENCE / "evidence.md").write_text(evidence_page(summary), encoding="utf-8")
    ARTICLE.write_text(fill_article(ARTICLE.read_text(encoding="utf-8"), summary), encoding="utf-8")


def read_summary(folder: Path = EVIDENCE) -> dict[str, Any]:
    """The stored summary; empty where nothing was measured yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fill_article(text: str, summary: Summary) -> str:
    """The article with every marked block written anew; everything else stays as it is.

    A block names the methods that it is about, or `table` for the closing table.
    """

    def block(match: re.Match[str]) -> str:
        names = match[2].split()
        content = closing_tables(summary) if names == ["table"] else measured(names, summary)
        return f"{match[1]}{content}\n{match[4]}"

    return BLOCK.sub(block, text)


def measured(names: Sequence[str], summary: Summary) -> str:
    """What was measured of some methods: numbers, and the pros and cons that follow from them by rule."""
    lines = [
        line
        for data in DATA
        for name in names
        if (line := measured_line(name, data, summary.get(data, {}).get("methods", {})))
    ]
    return "\n".join(["**Measured.**", *(f"- {line}" for line in lines)]) if lines else NOT_YET


def measured_line(name: str, data: str, methods: Mapping[str, Any]) -> str:
    """One method on one data set, in a sentence; empty where it was not measured."""
    if name not in methods:
        return ""
    metric, words, digits = HEADLINE[data]
    values = " / ".join(spread(methods[name], steps, metric, digits) for steps in STEPS)
    pros, cons = verdicts(name, data, methods)
    found = [f"{title}: {', '.join(items)}." for title, items in (("Pros", pros), ("Cons", cons)) if items]
    return " ".join([f"{name}, {data}: {words} {values} at {' / '.join(STEPS)} steps.", *found])


def verdicts(name: str, data: str, methods: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The measured pros and cons of a method among the others, by fixed rules."""
    metric = HEADLINE[data][0]
    one, eight = (mean(methods[name], steps, metric) for steps in ("1", "8"))
    pros, cons = [], []
    ranking = sorted(methods, key=lambda other: mean(methods[other], "1", metric))
    rank, third = ranking.index(name) + 1, max(1, len(ranking) // 3)
    place = f"rank {rank} of {len(ranking)} in one step"
    if rank <= third:
        pros.append(place)
    elif rank > len(ranking) - third:
        cons.append(place)
    if eight < 0.8 * one:
        pros.append(f"eight steps divide the error by {one / eight:.1f}")
    elif eight > 1.2 * one:
        cons.append(f"eight steps are worse than one, by {eight / one:.1f} times")
    values = seed_values(methods[name], "1", metric)
    if len(values) > 1 and statistics.stdev(values) > 0.2 * statistics.mean(values):
        cons.append("varies with the seed")
    price, base = cost(methods[name]), cost(methods.get("flow_matching", {"seeds": {}}))
    if price and base and name != "flow_matching":
        ratio = price / base
        (pros if ratio < 1.5 else cons).append(f"a training step costs {ratio:.1f} times flow matching's")
    return pros, cons


def closing_tables(summary: Summary) -> str:
    """A table for each measured data set, best method first."""
    parts = [results_table(data, summary[data]) for data in DATA if summary.get(data, {}).get("methods")]
    return "\n\n".join(parts) if parts else NO_TABLE


def results_table(data: str, result: Mapping[str, Any]) -> str:
    """Methods by their one-step error, then the references, as a GitHub table."""
    methods = result["methods"]
    metric = HEADLINE[data][0]
    columns = [
        (key, f"{words}, {steps}", digits, steps) for key, words, digits in TABLE_COLUMNS[data] for steps in STEPS
    ]
    columns += [(key, f"{words}, 1", digits, "1") for key, words, digits in ONE_STEP_COLUMNS[data]]
    lines = [[data, *(heading for _, heading, _, _ in columns), "ms a training step"]]
    lines.append(["---"] * len(lines[0]))
    for name in sorted(methods, key=lambda name: mean(methods[name], "1", metric)):
        cells = [spread(methods[name], steps, key, digits) for key, _, digits, steps in columns]
        seconds = cost(methods[name])
        lines.append([name.replace("_", " "), *cells, f"{1000 * seconds:.1f}" if seconds else "-"])
    for name, row in result.get("references", {}).items():
        cells = [fixed(row[key], digits) if key in row and steps == "1" else "" for key, _, digits, steps in columns]
        lines.append([f"*{name.replace('_', ' ')}*", *cells, ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evidence_page(summary: Summary) -> str:
    """docs/evidence/evidence.md: settings, gates, tables, and what they were measured on."""
    parts = ["# Evidence", "Written by `make evidence`; do not edit. Mean over the seeds, ± their standard deviation."]
    if not summary:
        parts.append("Not yet measured.")
    for data in (data for data in DATA if data in summary):
        result = summary[data]
        parts.append(f"## {data.capitalize()}")
        parts.append(describe(result.get("settings", {})))
        if result.get("gates"):
            parts.append("\n".join(gate_line(gate) for gate in result["gates"]))
        if result.get("methods"):
            parts.append(results_table(data, result))
        parts += [f"![{title}]({file})" for title, file in result.get("plots", {}).items()]
    if "machine" in summary:
        parts += ["## Measured on", describe(summary["machine"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(settings: Mapping[str, Any]) -> str:
    """Names and values in a line."""
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)


def gate_line(gate: Mapping[str, Any]) -> str:
    """A gate's verdict, in a list item."""
    return f"- **{'pass' if gate['passed'] else 'FAIL'}**: {gate['gate']} ({gate['found']})"


def seed_values(method: Mapping[str, Any], steps: str, metric: str) -> list[float]:
    """A metric of each seed that has it."""
    rows: Iterable[Mapping[str, Any]] = (seed.get("quality", {}).get(steps, {}) for seed in method["seeds"].values())
    return [float(row[metric]) for row in rows if metric in row]


def mean(method: Mapping[str, Any], steps: str, metric: str) -> float:
    """A metric's mean over the seeds; infinite where it is missing, so that it sorts last."""
    values = seed_values(method, steps, metric)
    return statistics.mean(values) if values else float("inf")


def cost(method: Mapping[str, Any]) -> float:
    """Median seconds of a training step over the seeds; 0 where it is missing."""
    values = [seed["cost"]["seconds_per_step"] for seed in method["seeds"].values() if seed.get("cost")]
    return statistics.median(values) if values else 0.0


def spread(method: Mapping[str, Any], steps: str, metric: str, digits: int) -> str:
    """Mean ± standard deviation, as it stands in a table."""
    values = seed_values(method, steps, metric)
    if not values:
        return "-"
    middle = fixed(statistics.mean(values), digits)
    return f"{middle} ± {fixed(statistics.stdev(values), digits)}" if len(values) > 1 else middle


def fixed(value: float, digits: int) -> str:
    """A number with so many digits after the point."""
    return f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
