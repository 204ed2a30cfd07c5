"""The angles of a rotary embedding over one or more axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_angles(
    positions: Sequence[int] | Tensor,
    head_dim: int,
    *,
    dims: Sequence[int] | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The angles of a rotary embedding over one or more axes (RoFormer, arXiv:2104.09864, on each axis).

    Args:
        positions: sizes of a grid, (N,), (rows, columns) or (frames, rows, columns), whose tokens are numbered with
            the last axis fastest; or the positions themselves, (N, axes) or (B, N, axes).
        head_dim: D, even.
        dims: channels that turn with each axis, even numbers with a sum of at most D; what is left never turns. Without
            it all axes get the same even number, and the first one also what is left.
        theta: pair i of an axis with d channels has the frequency theta^(-2i / d).
        device: where to put the angles of a grid; those of positions stay with them.
        dtype: of the result; the angles themselves are taken in float64.

    Returns:
        cos, sin: (N, D/2), or (B, N, D/2).

    Raises:
        ValueError: `head_dim` or `dims` break these rules.
    """
    if head_dim % 2 or head_dim <= 0:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim}")
    if not isinstance(positions, Tensor):
        ticks = [torch.arange(size, dtype=torch.float64, device=device) for size in positions]
        positions = torch.stack(torch.meshgrid(*ticks, indexing="ij"), dim=-1).flatten(0, -2)
    axes = positions.shape[-1]
    if dims is None:
        each = head_dim // 2 // axes * 2
        dims = [head_dim - (axes - 1) * each] + [each] * (axes - 1)
    if len(dims) != axes or any(d % 2 or d < 0 for d in dims) or sum(dims) > head_dim:
        raise ValueError(
            f"dims: expected {axes} even numbers, one an axis, with a sum of at most {head_dim}; got {tuple(dims)}"
        )
    angles = positions.new_zeros((*positions.shape[:-1], head_dim // 2), dtype=torch.float64)
    start = 0
    for axis, d in enumerate(dims):
        exponents = torch.arange(d // 2, dtype=torch.float64, device=positions.device) * (-2 / max(d, 1))
        angles[..., start : start + d // 2] = positions[..., axis, None].double() * theta**exponents
        start += d // 2
    return angles.cos().to(dtype), angles.sin().to(dtype)
