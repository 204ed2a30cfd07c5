"""Compare the attention kernel's values with float64 autodiff of the plain formula: shapes, layouts, dtypes.

The interpreter's time goes by steps over key tiles (32 x 32 there) and heads, not by their size. So lengths stay below
three tiles, and one or two heads do unless heads are the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.kernels.attention import attention_forward
from fastdistill.kernels.attention_arguments import precision
from fastdistill.testing import cast, reference_jvp, relative_error
from tests.kernels.attention_cases import SUBSETS, Tensors, check, inputs, normal, run
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("tangents", SUBSETS)
def test_every_subset_of_tangents(tangents: str) -> None:
    """Check that a missing tangent is a structural zero; there are two key tiles, both partly empty."""
    check(*inputs(tangents, n=17, m=40, d=32))


@pytest.mark.parametrize("d", [8, 24, 72, 96, 100, 112, 128, 256])
def test_every_head_dim(d: int) -> None:
    """Check powers of two, sums of two and of three, padded tails, and an odd one."""
    check(*inputs(n=15, m=20, d=d))


@pytest.mark.parametrize(("d", "dv"), [(32, 80), (72, 16)])
def test_values_as_wide_as_they_like(d: int, dv: int) -> None:
    """Check values wider and narrower than the keys, in another number of parts."""
    check(*inputs(n=20, m=33, d=d, dv=dv))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 65), (63, 1), (65, 15), (31, 64), (64, 63)])
def test_every_length(n: int, m: int) -> None:
    """Check one, one less and one more than whole tiles, and cross-attention both ways."""
    check(*inputs(n=n, m=m, d=32))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_share_keys(kv_heads: int) -> None:
    """Check multi-query and grouped heads, in a batch of two."""
    check(*inputs(batch=2, heads=4, kv_heads=kv_heads, n=10, m=20, d=16))


@pytest.mark.parametrize("layout", ["bnhd", "packed"])
@pytest.mark.parametrize("d", [32, 72])
def test_layouts_need_no_copy(layout: str, d: int) -> None:
    """Check layouts as projections leave them; rows of 72 are taken with the strides' factor 8."""
    check(*inputs(batch=2, heads=2, n=20, d=d, layout=layout))


def test_odd_strides() -> None:
    """Check a tensor cut out of a larger one, in all four dimensions, with no factor 8, and a broadcast one."""
    primals, tangents = inputs(n=20, d=16)
    primals["q"] = normal(3, 5, 50, 37)[1:2, 2:3, 3:43:2, 4:36:2]
    tangents["k"] = normal(1, 1, 1, 16).expand(1, 1, 20, 16)
    check(primals, tangents)


