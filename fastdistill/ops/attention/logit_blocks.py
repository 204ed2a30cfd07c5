"""Parts of the blockwise attention: blocks under a band, a value beside its tangent, and packed sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits in one block. On a CPU a block should stay in the cache; a GPU wants few and large launches.
BLOCK_SIZE = {"cpu": 1 << 20, "cuda": 1 << 24}
LEAST_ROWS = 32  # with fewer, a matmul only waits for its keys
BAND_BLOCKS = 8  # under a band at least so many: a block computes all logits that one of its rows sees

Two = tuple[Tensor | None, Tensor | None]
View = Callable[..., Any]


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the computation and of the statistics: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def sequences(cu_seqlens: tuple[Tensor, Tensor, int, int] | None) -> Iterator[tuple[View, View]]:
    """Yield how to see packed queries and keys as batches, for each run of sequences; the whole if none are packed.

    A run is neighbours of equal lengths, so a pack of equal sequences costs what their batch does.
    """
    if cu_seqlens is None:
        yield _as_they_are, _as_they_are
        return
    firsts_n, firsts_m = torch.stack(cu_seqlens[:2]).tolist()  # the one wait for the device
    lengths = [[stop - start for start, stop in itertools.pairwise(firsts)] for firsts in (firsts_n, firsts_m)]
    z = 0
    for (n, m), run in itertools.groupby(zip(*lengths)):
        count = len(list(run))
        if n > 0 and m > 0:
            yield partial(_run, firsts_n[z], count, n), partial(_run, firsts_m[z], count, m)
        z += count


def _as_they_are(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors


def _run(first: int, count: int, length: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return views (count, H, length, ...) of the packed (1, H, T, ...)."""
    parts = (None if x is None else x[0, :, first : first + count * length] for x in tensors)
    return tuple(None if part is None else part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)


