"""Pairs of a value and its directional derivative, and their arithmetic, in which None is a zero.

Every implementation of an op, in PyTorch or Triton, takes and returns pairs:

    <op>_forward(inputs, **options) -> (outputs, residuals)
    <op>_backward(cotangents, inputs, saved, **options, needs) -> gradients

`inputs` are the op's tensor arguments in its one order, (x, t_x) each; `outputs` are (y, t_y); `cotangents` are
(dy, dt_y) and `gradients` are (dx, dt_x). `needs` says of each gradient whether it is wanted, in pairs as well. The
`residuals` are what the forward leaves for the backward besides its outputs, and `saved` is (outputs, residuals).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Primal and tangent, or the gradients of the two. A primal of None is an absent argument."""

    primal: Any
    tangent: Tensor | None = None


Pairs = Sequence[Pair]
Needs = Sequence[tuple[bool, bool]]

ABSENT = Pair(None)

# A named tuple is made by a Python function; this makes one without, for the dispatcher's path.
pair_of = partial(tuple.__new__, Pair)


def paired(primals: Iterable[Any], tangents: Iterable[Any]) -> list[Any]:
    """Return the pairs of each primal and its tangent."""
    return list(map(pair_of, zip(primals, tangents)))


def flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Return all primals and then all tangents: the inverse of `paired`."""
    primals, tangents = zip(*pairs)
    return [*primals, *tangents]


def moves(pairs: Iterable[tuple[Any, Any]]) -> bool:
    """Return whether any tangent is there."""
    return any([tangent is not None for _, tangent in pairs])


def without_tangents(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the primals alone."""
    return [Pair(primal) for primal, _ in pairs]


def is_absent(tensor: Tensor) -> bool:
    """Return whether `tensor` stands for `None` in a schema whose results are all tensors: it is empty and flat."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


def accumulated(tensors: Iterable[Any]) -> Any:
    """Return 16-bit tensors in float32; masks and None stay as they are."""
    low = (torch.bfloat16, torch.float16)
    return tuple(x.float() if x is not None and x.dtype in low else x for x in tensors)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b."""
    return b if a is None else a if b is None else a + b


def times(a: Tensor | None, b: Tensor | float | None) -> Tensor | None:
    """Return a * b, elementwise."""
    return None if a is None or b is None else a * b


def add_product(addend: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return addend + a * b, elementwise and in one pass."""
    if a is None or b is None:
        return addend
    return a * b if addend is None else torch.addcmul(addend, a, b)


def write_add_product(out: Tensor, addend: Tensor | None, a: Tensor | None, b: Tensor | None) -> None:
    """Write addend + a * b, elementwise and in one pass, over `out`, whose dtype may be narrower."""
    if a is not None and b is not None:
        torch.mul(a, b, out=out) if addend is None else torch.addcmul(addend, a, b, out=out)
    elif addend is not None:
        out.copy_(addend)
    else:
        out.zero_()


def matmul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a @ b."""
    return None if a is None or b is None else a @ b


def add_matmul(addend: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return addend + a @ b of matrices, written over the addend."""
    if a is None or b is None:
        return addend
    return a @ b if addend is None else addend.addmm_(a, b)


def transposed(x: Tensor | None) -> Tensor | None:
    """Return x.mT."""
    return None if x is None else x.mT


def cast(x: Tensor | None, dtype: torch.dtype) -> Any:
    """Return x in that dtype."""
    return None if x is None else x.to(dtype)


def affine(x: Pair, factor: Pair, addend: Pair = ABSENT) -> Pair:
    """Return x * factor + addend by the product rule; a factor of None is one, an addend of None is zero."""
    if factor.primal is None:
        return Pair(add(x.primal, addend.primal), add(x.tangent, addend.tangent))
    tangent = add_product(add_product(addend.tangent, x.primal, factor.tangent), x.tangent, factor.primal)
    return Pair(add_product(addend.primal, x.primal, factor.primal), tangent)


def needed(gradients: Iterable[Pair], inputs: Pairs, needs: Needs) -> list[Pair]:
    """Return the gradients that are wanted, each like its primal in shape and dtype; a wanted one of None is zero."""
    return [
        Pair(*[_like(primal, grad) if need else None for grad, need in zip(pair, wants, strict=True)])
        for pair, (primal, _), wants in zip(gradients, inputs, needs, strict=True)
    ]


def _like(primal: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if primal is None:
        return None
    if grad is None:
        return primal.new_zeros(primal.shape)
    return cast(grad if grad.shape == primal.shape else grad.reshape(primal.shape), primal.dtype)
