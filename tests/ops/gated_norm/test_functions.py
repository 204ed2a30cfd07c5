"""Public gated residual with its norm: the pair, drop-in behaviour, shapes, dtypes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.gated_norm.op import GATED_NORM
from fastdistill.testing import DEVICES


def draw(dtype: torch.dtype = torch.float64, device: str = "cpu", shape: tuple[int, ...] = (2, 5, 8)) -> list[Tensor]:
    modulation = (*shape[:1], *[1] * (len(shape) - 2), *shape[1:][-1:])
    shapes = [shape, modulation, shape, modulation, modulation]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_the_pair_and_the_op_agree_with_the_formula_at_every_rank(shape: tuple[int, ...], rms: bool) -> None:
    point, direction = draw(shape=shape), draw(shape=shape)
    truth = jvp(lambda *a: reference.gated_residual_ada_norm(*a, rms=rms), tuple(point), tuple(direction))
    ours = jvp(lambda *a: fd.gated_residual_ada_norm(*a, rms=rms), tuple(point), tuple(direction))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        fd.gated_residual_ada_norm_jvp(*point, *direction, rms=rms), truth, rtol=1e-10, atol=1e-11
    )


def test_parameters_and_their_tangents_reach_the_pair() -> None:
    point, direction = draw(), draw()
    w, b, t_w, t_b = torch.randn(4, 8, dtype=torch.float64).unbind(0)
    truth = jvp(reference.gated_residual_ada_norm, (*point, w, b), (*direction, t_w, t_b))
    ours = fd.gated_residual_ada_norm_jvp(*point, *direction, w, b, t_weight=t_w, t_bias=t_b)
    torch.testing.assert_close(ours, truth)


def test_gradients_of_the_pair_reach_tangents_only_where_asked() -> None:
    point, direction = draw(), [a.requires_grad_() for a in draw()]
    (_, y), (t_r, t_y) = fd.gated_residual_ada_norm_jvp(*point, *direction, tangent_grad=True)
    gradients = torch.autograd.grad((y * t_y).sum() + t_r.sin().sum(), direction)
    (_, y), (t_r, t_y) = jvp(reference.gated_residual_ada_norm, tuple(point), tuple(direction))
    torch.testing.assert_close(gradients, torch.autograd.grad((y * t_y).sum() + t_r.sin().sum(), direction))
    with pytest.raises(ValueError, match="t_x requires grad"):
        fd.gated_residual_ada_norm_jvp(*point, *direction)


def test_without_gate_and_modulation_it_is_a_residual_and_a_norm() -> None:
    x, _, h, *_ = draw()
    r, y = fd.gated_residual_ada_norm(x, None, h, None, None, eps=1e-5)
    torch.testing.assert_close((r, y), (x + h, F.layer_norm(x + h, (8,))))
    fused = fd.gated_residual_ada_norm(x, None, h, None, None, eps=1e-5, impl="torch")
    torch.testing.assert_close(fused, (r, y))


@pytest.mark.parametrize("device", DEVICES)
def test_a_float32_stream_beside_bfloat16_blocks(device: str) -> None:
    """Check, with tangents or autocast or neither, that r has x's dtype, y has h's, and no sum is rounded between."""
    point, direction = draw(torch.float32, device), draw(torch.float32, device)
    point[2], direction[2] = point[2].bfloat16(), direction[2].bfloat16()
    (r, y), (t_r, t_y) = jvp(fd.gated_residual_ada_norm, tuple(point), tuple(direction))
    assert (r.dtype, t_r.dtype, y.dtype, t_y.dtype) == (torch.float32,) * 2 + (torch.bfloat16,) * 2
    wide, t_wide = [a.float() for a in point], [a.float() for a in direction]
    truth = jvp(fd.gated_residual_ada_norm, tuple(wide), tuple(t_wide))
    torch.testing.assert_close((r, t_r), (truth[0][0], truth[1][0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((y.float(), t_y.float()), (truth[0][1], truth[1][1]), rtol=1e-2, atol=1e-2)
    plain = fd.gated_residual_ada_norm(*point)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = fd.gated_residual_ada_norm(*point)
    for pair in (plain, under):
        torch.testing.assert_close(pair, (r, y), rtol=0, atol=0)


@pytest.mark.parametrize("moving", [(), (0, 1, 2, 3, 4), (3,)], ids=["none", "all", "scale"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(moving: tuple[int, ...]) -> None:
    point = draw(torch.float32)
    point[1] = point[1].transpose(0, 1).contiguous().transpose(0, 1).bfloat16()
    primals = [*point[:3], None, None, *point[3:]]
    tangents = [a if i in [m if m < 3 else m + 2 for m in moving] else None for i, a in enumerate(primals)]
    args = (*primals, *tangents, 1e-6, False, "torch", False)
    real = GATED_NORM._dual(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = GATED_NORM._fake_dual(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
    assert [describe(a) for a in faked] == [describe(a) for a in real]


X = torch.ones(2, 5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.gated_residual_ada_norm(3.0, X, X, X, X), "x: expected a tensor, got float"),
        (lambda: fd.gated_residual_ada_norm(X, X, X.long(), X, X), "h: expected a floating-point tensor"),
        (lambda: fd.gated_residual_ada_norm(X, X, X[:1], X, X), r"h: expected shape \(2, 5, 8\) as x, got \(1, 5, 8\)"),
        (lambda: fd.gated_residual_ada_norm(X, X[:, 0], X, X, X), "gate: expected 3 dimensions that broadcast to x"),
        (lambda: fd.gated_residual_ada_norm(X, X.to("meta"), X, X, X), "gate: expected device cpu"),
        (lambda: fd.gated_residual_ada_norm(X, X, X, X, X, X), r"weight: expected shape \(8,\)"),
        (lambda: fd.gated_residual_ada_norm(X, X, X, X, X, impl="quick"), "impl: expected one of"),
        (lambda: fd.gated_residual_ada_norm_jvp(X, None, X, X, X, X, X), "t_gate: expected None as gate is None"),
        (
            lambda: fd.gated_residual_ada_norm_jvp(X, X, X, X, X, X, None, X[:1]),
            r"t_h: expected shape \(2, 5, 8\) as h",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
