"""Problems for the blockwise attention, and its two functions called by name of argument."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.eager import attention as eager
from fastdistill.testing import make_qkv

NAMES = ("q", "k", "v", "attn_mask", "t_q", "t_k", "t_v", "t_attn_mask")
SUBSETS = ["".join(names) for r in range(4) for names in itertools.combinations("qkv", r)]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One problem; `mask` names a maker in MASKS, `tangents` the primals that have one."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    n: int = 33
    m: int = 33
    d: int = 32
    dv: int = 32
    dtype: str = "fp32"
    layout: str = "bhnd"
    is_causal: bool = False
    mask: str = ""
    tangents: str = "qkv"

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}/{self.kv_heads}-N{self.n}-M{self.m}-D{self.d}-Dv{self.dv}-{self.dtype}"
        parts = [self.layout, "causal" if self.is_causal else "", self.mask, self.tangents or "none"]
        return "-".join([shape, *filter(None, parts)])


def bool_mask(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.6


def with_dead_rows(*shape: int) -> Tensor:
    mask = bool_mask(*shape)
    mask[..., ::5, :] = False
    return mask


def dead_by_infinity(*shape: int) -> Tensor:
    return torch.zeros(shape).masked_fill_(~with_dead_rows(*shape), -math.inf)


MASKS: dict[str, Callable[[Case], Tensor]] = {
    "bool_bnm": lambda c: with_dead_rows(c.batch, 1, c.n, c.m),
    "bool_full": lambda c: with_dead_rows(c.batch, c.heads, c.n, c.m),
    "bool_nm": lambda c: bool_mask(c.n, c.m),
    "key_padding": lambda c: bool_mask(c.batch, 1, 1, c.m),
    "float_full": lambda c: torch.randn(c.batch, c.heads, c.n, c.m),
    "float_hnm": lambda c: torch.randn(1, c.heads, c.n, c.m),
    "float_m": lambda c: torch.randn(c.m),
    "float_dead": lambda c: dead_by_infinity(c.n, c.m),
}


def problem(case: Case) -> tuple[Tensors, Tensors]:
    """Primals and tangents of a case; masks are expanded as the ops hand them over."""
    sizes: dict[str, Any] = {"kv_heads": case.kv_heads, "m": case.m, "dv": case.dv, "layout": case.layout}
    tensors = [
        make_qkv(case.batch, case.heads, case.n, case.d, dtype=DTYPES[case.dtype], seed=seed, **sizes)
        for seed in (0, 1)
    ]
    primals: Tensors = dict(zip("qkv", tensors[0], strict=True))
    tangents: Tensors = {name: x if name in case.tangents else None for name, x in zip("qkv", tensors[1], strict=True)}
    mask = MASKS[case.mask](case) if case.mask else None
    primals["attn_mask"] = prepared(mask, case)
    if mask is not None and "m" in case.tangents:
        tangents["attn_mask"] = prepared(torch.randn(mask.shape), case)
    return primals, tangents


def prepared(mask: Tensor | None, case: Case) -> Tensor | None:
    if mask is None:
        return None
    mask = mask.to(DTYPES[case.dtype]) if mask.is_floating_point() else mask
    return mask.expand(case.batch, case.heads, case.n, case.m)


def forward(primals: Tensors, tangents: Tensors, is_causal: bool = False, tangent_grad: bool = False) -> Any:
    q, k, v, mask = (primals[name] for name in NAMES[:4])
    assert q is not None
    assert k is not None
    assert v is not None
    t_q, t_k, t_v, t_mask = (tangents.get(name) for name in NAMES[:4])
    scale = q.shape[-1] ** -0.5
    return eager.attention_forward(
        q, k, v, t_q, t_k, t_v, mask, t_mask, is_causal=is_causal, scale=scale, tangent_grad=tangent_grad
    )


def backward(
    do: Tensor | None,
    dt_o: Tensor | None,
    primals: Tensors,
    tangents: Tensors,
    is_causal: bool = False,
    needs: tuple[bool, ...] | None = None,
) -> Tensors:
    """Gradients by name; by default all those that autodiff would give."""
    q, k, v, mask = (primals[name] for name in NAMES[:4])
    assert q is not None
    assert k is not None
    assert v is not None
    t_q, t_k, t_v, t_mask = (tangents.get(name) for name in NAMES[:4])
    o, t_o, lse, mu, o_acc, t_o_acc = forward(primals, tangents, is_causal, tangent_grad=dt_o is not None)
    if needs is None:
        needs_mask = mask is not None and mask.is_floating_point()
        tangent_needs = [dt_o is not None and t is not None for t in (t_q, t_k, t_v, t_mask)]
        needs = (True, True, True, needs_mask, *tangent_needs)
    saved = (o, t_o, lse, mu) if o_acc is None else (o_acc, t_o_acc, lse, mu)
    scale = q.shape[-1] ** -0.5
    gradients = eager.attention_backward(
        do, dt_o, q, k, v, t_q, t_k, t_v, mask, t_mask, *saved, is_causal=is_causal, scale=scale, needs=needs
    )
    assert [x is not None for x in gradients] == list(needs)
    return dict(zip(NAMES, gradients, strict=True))


def specification(is_causal: bool) -> Callable[..., Tensor]:
    return lambda q, k, v, attn_mask: reference.attention(q, k, v, attn_mask, is_causal)
