"""Pose every op of the torch path at a small size, and a network under `fd.jvp`, for the counting benchmarks.

The ops and their variants are the rows of the rooms' `cases.py`. Every problem runs in three modes:

    forward             the output and its tangent, tangents given where a network has them, and no graph
    forward + primal    the same with a graph for the output, and the gradients of the output: a MeanFlow step
    forward + mixed     the same with a graph for both, and the gradients of both: where a loss sees the tangent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.models.dit import DiT
from fastdistill.ops.protocol.cases import PublicOp, as_tuple, every_case

MODES = ("forward", "forward + primal", "forward + mixed")
PairFunction = Callable[..., tuple[Any, Any]]


class Problem(NamedTuple):
    """Problem of an op on its inputs.

    pair: (primals, tangents, tangent_grad) -> (out, t_out), each a tensor or a tuple of them.
    primals, tangents: float32, in the same order and of the same shapes; a parameter has the tangent None.
    """

    pair: PairFunction
    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]


def problem(name: str) -> Problem:
    """Return the problem of this name, one of `NAMES`, with random inputs of a fixed seed."""
    if name not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(NAMES)}, got {name!r}")
    return PROBLEMS[name]()


def run_mode(task: Problem, mode: str) -> None:
    """Run the problem once, in one of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "forward":
        with torch.no_grad():
            task.pair(task.primals, task.tangents, False)
        return
    mixed = mode == "forward + mixed"
    leaves = [x.detach().requires_grad_() for x in task.primals]
    leaf_tangents = [None if x is None else x.detach().requires_grad_(mixed) for x in task.tangents]
    out, t_out = (as_tuple(x) for x in task.pair(leaves, leaf_tangents, mixed))
    moving = [x for x in leaf_tangents if x is not None]
    roots, wanted = (*out, *t_out) if mixed else out, [*leaves, *moving] if mixed else leaves
    torch.autograd.grad(roots, wanted, [torch.ones_like(x) for x in roots], allow_unused=True)


def _normal(*shapes: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return primals of these shapes, and tangents of the same."""
    generator = torch.Generator().manual_seed(0)
    primals, tangents = (tuple(torch.randn(*shape, generator=generator) for shape in shapes) for _ in range(2))
    return primals, tangents


def _of(case: PublicOp, variant: str) -> Problem:
    sizes, options = case.variant(variant, case.counted)
    shapes = case.shapes(sizes)
    primals, tangents = _normal(*shapes.values())

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], tangent_grad: bool) -> tuple[Any, Any]:
        named, moving = dict(zip(shapes, primals)), dict(zip(shapes, tangents))
        return case.of_pair(named, moving, options, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tuple(None if n in case.parameters else t for n, t in zip(shapes, tangents)))


def _network() -> Problem:
    torch.manual_seed(0)
    net = DiT(channels=4, patch_size=2, width=64, depth=2, heads=4, num_classes=10, qk_norm=True, pos="rope")
    parameters = tuple(x.detach() for x in net.parameters())
    names = [name for name, _ in net.named_parameters()]
    (x, *_), (v, *_) = _normal((2, 4, 16, 16))
    t, labels = torch.tensor([0.7, 0.4]), torch.tensor([1, 2])

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        weights = dict(zip(names, primals[1:]))

        def along(x: Tensor, t: Tensor) -> Tensor:
            return torch.func.functional_call(net, weights, (x, t, torch.zeros_like(t), labels))

        u, du_dt = fd.jvp(along, (primals[0], t), (tangents[0], 1.0), tangent_grad=tangent_grad)
        return u, du_dt

    return Problem(pair, (x, *parameters), (v, *[None] * len(parameters)))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f"{case.name}, {variant}".removesuffix(", "): partial(_of, case, variant)
    for case in every_case()
    for variant in case.variants
} | {"DiT under fd.jvp": _network}
NAMES = tuple(PROBLEMS)
