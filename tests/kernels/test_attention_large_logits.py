"""Test plain gradients of the attention kernels in 16 bits: delta comes from o and what rounding took from it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from tests.kernels.device import DEVICE
from tests.large_logits import CASES, Case, check_gradients

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ours = partial(fd.scaled_dot_product_attention, impl="triton")


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_gradients_keep_the_rule(case: Case, dtype: torch.dtype) -> None:
    check_gradients(ours, case, dtype, DEVICE)


@DTYPES
def test_so_do_those_of_the_output_beside_a_tangent(dtype: torch.dtype) -> None:
    """Check MeanFlow's loss, which keeps no graph of the tangent, by the driver and by the explicit pair."""

    def pushed(*qkv: Tensor, **options: Any) -> Tensor:
        return fd.jvp(partial(ours, **options), qkv, tuple(torch.ones_like(x) for x in qkv))[0]

    def paired(*qkv: Tensor, **options: Any) -> Tensor:
        return fd.attention_jvp(*qkv, *(torch.ones_like(x) for x in qkv), impl="triton", **options)[0]

    for op in (pushed, paired):
        check_gradients(op, Case(64, 16.0), dtype, DEVICE)


@DTYPES
def test_packed_sequences_keep_it_too(dtype: torch.dtype) -> None:
    """Check two of them, of which the check sees one at a time."""

    def packed(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        tokens = [torch.cat([x, x.detach()], 2)[0].transpose(0, 1) for x in (q, k, v)]
        bounds = torch.tensor([0, 40, 80], dtype=torch.int32, device=DEVICE)
        return fd.varlen_attention(*tokens, bounds, bounds, 40, 40, impl="triton")[:40].transpose(0, 1)[None]

    check_gradients(packed, Case(64, 16.0), dtype, DEVICE)