class At(NamedTuple):
    """Place of a block: slices of the batch, of the heads of k, of the query rows, and of the keys that they see."""

    batch: slice
    heads: slice
    rows: slice
    columns: slice

    def size(self) -> int:
        """Return the number of logits of a head."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class SideBySide(NamedTuple):
    """Block (Z, R, W) of a tensor and its tangent, where there are any; with both also the two side by side.

    Side by side is [value | tangent], flipped to [tangent | value] for what is multiplied with that.
    """

    value: Tensor | None
    tangent: Tensor | None
    both: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """Return (Z, R, W) of the value."""
        assert self.value is not None
        return self.value.shape

    def narrow(self, rows: slice) -> SideBySide:
        """Return some of the rows."""
        return SideBySide(*(None if x is None else x[:, rows] for x in self))

    def add_product(self, a: Tensor | None, t_a: Tensor | None, x: SideBySide) -> None:
        """Add a x to the value and a t_x + t_a x to the tangent, where wanted; what meets a is one matmul if it can."""
        if a is not None and self.both is not None and x.both is not None:
            _add_matmul_(self.both, a, x.both)
        elif a is not None:
            _add_matmul_(self.value, a, x.value)
            _add_matmul_(self.tangent, a, x.tangent)
        if t_a is not None:
            _add_matmul_(self.tangent, t_a, x.value)


class Blocks:
    """Cuts the problem into blocks, brings their operands to the form (Z, rows, width), and puts results back.

    Z counts pairs of a batch entry and a head of k; rows are those of all queries that share this head. Small problems
    go many heads to a block, large ones some rows of one head. Row i sees the keys from i + low to i + high.
    """

    def __init__(self, q: Tensor, k: Tensor, masks: Two, window: tuple[int, int], lower_right: bool) -> None:
        self._dtype, self._device, self._masks = accumulator_dtype(q), q.device, masks
        self._batch, self._kv_heads, self._m, _ = k.shape
        self._group, self._n = q.shape[1] // k.shape[1], q.shape[2]
        self._size = BLOCK_SIZE["cpu" if q.device.type == "cpu" else "cuda"]
        self._memory: dict[str, Tensor] = {}

        (left, right), shift = window, self._m - self._n if lower_right else 0
        self._low = -self._n if left < 0 else max(shift - left, -self._n)
        self._high = self._m if right < 0 else min(shift + right, self._m)
        seen, self._most_rows = min(self._m, self._high - self._low + 1), self._n
        if self._low + self._n > 1 or self._high < self._m - 1:
            self._most_rows = max(LEAST_ROWS, min(self._n // BAND_BLOCKS, seen // 4))
        self._most_keys = min(self._m, seen + self._most_rows - 1)

    def heads(self) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the batch and of the heads of k: as many as fit into one block with all their logits.

        Under a narrow window, with the logits of those rows that go into one block.
        """
        rows = self._n if self._most_keys == self._m else self._most_rows
        fit = self._size // max(1, self._group * rows * self._most_keys)
        batches, heads = max(1, fit // self._kv_heads), max(1, fit)
        for b in range(0, self._batch, batches):
            for h in range(0, self._kv_heads, heads):
                yield slice(b, min(b + batches, self._batch)), slice(h, min(h + heads, self._kv_heads))

    def rows(self, heads: tuple[slice, slice]) -> list[At]:
        """Yield the blocks of these heads, of about equally many rows each; none for rows that see no key.

        The largest come first, so the buffers start at their full size.
        """
        if self._n == 0 or self._m == 0:
            return []
        width = self._group * self._most_keys * math.prod(part.stop - part.start for part in heads)
        most = min(max(self._size // width, LEAST_ROWS // self._group, 1), self._most_rows)
        step = math.ceil(self._n / math.ceil(self._n / most))
        blocks = []
        for start in range(0, self._n, step):
            stop = min(start + step, self._n)
            columns = slice(max(0, start + self._low), min(self._m, stop + self._high))
            if columns.start < columns.stop:
                blocks.append(At(*heads, slice(start, stop), columns))
        return sorted(blocks, key=At.size, reverse=True)

    def column_pair(self, name: str, x: Two, heads: tuple[slice, slice]) -> SideBySide:
        """Return k or v of these heads."""
        value, tangent = (None if part is None else part[heads] for part in x)
        return self._pair(name, (value, tangent), flip=False)

    def row_pair(self, name: str, x: Two, at: At, scale: float = 1.0) -> SideBySide:
        """Return q or a cotangent in the rows of a block, times `scale` and flipped."""
        value, tangent = (None if part is None else self._part(part, at) for part in x)
        return self._pair(name, (value, tangent), flip=True, scale=scale)

    def _pair(self, name: str, x: Two, *, flip: bool, scale: float = 1.0) -> SideBySide:
        parts = [part for part in x if part is not None]
        if not parts:
            return SideBySide(None, None, None)
        z, width = parts[0].shape[0] * parts[0].shape[1], parts[0].shape[-1]
        shape = (z, parts[0].numel() // (z * width), width)
        whole, pair = self._slots(name, shape, (x[0] is not None, x[1] is not None), flip=flip)
        for slot, part in zip((pair.value, pair.tangent), x):
            if slot is not None and part is not None:
                slot.view(part.shape).copy_(part)
        if scale != 1:
            whole.mul_(scale)
        return pair

    def sums(self, name: str, shape: Sequence[int], wants: tuple[bool, bool], *, flip: bool) -> SideBySide:
        """Return zeros (Z, R, W) where wanted; flipped if the pairs that multiply them from the right are."""
        whole, pair = self._slots(name, shape, wants, flip=flip)
        whole.zero_()
        return pair

    def _slots(
        self, name: str, shape: Sequence[int], wants: tuple[bool, bool], *, flip: bool
    ) -> tuple[Tensor, SideBySide]:
        whole = self._buffer(name, (*shape[:-1], sum(wants) * shape[-1]))
        if not all(wants):
            return whole, SideBySide(whole if wants[0] else None, whole if wants[1] else None, None)
        first, second = whole.chunk(2, dim=-1)
        return whole, SideBySide(second, first, whole) if flip else SideBySide(first, second, whole)

    def logits(self, queries: SideBySide, keys: SideBySide, at: At) -> tuple[Tensor, Tensor | None]:
        """Return S and T of a block under the mask; T is None where it is zero. The scale is in `queries`."""
        assert queries.value is not None and keys.value is not None
        shape = (*queries.value.shape[:2], keys.value.shape[1])
        logits = torch.bmm(queries.value, keys.value.mT, out=self._buffer("logits", shape))
        t_logits = _product_tangent(queries, keys, self._buffer("t_logits", shape))
        mask, t_mask = (None if x is None else self._part(x, at)[..., at.columns] for x in self._masks)
        if mask is not None:
            self._unfold(logits, at).add_(_addend(mask, self._dtype))
        if t_mask is not None:
            t_logits = self._buffer("t_logits", shape).zero_() if t_logits is None else t_logits
            self._unfold(t_logits, at).add_(t_mask)
        self._hide(self._unfold(logits, at), at)
        return logits, t_logits

    def _hide(self, logits: Tensor, at: At) -> None:
        """Write -inf outside the band: a triangle at the left end of the block's keys, and one at their right end."""
        (start, stop), (first, last) = ((part.start, part.stop) for part in (at.rows, at.columns))
        left_end, right_start = min(last, stop - 1 + self._low), max(first, start + 1 + self._high)
        if first < left_end:
            square = torch.ones(stop - start, left_end - first, dtype=torch.bool, device=self._device)
            logits[..., : left_end - first].masked_fill_(square.tril(start + self._low - first - 1), -math.inf)
        if right_start < last:
            square = torch.ones(stop - start, last - right_start, dtype=torch.bool, device=self._device)
            logits[..., right_start - first :].masked_fill_(
                square.triu(start + 1 + self._high - right_start), -math.inf
            )

    def centre_(self, x: Tensor, weights: Tensor) -> Tensor:
        """Subtract each row's weighted mean in place; returns that mean (Z, R, 1).

        The mean is itself rounded, to the size of a common mode of x, and what is left of it would be multiplied by a
        common mode of v or k. So it is taken out in two steps.
        """
        product = self._buffer("product", x.shape)
        mean = torch.mul(x, weights, out=product).sum(dim=-1, keepdim=True)
        rest = torch.mul(x.sub_(mean), weights, out=product).sum(dim=-1, keepdim=True)
        x.sub_(rest)
        return mean + rest

    def logit_gradients(
        self,
        weights: Tensor,
        z: Tensor | None,
        cotangents: SideBySide,
        values: SideBySide,
        d_statistics: Two,
        wants: tuple[bool, bool],
    ) -> Two:
        """Return dS = P (dP - rowsum(P dP) + d_lse), dP = cotangent @ v.mT, and its tangent along Z, where wanted."""
        d_lse, t_d_lse = d_statistics
        value, tangent = None, None
        if wants[1]:
            tangent = _product_tangent(cotangents, values, self._buffer("t_d_logits", weights.shape))
        if wants[0] or (wants[1] and z is not None):
            if cotangents.value is not None and values.value is not None:
                value = self._buffer("d_logits", weights.shape)
                self.centre_(torch.bmm(cotangents.value, values.value.mT, out=value), weights)
            value = self._plus("d_logits", value, d_lse, weights)
            if value is not None and wants[1] and z is not None:
                tangent = self._buffer("t_d_logits", weights.shape).zero_() if tangent is None else tangent
                tangent.addcmul_(value, z)
        if tangent is not None:
            self.centre_(tangent, weights)
        if wants[1]:
            tangent = self._plus("t_d_logits", tangent, t_d_lse, weights)
        for x in (value, tangent):
            if x is not None:
                x.mul_(weights)
        return value, tangent

    def _plus(self, name: str, x: Tensor | None, row: Tensor | None, like: Tensor) -> Tensor | None:
        if row is None:
            return x
        return self._buffer(name, like.shape).copy_(row) if x is None else x.add_(row)

    def statistic(self, x: Tensor | None, at: At, lse: Tensor) -> Tensor | None:
        """Return a block's part (Z, R, 1) of the cotangent of lse or mu; zero where a row sees no key."""
        if x is None:
            return None
        return self._part(x, at).to(self._dtype).reshape(lse.shape).masked_fill(lse == -math.inf, 0.0)

    def put(
        self, whole: Tensor | None, block: Tensor | None, at: At, scale: float = 1.0, columns: slice = slice(None)
    ) -> None:
        """Write a block's rows, times `scale`, to where they belong; of a tensor over keys, to some `columns`."""
        if whole is not None and block is not None:
            part = self._part(whole, at)
            part = part.unsqueeze(-1) if part.dim() == 4 else part[..., columns]
            part.copy_((block if scale == 1 else block * scale).reshape(part.shape))

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return uninitialised memory that all blocks share: half the peak of a fresh allocation for each."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._memory[name][:size].view(shape)

    def _part(self, x: Tensor, at: At) -> Tensor:
        return x.unflatten(1, (self._kv_heads, self._group))[at.batch, at.heads, :, at.rows]

    def _unfold(self, block: Tensor, at: At) -> Tensor:
        z, rows, width = block.shape
        batches, rows = at.batch.stop - at.batch.start, rows // self._group
        return block.view(batches, z // batches, self._group, rows, width)


def put_columns(whole: Tensor | None, block: Tensor | None, heads: tuple[slice, slice]) -> None:
    """Write what belongs to k or v of these heads."""
    if whole is not None and block is not None:
        part = whole[heads]
        part.copy_(block.reshape(part.shape))


def softmax_(logits: Tensor) -> Tensor:
    """Apply softmax in place, and return lse (Z, R, 1). A row of -inf becomes zeros, with lse = -inf."""
    row_max = logits.amax(dim=-1, keepdim=True)
    logits.sub_(row_max.masked_fill(row_max == -math.inf, 0.0)).exp_()
    total = logits.sum(dim=-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    logits.div_(total)
    return row_max + total.log()


def _product_tangent(left: SideBySide, right: SideBySide, out: Tensor) -> Tensor | None:
    """Return the tangent of left @ right.mT by the product rule; as `left` is flipped, two tangents are one matmul."""
    if left.both is not None and right.both is not None:
        return torch.bmm(left.both, right.both.mT, out=out)
    if left.tangent is not None and right.value is not None:
        return torch.bmm(left.tangent, right.value.mT, out=out)
    if left.value is not None and right.tangent is not None:
        return torch.bmm(left.value, right.tangent.mT, out=out)
    return None


def _add_matmul_(into: Tensor | None, a: Tensor, b: Tensor | None) -> None:
    if into is None or b is None:
        return
    if into.shape[0] == 1 or into.is_contiguous():
        into.baddbmm_(a, b)
    else:  # on a CPU, baddbmm_ into a strided result is a loop over the batch
        into.add_(a @ b)


def _addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the logits, of size 1 where it is broadcast: key padding costs next to nothing."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dim, 0, 1)
    addend = mask.to(dtype)
    if mask.dtype == torch.bool:
        return 1 - addend.reciprocal_()  # True -> 0, False -> -inf, in half the time of a masked fill
    return addend
