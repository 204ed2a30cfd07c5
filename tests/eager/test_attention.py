"""The blockwise attention against float64 autodiff of the reference: forward, tangent, both backward passes, memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdistill.eager import attention as eager
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error
from tests.eager.attention_cases import (
    DTYPES,
    MASKS,
    NAMES,
    SUBSETS,
    Case,
    Tensors,
    backward,
    forward,
    problem,
    specification,
)


def check(case: Case) -> None:
    """Forward, primal backward and mixed backward of a case, by the tolerance rule."""
    primals, tangents = problem(case)
    fn, exact = specification(case.is_causal), (cast(primals, torch.float64), cast(tangents, torch.float64))
    truth, baseline = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    o, t_o, *_ = forward(primals, tangents, case.is_causal)
    assert_accurate(o, truth[0], baseline[0], name="o")
    assert o.dtype == DTYPES[case.dtype]
    if any(t is not None for t in tangents.values()):
        assert_accurate(t_o, truth[1], baseline[1], name="t_o")
    else:
        assert t_o is None
    do, dt_o = (torch.randn(o.shape).to(o.dtype) for _ in range(2))
    for other in [None] if t_o is None else [None, dt_o]:
        truths = reference_vjp(fn, *exact, do.double(), None if other is None else other.double())
        baselines = reference_vjp(fn, primals, tangents, do, other)
        gradients = backward(do, other, primals, tangents, case.is_causal)
        found = {name: x for name, x in gradients.items() if x is not None}
        assert found.keys() == truths.keys()
        for name, actual in found.items():
            kind, order = ("primal", 1) if other is None else ("mixed", 2)
            assert_accurate(actual, truths[name], baselines[name], name=f"{kind} d{name}", order=order)


SHAPES = [  # odd lengths, N != M both ways, head dims that are no power of two, Dv != D, and grouped queries
    Case(),
    Case(n=45, m=70, d=72, dv=72),
    Case(n=70, m=45, d=80, dv=24),
    Case(heads=6, kv_heads=2, n=31, m=57, d=72, dv=40),
    Case(batch=1, heads=5, kv_heads=1, n=1, m=19, d=33, dv=7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_shape_matches_autodiff(case: Case, dtype: str) -> None:
    """Each shape in each dtype, without a mask."""
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_every_mask_matches_autodiff(mask: str, is_causal: bool) -> None:
    """Masks that broadcast along every dimension, alone and together with is_causal, under grouped queries."""
    check(Case(heads=4, kv_heads=2, n=41, m=37, mask=mask, is_causal=is_causal))


@pytest.mark.parametrize("mask", ["float_full", "float_hnm", "float_m"])
@pytest.mark.parametrize("tangents", ["qkvm", "m", "vm"])
def test_a_tangent_of_the_mask_matches_autodiff(mask: str, tangents: str) -> None:
    """A bias that depends on time, as a learned relative position may."""
    check(Case(kv_heads=2, mask=mask, tangents=tangents))


@pytest.mark.parametrize(("n", "m"), [(40, 40), (60, 25), (25, 60)])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_causal_is_aligned_to_the_top_left(n: int, m: int, dtype: str) -> None:
    """As in scaled_dot_product_attention, also where N != M."""
    check(Case(heads=4, kv_heads=2, n=n, m=m, d=24, is_causal=True, dtype=dtype))


@pytest.mark.parametrize("layout", ["bnhd", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strided_layouts_match_autodiff(layout: str, dtype: str) -> None:
    """Views of (B, N, H, D) and of a fused projection's (B, N, 3, H, D)."""
    check(Case(layout=layout, dtype=dtype, d=40, dv=40))


@pytest.mark.parametrize("tangents", SUBSETS, ids=lambda names: names or "none")
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_every_subset_of_tangents_matches_autodiff(tangents: str, dtype: str) -> None:
    """A tangent that is not there is zero, in value and in all gradients."""
    check(Case(tangents=tangents, dtype=dtype, n=21, m=35))


