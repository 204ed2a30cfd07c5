"""Test the public ops with impl="triton" on shapes and masks that the op must prepare for the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import assert_accurate, make_qkv

from .device import DEVICE

attention = partial(fd.scaled_dot_product_attention, impl="triton")


def graded(out: Tensor, t_out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return value, tangent, and the gradients of a loss of both."""
    gradients = torch.autograd.grad((out.sin() * t_out).sum(), leaves)
    return [x.detach() for x in (out, t_out, *gradients)]


def mixed(op: Any, leaves: list[Tensor]) -> list[Tensor]:
    half = len(leaves) // 2
    return graded(*jvp(op, tuple(leaves[:half]), tuple(leaves[half:])), leaves)


# No batch; a batch and heads that broadcast, in keys and then in queries; heads of key and value that differ.
SHAPES = [
    ((18, 16), (20, 16), (20, 16), False),
    ((2, 2, 18, 16), (1, 1, 20, 16), (2, 20, 16), False),
    ((1, 1, 18, 16), (2, 2, 20, 16), (2, 1, 20, 16), False),
    ((1, 6, 18, 16), (1, 3, 20, 16), (1, 2, 20, 16), True),
]


@pytest.mark.parametrize(("q", "k", "v", "gqa"), SHAPES, ids=str)
def test_broadcast_dimensions_reach_the_kernels(q: Any, k: Any, v: Any, gqa: bool) -> None:
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in (q, k, v) * 2]
    exact = [x.detach().double().requires_grad_() for x in leaves]

    def plain(*x: Tensor) -> Tensor:
        keys, values = (y.repeat_interleave(q[-3] // y.shape[-3], -3) if gqa else y for y in x[1:])
        logits = x[0] @ keys.mT / 4
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=DEVICE).tril()
        return torch.softmax(logits.masked_fill(~seen, -torch.inf), -1) @ values

    found = mixed(partial(attention, is_causal=True, enable_gqa=gqa), leaves)
    pair = fd.attention_jvp(*leaves, is_causal=True, enable_gqa=gqa, tangent_grad=True, impl="triton")
    for i, (x, y, truth, base) in enumerate(
        zip(found, graded(*pair, leaves), mixed(plain, exact), mixed(plain, leaves), strict=True)
    ):
        assert_accurate(x, truth, base, name=f"result {i}", order=1 if i < 2 else 2)
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["mask", "mask-causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_float32_mask_with_its_tangent_serves_every_dtype(dtype: torch.dtype, causal: bool) -> None:
    """Check it beside 16-bit queries too, and under the causal band; its gradients are float32."""
    make = partial(make_qkv, batch=1, heads=2, n=18, m=20, d=16, dtype=dtype, device=DEVICE)
    bias, t_bias = torch.randn(2, 1, 2, 18, 20, device=DEVICE).unbind(0)
    leaves = [x.requires_grad_() for x in (*make(seed=1), bias, *make(seed=2), t_bias)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    plain = lambda q, k, v, mask: reference.attention(q, k, v, mask.to(q.dtype), causal)  # noqa: E731
    found = mixed(partial(attention, is_causal=causal), leaves)
    assert [x.dtype for x in found] == [dtype] * 2 + [x.dtype for x in leaves]
    for i, (x, truth, base) in enumerate(zip(found, mixed(plain, exact), mixed(plain, leaves), strict=True)):
        assert_accurate(x, truth, base, name=f"result {i}", order=1 if i < 2 else 2)
