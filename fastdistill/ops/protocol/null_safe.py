"""Sums and products in which None is a zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulated(tensors: Any) -> Any:
    """Return 16-bit tensors in float32; masks and None stay as they are."""
    low = (torch.bfloat16, torch.float16)
    return tuple(x.float() if x is not None and x.dtype in low else x for x in tensors)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b."""
    return b if a is None else a if b is None else a + b


def times(a: Tensor | None, b: Tensor | float | None) -> Tensor | None:
    """Return a * b, elementwise."""
    return None if a is None or b is None else a * b


def matmul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a @ b."""
    return None if a is None or b is None else a @ b


def transposed(x: Tensor | None) -> Tensor | None:
    """Return x.mT."""
    return None if x is None else x.mT
