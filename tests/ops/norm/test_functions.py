"""Public norms: accuracy by the tolerance rule, drop-in behaviour, shapes, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.norm.op import NORM
from fastdistill.testing import DEVICES, assert_accurate, cast, reference_jvp, reference_vjp

WIDTH = 72

OPS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor], tuple[str, ...]]] = {
    "layer_norm": (
        lambda x, weight, bias, t_x, t_weight, t_bias, **kw: fd.layer_norm_jvp(
            x, t_x, (WIDTH,), weight, bias, t_weight=t_weight, t_bias=t_bias, **kw
        ),
        lambda **a: reference.norm(**a, eps=1e-5),
        ("x", "weight", "bias"),
    ),
    "rms_norm": (
        lambda x, weight, t_x, t_weight, **kw: fd.rms_norm_jvp(x, t_x, (WIDTH,), weight, 1e-6, t_weight=t_weight, **kw),
        lambda **a: reference.norm(**a, eps=1e-6, rms=True),
        ("x", "weight"),
    ),
    "ada_layer_norm": (
        lambda x, scale, shift, t_x, t_scale, t_shift, **kw: fd.ada_layer_norm_jvp(
            x, scale, shift, t_x, t_scale, t_shift, **kw
        ),
        lambda **a: reference.norm(**a, eps=1e-6),
        ("x", "scale", "shift"),
    ),
    "ada_rms_norm": (
        lambda x, scale, shift, weight, t_x, t_scale, t_shift, t_weight, **kw: fd.ada_rms_norm_jvp(
            x, scale, shift, t_x, t_scale, t_shift, weight, t_weight=t_weight, **kw
        ),
        lambda **a: reference.norm(**a, eps=1e-6, rms=True),
        ("x", "scale", "shift", "weight"),
    ),
}


def draw(
    names: tuple[str, ...], dtype: torch.dtype, device: str, *, mean: float = 0.0, std: float = 1.0
) -> dict[str, Tensor]:
    shapes = {"x": (2, 9, WIDTH), "weight": (WIDTH,), "bias": (WIDTH,), "scale": (2, 1, WIDTH), "shift": (2, 1, WIDTH)}
    values = {name: torch.randn(shapes[name], dtype=torch.float64) for name in names}
    values["x"] = mean + std * values["x"]
    return {name: value.to(device, dtype) for name, value in values.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (30.0, 0.1)], ids=["unit", "huge-mean-tiny-variance"])
@pytest.mark.parametrize("device", DEVICES)
def test_pair_is_accurate_with_its_gradients(op: str, dtype: torch.dtype, mean: float, std: float, device: str) -> None:
    pair, plain, names = OPS[op]
    primals, tangents = draw(names, dtype, device, mean=mean, std=std), draw(names, dtype, device)
    inputs = {**primals, **{f"t_{name}": t for name, t in tangents.items()}}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, t_out = pair(**leaves, tangent_grad=True)
    exact = (cast(primals, torch.float64), cast(tangents, torch.float64))
    truths, baselines = reference_jvp(plain, *exact), reference_jvp(plain, primals, tangents)
    for name, ours, truth, base in zip(("y", "t_y"), (out, t_out), truths, baselines, strict=True):
        assert_accurate(ours.detach(), truth, base, name=name)
    dy, dt_y = torch.randn_like(out), torch.randn_like(t_out)
    ours = dict(zip(leaves, torch.autograd.grad((out, t_out), list(leaves.values()), (dy, dt_y)), strict=True))
    truth = reference_vjp(plain, *exact, dy.double(), dt_y.double())
    base = reference_vjp(plain, primals, tangents, dy, dt_y)
    for name, gradient in ours.items():
        assert_accurate(gradient, truth[name], base[name], name=f"d{name}", order=2)


def test_primals_equal_pytorch_with_and_without_tangents() -> None:
    x, w, b = torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)
    for ours, plain in (
        (lambda x: fd.layer_norm(x, (8,), w, b), lambda x: F.layer_norm(x, (8,), w, b)),
        (lambda x: fd.rms_norm(x, (8,), w), lambda x: F.rms_norm(x, (8,), w)),
    ):
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
        torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,))[0], plain(x))


@pytest.mark.parametrize(
    ("shape", "normalized", "modulation"),
    [
        ((8,), (8,), (8,)),
        ((3, 8), (8,), (3, 8)),
        ((2, 3, 8), (8,), (1, 1, 8)),
        ((2, 3, 4, 8), (8,), (2, 1, 1, 8)),
        ((2, 3, 4, 8), (8,), (1, 3, 1, 8)),
        ((2, 3, 4, 8), (8,), (2, 3, 4, 8)),
        ((2, 3, 4, 8), (4, 8), None),
        ((4, 8), (4, 8), None),
    ],
)
def test_every_rank_and_broadcast(
    shape: tuple[int, ...], normalized: tuple[int, ...], modulation: tuple[int, ...] | None
) -> None:
    x, t_x = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    w, t_w = torch.randn(2, *normalized, dtype=torch.float64).unbind(0)
    ours = torch.func.jvp(lambda x, w: fd.layer_norm(x, normalized, w), (x, w), (t_x, t_w))
    torch.testing.assert_close(ours, torch.func.jvp(lambda x, w: F.layer_norm(x, normalized, w), (x, w), (t_x, t_w)))
    torch.testing.assert_close(ours, fd.layer_norm_jvp(x, t_x, normalized, w, t_weight=t_w))
    if modulation is None:
        return
    scale, t_scale = torch.randn(2, *modulation, dtype=torch.float64).unbind(0)
    point, direction = (x, scale, -scale), (t_x, t_scale, t_scale)
    truth = torch.func.jvp(reference.ada_layer_norm, point, direction)
    torch.testing.assert_close(torch.func.jvp(fd.ada_layer_norm, point, direction), truth)
    torch.testing.assert_close(fd.ada_layer_norm_jvp(*point, *direction), truth)
    leaves = [a.clone().requires_grad_() for a in point]
    loss = lambda op: (lambda y, t_y: (y.sin() * t_y).sum())(*torch.func.jvp(op, tuple(leaves), direction))  # noqa: E731
    ours, plain = (torch.autograd.grad(loss(op), leaves) for op in (fd.ada_layer_norm, reference.ada_layer_norm))
    torch.testing.assert_close(ours, plain)


def test_float32_weights_with_bfloat16_activations() -> None:
    x, w, b = torch.randn(2, 5, 8).bfloat16(), torch.randn(8), torch.randn(8)
    leaf = w.clone().requires_grad_()
    out, t_out = torch.func.jvp(lambda x: fd.layer_norm(x, (8,), leaf, b), (x,), (x,))
    assert out.dtype == t_out.dtype == torch.bfloat16
    torch.testing.assert_close(out, fd.layer_norm(x, (8,), w, b))
    assert torch.autograd.grad(out.float().sum(), leaf)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_second_derivatives_in_16_bits_are_those_of_float32_rounded(rms: bool, dtype: torch.dtype) -> None:
    """Check tangents of tangents and gradients of gradients beside float32 parameters: dtypes, and one rounding."""
    generator = torch.Generator().manual_seed(4)
    x, u, v = (torch.randn(3, 2, 8, generator=generator).to(dtype) for _ in range(3))
    parameters = [torch.randn(8, generator=generator), *torch.randn(2, 3, 1, 8, generator=generator)]
    op = partial(fd.ada_rms_norm if rms else fd.ada_layer_norm, impl="torch")

    def run(x: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
        fn = lambda x: op(x, *parameters[1:], parameters[0])  # noqa: E731
        _, (_, twice) = jvp(lambda x: jvp(fn, (x,), (u,)), (x,), (v,))
        gradient = torch.func.grad(lambda x: (torch.func.grad(lambda x: (fn(x) * u).sum())(x) * v).sum())(x)
        return [twice, gradient]

    ours, truth = run(x, u, v), run(x.float(), u.float(), v.float())
    assert [y.dtype for y in ours] == [dtype, dtype]
    torch.testing.assert_close(ours[0], truth[0].to(dtype), rtol=0, atol=0)
    most = 4 * torch.finfo(dtype).eps * float(truth[1].abs().max())
    torch.testing.assert_close(ours[1], truth[1].to(dtype), rtol=0, atol=most)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_them_alone(op: str, dtype: torch.dtype) -> None:
    """Check values, tangents and gradients: statistics are taken in float32 anyway, and y has x's dtype."""
    pair, _, names = OPS[op]
    leaves = {name: x.requires_grad_() for name, x in draw(names, dtype, "cpu").items()}
    tangents = {f"t_{name}": t for name, t in draw(names, dtype, "cpu").items()}

    def results() -> tuple[Tensor, ...]:
        y, t_y = pair(**leaves, **tangents, tangent_grad=True)
        return (y, t_y, *torch.autograd.grad((y.float() * t_y.float()).sum(), list(leaves.values())))

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        inside = results()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("moving", [False, True])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(rms: bool, moving: bool) -> None:
    x = torch.randn(5, 2, 8).transpose(0, 1).bfloat16()
    args = (x, None, None, None, None, x if moving else None, None, None, None, None, 1e-6, rms, "torch", False)
    real = NORM._dual(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = NORM._fake_dual(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
    assert [describe(a) for a in faked] == [describe(a) for a in real]


def test_ada_rms_norm_without_a_shift() -> None:
    x, scale, t_x, t_scale = torch.randn(4, 2, 5, 8, dtype=torch.float64).unbind(0)
    truth = torch.func.jvp(reference.ada_rms_norm, (x, scale), (t_x, t_scale))
    torch.testing.assert_close(torch.func.jvp(fd.ada_rms_norm, (x, scale), (t_x, t_scale)), truth)
    torch.testing.assert_close(fd.ada_rms_norm_jvp(x, scale, None, t_x, t_scale), truth)


X = torch.ones(2, 5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.layer_norm(3.0, (8,)), "input: expected a tensor, got float"),
        (lambda: fd.layer_norm(X.long(), (8,)), "input: expected a floating-point tensor"),
        (
            lambda: fd.layer_norm(X, (7,)),
            r"normalized_shape: expected the last .* \(2, 5, 8\), got \(7,\)",
        ),
        (lambda: fd.layer_norm(X, (8,), X), r"weight: expected shape \(8,\), got \(2, 5, 8\)"),
        (lambda: fd.layer_norm(X, 8), r"normalized_shape: expected a sequence such as \(8,\), got an int"),
        (lambda: fd.layer_norm(X, None), r"normalized_shape: expected a sequence such as \(8,\), got NoneType"),
        (lambda: fd.layer_norm(X, ()), r"normalized_shape: expected the last dimensions of input .* got \(\)"),
        (lambda: fd.layer_norm(X, (8,), [1.0] * 8), "weight: expected a tensor, got list"),
        (lambda: fd.layer_norm(X, (8,), eps="small"), "eps: expected a number, got str"),
        (lambda: fd.rms_norm(X, (8,), eps=X[0, 0, 0].clone().requires_grad_()), "eps: expected a number, got Tensor"),
        (lambda: fd.layer_norm(X, (8,), None, X[0, 0].to("meta")), "bias: expected device cpu"),
        (lambda: fd.ada_layer_norm(X, 1.0, X), "scale: expected a tensor, got float"),
        (lambda: fd.ada_layer_norm(X, X[:, 0], X), "scale: expected 3 dimensions that broadcast to x"),
        (lambda: fd.ada_layer_norm(X, X, X[:, :2]), "shift: expected 3 dimensions that broadcast to x"),
        (lambda: fd.rms_norm(X, (8,), impl="quick"), "impl: expected one of"),
        (lambda: fd.layer_norm_jvp(X, X[:1], (8,)), r"t_x: expected shape \(2, 5, 8\) as x, got \(1, 5, 8\)"),
        (lambda: fd.layer_norm_jvp(X, X, (8,), t_weight=X), "t_weight: expected None as weight is None"),
        (lambda: fd.rms_norm_jvp(X, X.clone().requires_grad_(), (8,)), "t_x requires grad"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
