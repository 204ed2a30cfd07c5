"""Attention on whatever PyTorch's takes: any dimensions that broadcast, heads of their own, and every kind of mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

import fastdistill as fd
from fastdistill.testing import assert_accurate, make_qkv

# Shapes of query, key and value, and whether heads are grouped: every rank, and each argument as the one that is
# broadcast, in its batch, its heads or both; then keys and values with numbers of heads of their own.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = [
    ((5, 8), (6, 8), (6, 7), False),
    ((3, 5, 8), (3, 6, 8), (3, 6, 7), False),
    ((4, 2, 3, 5, 8), (4, 2, 3, 6, 8), (4, 2, 3, 6, 7), False),
    ((2, 3, 5, 8), (1, 3, 6, 8), (1, 3, 6, 7), False),
    ((2, 3, 5, 8), (2, 1, 6, 8), (2, 1, 6, 7), False),
    ((2, 3, 5, 8), (2, 3, 6, 8), (1, 1, 6, 7), False),
    ((1, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 7), False),
    ((2, 1, 5, 8), (2, 3, 6, 8), (2, 1, 6, 7), False),
    ((2, 3, 5, 8), (3, 6, 8), (6, 7), False),
    ((5, 8), (2, 3, 6, 8), (2, 3, 6, 7), False),
    ((2, 6, 5, 8), (2, 3, 6, 8), (2, 2, 6, 8), True),
    ((2, 6, 5, 8), (2, 2, 6, 8), (2, 6, 6, 8), True),
    ((4, 2, 6, 5, 8), (2, 3, 6, 8), (1, 1, 6, 8), True),
    ((0, 3, 5, 8), (1, 3, 6, 8), (3, 6, 8), False),
    ((2, 0, 5, 8), (2, 1, 6, 8), (2, 0, 6, 8), False),
    ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), False),
]


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """Return attention from its definition, by broadcasting."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v


def drawn(shapes: Any) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*shapes, *shapes)]


def mixed(op: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return value, tangent, and gradients of a loss of both."""
    half = len(leaves) // 2
    return graded(*jvp(op, tuple(leaves[:half]), tuple(leaves[half:])), leaves)


def graded(out: Tensor, t_out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return (out, t_out, *torch.autograd.grad((out.sin() * t_out).sum(), leaves))


@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize(("q", "k", "v", "gqa"), SHAPES, ids=str)
def test_dimensions_broadcast_as_they_do_in_pytorch(q: Any, k: Any, v: Any, gqa: bool, masked: str | None) -> None:
    """Compare values, tangents and gradients, each in its argument's own shape, by the op and by the explicit pair."""
    leaves = drawn((q, k, v))
    mask = None if masked is None else torch.randn(q[-2], k[-2], dtype=torch.float64)
    if mask is not None and masked == "bool":
        mask = (mask > 0) | (torch.arange(k[-2]) == 0)
    options: dict[str, Any] = {"enable_gqa": gqa}
    still = fd.scaled_dot_product_attention(*leaves[:3], mask, **options)
    torch.testing.assert_close(still, F.scaled_dot_product_attention(*leaves[:3], mask, **options))
    truth = mixed(lambda *x: plain(*x, mask, **options), leaves) if k[-2] else None
    ours = mixed(lambda *x: fd.scaled_dot_product_attention(*x, mask, **options), leaves)
    pair = graded(*fd.attention_jvp(*leaves, attn_mask=mask, tangent_grad=True, **options), leaves)
    torch.testing.assert_close(pair, ours)
    if truth is None:  # without keys the definition is 0 / 0
        assert not any(x.any() for x in ours)
    else:
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("case", [6, 7, 10])
def test_a_broadcast_argument_may_move_alone(case: int, given: str) -> None:
    """Check each subset of tangents, of an argument that is broadcast and of one that isn't."""
    *shapes, gqa = SHAPES[case]
    primals = dict(zip("qkv", (torch.randn(shape, dtype=torch.float64) for shape in shapes)))
    tangents = {name: torch.randn_like(primals[name]) for name in given}
    full = {name: tangents.get(name, torch.zeros_like(x)) for name, x in primals.items()}
    truth = jvp(partial(plain, enable_gqa=gqa), tuple(primals.values()), tuple(full.values()))
    ours = lambda **moving: fd.scaled_dot_product_attention(*{**primals, **moving}.values(), enable_gqa=gqa)  # noqa: E731
    op = jvp(lambda *x: ours(**dict(zip(given, x))), tuple(primals[n] for n in given), tuple(tangents.values()))
    torch.testing.assert_close(op, truth)
    pair = fd.attention_jvp(*primals.values(), *(tangents.get(name) for name in "qkv"), enable_gqa=gqa)
    torch.testing.assert_close(pair, truth)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=str)
