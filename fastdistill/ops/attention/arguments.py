"""Check the arguments of attention, refuse by name what doesn't fit, and bring them to the form that the ops take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops.protocol import checks, context

Names = tuple[str, str, str]
NAMES = ("query", "key", "value")
UNLIMITED = (-1, -1)
ALIGNMENTS = ("upper_left", "lower_right")
LARGEST = 2**31 - 1  # of a position, which kernels count in 32 bits


class Layout(NamedTuple):
    """Shape that the dimensions of query, key and value before the last two broadcast to.

    Attributes:
        lead: those of the result, (..., H); () where none of the three has any.
        heads: of query in the op, H.
        kv_heads: of key and value in the op, a divisor of H.
    """

    lead: tuple[int, ...]
    heads: int
    kv_heads: int

    def queries(self, x: Tensor | None) -> Any:
        """Return the query or its tangent as (B, H, N, D)."""
        return self._folded(x, self.heads)

    def keys(self, x: Tensor | None) -> Any:
        """Return the key, the value or a tangent of theirs as (B, Hkv, M, dim)."""
        return self._folded(x, self.kv_heads)

    def _folded(self, x: Tensor | None, heads: int) -> Tensor | None:
        if x is None:
            return None
        if x.dim() == 2:
            x = x.unsqueeze(0)
        if not self.heads:
            return self._without_heads(x)
        if x.shape[-3] != heads:
            times = heads // x.shape[-3]
            x = x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)
        if x.shape[:-3] != self.lead[:-1]:
            x = x.expand(*self.lead[:-1], *x.shape[-3:])
        if x.dim() == 4:
            return x
        return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask as (B|1, H|1, N|1, M|1); batch dimensions expand only where several have to be merged."""
        if mask is None:
            return None
        missing = max(len(self.lead) + 2, 4) - mask.dim()
        if missing:
            mask = mask.reshape((1,) * missing + tuple(mask.shape))
        if not self.heads:
            return self._without_heads(mask)
        if mask.dim() == 4:
            return mask
        if mask.shape[:-3].numel() > 1:
            mask = mask.expand(*self.lead[:-1], *mask.shape[-3:])
        return mask.flatten(0, -4)

    def _without_heads(self, x: Tensor) -> Tensor:
        """Return an empty batch of one head each, because the ops want at least one."""
        return x.expand(*self.lead, *x.shape[-2:]).flatten(0, -3).unsqueeze(1)

    def unfolded(self, x: Tensor) -> Tensor:
        """Return what the op returns, (B, H, ...), with the dimensions of the result."""
        return x.reshape(*self.lead, *x.shape[2:])


FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def plain_layout(q: Any, k: Any, v: Any, attn_mask: Any, options: Sequence[object]) -> Layout | None:
    """Return the layout of the common call, which needs no other check; None for any other, which may be refused.

    All are (B, H, length, dim) of one dtype and device, with one number of heads; there is no mask and no autocast, and
    the options are bools.
    """
    if attn_mask is not None or not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    of_q, of_k, of_v, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    if not len(of_q) == len(of_k) == len(of_v) == 4 or not dtype == k.dtype == v.dtype or dtype not in FLOATS:
        return None
    if of_k[:2] != of_q[:2] or of_k[3] != of_q[3] or of_v[:3] != of_k[:3] or not (of_q[1] and of_q[3] and of_v[3]):
        return None
    if not device == k.device == v.device or context.autocast_dtype(device) is not None:
        return None
    if [option for option in options if option is not True and option is not False]:
        return None
    return Layout(tuple(of_q[:2]), of_q[1], of_q[1])


