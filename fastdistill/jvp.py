"""The driver: a network's output and its directional derivative in one pass, at the memory of a plain forward."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastdistill import _compat
from fastdistill.ops._choice import tangents_without_grad

MODES = ("single", "separate")


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | float | None],
    *,
    tangent_grad: bool = False,
    mode: str = "single",
) -> tuple[Any, Any]:
    """Evaluate `fn(*primals)` and its derivative along `tangents` together.

    The total derivative of MeanFlow and its relatives, for `net(x, t, s)` along the flow of velocity v:

        u, du_dt = fd.jvp(net, (x, t, s), (v, 1.0, 0.0))

    Args:
        fn: differentiable function; returns a tensor or a pytree of tensors.
        primals: positional arguments of `fn`; those without a tangent may be anything.
        tangents: one for each primal: a tensor of the primal's shape, a number that is broadcast to it, or None.
            None and the number 0 are structural zeros: nothing is computed for them.
        tangent_grad: False (the default) treats the tangent as a constant: it carries no graph, and its graph is cut
            after every operation, so that the memory held is that of a plain forward. True makes the tangent
            differentiable, exactly as `torch.func.jvp`; losses that backpropagate through it need that (TVM, LSD).
        mode: "single" computes both in one pass; "separate" takes a plain forward for the output and a pass under
            `no_grad` for the tangent: slower, for networks whose hooks don't bear forward AD under grad.

    Returns:
        (out, t_out), each with the structure of `fn`'s result. `out` carries the graph.

    Raises:
        TypeError, ValueError: an argument is off; the message names it. A tangent that requires grad is refused
            unless `tangent_grad=True`, because its gradient would be lost silently.

    Equivalent to:
        torch.func.jvp(fn, primals, tangents), the tangent detached unless `tangent_grad`.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError("fastdistill.jvp: forward AD is silently zero in inference_mode; use torch.no_grad instead")
    if len(primals) != len(tangents):
        raise ValueError(f"tangents: expected one for each of the {len(primals)} primals, got {len(tangents)}")
    checked = [_tangent(i, p, t, tangent_grad) for i, (p, t) in enumerate(zip(primals, tangents))]
    moving = [i for i, t in enumerate(checked) if t is not None]
    if not moving:
        out = fn(*primals)
        return out, tree_map(torch.zeros_like, out)

    def restricted(*values: Tensor) -> Any:
        arguments = list(primals)
        for i, value in zip(moving, values):
            arguments[i] = value
        return fn(*arguments)

    point, direction = tuple(primals[i] for i in moving), tuple(checked[i] for i in moving)
    if tangent_grad:
        if mode == "separate":
            raise ValueError("mode='separate' computes its tangent under no_grad: expected tangent_grad=False")
        return _pushforward(restricted, point, direction)
    with tangents_without_grad():
        if mode == "separate":
            with torch.no_grad():
                _, t_out = _pushforward(restricted, point, direction)
            return fn(*primals), t_out
        if torch.compiler.is_compiling():  # the compiler drops the unused graph of the tangent by itself
            out, t_out = _pushforward(restricted, point, direction)
        else:
            with CutTangentGraph():
                out, t_out = _pushforward(restricted, point, direction)
    return out, tree_map(torch.detach, t_out)


# Their tangents are views of tangents that were cut before.
_RESHAPE = {"expand", "flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view"}
VIEWS = frozenset(_RESHAPE | {"__getitem__", "chunk", "split", "unbind"})


class CutTangentGraph(TorchFunctionMode):
    """After every operation, detach the tangents of its results.

    The tangent of `F.linear(x, W)` is `F.linear(t_x, W)`, which would save t_x and W for a gradient that nobody asks
    for. Cut at once, what it saved is freed at once. (Under `forward_ad.dual_level` that would not help: there every
    saved primal keeps its tangent alive. Under `torch.func.jvp` the primal's graph is one level below the tangents.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in VIEWS:
            return result
        if isinstance(result, Tensor):  # an in-place operation must return the very tensor it was given
            return result if args and result is args[0] else _cut(result)
        return tuple(map(_cut, result)) if type(result) is tuple else result


def _cut(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    primal, tangent = _compat.unpack_dual(x)
    return x if tangent is None else _compat.make_dual(primal, tangent.detach())


def _pushforward(fn: Callable[..., Any], point: tuple[Any, ...], direction: tuple[Any, ...]) -> tuple[Any, Any]:
    out, t_out = torch.func.jvp(fn, point, direction)  # type: ignore[misc]  # three results only with has_aux
    return out, t_out


def _tangent(index: int, primal: Any, tangent: Any, tangent_grad: bool) -> Tensor | None:
    """The checked tangent of one primal; None for a structural zero."""
    name = f"tangents[{index}]"
    if tangent is None or (isinstance(tangent, numbers.Real) and tangent == 0):
        return None
    if not isinstance(primal, Tensor) or not primal.is_floating_point():
        kind = primal.dtype if isinstance(primal, Tensor) else type(primal).__name__
        raise TypeError(f"{name}: expected None, as primals[{index}] is no floating-point tensor but {kind}")
    if isinstance(tangent, numbers.Real):
        return torch.full_like(primal, float(tangent))
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{name}: expected a tensor, a number or None, got {type(tangent).__name__}")
    if tangent.shape != primal.shape:
        raise ValueError(f"{name}: expected shape {tuple(primal.shape)}, got {tuple(tangent.shape)}")
    if tangent.device != primal.device:
        raise ValueError(f"{name}: expected device {primal.device}, got {tangent.device}")
    if tangent.requires_grad and not tangent_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, which would be lost: detach it, or pass tangent_grad=True")
    return tangent.to(primal.dtype)
