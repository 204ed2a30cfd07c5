"""Make named inputs for the backward kernels, run them, and check their values for every test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.kernels import attention
from fastdistill.kernels import attention_backward as kernel
from fastdistill.ops.protocol.pair import flat
from fastdistill.testing import assert_accurate, cast, reference_vjp, relative_error
from tests.kernels.attention_cases import UNLIMITED, Sequences, Tensors, hidden_between_sequences
from tests.kernels.device import DEVICE

NAMES = ("q", "k", "v", "attn_mask", "t_q", "t_k", "t_v", "t_attn_mask")


def cotangents_of(primals: Tensors, *names: str) -> Tensors:
    """Draw standard normal cotangents, for the given names among do, dt_o, d_lse and d_mu."""
    q, v = primals["q"], primals["v"]
    shapes = {"do": (*q.shape[:3], v.shape[3]), "d_lse": q.shape[:3]}
    shapes |= {"dt_o": shapes["do"], "d_mu": shapes["d_lse"]}
    dtypes = {"do": q.dtype, "dt_o": q.dtype}
    return {name: torch.randn(shapes[name], device=DEVICE).to(dtypes.get(name, torch.float32)) for name in names}


def run_backward(
    primals: Tensors,
    tangents: Tensors,
    cotangents: Tensors,
    *,
    window: tuple[int, int] = UNLIMITED,
    lower_right: bool = False,
    scale: float | None = None,
    cu_seqlens: Sequences | None = None,
    needs: tuple[bool, ...] = (True,) * 8,
    descriptors: bool | None = None,
) -> Tensors:
    """Return the gradients by name, from the forward kernel's results, with masks expanded as the op does."""
    q, k, v = (primals[name] for name in "qkv")
    full = (*q.shape[:3], k.shape[2])
    masks = [None if x is None else x.expand(full) for x in (primals.get("attn_mask"), tangents.get("attn_mask"))]
    moved = [tangents.get(name) for name in "qkv"]
    options: dict[str, Any] = {"window": window, "lower_right": lower_right, "cu_seqlens": cu_seqlens}
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = [*zip((q, k, v), moved), masks]
    saved = attention.attention_forward(inputs, **options, tangent_grad=True, grad=True)
    sides = [tuple(map(cotangents.get, names)) for names in (("do", "dt_o"), ("d_lse", "d_mu"))]
    wanted = list(zip(needs[:4], needs[4:]))
    if descriptors is None:
        gradients = flat(kernel.attention_backward(sides, inputs, saved, **options, needs=wanted))
    else:
        task, gradients = kernel.prepare(sides, inputs, saved, **options, needs=wanted)
        kernel.perform(task, descriptors)
    return dict(zip(NAMES, gradients, strict=True))


def autodiff(
    primals: Tensors, tangents: Tensors, cotangents: Tensors, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Return the gradients by name, by autodiff of the plain formula in this dtype."""

    def both(attn_mask: Tensor | None = None, **qkv: Tensor) -> Tensor:
        o = reference.attention(**qkv, attn_mask=attn_mask, **options)
        lse = reference.attention_lse(qkv["q"], qkv["k"], attn_mask, **options)
        return torch.cat([o, lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)], -1)

    def joined(of_o: str, of_lse: str) -> Tensor:
        empty = cotangents_of(primals, of_o, of_lse)
        of_both = [cotangents.get(name, torch.zeros_like(x)).to(dtype) for name, x in empty.items()]
        return torch.cat([of_both[0], of_both[1].unsqueeze(-1)], -1)

    mixed = not cotangents.keys().isdisjoint(("dt_o", "d_mu"))
    dt_out = joined("dt_o", "d_mu") if mixed else None
    return reference_vjp(both, cast(primals, dtype), cast(tangents, dtype), joined("do", "d_lse"), dt_out)


def check_backward(
    primals: Tensors,
    tangents: Tensors,
    cotangents: Tensors,
    *,
    window: tuple[int, int] = UNLIMITED,
    lower_right: bool = False,
    scale: float | None = None,
    cu_seqlens: Sequences | None = None,
    by_rule: bool = True,
    **options: Any,
) -> Tensors:
    """Assert that all gradients keep the tolerance rule, unless it is waived, and float32 its cap.

    The rule's order is 2 even for gradients of o alone: P comes from a rounded lse, two roundings that plain PyTorch,
    which keeps P, does without.
    """
    band: dict[str, Any] = {"window": window, "lower_right": lower_right}
    actual = run_backward(primals, tangents, cotangents, **band, scale=scale, cu_seqlens=cu_seqlens, **options)
    if cu_seqlens is not None:
        primals = {**primals, "attn_mask": hidden_between_sequences(primals, window, lower_right, cu_seqlens)}
        band = {}
    dtype = primals["q"].dtype
    baseline = autodiff(primals, tangents, cotangents, dtype, scale=scale, **band)
    for name, truth in autodiff(primals, tangents, cotangents, torch.float64, scale=scale, **band).items():
        gradient, like = actual[name], (tangents if name.startswith("t_") else primals)[name.removeprefix("t_")]
        assert gradient.is_contiguous() and gradient.dtype == like.dtype, name
        gradient = gradient.sum_to_size(like.shape)
        if by_rule:
            assert_accurate(gradient, truth, baseline[name], name=f"gradient of {name}", order=2)
        assert dtype != torch.float32 or relative_error(gradient, truth) < 5e-6, name
    return actual
