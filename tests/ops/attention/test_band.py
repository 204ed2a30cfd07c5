"""Windows, both causal alignments and the log-sum-exp through the public ops, on whatever implementation runs here."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import DEVICES, MemoryRecorder, make_qkv

BANDS: list[dict[str, Any]] = [
    {"window_size": (3, 2)},
    {"window_size": (0, -1), "align": "lower_right"},
    {"is_causal": True},
    {"is_causal": True, "align": "lower_right"},
    {"is_causal": True, "window_size": (2, 5), "align": "lower_right"},
]


def plain(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the band as a mask, from its definition."""
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("is_causal") else right
    n, m = q.shape[-2], k.shape[-2]
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)[None]
    i = i + (m - n if options.get("align") == "lower_right" else 0)
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    seen = seen & (j >= i - left) if left >= 0 else seen
    seen = seen & (j <= i + right) if right >= 0 else seen
    seen = seen if mask is None else seen & mask
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    dead = ~seen.any(-1).expand(logits.shape[:-1])
    lse = logits.masked_fill(dead.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(dead, -torch.inf)
    return reference.attention(q, k, v, seen), lse


@pytest.mark.parametrize("lengths", [(9, 9), (5, 11), (11, 5)], ids=str)
@pytest.mark.parametrize("options", BANDS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_band_is_the_mask_it_stands_for(options: dict[str, Any], lengths: tuple[int, int], device: str) -> None:
    """Compare values, log-sum-exp, tangents of both, and gradients through all four."""
    shape: dict[str, Any] = {"n": lengths[0], "m": lengths[1], "d": 8, "dtype": torch.float64, "device": device}
    primals, tangents = make_qkv(**shape, seed=1), make_qkv(**shape, seed=2)

    def run(op: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
        (out, lse), (t_out, mu) = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        live = lse.detach() > -torch.inf
        loss = (out.sin() * t_out).sum() + (lse[live].cos() * mu[live]).sum()
        return (out, lse, t_out, mu, *torch.autograd.grad(loss, leaves))

    ours = run(partial(fd.scaled_dot_product_attention, return_lse=True, **options))
    torch.testing.assert_close(ours, run(lambda *x: plain(*x, options)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("options", BANDS, ids=str)
def test_a_band_without_tangents_is_the_same(options: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(n=6, m=9, d=8, dtype=torch.float64))
    out = fd.scaled_dot_product_attention(q, k, v, **options)
    truth, _ = plain(q, k, v, options)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), (q, k, v)), torch.autograd.grad(truth.sin().sum(), (q, k, v))
    )


def test_a_window_combines_with_a_mask() -> None:
    q, k, v = make_qkv(n=9, d=8, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 9) > 0.4
    options = {"window_size": (3, 1)}
    out, lse = fd.scaled_dot_product_attention(q, k, v, mask, return_lse=True, **options)
    torch.testing.assert_close((out, lse), plain(q, k, v, options, mask))


def test_a_window_costs_its_width_and_not_the_length() -> None:
    """Check that what a long sequence allocates in a narrow window grows as it does without attention."""
    n = 4096
    q, k, v = (x.requires_grad_() for x in make_qkv(batch=1, heads=1, n=n, d=16))
    with MemoryRecorder() as recorder:
        op = partial(fd.scaled_dot_product_attention, window_size=(64, 0))
        out, t_out = jvp(op, (q, k, v), (q.detach(), k.detach(), v.detach()))
        torch.autograd.grad((out.sin() + t_out).sum(), (q, k, v))
    assert recorder.largest <= 1 << 20


def test_the_log_sum_exp_is_float32_in_16_bits_and_its_gradient_reaches_q_and_k() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(n=9, d=16, dtype=torch.bfloat16))
    out, lse = fd.scaled_dot_product_attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    truth = torch.autograd.grad((q.float() @ k.float().mT / 4).logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), truth, rtol=0.03, atol=0.01)
    assert dv is None or not dv.any()


