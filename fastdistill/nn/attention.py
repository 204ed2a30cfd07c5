"""Compute attention with packed projections, whose norms of heads and rotary embedding run in one kernel."""

from __future__ import annotations

from torch import Tensor, nn

from fastdistill import ops
from fastdistill.nn.basic import Linear, RMSNorm

# A pair (cos, sin), each (N, D/2), is the rotation of every token, shared by batch and heads.
Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Compute multi-head self-attention by one packed projection for q, k and v; state dict of timm's Attention.

    Query, key and value are strided views of the packed projection. One op normalises and turns queries and keys, and
    nothing else is copied on the way to attention.

    Args:
        width: C, a multiple of `heads`.
        heads: H.
        qk_norm: RMS-normalise queries and keys per head (weights (D,), shared by the heads), D = C / H.
        bias: whether both projections have a bias.

    Args of forward:
        x: (B, N, C).
        rotation: None, or (cos, sin), (N, D/2) each, from `ops.rope_angles`: neighbouring channels turn together.
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
        if self.q_norm is not None or rotation is not None:
            q, k = self._normed_and_turned(q, k, rotation)
        out = ops.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _normed_and_turned(self, q: Tensor, k: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        cos, sin = (None, None) if rotation is None else rotation
        if self.q_norm is None or self.k_norm is None:
            return ops.qk_norm_rope(q, k, cos, sin, norm="none", interleaved=True)
        assert self.q_norm.eps is not None
        weights = (self.q_norm.weight, self.k_norm.weight)
        return ops.qk_norm_rope(q, k, cos, sin, *weights, eps=self.q_norm.eps, interleaved=True)
