"""Test loads by descriptor (TMA), which GPUs from 9.0 on get where the tensors allow it: the values are the same."""

from __future__ import annotations

import pytest
import torch

from fastdistill.kernels import attention as kernel
from fastdistill.kernels import configs
from fastdistill.kernels.attention_arguments import use_descriptors
from fastdistill.kernels.tiles import Described, Strided
from tests.kernels.attention_cases import check, inputs, normal


@pytest.mark.parametrize(("d", "layout"), [(72, "bhnd"), (72, "bnhd"), (64, "packed")])
def test_rows_by_descriptor(d: int, layout: str) -> None:
    """Check two samples and heads, and ragged ends of rows and of columns."""
    shape = {} if layout == "packed" else {"m": 41, "dv": 40}
    check(*inputs(batch=2, heads=2, n=35, d=d, layout=layout, dtype=torch.float16, **shape), descriptors=True)


def test_three_parts_and_shared_keys() -> None:
    """Check 112 = 64 + 32 + 16, in bfloat16, under a band."""
    shape = {"heads": 4, "kv_heads": 2, "n": 33, "d": 112, "dtype": torch.bfloat16}
    check(*inputs("kv", **shape), window=(10, 3), descriptors=True)


def test_a_single_row_sample_and_head() -> None:
    """Check dimensions of size one, whose strides mean nothing."""
    primals, tangents = inputs(n=1, m=1, d=16)
    primals["q"] = primals["q"].as_strided((1, 1, 1, 16), (7, 5, 3, 1))
    check(primals, tangents, descriptors=True)


def test_what_descriptors_can_name() -> None:
    """Check strides and addresses that descriptors can't name; exact float32 is better off without them."""
    x = normal(2, 4, 8, 72).half()
    assert use_descriptors(90, x, None, x.transpose(1, 2), x[:, :, :, :16]) and use_descriptors(100, x)
    assert not use_descriptors(80, x)
    broadcast, odd = x[:, :, :1].expand(2, 4, 8, 72), normal(2, 4, 8, 20).half()
    for unfit in (x.mT, x[..., ::2], x[..., 1:17], broadcast, odd, x[:, :, :0], x.float()):
        assert not use_descriptors(90, x, unfit)
    torch.set_float32_matmul_precision("high")
    try:
        assert use_descriptors(90, x.float())
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_environment_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 4, 8, 72).half()
    assert use_descriptors(90, x)
    monkeypatch.setenv("FASTDISTILL_DESCRIPTORS", "0")
    assert not use_descriptors(90, x)


def test_a_gpu_with_tma_gets_them_by_default() -> None:
    """Check that packed sequences don't, because a tile would reach into the next; pointers take sm_80's tiles."""
    primals, _ = inputs(n=8, d=64, dtype=torch.float16)
    pairs = [*((x, None) for x in primals.values()), (None, None)]
    outputs = kernel.allocate(primals["q"], primals["v"], moving=False)
    cu = torch.tensor([0, 8], dtype=torch.int32)
    options = {"window": (-1, -1), "lower_right": False, "scale": 1.0}
    with configs.forced(90, {}):
        described = kernel.plan(pairs, outputs, **options, cu_seqlens=None)
        pointed = kernel.plan(pairs, outputs, **options, cu_seqlens=(cu, cu, 8, 8))
    assert isinstance(described.args[0].q, Described) and isinstance(pointed.args[0].q, Strided)
    for launch, arch, mask in ((described, 90, "none"), (pointed, 80, "band")):
        config = configs.attention_config("forward", arch, torch.float16, 64, "", mask, 8)
        assert (launch.options["BLOCK_N"], launch.options["BLOCK_M"]) == config[:2]
