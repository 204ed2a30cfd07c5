"""Packed sequences: each is attention by itself, in every transform, and bounds that don't fit are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import fastdistill as fd
from fastdistill.testing import DEVICES, MemoryRecorder

QUERIES, KEYS = (5, 0, 3, 4), (2, 3, 0, 7)  # one sequence without queries, one without keys


def bounds(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def points(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(QUERIES), 4, 8), (sum(KEYS), 2, 8), (sum(KEYS), 2, 6))
    return [torch.randn(s, generator=generator, dtype=dtype).to(device) for s in shapes]


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    cu = (bounds(lengths, str(q.device)) for lengths in (QUERIES, KEYS))
    return fd.varlen_attention(q, k, v, *cu, max(QUERIES), max(KEYS), enable_gqa=True, **options)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, align: str = "lower_right", **options: Any) -> Any:
    sequences = zip(q.split(QUERIES), k.split(KEYS), v.split(KEYS))
    return_lse = options.get("return_lse", False)
    outs = [
        fd.scaled_dot_product_attention(*(x.transpose(0, 1) for x in s), enable_gqa=True, align=align, **options)
        for s in sequences
    ]
    if not return_lse:
        return torch.cat([o.transpose(0, 1) for o in outs])
    return torch.cat([o.transpose(0, 1) for o, _ in outs]), torch.cat([lse for _, lse in outs], -1)


BANDS: list[dict[str, Any]] = [
    {},
    {"window_size": (-1, 0)},
    {"window_size": (2, 1)},
    {"window_size": (1, 0), "align": "upper_left"},
]


@pytest.mark.parametrize("options", BANDS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_each_sequence_is_attention_by_itself(options: dict[str, Any], device: str) -> None:
    """Compare output, log-sum-exp, their tangents, and gradients through all of them."""
    primals, tangents = points(1, device), points(2, device)

    def run(op: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
        call = lambda *x: op(*x, return_lse=True, **options)  # noqa: E731
        (out, lse), (t_out, mu) = jvp(call, tuple(leaves[:3]), tuple(leaves[3:]))
        live = lse.detach() > -torch.inf
        loss = (out.sin() * t_out).sum() + (lse[live].cos() * mu[live]).sum()
        return (out, lse, t_out, mu, *torch.autograd.grad(loss, leaves))

    torch.testing.assert_close(run(packed), run(one_by_one), rtol=1e-10, atol=1e-11)


def test_centring_changes_nothing_in_exact_arithmetic() -> None:
    primals, tangents = points(1), points(2)
    plain, centred = (
        jvp(lambda *x, c=c: packed(*x, return_lse=True, centre=c), tuple(primals), tuple(tangents))
        for c in (False, True)
    )
    torch.testing.assert_close(centred, plain, rtol=1e-11, atol=1e-12)


def test_pair_equals_jvp_for_each_subset_of_tangents() -> None:
    primals, tangents = points(1), points(2)
    cu = [bounds(lengths) for lengths in (QUERIES, KEYS)]
    for subset in ("q", "k", "v", "qv", "qkv"):
        given = [t if name in subset else None for name, t in zip("qkv", tangents)]
        ours = fd.varlen_attention_jvp(*primals, *cu, max(QUERIES), max(KEYS), *given, enable_gqa=True, return_lse=True)
        zeros = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, given)]
        (out, lse), (t_out, mu) = jvp(lambda *x: packed(*x, return_lse=True), tuple(primals), tuple(zeros))
        torch.testing.assert_close(ours, (out, t_out, lse, mu), rtol=1e-12, atol=1e-12)


def test_vmap_jacobian_and_compile_equal_eager() -> None:
    primals, tangents = points(1), points(2)
    push = lambda *x: jvp(packed, x[:3], x[3:])  # noqa: E731
    expected = push(*primals, *tangents)
    torch._dynamo.reset()
    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")(*primals, *tangents)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)
    both = [torch.stack([x, 2 * x]) for x in tangents]
    mapped = vmap(push, (None, None, None, 0, 0, 0))(*primals, *both)
    torch.testing.assert_close(mapped[1][1], 2 * expected[1], rtol=1e-12, atol=1e-12)


def test_gradient_of_a_gradient_and_a_tangent_of_a_tangent() -> None:
    primals, tangents = points(1), points(2)

    def second(op: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in primals]
        first = torch.autograd.grad(op(*leaves, impl="torch").sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    torch.testing.assert_close(second(packed), second(one_by_one), rtol=1e-9, atol=1e-10)

    def twice(op: Any) -> Any:
        once = lambda *x: jvp(lambda *y: op(*y, impl="torch"), x, tuple(tangents))[1]  # noqa: E731
        return jvp(once, tuple(primals), tuple(tangents))

    torch.testing.assert_close(twice(packed), twice(one_by_one), rtol=1e-9, atol=1e-10)


def test_tokens_outside_all_sequences_are_zero() -> None:
    q, k, v = points(1)
    cu = torch.tensor([2, 6], dtype=torch.int32)
    out, t_out = fd.varlen_attention_jvp(q, k, v, cu, cu, 4, 4, q, k, v, enable_gqa=True)
    for x in (out, t_out):
        assert (x[:2] == 0).all() and (x[6:] == 0).all() and (x[2:6] != 0).all()


def test_no_matrix_of_tokens_by_tokens_is_stored() -> None:
    length, count = 64, 32
    q, k, v = (torch.randn(length * count, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.arange(0, length * count + 1, length, dtype=torch.int32)
    with MemoryRecorder() as recorder:
        out, t_out = jvp(lambda *x: fd.varlen_attention(*x, cu, None, length, length), (q, k, v), (q, k, v))
        torch.autograd.grad((out.sin() + t_out).sum(), (q, k, v))
    assert recorder.largest < (length * count) ** 2 / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(1, 12, 4, 8)}, r"query: expected packed sequences \(tokens, H, dim\)"),
        ({"value": torch.ones(11, 2, 6, dtype=torch.float64)}, "value: expected heads and length"),
        ({"cu_seq_q": [0, 5, 5, 8, 12]}, "cu_seq_q: expected a one-dimensional tensor of int32 or int64, got list"),
        (
            {"cu_seq_q": torch.tensor([0.0, 12.0])},
            "cu_seq_q: expected a one-dimensional tensor of int32 or int64, got torch.float32",
        ),
        ({"cu_seq_k": torch.tensor([0, 12])}, "cu_seq_k: expected one bound more than sequences"),
        ({"max_q": 4}, "cu_seq_q, max_q: expected bounds .* at most max_q=4"),
        ({"max_k": -1}, "max_k: expected the length"),
        (
            {"cu_seq_k": torch.tensor([0, 2, 5, 5, 13])},
            "cu_seq_k, max_k: expected bounds that rise from 0 or more to at most 12",
        ),
        ({"window_size": (-2, 0)}, "window_size: expected"),
        ({"align": "left"}, "align: expected one of 'upper_left', 'lower_right', got 'left'"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    q, k, v = points(1)
    call = {
        "query": q,
        "key": k,
        "value": v,
        "cu_seq_q": bounds(QUERIES),
        "cu_seq_k": bounds(KEYS),
        "max_q": 5,
        "max_k": 7,
    }
    with pytest.raises(ValueError, match=message):
        fd.varlen_attention(**{**call, **changes}, enable_gqa=True, impl="torch")


def test_the_pair_calls_its_arguments_by_its_own_names() -> None:
    q, k, v = points(1)
    cu, more = torch.tensor([0, 12], dtype=torch.int32), {"enable_gqa": True}
    with pytest.raises(TypeError, match="k: expected a tensor, got NoneType"):
        fd.varlen_attention_jvp(q, None, v, cu, None, 12, 12, **more)
    with pytest.raises(ValueError, match=r"^v: expected heads and length .* as k, got"):
        fd.varlen_attention_jvp(q, k, v[:11], cu, None, 12, 12, **more)
    with pytest.raises(TypeError, match="enable_gqa: expected a bool, got str"):
        fd.varlen_attention(q, k, v, cu, None, 12, 12, enable_gqa="no")


def test_centring_looks_at_no_token_outside_all_sequences() -> None:
    q, k, v = points(1)
    k[3], v[3] = torch.nan, torch.nan
    cu = torch.tensor([0, 3], dtype=torch.int32)
    plain, centred = (
        fd.varlen_attention(q, k, v, cu, cu, 3, 3, enable_gqa=True, centre=centre) for centre in (False, True)
    )
    torch.testing.assert_close(centred, plain)


def test_bounds_are_checked_as_they_came() -> None:
    """Check that a bound beyond 32 bits doesn't wrap to one that fits: plain, under forward AD, and twice so."""
    x, t_x = torch.randn(8, 2, 4), torch.randn(8, 2, 4)
    for bound in (2**32 + 4, 2**31 + 4, -(2**32) + 4):
        cu = torch.tensor([0, bound])
        run = lambda x: fd.varlen_attention(x, x, x, cu, None, 4, 4, impl="torch")  # noqa: B023, E731
        for f in (run, lambda x: jvp(run, (x,), (t_x,)), lambda x: jvp(lambda y: jvp(run, (y,), (t_x,)), (x,), (t_x,))):  # noqa: B023
            with pytest.raises(ValueError, match=r"cu_seq_q, max_q: expected bounds that rise .*; got \[0, "):
                f(x)
    with pytest.raises(ValueError, match="max_k: expected the length of the longest sequence, at most 2147483647"):
        fd.varlen_attention(x, x, x, torch.tensor([0, 8]), None, 8, 2**32 + 8)


def test_int64_bounds_are_as_good_as_int32() -> None:
    x, cu = torch.randn(8, 2, 4), torch.tensor([0, 3, 8])
    wide, narrow = (fd.varlen_attention(x, x, x, bounds, None, 5, 5) for bounds in (cu, cu.int()))
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("side", [2**31, 2**32 + 1, 2**63 - 1, 2**80])
def test_a_window_beyond_every_sequence_is_no_limit(side: int, impl: str) -> None:
    """Check that sums of positions and sides don't wrap, either."""
    x, cu = torch.randn(8, 2, 4, dtype=torch.float64), torch.tensor([0, 3, 8])
    for window, same in (((side, 0), (-1, 0)), ((1, side), (1, -1))):
        run = lambda x, w: fd.varlen_attention(x, x, x, cu, None, 5, 5, window_size=w, impl=impl)  # noqa: E731
        torch.testing.assert_close(run(x, window), run(x, same), rtol=0, atol=0)
        one = lambda x, w: fd.scaled_dot_product_attention(x, x, x, window_size=w, impl=impl)  # noqa: E731
        torch.testing.assert_close(one(x, window), one(x, same), rtol=0, atol=0)
