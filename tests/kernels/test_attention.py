"""The attention kernel's values, interpreted, against float64 autodiff of the plain formula.

The interpreter's time goes by steps over key tiles (32 x 32 here) and heads, not by their size: so lengths stay below
three tiles, and one or two heads do unless heads are the point.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.kernels import attention as kernel
from fastdistill.testing import assert_accurate, cast, make_qkv, reference_jvp, relative_error

Tensors = dict[str, Tensor | None]
SUBSETS = ["", "q", "k", "v", "qv", "kv", "qk", "qkv"]


def inputs(tangents: str = "qkv", seed: int = 0, **shape: Any) -> tuple[Tensors, Tensors]:
    """Standard normal q, k, v and those tangents that are named, B = 1 and H = 1 unless told otherwise."""
    shape = {"batch": 1, "heads": 1, **shape}
    primals = dict(zip("qkv", make_qkv(seed=seed, **shape)))
    directions = dict(zip("qkv", make_qkv(seed=seed + 1, **shape)))
    return primals, {name: x for name, x in directions.items() if name in tangents}


def run(
    primals: Tensors,
    tangents: Tensors,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    tangent_grad: bool = False,
    module: ModuleType = kernel,
) -> kernel.Outputs:
    """The kernel on named tensors; masks are expanded as the op does."""
    q, k, v = (primals[name] for name in "qkv")
    masks = (primals.get("attn_mask"), tangents.get("attn_mask"))
    full = (*q.shape[:3], k.shape[2])
    outputs = module.attention_forward(
        q, k, v, *(tangents.get(name) for name in "qkv"), *(x if x is None else x.expand(full) for x in masks),
        is_causal=is_causal, scale=q.shape[-1] ** -0.5 if scale is None else scale, tangent_grad=tangent_grad,
    )  # fmt: skip
    return kernel.Outputs(*outputs)


def log_sum_exp(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """The log of the softmax's denominator, 0 instead of -inf where a row sees no key."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() if is_causal else torch.tensor(True)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask
    logits = logits.masked_fill(~seen, -math.inf)
    dead = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(dead, 0).logsumexp(-1).masked_fill(dead.squeeze(-1), 0)


def check(
    primals: Tensors, tangents: Tensors, *, is_causal: bool = False, scale: float | None = None
) -> kernel.Outputs:
    """Assert that o and t_o keep the tolerance rule, and float32 its cap; that lse and mu have float32's accuracy."""
    outputs = run(primals, tangents, is_causal=is_causal, scale=scale)

    def attention(**x: Tensor | None) -> Tensor:
        return reference.attention(**x, is_causal=is_causal, scale=scale)

    def statistic(**x: Tensor | None) -> Tensor:
        return log_sum_exp(x["q"], x["k"], x.get("attn_mask"), is_causal, scale)

    exact, t_exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths, baselines = reference_jvp(attention, exact, t_exact), reference_jvp(attention, primals, tangents)
    for name, actual, truth, baseline in zip(("o", "t_o"), (outputs.o, outputs.t_o), truths, baselines):
        if actual is not None:
            assert_accurate(actual, truth, baseline, name=name)
            assert actual.dtype != torch.float32 or relative_error(actual, truth) < 5e-6, name
    lse, mu = reference_jvp(statistic, exact, {name: t for name, t in t_exact.items() if name != "v"})
    torch.testing.assert_close(outputs.lse.masked_fill(outputs.lse == -math.inf, 0).double(), lse, rtol=1e-6, atol=1e-5)
    if tangents:
        torch.testing.assert_close(outputs.mu.double(), mu, rtol=1e-6, atol=1e-5)
    else:
        assert outputs.t_o is None and outputs.mu is None
    return outputs