def layout(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, names: Names = NAMES) -> Layout:
    """Return how query (..., H, N, D), key (..., Hk, M, D) and value (..., Hv, M, Dv) broadcast, or refuse them.

    names: what errors call the three.
    """
    checks.check_bool("enable_gqa", enable_gqa)
    shapes = q.shape, k.shape, v.shape
    for name, shape in zip(names, shapes):
        if len(shape) < 2:
            raise ValueError(f"{name}: expected (..., length, dim), at least two dimensions, got {tuple(shape)}")
        if shape[-1] < 1:
            raise ValueError(f"{name}: expected a head dim of at least 1, got {shape[-1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{names[1]}: expected head dim {q.shape[-1]} as {names[0]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"{names[2]}: expected length {k.shape[-2]} as {names[1]}, got {v.shape[-2]}")
    batches = [shape[:-3] for shape in shapes]
    batch = batches[0] if batches[0] == batches[1] == batches[2] else _broadcast(shapes, names)
    heads, k_heads, v_heads = (shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    if not heads == k_heads == v_heads:
        heads, kv_heads = _common_heads((heads, k_heads, v_heads), enable_gqa, names)
    else:
        kv_heads = heads
    lead = () if max(map(len, shapes)) == 2 else (*batch, heads)
    return Layout(lead, heads, kv_heads) if heads else Layout(lead, 0, 0)


def _broadcast(shapes: Sequence[torch.Size], names: Names) -> tuple[int, ...]:
    """Return the batch dimensions that all broadcast to."""
    batch: list[int] = []
    for name, shape in zip(names, shapes):
        own = shape[:-3]
        batch[:0] = [1] * (len(own) - len(batch))
        for i in range(1, len(own) + 1):
            if batch[-i] == 1:
                batch[-i] = own[-i]
            elif own[-i] not in (1, batch[-i]):
                raise ValueError(
                    f"{name}: expected batch dimensions that broadcast with {tuple(batch)}, got {tuple(own)} "
                    f"of shape {tuple(shape)}"
                )
    return tuple(batch)


def _common_heads(counts: tuple[int, int, int], enable_gqa: bool, names: Names) -> tuple[int, int]:
    """Return (H, Hkv) for different numbers of heads: those of key and value repeat to a common multiple."""
    heads, k_heads, v_heads = counts
    for name, own in zip(names[1:], counts[1:]):
        if enable_gqa:
            if not own or not heads or heads % own:
                raise ValueError(f"{name}: expected a divisor of the {heads} heads of {names[0]}, got {own}")
        elif heads == 1:
            heads = own
        elif own not in (1, heads):
            raise ValueError(f"{name}: expected {heads} heads as {names[0]}, or 1 (or enable_gqa=True), got {own}")
    if k_heads == v_heads:
        return heads, k_heads
    return heads, max(k_heads, v_heads) if 1 in (k_heads, v_heads) else math.lcm(k_heads, v_heads)


def check_padded(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, to: Layout, is_causal: bool, names: Names = NAMES
) -> None:
    """Refuse keys, values and masks of another dtype or device, and a mask that doesn't broadcast to the logits."""
    checks.check_like(names[1], k, names[0], q)
    checks.check_like(names[2], v, names[0], q)
    checks.check_bool("is_causal", is_causal)
    if attn_mask is not None:
        _check_mask(attn_mask, q, (*to.lead, q.shape[-2], k.shape[-2]), names[0])


def _check_mask(mask: Tensor, q: Tensor, full: tuple[int, ...], query: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        wide = "" if q.dtype == torch.float32 else ", torch.float32"
        raise TypeError(f"attn_mask: expected torch.bool{wide} or {q.dtype} as {query}, got {mask.dtype}")
    checks.check_like("attn_mask", mask, query, q, dtype=False)
    beyond = mask.dim() - len(full)
    if beyond > 0 or any(size not in (1, full[i - beyond]) for i, size in enumerate(mask.shape)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")


def checked_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    longest: tuple[int, int],
    enable_gqa: bool,
    names: Names = NAMES,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return packed sequences, (tokens, H, dim), as a batch of one, and their bounds, which the op narrows later."""
    checks.check_bool("enable_gqa", enable_gqa)
    for name, x in zip(names, (q, k, v)):
        checks.check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name}: expected packed sequences (tokens, H, dim), got {tuple(x.shape)}")
        checks.check_like(name, x, names[0], q)
    _check_dims(q, k, v, enable_gqa, names)
    cu_q, cu_k = checked_bounds(cu_q, cu_k, q)
    for name, length in zip(("max_q", "max_k"), longest, strict=True):
        if not isinstance(length, int | torch.SymInt) or not 0 <= length <= LARGEST:
            raise ValueError(f"{name}: expected the length of the longest sequence, at most {LARGEST}, got {length}")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return q, k, v, cu_q, cu_k


def checked_bounds(cu_q: Tensor, cu_k: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of packed sequences; those of the keys are those of the queries unless given."""
    cu_k = cu_q if cu_k is None else cu_k
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1:
            got = f"{cu.dtype} of {tuple(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
            raise ValueError(f"{name}: expected a one-dimensional tensor of int32 or int64, got {got}")
        checks.check_like(name, cu, "query", q, dtype=False)
        if cu.shape[0] < 1 or cu.shape != cu_q.shape:
            raise ValueError(f"{name}: expected one bound more than sequences, as cu_seq_q, got {cu.shape[0]}")
    return cu_q, cu_k


def _check_dims(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, names: Names) -> None:
    """Check the heads, lengths and head dims of packed sequences."""
    query, key, value = names
    for name, x in ((query, q), (value, v)):
        if x.shape[-1] < 1:
            raise ValueError(f"{name}: expected a head dim of at least 1, got {x.shape[-1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{key}: expected head dim {q.shape[-1]} as {query}, got {k.shape[-1]}")
    (length, kv_heads, _), heads = k.shape, q.shape[1]
    if tuple(v.shape[:2]) != (length, kv_heads):
        expected, got = (kv_heads, length), (v.shape[1], v.shape[0])
        raise ValueError(f"{value}: expected heads and length {expected} as {key}, got {got}")
    if not heads or not kv_heads:
        raise ValueError(f"{query}, {key}: expected at least one head, got {heads} and {kv_heads}")
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        hint = f"a divisor of {heads}" if enable_gqa else f"{heads} as {query} (or enable_gqa=True)"
        raise ValueError(f"{key}: expected {hint} heads, got {kv_heads}")


def band(window_size: Any, is_causal: bool, align: str, square: bool) -> tuple[int, int, bool]:
    """Return (left, right, lower_right) of a band; where there are as many keys as queries the alignments are one."""
    if align not in ALIGNMENTS:
        raise ValueError(f"align: expected one of {', '.join(map(repr, ALIGNMENTS))}, got {align!r}")
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    left, right = window_size if pair else (None, None)
    if not isinstance(left, int) or not isinstance(right, int) or left < -1 or right < -1:
        raise ValueError(
            f"window_size: expected (left, right), each at least 0, or -1 for no limit; got {window_size!r}"
        )
    left, right = (left if left < LARGEST else -1), (right if right < LARGEST else -1)  # beyond any sequence's end
    if is_causal:
        right = 0
    return left, right, align == "lower_right" and (left, right) != (-1, -1) and not square


def lowered(*tensors: Any) -> list[Any]:
    """Cast arguments to autocast's dtype, where it is on; float64 and bool stay, and all do if the first is float64."""
    first = tensors[0]
    lowers = isinstance(first, Tensor) and first.dtype != torch.float64
    dtype = context.autocast_dtype(first.device) if lowers else None
    return [
        x if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64
        else x.to(dtype)
        for x in tensors
    ]  # fmt: skip


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the softmax scale: 1/sqrt(D) unless given, as a number: a tensor's gradient would be lost."""
    if scale is not None and not isinstance(scale, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(
            f"scale: expected a number or None, got {type(scale).__name__}; multiply the query by it instead"
        )
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
