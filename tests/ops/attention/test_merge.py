"""Attention over parts of the keys, merged, is attention over all of them, and so are its derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastdistill as fd
from fastdistill.ops import merge_attention, merge_attention_jvp
from fastdistill.testing import make_qkv

PARTS = (3, 1, 5)


def masks() -> list[Tensor]:
    """Return masks by which one query sees only the first part, one all but the first, and one nothing."""
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[1, 3:] = mask[2, :3] = mask[3] = False
    return list(mask.split(PARTS, -1))


def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    attend = partial(fd.scaled_dot_product_attention, return_lse=True)
    parts = [attend(q, *kv, mask) for *kv, mask in zip(k.split(PARTS, -2), v.split(PARTS, -2), masks())]
    return merge_attention([o for o, _ in parts], [lse for _, lse in parts])


def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = fd.scaled_dot_product_attention(q, k, v, torch.cat(masks(), -1), return_lse=True)
    return result


def points() -> tuple[list[Tensor], list[Tensor]]:
    draw = lambda seed: list(make_qkv(n=6, m=9, d=8, dtype=torch.float64, seed=seed))  # noqa: E731
    return draw(1), draw(2)


def test_merged_parts_are_the_whole_with_its_tangents() -> None:
    primals, tangents = points()
    ours, truth = (jvp(op, tuple(primals), tuple(tangents)) for op in (merged, whole))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    assert (truth[0][1][..., 3] == -torch.inf).all()


@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_gradients_flow_through_the_log_sum_exps(through_tangent: bool) -> None:
    """Check that each part's lse receives the cotangent of its share, as ring attention needs in training."""
    primals, tangents = points()

    def gradients(op: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
        (out, _), (t_out, _) = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        loss = (out.sin() * t_out).sum() if through_tangent else (out - t_out.detach()).square().sum()
        return torch.autograd.grad(loss, leaves if through_tangent else leaves[:3])

    torch.testing.assert_close(gradients(merged), gradients(whole), rtol=1e-11, atol=1e-12)


def test_explicit_pairs_merge_alike() -> None:
    (q, k, v), (t_q, t_k, t_v) = points()
    pair = partial(fd.attention_jvp, return_lse=True)
    split = [x.split(PARTS, -2) for x in (k, v, t_k, t_v)]
    parts = [pair(q, *kv, t_q, *t_kv, attn_mask=m) for kv, t_kv, m in zip(zip(*split[:2]), zip(*split[2:]), masks())]
    outs, t_outs, lses, t_lses = zip(*parts)
    ours = merge_attention_jvp(outs, t_outs, lses, t_lses)
    truth = pair(q, k, v, t_q, t_k, t_v, attn_mask=torch.cat(masks(), -1))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs: expected at least one part"),
        ([torch.ones(2, 3)], [], "lses: expected 1 parts as outs, got 0"),
        ([None], [torch.ones(3)], r"outs\[0\]: expected a tensor, got NoneType"),
        ([torch.ones(2, 3)], [torch.ones(2).long()], r"lses\[0\]: expected a floating-point tensor, got torch.int64"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"lses\[0\]: expected shape \(2,\), got \(3,\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        merge_attention(outs, lses)


def test_parts_of_two_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"outs\[1\]: expected torch.float32 as outs\[0\], got torch.float64"):
        merge_attention([torch.ones(2, 3), torch.ones(2, 3).double()], [torch.ones(2)] * 2)
