"""Thin modules over ``fastdistill.ops``: the parts of a transformer flow map, with exact fused tangents.

They hold parameters and call ops; the mathematics is in the ops. ``Linear``, ``LayerNorm`` and ``RMSNorm`` subclass
torch.nn's, so that constructor, parameters and state dict are the same. Positions and frequencies are computed in the
forward and never stored: nothing is rounded by ``.bfloat16()``, lost by ``.to_empty()``, or tied to one image size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastdistill import ops

# One pair (cos, sin), each (N, D/2): the rotation of every token, shared by batch and heads.
Rotation = tuple[Tensor, Tensor]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context that switches autocast off on `device`, for the parts of a network that must not be rounded to 16 bits.

    Under it a linear layer computes in the dtype of its parameters.
    """
    if not torch.amp.is_autocast_available(device.type):  # the meta device, for one
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """``torch.nn.Linear`` (same arguments, same state dict), whose tangent costs one matmul instead of two.

    Equivalent to: ``torch.nn.functional.linear(x, weight, bias)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` (same arguments, same state dict) with a fused tangent.

    Equivalent to: ``torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` (same arguments, same state dict) with a fused tangent.

    Equivalent to: ``torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AdaRMSNorm(RMSNorm):
    """RMSNorm over the last dimension, scaled and shifted by what the forward is given; state dict of RMSNorm.

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
    """The step between two blocks: the gated residual of one, and its modulated norm for the next, in one kernel.

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
    """`count` vectors for scaling, shifting and gating tokens, from a condition (adaLN, DiT, section 3.2).

    Computed in the dtype of the parameters even under autocast: a bf16 scale would round every token of the tangent.

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


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection for query, key and value.

    Query, key and value are strided views of the packed projection; nothing is copied on the way to attention.

    Args:
        width: C, a multiple of `heads`.
        heads: H.
        qk_norm: RMS-normalise queries and keys per head (weights (D,), shared by the heads), D = C / H.
        bias: whether both projections have one.

    Args of forward:
        x: (B, N, C).
        rotation: None, or (cos, sin) of shape (N, D/2) from `rotary_2d`.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads={heads}, got {width}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.q_norm = RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.proj = Linear(width, width, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, D), views
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = ops.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    Equivalent to: ``fc2(torch.nn.functional.gelu(fc1(x), approximate="tanh"))``.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x), approximate="tanh"))


class TimestepEmbedding(nn.Module):
    """A time t in [0, 1] to a vector: sinusoids of t, then Linear, SiLU, Linear.

    DiT feeds 1000 t to frequencies up to 1. Nothing there needs the derivative in t, but du/dt of a flow map does, and
    with frequencies up to 1000 it is huge, noisy, and meaningless in 16 bits. Here t is not scaled and the frequencies
    stop at `max_frequency`. Everything runs in the dtype of the parameters, autocast or not.

    Args:
        width: C of the output.
        features: how many sinusoids (even).
        max_frequency: the highest angular frequency in radians per unit of t.

    Args of forward:
        t: (B,).

    Returns:
        (B, width).
    """

    def __init__(self, width: int, features: int = 256, max_frequency: float = 16.0) -> None:
        super().__init__()
        self.features = features
        self.max_frequency = max_frequency
        self.fc1 = Linear(features, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        with full_precision(t.device):
            embedded = sinusoids(t, self.features, self.max_frequency).to(self.fc1.weight.dtype)
            return self.fc2(ops.silu(self.fc1(embedded)))


def sinusoids(t: Tensor, features: int, max_frequency: float) -> Tensor:
    """cos and sin of t at geometrically spaced angular frequencies from 1 to `max_frequency`.

    Args:
        t: (B,); computed in float32 at least.
        features: even, 4 or more.

    Returns:
        (B, features) float32, or float64 for a float64 t: cosines first.

    Raises:
        ValueError: `features` is odd or below 4.
    """
    if features < 4 or features % 2:
        raise ValueError(f"features: expected an even number from 4 up, got {features}")
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponent = torch.linspace(0.0, 1.0, features // 2, device=t.device, dtype=t.dtype)
    angles = t[:, None] * max_frequency**exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_2d(grid: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """The fixed 2-D sine-cosine position embedding of MAE and DiT.

    Half of the width encodes the column, half the row; each half is sines, then cosines, at frequencies
    10000^(-i / (width / 4)).

    Args:
        grid: (rows, columns) of tokens; tokens are numbered row by row.
        width: C, a multiple of 4.
        like: a tensor whose device and dtype to take.

    Returns:
        (rows * columns, C).

    Raises:
        ValueError: `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4, got {width}")
    row_angles, column_angles = _grid_angles(grid, width // 4, like.device)
    parts = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
    return torch.cat(parts, dim=-1).to(like.dtype)


def rotary_2d(grid: tuple[int, int], head_dim: int, like: Tensor) -> Rotation:
    """The angles of a 2-D rotary embedding: the first half of a head turns with the row, the second with the column.

    Args:
        grid: (rows, columns) of tokens; tokens are numbered row by row.
        head_dim: D, a multiple of 4. Frequencies are 10000^(-i / (D / 4)), as in RoFormer on each axis.
        like: a tensor whose device to take.

    Returns:
        cos, sin: (rows * columns, D/2) float32, or float64 if `like` is; one angle for each pair of neighbouring
        channels.

    Raises:
        ValueError: `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    angles = torch.cat(_grid_angles(grid, head_dim // 4, like.device), dim=-1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels (x[2i], x[2i+1]) by its token's angle.

    Args:
        x: (B, H, N, D). The rotation is done in the dtype of `rotation`, the result has x's.
        rotation: cos, sin of shape (N, D/2).
    """
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def _grid_angles(grid: tuple[int, int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column number of each token times `count` frequencies: two tensors (rows * columns, count) float64.

    In float64 because it costs nothing, and a float64 network must not inherit float32 positions.
    """
    rows, columns = grid
    exponent = torch.arange(count, device=device, dtype=torch.float64) / count
    frequencies = torch.exp(-math.log(10000.0) * exponent)
    row = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * frequencies
    column = torch.arange(columns, device=device, dtype=torch.float64)[:, None] * frequencies
    return row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)
