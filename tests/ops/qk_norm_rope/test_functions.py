"""Public `qk_norm_rope` and `rope_angles`: drop-in behaviour, duals, layouts, angles, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.qk_norm_rope.op import QK_NORM_ROPE
from fastdistill.testing import DEVICES, assert_accurate, make_qkv, reference_jvp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "packed"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_op_on_duals_and_its_pair_are_accurate(dtype: torch.dtype, layout: str, device: str) -> None:
    q, k, _ = make_qkv(d=24, layout=layout, dtype=dtype, device=device)
    t_q, t_k, _ = make_qkv(d=24, layout=layout, dtype=dtype, device=device, seed=1)
    w, t_w = torch.randn(2, 24, device=device, dtype=dtype).unbind(0)
    cos, sin = fd.rope_angles((7, 9), 24, device=device)

    def truth(dtype: torch.dtype) -> Any:
        fn = lambda q, k, w: torch.stack(reference.qk_norm_rope(q, k, cos.to(dtype), sin.to(dtype), w, w))  # noqa: E731
        primals, tangents = ({n: x.to(dtype) for n, x in zip("qkw", xs)} for xs in ((q, k, w), (t_q, t_k, t_w)))
        return reference_jvp(fn, primals, tangents)

    pair = fd.qk_norm_rope_jvp(q, k, t_q, t_k, cos, sin, w, w, t_q_weight=t_w, t_k_weight=t_w)
    dual = torch.func.jvp(lambda q, k, w: fd.qk_norm_rope(q, k, cos, sin, w, w), (q, k, w), (t_q, t_k, t_w))
    for ours, exact, base in zip(pair, truth(torch.float64), truth(dtype), strict=True):
        assert_accurate(torch.stack(ours), exact, base, name="pair")
    torch.testing.assert_close(dual, pair, rtol=0, atol=0)
    plain = fd.qk_norm_rope(q, k, cos, sin, w, w)
    torch.testing.assert_close(plain, pair[0], rtol=0, atol=0)
    assert all(x.is_contiguous() and x.dtype == dtype for x in (*plain, *pair[1]))


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_without_angles_it_is_the_norm(norm: str) -> None:
    """Check it as cross-attention needs it, whose keys have no positions; then lengths may differ freely."""
    q, k, _ = make_qkv(n=5, m=8, d=12)
    plain = {"rms": lambda x: F.rms_norm(x, (12,), eps=1e-6), "layer": lambda x: F.layer_norm(x, (12,), eps=1e-6)}
    expected = [plain.get(norm, lambda x: x)(x) for x in (q, k)]
    torch.testing.assert_close(fd.qk_norm_rope(q, k, None, None, norm=norm), tuple(expected))


def test_attention_depends_on_distances_alone() -> None:
    """Check that logits are the same wherever the pair of tokens stands, which is what a rotary embedding is for."""
    q, k, _ = make_qkv(heads=1, n=1, d=32, dtype=torch.float64)
    q, k = (x.expand(-1, -1, 10, -1) for x in (q, k))
    for interleaved in (False, True):
        angles = fd.rope_angles((10,), 32, dtype=torch.float64)
        turned_q, turned_k = fd.qk_norm_rope(q, k, *angles, interleaved=interleaved)
        logits = (turned_q @ turned_k.mT)[0, 0]
        torch.testing.assert_close(logits[1:, 1:], logits[:-1, :-1])
        assert (logits[0, 0] - logits[0, 1]).abs() > 1e-3


def test_tangents_are_linear_and_none_is_zero() -> None:
    q, k, _ = make_qkv(d=12, dtype=torch.float64)
    t_q, t_k, _ = make_qkv(d=12, dtype=torch.float64, seed=1)
    angles = fd.rope_angles((63,), 12)
    push = lambda t_q, t_k: torch.stack(fd.qk_norm_rope_jvp(q, k, t_q, t_k, *angles)[1])  # noqa: E731
    torch.testing.assert_close(push(t_q, None) + push(None, t_k), push(t_q, t_k))
    assert not push(None, t_k)[0].any() and not push(None, None).any()


def test_a_float32_weight_beside_bfloat16_activations() -> None:
    """Check that its gradient is float32, and that the result is the float32 one rounded once."""
    q, k, _ = make_qkv(d=12, dtype=torch.bfloat16)
    w = torch.randn(12, requires_grad=True)
    angles = fd.rope_angles((63,), 12)
    out = fd.qk_norm_rope(q, k, *angles, w, w)
    wide = fd.qk_norm_rope(q.float(), k.float(), *angles, w, w)
    torch.testing.assert_close(out, tuple(x.bfloat16() for x in wide), rtol=0, atol=0)
    assert torch.autograd.grad(out[0].float().sum() + out[1].float().sum(), w)[0].dtype == torch.float32


def test_autocast_leaves_it_alone() -> None:
    q, k, _ = make_qkv(d=12)
    angles = fd.rope_angles((63,), 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fd.qk_norm_rope(q, k, *angles)
    torch.testing.assert_close(inside, fd.qk_norm_rope(q, k, *angles), rtol=0, atol=0)


def test_vmap_with_angles_of_each_sample() -> None:
    """Check angles that are mapped along with the queries, and angles shared by all."""
    q, k, _ = make_qkv(batch=6, n=5, d=12, dtype=torch.float64)
    q, k = (x.unflatten(0, (3, 2)) for x in (q, k))
    angles = fd.rope_angles(torch.randn(3, 2, 5, 2).flatten(0, 1), 12, dtype=torch.float64)
    mapped = [a.unflatten(0, (3, 2)) for a in angles]
    for given, dim in ((mapped, 0), ([a[:2] for a in angles], None), ([a[0] for a in angles], None)):
        op = lambda fn, dim=dim: torch.vmap(fn, (0, 0, dim, dim))  # noqa: E731
        ours, plain = (op(fn)(q, k, *given) for fn in (fd.qk_norm_rope, reference.qk_norm_rope))
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("moving", [False, True])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(moving: bool) -> None:
    q, k, _ = make_qkv(n=5, d=12, kv_heads=2, layout="bnhd", dtype=torch.bfloat16)
    angles = [a[None] for a in fd.rope_angles((5,), 12)]
    nothing = [None] * 4
    tangents = [q if moving else None, None, *nothing, None, None]
    args = (q, k, *nothing, *angles, *tangents, "rms", 1e-6, False, "torch", False)
    real = QK_NORM_ROPE._dual(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = QK_NORM_ROPE._fake_dual(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
    assert [describe(a) for a in faked] == [describe(a) for a in real]


def test_angles_of_each_axis() -> None:
    """Check that each pair of channels turns with the position on its axis, at its own frequency."""
    cos, sin = fd.rope_angles((2, 3, 4), 16, dims=(4, 6, 2), theta=100.0, dtype=torch.float64)
    assert cos.shape == sin.shape == (24, 8)
    frame, row, column = (i.flatten() for i in torch.meshgrid(*map(torch.arange, (2, 3, 4)), indexing="ij"))
    rates = [(frame, 1.0), (frame, 100 ** (-1 / 2)), (row, 1.0), (row, 100 ** (-1 / 3)), (row, 100 ** (-2 / 3))]
    rates += [(column, 1.0), (column, 0.0), (column, 0.0)]
    angle = torch.stack([position.double() * rate for position, rate in rates], dim=-1)
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())


def test_the_first_axis_gets_what_is_left() -> None:
    """Check that 128 channels over frames, rows and columns are 44 + 42 + 42, as in Wan."""
    _, sin = fd.rope_angles((3, 1, 1), 128)
    assert (sin[1] != 0).sum() == 22
    assert sin.dtype == torch.float32


def test_positions_may_be_given() -> None:
    """Check positions for each sample, with fractions; a grid is but a list of them."""
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    torch.testing.assert_close(fd.rope_angles(grid, 8), fd.rope_angles((2, 3), 8))
    positions = torch.rand(4, 5, 1)
    cos, sin = fd.rope_angles(positions, 8)
    assert cos.shape == (4, 5, 4)
    torch.testing.assert_close(torch.atan2(sin, cos)[..., 0], positions[..., 0])


Q = torch.ones(2, 4, 5, 8)
C, S = fd.rope_angles((5,), 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.qk_norm_rope(3.0, Q, C, S), "q: expected a tensor, got float"),
        (lambda: fd.qk_norm_rope(Q, Q[0], C, S), "k: expected 4 dimensions"),
        (lambda: fd.qk_norm_rope(Q, Q.double(), C, S), "k: expected torch.float32 as q"),
        (lambda: fd.qk_norm_rope(Q[..., :7], Q[..., :7], C, S), "q: expected an even head dim, got 7"),
        (lambda: fd.qk_norm_rope(Q, Q[..., :6], C, S), "k: expected the batch and head dim of q"),
        (lambda: fd.qk_norm_rope(Q, Q[:1], C, S), "k: expected the batch and head dim of q"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S, norm="l2"), "norm: expected one of 'rms', 'layer', 'none', got 'l2'"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S, k_weight=Q), r"k_weight: expected shape \(8,\)"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S, torch.ones(8), norm="none"), "q_weight: expected None with norm='none'"),
        (lambda: fd.qk_norm_rope(Q, Q, C, None), "sin: expected a tensor as cos is"),
        (lambda: fd.qk_norm_rope(Q, Q, C[:4], S), r"cos: expected \(5, 4\) or \(2, 5, 4\)"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S.expand(3, 5, 4)), r"sin: expected \(5, 4\) or \(2, 5, 4\)"),
        (lambda: fd.qk_norm_rope(Q, Q, C.clone().requires_grad_(), S), "cos requires grad"),
        (lambda: torch.func.jvp(lambda s: fd.qk_norm_rope(Q, Q, C, s), (S,), (S,)), "sin: expected a constant"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S, impl="quick"), "impl: expected one of"),
        (lambda: fd.qk_norm_rope_jvp(Q, Q, Q[:1], None, C, S), r"t_q: expected shape \(2, 4, 5, 8\) as q"),
        (lambda: fd.qk_norm_rope_jvp(Q, Q, Q, None, C, S, t_k_bias=C), "t_k_bias: expected None as k_bias is None"),
        (lambda: fd.qk_norm_rope_jvp(Q, Q, None, Q.clone().requires_grad_(), C, S), "t_k requires grad"),
        (lambda: fd.qk_norm_rope(Q, Q, C, S, interleaved="no"), "interleaved: expected a bool, got str"),
        (lambda: fd.rope_angles((5,), 7), "head_dim: expected a positive even number, got 7"),
        (lambda: fd.rope_angles((5,), 0), "head_dim: expected 2 or more, got 0"),
        (lambda: fd.rope_angles((5,), "8"), "head_dim: expected a whole number, got str"),
        (lambda: fd.rope_angles(5, 8), r"positions: expected the sizes of a grid, such as \(16, 16\), .* got 5"),
        (lambda: fd.rope_angles((), 8), "positions: expected the sizes of a grid"),
        (lambda: fd.rope_angles((5, -1), 8), r"positions\[1\]: expected 0 or more, got -1"),
        (lambda: fd.rope_angles((2.5,), 8), r"positions\[0\]: expected a whole number, got float"),
        (lambda: fd.rope_angles(torch.arange(5), 8), r"positions: expected \(N, axes\) or .* got \(5,\)"),
        (lambda: fd.rope_angles((5,), 8, theta=0), "theta: expected a positive number, got 0"),
        (lambda: fd.rope_angles((5,), 8, theta=float("nan")), "theta: expected a positive number, got nan"),
        (lambda: fd.rope_angles((5, 5), 8, dims=(8,)), "dims: expected 2 even numbers"),
        (lambda: fd.rope_angles((5,), 8, dims=(10,)), "dims: expected 1 even numbers"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
