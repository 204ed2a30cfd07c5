"""Test attention on a GPU: CUDA graphs, compiled with tangents, autocast, and memory that doesn't grow with N²."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import assert_accurate, make_qkv

Results = tuple[Tensor, ...]


def points(n: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return q, k, v and their tangents."""
    draw = lambda seed: make_qkv(batch=2, heads=4, n=n, d=72, dtype=dtype, device="cuda", seed=seed)  # noqa: E731
    return [*draw(1), *draw(2)]


def forward(*both: Tensor) -> Results:
    result: Results = jvp(fd.scaled_dot_product_attention, both[:3], both[3:])
    return result


def training(*both: Tensor, through_tangent: bool = True) -> Results:
    """Return the outputs, and gradients of a loss of both (or of the primal alone)."""
    leaves = [x.detach().requires_grad_() for x in both]
    out, t_out = forward(*leaves)
    loss = (out.float().sin() * (t_out if through_tangent else t_out.detach()).float()).sum()
    wanted = leaves if through_tangent else leaves[:3]
    return (out, t_out, *torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("run", [forward, training])
def test_a_cuda_graph_replays_what_eager_computes(run: Callable[..., Results]) -> None:
    static = points(257)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*static)
    fresh = [x.flip(2) for x in static]
    for old, new in zip(static, fresh):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(results, run(*fresh), rtol=0, atol=0)


@pytest.mark.parametrize("run", [forward, training])
def test_compiled_equals_eager_with_tangents(run: Callable[..., Results]) -> None:
    torch._dynamo.reset()
    both = points(257, torch.float32)
    pair = torch.compile(forward, fullgraph=True)

    def compiled(*x: Tensor) -> Results:
        if run is forward:
            return pair(*x)
        leaves = [a.detach().requires_grad_() for a in x]
        out, t_out = pair(*leaves)
        return (out, t_out, *torch.autograd.grad((out.sin() * t_out).sum(), leaves))

    torch.testing.assert_close(compiled(*both), run(*both), rtol=1e-4, atol=1e-4)


def test_autocast_gives_the_results_of_bfloat16_inputs() -> None:
    both = points(65, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        lowered = forward(*both)
    torch.testing.assert_close(lowered, forward(*(x.bfloat16() for x in both)), rtol=0, atol=0)


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds, beyond what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_peak_memory_is_flat_in_n_times_d(through_tangent: bool) -> None:
    """Check that four times the tokens take at most five times the memory, in which no (N, M) matrix would fit."""
    short, long = points(2048), points(8192)
    peaks = [peak(lambda b=b: training(*b, through_tangent=through_tangent)) for b in (short, long)]
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 2 * 4 * 8192 * 8192


def test_two_runs_give_the_same_bits() -> None:
    both = points(1025)
    assert all(torch.equal(a, b) for a, b in zip(training(*both), training(*both)))


def test_tf32_is_taken_where_pytorch_allows_it_and_exact_products_are_the_default() -> None:
    both = points(257, torch.float32)
    exact = [x.double() for x in both]
    truth = jvp(reference.attention, tuple(exact[:3]), tuple(exact[3:]))
    baseline = jvp(reference.attention, tuple(both[:3]), tuple(both[3:]))
    for ours, t, b in zip(forward(*both), truth, baseline):
        assert_accurate(ours, t, b, name="ieee")
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        lossy = forward(*both)
    finally:
        torch.set_float32_matmul_precision(previous)
    errors = [float((x - t).abs().max() / t.abs().max()) for x, t in zip(lossy, truth)]
    assert all(1e-5 < e < 5e-3 for e in errors)
