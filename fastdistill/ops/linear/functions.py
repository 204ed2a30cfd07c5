"""Linear layers whose tangent costs one matmul: a weight without a tangent is not multiplied by its zeros.

    y = x Wᵀ + b      t_y = t_x Wᵀ + x t_Wᵀ + t_b

`torch.func.jvp` of `F.linear` runs three matmuls even where only x moves: the third one by a weight of zeros, slower
than the others, with about a millisecond of Python beside it. Here it runs two, or [x; t_x] Wᵀ as one where rows are so
few that reading the weight is what costs. benchmarks/results/NOTES.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.linear.op import LINEAR
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.dual_op import Tensors
from fastdistill.ops.protocol.pair import paired

NAMES = ("x", "weight", "bias")


@checks.accepts_x
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Apply a linear layer as `torch.nn.functional.linear` does; its tangent skips what does not move.

    Args:
        input: (..., K), floating-point. PyTorch takes integers as well; they have no tangents and are refused here.
        weight: (N, K), or (K,) for a result without the last dimension; of input's dtype.
        bias: (N,), or anything that broadcasts to the result; or None.
        impl: "auto" | "torch"; there is no Triton kernel.

    Returns:
        (..., N), or (...), of input's dtype; under autocast all three are cast first, as PyTorch does.

    Raises:
        ValueError, TypeError: an argument that doesn't fit, by its name.

    Equivalent to:
        F.linear(input, weight, bias)
    """
    primals = _checked("input", input, weight, bias, impl)
    (y,) = LINEAR(_operands(primals, primals), (impl,), context.tangent_grad())
    assert y is not None
    return _result(y, primals, primals)


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
    """Return a linear layer and its directional derivative; tangents have their primals' shapes, None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Equivalent to:
        torch.func.jvp(F.linear, (x, weight, bias), (t_x, t_weight, t_bias))
    """
    primals = _checked("x", x, weight, bias, impl)
    tangents = checks.checked_tangents(list(zip(NAMES, primals, (t_x, t_weight, t_bias))), tangent_grad)
    inputs = paired(_operands(primals, primals), _operands(primals, tangents))
    ((y, t_y),) = LINEAR.pair(inputs, (impl,), tangent_grad)
    return _result(y, primals, primals), _result(t_y, primals, tangents)


def _checked(first: str, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> list[Tensor | None]:
    """Check the arguments, of which x is called `first`, and return them in the dtype that autocast asks for."""
    checks.check_tensor(first, x)
    checks.check_tensor("weight", weight)
    if x.dim() == 0 or weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected (N, K) or (K,) for {first} (..., K), got {tuple(weight.shape)} for {first} "
            f"{tuple(x.shape)}"
        )
    if bias is not None:
        checks.check_tensor("bias", bias)
        result = (*x.shape[:-1], *weight.shape[:-1])
        if bias.shape != weight.shape[:-1] and not _broadcasts(bias.shape, result):
            raise ValueError(
                f"bias: expected shape {tuple(weight.shape[:-1])}, or one that broadcasts to {result}, "
                f"got {tuple(bias.shape)}"
            )
    low = context.autocast_dtype(x.device)
    if low is not None:
        x, weight = (z if z.dtype == torch.float64 else z.to(low) for z in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(low)
    for name, z in (("weight", weight), ("bias", bias)):
        if z is not None:
            checks.check_like(name, z, first, x)
    dispatch.check_impl(impl, x.device)
    if impl == "triton":
        raise ValueError("impl='triton': linear has no Triton kernel; use 'torch' or 'auto'")
    return [x, weight, bias]


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    beyond = len(shape) - len(to)
    return beyond <= 0 and all(size in (1, to[i - beyond]) for i, size in enumerate(shape))


def _bias_apart(primals: Tensors) -> bool:
    """Return whether the bias is no (N,): then it is left out of the op, and added to what the op returns."""
    _, weight, bias = primals
    return bias is not None and weight is not None and (weight.dim() == 1 or bias.shape != weight.shape[:1])


def _operands(primals: Tensors, tensors: Tensors) -> list[Tensor | None]:
    """Return the primals, or their tangents, as the op takes them: x and the weight have two dimensions or more."""
    x, weight, bias = tensors
    return [
        x if x is None or x.dim() > 1 else x[None],
        weight if weight is None or weight.dim() > 1 else weight[None],
        None if _bias_apart(primals) else bias,
    ]


def _result(y: Tensor, primals: Tensors, tensors: Tensors) -> Tensor:
    """Return what the op made of the primals, or of their tangents, in its own shape, with a bias that was apart."""
    x, weight, _ = primals
    assert x is not None and weight is not None
    y, bias = y.reshape((*x.shape[:-1], *weight.shape[:-1])), tensors[2]
    return y + bias if bias is not None and _bias_apart(primals) else y
