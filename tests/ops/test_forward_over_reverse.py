"""Gradients of dual tensors are dual: forward over reverse at a dual level, in every op, by every route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
import fastdistill.nn
from fastdistill.testing import MemoryRecorder, make_qkv
from tests.ops.op_cases import IMPLS, OPS, calls, draw

Scalar = Callable[..., Tensor]
RUNS = [pytest.param(name, impl, id="-".join([name, *impl.values()])) for name in OPS for impl in IMPLS[name]]


def scalars(name: str, impl: dict[str, str]) -> tuple[Scalar, Scalar, list[Tensor], list[Tensor]]:
    """Return the op's and its formula's sum of sines as functions of every tensor argument, a point and a direction."""
    case = OPS[name]
    shapes, options = max(calls(name), key=lambda call: len(call[0]))

    def summed(outs: Sequence[Tensor]) -> Tensor:
        return torch.stack([o.sin().sum() for o in outs]).sum()

    ours = lambda *x: summed(case.of_op(dict(zip(shapes, x)), options, **impl))  # noqa: E731
    plain = lambda *x: summed(case.of_reference(dict(zip(shapes, x)), options))  # noqa: E731
    return ours, plain, list(draw(shapes).values()), list(draw(shapes, seed=1).values())


def at_a_dual_level(
    scalar: Scalar, x: list[Tensor], t_x: list[Tensor], moving: Sequence[int], create_graph: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return gradients of every argument and their tangents along those that move; a missing one counts as zero."""
    with forward_ad.dual_level():
        leaves = [a.clone().requires_grad_() for a in x]
        duals = [forward_ad.make_dual(a, t) if i in moving else a for i, (a, t) in enumerate(zip(leaves, t_x))]
        grads = torch.autograd.grad(scalar(*duals), duals, create_graph=create_graph)
        parts = [forward_ad.unpack_dual(g) for g in grads]
        return [(g.detach(), torch.zeros_like(g) if t is None else t.detach()) for g, t in parts]


