"""Linear layers whose tangent costs one matmul: a weight without a tangent is not multiplied by its zeros.

    y = x Wᵀ + b      t_y = t_x Wᵀ + x t_Wᵀ + t_b

`torch.func.jvp` of `F.linear` runs three matmuls even where only x moves: the third one by a weight of zeros, slower
than the others, with about a millisecond of Python beside it. Here it runs two, or [x; t_x] Wᵀ as one where rows are so
few that reading the weight is what costs. benchmarks/results/NOTES.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _choice
from fastdistill.ops import _functional as F
from fastdistill.ops._dual import DualOp, Spec, Tensors


@_choice.accepts_x
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """`torch.nn.functional.linear`, whose tangent skips what does not move.

    Args:
        input: (..., K), floating-point: unlike PyTorch's, no integers, which have no tangents.
        weight: (N, K), or (K,) for a result without the last dimension; of input's dtype.
        bias: (N,), or anything that broadcasts to the result; or None.
        impl: "auto" | "torch"; there is no Triton kernel.

    Returns:
        (..., N), or (...), of input's dtype; under autocast all three are cast first, as PyTorch does.

    Equivalent to:
        F.linear(input, weight, bias)
    """
    return _Call(input, weight, bias, impl, "input").run()


def linear_jvp(
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A linear layer and its directional derivative; tangents have their primals' shapes, None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Equivalent to:
        torch.func.jvp(F.linear, (x, weight, bias), (t_x, t_weight, t_bias))
    """
    return _Call(x, weight, bias, impl).pair(t_x, t_weight, t_bias, tangent_grad)


class _Call:
    """One call: arguments checked by name, x brought to two dimensions or more, weight to two, bias to (N,).

    A bias of another shape is left out of the op, and added to what it returns.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str, first: str = "x") -> None:
        _choice.check_tensor(first, x)
        _choice.check_tensor("weight", weight)
        if x.dim() == 0 or weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"weight: expected (N, K) or (K,) for {first} (..., K), got {tuple(weight.shape)} for {first} "
                f"{tuple(x.shape)}"
            )
        self.shape = (*x.shape[:-1], *weight.shape[:-1])
        if bias is not None:
            _choice.check_tensor("bias", bias)
            if bias.shape != weight.shape[:-1] and not _broadcasts(bias.shape, self.shape):
                raise ValueError(
                    f"bias: expected shape {tuple(weight.shape[:-1])}, or one that broadcasts to {self.shape}, "
                    f"got {tuple(bias.shape)}"
                )
        low = _choice.autocast_dtype(x.device)
        cast = [z if z is None or low is None or z.dtype == torch.float64 else z.to(low) for z in (x, weight, bias)]
        self.named = list(zip(("x", "weight", "bias"), cast))
        assert cast[0] is not None
        for name, value in self.named[1:]:
            if value is not None:
                _choice.check_like(name, value, first, cast[0])
        _choice.check_impl(impl, x.device)
        if impl == "triton":
            raise ValueError("impl='triton': linear has no Triton kernel; use 'torch' or 'auto'")
        self.attrs = (impl,)
        self.bias_apart = bias is not None and (weight.dim() == 1 or bias.shape != weight.shape[:1])

    def run(self) -> Tensor:
        values = [z for _, z in self.named]
        (y,) = LINEAR(self._canonical(values), self.attrs, _choice.tangent_grad())
        assert y is not None
        return self._finished(y, values[2])

    def pair(
        self, t_x: Tensor | None, t_weight: Tensor | None, t_bias: Tensor | None, tangent_grad: bool
    ) -> tuple[Tensor, Tensor]:
        given = [(name, z, t) for (name, z), t in zip(self.named, (t_x, t_weight, t_bias))]
        tangents, values = _choice.checked_tangents(given, tangent_grad), [z for _, z in self.named]
        (y,), (t_y,) = LINEAR.pair(self._canonical(values), self._canonical(tangents), self.attrs, tangent_grad)
        return self._finished(y, values[2]), self._finished(t_y, tangents[2])

    def _canonical(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, weight, bias = tensors
        return [
            x if x is None or x.dim() > 1 else x[None],
            weight if weight is None or weight.dim() > 1 else weight[None],
            None if self.bias_apart else bias,
        ]

    def _finished(self, y: Tensor, bias: Tensor | None) -> Tensor:
        y = y.reshape(self.shape)
        return y + bias if self.bias_apart and bias is not None else y


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    beyond = len(shape) - len(to)
    return beyond <= 0 and all(size in (1, to[i - beyond]) for i, size in enumerate(shape))


def joins(rows: int, summed: int, columns: int) -> bool:
    """Whether (2 rows, summed) by (summed, columns) is worth stacking operands and parting results.

    That moves four times the rows' elements; reading the matrix once instead of twice saves the matrix.
    """
    return 4 * rows * (summed + columns) <= summed * columns


def _products(x: Tensor | None, t_x: Tensor | None, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """x matrix and t_x matrix, (rows, summed) by (summed, columns); None stays None."""
    if x is None or t_x is None or not joins(len(x), *matrix.shape):
        return None if x is None else x @ matrix, None if t_x is None else t_x @ matrix
    both = torch.cat([x, t_x]) @ matrix
    return both[: len(x)].clone(), both[len(x) :].clone()


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    (x, weight, bias), (t_x, t_weight, t_bias) = primals, tangents
    assert x is not None and weight is not None
    shape, rows, t_rows = (*x.shape[:-1], len(weight)), _rows(x), _rows(t_x)
    if t_rows is not None and joins(len(rows), weight.shape[1], len(weight)):
        both = rows.new_zeros(2 * len(rows), len(weight))
        if bias is not None:
            both[: len(rows)] = bias
        if t_bias is not None:
            both[len(rows) :] = t_bias
        both.addmm_(torch.cat([rows, t_rows]), weight.t())
        y, t_y = both[: len(rows)].clone(), both[len(rows) :].clone()  # so that y does not keep t_y's memory
    else:
        y = F.linear(rows, weight, bias)
        t_y = None if t_rows is None else F.linear(t_rows, weight, t_bias)
    if t_weight is not None:
        t_y = F.linear(rows, t_weight, t_bias) if t_y is None else t_y.addmm_(rows, t_weight.t())
    elif t_y is None and t_bias is not None:
        t_y = t_bias.expand(len(rows), -1).clone()
    return (_whole(y, shape),), (None if t_y is None else _whole(t_y, shape),), ()


def _whole(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows in the shape of the result; no view, which autograd would not let the user change in place."""
    return y if y.dim() == len(shape) else torch.ops.aten._unsafe_view(y, shape)


