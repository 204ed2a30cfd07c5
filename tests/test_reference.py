"""Compare the specification with PyTorch's own ops, and with finite differences of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fastdistill import reference
from fastdistill.testing import make_packed, make_qkv, reference_jvp


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_tangent_equal_math_sdpa(mask: str, scale: float | None, kv_heads: int) -> None:
    """Check the math implementation, which has a forward mode, in float64."""
    sizes = {"heads": 4, "n": 9, "m": 13, "d": 8, "dv": 5, "kv_heads": kv_heads, "dtype": torch.float64}
    primals, tangents = make_qkv(2, **sizes), make_qkv(2, seed=1, **sizes)  # type: ignore[arg-type]
    masks = {"none": None, "bool": torch.rand(9, 13) < 0.6, "float": torch.randn(4, 9, 13, dtype=torch.float64)}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, masks[mask], scale=scale)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, masks[mask], scale=scale, enable_gqa=True)

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(torchs, primals, tangents)
    for actual, wanted in zip(torch.func.jvp(ours, primals, tangents), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (9, 5), (5, 9)])
def test_causal_attention_equals_sdpas(n: int, m: int) -> None:
    """Check that it is aligned to the top left where N != M."""
    q, k, v = make_qkv(2, 2, n, 8, m=m, dtype=torch.float64)
    close(reference.attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_causal_combines_with_a_mask() -> None:
    """Check that together they act as the mask of both, which SDPA refuses."""
    q, k, v = make_qkv(2, 2, 7, 8, dtype=torch.float64)
    mask = torch.rand(7, 7) < 0.7
    close(reference.attention(q, k, v, mask, is_causal=True), reference.attention(q, k, v, mask.tril()))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_no_key_gives_zeros_with_finite_derivatives(kind: str) -> None:
    """Check value, tangent, and gradients of both."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 6, 4, dtype=torch.float64))
    visible = torch.ones(6, 6, dtype=torch.bool)
    visible[2] = False
    mask = visible if kind == "bool" else torch.zeros(6, 6, dtype=torch.float64).masked_fill(~visible, -math.inf)
    tangents = dict(zip("qkv", make_qkv(1, 2, 6, 4, seed=1, dtype=torch.float64), strict=True))
    o, t_o = reference_jvp(reference.attention, {"q": q, "k": k, "v": v, "attn_mask": mask}, tangents)
    assert (o[:, :, 2] == 0).all()
    assert (t_o[:, :, 2] == 0).all()
    for gradient in torch.autograd.grad(o.sum() + (t_o * t_o).sum(), (q, k, v)):
        assert gradient.isfinite().all()
    assert (torch.autograd.grad(reference.attention(q, k, v, mask).square().sum(), q)[0][:, :, 2] == 0).all()


WINDOWS = [((-1, 0), False), ((2, 1), False), ((2, 1), True), ((0, -1), True), ((-1, 0), True)]


@pytest.mark.parametrize(("window", "lower_right"), WINDOWS)
@pytest.mark.parametrize(("n", "m"), [(7, 7), (9, 5), (5, 9)])
def test_a_window_is_the_mask_that_it_says(window: tuple[int, int], lower_right: bool, n: int, m: int) -> None:
    """Check that query i sees j from i + shift - left to i + shift + right, also beside a mask and is_causal."""
    q, k, v = make_qkv(2, 2, n, 8, m=m, dtype=torch.float64)
    (left, right), shift = window, m - n if lower_right else 0
    i, j, mask = torch.arange(n)[:, None] + shift, torch.arange(m), torch.rand(n, m) < 0.7
    allowed = (j >= i - (99 if left < 0 else left)) & (j <= i + (99 if right < 0 else right))
    band: dict[str, Any] = {"window": window, "lower_right": lower_right}
    close(reference.attention(q, k, v, **band), reference.attention(q, k, v, allowed))
    close(reference.attention(q, k, v, mask, **band), reference.attention(q, k, v, allowed & mask))
    close(reference.attention(q, k, v, is_causal=True, **band), reference.attention(q, k, v, allowed & (j <= i)))


