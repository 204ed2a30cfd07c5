"""Measure a result's whole cost: the method's own training, its teacher's, and ReFlow's pairs, all counted alike.

Equal numbers of steps aren't equal budgets. A network evaluation takes one row forward through one network, with or
without a gradient or a tangent; the network may be the student, a teacher, a critic or an average. The seconds of a run
are the seconds of a step, as `fastdistill.compare` times them, times the number of steps. The seconds of all pairs
follow from those of a few.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastdistill.data import generator_at
from fastdistill.objectives.reflow import ReFlow, coupled_pairs
from fastdistill.objectives.scores import ScoreMethod
from fastdistill.train import TrainConfig
from fastdistill.train.methods import METHODS

Costs = Mapping[str, float]
TIMED_PAIRS = 512


@contextlib.contextmanager
def counting_rows(net: nn.Module) -> Iterator[list[int]]:
    """Count the rows that go through any network of the type of `net`; yield a list with one entry a call."""
    kind, rows = type(net), []

    def count(module: nn.Module, _: Any, out: Any) -> None:
        if type(module) is kind:
            rows.append(len(out[0] if isinstance(out, tuple) else out))

    # With `with_kwargs`, PyTorch would keep a record of the hook after its removal, and torch.compile warns of that.
    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def whole_budget(config: TrainConfig, cost: Costs, teacher: tuple[TrainConfig, Costs, nn.Module] | None) -> Costs:
    """Return a run's whole budget, from the costs of its steps and of its teacher's.

    Args:
        cost: `seconds_per_step` and `evaluations_per_step`, as `fastdistill.compare.measure_cost` returns them.
        teacher: the teacher's configuration, the cost of its steps, and its network; None for a method from data.

    Returns:
        Numbers of `steps`, `teacher_steps`, `pairs` and `critic_updates`; `evaluations` and `seconds` in all; and
        `prior_evaluations` and `prior_seconds`, the part that was spent before the first step.
    """
    method, pairs, updates = config.method, 0, 0
    evaluations, seconds = 0.0, 0.0
    if teacher is not None:
        of, price, net = teacher
        evaluations, seconds = of.steps * price["evaluations_per_step"], of.steps * price["seconds_per_step"]
        if isinstance(method, ReFlow):
            pairs = method.pairs
            more = _price_of_pairs(config, method, net)
            evaluations, seconds = evaluations + more[0], seconds + more[1]
    if isinstance(method, ScoreMethod):
        updates = config.steps * method.critic.updates + method.critic.warmup_updates
    return {
        "steps": config.steps,
        "teacher_steps": 0 if teacher is None else teacher[0].steps,
        "pairs": pairs,
        "critic_updates": updates,
        "prior_evaluations": evaluations,
        "prior_seconds": seconds,
        "evaluations": evaluations + config.steps * cost["evaluations_per_step"],
        "seconds": seconds + config.steps * cost["seconds_per_step"],
    }


def _price_of_pairs(config: TrainConfig, method: ReFlow, net: nn.Module) -> tuple[float, float]:
    """Return the evaluations and seconds that all pairs take, by timing at most `TIMED_PAIRS` of them."""
    dataset, count = config.data.build(), min(TIMED_PAIRS, method.pairs)
    x1 = torch.randn(count, *dataset.shape, generator=generator_at(0, "timed pairs"))
    y = torch.arange(count) % dataset.num_classes if dataset.num_classes else None
    guidance: dict[str, Any] = {"scale": method.pair_guidance, "null": dataset.num_classes}
    with counting_rows(net) as rows:
        started = time.perf_counter()
        coupled_pairs(net, x1, y, method.pair_steps, path=config.path.build(), **guidance)
        seconds = time.perf_counter() - started
    return sum(rows) * method.pairs / count, seconds * method.pairs / count


def exponent(settings: Mapping[str, Any]) -> str:
    """Return the exponent p by which a method divides a row by its own error, as [e + c]^p; "0" is a plain square.

    Every p has the same optimum if a teacher gives the target. If data gives it, p > 0 moves the optimum
    (docs/methods.md).
    """
    method = settings["method"]
    p = METHODS[method["name"]].row.exponent
    p = p(method) if callable(p) else p
    return "-" if p is None else f"{p:g}"


def distinct_share(settings: Mapping[str, Any]) -> str:
    """Return the share of rows with s != t; it is 100 % if every row goes to s = 0 or has both terms."""
    method = settings["method"]
    if "distinct" in method:
        return f"{100 * method['distinct']:.0f} %"
    return "0 %" if METHODS[method["name"]].row.identity == "fm" else "100 %"
