"""Give PyTorch's own functions the names of `fastdistill.ops`, so that the same network runs without our ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdistill import ops
from fastdistill.benchmarks.ops.timed_op import along
from fastdistill.ops.protocol.cases import every_case

# PyTorch's own, and the same decomposed: any order of derivatives, in any dtype, and what Inductor is given. PyTorch
# has no attention over packed sequences.
_ROWS = [row for row in every_case() if row.name != "varlen_attention"]
OWN: dict[str, Callable[..., Any]] = {row.op.__name__: row.native for row in _ROWS}
DECOMPOSED: dict[str, Callable[..., Any]] = {row.op.__name__: row.reference for row in _ROWS}
# PyTorch's own but for the norms, whose forward mode has a wrong reverse mode in torch 2.13.
WRITTEN_OUT = {**OWN, **{name: op for name, op in DECOMPOSED.items() if name.endswith("norm")}}
# These have no derivatives, so a peer may use ours.
SAME = ("explain", "rope_angles")


def namespace(functions: dict[str, Callable[..., Any]]) -> Any:
    """Return an object with the functions as attributes, like `fastdistill.ops`."""
    return SimpleNamespace(**functions)


def ours_by(impl: str) -> Any:
    """Return our ops that `OWN` names, each bound to one implementation.

    A linear layer has no choice of implementation: it is PyTorch's matmul.
    """

    def bound(name: str) -> Callable[..., Any]:
        op = getattr(ops, name)
        has_choice = name not in ("linear", "timestep_embedding")
        return (lambda *args, **options: op(*args, impl=impl, **options)) if has_choice else op

    return namespace({name: bound(name) for name in OWN})


@contextmanager
def instead_of_ours(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Make networks of `fastdistill.nn` and `fastdistill.models` call these functions instead of our ops.

    An op without a twin among the functions raises RuntimeError, because a peer must not run on our code unnoticed.
    """

    def without_twin(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **options: Any) -> Any:
            raise RuntimeError(
                f"fastdistill.ops.{name} has no plain twin in fastdistill.benchmarks.ops.torch_functions"
            )

        return refuse

    replaced = {name: functions.get(name) or without_twin(name) for name in ops.__all__ if name not in SAME}
    with mock.patch.dict(vars(ops), replaced):
        yield


def jvp(fn: Callable[..., Tensor], primals: Any, tangents: Any, *, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Call `torch.func.jvp` with the arguments of `fastdistill.jvp`: numbers are broadcast, and None is a zero."""
    (out,), (t_out,) = torch.func.jvp(*along(fn, tuple(primals), _filled(primals, tangents)))[:2]
    return out, t_out if tangent_grad else t_out.detach()


def difference(
    fn: Callable[..., Tensor], primals: Any, tangents: Any, *, tangent_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the pair by a central difference with the arguments of `fastdistill.jvp`; the step suits the dtype."""
    moved, point, direction = along(fn, tuple(primals), _filled(primals, tangents))
    autocast = torch.is_autocast_enabled(point[0].device.type)
    step = torch.finfo(torch.bfloat16 if autocast else point[0].dtype).eps ** (1 / 3)
    with torch.set_grad_enabled(tangent_grad and torch.is_grad_enabled()):
        after, before = (
            moved(*(x + sign * step * t_x for x, t_x in zip(point, direction, strict=True)))[0] for sign in (1, -1)
        )
    return fn(*primals), (after - before) / (2 * step)


def _filled(primals: Any, tangents: Any) -> list[Tensor | None]:
    return [
        t if t is None or isinstance(t, Tensor) else None if t == 0 else torch.full_like(x, t)
        for x, t in zip(primals, tangents, strict=True)
    ]