def edited(tmp_path: Path, old: str, new: str) -> ModuleType:
    """The kernel's module with one piece of its source replaced."""
    source = Path(kernel.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "edited_attention.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fastdistill.kernels.edited_attention", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tangents", SUBSETS)
def test_every_subset_of_tangents(tangents: str) -> None:
    """A missing tangent is a structural zero; two key tiles, both partly empty."""
    check(*inputs(tangents, n=17, m=40, d=32))


@pytest.mark.parametrize(
    ("tangents", "count"),
    [("", 2), ("q", 4), ("k", 4), ("v", 3), ("qv", 5), ("kv", 5), ("qk", 5), ("qkv", 6), ("M", 3)],
)
def test_zero_tangents_cost_no_matmul(tangents: str, count: int, matmuls: list[tuple[int, ...]]) -> None:
    """One tile, one part: 2 for o, 1 for each of q, k and v that moves, 1 if the logits move, be it by the mask (M)."""
    primals, directions = inputs(tangents, n=32, m=32, d=32)
    if tangents == "M":
        primals["attn_mask"] = directions["attn_mask"] = torch.zeros(1, 1, 32, 32)
    run(primals, directions)
    assert len(matmuls) == count


@pytest.mark.parametrize("d", [8, 16, 24, 32, 64, 72, 80, 96, 100, 112, 128, 240, 256])
def test_every_head_dim(d: int) -> None:
    """Powers of two, the sums of two and of three, padded tails, and an odd one out."""
    check(*inputs(n=15, m=20, d=d))


def test_a_head_dim_of_72_is_computed_as_64_and_16(matmuls: list[tuple[int, ...]]) -> None:
    """And not as 128: 1.11 times the work, and not 1.78."""
    run(*inputs("", n=32, m=32, d=72))
    assert matmuls == [(32, 64, 32), (32, 16, 32), (32, 32, 64), (32, 32, 16)]


@pytest.mark.parametrize(("d", "dv"), [(32, 80), (72, 16)])
def test_values_as_wide_as_they_like(d: int, dv: int) -> None:
    """Wider and narrower than the keys, in another number of parts."""
    check(*inputs(n=20, m=33, d=d, dv=dv))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 65), (63, 1), (65, 15), (31, 64), (64, 63)])
def test_every_length(n: int, m: int) -> None:
    """One, one less and one more than whole tiles, cross-attention both ways."""
    check(*inputs(n=n, m=m, d=32))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_share_keys(kv_heads: int) -> None:
    """Multi-query, grouped and plain heads, in a batch of two."""
    check(*inputs(batch=2, heads=4, kv_heads=kv_heads, n=10, m=20, d=16))


@pytest.mark.parametrize("layout", ["bnhd", "packed"])
@pytest.mark.parametrize("d", [32, 72])
def test_layouts_need_no_copy(layout: str, d: int) -> None:
    """As projections leave them; rows of 72 are taken with the strides' factor 8."""
    check(*inputs(batch=2, heads=2, n=20, d=d, layout=layout))


def test_odd_strides() -> None:
    """A tensor cut out of a larger one, in all four dimensions, with no factor 8, and a broadcast one."""
    primals, tangents = inputs(n=20, d=16)
    primals["q"] = torch.randn(3, 5, 50, 37)[1:2, 2:3, 3:43:2, 4:36:2]
    tangents["k"] = torch.randn(1, 1, 1, 16).expand(1, 1, 20, 16)
    check(primals, tangents)


@pytest.mark.parametrize(("n", "m"), [(70, 70), (40, 70), (70, 40)])
def test_causal(n: int, m: int) -> None:
    """Query i sees key j <= i, whatever the lengths."""
    check(*inputs(n=n, m=m, d=16), is_causal=True)


def test_causal_skips_the_tiles_above_the_diagonal(matmuls: list[tuple[int, ...]]) -> None:
    """6 of 9 tiles."""
    run(*inputs("", n=96, m=96, d=16), is_causal=True)
    assert len(matmuls) == 2 * 6


