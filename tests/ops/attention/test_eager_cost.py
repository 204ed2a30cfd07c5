"""Costs of the blockwise attention: matmuls by the tangents there are, and memory that grows with N."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.ops.attention import logit_blocks
from fastdistill.testing import MemoryRecorder, make_packed
from tests.ops.attention.eager_cases import CAUSAL, SUBSETS, Case, Tensors, backward, cotangents, forward, problem


class MatmulCounter(TorchDispatchMode):
    """Counts multiplications in batched matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::bmm", "aten::baddbmm_"):
            left, right = args[-2:]
            self.multiplications += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def matmuls(run: Callable[[], Any], n: int, d: int) -> float:
    with MatmulCounter() as counter:
        run()
    return counter.multiplications / (2 * 4 * n * n * d)


FORWARD_WORK = {"": 2, "v": 3, "q": 4, "k": 4, "qk": 5, "qv": 5, "kv": 5, "qkv": 6}
MIXED_WORK = {"v": 7, "q": 10, "k": 10, "qv": 12, "kv": 12, "qk": 13, "qkv": 15}


@pytest.mark.parametrize("tangents", SUBSETS, ids=lambda names: names or "none")
def test_a_tangent_that_is_not_there_costs_nothing(tangents: str) -> None:
    """Check the matmuls of kernels/README.md in units of B H N M D: forward, and both backward passes."""
    primals, directions = problem(Case(tangents=tangents))
    o, t_o, lse, mu, *_ = forward(primals, directions)
    forward_work = matmuls(lambda: forward(primals, directions), 33, 32)
    assert forward_work == FORWARD_WORK[tangents]
    assert matmuls(lambda: backward(primals, directions, o), 33, 32) - forward_work == 5
    if tangents:
        mixed_work = matmuls(lambda: backward(primals, directions, o, t_o, lse, mu), 33, 32)
        assert mixed_work - forward_work == MIXED_WORK[tangents]


def test_a_cotangent_that_is_not_there_costs_nothing() -> None:
    """Check, in units of B H N M D, that only the logits again and what some cotangents need are computed."""
    primals, tangents = problem(Case())
    do, dt_o, d_lse, d_mu = cotangents(primals)
    for given, work in (
        ({"d_lse": d_lse}, 1 + 2),  # S; dq and dk
        ({"do": do, "d_lse": d_lse}, 1 + 4),
        ({"d_mu": d_mu}, 3 + 6),  # S and T; dq and dk in two parts, dt_q and dt_k
        ({"dt_o": dt_o, "d_mu": d_mu}, 3 + 10),  # all but do vT and PT do
    ):
        assert matmuls(partial(backward, primals, tangents, **given), 33, 32) - FORWARD_WORK["qkv"] == work


def runs(primals: Tensors, tangents: Tensors, **band: Any) -> dict[str, Callable[[], Any]]:
    """Run the forward and both backward passes."""
    do, dt_o, d_lse, d_mu = cotangents(primals)
    return {
        "forward": partial(forward, primals, tangents, **band),
        "primal": partial(backward, primals, tangents, do, d_lse=d_lse, **band),
        "mixed": partial(backward, primals, tangents, do, dt_o, d_lse, d_mu, **band),
    }


@pytest.mark.parametrize("window", [CAUSAL, (0, -1)], ids=["right", "left"])
def test_half_a_band_skips_the_keys_beyond_each_block(window: tuple[int, int]) -> None:
    """Check that eight blocks compute 36 of their 64 squares, forward and backward."""
    primals, tangents = problem(Case(n=256, m=256))
    whole, banded = runs(primals, tangents), runs(primals, tangents, window=window)
    for name, run in banded.items():
        assert matmuls(run, 256, 32) == matmuls(whole[name], 256, 32) * 36 / 64


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
def test_a_window_costs_its_width_and_not_the_length(lower_right: bool) -> None:
    """Check that at most 1.5 times the window's logits are computed, forward and backward, and no hidden block."""
    width = 128
    for n in (512, 1024):
        primals, tangents = problem(Case(batch=1, n=n, m=n, d=8, dv=8))
        for name, run in runs(primals, tangents, window=(100, 27), lower_right=lower_right).items():
            full = {"forward": 6, "primal": 6 + 5, "mixed": 6 + 15}[name] / 2
            assert matmuls(run, n, 8) < 1.5 * full * width / n


def test_a_window_beyond_the_ends_costs_nothing_more() -> None:
    """Check that there are as many blocks as without one."""
    primals, tangents = problem(Case(n=256, m=256))
    assert calls(runs(primals, tangents, window=(255, 300))["mixed"]) == calls(runs(primals, tangents)["mixed"])


@pytest.mark.parametrize("window", [(-1, -1), CAUSAL, (90, 37)], ids=["", "causal", "window"])
def test_memory_grows_with_n_not_with_its_square(window: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no tensor is larger than a block or a few inputs, and twice the tokens at most double the memory."""
    block = 1 << 14
    monkeypatch.setitem(logit_blocks.BLOCK_SIZE, "cpu", block)
    monkeypatch.setattr(logit_blocks, "LEAST_ROWS", 8)
    peaks: dict[tuple[int, str], int] = {}
    for n in (256, 512):
        primals, tangents = problem(Case(batch=1, heads=2, kv_heads=2, n=n, m=n, d=32, dv=32, mask="key_padding"))
        for name, run in runs(primals, tangents, window=window).items():
            with MemoryRecorder() as memory:
                run()
            assert memory.largest <= max(block, 2 * 2 * n * 32)
            peaks[n, name] = memory.peak
    for name in ("forward", "primal", "mixed"):
        assert peaks[512, name] <= 2 * peaks[256, name]


def calls(run: Callable[[], Any]) -> int:
    """Count the batched matmuls that a run calls."""
    with torch.profiler.profile(acc_events=True) as profile:  # without, torch 2.11 warns
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::baddbmm_"))


def test_small_problems_are_not_a_loop_over_heads() -> None:
    """Check that 128 images of 16 tokens are one block, so as many matmuls as a single head takes."""
    counts = []
    for batch in (1, 128):
        primals, tangents = problem(Case(batch=batch, n=16, m=16, d=24, dv=24, layout="packed"))
        counts.append(calls(runs(primals, tangents)["mixed"]))
    assert counts[1] <= counts[0]


def test_packed_neighbours_of_equal_lengths_are_one_batch() -> None:
    """Check that 100 sequences, of two lengths, take the matmuls of two."""
    counts = []
    for many in (1, 50):
        tensors, cu_seqlens = make_packed((9,) * many + (12,) * many, (7,) * many + (9,) * many, d=8)
        primals: Tensors = dict(zip("qkv", tensors, strict=True))
        counts.append(calls(runs(primals, primals, cu_seqlens=cu_seqlens)["mixed"]))
    assert counts[0] == counts[1]


def test_a_narrow_window_goes_many_heads_to_a_block() -> None:
    """Check that a few rows of a few keys, alone too small to be worth a matmul, go together."""
    counts = []
    for heads in (1, 16):
        primals, tangents = problem(Case(batch=1, heads=heads, kv_heads=heads, n=512, m=512, d=8, dv=8))
        counts.append(calls(runs(primals, tangents, window=(16, 15))["forward"]))
    assert counts[0] == counts[1]
