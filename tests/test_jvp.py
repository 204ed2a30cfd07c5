"""Test the driver `fastdistill.jvp`: values, gradients, memory, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastdistill as fd
from fastdistill.ops.protocol.context import tangent_grad, tangents_without_grad
from fastdistill.testing import MemoryRecorder


class Block(nn.Module):
    """Define a transformer block over our ops, in float64, with a time that modulates it."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.time = nn.Linear(1, 2 * width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        scale, shift = self.time((t + 0.3 * s)[:, None])[:, None].chunk(2, dim=-1)
        q, k, v = self.qkv(fd.ada_layer_norm(x, scale, shift)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(fd.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(fd.layer_norm(x, x.shape[-1:]))


@pytest.fixture
def net() -> Block:
    return Block().double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, v = torch.randn(2, 3, 5, 8, dtype=torch.float64).unbind(0)
    return x, torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64), v


def through_functorch(net: Block, x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u, du_dt = torch.func.jvp(net, (x, t, s), (v, torch.ones_like(t), torch.zeros_like(s)))
    return u, du_dt


@pytest.mark.parametrize("mode", ["single", "separate"])
@pytest.mark.parametrize("zero", [None, 0, 0.0])
def test_driver_equals_functorch(net: Block, batch: tuple[Tensor, ...], mode: str, zero: float | None) -> None:
    x, t, s, v = batch
    ours = fd.jvp(net, (x, t, s), (v, 1.0, zero), mode=mode)
    torch.testing.assert_close(ours, through_functorch(net, x, t, s, v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["single", "separate"])
def test_primal_carries_the_graph_and_the_tangent_none(net: Block, batch: tuple[Tensor, ...], mode: str) -> None:
    x, t, s, v = batch
    u, du_dt = fd.jvp(net, (x, t, s), (v, 1.0, None), mode=mode)
    assert u.requires_grad
    assert not du_dt.requires_grad
    ours = torch.autograd.grad(((u - v + du_dt) ** 2).sum(), list(net.parameters()))
    u, du_dt = through_functorch(net, x, t, s, v)
    plain = torch.autograd.grad(((u - v + du_dt.detach()) ** 2).sum(), list(net.parameters()))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_gradient_through_the_tangent_equals_functorch(net: Block, batch: tuple[Tensor, ...]) -> None:
    x, t, s, v = batch
    loss = lambda u, du_dt: (u * du_dt.sin()).sum()  # noqa: E731
    u, du_dt = fd.jvp(net, (x, t, s), (v, 1.0, None), tangent_grad=True)
    ours = torch.autograd.grad(loss(u, du_dt), list(net.parameters()))
    plain = torch.autograd.grad(loss(*through_functorch(net, x, t, s, v)), list(net.parameters()))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def held_after(forward: Callable[[], object]) -> int:
    """Return the bytes that the result of `forward` keeps alive."""
    with MemoryRecorder() as recorder:
        result = forward()
    held = recorder.alive
    assert result is not None
    return held


def test_memory_held_is_that_of_a_plain_forward() -> None:
    net = nn.ModuleList([Block(64, 4) for _ in range(3)])

    def run(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        for block in net:
            x = block(x, t, s)
        return x

    x, v, t, s = torch.randn(2, 128, 64), torch.randn(2, 128, 64), torch.rand(2), torch.rand(2)
    plain = held_after(lambda: run(x, t, s))
    ours = held_after(lambda: fd.jvp(run, (x, t, s), (v, 1.0, None)))
    mixed = held_after(lambda: fd.jvp(run, (x, t, s), (v, 1.0, None), tangent_grad=True))
    assert ours <= 1.1 * plain
    assert mixed > 1.5 * plain  # This shows that the measurement sees a difference.


def test_pytree_results_and_constants_pass_through() -> None:
    x, v = torch.randn(2, 4), torch.randn(2, 4)
    out, t_out = fd.jvp(lambda a, n, b: {"sum": a + b, "scaled": (n * a,)}, (x, 3, x), (v, None, None))
    torch.testing.assert_close(out, {"sum": 2 * x, "scaled": (3 * x,)})
    torch.testing.assert_close(t_out, {"sum": v, "scaled": (3 * v,)})


def test_all_tangents_zero_give_a_zero_tangent() -> None:
    out, t_out = fd.jvp(torch.sin, (torch.ones(2),), (None,))
    torch.testing.assert_close(out, torch.ones(2).sin())
    torch.testing.assert_close(t_out, torch.zeros(2))


def test_in_place_operations_keep_their_tangent() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y += x
        y[0].mul_(3)
        return y.square_()

    x, v = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(fd.jvp(fn, (x,), (v,)), torch.func.jvp(fn, (x,), (v,)))


def test_driver_inside_other_transforms(net: Block, batch: tuple[Tensor, ...]) -> None:
    x, t, s, v = batch
    one = lambda x, t, s, v: fd.jvp(lambda *a: net(*(z[None] for z in a))[0], (x, t, s), (v, 1.0, None))  # noqa: E731
    torch.testing.assert_close(torch.vmap(one)(x, t, s, v), through_functorch(net, x, t, s, v))
    pulled = torch.func.grad(lambda x: fd.jvp(net, (x, t, s), (v, 1.0, None))[0].sum())(x)
    torch.testing.assert_close(pulled, torch.func.grad(lambda x: net(x, t, s).sum())(x))


def test_derivative_inside_the_network_is_left_alone() -> None:
    w, x, one = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3), torch.ones(2, 3)
    slope = lambda x: torch.func.jvp(lambda z: (z @ w).sin(), (x,), (one,))[1]  # noqa: E731
    u, du = fd.jvp(slope, (x,), (one,))
    truth, d_truth = torch.func.jvp(slope, (x,), (one,))
    torch.testing.assert_close((u, du), (truth, d_truth.detach()))
    torch.testing.assert_close(torch.autograd.grad(u.sum(), w), torch.autograd.grad(truth.sum(), w))


def test_results_of_no_grad_may_be_changed_in_place() -> None:
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3)

    def fn(x: Tensor) -> Tensor:
        h = x @ w
        with torch.no_grad():
            g = x * 2
        return g.add_(h) @ w

    torch.testing.assert_close(fd.jvp(fn, (x,), (x,)), torch.func.jvp(fn, (x,), (x,)))


def test_separate_mode_replays_random_numbers() -> None:
    x = torch.ones(100)
    out, t_out = fd.jvp(lambda x: torch.nn.functional.dropout(x, 0.5, True), (x,), (x,), mode="separate")
    torch.testing.assert_close(out, t_out)


def test_another_thread_keeps_its_tangents_graph() -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(x: Tensor) -> Tensor:
        inside.set()
        done.wait()
        return x * 2

    thread = threading.Thread(target=lambda: fd.jvp(wait, (torch.ones(2),), (1.0,)), daemon=True)
    thread.start()
    inside.wait()
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    tangent = torch.func.jvp(fd.scaled_dot_product_attention, (q, q, q), (q.detach(),) * 3)[1]
    done.set()
    thread.join()
    assert tangent.requires_grad


def test_tangent_with_an_outer_tangent_is_refused_rather_than_lost() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"tangents\[0\] has a tangent of its own"):
        torch.func.jvp(lambda v: fd.jvp(torch.sin, (x,), (v,))[1], (x,), (x,))


@pytest.mark.parametrize(
    ("primals", "tangents", "message"),
    [
        ((torch.ones(2),), (torch.ones(3),), r"tangents\[0\]: expected shape \(2,\), got \(3,\)"),
        ((torch.ones(2), 5), (None, 1.0), r"tangents\[1\]: expected None, as primals\[1\]"),
        ((torch.ones(2, dtype=torch.long),), (1.0,), "torch.int64"),
        (torch.ones(2), torch.ones(2), "primals: expected a tuple"),
        ((torch.ones(2),), ("x",), r"tangents\[0\]: expected a tensor, a number or None, got str"),
        ((torch.ones(2),), (None, None), "expected one for each of the 1 primals, got 2"),
        ((torch.ones(2),), (torch.ones(2, requires_grad=True),), r"tangents\[0\] requires grad"),
    ],
)
def test_bad_arguments_are_refused_by_name(primals: tuple, tangents: tuple, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fd.jvp(lambda *a: a[0], primals, tangents)


def test_unknown_mode_and_separate_mixed_are_refused() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        fd.jvp(torch.sin, (torch.ones(2),), (1.0,), mode="fast")
    with pytest.raises(ValueError, match="tangent_grad=False"):
        fd.jvp(torch.sin, (torch.ones(2),), (1.0,), mode="separate", tangent_grad=True)


def test_inference_mode_is_refused_rather_than_silently_zero() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fd.jvp(torch.sin, (torch.ones(2),), (1.0,))


def test_drivers_on_two_threads_leave_nothing_behind() -> None:
    """Check threads that enter and leave in turns: afterwards tangents are differentiable again."""
    started, entered = threading.Event(), threading.Event()

    def other() -> None:
        started.wait()
        with tangents_without_grad(1):
            entered.set()
            left.wait()

    left = threading.Event()
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with tangents_without_grad(0):
        started.set()
        entered.wait()
        assert not tangent_grad()
    left.set()
    thread.join()
    assert tangent_grad()