@pytest.mark.parametrize("case", [Case(is_causal=True, mask="bool_bnm"), Case(kv_heads=2, mask="float_hnm")], ids=str)
def test_results_do_not_depend_on_the_block_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a block, one head at a time, and all heads at once agree to rounding in float64."""
    primals, tangents = problem(replace(case, dtype="fp64", n=53, m=47))
    do, dt_o = torch.randn(2, 2, 4, 53, 32, dtype=torch.float64)
    whole = [
        *forward(primals, tangents, case.is_causal)[:4],
        *backward(do, dt_o, primals, tangents, case.is_causal).values(),
    ]
    monkeypatch.setattr(eager, "_LEAST_ROWS", 3)
    for size in (1, 53 * 47, 3 * 53 * 47):
        monkeypatch.setitem(eager._BLOCK_SIZE, "cpu", size)
        parts = [
            *forward(primals, tangents, case.is_causal)[:4],
            *backward(do, dt_o, primals, tangents, case.is_causal).values(),
        ]
        for ours, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_lse_and_mu_are_the_logarithm_of_the_sum_and_its_tangent() -> None:
    """In float32 for float32 and bfloat16, in float64 for float64."""
    for dtype, statistic in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)):
        primals, tangents = problem(Case(dtype=dtype))

        def log_sum(q: Tensor, k: Tensor, v: Tensor, attn_mask: None) -> Tensor:
            return torch.logsumexp(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)

        truth = reference_jvp(log_sum, cast(primals, torch.float64), cast(tangents, torch.float64))
        baseline = reference_jvp(log_sum, cast(primals, statistic), cast(tangents, statistic))
        _, _, lse, mu, *_ = forward(primals, tangents)
        assert lse.dtype == mu.dtype == statistic
        assert_accurate(lse, truth[0], baseline[0], name="lse")
        assert_accurate(mu, truth[1], baseline[1], name="mu")


@pytest.mark.parametrize("mask", ["bool_bnm", "float_dead"])
def test_a_row_that_sees_no_key_gives_zeros(mask: str) -> None:
    """Value, tangent and mu zero, lse -inf; and nothing flows back to its query."""
    primals, tangents = problem(Case(mask=mask))
    o, t_o, lse, mu, *_ = forward(primals, tangents)
    for x in (o, t_o, mu):
        assert (x[:, :, ::5] == 0).all()
        assert (x[:, :, 1:5] != 0).any()
    assert (lse[:, :, ::5] == -math.inf).all()
    gradients = backward(torch.randn(o.shape), torch.randn(o.shape), primals, tangents)
    for name in ("q", "t_q"):
        gradient = gradients[name]
        assert gradient is not None
        assert (gradient[:, :, ::5] == 0).all()


def test_no_keys_at_all_is_a_row_that_sees_no_key() -> None:
    """M = 0: zeros, and gradients of zeros."""
    primals, tangents = problem(Case(m=1))
    for tensors in (primals, tangents):
        tensors.update({name: x[:, :, :0] for name, x in tensors.items() if name in "kv" and x is not None})
    o, t_o, lse, mu, *_ = forward(primals, tangents)
    assert (o == 0).all()
    assert (t_o == 0).all()
    assert (mu == 0).all()
    assert (lse == -math.inf).all()
    gradient = backward(o, t_o, primals, tangents)["q"]
    assert gradient is not None
    assert (gradient == 0).all()


# KERNELS.md's caps on the relative error of t_o, whatever PyTorch's own error is (bf16: after output rounding).
@pytest.mark.parametrize(("dtype", "cap"), [("fp32", 3e-5), ("bf16", 3e-3), ("fp16", 1e-3)])
@pytest.mark.parametrize("tangent_offset", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("value_offset", [0.0, 3.0])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_common_modes_cost_no_accuracy(
    dtype: str, cap: float, tangent_offset: float, value_offset: float, spread: float
) -> None:
    """An offset of t_k moves a whole row of T, which the centred form takes out exactly; so does one of v."""
    primals, tangents = problem(Case(n=64, m=96, d=64, dv=64, dtype=dtype))
    for tensors, name, factor, offset in (
        (primals, "q", spread, 0.0),
        (tangents, "k", 1.0, tangent_offset),
        (primals, "v", 1.0, value_offset),
    ):
        x = tensors[name]
        assert x is not None
        tensors[name] = x * factor + offset
    truth = reference_jvp(specification(False), cast(primals, torch.float64), cast(tangents, torch.float64))
    o, t_o, *_ = forward(primals, tangents)
    assert relative_error(o, truth[0]) < cap
    assert relative_error(t_o, truth[1]) < cap


@pytest.mark.parametrize(("dtype", "cap"), [("fp32", 5e-5), ("bf16", 3e-3), ("fp16", 1e-3)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_common_modes_cost_the_gradients_no_accuracy(dtype: str, cap: float, offset: float) -> None:
    """Offsets of k, v and their tangents: plain PyTorch's error in dq is 48 % in float32 with an offset of 100."""
    primals, tangents = problem(Case(n=64, m=96, d=64, dv=64, dtype=dtype))
    for tensors, name in itertools.product((primals, tangents), ("k", "v")):
        x = tensors[name]
        assert x is not None
        tensors[name] = x + offset
    exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    do, dt_o = torch.randn(2, 2, 4, 64, 64).to(DTYPES[dtype])
    for other in (None, dt_o):
        truths = reference_vjp(specification(False), *exact, do.double(), None if other is None else other.double())
        for name, x in backward(do, other, primals, tangents).items():
            if x is not None:
                assert relative_error(x, truths[name]) < cap, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_logits_match_autodiff(dtype: str) -> None:
    """Keys with an offset of 100 give rows of logits around +-100, so exp without the row maximum would overflow."""
    primals, tangents = problem(Case(dtype=dtype))
    k = primals["k"]
    assert k is not None
    primals["k"] = k + 100
    fn, exact = specification(False), (cast(primals, torch.float64), cast(tangents, torch.float64))
    truth, baseline = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    o, t_o, *_ = forward(primals, tangents)
    assert_accurate(o, truth[0], baseline[0], name="o")
    assert_accurate(t_o, truth[1], baseline[1], name="t_o")
    do, dt_o = (torch.randn(o.shape).to(o.dtype) for _ in range(2))
    true_gradients = reference_vjp(fn, *exact, do.double(), dt_o.double())
    baselines = reference_vjp(fn, primals, tangents, do, dt_o)
    for name, x in backward(do, dt_o, primals, tangents).items():
        if x is not None:
            assert_accurate(x, true_gradients[name], baselines[name], name=f"d{name}", order=2)