def test_a_lower_right_causal_mask_equals_pytorchs() -> None:
    """Compare with the mask of `torch.nn.attention.bias`."""
    q, k, v = make_qkv(2, 2, 5, 8, m=9, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 9))
    close(reference.attention(q, k, v, is_causal=True, lower_right=True), expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_the_log_sum_exp_equals_pytorchs_and_its_tangent_is_the_mean_of_the_logits_tangent(mask: str) -> None:
    """Check mu = rowsum(P∘T), under grouped queries and a window."""
    primals, tangents = (make_qkv(2, 4, 6, 8, kv_heads=2, m=5, dtype=torch.float64, seed=seed)[:2] for seed in (0, 1))
    masks = {"none": None, "bool": torch.rand(6, 5) < 0.8, "float": torch.randn(4, 6, 5, dtype=torch.float64)}

    def logits(q: Tensor, k: Tensor) -> Tensor:
        s = q @ k.repeat_interleave(2, dim=1).mT * 0.3
        s = s if mask == "none" else s + masks[mask] if mask == "float" else s.masked_fill(~masks[mask], -math.inf)
        return s.masked_fill(~reference.band(6, 5, (4, 1), False), -math.inf)

    lse, mu = torch.func.jvp(
        lambda q, k: reference.attention_lse(q, k, masks[mask], scale=0.3, window=(4, 1)), primals, tangents
    )
    s, t_s = torch.func.jvp(logits, primals, tangents)
    close(lse, torch.logsumexp(s, dim=-1))
    close(mu, (torch.softmax(s, dim=-1) * t_s).nan_to_num().sum(-1))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_log_sum_exp_of_no_key_is_minus_infinity_without_derivatives(kind: str) -> None:
    """Check for zeros in tangent and gradients, and in the gradients of the tangent."""
    visible = torch.ones(6, 6, dtype=torch.bool)
    visible[2] = False
    mask = visible if kind == "bool" else torch.zeros(6, 6, dtype=torch.float64).masked_fill(~visible, -math.inf)
    q, k, _ = (x.requires_grad_() for x in make_qkv(1, 2, 6, 4, dtype=torch.float64))
    t_q, t_k, _ = (x.requires_grad_() for x in make_qkv(1, 2, 6, 4, seed=1, dtype=torch.float64))
    lse, mu = torch.func.jvp(lambda q, k: reference.attention_lse(q, k, mask), (q, k), (t_q, t_k))
    assert (lse[:, :, 2] == -math.inf).all()
    assert (mu[:, :, 2] == 0).all()
    for x in (lse, mu):
        for gradient in torch.autograd.grad(x.sum(), (q, k), retain_graph=True):
            assert gradient.isfinite().all()
        assert (torch.autograd.grad(x.sum(), q, retain_graph=True)[0][:, :, 2] == 0).all()


def test_no_keys_at_all_is_a_row_that_sees_no_key() -> None:
    """Check for zeros and -inf, and that the gradients are zeros."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 3, 4, dtype=torch.float64))
    o, lse = reference.attention(q, k[:, :, :0], v[:, :, :0]), reference.attention_lse(q, k[:, :, :0])
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    assert (torch.autograd.grad(o.sum() + lse.sum(), q)[0] == 0).all()


@pytest.mark.parametrize(("window", "lower_right"), [((-1, -1), False), *WINDOWS])
def test_packed_sequences_equal_sdpa_of_each(window: tuple[int, int], lower_right: bool) -> None:
    """Check sequences without queries and without keys; tokens outside give zeros and get no gradients."""
    queries, keys = (3, 0, 5, 2), (4, 2, 5, 0)
    (q, k, v), (cu_q, cu_k, *_) = make_packed(queries, keys, 4, 8, kv_heads=2, spare=1, dtype=torch.float64)
    q, k, v = (x[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v))
    o = reference.varlen_attention(q, k, v, cu_q, cu_k, window=window, lower_right=lower_right)
    parts = zip(q[1:-1].split(queries), k[1:-1].split(keys), v[1:-1].split(keys))
    for part, (q_z, k_z, v_z) in zip(o[1:-1].split(queries), parts):
        if len(q_z) and len(k_z):
            mask = reference.band(len(q_z), len(k_z), window, lower_right)
            heads_first = (x.transpose(0, 1)[None] for x in (q_z, k_z, v_z))
            expected = F.scaled_dot_product_attention(*heads_first, mask, enable_gqa=True)[0].transpose(0, 1)
            close(part, expected.nan_to_num())
    for x in (o, *torch.autograd.grad(o.square().sum(), (q, k, v))):
        assert (x[[0, -1]] == 0).all()
    assert (o[-3:] == 0).all()


def test_large_logits_do_not_overflow() -> None:
    """Check it also where a whole row is far below zero."""
    q, k, v = make_qkv(1, 1, 4, 4, dtype=torch.float64)
    close(reference.attention(1e3 * q, k, v), F.scaled_dot_product_attention(1e3 * q, k, v))
    close(reference.attention(q, k, v, torch.full((4, 4), -1e4)), reference.attention(q, k, v))


def test_attention_is_twice_differentiable_in_both_modes() -> None:
    """Compare gradients and tangents of the gradients with finite differences."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 4, 3, kv_heads=1, m=5, dtype=torch.float64))
    mask = torch.rand(4, 5) < 0.8

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask)

    def log_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_lse(q, k, mask)

    for fn in (attend, log_sum):
        assert torch.autograd.gradcheck(fn, (q, k, v), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(fn, (q, k, v), check_fwd_over_rev=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_a_modulated_norm_is_twice_differentiable_in_both_modes(rms: bool) -> None:
    """Check all five arguments at once."""
    shapes = ((2, 3, 5), (5,), (5,), (2, 1, 5), (2, 1, 5))
    arguments = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return reference.norm(x, weight, bias, scale, shift, 1e-3, rms)

    assert torch.autograd.gradcheck(norm, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, arguments, check_fwd_over_rev=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_reverse_over_forward_equals_forward_over_reverse(rms: bool) -> None:
    """Compute d<w, jvp>/dx in two ways; torch 2.13's own layer_norm fails this check."""
    x, t_x, w = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))

    def norm(x: Tensor) -> Tensor:
        return reference.norm(x, eps=1e-3, rms=rms)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(norm, (x,), (t_x,))[1]

    reverse = torch.func.vjp(tangent, x)[1](w)[0]
    forward = torch.func.jvp(lambda x: torch.func.vjp(norm, x)[1](w)[0], (x,), (t_x,))[1]
    close(reverse, forward)


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_norms_equal_pytorchs(shape: tuple[int, ...]) -> None:
    """Check one or two trailing dimensions, with and without parameters."""
    x, weight, bias = torch.randn(2, 3, 8).double() * 3 + 1, torch.randn(shape).double(), torch.randn(shape).double()
    for w, b in ((None, None), (weight, None), (weight, bias)):
        close(reference.layer_norm(x, shape, w, b, 1e-3), F.layer_norm(x, shape, w, b, 1e-3))
    for w in (None, weight):
        for eps in (None, 1e-3):
            close(reference.rms_norm(x, shape, w, eps), F.rms_norm(x, shape, w, eps))


def test_ada_layer_norm_is_layer_norm_modulated() -> None:
    """Check norm(x) * (1 + scale) + shift, with the tangents of all three."""
    primals = (torch.randn(2, 3, 8).double(), torch.randn(2, 1, 8).double(), torch.randn(2, 1, 8).double())
    tangents = tuple(torch.randn_like(x) for x in primals)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), weight, bias, 1e-6) * (1 + scale) + shift

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return reference.ada_layer_norm(x, scale, shift, weight, bias)

    found = torch.func.jvp(ours, primals, tangents)
    for actual, expected in zip(found, torch.func.jvp(modulated, primals, tangents), strict=True):
        close(actual, expected)


