"""Bring the arguments of attention to the form in which its kernels take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import Config
from .launch import Pairs, check_dtype
from .limits import WIDEST_HEAD
from .tiles import Described, Strided, describable, described, stride_unit, strided


class Inputs(NamedTuple):
    """Inputs that the kernels read: (B, H, N or M, D) each, masks (B, H, N, M). None is a structural zero."""

    q: Strided | Described
    k: Strided | Described
    v: Strided | Described
    t_q: Strided | Described | None
    t_k: Strided | Described | None
    t_v: Strided | Described | None
    mask: Strided | None
    t_mask: Strided | None


def check(inputs: Pairs) -> None:
    """Raise TypeError for a dtype, ValueError for a head or a mask that the kernels cannot take."""
    (q, _), _, (v, _), (mask, t_mask) = inputs
    check_dtype("q", q)
    for name, width in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= width <= WIDEST_HEAD:
            raise ValueError(f"{name}: expected a head dim from 1 to {WIDEST_HEAD}, got {width}")
    if t_mask is not None and (mask is None or mask.dtype == torch.bool):
        got = "none" if mask is None else "a bool one"
        raise ValueError(f"t_attn_mask: expected a float attn_mask beside it, got {got}")


def precision(dtype: torch.dtype) -> str:
    """Return the matmuls' `input_precision`: TF32 for float32 where `torch.set_float32_matmul_precision` allows it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


class Strides(NamedTuple):
    """Strides of the inputs, in the order of `Inputs`: the fields of `Strided` but for the pointer.

    The strides of rows are in units of `unit` elements, those of masks in elements. A row of a mask that all queries
    share has the stride None: then it is loaded once a tile, and not once a query.
    """

    of_inputs: tuple[tuple[int | None, ...] | None, ...]
    unit: int


def strides_of(inputs: Sequence[Tensor | None]) -> Strides:
    """Return how these inputs lie, in the order of `Inputs`."""
    unit = stride_unit(*inputs[:6])
    six = [strided(x, unit) for x in inputs[:6]]
    masks = [mask_by_pointer(x) for x in inputs[6:]]
    return Strides(tuple([None if x is None else x[1:] for x in (*six, *masks)]), unit)


def mask_by_pointer(mask: Tensor | None) -> Strided | None:
    """Return a mask by pointer and strides; a row that all queries share has the stride None."""
    pointer = strided(mask)
    return pointer if pointer is None or pointer.stride_n else pointer._replace(stride_n=None)


def use_descriptors(arch: int, *tensors: Tensor | None) -> bool:
    """Return whether to load these by TMA: the GPU has it, all of them allow it, and tensor cores take the rows.

    Exact float32 is for the ordinary cores. Its rows go to the registers, and more of these would be needed. With
    FASTDISTILL_DESCRIPTORS=0 in the environment nothing is: where a driver or a Triton can't.
    """
    if os.environ.get("FASTDISTILL_DESCRIPTORS") == "0":
        return False
    present = [x for x in tensors if x is not None]
    exact = any(x.dtype == torch.float32 for x in present) and precision(torch.float32) == "ieee"
    return arch >= 90 and not exact and all(describable(x) for x in present)


def with_descriptors(inputs: Inputs, tensors: Sequence[Tensor | None], config: Config) -> Inputs:
    """Return the same with all but the masks by descriptors for the tiles of that config, given in that order."""
    heights = (config.block_n, config.block_m, config.block_m) * 2
    by_descriptor = [described(x, height, config.stream) for x, height in zip(tensors, heights)]
    return Inputs._make([*by_descriptor, inputs.mask, inputs.t_mask])
