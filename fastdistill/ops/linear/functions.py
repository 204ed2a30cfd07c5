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
from fastdistill.ops.protocol.pair import paired


@checks.accepts_x
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
        checks.check_tensor(first, x)
        checks.check_tensor("weight", weight)
        if x.dim() == 0 or weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"weight: expected (N, K) or (K,) for {first} (..., K), got {tuple(weight.shape)} for {first} "
                f"{tuple(x.shape)}"
            )
        self.shape = (*x.shape[:-1], *weight.shape[:-1])
        if bias is not None:
            checks.check_tensor("bias", bias)
            if bias.shape != weight.shape[:-1] and not _broadcasts(bias.shape, self.shape):
                raise ValueError(
                    f"bias: expected shape {tuple(weight.shape[:-1])}, or one that broadcasts to {self.shape}, "
                    f"got {tuple(bias.shape)}"
                )
        low = context.autocast_dtype(x.device)
        cast = [z if z is None or low is None or z.dtype == torch.float64 else z.to(low) for z in (x, weight, bias)]
        self.named = list(zip(("x", "weight", "bias"), cast))
        assert cast[0] is not None
        for name, value in self.named[1:]:
            if value is not None:
                checks.check_like(name, value, first, cast[0])
        dispatch.check_impl(impl, x.device)
        if impl == "triton":
            raise ValueError("impl='triton': linear has no Triton kernel; use 'torch' or 'auto'")
        self.attrs = (impl,)
        self.bias_apart = bias is not None and (weight.dim() == 1 or bias.shape != weight.shape[:1])

    def run(self) -> Tensor:
        values = [z for _, z in self.named]
        (y,) = LINEAR(self._canonical(values), self.attrs, context.tangent_grad())
        assert y is not None
        return self._finished(y, values[2])

    def pair(
        self, t_x: Tensor | None, t_weight: Tensor | None, t_bias: Tensor | None, tangent_grad: bool
    ) -> tuple[Tensor, Tensor]:
        given = [(name, z, t) for (name, z), t in zip(self.named, (t_x, t_weight, t_bias))]
        tangents, values = checks.checked_tangents(given, tangent_grad), [z for _, z in self.named]
        inputs = paired(self._canonical(values), self._canonical(tangents))
        ((y, t_y),) = LINEAR.pair(inputs, self.attrs, tangent_grad)
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
