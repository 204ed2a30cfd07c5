"""Formulas that second derivatives take: as the references' derivatives, and endlessly differentiable."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.ops.attention import second_order
from fastdistill.ops.protocol.pair import Pair, flat, paired
from fastdistill.testing import make_packed, make_qkv

Tensors = tuple[Tensor, ...]
BANDS: list[tuple[tuple[int, int], bool]] = [((-1, -1), False), ((-1, 0), False), ((2, 1), True), ((1, -1), True)]


def inputs(m: int = 7, **sizes: Any) -> list[list[Tensor]]:
    """Return (q, k, v, mask) and tangents of all four."""
    points = []
    for seed in (0, 1):
        qkv = make_qkv(2, 4, 5, 3, kv_heads=2, m=m, dv=4, dtype=torch.float64, seed=seed, **sizes)
        points.append([*qkv, torch.randn(1, 4, 5, m, dtype=torch.float64)])
    return points


def specification(
    primals: Tensors, window: tuple[int, int] = (-1, -1), lower_right: bool = False, cu_seqlens: Any = None
) -> tuple[Tensor, Tensor]:
    """Return (o, lse), packed sequences one at a time."""
    q, k, v, *mask = primals
    if cu_seqlens is None:
        lse = reference.attention_lse(q, k, *mask, window=window, lower_right=lower_right)
        return reference.attention(q, k, v, *mask, window=window, lower_right=lower_right), lse
    bounds = zip(*(itertools.pairwise(x.tolist()) for x in cu_seqlens[:2]))
    parts = [
        specification((q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]), window, lower_right) for (a, b), (c, d) in bounds
    ]
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def dual(primals: Any, tangents: Any, *band: Any) -> Any:
    """Return ((o, lse), (t_o, mu)) by the formulas; `band` is (window, lower_right, cu_seqlens, scale)."""
    named = dict(zip(("window", "lower_right", "cu_seqlens", "scale"), band, strict=True))
    return tuple(zip(*second_order.attention_dual(paired(primals, tangents), **named)))


def dual_backward(
    do: Any, dt_o: Any, d_lse: Any, d_mu: Any, primals: Any, tangents: Any, *band: Any, needs: list[bool]
) -> list[Tensor | None]:
    """Return the gradients of primals and then of tangents by the formulas."""
    named = dict(zip(("window", "lower_right", "cu_seqlens", "scale"), band, strict=True))
    cotangents, wanted = [Pair(do, dt_o), Pair(d_lse, d_mu)], list(zip(needs[:4], needs[4:]))
    inputs = paired(primals, tangents)
    return flat(second_order.attention_dual_backward(cotangents, inputs, **named, needs=wanted))


def check(primals: list[Tensor], tangents: list[Tensor], window: Any, lower_right: bool, cu_seqlens: Any) -> None:
    """Check (o, lse), (t_o, mu) and all gradients of all of them."""
    band, scale = (window, lower_right, cu_seqlens), primals[0].shape[-1] ** -0.5
    leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
    count = len(primals)
    outs, t_outs = torch.func.jvp(lambda *x: specification(x, *band), tuple(leaves[:count]), tuple(leaves[count:]))
    none = [None] * (4 - count)
    point: Any = ((*primals, *none), (*tangents, *none), *band, scale)
    found = dual(*point)
    torch.testing.assert_close(found, ((outs[0], outs[1]), (t_outs[0], t_outs[1])), rtol=0, atol=1e-12)

    results, live = (outs[0], t_outs[0], outs[1], t_outs[1]), outs[1].isfinite()
    cotangents = [torch.randn_like(x) for x in results]
    loss_terms = [(torch.where(live, y, 0.0) if y.dim() == 3 else y) * d for y, d in zip(results, cotangents)]
    # What comes back through the lse of a dead row, -inf, may be anything.
    cotangents[2:] = (torch.where(live, d, torch.nan) for d in cotangents[2:])
    for wanted in itertools.product([True, False], repeat=4):
        given = [x if want else None for x, want in zip(cotangents, wanted)]
        gradients = dual_backward(*given, *point, needs=[True] * 8)
        loss = sum((x.sum() for x, want in zip(loss_terms, wanted) if want), leaves[0].sum() * 0)
        truths = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close([x for x in gradients if x is not None], list(truths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("m", [3, 5, 7])
def test_windows_match_the_references_derivatives(band: tuple[tuple[int, int], bool], m: int) -> None:
    """Check every subset of cotangents, with a bias that has a tangent, and rows that see nothing."""
    check(*inputs(m), *band, None)


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("lengths", [((4, 0, 3, 2), (2, 3, 0, 6)), ((2, 3), (0, 0))], ids=str)
def test_packed_sequences_match_the_references_derivatives(band: Any, lengths: Any) -> None:
    """Check one mask of blocks: each with its own positions, some without queries, some without keys."""
    packs = [make_packed(*lengths, 4, 3, kv_heads=2, dv=4, dtype=torch.float64, seed=seed) for seed in (0, 1)]
    check(list(packs[0][0]), list(packs[1][0]), *band, packs[0][1])


def test_tokens_outside_all_sequences_see_nothing() -> None:
    """Check that they don't even see each other."""
    (q, k, v), cu_seqlens = make_packed((2, 3), (3, 1), 2, 4, spare=2)
    (o, lse), (t_o, mu) = dual((q, k, v, None), (q, None, v, None), (-1, -1), False, cu_seqlens, 1.0)
    outside = [0, 1, 7, 8]
    assert (lse[:, :, outside] == -torch.inf).all()
    assert lse[:, :, 2:7].isfinite().all()
    assert all(x is not None and (x[:, :, outside] == 0).all() for x in (o, t_o, mu))