def test_a_tangent_of_zeros_is_no_tangent_and_the_tangent_is_linear() -> None:
    """None and zeros agree, and t_o(2 t) = 2 t_o(t) to the last bit."""
    primals, tangents = problem(Case())
    only_q: Tensors = {"q": tangents["q"]}
    zeros: Tensors = {name: torch.zeros_like(x) for name, x in tangents.items() if x is not None and name != "q"}
    torch.testing.assert_close(forward(primals, only_q | zeros)[1], forward(primals, only_q)[1], rtol=0, atol=1e-6)
    twice: Tensors = {name: 2 * x for name, x in tangents.items() if x is not None}
    assert torch.equal(forward(primals, twice)[1], 2 * forward(primals, tangents)[1])


@pytest.mark.parametrize(
    "pattern", ["q", "k", "v", "t_q", "t_k", "t_v", "q t_k", "k v t_v", "attn_mask", "t_attn_mask"]
)
def test_only_needed_gradients_are_computed(pattern: str) -> None:
    """Each is the same as among all of them; the others are None (asserted by `backward`)."""
    primals, tangents = problem(Case(dtype="fp64", mask="float_full", tangents="qkvm"))
    do, dt_o = torch.randn(2, 2, 4, 33, 32, dtype=torch.float64)
    every = backward(do, dt_o, primals, tangents)
    some = backward(do, dt_o, primals, tangents, needs=tuple(name in pattern.split() for name in NAMES))
    for name in pattern.split():
        torch.testing.assert_close(some[name], every[name], rtol=0, atol=1e-13)


def test_the_mixed_backward_goes_without_a_cotangent_of_the_value() -> None:
    """A loss of the tangent alone: do = None is zeros."""
    primals, tangents = problem(Case(dtype="fp64"))
    dt_o = torch.randn(2, 4, 33, 32, dtype=torch.float64)
    without, zeros = (backward(do, dt_o, primals, tangents) for do in (None, torch.zeros_like(dt_o)))
    for name, x in without.items():
        torch.testing.assert_close(x, zeros[name], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"^do: expected a tensor"):
        backward(None, None, primals, tangents)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_16_bit_tangent_to_be_differentiated_comes_with_its_accumulators(dtype: str) -> None:
    """In float32, and o, t_o are their rounding; nobody else pays for them."""
    primals, tangents = problem(Case(dtype=dtype))
    for tangent_grad, directions in ((False, tangents), (True, {}), (True, tangents)):
        o, t_o, _, _, o_acc, t_o_acc = forward(primals, directions, tangent_grad=tangent_grad)
        if dtype in ("bf16", "fp16") and tangent_grad and directions:
            assert o_acc.dtype == t_o_acc.dtype == torch.float32
            assert torch.equal(o, o_acc.to(o.dtype))
            assert torch.equal(t_o, t_o_acc.to(o.dtype))
        else:
            assert o_acc is t_o_acc is None


def test_autocast_does_not_reach_the_matmuls() -> None:
    """The ops cast their arguments; inside, float32 stays float32."""
    primals, tangents = problem(Case())
    do = torch.randn(2, 4, 33, 32)
    plain = [*forward(primals, tangents)[:4], *backward(do, do, primals, tangents).values()]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [*forward(primals, tangents)[:4], *backward(do, do, primals, tangents).values()]
    for x, y in zip(plain, inside, strict=True):
        assert x is y or torch.equal(x, y)


def test_arguments_are_neither_changed_nor_returned() -> None:
    """Not even where one block is the whole problem and nothing has to be cast."""
    primals, tangents = problem(Case(batch=1, heads=1, kv_heads=1, mask="float_full", tangents="qkvm"))
    do, dt_o = torch.randn(2, 1, 1, 33, 32)
    arguments = [x for x in (*primals.values(), *tangents.values(), do, dt_o) if x is not None]
    copies = [x.clone() for x in arguments]
    results = [*forward(primals, tangents), *backward(do, dt_o, primals, tangents).values()]
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))
    taken = {x.untyped_storage().data_ptr() for x in arguments}
    returned = [x.untyped_storage().data_ptr() for x in results if x is not None]
    assert taken.isdisjoint(returned)
    assert len(set(returned)) == len(returned)
    assert all(x.is_contiguous() for x in results if x is not None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["", *MASKS])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_full_grid_matches_autodiff(case: Case, is_causal: bool, mask: str, dtype: str) -> None:
    """Everything with everything, each subset of tangents."""
    for tangents in SUBSETS:
        check(replace(case, is_causal=is_causal, mask=mask, dtype=dtype, tangents=tangents))
