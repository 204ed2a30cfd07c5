"""Pre-centring: exact in real numbers, and better in 16 bits where keys and values share a common mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import cast, make_qkv, reference_jvp, relative_error


def points(dtype: torch.dtype, **shape: Any) -> tuple[list[Tensor], list[Tensor]]:
    draw = lambda seed: list(make_qkv(n=9, m=17, d=16, dtype=dtype, seed=seed, **shape))  # noqa: E731
    return draw(1), draw(2)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=["full", "lower-right-causal-with-dead-rows"])
def test_centring_changes_nothing_in_exact_arithmetic(window: tuple[int, int]) -> None:
    """Compare output, log-sum-exp, tangents and gradients, with shared key heads and queries that see nothing."""
    primals, tangents = points(torch.float64, heads=4, kv_heads=2)
    primals, tangents = (
        [x[:, :, :9] if i else x.repeat(1, 1, 2, 1) for i, x in enumerate(p)] for p in (primals, tangents)
    )

    def run(centre: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
        op = lambda *x: fd.scaled_dot_product_attention(  # noqa: E731
            *x, enable_gqa=True, window_size=window, align="lower_right", return_lse=True, centre=centre
        )
        (out, lse), (t_out, mu) = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        live = lse.detach() > -torch.inf
        loss = (out.sin() * t_out).sum() + (lse[live].sin() * mu[live]).sum()
        return (out, lse, t_out, mu, *torch.autograd.grad(loss, leaves))

    plain, centred = run(False), run(True)
    assert (plain[1] == -torch.inf).any() == (window == (-1, 0))
    torch.testing.assert_close(centred, plain, rtol=1e-11, atol=1e-12)


def test_the_explicit_pair_centres_alike() -> None:
    primals, tangents = points(torch.float64)
    plain, centred = (fd.attention_jvp(*primals, *tangents, return_lse=True, centre=c) for c in (False, True))
    torch.testing.assert_close(centred, plain, rtol=1e-11, atol=1e-12)
    only_q = [fd.attention_jvp(*primals, tangents[0], return_lse=True, centre=c) for c in (False, True)]
    torch.testing.assert_close(only_q[1], only_q[0], rtol=1e-11, atol=1e-12)


def test_a_common_mode_no_longer_costs_accuracy_under_autocast() -> None:
    """Check float32 keys 30 off the origin: rounded to bfloat16 as they are, they lose what tells them apart."""
    primals, tangents = points(torch.float32)
    primals[1] = primals[1] + 30
    names = ("q", "k", "v")
    truth = reference_jvp(
        lambda q, k, v: reference.attention(q, k, v),
        cast(dict(zip(names, primals)), torch.float64),
        cast(dict(zip(names, tangents)), torch.float64),
    )
    errors = {}
    for centre in (False, True):
        op = lambda *x, c=centre: fd.scaled_dot_product_attention(*x, centre=c)  # noqa: E731
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = jvp(op, tuple(primals), tuple(tangents))
        errors[centre] = [relative_error(x, y) for x, y in zip(outs, truth)]
    assert max(errors[True]) < 0.01
    assert min(errors[False]) > 3 * max(errors[True])


def test_a_pair_without_tangent_grad_carries_no_graph_on_any_tangent() -> None:
    leaves = [x.requires_grad_() for x in points(torch.float64)[0]]
    results = fd.attention_jvp(*leaves, *points(torch.float64)[1], return_lse=True, centre=True)
    assert [x.requires_grad for x in results] == [True, False, True, False]
