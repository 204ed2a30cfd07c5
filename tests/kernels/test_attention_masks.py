"""Test masks, bands and packed sequences: who sees whom, and that nobody else is seen."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill import reference
from fastdistill.ops.attention import eager
from fastdistill.testing import cast, reference_jvp, relative_error
from tests.kernels.attention_cases import CAUSAL, UNLIMITED, assert_dead, check, inputs, normal, packed_inputs, run
from tests.kernels.device import DEVICE

# The bands are causal, limited on both sides, from the diagonal on, over several tiles, and a single key.
WINDOWS = [CAUSAL, (5, 3), (0, -1), (40, 20), (0, 0)]


@pytest.mark.parametrize("shape", [(2, 2, 20, 40), (2, 1, 20, 40), (1, 2, 1, 40), (1, 1, 20, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(shape: tuple[int, ...], kind: str) -> None:
    """Check every dimension, also for the tangent of a float mask."""
    primals, tangents = inputs(batch=2, heads=2, n=20, m=40, d=16)
    if kind == "bool":
        primals["attn_mask"] = normal(*shape) > 0
    else:
        primals["attn_mask"], tangents["attn_mask"] = normal(*shape), normal(*shape)
    check(primals, tangents)


def test_only_the_mask_moves() -> None:
    """Check the tangent of a learned bias, alone."""
    primals, tangents = inputs("", n=20, m=40, d=16)
    primals["attn_mask"], tangents["attn_mask"] = normal(1, 1, 20, 40), normal(1, 1, 20, 40)
    check(primals, tangents)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_no_key_gives_zeros(kind: str) -> None:
    """Check it beside a query whose first tile is all dead, one whose last tile is, and a causal limit."""
    primals, tangents = inputs(n=40, m=40, d=16)
    seen = normal(1, 1, 40, 40) > -0.5
    seen[..., 5, :] = seen[..., 35, :32] = seen[..., 36, 32:] = False
    primals["attn_mask"] = (
        seen if kind == "bool" else torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, -math.inf)
    )
    outputs = check(primals, tangents, window=CAUSAL)
    dead = ~(seen & reference.band(40, 40, CAUSAL, False, DEVICE)).any(-1)
    assert dead[0, 0, 5] and not dead.all()
    assert_dead(outputs, dead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_lowest_floats_is_no_dead_row(dtype: torch.dtype) -> None:
    """Check finfo.min, by which libraries mask: any other key hides such keys, but alone they weigh the same.

    This is PyTorch's behaviour. The row's lse is finfo.min, as that of the plain implementation is; a dead row has
    -inf.
    """
    primals, tangents = inputs("v", n=20, m=40, d=16)
    mask = torch.zeros(1, 1, 20, 40, device=DEVICE, dtype=dtype)
    mask[..., 3, :] = mask[..., 4, 7:] = torch.finfo(dtype).min
    mask[..., 5, :] = -math.inf
    primals["attn_mask"] = mask
    outputs = run(primals, tangents)
    exact = cast(primals, torch.float64)
    truth, t_truth = reference_jvp(reference.attention, exact, cast(tangents, torch.float64))
    assert relative_error(outputs.o, truth) < 5e-6
    assert relative_error(outputs.t_o, t_truth) < 5e-6
    lse = reference.attention_lse(exact["q"], exact["k"], exact["attn_mask"])
    plain = run(primals, tangents, module=eager)
    for found in (outputs.lse, plain.lse):
        torch.testing.assert_close(found.double(), lse, rtol=1e-6, atol=1e-5)
    assert (outputs.lse[..., 3] == torch.finfo(dtype).min).all() and (outputs.lse[..., 5] == -math.inf).all()


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper left", "lower right"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("n", "m"), [(35, 70), (70, 35)])
def test_bands(n: int, m: int, window: tuple[int, int], lower_right: bool) -> None:
    """Check both alignments, whatever the lengths; with more queries than keys some queries see none."""
    outputs = check(*inputs(n=n, m=m, d=16), window=window, lower_right=lower_right)
    assert_dead(outputs, ~reference.band(n, m, window, lower_right, DEVICE).any(-1))


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper left", "lower right"])
def test_a_band_and_a_mask_must_both_allow(lower_right: bool) -> None:
    """Check a mask that leaves out whole tiles of the band, and one with a tangent that adds to the rest."""
    primals, tangents = inputs(n=70, m=100, d=16)
    seen = normal(1, 1, 70, 100) > 0
    seen[..., :40, 32:64] = False
    tangents["attn_mask"] = normal(1, 1, 70, 100)
    primals["attn_mask"] = normal(1, 1, 70, 100).masked_fill(~seen, -math.inf)
    outputs = check(primals, tangents, window=(30, 10), lower_right=lower_right)
    assert_dead(outputs, ~(seen & reference.band(70, 100, (30, 10), lower_right, DEVICE)).any(-1))


def test_a_mask_that_hides_everything() -> None:
    """Check that no tile is live, and that every query is dead."""
    primals, tangents = inputs(n=40, m=70, d=16)
    primals["attn_mask"] = torch.zeros(1, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    assert_dead(check(primals, tangents), torch.ones(1, 1, 40, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize(
    ("window", "lower_right"), [(UNLIMITED, False), (CAUSAL, True), ((5, 3), False), ((5, 3), True)]
)
def test_packed_sequences(window: tuple[int, int], lower_right: bool) -> None:
    """Check different lengths, empty sequences, one without keys, and tokens around them that belong to none."""
    queries, keys = [33, 0, 5, 1, 40], [40, 3, 0, 1, 35]
    primals, tangents, cu_seqlens = packed_inputs(queries, keys, heads=2, d=16, kv_heads=1, spare=3)
    check(primals, tangents, window=window, lower_right=lower_right, cu_seqlens=cu_seqlens)


def test_tokens_outside_a_sequence_are_not_read() -> None:
    """Put NaN before, after and in another sequence, and check that rows of no sequence are dead."""
    primals, tangents, cu_seqlens = packed_inputs([20, 7, 20], [20, 7, 40], d=16, spare=2)
    clean = run(primals, tangents, cu_seqlens=cu_seqlens)
    for tensors in (primals, tangents):
        for name, x in tensors.items():
            starts = cu_seqlens[name != "q"].tolist()
            x[:, :, : starts[0]] = x[:, :, starts[1] : starts[2]] = x[:, :, starts[-1] :] = math.nan
    outputs = run(primals, tangents, cu_seqlens=cu_seqlens)
    others = [*range(2, 22), *range(29, 49)]
    for name in ("o", "t_o", "lse", "mu"):
        assert torch.equal(getattr(outputs, name)[:, :, others], getattr(clean, name)[:, :, others])
    outside = torch.ones(1, 1, 51, dtype=torch.bool, device=DEVICE)
    outside[..., 2:49] = False
    assert_dead(clean, outside)


def test_packed_rests() -> None:
    """Check what rounding took; it is zero outside."""
    primals, tangents, cu_seqlens = packed_inputs([20, 7], [9, 7], d=16, spare=2, dtype=torch.float16)
    outputs = run(primals, tangents, cu_seqlens=cu_seqlens, tangent_grad=True)
    assert outputs.o_rest.any() and outputs.t_o_rest.any()
    assert (outputs.t_o_rest[:, :, :2] == 0).all() and (outputs.o_rest[:, :, -2:] == 0).all()