@pytest.mark.parametrize("shape", [(2, 2, 20, 40), (2, 1, 20, 40), (1, 2, 1, 40), (1, 1, 20, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(shape: tuple[int, ...], kind: str) -> None:
    """From every dimension; the tangent of a float mask as well."""
    primals, tangents = inputs(batch=2, heads=2, n=20, m=40, d=16)
    if kind == "bool":
        primals["attn_mask"] = torch.rand(shape) > 0.5
    else:
        primals["attn_mask"], tangents["attn_mask"] = torch.randn(shape), torch.randn(shape)
    check(primals, tangents)


def test_only_the_mask_moves() -> None:
    """The tangent of a learned bias, alone."""
    primals, tangents = inputs("", n=20, m=40, d=16)
    primals["attn_mask"], tangents["attn_mask"] = torch.randn(1, 1, 20, 40), torch.randn(1, 1, 20, 40)
    check(primals, tangents)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_no_key_gives_zeros(kind: str) -> None:
    """Beside one whose first tile is all dead, one whose last tile is, and a causal limit."""
    primals, tangents = inputs(n=40, m=40, d=16)
    seen = torch.rand(1, 1, 40, 40) > 0.3
    seen[..., 5, :] = seen[..., 35, :32] = seen[..., 36, 32:] = False
    primals["attn_mask"] = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    outputs = check(primals, tangents, is_causal=True)
    dead = ~(seen & torch.ones(40, 40, dtype=torch.bool).tril()).any(-1)
    assert dead[0, 0, 5] and not dead.all()
    assert torch.equal(outputs.lse == -math.inf, dead)
    for x in (outputs.o, outputs.t_o, outputs.mu):
        assert (x[dead] == 0).all()


def test_a_row_of_lowest_floats_is_no_dead_row() -> None:
    """Libraries mask with finfo.min: such keys are hidden by any other key, but alone weigh the same, as in PyTorch."""
    primals, tangents = inputs("v", n=20, m=40, d=16)
    mask = torch.zeros(1, 1, 20, 40)
    mask[..., 3, :] = mask[..., 4, 7:] = torch.finfo(torch.float32).min
    primals["attn_mask"] = mask
    outputs = run(primals, tangents)
    truth, t_truth = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    assert relative_error(outputs.o, truth) < 5e-6
    assert relative_error(outputs.t_o, t_truth) < 5e-6


def test_garbage_beyond_the_last_row_is_not_read() -> None:
    """NaN right behind every tensor's rows and columns."""
    primals, tangents = inputs(n=20, m=40, d=24)
    for tensors in (primals, tangents):
        for name, x in tensors.items():
            padded = torch.full((1, 1, 64, 32), math.nan)
            padded[:, :, : x.shape[2], :24] = x
            tensors[name] = padded[:, :, : x.shape[2], :24]
    check(primals, tangents)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    """The kernel scales after it has taken maxima, which is right for positive scales alone."""
    check(*inputs(n=20, m=40, d=16), scale=scale)
    primals, tangents = inputs(n=20, m=40, d=16)
    primals["attn_mask"] = torch.rand(1, 1, 20, 40) > 0.5
    check(primals, tangents, scale=scale)


def test_logits_beyond_a_hundred() -> None:
    """exp(100) overflows; the running maximum must not let it."""
    primals, tangents = inputs(n=20, m=70, d=32)
    primals["q"] *= 60
    outputs = run(primals, tangents)
    truths = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    baselines = reference_jvp(reference.attention, primals, tangents)
    assert outputs.lse.max() > 100
    for actual, truth, baseline in zip((outputs.o, outputs.t_o), truths, baselines):
        assert_accurate(actual, truth, baseline, name="o and t_o")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tangents", ["qkv", "v"])
def test_16_bits(dtype: torch.dtype, tangents: str) -> None:
    """Two parts, several tiles, a learned bias of the same dtype."""
    primals, directions = inputs(tangents, n=40, m=70, d=72, dtype=dtype)
    primals["attn_mask"] = torch.randn(1, 1, 40, 70).to(dtype)
    check(primals, directions)


def test_the_accumulators_are_returned_unrounded() -> None:
    """For the backward of a tangent in 16 bits: float32, and equal to o and t_o once rounded."""
    outputs = run(*inputs(n=20, m=40, d=16, dtype=torch.float16), tangent_grad=True)
    assert outputs.o_acc.dtype == outputs.t_o_acc.dtype == torch.float32
    assert torch.equal(outputs.o_acc.half(), outputs.o) and torch.equal(outputs.t_o_acc.half(), outputs.t_o)
    assert not torch.equal(outputs.t_o_acc, outputs.t_o.float())
    for primals, tangents in (inputs(n=4, d=16), inputs("", n=4, d=16, dtype=torch.float16)):
        unneeded = run(primals, tangents, tangent_grad=True)
        assert unneeded.o_acc is None and unneeded.t_o_acc is None


def offset_inputs(t_k_offset: float, v_offset: float, std: float) -> tuple[Tensors, Tensors]:
    """bfloat16 inputs with a common offset in T (|mu| / std T is about that offset), in v, and with peaked logits."""
    primals, tangents = inputs(n=32, m=256, d=64, dtype=torch.float32)
    primals["q"], primals["v"] = primals["q"] * std, primals["v"] + v_offset
    tangents["k"] = tangents["k"] + t_k_offset
    return cast(primals, torch.bfloat16), cast(tangents, torch.bfloat16)


def tangent_error(module: ModuleType, primals: Tensors, tangents: Tensors) -> float:
    """Relative error of t_o before its own rounding."""
    _, t_truth = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    t_o_acc = run(primals, tangents, tangent_grad=True, module=module).t_o_acc
    assert t_o_acc is not None
    return relative_error(t_o_acc, t_truth)


@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("v_offset", [0.0, 3.0])
@pytest.mark.parametrize("t_k_offset", [0.0, 10.0, 100.0])
def test_common_modes_cost_no_accuracy(t_k_offset: float, v_offset: float, std: float) -> None:
    """The absolute cap: PyTorch's own bfloat16 errs by 0.5 % without offsets, and by 1000 % with both."""
    assert tangent_error(kernel, *offset_inputs(t_k_offset, v_offset, std)) < 2e-3


STEP = "step = tl.sum(e * z, 1) / tl.maximum(e_sum, LIVE)"
ROUNDED_SUM = "tl.sum(h_low.to(tl.float32), 1)"
MEAN = "t_o = add_scaled_rows(scale_rows(a, inverse), -h_dot * inverse, o)"


@pytest.mark.parametrize(
    ("old", "new", "v_offset", "worse"),
    [
        (STEP, "step = tl.zeros_like(rho)", 0, 50),
        (ROUNDED_SUM, "tl.sum(e * (z - step[:, None]), 1)", 3, 1.5),
        (MEAN, "t_o = scale_rows(a, inverse)", 3, 1.5),
    ],
    ids=["centring", "the sum of the rounded H", "its use"],
)
def test_what_the_accuracy_rests_on(old: str, new: str, v_offset: float, worse: float, tmp_path: Path) -> None:
    """The same kernel without it errs so many times more: a cap that a plainer kernel also kept would prove nothing."""
    primals, tangents = offset_inputs(100, v_offset, 1.0)
    error = tangent_error(kernel, primals, tangents)
    assert tangent_error(edited(tmp_path, old, new), primals, tangents) > worse * error


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h_dot = (h_dot - step * e_dot) * decay", "h_dot = h_dot * decay"),
        ("(e * (z - step[:, None]))", "(e * z)"),
        ("a = add_scaled_rows(scale_rows(a, decay), -step * decay, o)", "a = scale_rows(a, decay)"),
        ("o = add_dot(scale_rows(o, decay), e_low, v)", "o = add_dot(o, e_low, v)"),
    ],
)
def test_a_wrong_kernel_is_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of the recurrence matters to the checks above."""
    monkeypatch.setattr(kernel, "attention_forward", edited(tmp_path, old, new).attention_forward)
    primals, tangents = inputs(n=20, m=70, d=32, dtype=torch.float16)
    with pytest.raises(AssertionError):
        check(primals, tangents)


def test_the_tangent_is_linear_in_its_direction() -> None:
    """Twice the direction, twice the tangent, to the bit; and zeros give what None gives."""
    primals, tangents = inputs(n=20, m=40, d=16)
    once, twice = run(primals, tangents), run(primals, {name: 2 * t for name, t in tangents.items()})
    assert torch.equal(2 * once.t_o, twice.t_o) and torch.equal(2 * once.mu, twice.mu)
    zeros = {**tangents, "q": torch.zeros_like(primals["q"])}
    without = {name: t for name, t in tangents.items() if name != "q"}
    assert relative_error(run(primals, zeros).t_o, run(primals, without).t_o) < 1e-6


def test_nothing_to_compute() -> None:
    """An empty batch launches nothing; no keys at all make every row a dead one."""
    primals, tangents = inputs(n=4, d=16)
    outputs = run(*({name: x[:0] for name, x in tensors.items()} for tensors in (primals, tangents)))
    assert outputs.o.shape == outputs.t_o.shape == (0, 1, 4, 16)
    for tensors in (primals, tangents):
        tensors.update({name: tensors[name][:, :, :0] for name in "kv"})
    outputs = run(primals, tangents)
    assert (outputs.o == 0).all() and (outputs.t_o == 0).all() and (outputs.lse == -math.inf).all()


def test_outputs_start_as_garbage() -> None:
    """The suite's deterministic mode fills new memory with NaN, so what no kernel wrote fails every check."""
    assert torch.empty(3).isnan().all()


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
    """By the name of the argument."""
    primals, tangents = inputs(n=4, d=16)
    change(primals, tangents)
    with pytest.raises(error, match=message):
        run(primals, tangents)
