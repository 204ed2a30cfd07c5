"""Compute the angles of a rotary embedding over one or more axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastdistill.ops.protocol import checks


def rope_angles(
    positions: Sequence[int] | Tensor,
    head_dim: int,
    *,
    dims: Sequence[int] | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the angles of a rotary embedding over one or more axes (RoFormer, arXiv:2104.09864, on each axis).

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
        ValueError, TypeError: an argument breaks these rules.
    """
    if checks.whole("head_dim", head_dim, least=2) % 2:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim}")
    if not 0 < (theta := checks.number("theta", theta)) < math.inf:
        raise ValueError(f"theta: expected a positive number, got {theta}")
    if not isinstance(positions, Tensor):
        positions = _grid(positions, device)
    if positions.dim() not in (2, 3) or not positions.shape[-1]:
        raise ValueError(f"positions: expected (N, axes) or (B, N, axes), got {tuple(positions.shape)}")
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


def _grid(given: Sequence[int], device: torch.device | str | None) -> Tensor:
    """Return the positions (N, axes) of a grid's tokens, the last axis fastest."""
    sizes = list(given) if isinstance(given, Iterable) else []
    if not sizes:
        raise TypeError(f"positions: expected the sizes of a grid, such as (16, 16), or a tensor, got {given!r}")
    sizes = [checks.whole(f"positions[{axis}]", size, least=0) for axis, size in enumerate(sizes)]
    ticks = [torch.arange(size, dtype=torch.float64, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*ticks, indexing="ij"), dim=-1).flatten(0, -2)
