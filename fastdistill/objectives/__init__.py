"""Training objectives: plain functions (net, x0, x1, t[, s], **options) -> (loss, metrics), one method a file.

`OBJECTIVES` says of each by name what it needs, so that a trainer treats them all alike:

    objective = objectives.get(name)
    times = (t, s) if objective.two_times else (t,)
    loss, metrics = objective.function(net, x0, x1, *times, y=y, **options)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastdistill.objectives.flow_matching import flow_matching
from fastdistill.objectives.meanflow import meanflow
from fastdistill.objectives.velocity import Guidance

__all__ = ["OBJECTIVES", "Guidance", "Objective", "flow_matching", "get", "meanflow"]


@dataclass(frozen=True)
class Objective:
    """A method and what it needs.

    Args:
        function: called as function(net, x0, x1, t, y=y, ...), or (net, x0, x1, t, s, y=y, ...).
        two_times: it takes s after t, and the options `distinct_rows` and `jvp`.
        takes_teacher: it takes the options `teacher` and `guidance`.
        options: its own hyperparameters, by keyword.
    """

    function: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    two_times: bool
    takes_teacher: bool
    options: tuple[str, ...] = ()


OBJECTIVES = {
    "flow_matching": Objective(flow_matching, two_times=False, takes_teacher=False),
    "meanflow": Objective(meanflow, two_times=True, takes_teacher=True, options=("p", "c")),
}


def get(name: str) -> Objective:
    """The objective called `name`; ValueError lists the names there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]
