"""Explain a method, from the registry of objectives and the trainer's settings: `fastdistill explain [METHOD]`."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from fastdistill.objectives import Objective
from fastdistill.objectives.metric import WEIGHTS
from fastdistill.objectives.settings import MethodSettings, field_of
from fastdistill.samplers import PARAMETERS, SPECS, Sampler
from fastdistill.settings import ConfigError, nearest
from fastdistill.train.config import flat, read_yaml
from fastdistill.train.load import SHIPPED
from fastdistill.train.methods import METHODS

WIDTH = 100
NEEDED = {
    "teacher": "a teacher: a finished run, as --teacher RUN",
    "weak_teacher": "a weak teacher: a worse run, as --weak-teacher RUN",
    "fake": "a second network, the score of its own samples, which the trainer keeps",
    "score_gradient": "a second network, the score of its own samples, which the trainer keeps",
}


def explain(name: str | None = None) -> str:
    """Explain one method, or list all of them in a table.

    Args:
        name: a key of `fastdistill.train.methods.METHODS`; None: the table.

    Raises:
        ConfigError: an unknown name; it suggests the nearest one.
    """
    if name is None:
        return table()
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}; {nearest(name, METHODS)}")
    method = METHODS[name]
    objective = method.objective()
    lines = {
        "formula": objective.formula,
        "identity": objective.identity,
        "tangent": objective.tangent,
        "times": ", ".join(objective.times),
        "reduction": objective.reduction,
        "path": paths(objective),
        "needs": needs(method, objective),
        "takes": ", ".join(sorted(objective.takes)),
        "guidance": guidance(method),
        **({"weight": weights()} if "weight" in fields_of(method) else {}),
        "sampler": f"{objective.sampler}; its network serves {', '.join(serves(method))}",
        "defaults": ", ".join(f"{key}={value}" for key, value in defaults(method).items()),
        "recipe": f"on the ring: {ring_method(name)}",
        **({"recipes": recipes(method)} if method.presets else {}),
        "sources": "; ".join(objective.sources),
        "code": f"{objective.function.__module__}.{objective.function.__name__}",
        "try": f"fastdistill train ring --method.name {name}"
        + " --teacher runs/ring-flow" * (method.needs_teacher() or "teacher" in ring_recipe(name)),
    }
    head = f"{name}: {summary_of(method)}"
    return "\n".join([*textwrap.wrap(head, WIDTH), "", *(_entry(key, str(value)) for key, value in lines.items())])


def table() -> str:
    """Return a line for each method (its identity, times, needs and sampler), and one for each sampler."""
    rows = [["method", "identity", "times", "needs", "sampler", "networks serve"]]
    for name, method in METHODS.items():
        objective = method.objective()
        needed = [need for need in ("teacher", "second network", "pairs") if need in _short_needs(method)]
        rows.append(
            [name, objective.identity, ", ".join(objective.times), ", ".join(needed) or "-", objective.sampler,
             ", ".join(method.learns)]
        )  # fmt: skip
    return "\n".join([*_aligned(rows), "", *samplers(), "", "fastdistill explain METHOD tells all about one."])


def samplers() -> list[str]:
    """Return a line for each sampler: what a network must have learnt, its cost, its noise and its parameters."""
    rows = [["sampler", "needs one of", "evaluations a step", "fresh noise", "parameters"]]
    for name, spec in SPECS.items():
        cost = "its own choice" if spec.evaluations is None else str(spec.evaluations)
        noise = ("yes" if spec.renoises else "no") if isinstance(spec.renoises, bool) else "by its parameters"
        rows.append([name, ", ".join(spec.needs), cost, noise, _parameters(spec)])
    return _aligned(rows)


def _parameters(spec: Sampler) -> str:
    found = [f"{name} {of.low:g} to {of.high:g}: {of.help}" for name, of in spec.parameters.items()]
    return "; ".join(found) or "-"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def fields_of(method: type[MethodSettings]) -> list[str]:
    """Return the names of the settings of a method."""
    return [field.name for field in dataclasses.fields(method)]


def needs(method: type[MethodSettings], objective: Objective) -> str:
    """Say what must be there before training, in words."""
    found = [NEEDED.get(need, need) for need in sorted(objective.needs)]
    if method.has_critic and "teacher" not in objective.needs:
        found.append(NEEDED["teacher"])
    if method.makes_pairs:
        found.append(f"{NEEDED['teacher']}, whose flow makes the pairs")
    if "teacher" in objective.takes and not method.needs_teacher():
        found.append("nothing; with --teacher RUN it follows the teacher's velocity instead of the data's")
    return "; ".join(found) or "nothing"


def guidance(method: type[MethodSettings]) -> str:
    """Say where guidance comes in, in words."""
    if "guidance" in fields_of(method):
        return "learnt: inside the velocity that it follows, as method.guidance"
    if method.guides_maps or set(method.learns) == {"velocity"}:
        what = "jumps" if method.guides_maps else "velocity"
        return (
            f"of samples, by two evaluations of the {what}, u_null + scale (u_y - u_null): method.sample_guidance or "
            f"--guidance, for a run with data.label_dropout"
        )
    return "none"


def weights() -> str:
    """Name the weights of the times that can be chosen by name, in words."""
    return "; ".join(f"{name} = {meaning}" for name, meaning in WEIGHTS.items())


def recipes(method: type[MethodSettings]) -> str:
    """Name the settings that method.recipe fills in by name, in words."""
    named = [
        f"{name}: {', '.join(f'{key}={value}' for key, value in flat(fields).items())}"
        for name, fields in method.presets.items()
    ]
    return f"by method.recipe: {'; '.join(named)}"


def paths(objective: Objective) -> str:
    """Name the paths that it fits, in words."""
    if objective.paths is None:
        return "any"
    anywhere = "" if objective.anywhere is None else "; any with {}={}".format(*objective.anywhere)
    return ", ".join(sorted(objective.paths)) + anywhere


def ring_recipe(name: str) -> dict[str, Any]:
    """Return what the shipped ring changes for this method; where it names a teacher, training there needs one."""
    return METHODS[name].row.recipes.get("ring", {})


def ring_method(name: str) -> str:
    """Return the settings of the method in that recipe, which take the place of its defaults."""
    shipped = read_yaml(SHIPPED / "ring.yaml")["method"]
    changed = flat(shipped if shipped["name"] == name else ring_recipe(name).get("method", {}))
    return ", ".join(f"{key}={value}" for key, value in changed.items() if key != "name") or "the defaults"


def serves(method: type[MethodSettings]) -> list[str]:
    """Return the samplers that a network of this method is good for."""
    return [name for name, spec in SPECS.items() if spec.serves(method.learns)]


def defaults(method: type[MethodSettings]) -> dict[str, Any]:
    """Return the trainer's settings of a method that aren't off by default, by dotted name."""
    values = flat(METHODS[method.row.name]().model_dump(mode="json"))
    shared = {"name", "sampler", "sample_guidance", *map(field_of, PARAMETERS)}
    return {name: value for name, value in values.items() if value is not None and name not in shared}


def summary_of(method: type[MethodSettings]) -> str:
    """Return what a method learns, in one line."""
    return method.row.summary.partition(": ")[2]


def _short_needs(method: type[MethodSettings]) -> set[str]:
    found = {"teacher"} if method.needs_teacher() else set()
    return found | ({"second network"} if method.has_critic else set()) | ({"pairs"} if method.makes_pairs else set())


def _entry(key: str, value: str) -> str:
    indent = " " * 12
    return textwrap.fill(f"{key:<12}{value}", WIDTH, subsequent_indent=indent, break_long_words=False)
