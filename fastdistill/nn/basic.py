"""Define linear layers, activations, norms and modulation, with torch.nn's constructors and state dicts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastdistill import ops
from fastdistill.ops.protocol.context import AUTOCASTING


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that switches autocast off on `device`, for parts of a network that 16 bits would spoil.

    Under it a linear layer computes in the dtype of its parameters.
    """
    if device.type not in AUTOCASTING:  # The meta device is one without autocast.
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """Replace ``torch.nn.Linear`` (same arguments, same state dict) by a layer whose tangent costs one matmul, not two.

    Equivalent to: ``torch.nn.functional.linear(x, weight, bias)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class GELU(nn.GELU):
    """Replace ``torch.nn.GELU`` (same argument, no parameters) by one with a fused tangent.

    Equivalent to: ``torch.nn.functional.gelu(x, approximate=approximate)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """Replace ``torch.nn.SiLU`` (no parameters) by one with a fused tangent.

    The result is always a new tensor: `inplace` is ignored.

    Equivalent to: ``torch.nn.functional.silu(x)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.silu(input)


class LayerNorm(nn.LayerNorm):
    """Replace ``torch.nn.LayerNorm`` (same arguments, same state dict) by one with a fused tangent.

    Equivalent to: ``torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Replace ``torch.nn.RMSNorm`` (same arguments, same state dict) by one with a fused tangent.

    Equivalent to: ``torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AdaLayerNorm(LayerNorm):
    """Apply LayerNorm over the last dimension, then the scale and shift of the forward; state dict of LayerNorm.

    Args of forward:
        x: (..., C).
        scale, shift: broadcastable to x, such as (B, 1, C) from `Modulation`.

    Equivalent to: ``torch.nn.functional.layer_norm(x, (C,), weight, bias, eps) * (1 + scale) + shift``.
    """

    def __init__(self, width: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return ops.ada_layer_norm(x, scale, shift, self.weight, self.bias, self.eps)


class AdaRMSNorm(RMSNorm):
    """Apply RMSNorm over the last dimension, then the scale and shift of the forward; state dict of RMSNorm.

    Args of forward:
        x: (..., C).
        scale, shift: broadcastable to x, such as (B, 1, C) from `Modulation`; the shift may be left out.

    Equivalent to: ``torch.nn.functional.rms_norm(x, (C,), weight, eps) * (1 + scale) + shift``.
    """

    def __init__(self, width: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        assert self.eps is not None
        return ops.ada_rms_norm(x, scale, shift, self.weight, self.eps)


class GatedResidualAdaNorm(nn.LayerNorm):
    """Compute the step between two blocks in one kernel: a block's gated residual, and its norm for the next block.

    The residual stream may be float32 while blocks compute in 16 bits: r has x's dtype, y has h's.

    Args of forward:
        x: (..., C), the residual stream.
        gate, scale, shift: broadcastable to x, such as (B, 1, C) from `Modulation`, or None.
        h: x's shape, what the block adds.

    Returns:
        r = x + gate * h, and y = norm(r) * (1 + scale) + shift.

    Equivalent to: ``r = x + gate * h; y = ada_layer_norm(r, scale, shift, weight, bias, eps)``.
    """

    def __init__(self, width: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor | None, h: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.gated_residual_ada_norm(x, gate, h, scale, shift, self.weight, self.bias, self.eps)


class Modulation(nn.Module):
    """Compute `count` vectors that scale, shift and gate tokens, from a condition (DiT's adaLN, arXiv:2212.09748).

    They are computed in the dtype of the parameters even under autocast, because a bf16 scale would round every token
    of the tangent.

    Args of forward:
        condition: (B, C).

    Returns:
        `count` tensors (B, 1, C).

    Equivalent to: ``Linear(C, count * C)(silu(condition)).unsqueeze(1).chunk(count, dim=-1)``.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(width, count * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        with full_precision(condition.device):
            return self.linear(ops.silu(condition)).unsqueeze(1).chunk(self.count, dim=-1)
