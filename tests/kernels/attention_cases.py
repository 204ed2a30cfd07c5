"""Make named inputs for the attention kernel, run it on them, and check its values for every test."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.kernels import attention as kernel
from fastdistill.testing import assert_accurate, cast, make_packed, make_qkv, reference_jvp, relative_error
from tests.kernels.device import DEVICE

Tensors = dict[str, Tensor | None]
Sequences = tuple[Tensor, Tensor, int, int]
SUBSETS = ["", "q", "k", "v", "qv", "kv", "qk", "qkv"]
UNLIMITED, CAUSAL = (-1, -1), (-1, 0)


def inputs(tangents: str = "qkv", seed: int = 0, **shape: Any) -> tuple[Tensors, Tensors]:
    """Draw standard normal q, k, v and the named tangents, by default with B = 1 and H = 1."""
    shape = {"batch": 1, "heads": 1, "device": DEVICE, **shape}
    primals = dict(zip("qkv", make_qkv(seed=seed, **shape)))
    directions = dict(zip("qkv", make_qkv(seed=seed + 1, **shape)))
    return primals, {name: x for name, x in directions.items() if name in tangents}


def packed_inputs(queries: list[int], keys: list[int], **shape: Any) -> tuple[Tensors, Tensors, Sequences]:
    """Draw the same for packed sequences with these numbers of queries and keys."""
    shape = {"heads": 1, "device": DEVICE, **shape}
    primals, cu_seqlens = make_packed(queries, keys, **shape)
    directions, _ = make_packed(queries, keys, seed=1, **shape)
    return dict(zip("qkv", primals)), dict(zip("qkv", directions)), cu_seqlens


def normal(*shape: int) -> Tensor:
    """Draw standard normal float32."""
    return torch.randn(*shape, device=DEVICE)


def run(
    primals: Tensors,
    tangents: Tensors,
    *,
    window: tuple[int, int] = UNLIMITED,
    lower_right: bool = False,
    cu_seqlens: Sequences | None = None,
    scale: float | None = None,
    tangent_grad: bool = False,
    descriptors: bool | None = None,
    module: ModuleType = kernel,
) -> kernel.Outputs:
    """Run the kernel on named tensors, with masks expanded as the op does; `descriptors` replaces the GPU's choice."""
    q, k, v = (primals[name] for name in "qkv")
    masks = (primals.get("attn_mask"), tangents.get("attn_mask"))
    full = (*q.shape[:3], k.shape[2])
    masks = tuple(x if x is None else x.expand(full) for x in masks)
    pairs = [*((x, tangents.get(name)) for name, x in zip("qkv", (q, k, v))), masks]
    options = {"window": window, "lower_right": lower_right, "cu_seqlens": cu_seqlens}
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    if descriptors is None:
        found = module.attention_forward(pairs, **options, grad=tangent_grad, tangent_grad=tangent_grad)
        ((o, t_o), (lse, mu)), rests = found
        return kernel.Outputs(o, t_o, lse, mu, *rests)
    outputs = module.allocate(q, v, moving=bool(tangents))
    launch = module.plan(pairs, outputs, **options, descriptors=descriptors)
    module._attention_kernel[launch.grid](*launch.args, **launch.options)
    return outputs


def hidden_between_sequences(
    primals: Tensors, window: tuple[int, int], lower_right: bool, cu_seqlens: Sequences
) -> Tensor:
    """Return a mask of all packed tokens by which each sequence sees only itself, through its own window."""
    seen = torch.zeros(primals["q"].shape[2], primals["k"].shape[2], dtype=torch.bool, device=DEVICE)
    starts_n, starts_m = (x.tolist() for x in cu_seqlens[:2])
    for n, stop_n, m, stop_m in zip(starts_n, starts_n[1:], starts_m, starts_m[1:]):
        seen[n:stop_n, m:stop_m] = reference.band(stop_n - n, stop_m - m, window, lower_right, DEVICE)
    return seen[None, None]


def check(
    primals: Tensors,
    tangents: Tensors,
    *,
    window: tuple[int, int] = UNLIMITED,
    lower_right: bool = False,
    cu_seqlens: Sequences | None = None,
    scale: float | None = None,
    **options: Any,
) -> kernel.Outputs:
    """Assert that o and t_o keep the tolerance rule, and float32 its cap; that lse and mu have float32's accuracy."""
    band = {"window": window, "lower_right": lower_right}
    outputs = run(primals, tangents, **band, cu_seqlens=cu_seqlens, scale=scale, **options)
    if cu_seqlens is not None:
        primals = {**primals, "attn_mask": hidden_between_sequences(primals, window, lower_right, cu_seqlens)}
        band = {}

    def attention(**x: Tensor | None) -> Tensor:
        return reference.attention(**x, scale=scale, **band)

    def statistic(q: Tensor, k: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return reference.attention_lse(q, k, attn_mask, scale=scale, **band)

    exact, t_exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths, baselines = reference_jvp(attention, exact, t_exact), reference_jvp(attention, primals, tangents)
    for name, actual, truth, baseline in zip(("o", "t_o"), (outputs.o, outputs.t_o), truths, baselines):
        if actual is not None:
            assert_accurate(actual, truth, baseline, name=name)
            assert actual.dtype != torch.float32 or relative_error(actual, truth) < 5e-6, name
    logits, t_logits = ({name: x for name, x in tensors.items() if name != "v"} for tensors in (exact, t_exact))
    lse, mu = reference_jvp(statistic, logits, t_logits)
    torch.testing.assert_close(outputs.lse.double(), lse, rtol=1e-6, atol=1e-5)
    if tangents:
        torch.testing.assert_close(outputs.mu.double(), mu, rtol=1e-6, atol=1e-5)
    else:
        assert outputs.t_o is None and outputs.mu is None
    return outputs


def assert_dead(outputs: kernel.Outputs, dead: Tensor) -> None:
    """Assert that these rows, and no others, are those of queries that see no key."""
    assert torch.equal(outputs.lse == -math.inf, dead.expand_as(outputs.lse))
    for x in (outputs.o, outputs.t_o, outputs.mu):
        assert (x[outputs.lse == -math.inf] == 0).all()