def truth(scalar: Scalar, x: list[Tensor], t_x: list[Tensor], moving: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    tangents = tuple(t if i in moving else torch.zeros_like(t) for i, t in enumerate(t_x))
    return list(zip(*jvp(grad(scalar, argnums=tuple(range(len(x)))), tuple(x), tangents)))


def assert_same(ours: Any, plain: Any) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("create_graph", [True, False], ids=["graph", "no-graph"])
@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_gradients_of_duals_have_their_tangents(name: str, impl: dict[str, str], create_graph: bool) -> None:
    """Check all arguments, the first alone and the last alone (a weight, where there is one)."""
    ours, plain, x, t_x = scalars(name, impl)
    for moving in (range(len(x)), [0], [len(x) - 1]):
        assert_same(at_a_dual_level(ours, x, t_x, moving, create_graph), truth(plain, x, t_x, moving))


@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_forward_over_grad(name: str, impl: dict[str, str]) -> None:
    """Check `torch.func.jvp(grad(f))`, which is another route to the same."""
    ours, plain, x, t_x = scalars(name, impl)
    for moving in (range(len(x)), [0]):
        with sdpa_kernel(SDPBackend.MATH):
            assert_same(truth(ours, x, t_x, moving), truth(plain, x, t_x, moving))


@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_a_moving_cotangent_of_what_stands_still(name: str, impl: dict[str, str]) -> None:
    ours, plain, x, _ = scalars(name, impl)

    def run(scalar: Scalar) -> list[Tensor]:
        with forward_ad.dual_level():
            leaves = [a.clone().requires_grad_() for a in x]
            d = forward_ad.make_dual(torch.tensor(0.7).double(), torch.tensor(-1.3).double())
            with sdpa_kernel(SDPBackend.MATH):
                grads = torch.autograd.grad(scalar(*leaves), leaves, d, create_graph=True)
            return [y.detach() for g in grads for y in forward_ad.unpack_dual(g)]

    assert_same(run(ours), run(plain))


@pytest.mark.parametrize("create_graph", [True, False], ids=["graph", "no-graph"])
@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_a_loss_of_primal_and_tangent_inside_the_level(name: str, impl: dict[str, str], create_graph: bool) -> None:
    """Check the gradient itself. Its tangent means little: at one level nobody knows how the tangent moves."""
    ours, plain, x, t_x = scalars(name, impl)

    def run(scalar: Scalar) -> list[Tensor]:
        with forward_ad.dual_level():
            leaves = [a.clone().requires_grad_() for a in (*x, *t_x)]
            duals = [forward_ad.make_dual(a, t) for a, t in zip(leaves[: len(x)], leaves[len(x) :])]
            out = scalar(*duals)
            t_out = forward_ad.unpack_dual(out).tangent
            grads = torch.autograd.grad(out.sin() + out * t_out**2, leaves, create_graph=create_graph)
            return [forward_ad.unpack_dual(g).primal.detach() for g in grads]

    assert_same(run(ours), run(plain))


@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_forward_over_reverse_over_reverse(name: str, impl: dict[str, str]) -> None:
    ours, plain, x, t_x = scalars(name, impl)

    def slope(scalar: Scalar) -> Scalar:
        def run(*duals: Tensor) -> Tensor:
            first = torch.autograd.grad(scalar(*duals), duals, create_graph=True)
            return torch.stack([g.sin().sum() for g in first]).sum()

        return run

    both = [at_a_dual_level(slope(f), x, t_x, range(len(x)), create_graph=False) for f in (ours, plain)]
    assert_same(*both)


def test_dual_weights_of_a_network() -> None:
    net = fd.nn.SwiGLU(4, 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = {name: w.detach() for name, w in net.named_parameters()}
    directions = {name: torch.randn_like(w) for name, w in weights.items()}

    def slopes(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda w: functional_call(net, w, (x,)).sin().sum())(given)

    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(w.clone().requires_grad_(), directions[n]) for n, w in weights.items()}
        loss = functional_call(net, duals, (x,)).sin().sum()
        grads = torch.autograd.grad(loss, list(duals.values()), create_graph=True)
        ours = {n: forward_ad.unpack_dual(g).tangent for n, g in zip(duals, grads)}
    assert_same(ours, jvp(slopes, (weights,), (directions,))[1])


@pytest.mark.parametrize("route", ["level", "func"])
def test_attention_keeps_no_matrix_of_probabilities(route: str) -> None:
    """Check that Hessian-vector products without a graph take the fused backward twice, never the dense formulas."""
    n = 256
    (q, k, v), (t, *_) = make_qkv(1, 1, n, 4), make_qkv(1, 1, n, 4, seed=1)
    loss = lambda q: fd.scaled_dot_product_attention(q, k, v, impl="torch", return_lse=True)[0].sin().sum()  # noqa: E731
    with MemoryRecorder() as memory:
        if route == "func":
            jvp(grad(loss), (q,), (t,))
        else:
            at_a_dual_level(loss, [q], [t], [0], create_graph=False)
    with MemoryRecorder() as dense:
        at_a_dual_level(loss, [q], [t], [0], create_graph=True)
    assert dense.largest >= n * n > memory.largest


def test_the_driver_keeps_no_tangent_for_the_reverse_mode() -> None:
    """Check that with constant tangents as much is alive after a forward as after a plain one."""
    x, t_x = torch.randn(64, 512), torch.randn(64, 512)
    w = torch.randn(512, requires_grad=True)

    def alive(run: Callable[[], Any]) -> tuple[int, Any]:
        with MemoryRecorder() as memory:
            kept = run()
        return memory.alive, kept

    net = lambda x: fd.rms_norm(fd.silu(fd.rms_norm(x, (512,), w, impl="torch"), impl="torch"), (512,), w)  # noqa: E731
    plain, _kept = alive(lambda: net(x))
    driven, _driven = alive(lambda: fd.jvp(net, (x,), (t_x,))[0])
    assert driven <= 1.1 * plain