def test_a_mask_combines_with_is_causal(kind: str, lengths: tuple[int, int]) -> None:
    """Check both together, as PyTorch's kernels for the CPU take them, where its other forms refuse."""
    n, m = lengths
    leaves = list(make_qkv(n=n, m=m, d=8, dtype=torch.float64)) + list(make_qkv(n=n, m=m, d=8, dtype=torch.float64))
    leaves = [x.clone().requires_grad_() for x in leaves]
    mask = torch.randn(2, 1, n, m, dtype=torch.float64)
    mask = mask if kind == "float" else (mask > 0) | (torch.arange(m) == 0)
    ours = mixed(lambda *x: fd.scaled_dot_product_attention(*x, mask, is_causal=True), leaves)
    torch.testing.assert_close(ours, mixed(lambda *x: plain(*x, mask, is_causal=True), leaves))
    still = fd.scaled_dot_product_attention(*leaves[:3], mask, is_causal=True)
    torch.testing.assert_close(still, plain(*leaves[:3], mask, is_causal=True))


def test_dropout_takes_a_mask_and_is_causal_too() -> None:
    q, k, v = make_qkv(n=6, d=8)
    mask = torch.randn(6, 6)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    for given, merged in ((mask, mask.masked_fill(~seen, -torch.inf)), (mask > -1, (mask > -1) & seen)):
        torch.manual_seed(3)
        ours = fd.scaled_dot_product_attention(q, k, v, given, 0.5, True)
        torch.manual_seed(3)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, merged, 0.5))


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_follows_autocast(masked: bool) -> None:
    """Check that mixed dtypes become autocast's, as they do in PyTorch, and that float64 stays."""
    q, k, v = make_qkv(n=6, d=8)
    mask, found = torch.randn(6, 6) if masked else None, []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention):
            torch.manual_seed(3)
            found.append(op(q, k.bfloat16(), v, mask, 0.5))
        assert fd.scaled_dot_product_attention(q.double(), k.double(), v.double(), None, 0.5).dtype == torch.float64
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_float32_mask_serves_queries_of_every_dtype(dtype: torch.dtype) -> None:
    """Check that its tangent and gradients are float32, and nothing is less accurate than with plain PyTorch."""
    primals = [*make_qkv(n=9, m=7, d=16, dtype=dtype, seed=1), torch.randn(1, 4, 9, 7)]
    tangents = [*make_qkv(n=9, m=7, d=16, dtype=dtype, seed=2), torch.randn(1, 4, 9, 7)]
    leaves = [x.requires_grad_() for x in (*primals, *tangents)]
    ours = mixed(fd.scaled_dot_product_attention, leaves)
    pair = fd.attention_jvp(
        *leaves[:3], *leaves[4:7], attn_mask=leaves[3], t_attn_mask=leaves[7], tangent_grad=True
    )  # fmt: skip
    torch.testing.assert_close(graded(*pair, leaves), ours, rtol=0, atol=0)
    assert [x.dtype for x in ours] == [dtype] * 2 + [x.dtype for x in leaves]
    baseline = lambda q, k, v, mask: plain(q, k, v, mask.to(dtype))  # noqa: E731
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for i, (x, truth, base) in enumerate(zip(ours, mixed(plain, exact), mixed(baseline, leaves), strict=True)):
        assert_accurate(x.detach(), truth.detach(), base.detach(), name=f"result {i}", order=1 if i < 2 else 2)
    still = fd.scaled_dot_product_attention(*leaves[:4])
    torch.testing.assert_close(still, F.scaled_dot_product_attention(*leaves[:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_lowers_a_mask_with_its_queries(dtype: torch.dtype) -> None:
    """Check that it does as PyTorch does; beside float64 queries, which autocast leaves alone, the mask stays too."""
    q, k, v = make_qkv(n=9, d=16, dtype=dtype)
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        still = fd.scaled_dot_product_attention(q, k, v, mask)
        out, t_out = jvp(lambda q: fd.scaled_dot_product_attention(q, k, v, mask), (q,), (q,))
        if dtype != torch.float64:
            torch.testing.assert_close(still, F.scaled_dot_product_attention(q, k, v, mask))
    assert still.dtype == out.dtype == t_out.dtype == (torch.bfloat16 if dtype != torch.float64 else dtype)
    low = mask.bfloat16().double() if dtype != torch.float64 else mask.double()
    x = [z if dtype == torch.float64 else z.bfloat16().double() for z in (q, k, v)]
    torch.testing.assert_close(out.double(), plain(*x, low), rtol=1e-2, atol=2e-2 if dtype != torch.float64 else 0)


@pytest.mark.parametrize("case", [0, 6, 10])
def test_transforms_reach_what_is_broadcast(case: int) -> None:
    """Check vmap over an argument that is broadcast itself, and compiled against eager, with tangents and gradients."""
    torch._dynamo.reset()
    *shapes, gqa = SHAPES[case]
    leaves, mask = drawn(shapes), torch.randn(5, 6, dtype=torch.float64)
    op = partial(fd.scaled_dot_product_attention, attn_mask=mask, is_causal=True, enable_gqa=gqa)
    push = lambda *x: jvp(op, x[:3], x[3:])  # noqa: E731
    expected = graded(*push(*leaves), leaves)
    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graded(*compiled(*leaves), leaves), expected)
    more = torch.randn(4, *shapes[1], dtype=torch.float64)
    along = lambda k: push(leaves[0], k, *leaves[2:])  # noqa: E731
    looped = [torch.stack(column) for column in zip(*map(along, more))]
    torch.testing.assert_close(vmap(along)(more), tuple(looped))


def test_statistics_and_centring_broadcast_too() -> None:
    """Check that the log-sum-exp and its tangent have the result's dimensions, and that centring changes nothing."""
    for *shapes, gqa in (SHAPES[0], SHAPES[6], SHAPES[10]):
        leaves = drawn(shapes)
        point, direction = tuple(leaves[:3]), tuple(leaves[3:])
        op = partial(fd.scaled_dot_product_attention, return_lse=True, enable_gqa=gqa)
        k = leaves[1].repeat_interleave(shapes[0][-3] // shapes[1][-3], -3) if gqa else leaves[1]
        (out, lse), (t_out, mu) = jvp(op, point, direction)
        assert lse.shape == mu.shape == out.shape[:-1]
        torch.testing.assert_close(lse, (leaves[0] @ k.mT / 8**0.5).logsumexp(-1).expand(lse.shape))
        centred = jvp(partial(op, centre=True), point, direction)
        torch.testing.assert_close(centred, ((out, lse), (t_out, mu)))
        pair = fd.attention_jvp(*leaves, centre=True, return_lse=True, enable_gqa=gqa, tangent_grad=True)
        torch.testing.assert_close(pair, (out, t_out, lse, mu))


def test_explain_counts_what_is_broadcast() -> None:
    assert "B=2 H=3 N=5 M=6 D=8" in fd.explain(*(torch.randn(shape) for shape in SHAPES[6][:3]))
    assert "B=1 H=1 N=5 M=6 D=8" in fd.explain(*(torch.randn(shape) for shape in SHAPES[0][:3]))
