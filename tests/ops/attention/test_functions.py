"""Public attention: accuracy by the tolerance rule, drop-in behaviour, memory, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.attention.op import ATTENTION
from fastdistill.testing import DEVICES, MemoryRecorder, assert_accurate, cast, make_qkv, reference_jvp, reference_vjp

NAMES = ("q", "k", "v")

# Head dims of real models, odd lengths, grouped and cross attention, and each layout that models use.
GRID = [
    {"n": 15, "d": 32},
    {"n": 33, "m": 20, "d": 72, "layout": "bnhd"},
    {"n": 17, "d": 64, "layout": "packed"},
    {"n": 9, "m": 31, "d": 128, "dv": 80, "heads": 6, "kv_heads": 2, "layout": "bnhd"},
    {"n": 1, "m": 1, "d": 256},
]


def ids(case: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in case.items())


def points(
    case: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    primals = dict(zip(NAMES, make_qkv(**case, dtype=dtype, device=device, seed=1), strict=True))
    return primals, dict(zip(NAMES, make_qkv(**case, dtype=dtype, device=device, seed=2), strict=True))


def plain(**tensors: Tensor) -> Tensor:
    return reference.attention(tensors["q"], tensors["k"], tensors["v"], tensors.get("attn_mask"))


@pytest.mark.parametrize("case", GRID, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_pair_is_accurate_with_its_gradients(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    primals, tangents = points(case, dtype, device)
    leaves = {name: x.clone().requires_grad_() for name, x in primals.items()}
    t_leaves = {f"t_{name}": x.clone().requires_grad_() for name, x in tangents.items()}
    gqa = "kv_heads" in case
    out, t_out = fd.attention_jvp(*leaves.values(), *t_leaves.values(), enable_gqa=gqa, tangent_grad=True)
    exact, baseline = (cast(primals, torch.float64), cast(tangents, torch.float64)), (primals, tangents)
    truths, baselines = reference_jvp(plain, *exact), reference_jvp(plain, *baseline)
    for name, ours, truth, base in zip(("out", "t_out"), (out, t_out), truths, baselines, strict=True):
        assert_accurate(ours.detach(), truth, base, name=name)

    d_out, dt_out = torch.randn_like(out), torch.randn_like(t_out)
    inputs = {**leaves, **t_leaves}
    ours = dict(zip(inputs, torch.autograd.grad((out, t_out), list(inputs.values()), (d_out, dt_out)), strict=True))
    truth = reference_vjp(plain, *exact, d_out.double(), dt_out.double())
    base = reference_vjp(plain, *baseline, d_out, dt_out)
    for name, gradient in ours.items():
        assert_accurate(gradient, truth[name], base[name], name=f"d{name}", order=2)


def test_primal_equals_pytorch_with_and_without_tangents() -> None:
    q, k, v = make_qkv(n=33, d=64)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(fd.scaled_dot_product_attention(q, k, v), expected, rtol=0, atol=0)
    dual, _ = torch.func.jvp(fd.scaled_dot_product_attention, (q, k, v), (q, k, v))
    torch.testing.assert_close(dual, expected)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["three-dims", "five-dims"])
def test_any_number_of_batch_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v, t_q = (torch.randn(*lead, 2, 5, 8, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(*lead[-1:], 1, 1, 5) > 0.3 if lead else torch.rand(5, 5) > 0.3
    op = lambda q: fd.scaled_dot_product_attention(q, k, v, mask)  # noqa: E731
    flat = lambda x: x.reshape(-1, 2, 5, 8)  # noqa: E731
    full = mask.expand(*lead, 2, 5, 5).reshape(-1, 2, 5, 5)
    truth = torch.func.jvp(lambda q: reference.attention(q, flat(k), flat(v), full), (flat(q),), (flat(t_q),))
    out, t_out = torch.func.jvp(op, (q,), (t_q,))
    assert out.shape == q.shape
    torch.testing.assert_close((flat(out), flat(t_out)), truth)


def test_rows_that_see_nothing_are_zero_with_zero_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(n=4, d=8, dtype=torch.float64))
    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # row 0 sees no key
    out, t_out = fd.attention_jvp(q, k, v, q.detach(), k.detach(), v.detach(), attn_mask=mask, tangent_grad=True)
    assert out[:, :, 0].abs().max() == 0
    assert t_out[:, :, 0].abs().max() == 0
    gradients = torch.autograd.grad((out.sum() + t_out.sum()), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][:, :, 0].abs().max() == 0


def test_float_mask_gets_gradient_and_carries_tangent() -> None:
    primals, tangents = points({"n": 5, "m": 7, "d": 8}, torch.float64)
    mask, t_mask = torch.randn(2, 1, 1, 5, 7, dtype=torch.float64).unbind(0)
    primals, tangents = {**primals, "attn_mask": mask}, {**tangents, "attn_mask": t_mask}
    leaves = [x.clone().requires_grad_() for x in (*primals.values(), *tangents.values())]
    q, k, v, m, t_q, t_k, t_v, t_m = leaves
    out, t_out = fd.attention_jvp(q, k, v, t_q, t_k, t_v, attn_mask=m, t_attn_mask=t_m, tangent_grad=True)
    torch.testing.assert_close((out, t_out), reference_jvp(plain, primals, tangents))
    d_out, dt_out = torch.randn_like(out), torch.randn_like(t_out)
    truth = reference_vjp(plain, primals, tangents, d_out, dt_out)
    ours = torch.autograd.grad((out, t_out), leaves, (d_out, dt_out))
    names = [*primals, *(f"t_{name}" for name in tangents)]
    torch.testing.assert_close(dict(zip(names, ours, strict=True)), truth)


def test_no_matrix_of_queries_by_keys_is_ever_stored() -> None:
    n, d = 2048, 16
    leaves = [x.requires_grad_() for x in make_qkv(batch=1, heads=2, n=n, d=d)]
    tangents = make_qkv(batch=1, heads=2, n=n, d=d, seed=2)
    with MemoryRecorder() as recorder:
        out, t_out = torch.func.jvp(fd.scaled_dot_product_attention, tuple(leaves), tangents)
        torch.autograd.grad((out.sin() + t_out).sum(), leaves)
    assert recorder.largest < n * n / 4


def test_pair_without_tangent_grad_saves_nothing_for_the_tangent() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(n=64, d=16))
    t_q, t_k, t_v = make_qkv(n=64, d=16, seed=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        out, t_out = fd.attention_jvp(q, k, v, t_q, t_k, t_v)
    assert out.requires_grad
    assert not t_out.requires_grad
    pointers = {x.data_ptr() for x in kept}
    assert not pointers & {x.data_ptr() for x in (t_q, t_k, t_v, t_out)}
    assert pointers >= {x.data_ptr() for x in (q, k, v)}


def test_autocast_lowers_primal_and_tangent_as_it_does_for_pytorch() -> None:
    q, k, v = make_qkv(n=9, d=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, t_out = torch.func.jvp(fd.scaled_dot_product_attention, (q, k, v), (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == t_out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_reach_inside_the_kernels() -> None:
    q, k, v = make_qkv(n=9, d=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = fd.attention_jvp(q, k, v, q)
    torch.testing.assert_close(inside, fd.attention_jvp(q, k, v, q)[0], rtol=0, atol=0)


@pytest.mark.parametrize("tangent_grad", [False, True])
@pytest.mark.parametrize("given", ["", "q", "v", "qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(
    given: str, tangent_grad: bool, dtype: torch.dtype
) -> None:
    primals, tangents = points({"n": 5, "m": 7, "d": 16, "dv": 8, "layout": "bnhd"}, dtype)
    args = (*primals.values(), None, *(tangents[n] if n in given else None for n in NAMES), None)
    args = (*args, -1, -1, False, 0.25, False, True, "torch", tangent_grad)
    real = ATTENTION._dual(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = ATTENTION._fake_dual(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
    describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
    assert [describe(x) for x in faked] == [describe(x) for x in real]


def broken(**changes: Any) -> dict[str, Any]:
    q, k, v = make_qkv(n=5, d=8)
    return {"query": q, "key": k, "value": v, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": [1.0]}, "query: expected a tensor, got list"),
        (
            {"query": torch.ones(2, 4, 5, 8, dtype=torch.long)},
            "expected a floating-point tensor, got torch.int64",
        ),
        ({"query": torch.ones(8)}, r"query: expected \(..., length, dim\), at least two dimensions, got \(8,\)"),
        ({"key": torch.ones(3, 4, 5, 8)}, r"key: expected batch dimensions that broadcast with \(2,\), got \(3,\)"),
        ({"value": torch.ones(3, 2, 4, 5, 8).mT}, r"value: expected length 5 as key, got 8"),
        ({"value": torch.ones(7, 3, 4, 5, 8)}, r"value: expected batch .* with \(1, 2\), got \(7, 3\)"),
        ({"key": torch.ones(2, 4, 5, 6)}, "key: expected head dim 8"),
        ({"value": torch.ones(2, 4, 6, 8)}, "value: expected length 5 as key, got 6"),
        ({"value": torch.ones(2, 4, 5, 8, dtype=torch.float16)}, "value: expected torch.float32"),
        (
            {"key": torch.ones(2, 2, 5, 8), "value": torch.ones(2, 2, 5, 8)},
            "key: expected 4 heads as query, or 1",
        ),
        ({"value": torch.ones(2, 3, 5, 8)}, "value: expected 4 heads as query, or 1 .* got 3"),
        (
            {"value": torch.ones(2, 3, 5, 8), "enable_gqa": True},
            "value: expected a divisor of the 4 heads of query, got 3",
        ),
        ({"attn_mask": torch.ones(5, 4, dtype=torch.bool)}, "attn_mask: expected a shape that broadcasts"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, "attn_mask: expected torch.bool or torch.float32"),
        ({"attn_mask": torch.ones(3, 2, 4, 5, 5)}, r"attn_mask: expected .* to \(2, 4, 5, 5\), got \(3, 2, 4, 5, 5\)"),
        ({"attn_mask": torch.ones(5, 5).double()}, "attn_mask: expected torch.bool or torch.float32 as query"),
        ({"attn_mask": [True]}, "attn_mask: expected a tensor or None, got list"),
        ({"enable_gqa": "no"}, "enable_gqa: expected a bool, got str"),
        ({"is_causal": 1}, "is_causal: expected a bool, got int"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability, from 0 to 1, got 1.5"),
        ({"dropout_p": "half"}, "dropout_p: expected a probability"),
        ({"impl": "fast"}, "impl: expected one of 'auto'"),
        ({"impl": "cuda"}, "no CUDA extension"),
        ({"dropout_p": 0.1, "impl": "torch"}, "dropout_p: expected 0.0"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fd.scaled_dot_product_attention(**broken(**changes))


def test_explicit_triton_on_a_cpu_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        fd.scaled_dot_product_attention(**broken(impl="triton"))


def test_dropout_is_refused_where_a_tangent_flows() -> None:
    q, k, v = make_qkv(n=5, d=8)
    with pytest.raises(ValueError, match="dropout_p"):
        torch.func.jvp(lambda q: fd.scaled_dot_product_attention(q, k, v, dropout_p=0.5), (q,), (q,))


def test_tangent_of_a_bool_mask_is_refused() -> None:
    q, k, v = make_qkv(n=5, d=8)
    with pytest.raises(TypeError, match="t_attn_mask: expected None, as attn_mask is"):
        fd.attention_jvp(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool), t_attn_mask=torch.ones(5, 5))


def test_autocast_leaves_float64_alone_as_it_does_for_pytorch() -> None:
    q, k, v = make_qkv(n=5, d=8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fd.scaled_dot_product_attention(q, k, v).dtype == torch.float64


def test_shapes_are_inferred_on_the_meta_device() -> None:
    q, k, v = (x.to("meta") for x in make_qkv(n=5, d=8))
    assert fd.scaled_dot_product_attention(q, k, v).shape == q.shape
    assert fd.ada_layer_norm(q[0], k[0], v[0]).shape == q[0].shape


@pytest.mark.parametrize(
    ("tangent", "message"),
    [
        (torch.ones(2, 4, 5, 7), r"t_q: expected shape \(2, 4, 5, 8\) as q"),
        (torch.ones(2, 4, 5, 8, dtype=torch.long), "t_q: expected a floating-point tensor"),
        (torch.ones(2, 4, 5, 8, requires_grad=True), "t_q requires grad, which tangent_grad=False would silently drop"),
        (torch.ones(2, 4, 5, 8, device="meta"), "t_q: expected device cpu"),
    ],
)
def test_bad_tangents_are_refused_by_name(tangent: Tensor, message: str) -> None:
    q, k, v = make_qkv(n=5, d=8)
    with pytest.raises((ValueError, TypeError), match=message):
        fd.attention_jvp(q, k, v, tangent)


def test_explain_names_the_choice_and_its_reason() -> None:
    q, k, v = make_qkv(n=5, d=8)
    assert "torch (no triton: tensors are on 'cpu')" in fd.explain(q, k, v)
    assert "asked for by name" in fd.explain(q, k, v, impl="torch")
    with pytest.raises(ValueError, match="k: expected head dim 8 as q, got 4"):
        fd.explain(q, k[..., :4], v)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive_hides_the_same_keys(scale: float) -> None:
    """Check scales for which PyTorch's own causal kernel on a CPU silently gives NaN."""
    q, k, v = make_qkv(n=5, d=8, seed=3)[:3]
    truth = reference.attention(q.double(), k.double(), v.double(), scale=scale, window=(-1, 0))
    out = fd.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