def test_absent_tangents_are_zeros() -> None:
    """Check each absent alone and together; without any there is no t_o and no mu."""
    primals, tangents = inputs()
    rest: Any = ((-1, 0), True, None, 0.5)
    for wanted in itertools.product([True, False], repeat=4):
        some = tuple(t if want else None for t, want in zip(tangents, wanted))
        zeros = tuple(t if want else torch.zeros_like(t) for t, want in zip(tangents, wanted))
        found, expected = (dual(primals, x, *rest) for x in (some, zeros))
        if any(wanted):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        else:
            assert found[1] == (None, None)


def test_16_bits_are_computed_and_the_statistics_returned_in_float32() -> None:
    """Check it as by the implementations; o, t_o and gradients are in the dtype of the inputs."""
    primals, tangents = ([x.bfloat16() for x in point] for point in inputs())
    arguments: Any = (tuple(primals), tuple(tangents), (-1, -1), False, None, 0.5)
    (o, lse), (t_o, mu) = dual(*arguments)
    assert t_o is not None and mu is not None
    assert (o.dtype, t_o.dtype, lse.dtype, mu.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    for x in dual_backward(o, t_o, lse, mu, *arguments, needs=[True] * 8):
        assert x is not None and x.dtype == torch.bfloat16


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_both_formulas_are_differentiable_again_and_again(packed: bool) -> None:
    """Check gradients and tangents of gradients of (o, lse, t_o, mu) and of the backward by finite differences."""
    lengths = ((2, 1, 1), (2, 0, 3)) if packed else ((4,), (5,))
    (q, k, v), cu_seqlens = make_packed(*lengths, 2, 2, kv_heads=1, dtype=torch.float64)
    options: Any = ((1, 1), True, cu_seqlens if packed else None, 0.7)
    leaves = tuple(torch.randn_like(x).requires_grad_() for x in (q, k, v, q, k, v))

    def forward(*x: Tensor) -> Tensors:
        (o, lse), (t_o, mu) = dual((*x[:3], None), (*x[3:], None), *options)
        return o, lse.masked_fill(lse == -torch.inf, 0.0), t_o, mu

    def backward(*x: Tensor) -> Tensors:
        cotangents = (x[0] + 1, x[3].sin(), x[0].sum(-1), x[3].cos().sum(-1))
        point: Any = (*cotangents, (*x[:3], None), (*x[3:], None))
        needs = [True, True, True, False] * 2
        return tuple(g for g in dual_backward(*point, *options, needs=needs) if g is not None)

    for fn in (forward, backward):
        assert torch.autograd.gradcheck(fn, leaves, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, leaves, check_fwd_over_rev=True, fast_mode=True)
