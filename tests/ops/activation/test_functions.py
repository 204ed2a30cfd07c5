"""Public activations: accuracy by the tolerance rule, drop-in behaviour, shapes and strides, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.activation.op import ACTIVATION
from fastdistill.testing import DEVICES, assert_accurate, cast, reference_jvp, reference_vjp

Pair = Callable[..., tuple[Tensor, Tensor]]
OPS: dict[str, tuple[Callable[..., Tensor], Pair, Callable[..., Tensor], tuple[str, ...]]] = {
    "gelu": (fd.gelu, fd.gelu_jvp, reference.gelu, ("x",)),
    "gelu-tanh": (
        partial(fd.gelu, approximate="tanh"),
        partial(fd.gelu_jvp, approximate="tanh"),
        partial(reference.gelu, approximate="tanh"),
        ("x",),
    ),
    "silu": (fd.silu, fd.silu_jvp, reference.silu, ("x",)),
    "swiglu": (fd.swiglu, fd.swiglu_jvp, reference.swiglu, ("gate", "up")),
    "geglu": (fd.geglu, fd.geglu_jvp, reference.geglu, ("gate", "up")),
    "geglu-tanh": (
        partial(fd.geglu, approximate="tanh"),
        partial(fd.geglu_jvp, approximate="tanh"),
        partial(reference.geglu, approximate="tanh"),
        ("gate", "up"),
    ),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_pair_is_accurate_with_its_gradients(op: str, dtype: torch.dtype, device: str) -> None:
    _, pair, plain, names = OPS[op]
    draw = lambda: {n: torch.randn(2, 9, 24, dtype=torch.float64).to(device, dtype) for n in names}  # noqa: E731
    primals, tangents = draw(), draw()
    inputs = {**primals, **{f"t_{name}": t for name, t in tangents.items()}}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, t_out = pair(**leaves, tangent_grad=True)
    exact = (cast(primals, torch.float64), cast(tangents, torch.float64))
    truths, baselines = reference_jvp(plain, *exact), reference_jvp(plain, primals, tangents)
    for name, ours, truth, base in zip(("y", "t_y"), (out, t_out), truths, baselines, strict=True):
        assert_accurate(ours.detach(), truth, base, name=name)
    dy, dt_y = torch.randn_like(out), torch.randn_like(t_out)
    found = dict(zip(leaves, torch.autograd.grad((out, t_out), list(leaves.values()), (dy, dt_y)), strict=True))
    truth = reference_vjp(plain, *exact, dy.double(), dt_y.double())
    base = reference_vjp(plain, primals, tangents, dy, dt_y)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert_accurate(gradient, truth[name], base[name], name=f"d{name}", order=2)


@pytest.mark.parametrize("op", OPS)
def test_the_op_on_duals_is_its_pair(op: str) -> None:
    """Check it under torch.func.jvp and fd.jvp; a tangent to one argument alone leaves the other's zero."""
    fn, pair, plain, names = OPS[op]
    x, t_x = ([torch.randn(3, 5, dtype=torch.float64) for _ in names] for _ in range(2))
    expected = torch.func.jvp(plain, tuple(x), tuple(t_x))
    torch.testing.assert_close(torch.func.jvp(fn, tuple(x), tuple(t_x)), expected)
    torch.testing.assert_close(fd.jvp(fn, tuple(x), tuple(t_x)), expected)
    for i in range(len(names)):
        one = [t if i == j else None for j, t in enumerate(t_x)]
        zeros = [t if i == j else torch.zeros_like(t) for j, t in enumerate(t_x)]
        torch.testing.assert_close(pair(*x, *one), torch.func.jvp(plain, tuple(x), tuple(zeros)))
    assert not pair(*x, *[None] * len(names))[1].any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_them_alone(op: str, dtype: torch.dtype) -> None:
    """Check that y has x's dtype, with tangents and without."""
    fn, _, _, names = OPS[op]
    x, t_x = ([torch.randn(3, 5, dtype=dtype) for _ in names] for _ in range(2))
    outside = (fn(*x), *torch.func.jvp(fn, tuple(x), tuple(t_x)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = (fn(*x), *torch.func.jvp(fn, tuple(x), tuple(t_x)))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_primals_equal_pytorch_with_and_without_tangents() -> None:
    """Check that they agree, without tangents to the last bit where the same function computes them."""
    x, up = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for ours, plain in (
        (fd.silu, F.silu),
        (fd.gelu, F.gelu),
        (partial(fd.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
        (lambda x: fd.swiglu(x, up), lambda x: F.silu(x) * up),
        (lambda x: fd.geglu(x, up), lambda x: F.gelu(x) * up),
    ):
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
        torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,))[0], plain(x))


def test_a_16_bit_gate_is_rounded_once() -> None:
    """Check, with tangents and without, that float32 numbers' product is rounded; PyTorch rounds silu(gate) as well."""
    gate, up = torch.randn(2, 100, dtype=torch.float32).bfloat16().unbind(0)
    once = (F.silu(gate.float()) * up.float()).bfloat16()
    assert torch.equal(fd.swiglu(gate, up), once)
    assert torch.equal(torch.func.jvp(fd.swiglu, (gate, up), (gate, up))[0], once)
    assert not torch.equal(F.silu(gate) * up, once)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (0, 3), (2, 3, 4, 5)], ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    """Check scalars, vectors and empty tensors, and the gradient of each."""
    points = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def mixed(fn: Callable[..., Tensor]) -> Any:
        y, t_y = torch.func.jvp(fn, tuple(points[:2]), tuple(points[2:]))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), points))

    torch.testing.assert_close(mixed(fd.swiglu), mixed(reference.swiglu))