def test_garbage_beyond_the_last_row_is_not_read() -> None:
    """Put NaN right behind every tensor's rows and columns, and check that none is read."""
    primals, tangents = inputs(n=20, m=40, d=24)
    for tensors in (primals, tangents):
        for name, x in tensors.items():
            padded = torch.full((1, 1, 64, 32), math.nan, device=DEVICE)
            padded[:, :, : x.shape[2], :24] = x
            tensors[name] = padded[:, :, : x.shape[2], :24]
    check(primals, tangents)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    """Check scales of each sign; the kernel scales after taking maxima, which is right for positive ones alone."""
    check(*inputs(n=20, m=40, d=16), scale=scale)
    primals, tangents = inputs(n=20, m=40, d=16)
    primals["attn_mask"] = normal(1, 1, 20, 40) > 0
    check(primals, tangents, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tangents", ["qkv", "v"])
def test_16_bits(dtype: torch.dtype, tangents: str) -> None:
    """Check two parts, several tiles, and a learned bias of the same dtype."""
    primals, directions = inputs(tangents, n=40, m=70, d=72, dtype=dtype)
    primals["attn_mask"] = normal(1, 1, 40, 70).to(dtype)
    check(primals, directions)


def test_tf32_where_pytorch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check float32 on tensor cores, with 10 bits; common modes still cancel, because sums are of rounded numbers."""
    primals, tangents = inputs(n=20, m=70, d=32)
    primals["v"], tangents["k"] = primals["v"] + 3, tangents["k"] + 10
    _, t_truth = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    exact = relative_error(run(primals, tangents).t_o, t_truth)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert precision(torch.float32) == "tf32" and precision(torch.bfloat16) == "ieee"
    fast = relative_error(run(primals, tangents).t_o, t_truth)
    assert exact < 3e-5 < fast < 2e-3


def test_nan_is_not_rounded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check TF32, which rounds bit patterns, and 16 bits: a query of NaN has an output of NaN."""
    for dtype, allowed in ((torch.float32, "high"), (torch.float16, "highest")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda allowed=allowed: allowed)
        primals, tangents = inputs(n=3, m=5, d=16, dtype=dtype)
        primals["q"][0, 0, 1] = math.nan
        outputs = run(primals, tangents)
        assert outputs.o[0, 0, 1].isnan().all() and outputs.t_o[0, 0, 1].isnan().all()
        assert outputs.o[0, 0, ::2].isfinite().all() and outputs.t_o[0, 0, ::2].isfinite().all()


def far_apart(x: Tensor, dim: int, tmp_path: Path) -> Tensor:
    """Return x with more than 2^31 elements between its last two entries along `dim`; untouched memory is not real."""
    count, rows = x.shape[dim], x.numel() // x.shape[dim]
    stride = (2**31 // max(1, count - 1) // 64 + 1) * 64
    size = stride * (count - 1) + rows
    if DEVICE == "cpu":
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=x.dtype)
    else:
        memory = torch.zeros(size, dtype=x.dtype, device=DEVICE)
    moved = x.movedim(dim, 0)
    strides = (stride, *torch.empty(moved.shape[1:]).stride())
    return memory.as_strided(moved.shape, strides).copy_(moved).movedim(0, dim)


@pytest.mark.parametrize(("name", "dim"), [("q", 2), ("k", 2), ("v", 0), ("attn_mask", 2)])
def test_offsets_have_64_bits(name: str, dim: int, tmp_path: Path) -> None:
    """Check rows and samples beyond the reach of 32 bits."""
    primals, tangents = inputs("v", batch=2, n=3, m=5, d=16, dtype=torch.float16)
    primals["attn_mask"] = normal(2, 1, 3, 5) > -1
    expected = run(primals, tangents)
    primals[name] = far_apart(primals[name], dim, tmp_path)
    outputs = run(primals, tangents)
    assert torch.equal(outputs.o, expected.o) and torch.equal(outputs.t_o, expected.t_o)


@pytest.mark.parametrize("factor", [1.0, 1e-4], ids=["normal", "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_rounding_took_is_kept_for_the_backward(dtype: torch.dtype, factor: float) -> None:
    """Check that number and rest together are as good as float32 of 16 bits, or of 22, however small they are.

    All keys are alike, so that o and t_o are plain means of v and t_v, which no rounding of P or H touches.
    """
    primals, tangents = inputs("v", n=20, m=3, d=16, dtype=dtype)
    primals["k"] = primals["k"][:, :, :1].expand(primals["k"].shape)
    primals["v"], tangents["v"] = primals["v"] * factor, tangents["v"] * factor
    outputs = run(primals, tangents, tangent_grad=True)
    assert outputs.o_rest.dtype == outputs.t_o_rest.dtype == dtype
    for name, values in (("o", primals["v"]), ("t_o", tangents["v"])):
        truth = values.double().mean(2, keepdim=True).expand(1, 1, 20, 16)
        low, rest = getattr(outputs, name).double(), getattr(outputs, f"{name}_rest").double()
        assert relative_error(low + rest / 256, truth) < torch.finfo(dtype).eps ** 2 * 2
        assert relative_error(low, truth) > torch.finfo(dtype).eps / 20


def test_no_rest_is_kept_where_none_is_needed() -> None:
    """Check float32, an absent tangent, one that isn't differentiated, and calls after which no gradient may follow."""
    low = {"n": 4, "d": 16, "dtype": torch.float16}
    assert run(*inputs(n=4, d=16), tangent_grad=True)[4:] == (None, None)
    assert run(*inputs(**low))[4:] == (None, None)
    for given, tangent_grad in (("", True), ("qkv", False)):
        primals, tangents = inputs(given, **low)
        pairs = [*zip(primals.values(), map(tangents.get, "qkv")), (None, None)]
        options = {"window": (-1, -1), "lower_right": False, "cu_seqlens": None, "scale": 0.25}
        _, (o_rest, t_o_rest) = attention_forward(pairs, **options, grad=True, tangent_grad=tangent_grad)
        assert o_rest is not None and t_o_rest is None


def test_the_tangent_is_linear_in_its_direction() -> None:
    """Check that twice the direction gives twice the tangent, to the bit, and that zeros give what None gives."""
    primals, tangents = inputs(n=20, m=40, d=16)
    once, twice = run(primals, tangents), run(primals, {name: 2 * t for name, t in tangents.items()})
    assert torch.equal(2 * once.t_o, twice.t_o) and torch.equal(2 * once.mu, twice.mu)
    zeros = {**tangents, "q": torch.zeros_like(primals["q"])}
    without = {name: t for name, t in tangents.items() if name != "q"}
    assert relative_error(run(primals, zeros).t_o, run(primals, without).t_o) < 1e-6


def test_nothing_to_compute() -> None:
    """Check that an empty batch launches nothing, and that no keys at all make every row a dead one."""
    primals, tangents = inputs(n=4, d=16)
    outputs = run(*({name: x[:0] for name, x in tensors.items()} for tensors in (primals, tangents)))
    assert outputs.o.shape == outputs.t_o.shape == (0, 1, 4, 16)
    for tensors in (primals, tangents):
        tensors.update({name: tensors[name][:, :, :0] for name in "kv"})
    outputs = run(primals, tangents)
    assert (outputs.o == 0).all() and (outputs.t_o == 0).all() and (outputs.lse == -math.inf).all()


def test_outputs_start_as_garbage() -> None:
    """Check that new memory is NaN, by the suite's deterministic mode, so that unwritten elements fail every check."""
    assert torch.empty(3, device=DEVICE).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, t: p.update(q=p["q"].double()), TypeError, r"q: expected float32, .* got torch.float64"),
        (
            lambda p, t: p.update(q=torch.zeros(1, 1, 4, 264)),
            ValueError,
            "q: expected a head dim from 1 to 256, got 264",
        ),
        (
            lambda p, t: p.update(v=torch.zeros(1, 1, 4, 512)),
            ValueError,
            "v: expected a head dim from 1 to 256, got 512",
        ),
        (lambda p, t: t.update(attn_mask=torch.zeros(4, 4)), ValueError, "t_attn_mask: expected a float attn_mask"),
    ],
    ids=["float64", "wide head", "wide values", "mask tangent"],
)
def test_what_it_cannot_do_is_refused(
    change: Callable[[Tensors, Tensors], None], error: type[Exception], message: str
) -> None:
    """Check that the message names the argument."""
    primals, tangents = inputs(n=4, d=16)
    change(primals, tangents)
    with pytest.raises(error, match=message):
        run(primals, tangents)
