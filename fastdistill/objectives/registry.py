"""Find all methods by name, each by being there: each file of this package but the helpers holds what it is."""

from __future__ import annotations

from collections.abc import Mapping

from fastdistill.lookup import discover
from fastdistill.objectives.objective import Objective, order

# Every other module here is a method.
HELPERS = frozenset({
    "adapters", "batch_checks", "continuous", "critic", "identities", "metric", "objective", "registry", "rows",
    "scores", "settings", "solvers", "velocity",
})  # fmt: skip


def collect(found: Mapping[str, Objective | tuple[Objective, ...]]) -> dict[str, Objective]:
    """Return methods by name, in the order in which they are listed, from what the files hold as METHOD.

    Raises:
        ImportError: one of them is no row, has no settings, or has another's name or one that its file's doesn't begin.
    """
    rows: dict[str, Objective] = {}
    for name, held in found.items():
        for row in held if isinstance(held, tuple) else (held,):
            if not isinstance(row, Objective) or row.settings is None:
                raise ImportError(
                    f"fastdistill.objectives.{name}: expected METHOD to be an Objective with settings, got {row!r:.80}"
                )
            if not row.name.startswith(name) or row.name in rows:
                raise ImportError(
                    f"fastdistill.objectives.{name}: expected METHOD of a function {name}, got {row.name}"
                )
            rows[row.name] = row
    return {row.name: row for row in sorted(rows.values(), key=order)}


METHODS: dict[str, Objective] = collect(discover(__package__ or "", "METHOD", HELPERS))
# Those with a function of their own.
OBJECTIVES: dict[str, Objective] = {name: row for name, row in METHODS.items() if row.function.__name__ == name}


def get(name: str) -> Objective:
    """Return the objective called `name`; the ValueError of another lists the names there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]