def test_halves_of_a_packed_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the implementation gets the views themselves, values and tangents, in forward and backward."""
    from fastdistill.ops.activation import eager

    seen: list[Tensor] = []
    for name in ("activation_forward", "activation_backward"):
        original = getattr(eager, name)

        def spy(*args: Any, original: Any = original, **kw: Any) -> Any:
            seen.extend(x for x in tree_leaves((args, kw)) if isinstance(x, Tensor))
            return original(*args, **kw)

        monkeypatch.setattr(eager, name, spy)
    both, t_both = (torch.randn(2, 3, 16, requires_grad=True) for _ in range(2))
    out, t_out = fd.swiglu_jvp(*both.chunk(2, -1), *t_both.chunk(2, -1), tangent_grad=True)
    (out * t_out).sum().backward()
    storages = [x.untyped_storage().data_ptr() for x in seen]
    assert [storages.count(x.untyped_storage().data_ptr()) for x in (both, t_both)] == [4, 4]


def test_autocast_leaves_dtypes_alone_as_it_does_for_pytorch() -> None:
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op, plain in ((fd.gelu, F.gelu), (fd.silu, F.silu)):
            y, t_y = torch.func.jvp(op, (x,), (x,))
            assert y.dtype == t_y.dtype == plain(x).dtype == torch.float32
            torch.testing.assert_close((y, t_y), torch.func.jvp(plain, (x,), (x,)))


def test_without_tangent_grad_nothing_of_the_tangent_is_kept() -> None:
    """Check also that gradients of the value are those of the value alone."""
    x, t_x = torch.randn(2, 4, 8).unbind(0)
    leaf = x.clone().requires_grad_()
    out, t_out = fd.silu_jvp(leaf, t_x)
    assert not t_out.requires_grad
    leaf_too = x.clone().requires_grad_()
    expected = torch.autograd.grad(F.silu(leaf_too).sin().sum(), leaf_too)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), leaf), expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(gated: bool, moving: bool) -> None:
    x = torch.randn(5, 2, 8).transpose(0, 1).bfloat16()
    up = x if gated else None
    args = (x, up, x if moving else None, None, "gelu", "torch", False)
    grads = (x, x if moving else None, x, up, x if moving else None, None, x, x, "gelu", "torch", [True, gated, moving, False])  # fmt: skip  # noqa: E501
    for real_fn, fake_fn, given in (
        (ACTIVATION._dual, ACTIVATION._fake_dual, args),
        (ACTIVATION._backward, ACTIVATION._fake_backward, grads),
    ):
        real = real_fn(*given)
        with torch._subclasses.FakeTensorMode() as mode:
            faked = fake_fn(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
        describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
        assert [describe(a) for a in faked] == [describe(a) for a in real]


X = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.gelu(3.0), "input: expected a tensor, got float"),
        (lambda: fd.silu(X.long()), "input: expected a floating-point tensor"),
        (lambda: fd.gelu(X, "erf"), "approximate: expected 'none' or 'tanh', got 'erf'"),
        (lambda: fd.swiglu(X, X[:1]), r"up: expected shape \(2, 5\) as gate, got \(1, 5\)"),
        (lambda: fd.swiglu(X, X.double()), r"up: expected torch.float32 as gate, got torch.float64"),
        (lambda: fd.geglu(X, X.to("meta")), "up: expected device cpu as gate, got meta"),
        (lambda: fd.silu(X, impl="quick"), "impl: expected one of"),
        (lambda: fd.gelu_jvp(X, X[:1]), r"t_x: expected shape \(2, 5\) as x, got \(1, 5\)"),
        (lambda: fd.swiglu_jvp(X, X, None, X.clone().requires_grad_()), "t_up requires grad"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
