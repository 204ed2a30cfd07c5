"""Test the public ops with impl="triton" end to end: kernels both ways, under every transform of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops import merge_attention
from fastdistill.testing import make_qkv, relative_error

from .device import DEVICE

Op = Callable[..., Any]
ours: Op = partial(fd.scaled_dot_product_attention, impl="triton")


def points(seed: int, **shape: Any) -> list[Tensor]:
    return list(make_qkv(**{"batch": 1, "heads": 2, "n": 20, "d": 24, "device": DEVICE, "seed": seed, **shape}))


def mixed(op: Op, *both: Tensor) -> tuple[Tensor, ...]:
    """Return output, tangent, and the gradients of a loss of both with respect to primals and tangents."""
    leaves = [x.clone().requires_grad_() for x in both]
    half = len(leaves) // 2
    out, t_out = jvp(op, tuple(leaves[:half]), tuple(leaves[half:]))
    return (out, t_out, *torch.autograd.grad((out.sin() * t_out).sum(), leaves))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_attention_and_its_gradients_match_the_reference() -> None:
    both = [*points(1), *points(2)]
    assert_same(mixed(ours, *both), mixed(reference.attention, *both))


def test_the_explicit_pair_does_too() -> None:
    both = [*points(1), *points(2)]
    leaves = [x.requires_grad_() for x in both]
    out, t_out = fd.attention_jvp(*leaves, tangent_grad=True, impl="triton")
    gradients = torch.autograd.grad((out.sin() * t_out).sum(), leaves)
    assert_same((out, t_out, *gradients), mixed(reference.attention, *(x.detach() for x in both)))


def test_a_gradient_of_the_output_alone_leaves_the_tangent_alone() -> None:
    """Check that fd.jvp keeps nothing of the tangent, and that the primal backward gives the same as without one."""
    q, k, v = (x.requires_grad_() for x in points(1))
    out, t_out = fd.jvp(ours, (q, k, v), tuple(points(2)))
    assert not t_out.requires_grad
    truth = torch.autograd.grad(reference.attention(q, k, v).sin().sum(), (q, k, v))
    assert_same(torch.autograd.grad(out.sin().sum(), (q, k, v)), truth)


def test_gradients_reach_the_parameters_behind_q_k_and_v() -> None:
    torch.manual_seed(0)
    project = torch.nn.Linear(24, 72).to(DEVICE)
    x, t_x = torch.randn(2, 1, 2, 20, 24, device=DEVICE).unbind(0)

    def gradients(op: Op) -> tuple[Tensor, ...]:
        out, t_out = jvp(lambda x: op(*project(x).chunk(3, -1)), (x,), (t_x,))
        return torch.autograd.grad((out.sin() * t_out).sum(), tuple(project.parameters()))

    assert_same(gradients(ours), gradients(reference.attention))


def test_without_tangents_an_explicit_triton_still_runs_and_differentiates() -> None:
    q, k, v = (x.requires_grad_() for x in points(1))
    gradients = torch.autograd.grad(ours(q, k, v).sin().sum(), (q, k, v))
    assert_same(gradients, torch.autograd.grad(reference.attention(q, k, v).sin().sum(), (q, k, v)))


def test_vmap_folds_into_the_batch_so_that_jacobians_work() -> None:
    q, k, v = points(1, n=3, d=4, heads=1)
    assert_same(jacfwd(ours)(q, k, v), jacfwd(reference.attention)(q, k, v))
    both = [torch.stack([x, x.flip(2)]) for x in (*points(1), *points(2))]
    push = lambda op: vmap(lambda *b: jvp(op, b[:3], b[3:]))(*both)  # noqa: E731
    assert_same(push(ours), push(reference.attention))


def test_compiled_equals_eager_with_tangents() -> None:
    torch._dynamo.reset()
    both = [*points(1), *points(2)]
    compiled = torch.compile(lambda *b: jvp(ours, b[:3], b[3:]), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in both]
    out, t_out = compiled(*leaves)
    gradients = torch.autograd.grad((out.sin() * t_out).sum(), leaves)
    assert_same((out, t_out, *gradients), mixed(reference.attention, *both))


def test_checkpoint_recomputes_what_was_there() -> None:
    both = [*points(1), *points(2)]
    leaves = [x.clone().requires_grad_() for x in both]
    out, t_out = checkpoint(lambda *b: jvp(ours, b[:3], b[3:]), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad((out.sin() * t_out).sum(), leaves)
    assert_same((out, t_out, *gradients), mixed(reference.attention, *both))


def test_forward_mode_levels_reach_the_kernel() -> None:
    (q, k, v), tangents = points(1), points(2)
    with torch.autograd.forward_ad.dual_level():
        dual = ours(*map(torch.autograd.forward_ad.make_dual, (q, k, v), tangents))
        pair = tuple(torch.autograd.forward_ad.unpack_dual(dual))
    assert_same(pair, jvp(reference.attention, (q, k, v), tuple(tangents)))


def test_autocast_lowers_the_inputs_and_not_the_sums() -> None:
    both = [*points(1), *points(2)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        lowered = jvp(ours, tuple(both[:3]), tuple(both[3:]))
    low = [x.bfloat16() for x in both]
    torch.testing.assert_close(lowered, jvp(ours, tuple(low[:3]), tuple(low[3:])), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "align": "lower_right"},
        {"window_size": (3, 2)},
        {"window_size": (2, -1), "centre": True},
    ],
    ids=str,
)
def test_bands_give_what_the_torch_implementation_gives(options: dict[str, Any]) -> None:
    """Check values, log-sum-exps and gradients through all four."""
    shape = {"n": 20, "m": 37, "heads": 4, "kv_heads": 2}
    both = [*points(1, **shape), *points(2, **shape)]

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in both]
        op = partial(fd.scaled_dot_product_attention, enable_gqa=True, return_lse=True, impl=impl, **options)
        (out, lse), (t_out, mu) = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        loss = (out.sin() * t_out).sum() + (lse.sin() * mu).sum()
        return (out, lse, t_out, mu, *torch.autograd.grad(loss, leaves))

    assert_same(run("triton"), run("torch"))


def test_packed_sequences_give_what_the_torch_implementation_gives() -> None:
    """Check a sequence of no queries, one of no keys, and tokens that belong to none."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator).to(DEVICE)  # noqa: E731
    both = [draw(45, 2, 16), draw(50, 1, 16), draw(50, 1, 8), draw(45, 2, 16), draw(50, 1, 16), draw(50, 1, 8)]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 40, 40, 44], [3, 10, 47, 47]))

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in both]
        op = lambda *x: fd.varlen_attention(  # noqa: E731
            *x, cu_q, cu_k, 40, 37, enable_gqa=True, window_size=(-1, 3), return_lse=True, impl=impl
        )
        (out, lse), (t_out, mu) = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        live = lse.detach() > -torch.inf
        loss = (out.sin() * t_out).sum() + (lse[live].sin() * mu[live]).sum()
        return (out, lse, t_out, mu, *torch.autograd.grad(loss, leaves))

    assert_same(run("triton"), run("torch"))


