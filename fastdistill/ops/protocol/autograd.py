"""Reverse mode of an op under the dual protocol, and the reverse mode of that.

Both are autograd functions of one functorch level: their forward redispatches below Autograd, to the next level, so
fused work stays fused under `torch.func.grad`, which differentiates as if somebody might do so again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import compat
from fastdistill.ops.protocol.pair import is_absent


def apply_function(function: Any, *args: Any) -> Any:
    """Apply a `SingleLevelFunction`, which is allowed inside torch.func transforms too."""
    if compat.functorch_active():
        with compat.enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*args)


def reverse_mode(op: Any) -> type[compat.SingleLevelFunction]:
    """Make the autograd function of `name_dual`, whose forward redispatches below Autograd, to the next level."""
    n, k = len(op.primals), len(op.outputs)

    class Dual(compat.SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> Any:
            # `Function` switches both grad modes off; outer functorch levels would then silently record nothing.
            with torch.enable_grad(), compat.set_forward_grad(True), compat.below_autograd():
                return op.op_dual(*args[:-1])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            primals, tangents, attrs, tangent_grad = op._split_dual(inputs[:-1])
            outs, t_outs, residuals = op._split_results(output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*residuals, *(() if tangent_grad else t_outs))
            kept = tangents if tangent_grad else [None] * n
            absent = [x.new_empty(0) for x in outs]
            saved = [*outs, *(t_outs if tangent_grad else absent)] if op.saves_outputs else absent * 2
            ctx.save_for_backward(*(inputs[-1] or primals), *kept, *saved, *residuals)
            ctx.attrs = attrs

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            d_outs, dt_outs = cotangents[:k], cotangents[k : 2 * k]
            if all(d is None for d in (*d_outs, *dt_outs)):
                return (None,) * len(ctx.needs_input_grad)
            mixed = any(d is not None for d in dt_outs)
            needs = [ctx.needs_input_grad[i] and (i < n or mixed) for i in range(2 * n)]
            saved = list(ctx.saved_tensors)
            primals, tangents, saved = saved[:n], saved[n : 2 * n], saved[2 * n :]

            def gradients(d: Any, dt: Any, x: Any, t: Any, needs: list[bool]) -> list[Tensor | None]:
                grads = op.op_backward(*d, *dt, *x, *t, *saved, *ctx.attrs, needs)
                return [g if need else None for g, need in zip(grads, needs)]

            none = (None,) * n
            if not mixed:
                grads = gradients(d_outs, dt_outs, primals, none, needs)
            elif not any(map(_moves, (*primals, *d_outs))):
                grads = gradients(d_outs, dt_outs, primals, tangents, needs)
            else:  # the tangents' own gradient doesn't move with the primals: there is one level of tangents
                bare = [x if x is None else compat.unpack_dual(x, 0)[0] for x in primals]
                grads = gradients(none[:1] * k, dt_outs, bare, tangents, needs)
                if any(d is not None for d in d_outs):
                    more = gradients(d_outs, none[:1] * k, primals, none, [*needs[:n], *[False] * n])
                    grads = [a if b is None else b if a is None else a + b for a, b in zip(grads, more)]
            return (*grads, *[None] * (len(ctx.needs_input_grad) - 2 * n))

    Dual.__name__ = Dual.__qualname__ = f"{op.name.title().replace('_', '')}Dual"
    return Dual


def reverse_mode_of_backward(op: Any) -> type[compat.SingleLevelFunction]:
    """Make the autograd function of `name_backward`, which is fused and is differentiated by `math_backward`."""
    n, k = len(op.primals), len(op.outputs)

    class Again(compat.SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> Any:
            # `Function` switches both grad modes off; outer functorch levels would then silently record nothing.
            with torch.enable_grad(), compat.set_forward_grad(True), compat.below_autograd():
                return op.op_backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(x for x in output if is_absent(x)))
            ctx.save_for_backward(*inputs[: 2 * k + 2 * n])
            *_, (*ctx.attrs, ctx.needs) = op._split_backward(inputs)
            ctx.count = len(inputs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            tensors: list[Any] = list(map(_alive, ctx.saved_tensors))
            moving = [i for i in range(len(tensors)) if ctx.needs_input_grad[i]]
            used = [i for i, d in enumerate(cotangents) if d is not None]
            if not used or all(x is None for x in tensors[: 2 * k]):
                return (None,) * ctx.count

            def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
                filled = list(tensors)
                for i, leaf in zip(moving, leaves):
                    filled[i] = leaf
                parts = filled[:k], filled[k : 2 * k], filled[2 * k : 2 * k + n], filled[2 * k + n :]
                grads = op.second_order_gradients(*parts, ctx.attrs, ctx.needs)
                return tuple(grads[i] for i in used)

            _, pull, *_ = torch.func.vjp(gradients, *(tensors[i] for i in moving))
            results = dict(zip(moving, pull(tuple(cotangents[i] for i in used))))
            return tuple(results.get(i) for i in range(ctx.count))

    Again.__name__ = Again.__qualname__ = f"{op.name.title().replace('_', '')}Backward"
    return Again


def _moves(x: Tensor | None) -> bool:
    return x is not None and compat.unpack_dual(x, 0)[1] is not None


def _alive(x: Tensor | None) -> Tensor | None:
    """Return a saved tensor without the wrapper of an ended functorch level, in which `torch.func.vjp` fails."""
    return x.view_as(x) if x is not None and compat.functorch_active() else x
