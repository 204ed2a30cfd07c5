"""Say of a method, in its file, what it regresses, what it needs, its formula, reductions and sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdistill.paths import PATHS

# Keywords that mean the same in all methods: everything else that a function takes is an option of its own.
SHARED = frozenset({"y", "undropped", "path", "jvp", "teacher", "weak_teacher", "guidance", "target"}) | {
    "weighting", "warmup", "factor", "distinct_rows",
}  # fmt: skip
IDENTITIES = ("fm", "eulerian", "lagrangian", "semigroup", "moment", "score")


@dataclass(frozen=True)
class Objective:
    """Objective of a method and what it needs.

    Args:
        function: called as function(net, x0, x1, *times, y=y, ...) -> (loss, metrics).
        identity: which identity of the flow map its residual is: one of `IDENTITIES`.
        times: the names of the times it takes, in order.
        tangent: what the jvp differentiates along, and where gradients flow; "none" without a jvp.
        formula: the loss, in plain text; [.] is a stopped gradient.
        sources: papers, and where in them.
        reduction: sum or mean over a row's elements, and which share of the rows has t != s.
        exponent: the p by which a row is divided by its own error, as [e + c]^p; or a function of the settings that
            tells. 0 is a plain square, and None no error of single rows. From a teacher any p has the same optimum, and
            from data p > 0 has another (docs/methods.md).
        sampler: the name of its default sampler in `fastdistill.samplers.SAMPLERS`.
        needs: the keywords it can't do without.
        paths: the names of the paths that it fits; None is all.
        anywhere: an option and its value with which it fits every path, where `paths` names some.
        name: by which it is chosen; the function's, but for a method that shares one with another.
        summary: its full name, a colon, and what it learns in one line.
        settings: the class of its settings, a dataclass as `fastdistill.objectives.settings.MethodSettings`.
        place: where it is listed among all methods: by number, and then by name.
        recipes: what it changes in a configuration that names these recipes, by their names.
        takes, options: all its keywords, and its own with their defaults, both read from the function.
    """

    function: Callable[..., tuple[Tensor, dict[str, Any]]]
    identity: str
    times: tuple[str, ...]
    tangent: str
    formula: str
    sources: tuple[str, ...]
    reduction: str
    sampler: str
    needs: frozenset[str] = frozenset()
    paths: frozenset[str] | None = None
    anywhere: tuple[str, Any] | None = None
    name: str = ""
    summary: str = ""
    settings: Any = None
    place: int = 100
    exponent: float | Callable[[Mapping[str, Any]], float] | None = 0.0
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    takes: frozenset[str] = field(init=False)
    options: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.function.__name__)
        missing = inspect.Parameter.empty
        parameters = inspect.signature(self.function).parameters.values()
        keywords = {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}
        object.__setattr__(self, "takes", frozenset(keywords))
        own = {name: value for name, value in keywords.items() if name not in SHARED and value is not missing}
        object.__setattr__(self, "options", own)
        if self.identity not in IDENTITIES:
            raise ValueError(f"identity: expected one of {', '.join(IDENTITIES)}, got {self.identity!r}")
        if unknown := self.needs - self.takes:
            raise ValueError(f"needs: expected keywords of {self.function.__name__}, got {', '.join(sorted(unknown))}")
        if self.anywhere is not None and self.anywhere[0] not in own:
            raise ValueError(f"anywhere: expected an option of {self.function.__name__}, got {self.anywhere[0]!r}")

    @property
    def two_times(self) -> bool:
        """Return whether it takes a second time after t."""
        return len(self.times) > 1

    @property
    def takes_teacher(self) -> bool:
        """Return whether it takes the keyword `teacher`."""
        return "teacher" in self.takes


# Paths that start at the data itself, for methods that write the consistency function as a data prediction.
FROM_DATA = frozenset({"linear", "cosine", "trig", "icfm", "ot_cfm", "vp_si", "gaussian"})
INDEPENDENT = frozenset(PATHS) - {"ot_cfm"}  # a score is that of x_t given x0 alone
ALONG = "D_w u = jvp(u, (x_t, t, s), (w, 1, 0)); no gradient through it"
AT_THE_END = "du/ds = jvp(u, (x_t, t, s), (0, 0, 1))"


def of_normalised(settings: Mapping[str, Any]) -> float:
    """Return the exponent of a loss whose tangent g may be normalised, g / (|g| + c), from a method's settings."""
    return 0.0 if settings["c"] is None else 0.5


def order(row: Objective) -> tuple[int, str]:
    """Return the key by which methods are listed."""
    return row.place, row.name
