"""What both directions of attention make of their arguments before they launch."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import Config
from .tiles import Described, Strided, describable, described, stride_unit, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


class Inputs(NamedTuple):
    """What the kernels read: (B, H, N or M, D) each, masks (B, H, N, M). None is a structural zero."""

    q: Strided | Described
    k: Strided | Described
    v: Strided | Described
    t_q: Strided | Described | None
    t_k: Strided | Described | None
    t_v: Strided | Described | None
    mask: Strided | None
    t_mask: Strided | None


def check(q: Tensor, v: Tensor, attn_mask: Tensor | None, t_attn_mask: Tensor | None) -> None:
    """TypeError for a dtype, ValueError for a head or a mask that the kernels cannot take."""
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, bfloat16 or float16 for the Triton kernel, got {q.dtype}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= WIDEST_HEAD:
            raise ValueError(f"{name}: expected a head dim from 1 to {WIDEST_HEAD}, got {x.shape[-1]}")
    if t_attn_mask is not None and (attn_mask is None or attn_mask.dtype == torch.bool):
        got = "none" if attn_mask is None else "a bool one"
        raise ValueError(f"t_attn_mask: expected a float attn_mask beside it, got {got}")


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of the matmuls: TF32 only for float32, where `torch.set_float32_matmul_precision` allows it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def pointers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    attn_mask: Tensor | None,
    t_attn_mask: Tensor | None,
) -> tuple[Inputs, int]:
    """The inputs by pointer and strides, and the UNIT of their strides; masks' are in elements."""
    unit = stride_unit(q, k, v, t_q, t_k, t_v)
    rows = [strided(x, unit) for x in (q, k, v, t_q, t_k, t_v)]
    return Inputs._make([*rows, _mask(attn_mask), _mask(t_attn_mask)]), unit


def _mask(mask: Tensor | None) -> Strided | None:
    """A row that all queries share has the stride None: then it is loaded once a tile, and not once a query."""
    pointer = strided(mask)
    return pointer if pointer is None or pointer.stride_n else pointer._replace(stride_n=None)


def use_descriptors(arch: int, *tensors: Tensor | None) -> bool:
    """Whether to load these by TMA: where the GPU has it, all of them allow it, and the tensor cores take the rows.

    Exact float32 is for the ordinary cores. Its rows go to the registers, and more of these would be needed. With
    FASTDISTILL_DESCRIPTORS=0 in the environment nothing is: where a driver or a Triton can't.
    """
    if os.environ.get("FASTDISTILL_DESCRIPTORS") == "0":
        return False
    present = [x for x in tensors if x is not None]
    exact = any(x.dtype == torch.float32 for x in present) and precision(torch.float32) == "ieee"
    return arch >= 90 and not exact and all(describable(x) for x in present)


def with_descriptors(
    inputs: Inputs, queries: tuple[Tensor, Tensor | None], keys: tuple[Tensor | None, ...], config: Config
) -> Inputs:
    """The same with (q, t_q) and (k, v, t_k, t_v) by descriptors, for the tiles of that config."""
    q, t_q = (described(x, config.block_n, config.stream) for x in queries)
    k, v, t_k, t_v = (described(x, config.block_m, config.stream) for x in keys)
    return Inputs._make([q, k, v, t_q, t_k, t_v, inputs.mask, inputs.t_mask])
