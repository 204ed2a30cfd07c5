"""What the blockwise attention may cost: matmuls by the tangents there are, and memory that grows with N."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.eager import attention as eager
from fastdistill.testing import MemoryRecorder
from tests.eager.attention_cases import SUBSETS, Case, backward, forward, problem


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
    """The matmuls of KERNELS.md, in units of B H N M D: forward, and both backward passes."""
    primals, directions = problem(Case(tangents=tangents))
    o, t_o, *_ = forward(primals, directions)
    forward_work = matmuls(lambda: forward(primals, directions), 33, 32)
    assert forward_work == FORWARD_WORK[tangents]
    assert matmuls(lambda: backward(o, None, primals, directions), 33, 32) - forward_work == 5
    if tangents:
        assert matmuls(lambda: backward(o, t_o, primals, directions), 33, 32) - forward_work == MIXED_WORK[tangents]


def test_causal_attention_skips_the_keys_beyond_each_block() -> None:
    """Eight blocks compute 36 of their 64 squares, forward and backward."""
    primals, tangents = problem(Case(n=256, m=256))
    do = torch.randn(2, 4, 256, 32)
    for run in (forward, partial(backward, do, None), partial(backward, do, do)):
        whole, causal = (matmuls(partial(run, primals, tangents, is_causal), 256, 32) for is_causal in (False, True))
        assert causal == whole * 36 / 64


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_memory_grows_with_n_not_with_its_square(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a block or than a few inputs, and twice the tokens take at most twice the memory."""
    block = 1 << 15
    monkeypatch.setitem(eager._BLOCK_SIZE, "cpu", block)
    monkeypatch.setattr(eager, "_LEAST_ROWS", 8)
    peaks: dict[tuple[int, str], int] = {}
    for n in (512, 1024):
        primals, tangents = problem(Case(batch=1, heads=2, kv_heads=2, n=n, m=n, d=32, dv=32, mask="key_padding"))
        do = torch.randn(1, 2, n, 32)
        runs: dict[str, Callable[[], Any]] = {
            "forward": partial(forward, primals, tangents, is_causal),
            "primal": partial(backward, do, None, primals, tangents, is_causal),
            "mixed": partial(backward, do, do, primals, tangents, is_causal),
        }
        for name, run in runs.items():
            with MemoryRecorder() as memory:
                run()
            assert memory.largest <= max(block, 2 * n * 32)
            peaks[n, name] = memory.peak
    for name in ("forward", "primal", "mixed"):
        assert peaks[1024, name] <= 2 * peaks[512, name]


def test_small_problems_are_not_a_loop_over_heads() -> None:
    """128 images of 16 tokens: one block, so as many matmuls as a single head takes."""
    counts = []
    for batch in (1, 128):
        primals, tangents = problem(Case(batch=batch, n=16, m=16, d=24, dv=24, layout="packed"))
        do = torch.randn(batch, 4, 16, 24)
        with torch.profiler.profile() as profile:
            backward(do, do, primals, tangents)
        counts.append(sum(event.count for event in profile.key_averages() if "bmm" in event.key))
    assert counts[1] <= counts[0]
