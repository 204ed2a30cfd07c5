"""The arguments of attention, refused by name where they don't fit, and brought to the form that the ops take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _choice

ALIGNMENTS = ("upper_left", "lower_right")
LARGEST = 2**31 - 1  # of a position, which kernels count in 32 bits


def checked(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of a padded batch, (..., H, length, dim), folded to four dimensions."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        _choice.check_tensor(name, x)
        if x.dim() < 3 or x.dim() != q.dim():
            raise ValueError(f"{name}: expected (..., H, length, dim) with as many dimensions as query, got {x.shape}")
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"{name}: expected batch dimensions {tuple(q.shape[:-3])} as query, got {tuple(x.shape)}")
        _choice.check_like(name, x, "query", q)
    _check_dims(q, k, v, -3, -2, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, q, k, is_causal)
    return (*map(four_dims, (q, k, v)), mask_four_dims(attn_mask, q))


def checked_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, longest: tuple[int, int], enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed sequences, (tokens, H, dim), as a batch of one, and their bounds, which the op narrows once it checked."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        _choice.check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name}: expected packed sequences (tokens, H, dim), got {tuple(x.shape)}")
        _choice.check_like(name, x, "query", q)
    _check_dims(q, k, v, -2, -3, enable_gqa)
    cu_q, cu_k = checked_bounds(cu_q, cu_k, q)
    for name, length in zip(("max_q", "max_k"), longest, strict=True):
        if not isinstance(length, int | torch.SymInt) or not 0 <= length <= LARGEST:
            raise ValueError(f"{name}: expected the length of the longest sequence, at most {LARGEST}, got {length}")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return q, k, v, cu_q, cu_k


def checked_bounds(cu_q: Tensor, cu_k: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of packed sequences; those of the keys are those of the queries unless given."""
    cu_k = cu_q if cu_k is None else cu_k
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1:
            got = f"{cu.dtype} of {tuple(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
            raise ValueError(f"{name}: expected a one-dimensional tensor of int32 or int64, got {got}")
        _choice.check_like(name, cu, "query", q, dtype=False)
        if cu.shape[0] < 1 or cu.shape != cu_q.shape:
            raise ValueError(f"{name}: expected one bound more than sequences, as cu_seq_q, got {cu.shape[0]}")
    return cu_q, cu_k


def _check_dims(q: Tensor, k: Tensor, v: Tensor, head: int, length: int, enable_gqa: bool) -> None:
    """Heads, lengths and head dims; `head` and `length` say where in the shape the first two are."""
    for name, x in (("query", q), ("value", v)):
        if x.shape[-1] < 1:
            raise ValueError(f"{name}: expected a head dim of at least 1, got {x.shape[-1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"key: expected head dim {q.shape[-1]} as query, got {k.shape[-1]}")
    if (v.shape[head], v.shape[length]) != (k.shape[head], k.shape[length]):
        expected = (k.shape[head], k.shape[length])
        raise ValueError(f"value: expected heads and length {expected} as key, got {(v.shape[head], v.shape[length])}")
    heads, kv_heads = q.shape[head], k.shape[head]
    if not heads or not kv_heads:
        raise ValueError(f"query, key: expected at least one head, got {heads} and {kv_heads}")
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        hint = f"a divisor of {heads}" if enable_gqa else f"{heads} as query (or enable_gqa=True)"
        raise ValueError(f"key: expected {hint} heads, got {kv_heads}")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, is_causal: bool) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor or None, got {type(mask).__name__}")
    if is_causal:
        raise ValueError("attn_mask: expected None with is_causal=True, got a tensor; merge the two masks")
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        raise TypeError(f"attn_mask: expected torch.bool or {q.dtype} as query, got {mask.dtype}")
    _choice.check_like("attn_mask", mask, "query", q, dtype=False)
    full = (*q.shape[:-1], k.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == torch.Size(full)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")


def band(window_size: Any, is_causal: bool, align: str, square: bool) -> tuple[int, int, bool]:
    """(left, right, lower_right) of a band; where there are as many keys as queries the alignments are one."""
    if align not in ALIGNMENTS:
        raise ValueError(f"align: expected one of {', '.join(map(repr, ALIGNMENTS))}, got {align!r}")
    sides = tuple(window_size) if isinstance(window_size, tuple | list) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or side < -1 for side in sides):
        raise ValueError(
            f"window_size: expected (left, right), each at least 0, or -1 for no limit; got {window_size!r}"
        )
    left, right = (side if side < LARGEST else -1 for side in sides)  # beyond the last position of any sequence
    if is_causal:
        right = 0
    return left, right, align == "lower_right" and (left, right) != (-1, -1) and not square


def four_dims(x: Tensor | None) -> Any:
    """(..., H, length, dim) as (B, H, length, dim)."""
    if x is None or x.dim() == 4:
        return x
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)


def mask_four_dims(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as (B|1, H|1, N|1, M|1); its batch dimensions are expanded only where several have to be merged."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * max(q.dim() - mask.dim(), 4 - mask.dim(), 0) + tuple(mask.shape))
    if q.dim() <= 4:
        return mask
    lead = mask.shape[:-3]
    return mask.flatten(0, -4) if lead.numel() == 1 else mask.expand(*q.shape[:-3], *mask.shape[-3:]).flatten(0, -4)


def lowered(*tensors: Any) -> list[Any]:
    """What autocast, where it is on, makes of arguments: float64 and masks of bool stay."""
    dtype = _choice.autocast_dtype(tensors[0].device) if isinstance(tensors[0], Tensor) else None
    return [
        x if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64
        else x.to(dtype)
        for x in tensors
    ]  # fmt: skip


def scale_of(q: Tensor, scale: float | None) -> float:
    """The softmax scale: 1/sqrt(D) unless given, as a number: a tensor's gradient would be lost."""
    if scale is not None and not isinstance(scale, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(
            f"scale: expected a number or None, got {type(scale).__name__}; multiply the query by it instead"
        )
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
