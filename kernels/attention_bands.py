"""Say which query meets which key: packed sequences, bands (causal, sliding windows) and the live tiles of masks.

README.md says more under "Masks, bands and packed sequences".
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNLIMITED = tl.constexpr(1 << 30)  # It is longer than any sequence, and twice it still fits 32 bits.


class Problem(NamedTuple):
    """Problem of a launch. n queries and m keys are those of the longest sequence where sequences are packed.

    Query i sees the keys from i + shift - left to i + shift + right; None is no limit on that side. A head of q has
    `rows` rows, those of all sequences.
    """

    heads: int
    group: int
    n: int
    m: int
    rows: int
    left: int | None
    right: int | None
    cu_n: Tensor | None
    cu_m: Tensor | None


class Tiles(NamedTuple):
    """Tiles of a mask that are live: the others hide all they cover.

    `live` lists the live tiles of each row of tiles, in order; `before` says how many of them come before each tile,
    and how many there are. The strides are in rows of tiles.
    """

    live: Any
    before: Any
    stride_b: int
    stride_h: int
    stride_row: int
    width: int


def problem_of(
    q: Tensor, k: Tensor, window: tuple[int, int], cu_seqlens: tuple[Tensor, Tensor, int, int] | None
) -> Problem:
    """Return the problem that q (B, H, N, D), k (B, Hkv, M, D), a window and packed sequences pose.

    A side of the window, -1 or any limit that no query of these lengths could reach, is None.
    """
    cu_n, cu_m, n, m = cu_seqlens or (None, None, q.shape[2], k.shape[2])
    left, right = (side if 0 <= side < max(n, m) else None for side in window)
    return Problem(q.shape[1], q.shape[1] // k.shape[1], n, m, q.shape[2], left, right, cu_n, cu_m)


def sequences(q: Tensor, problem: Problem) -> int:
    """Return how many sequences there are: one a sample or, packed in one sample, as many as the bounds say."""
    return q.shape[0] if problem.cu_n is None else problem.cu_n.shape[0] - 1


@triton.jit
def first_row(P, b, h, first):
    """Return the 64-bit index, in a contiguous (B, H, rows) tensor, of row `first` of head h of sample b."""
    return (b.to(tl.int64) * P.heads + h) * P.rows + first


@triton.jit
def locate(P, z):
    """Return of sequence z: the sample it lies in, its first query and their number, its first key and their number."""
    if P.cu_n is not None:
        first_n, first_m = tl.load(P.cu_n + z), tl.load(P.cu_m + z)
        return z * 0, first_n, tl.load(P.cu_n + z + 1) - first_n, first_m, tl.load(P.cu_m + z + 1) - first_m
    else:
        return z, z * 0, z * 0 + P.n, z * 0, z * 0 + P.m


@triton.jit
def band(P, n, m, LOWER_RIGHT: tl.constexpr):
    """Return (low, high): query i sees the keys from i + low to i + high.

    LOWER_RIGHT: the last query meets the last key.
    """
    low, high = n * 0 - UNLIMITED, n * 0 + UNLIMITED
    shift = m - n if LOWER_RIGHT else n * 0
    if P.left is not None:
        low = shift - P.left
    if P.right is not None:
        high = shift + P.right
    return low, high


@triton.jit
def visible(start, low, high, length, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return the tiles of STEP that rows start ... start + BLOCK - 1 see: (begin, whole_begin, whole_end, end).

    All are in elements. Row i sees i + low ... i + high of `length` others. Nothing outside [begin, end) is seen by any
    of these rows, and tiles that start in [whole_begin, whole_end) are seen whole by all of them. For a key's queries,
    call it with (-high, -low).
    """
    begin = tl.maximum(start + low, 0) // STEP * STEP
    end = tl.minimum(start + BLOCK + high, length)
    whole_begin = tl.cdiv(tl.maximum(start + BLOCK - 1 + low, 0), STEP) * STEP
    whole_end = tl.maximum(tl.minimum(start + high + 1, length), 0) // STEP * STEP
    return begin, whole_begin, whole_end, end


@triton.jit
def live_between(T, b, h, row, begin, end, STEP: tl.constexpr):
    """Return (list, first, last): list[first] ... list[last - 1] are the live tiles of STEP within [begin, end)."""
    line = b.to(tl.int64) * T.stride_b + h.to(tl.int64) * T.stride_h + row.to(tl.int64) * T.stride_row
    before = T.before + line * (T.width + 1)
    first = tl.load(before + tl.minimum(begin // STEP, T.width))
    last = tl.load(before + tl.minimum(tl.cdiv(tl.maximum(end, 0), STEP), T.width))
    return T.live + line * T.width, first, last


def live_tiles(mask: Tensor, block_row: int, block_col: int) -> Tiles:
    """Return the tiles, block_row by block_col, of a (B, H, rows, columns) mask that do not hide everything.

    The mask is bool or float.

    Broadcast dimensions (stride 0) stay broadcast, so a padding mask is looked at once a sample.
    """
    shape = mask.shape
    mask = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
    largest = _most(_most(mask, 3, block_col, shape[3]), 2, block_row, shape[2])
    live = largest if largest.dtype == torch.bool else largest != float("-inf")
    width = triton.cdiv(shape[3], block_col)
    live = live.expand(*live.shape[:3], width)
    tiles = torch.arange(width, dtype=torch.int32, device=mask.device)
    listed = torch.where(live, tiles, width).sort(3).values.contiguous()
    before = torch.nn.functional.pad(live.cumsum(3, dtype=torch.int32), (1, 0)).contiguous()
    stride_b, stride_h, stride_row = (
        0 if size == 1 else stride // (width + 1) for size, stride in zip(live.shape[:3], before.stride())
    )
    return Tiles(listed, before, stride_b, stride_h, stride_row, width)


def _most(mask: Tensor, dim: int, size: int, length: int) -> Tensor:
    """Return the largest entry of each tile of `size` along a dimension; one broadcast to `length` stays as it is."""
    if mask.shape[dim] != length:
        return mask
    whole = length // size * size
    tiles = mask.narrow(dim, 0, whole).unflatten(dim, (whole // size, size))
    rest = mask.narrow(dim, whole, length - whole).unsqueeze(dim)
    parts = [part for part in (tiles, rest) if part.numel()]
    return torch.cat([part.any(dim + 1) if part.dtype == torch.bool else part.amax(dim + 1) for part in parts], dim)
