"""Time the ops that are bound by memory, at the sizes of the models that their rows in the rooms' `cases.py` name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.ops.common_providers import common_providers, plain_floor
from fastdistill.benchmarks.ops.timed_op import Dual, DualOp, Provider, Tensors, TimedCase, few, last_tokens
from fastdistill.ops.protocol.cases import Dims, PublicOp, Sizes, every_case

EPS = 1e-6
SMALL = 128  # tokens at the parity gate; widths stay
# What results call the letters of a shape.
LETTERS = {"B": "batch", "N": "n", "M": "m", "H": "heads", "G": "kv_heads", "D": "d", "C": "width", "F": "hidden"}


def sizes_of(case: TimedCase) -> Sizes:
    """Return the sizes of a timed case by their letters."""
    return {letter: case.size(name) for letter, name in LETTERS.items() if name in case.shape}


def shape_of(row: PublicOp, sizes: Sizes) -> dict[str, int]:
    """Return those sizes that the tensors of an op have, by the names in results."""
    used = {letter for name in row.shapes(sizes) for letter in row.tensors[name]}
    return {LETTERS[letter]: sizes[letter] for letter in LETTERS if letter in used}


def _timed(row: PublicOp, variant: str) -> DualOp:
    names = list(row.shapes(row.counted))
    angles = [name for name, x in row.variant(variant, row.counted)[1].items() if isinstance(x, Tensor)]
    like = [next(name for name in names if row.tensors[name] == dims) for dims in row.outputs.values()]

    def make(case: TimedCase, draw: Callable[..., Tensor]) -> Tensors:
        shapes, options = row.shapes(sizes_of(case)), row.variant(variant, sizes_of(case))[1]
        drawn = [_drawn(row.tensors[name], draw(*shape)) for name, shape in shapes.items()]
        return *drawn, *(options[name].to(drawn[0].device) for name in angles)

    def split(case: TimedCase, given: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors by name, and the other arguments, among which are the angles of a rotation."""
        options, count = row.variant(variant, sizes_of(case))[1], len(names)
        return dict(zip(names, given)), options | dict(zip(angles, given[count:]))

    def formula(call: Callable[..., Tensors]) -> Callable[[TimedCase], Callable[..., Tensors]]:
        def of_case(case: TimedCase) -> Callable[..., Tensors]:
            def of_primals(*primals: Tensor) -> Tensors:
                outs = call(*split(case, primals))
                return tuple(out.to(primals[0].dtype) for out in outs)

            return of_primals

        return of_case

    def pair(case: TimedCase, impl: str) -> Dual:
        def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
            named, options = split(case, primals)
            return row.of_pair(named, dict(zip(names, tangents)), options, tangent_grad=mixed, impl=impl)

        return dual

    def small(case: TimedCase) -> TimedCase:
        lengths = {name: few(case.size(name), SMALL) for name in ("n", "m") if name in case.shape}
        return case.resized(batch=min(2, case.size("batch")), **lengths)

    return DualOp(
        name=f"{row.name}_{variant}".removesuffix("_"),
        primals=(*names, *angles),
        moving=tuple(name for name in names if name not in row.parameters),
        results=tuple(row.outputs),
        like=tuple(like),
        make=make,
        reference=formula(row.of_reference),
        own=formula(row.of_native),
        pair=pair,
        flops=lambda case, floor: row.flops(sizes_of(case), "plain" if floor and case.mode == "forward" else case.mode),
        small=small,
        last=last_tokens,
        common=common_providers,
        constants=tuple(angles),
        more=FLOORS.get(row.name, lambda device: []),
    )


def _drawn(dims: Dims, x: Tensor) -> Tensor:
    """Return a standard normal tensor as a network has it: a weight is near one, a modulation near zero."""
    return 1 + 0.3 * x if len(dims) == 1 else 0.3 * x if 1 in dims else x


def _norm_floors(rms: bool) -> Callable[[torch.device], list[Provider]]:
    """Return NVIDIA apex's and Liger's fused norms, which know no tangents."""

    def floors(device: torch.device) -> list[Provider]:
        apex = packages.find("apex.normalization.fused_layer_norm", device)
        liger = packages.find("liger_kernel.transformers.functional", device)

        def by_apex(case: TimedCase) -> Callable[..., Tensor]:
            if rms:
                return lambda x, weight: apex.module.fused_rms_norm_affine(x, weight, (x.shape[-1],), EPS)
            return lambda x, weight, bias: apex.module.fused_layer_norm_affine(x, weight, bias, (x.shape[-1],), EPS)

        def by_liger(case: TimedCase) -> Callable[..., Tensor]:
            if rms:  # In place, Liger would overwrite the cotangent, which a repeated backward needs again.
                return lambda x, weight: liger.module.liger_rms_norm(x, weight, EPS, in_place=False)
            return lambda x, weight, bias: liger.module.liger_layer_norm(x, weight, bias, EPS)

        return [
            plain_floor("apex, no tangent", by_apex, absent=apex.absent),
            plain_floor("Liger, no tangent", by_liger, absent=liger.absent),
        ]

    return floors


FLOORS = {"layer_norm": _norm_floors(rms=False), "rms_norm": _norm_floors(rms=True)}
ROWS = {f"{row.name}_{variant}".removesuffix("_"): (row, variant) for row in every_case() for variant in row.launched}
POINTWISE = {name: _timed(row, variant) for name, (row, variant) in ROWS.items() if row.models}
