"""Gated residual and its norm in plain PyTorch against float64 autodiff: outputs, tangents, both backward passes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastdistill.ops.gated_norm import eager
from fastdistill.ops.norm import eager as norm
from fastdistill.ops.protocol import row_blocks
from fastdistill.ops.protocol.pair import Pair, flat
from tests.ops.gated_norm.eager_cases import (
    ALL_NAMES,
    COTANGENTS,
    MODULATED,
    NAMES,
    Case,
    backward,
    check,
    draw_cotangents,
    forward,
    problem,
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = {"plain": ("x", "h"), "gate": ("x", "h", "gate"), "modulated": MODULATED, "all": NAMES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_every_kind_matches_autodiff(parts: str, rms: bool, dtype: str) -> None:
    """Check all tangents and cotangents, in each dtype."""
    check(eager, Case(rms=rms, parts=PARTS[parts], dtype=DTYPES[dtype], block=DTYPES[dtype]))


@pytest.mark.parametrize("tangents", [n for r in range(6) for n in itertools.combinations(MODULATED, r)], ids="+".join)
def test_every_subset_of_tangents_matches_autodiff(tangents: tuple[str, ...]) -> None:
    """Check that a tangent that is not there is zero, and that with any, both outputs have one."""
    check(eager, Case(parts=MODULATED, tangents=tangents, dtype=torch.float64, block=torch.float64))


@pytest.mark.parametrize(
    "cotangents", [n for r in range(1, 5) for n in itertools.combinations(COTANGENTS, r)], ids="+".join
)
@pytest.mark.parametrize("tangents", [NAMES, (), ("scale",)], ids=lambda names: "+".join(names) or "none")
def test_every_subset_of_cotangents_matches_autodiff(cotangents: tuple[str, ...], tangents: tuple[str, ...]) -> None:
    """Check losses of the residual alone, of the norm alone, of tangents alone."""
    case = Case(cotangents=cotangents, tangents=tangents, dtype=torch.float64, block=torch.float64)
    check(eager, case)


@pytest.mark.parametrize("modulation", [(2, 1), (2, 5), (1, 5), (1, 1)])
def test_every_modulation_matches_autodiff(modulation: tuple[int, int]) -> None:
    """Gate, scale and shift for each sample, each token, each position, and one for all."""
    check(eager, Case(parts=MODULATED, modulation=modulation))


@pytest.mark.parametrize("cotangents", [("dr", "dy"), ("dy",), COTANGENTS], ids="+".join)
@pytest.mark.parametrize("modulation", [(2, 1), (2, 5), (1, 1)])
@pytest.mark.parametrize("size", [1, 120, 300], ids=lambda size: f"blocks of {size}")
def test_several_blocks_match_autodiff(
    cotangents: tuple[str, ...], modulation: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check blocks of a row, of three rows of one sample, of a sample."""
    monkeypatch.setattr(row_blocks, "block_size", lambda device: size)
    monkeypatch.setattr(norm, "LEAST_SAMPLE", 1)
    check(eager, Case(modulation=modulation, cotangents=cotangents))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    ("stream", "block"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["wide", "narrow"]
)
def test_stream_and_blocks_of_different_dtypes(stream: torch.dtype, block: torch.dtype, rms: bool) -> None:
    """Check a float32 stream beside bfloat16 blocks, and the reverse: each output has the accuracy of its dtype."""
    check(eager, Case(rms=rms, dtype=stream, block=block))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_huge_mean_and_tiny_variance(dtype: str, rms: bool) -> None:
    """Check it by the rule, since what it costs comes from rounding x."""
    case = Case(rms=rms, parts=MODULATED, dtype=DTYPES[dtype], block=DTYPES[dtype], mean=30.0, std=0.03)
    check(eager, case, capped=False)


def test_arguments_are_neither_changed_nor_returned() -> None:
    """Check that a t_r that is only t_x, or a dx that is only dr, is a copy of it."""
    for tangents in (("x",), ("h",), ("shift",)):
        case = Case(parts=("x", "h", "shift"), tangents=tangents)
        primals, directions = problem(case)
        cotangents = {**draw_cotangents(case), "dy": None, "dt_y": None}
        arguments = [x for x in (*primals.values(), *directions.values(), *cotangents.values()) if x is not None]
        copies = [x.clone() for x in arguments]
        results = [*forward(eager, primals, directions, False)]
        results += backward(eager, primals, directions, cotangents, False).values()
        assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))
        returned = [x.untyped_storage().data_ptr() for x in results if x is not None]
        assert {x.untyped_storage().data_ptr() for x in arguments}.isdisjoint(returned)
        assert len(set(returned)) == len(returned)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_only_needed_gradients_are_computed(name: str) -> None:
    """Check that each is the same as among all of them."""
    case = Case(dtype=torch.float64, block=torch.float64)
    primals, tangents = problem(case)
    cotangents = draw_cotangents(case)
    inputs = [Pair(primals[other], tangents[other]) for other in NAMES]
    saved = ((), forward(eager, primals, tangents, False)[-2:])
    dr, dt_r, dy, dt_y = cotangents.values()
    needs = tuple(other == name for other in ALL_NAMES)
    wanted = list(zip(needs[:7], needs[7:]))
    both = (Pair(dr, dt_r), Pair(dy, dt_y))
    found = flat(eager.gated_norm_backward(both, inputs, saved, rms=False, needs=wanted))
    assert [x is not None for x in found] == list(needs)
    among_all = backward(eager, primals, tangents, cotangents, False)[name]
    torch.testing.assert_close(found[ALL_NAMES.index(name)], among_all, rtol=0, atol=1e-13)


def test_no_cotangent_is_refused() -> None:
    case = replace(Case(), cotangents=())
    with pytest.raises(ValueError, match=r"^dr: expected a tensor"):
        backward(eager, *problem(case), draw_cotangents(case), False)
