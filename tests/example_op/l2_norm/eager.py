"""Compute the L2 norm with its tangent and both backward passes, in plain PyTorch, in float32 or better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.l2_norm.second_order import gradients, tangent
from fastdistill.ops.protocol.pair import Needs, Pair, Pairs


def l2_norm_forward(inputs: Pairs, *, eps: float) -> tuple[list[Pair], tuple[()]]:
    """Return ((y, t_y),), in x's dtype, and no residuals."""
    (x, t_x) = inputs[0]
    return [_rounded(Pair(*tangent(*_wide(x, t_x), eps)), x)], ()


def l2_norm_backward(cotangents: Pairs, inputs: Pairs, saved: Any, *, eps: float, needs: Needs) -> list[Pair]:
    """Return ((dx, dt_x),), those that are needed, in x's dtype."""
    (x, t_x) = inputs[0]
    found = gradients(*_wide(x, t_x), *_wide(*cotangents[0]), eps)
    filled = (torch.zeros_like(x) if grad is None else grad for grad in found)
    return [_rounded(Pair(*(grad if need else None for grad, need in zip(filled, needs[0]))), x)]


def _wide(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _rounded(pair: Pair, like: Tensor) -> Pair:
    return Pair(*(None if x is None else x.to(like.dtype) for x in pair))
