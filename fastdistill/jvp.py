"""Compute a network's output and its directional derivative in one pass, at the memory of a plain forward."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastdistill.ops.protocol import compat
from fastdistill.ops.protocol.context import tangents_without_grad

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
        tangent_grad: False (the default) treats the tangent as a constant: it has no derivative, and its graph is cut
            after every operation, so that the memory held is that of a plain forward. True makes the tangent
            differentiable, exactly as `torch.func.jvp`; losses that backpropagate through it need that (TVM, LSD).
        mode: "single" computes both in one pass; "separate" takes a plain forward for the output and a pass under
            `no_grad` for the tangent, with the same random numbers: slower, for networks that don't bear forward AD
            under grad, such as those with checkpointing inside.

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
    if mode == "separate" and tangent_grad:
        raise ValueError("mode='separate' computes its tangent under no_grad: expected tangent_grad=False")
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple, one entry for each argument of fn, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError("fastdistill.jvp: torch 2.11 loses tangents in inference_mode; use torch.no_grad instead")
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
        return _pushforward(restricted, point, direction)
    level = 0 if torch.compiler.is_compiling() else (compat.maybe_current_level() or 0) + 1
    with tangents_without_grad(level):
        if mode == "separate":
            devices = sorted({x.device.index for x in point if x.device.type == "cuda"})
            with torch.no_grad(), torch.random.fork_rng(devices):
                _, t_out = _pushforward(restricted, point, direction)
            return fn(*primals), t_out
        if torch.compiler.is_compiling():  # The compiler drops the unused graph of the tangent by itself.
            out, t_out = _pushforward(restricted, point, direction)
        else:
            with CutTangentGraph(level):
                out, t_out = _pushforward(restricted, point, direction)
    return out, tree_map(torch.detach, t_out)


# Their tangents are views of tangents that were cut before. Cutting again would be right too, only slower.
_RESHAPE = {"expand", "flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view"}
VIEWS = frozenset(_RESHAPE | {"__getitem__", "chunk", "split", "unbind"})


class CutTangentGraph(TorchFunctionMode):
    """Detach the tangents of the results of every operation.

    The tangent of `F.linear(x, W)` is `F.linear(t_x, W)`, which would save t_x and W for a gradient that nobody asks
    for. Cut at once, what it saved is freed at once. (Under `forward_ad.dual_level` that would not help: there every
    saved primal keeps its tangent alive. Under `torch.func.jvp` the primals' graph is one level below the tangents.)

    Args:
        level: the functorch level of the driver. A transform inside the network has its own, and its tangents are
            values for the driver: they are left alone.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in VIEWS or not torch.is_grad_enabled():
            return result
        if (compat.maybe_current_level() or 0) != self.level:
            return result
        if isinstance(result, Tensor):  # An in-place operation must return the very tensor that it was given.
            return result if args and result is args[0] else _cut(result)
        return tuple(map(_cut, result)) if type(result) is tuple else result


def _cut(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    primal, tangent = compat.unpack_dual(x, 0)
    return x if tangent is None else compat.make_dual(primal, tangent.detach(), 0)


def _pushforward(fn: Callable[..., Any], point: tuple[Any, ...], direction: tuple[Any, ...]) -> tuple[Any, Any]:
    out, t_out = torch.func.jvp(fn, point, direction)  # type: ignore[misc]  # three results only with has_aux
    return out, t_out


def _tangent(index: int, primal: Any, tangent: Any, tangent_grad: bool) -> Tensor | None:
    """Return the checked tangent of one primal, or None for a structural zero."""
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
    if not tangent_grad and not torch.compiler.is_compiling() and compat.has_tangent(tangent):
        raise ValueError(f"{name} has a tangent of its own, which would be lost: pass tangent_grad=True")
    return tangent.to(primal.dtype)
