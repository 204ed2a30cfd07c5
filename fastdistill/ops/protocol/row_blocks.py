"""Elementwise and rowwise work in blocks that stay in the cache, and what collects their results.

A large temporary costs more than the arithmetic on it: 3 ns an element where a pass over a block in the cache takes
0.2 to 0.5 ns (benchmarks/results/NOTES.md). So whatever needs temporaries runs block by block, and only results
are large. On a GPU blocks are few, and bound the memory of the temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol.pair import Needs, Pair, Pairs

# Elements of one block: for each thread of a CPU, which shares out a block among its threads, and for a GPU.
BLOCK_SIZE = {"cpu": 1 << 17, "cuda": 1 << 25}
At = tuple[slice, ...]  # the part of the two leading dimensions that a block is; empty for the whole


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which everything is computed: float32, or float64 where there is any."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def block_size(device: torch.device) -> int:
    """Return how many elements a block has."""
    return BLOCK_SIZE["cpu"] * torch.get_num_threads() if device.type == "cpu" else BLOCK_SIZE["cuda"]


def row_blocks(x: Tensor, *, by_sample: bool = False) -> list[At]:
    """Return where the blocks of x (B, T, ...) lie: some b with all their t, or some t of one b; or one empty `At`.

    Rows, the last dimension, are never cut. `by_sample`: no block has more than one b.
    """
    size, inner = block_size(x.device), math.prod(x.shape[2:])
    if x.numel() <= size and not by_sample:
        return [()]
    rows = max(1, size // inner)
    if rows >= x.shape[1] and not by_sample:
        return [(part, slice(None)) for part in _cuts(x.shape[0], rows // x.shape[1])]
    return [(slice(b, b + 1), part) for b in range(x.shape[0]) for part in _cuts(x.shape[1], rows)]


def _cuts(length: int, most: int) -> list[slice]:
    """Return about equal parts, of `most` at most."""
    step = math.ceil(length / math.ceil(length / most))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def part(x: Tensor | None, at: At) -> Tensor | None:
    """Return a block of (B or 1, T or 1, ...); of a vector, and of nothing, the whole."""
    if x is None or not at or x.dim() == 1:
        return x
    return x[tuple(slice(None) if size == 1 else where for size, where in zip(x.shape, at))]


def elements(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Yield blocks of tensors of one shape, any strides, and None for what isn't there."""
    given = [x for x in tensors if x is not None]
    if given[0].numel() <= block_size(given[0].device):
        yield list(tensors)
        return
    if all(x.is_contiguous() for x in given):
        views = [None if x is None else x.view(-1, 1) for x in tensors]
    else:
        lead = (None,) * max(0, 2 - given[0].dim())
        views = [None if x is None else x[lead] for x in tensors]
    like = next(x for x in views if x is not None)
    for at in row_blocks(like):
        yield [part(x, at) for x in views]


class Rows:
    """Result of which each block gives a part."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self.whole: Tensor | None = None

    def put(self, block: Tensor, at: At, taken: set[int]) -> None:
        """Take a block's part. One that is the whole becomes the result itself, unless its memory is `taken`."""
        if not at and block.shape == self._shape:
            whole = block.to(self._dtype).contiguous()
            if memory(whole) not in taken:
                taken.add(memory(whole))
                self.whole = whole
                return
        if self.whole is None:
            self.whole = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self.whole[at].copy_(block)


class Gradient:
    """Gradient like an argument: parts of it, and sums where it was broadcast over the rows (B, T, ...)."""

    def __init__(self, like: Tensor, rows: Tensor) -> None:
        self._like, self._summed = like, like.shape != rows.shape
        self._rows = Rows(like.shape, like.dtype, like.device)
        self._sum: Tensor | None = None

    def put(self, grad: Tensor, at: At, taken: set[int]) -> None:
        """Take a block's part, in the shape of the rows or already summed."""
        if self._summed:
            like = part(self._like, at)
            assert like is not None
            grad = grad.sum_to_size(like.shape)
            if at:
                if self._sum is None:
                    self._sum = torch.zeros(self._like.shape, dtype=grad.dtype, device=grad.device)
                target = part(self._sum, at)
                assert target is not None
                target.add_(grad)
                return
        self._rows.put(grad, at, taken)

    def result(self) -> Tensor:
        """Return the gradient once all blocks are in: zeros if none was."""
        whole = self._rows.whole if self._sum is None else self._sum.to(self._like.dtype)
        return self._like.new_zeros(self._like.shape) if whole is None else whole


class Gradients:
    """Gradients of some arguments and of their tangents, in pairs, as `needs` says."""

    def __init__(self, inputs: Pairs, needs: Needs, rows: Tensor, cotangents: Pairs) -> None:
        self._found = [
            tuple(Gradient(like, rows) if need and like is not None else None for need in pair)
            for (like, _), pair in zip(inputs, needs, strict=True)
        ]
        self._taken = memories(cotangents)

    def put(self, block: Pairs, at: At) -> None:
        """Take those of a block; None is zero. They may share memory with the cotangents, and with each other."""
        for gradients, grads in zip(self._found, block, strict=True):
            for gradient, grad in zip(gradients, grads):
                if gradient is not None and grad is not None:
                    gradient.put(grad, at, self._taken)

    def results(self) -> list[Pair]:
        """Return all, once all blocks are in."""
        return [Pair(*(None if x is None else x.result() for x in gradients)) for gradients in self._found]


def parts(pairs: Pairs, at: At) -> list[Pair]:
    """Return a block of each pair, as `part` does of one tensor."""
    return [Pair(part(primal, at), part(tangent, at)) for primal, tangent in pairs]


def memories(pairs: Pairs) -> set[int]:
    """Return what identifies the memories of some pairs."""
    return {memory(x) for pair in pairs for x in pair if x is not None}


def memory(x: Tensor) -> int:
    """Return what identifies the memory of a tensor."""
    return x.untyped_storage().data_ptr()
