"""Compare both backwards of the attention kernels with float64 autodiff of the plain formula.

The interpreter's time goes by tiles (32 x 32 there) and heads, not by their size. So lengths stay below three tiles,
and one or two heads do unless heads are the point.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.kernels.attention_cases import CAUSAL, SUBSETS, inputs, normal, packed_inputs
from tests.kernels.backward_cases import NAMES, check_backward, cotangents_of, run_backward
from tests.kernels.device import DEVICE, INTERPRETED
from tests.kernels.test_attention_grid import LENGTHS, MASKS, case

PRIMAL, MIXED = ("do",), ("do", "dt_o")
BOTH = pytest.mark.parametrize("names", [PRIMAL, MIXED], ids="+".join)


@pytest.mark.parametrize("tangents", SUBSETS)
def test_every_subset_of_tangents(tangents: str) -> None:
    """Check two tiles each way, none of them full."""
    primals, directions = inputs(tangents, n=35, m=40, d=24)
    check_backward(primals, directions, cotangents_of(primals, *(MIXED if tangents else PRIMAL)))


@pytest.mark.parametrize(("d", "dv"), [(8, 8), (72, 40), (16, 128), (256, 16)])
def test_head_dims(d: int, dv: int) -> None:
    """Check one part and two, a padded tail, and values of another width."""
    primals, tangents = inputs(n=20, m=30, d=d, dv=dv)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED))


@BOTH
def test_heads_share_keys(names: tuple[str, ...]) -> None:
    """Check that a key's gradient sums over the query heads of its group."""
    primals, tangents = inputs(batch=2, heads=4, kv_heads=2, n=10, m=20, d=16)
    check_backward(primals, tangents, cotangents_of(primals, *names))


@pytest.mark.parametrize("lower_right", [False, True], ids=["upper left", "lower right"])
@pytest.mark.parametrize(("n", "m", "window"), [(70, 40, CAUSAL), (40, 70, CAUSAL), (70, 70, (20, 5))])
def test_bands(n: int, m: int, window: tuple[int, int], lower_right: bool) -> None:
    """Check tiles that are hidden, cut and seen whole, from the side of the keys and of the queries, and dead rows."""
    primals, tangents = inputs("kv", n=n, m=m, d=16)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), window=window, lower_right=lower_right)


@BOTH
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind: str, names: tuple[str, ...]) -> None:
    """Check dead rows, a tile that is hidden whole and, for float masks, gradients of the mask and its tangent."""
    primals, tangents = inputs(n=40, m=70, d=16)
    seen = torch.rand(1, 1, 40, 70, device=DEVICE) > 0.3
    seen[..., 5, :] = seen[..., 38, :] = seen[..., :32, 32:64] = False
    primals["attn_mask"] = seen
    if kind == "float":
        primals["attn_mask"] = normal(1, 1, 40, 70).masked_fill(~seen, -math.inf)
        tangents["attn_mask"] = normal(1, 1, 40, 70)
    gradients = check_backward(primals, tangents, cotangents_of(primals, *names))
    assert (gradients["q"][0, 0, 5] == 0).all()
    if kind == "float":
        assert (gradients["attn_mask"][~seen] == 0).all()
    else:
        assert gradients["attn_mask"] is None


def test_a_broadcast_mask_beside_a_band() -> None:
    """Check a padding mask, one row for two samples, two heads and all queries, with a lower-right causal band."""
    primals, tangents = inputs("v", batch=2, heads=2, n=20, m=40, d=16)
    primals["attn_mask"] = normal(1, 1, 1, 40).masked_fill(torch.arange(40, device=DEVICE) > 37, -math.inf)
    tangents["attn_mask"] = normal(1, 1, 1, 40)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), window=CAUSAL, lower_right=True)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_row_of_very_low_logits_is_no_dead_row(lowest: float) -> None:
    """Check that the pre-pass sums such a row again; its lse has no digits left for the number of keys."""
    primals, tangents = inputs("v", n=20, m=40, d=16)
    mask = torch.zeros(1, 1, 20, 40, device=DEVICE)
    mask[..., 3, :] = mask[..., 4, 7:] = lowest
    primals["attn_mask"], primals["q"][:, :, 3] = mask, 0.0
    check_backward(primals, tangents, cotangents_of(primals, *MIXED))


@pytest.mark.parametrize(
    ("tangents", "names"),
    [("", ("do", "d_lse")), ("qkv", ("d_lse",)), ("qkv", ("d_mu",)), ("qk", ("do", "dt_o", "d_lse", "d_mu"))],
)
def test_cotangents_of_the_row_statistics(tangents: str, names: tuple[str, ...]) -> None:
    """Check them with and without those of the outputs; dead rows have constant statistics, whatever comes back."""
    primals, directions = inputs(tangents, n=20, m=30, d=16)
    seen = torch.rand(1, 1, 20, 30, device=DEVICE) > 0.3
    seen[..., 5, :] = False
    primals["attn_mask"] = seen
    cotangents = cotangents_of(primals, *names)
    expected = check_backward(primals, directions, cotangents)
    for name in cotangents.keys() & {"d_lse", "d_mu"}:
        cotangents[name][0, 0, 5] = math.nan
    actual = run_backward(primals, directions, cotangents)
    for name in NAMES:
        assert actual[name] is None or torch.equal(actual[name], expected[name]), name