def test_ada_rms_norm_is_rms_norm_modulated() -> None:
    """Check it with a shift and without."""
    x, scale, shift = torch.randn(3, 2, 3, 8, dtype=torch.float64).unbind(0)
    weight = torch.randn(8, dtype=torch.float64)
    expected = F.rms_norm(x, (8,), weight, 1e-6) * (1 + scale)
    close(reference.ada_rms_norm(x, scale, None, weight), expected)
    close(reference.ada_rms_norm(x, scale, shift, weight), expected + shift)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_the_gated_residual_is_two_lines(rms: bool) -> None:
    """Check a residual and its norm, also without a gate; each result has the dtype of its own input."""
    x, h, gate, scale, shift = torch.randn(5, 2, 3, 8, dtype=torch.float64).unbind(0)
    r, y = reference.gated_residual_ada_norm(x, gate, h, scale, shift, rms=rms)
    close(r, x + gate * h)
    normed = F.rms_norm(r, (8,), None, 1e-6) if rms else F.layer_norm(r, (8,), None, None, 1e-6)
    close(y, normed * (1 + scale) + shift)
    close(reference.gated_residual_ada_norm(x, None, h, None, None, rms=rms)[0], x + h)
    r, y = reference.gated_residual_ada_norm(x.float(), gate.float(), h.bfloat16(), None, None, rms=rms)
    assert (r.dtype, y.dtype) == (torch.float32, torch.bfloat16)


def test_attention_works_under_a_dual_level() -> None:
    """Check that the other entrance to forward mode gives the same tangent."""
    primals, tangents = (make_qkv(1, 2, 5, 4, dtype=torch.float64, seed=seed) for seed in (0, 1))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(reference.attention(*duals)).tangent
    close(tangent, torch.func.jvp(reference.attention, primals, tangents)[1])


def test_activations_and_linear_layers_equal_pytorchs() -> None:
    """Check both tails, and gated forms."""
    x, up = torch.linspace(-9, 9, 101, dtype=torch.float64), torch.randn(101, dtype=torch.float64)
    close(reference.silu(x), F.silu(x))
    close(reference.swiglu(x, up), F.silu(x) * up)
    for approximate in ("none", "tanh"):
        close(reference.gelu(x, approximate), F.gelu(x, approximate=approximate))
        close(reference.geglu(x, up, approximate), F.gelu(x, approximate=approximate) * up)
    weight, bias = torch.randn(7, 101, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    for b in (None, bias):
        close(reference.linear(up, weight, b), F.linear(up, weight, b))