def test_merged_parts_train_as_the_whole() -> None:
    """Check the basis of ring attention: gradients flow through each part's log-sum-exp and its tangent."""
    both = [*points(1, m=37), *points(2, m=37)]

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [ours(q, *kv, return_lse=True) for kv in zip(k.split(20, -2), v.split(20, -2))]
        return merge_attention([o for o, _ in parts], [lse for _, lse in parts])[0]

    assert_same(mixed(merged, *both), mixed(reference.attention, *both))


def test_pre_centring_takes_a_common_mode_out_of_the_gradients_too() -> None:
    """Check dq in bfloat16, where a mean of t_k cancels in dT t_k only as far as the rounded dT sums to zero."""
    both = [*points(1, n=32, m=64, d=64, heads=1), *points(2, n=32, m=64, d=64, heads=1)]
    both[1], both[2], both[4] = both[1] + 3, both[2] + 3, both[4] + 100
    both = [x.bfloat16() for x in both]
    cotangents = [torch.randn(1, 1, 32, 64, device=DEVICE).bfloat16() for _ in range(2)]

    def run(op: Op, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in both]
        results = jvp(op, tuple(leaves[:3]), tuple(leaves[3:]))
        gradients = torch.autograd.grad(results, leaves, [x.to(dtype) for x in cotangents])
        return (*(x.detach() for x in results), *gradients)

    truth = run(reference.attention, torch.float64)
    errors = {
        c: [relative_error(a, t) for a, t in zip(run(partial(ours, centre=c), torch.bfloat16), truth)]
        for c in (False, True)
    }
    assert max(errors[True]) < 6e-3
    assert max(errors[False]) > 3e-2


def test_a_learned_bias_gets_the_gradients_of_itself_and_of_its_tangent() -> None:
    bias, t_bias = torch.randn(2, 1, 2, 1, 20, device=DEVICE).unbind(0)
    both = [*points(1), bias, *points(2), t_bias]
    assert_same(mixed(ours, *both), mixed(reference.attention, *both))


def test_norms_run_the_kernel_under_functorch() -> None:
    x, w = torch.randn(2, 5, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    push = lambda op: jvp(op, (x, w), (x.sin(), w.cos()))  # noqa: E731
    pair = push(lambda x, w: fd.layer_norm(x, (40,), w, impl="triton"))
    assert_same(pair, push(lambda x, w: reference.layer_norm(x, (40,), w)))


@pytest.mark.parametrize("op", [ours, partial(fd.geglu, impl="triton")], ids=["attention", "geglu"])
def test_the_tangent_of_a_gradient_is_the_kernels_too(op: Op) -> None:
    plain = reference.attention if op is ours else reference.geglu
    x, t_x = (points(seed)[: 3 if op is ours else 2] for seed in (1, 2))
    slope = lambda f: grad(lambda *a: f(*a).sin().sum(), argnums=tuple(range(len(x))))  # noqa: E731
    expected = jvp(slope(plain), tuple(x), tuple(t_x))
    assert_same(jvp(slope(op), tuple(x), tuple(t_x)), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a.clone().requires_grad_(), t) for a, t in zip(x, t_x)]
        grads = torch.autograd.grad(op(*duals).sin().sum(), duals)
        assert_same([forward_ad.unpack_dual(g).tangent for g in grads], list(expected[1]))
