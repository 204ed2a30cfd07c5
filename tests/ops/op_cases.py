"""Every public op with every argument that it takes, as the transforms try it, by the rows of the rooms' `cases.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol.cases import Shapes, every_case

OPS = {case.name: case for case in every_case()}
IMPLS = {name: ({},) if name == "timestep_embedding" else ({"impl": "auto"}, {"impl": "torch"}) for name in OPS}
CONSTANTS = {name: case.constants(case.tiny) for name, case in OPS.items()}


def calls(name: str) -> Iterator[tuple[Shapes, dict[str, Any]]]:
    """Yield (shapes, options) of each call: with every optional tensor, with each of them alone, and with none."""
    case = OPS[name]
    every = case.shapes(case.tiny, list(case.tensors))
    kept = {frozenset(case.optional), *(frozenset({x}) for x in case.optional), frozenset()}
    for given in case.options:
        options = {**CONSTANTS[name], **given}
        sizes = {**every, **options.pop("shapes", {})}
        for names in sorted(kept, key=sorted):
            shapes = {name: size for name, size in sizes.items() if name not in case.optional or name in names}
            if not (options.get("norm") == "none" and names):
                yield shapes, options


def draw(shapes: Shapes, seed: int = 0, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Return standard normal float64 tensors of these shapes, with `lead` before each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*lead, *s, dtype=torch.float64, generator=generator) for name, s in shapes.items()}