def test_gradients_of_tangents_nobody_asked_about_are_zero() -> None:
    """Check calls without a cotangent of t_o or mu, or of anything that depends on the tangent."""
    primals, tangents = inputs(n=4, d=16)
    actual = run_backward(primals, tangents, cotangents_of(primals, "do"))
    assert all((actual[f"t_{name}"] == 0).all() for name in "qkv") and (actual["q"] != 0).any()
    actual = run_backward(primals, tangents, cotangents_of(primals, "d_mu"))
    assert (actual["t_v"] == 0).all() and (actual["v"] == 0).all() and (actual["t_q"] != 0).any()
    actual = run_backward(primals, tangents, {})
    assert all((x == 0).all() for x in actual.values() if x is not None)


@pytest.mark.parametrize(("window", "lower_right"), [((-1, 3), True), ((12, -1), False)])
def test_packed_sequences(window: tuple[int, int], lower_right: bool) -> None:
    """Check one without queries, one without keys, and tokens that belong to none, whose gradients are zero."""
    primals, tangents, cu_seqlens = packed_inputs([38, 0, 9, 3], [20, 13, 0, 40], kv_heads=1, d=16, spare=2)
    band = {"window": window, "lower_right": lower_right, "cu_seqlens": cu_seqlens}
    gradients = check_backward(primals, tangents, cotangents_of(primals, *MIXED), **band)
    assert all((gradients[name][:, :, :2] == 0).all() for name in ("q", "k", "v", "t_q", "t_k", "t_v"))


@pytest.mark.parametrize("layout", ["bnhd", "packed"])
def test_layouts_need_no_copy(layout: str) -> None:
    """Check inputs by strides, and cotangents that are transposed, or of stride 0 as a sum's is."""
    primals, tangents = inputs(heads=2, n=20, d=24, layout=layout)
    cotangents = {"do": normal(1, 1, 1, 1).expand(1, 2, 20, 24), "dt_o": normal(1, 20, 2, 24).transpose(1, 2)}
    check_backward(primals, tangents, cotangents)


@pytest.mark.parametrize("d", [64, 72])
def test_rows_by_descriptor(d: int) -> None:
    """Check two samples and heads, ragged ends of rows and of columns, on each side of the tiles."""
    shape = {"batch": 2, "heads": 2, "kv_heads": 1, "n": 35, "m": 20, "d": d, "dv": 40, "dtype": torch.float16}
    primals, tangents = inputs(**shape)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), descriptors=True)


def test_garbage_beyond_the_last_row_is_not_read() -> None:
    """Put NaN right behind every tensor's rows and columns, and check that none is read."""
    primals, tangents = inputs(n=20, m=30, d=24)
    cotangents = cotangents_of(primals, *MIXED)
    for tensors in (primals, tangents, cotangents):
        for name, x in tensors.items():
            padded = torch.full((1, 1, 64, 32), math.nan, device=DEVICE)
            padded[:, :, : x.shape[2], :24] = x
            tensors[name] = padded[:, :, : x.shape[2], :24]
    check_backward(primals, tangents, cotangents)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_any_scale(scale: float) -> None:
    """Check each sign; for a negative one the forward turns the sign of q, and the backward has no need to."""
    primals, tangents = inputs(n=20, m=30, d=16)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), scale=scale)


def test_nothing_to_compute() -> None:
    """Check that without samples or keys nothing is launched, and that the gradients are zero."""
    primals, tangents = inputs(n=4, d=16)
    cotangents = cotangents_of(primals, *MIXED)
    empty = [{name: x[:0] for name, x in tensors.items()} for tensors in (primals, tangents, cotangents)]
    assert run_backward(*empty)["t_k"].shape == (0, 1, 4, 16)
    for tensors in (primals, tangents):
        tensors.update({name: tensors[name][:, :, :0] for name in "kv"})
    actual = run_backward(primals, tangents, cotangents)
    assert (actual["q"] == 0).all() and (actual["t_q"] == 0).all() and actual["k"].shape == (1, 1, 0, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 72, 96, 128])
def test_everything_by_everything(d: int, dtype: torch.dtype) -> None:
    """Check each mask with each set of tangents (interpreted: every fourth pair); lengths, Dv and heads take turns.

    In float32 only the cap counts: there both errors are a few roundings, and among so many draws some ratio exceeds 3.
    """
    pairs = [*itertools.product(MASKS, SUBSETS)][d // 8 % 4 :: 4 if INTERPRETED else 1]
    lengths = [(n, m) for n, m in LENGTHS if n > 1 < m]  # For a single key dS is 0, and so is PyTorch's rounding error.
    turns = zip(itertools.cycle(lengths), itertools.cycle([d, 40, d]), itertools.cycle([(1, 1), (2, 1)]))
    for (mask, tangents), ((n, m), dv, (heads, kv_heads)) in zip(pairs, turns):
        primals, directions, options = case(
            tangents, mask, n, m, heads=heads, kv_heads=kv_heads, d=d, dv=dv, dtype=dtype, device=DEVICE
        )
        cotangents = cotangents_of(primals, *(MIXED if directions else PRIMAL))
        try:
            check_backward(primals, directions, cotangents, **options, by_rule=dtype != torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{mask}, tangents of {tangents or 'nothing'}, N {n}, M {m}, Dv {dv}") from error