def test_return_lse_works_with_any_leading_dimensions_and_compiles() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 3, 4, 5, 8, dtype=torch.float64) for _ in range(3))
    op = partial(fd.scaled_dot_product_attention, return_lse=True, window_size=(1, 1))
    push = lambda *x: jvp(op, x, x)  # noqa: E731
    (out, lse), (t_out, mu) = push(q, k, v)
    assert lse.shape == mu.shape == (2, 3, 4, 5)
    assert op(q[0, 0], k[0, 0], v[0, 0])[1].shape == (4, 5)
    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(compiled, ((out, lse), (t_out, mu)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 3}, r"window_size: expected \(left, right\)"),
        ({"window_size": (-2, 0)}, "window_size: expected .* got \\(-2, 0\\)"),
        ({"window_size": (-1.0, -1.0)}, "window_size: expected .* got \\(-1.0, -1.0\\)"),
        ({"window_size": torch.tensor([-1, -1])}, "window_size: expected .* got tensor"),
        ({"window_size": (torch.zeros(2), None)}, "window_size: expected .* got \\(tensor"),
        ({"align": "bottom"}, "align: expected one of 'upper_left', 'lower_right', got 'bottom'"),
        ({"dropout_p": 0.5, "window_size": (1, 1)}, "dropout_p: expected 0.0"),
        ({"dropout_p": 0.5, "centre": True}, "dropout_p: expected 0.0"),
    ],
)
def test_bad_bands_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    q, k, v = make_qkv(n=5, d=8)
    with pytest.raises(ValueError, match=message):
        fd.scaled_dot_product_attention(q, k, v, **changes)


def test_a_tangent_of_a_tangent_is_refused_unless_the_dense_form_is_asked_for() -> None:
    q, k, v = make_qkv(n=5, d=8, dtype=torch.float64)
    inner = lambda impl: lambda q: jvp(lambda q: fd.scaled_dot_product_attention(q, k, v, impl=impl), (q,), (q,))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="attention: expected one level of forward AD"):
        jvp(inner("auto"), (q,), (q,))
    dense = lambda q: jvp(lambda q: reference.attention(q, k, v), (q,), (q,))[1]  # noqa: E731
    torch.testing.assert_close(jvp(inner("torch"), (q,), (q,)), jvp(dense, (q,), (q,)))


def test_the_tangent_of_a_bias_may_have_more_rows_than_the_bias_under_vmap() -> None:
    q, k, v = make_qkv(n=5, d=8, dtype=torch.float64)
    bias, a = torch.randn(5, 5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def slope(op: Any) -> tuple[Tensor, ...]:
        jacobian = torch.func.jacfwd(lambda m: op(q, k, v, a * m).sum())(bias)
        return torch.autograd.grad(jacobian.pow(2).sum(), a)

    torch.testing.assert_close(slope(fd.scaled_dot_product_attention), slope(reference.attention))


@pytest.mark.parametrize("scale", [torch.tensor(0.3), "0.3"], ids=["tensor", "str"])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    with pytest.raises(TypeError, match="scale: expected a number or None, got"):
        fd.scaled_dot_product_attention(*make_qkv(n=5, d=8), scale=scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.float32(0.3), float("nan")], ids=str)
@pytest.mark.parametrize("kind", ["whole", "causal", "mask"])
def test_any_scale_means_what_it_says(kind: str, scale: Any) -> None:
    """Check scales for which PyTorch's own causal CPU kernel gives NaN (not positive) or zeros (NaN)."""
    q, k, v = make_qkv(n=5, d=8, dtype=torch.float64)
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen = seen if kind == "whole" else seen.tril()
    options: dict[str, Any] = {"is_causal": True} if kind == "causal" else {"attn_mask": seen} if kind == "mask" else {}
    truth = reference.attention(q, k, v, seen, scale=float(scale))
    run = lambda q: fd.scaled_dot_product_attention(q, k, v, **options, scale=scale)  # noqa: E731
    for ours in (run(q), jvp(run, (q,), (q,))[0]):
        torch.testing.assert_close(ours, truth, equal_nan=True)


def test_heads_without_channels_are_refused() -> None:
    q, k, v = make_qkv(n=5, d=8)
    with pytest.raises(ValueError, match="value: expected a head dim of at least 1, got 0"):
        fd.scaled_dot_product_attention(q, k, v[..., :0])
    with pytest.raises(ValueError, match="query: expected a head dim of at least 1, got 0"):
        fd.scaled_dot_product_attention(q[..., :0], k[..., :0], v)


def test_explain_refuses_what_an_explicit_triton_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="impl='triton' cannot run: float64"):
        fd.explain(*make_qkv(n=5, d=8, dtype=torch.float64), impl="triton")
