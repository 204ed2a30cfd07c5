"""Build the providers that every op has: our implementations, and what plain PyTorch makes of the formula."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.ops.timed_op import (
    FLOOR,
    OURS,
    PEER,
    Dual,
    OpForms,
    Point,
    Provider,
    Run,
    Tensors,
    TimedCase,
    by_differences,
    by_jvp,
    without_tangents,
    workload,
)

IMPLEMENTATIONS = ("torch", "triton", "cuda")
# In torch 2.13 the forward mode of F.layer_norm has a wrong reverse mode, as the gate shows. So its formula is timed
# too.
WRITTEN_OUT = "torch.func.jvp, written out"
JVP, COMPILED, DIFFERENCES = "torch.func.jvp", "torch.func.jvp, compiled", "finite differences"
Context = Callable[[], AbstractContextManager[Any]]
Refusal = Callable[[TimedCase], str | None]


def common_providers(op: OpForms, device: torch.device) -> list[Provider]:
    """Return our implementations, PyTorch's forward mode, the same compiled, finite differences, and the floor."""
    return [
        *ours(op, device),
        dual_provider(JVP, PEER, lambda case: by_jvp(op.own(case))),
        dual_provider(WRITTEN_OUT, PEER, lambda case: by_jvp(op.reference(case))),
        compiled(op.reference),
        dual_provider(DIFFERENCES, PEER, lambda case: by_differences(op.own(case))),
        plain_floor("PyTorch, no tangent", op.own),
    ]


def ours(op: OpForms, device: torch.device) -> list[Provider]:
    """Return a provider of the explicit pair for each implementation."""
    return [
        dual_provider(
            f"fastdistill {impl}",
            OURS,
            partial(op.pair, impl=impl),
            absent=packages.impl_problem(impl, device),
        )
        for impl in IMPLEMENTATIONS
    ]


def dual_provider(
    name: str,
    kind: str,
    dual: Callable[[TimedCase], Dual],
    *,
    absent: str | None = None,
    refuses: Refusal = lambda case: None,
    context: Context = nullcontext,
) -> Provider:
    """Return a provider that runs a dual function, made anew for each case, inside a context."""

    def prepare(case: TimedCase, data: Point) -> Run:
        with context():
            run = workload(dual(case), case.mode, data)
        return inside(context, run)

    return Provider(name, kind, prepare, absent, refuses)


def inside(context: Context, run: Run) -> Run:
    """Return a run that enters the context first; without a context, return the run itself."""
    if context is nullcontext:
        return run

    def within() -> Tensors:
        with context():
            return run()

    return within


def compiled(formula: Callable[[TimedCase], Callable[..., Any]], refuses: Refusal = lambda case: None) -> Provider:
    """Return the provider that compiles `torch.func.jvp` of a decomposed formula as a whole."""

    def refused(case: TimedCase) -> str | None:
        return "left out by --quick: Inductor takes half a minute a shape" if case.quick else refuses(case)

    made: dict[str, Dual] = {}

    def dual(case: TimedCase) -> Dual:
        key = f"{case.group} {sorted(case.shape.items())}"
        if key not in made:
            made.clear()
            made[key] = fresh(case)
        return made[key]

    def fresh(case: TimedCase) -> Dual:
        torch.compiler.reset()  # Each case is another shape of the same code, and dynamo gives up after a few.
        compiled_dual: Dual = torch.compile(by_jvp(formula(case)), dynamic=False)
        return compiled_dual

    return dual_provider(COMPILED, PEER, dual, refuses=refused)


def plain_floor(
    name: str,
    fn: Callable[[TimedCase], Callable[..., Any]],
    *,
    absent: str | None = None,
    refuses: Refusal = lambda case: None,
    context: Context = nullcontext,
) -> Provider:
    """Return a provider that computes no tangents, forward and primal backward; its time is the floor of the others."""

    def refused(case: TimedCase) -> str | None:
        return "no tangents" if case.mode == "mixed" else refuses(case)

    return dual_provider(
        name, FLOOR, lambda case: without_tangents(fn(case)), absent=absent, refuses=refused, context=context
    )
