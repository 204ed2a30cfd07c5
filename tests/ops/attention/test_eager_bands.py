"""Windows, both alignments, and packed sequences of the blockwise attention, whatever its blocks are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdistill.ops.attention import logit_blocks
from fastdistill.testing import make_packed
from tests.ops.attention.eager_cases import (
    CAUSAL,
    DTYPES,
    Case,
    Tensors,
    backward,
    check_backward,
    check_forward,
    cotangents,
    forward,
    problem,
)

WINDOWS = [CAUSAL, (0, -1), (0, 0), (5, 0), (0, 7), (3, 2), (4, -1), (-1, 6), (100, 100)]
LENGTHS = [(40, 40), (60, 25), (25, 60)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set blocks of a few rows, so that a small problem has many of them and some see no key."""
    monkeypatch.setattr(logit_blocks, "LEAST_ROWS", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
@pytest.mark.parametrize(("n", "m"), LENGTHS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_window_matches_autodiff(window: tuple[int, int], n: int, m: int, lower_right: bool) -> None:
    """Check fewer, as many, and more queries than keys; rows may see nothing at either end."""
    case = Case(kv_heads=2, n=n, m=m, d=16, dv=16, dtype="fp64", window=window, lower_right=lower_right)
    primals, tangents = problem(case)
    check_forward(primals, tangents, **case.band())
    check_backward(primals, tangents, *cotangents(primals), **case.band())


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_windows_keep_the_tolerance_rule(dtype: str, lower_right: bool) -> None:
    """Check the dtypes that networks run in, by primal and mixed backward, with blocks as they come."""
    case = Case(kv_heads=2, n=90, m=130, dtype=dtype, window=(40, 9), lower_right=lower_right)
    primals, tangents = problem(case)
    do, dt_o, d_lse, d_mu = cotangents(primals)
    check_forward(primals, tangents, **case.band())
    check_backward(primals, tangents, do, None, d_lse, None, **case.band())
    check_backward(primals, tangents, do, dt_o, d_lse, d_mu, **case.band())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mask", ["bool_bnm", "float_full"])
@pytest.mark.parametrize("window", [(7, 3), (-1, 2)], ids=str)
def test_a_window_combines_with_a_mask(mask: str, window: tuple[int, int]) -> None:
    """Check that both must allow; where the window hides a key, its bias and the bias's tangent have no gradient."""
    tangents = "qkvm" if mask.startswith("float") else "qkv"
    case = Case(n=37, m=45, dtype="fp64", mask=mask, tangents=tangents, window=window, lower_right=True)
    inputs = problem(case)
    check_forward(*inputs, **case.band())
    check_backward(*inputs, *cotangents(inputs[0]), **case.band())


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
def test_rows_outside_every_window_are_dead(lower_right: bool) -> None:
    """Check 70 queries of 20 keys: the last, or under the other alignment the first, see none of them."""
    primals, tangents = problem(Case(n=70, m=20))
    band: dict[str, Any] = {"window": (5, 2), "lower_right": lower_right}
    dead = slice(0, 48) if lower_right else slice(25, 70)
    o, t_o, lse, mu, *_ = forward(primals, tangents, **band)
    assert (lse[:, :, dead] == -math.inf).all()
    assert (lse == -math.inf).sum() == 2 * 4 * (dead.stop - dead.start)
    gradients = backward(primals, tangents, *cotangents(primals), **band)
    for x in (o, t_o, mu, gradients["q"], gradients["t_q"]):
        assert x is not None
        assert (x[:, :, dead] == 0).all()


PACKS = {  # queries and keys of each sequence
    "alike": ((12, 12, 12), (12, 12, 12)),
    "uneven": ((5, 17, 17, 1), (9, 14, 14, 30)),
    "empty": ((6, 0, 4, 9, 0), (7, 5, 0, 9, 0)),
    "all empty": ((0, 3), (4, 0)),
}


def packed(lengths: tuple[tuple[int, ...], tuple[int, ...]], **sizes: Any) -> tuple[Tensors, Tensors, Any]:
    pack: Any = [make_packed(*lengths, 4, 16, spare=3, kv_heads=2, dv=24, seed=seed, **sizes) for seed in (0, 1)]
    primals, tangents = (dict(zip("qkv", tensors, strict=True)) for tensors, _ in pack)
    return primals, tangents, pack[0][1]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
@pytest.mark.parametrize("window", [(-1, -1), CAUSAL, (4, 3)], ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_packed_sequences_match_autodiff_of_each(name: str, window: tuple[int, int], lower_right: bool) -> None:
    """Check sequences of any length, and tokens outside them all, which give zeros and get none."""
    primals, tangents, cu_seqlens = packed(PACKS[name], dtype=torch.float64)
    band = {"window": window, "lower_right": lower_right, "cu_seqlens": cu_seqlens}
    do, dt_o, d_lse, d_mu = cotangents(primals)
    check_forward(primals, tangents, **band)
    check_backward(primals, tangents, do, d_lse=d_lse, **band)
    check_backward(primals, tangents, do, dt_o, d_lse, d_mu, **band)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_keep_the_tolerance_rule(dtype: str, layout: str) -> None:
    """Check them as heads first, and as the transposed view of (T, H, D) that packed projections leave."""
    primals, tangents, cu_seqlens = packed(PACKS["uneven"], dtype=DTYPES[dtype], layout=layout)
    check_forward(primals, tangents, cu_seqlens=cu_seqlens)
    check_backward(primals, tangents, *cotangents(primals), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "case",
    [
        Case(window=CAUSAL, mask="bool_bnm"),
        Case(kv_heads=2, mask="float_hnm"),
        Case(kv_heads=2, window=(11, 6), lower_right=True),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_block_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a few rows a block, one head at a time, and all heads at once agree to rounding in float64."""
    primals, tangents = problem(replace(case, dtype="fp64", n=53, m=47))
    given = cotangents(primals)

    def everything() -> list[Any]:
        results = forward(primals, tangents, **case.band())[:4]
        return [*results, *backward(primals, tangents, *given, **case.band()).values()]

    whole = everything()
    monkeypatch.setattr(logit_blocks, "LEAST_ROWS", 3)
    for size in (1, 53 * 47, 3 * 53 * 47):
        monkeypatch.setitem(logit_blocks.BLOCK_SIZE, "cpu", size)
        for ours, expected in zip(everything(), whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