def _backward(
    d_outs: Tensors,
    dt_outs: Tensors,
    primals: Tensors,
    tangents: Tensors,
    outs: Tensors,
    t_outs: Tensors,
    residuals: Tensors,
    attrs: Sequence[Any],
    needs: Sequence[bool],
) -> Tensors:
    x, weight, _ = primals
    assert x is not None and weight is not None
    (dy, dt_y), (rows, t_rows) = (_rows(d_outs[0]), _rows(dt_outs[0])), (_rows(x), _rows(tangents[0]))
    t_weight = tangents[1]
    dx, dt_x = _products(dy if needs[0] else None, dt_y if needs[3] else None, weight)
    grads = [
        _sum_of_products(dx, dt_y, t_weight) if needs[0] else None,
        _sum_of_products(None if dy is None else dy.t() @ rows, _t(dt_y), t_rows) if needs[1] else None,
        None if dy is None or not needs[2] else dy.sum(0),
        dt_x,
        None if dt_y is None or not needs[4] else dt_y.t() @ rows,
        None if dt_y is None or not needs[5] else dt_y.sum(0),
    ]
    likes = (*primals, *primals)
    return [None if not need or like is None else _shaped(grad, like) for grad, like, need in zip(grads, likes, needs)]


def _sum_of_products(start: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """start + a b, where None is zero."""
    if a is None or b is None:
        return start
    return a @ b if start is None else start.addmm_(a, b)


def _shaped(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape) if grad is None else grad.reshape(like.shape)


def _rows(x: Tensor | None) -> Any:
    return None if x is None else x.flatten(0, -2)


def _t(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.t()


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    x, weight, bias = primals
    assert x is not None and weight is not None
    with _choice.without_autocast(x.device):
        return (F.linear(x, weight, bias),)


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x, weight, _ = primals
    assert x is not None and weight is not None
    return [((*x.shape[:-1], weight.shape[0]), x.dtype)], []


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    """The formulas of the forward, differentiable any number of times."""
    (x, weight, bias), (t_x, t_weight, t_bias) = primals, tangents
    y = x @ weight.mT if bias is None else x @ weight.mT + bias
    terms = [
        None if t_x is None else t_x @ weight.mT,
        None if t_weight is None else x @ t_weight.mT,
        None if t_bias is None else t_bias.expand(y.shape),
    ]
    moving = [term for term in terms if term is not None]
    return (y,), (sum(moving[1:], moving[0]) if moving else None,)


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    """The formulas of both backward passes."""
    (x, weight, _), (t_x, t_weight, _) = primals, tangents
    zero = torch.zeros_like(d_outs[0] if d_outs[0] is not None else dt_outs[0])  # type: ignore[arg-type]
    dy, dt_y = (zero if z is None else z for z in (d_outs[0], dt_outs[0]))
    outer = lambda a, b: a.flatten(0, -2).mT @ b.flatten(0, -2)  # noqa: E731
    grads = [
        dy @ weight if t_weight is None else dy @ weight + dt_y @ t_weight,
        outer(dy, x) if t_x is None else outer(dy, x) + outer(dt_y, t_x),
        dy.flatten(0, -2).sum(0),
        dt_y @ weight,
        outer(dt_y, x),
        dt_y.flatten(0, -2).sum(0),
    ]
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


LINEAR = DualOp(
    name="linear",
    primals=("x", "weight", "bias?"),
    outputs=("y",),
    attrs="str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    unfoldable=frozenset({"weight", "bias"}),
    saves_outputs=False,
)
