"""Public ops with every argument that they take, as the transforms try them, by the rows of the rooms' `cases.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol.cases import Shapes, every_case
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp

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


# Lengths and widths that no tile divides.
ODD = {"B": 2, "N": 13, "M": 9, "H": 2, "G": 2, "D": 24, "E": 40, "C": 72, "F": 72, "K": 24, "O": 40}


def check_accuracy(name: str, variant: str, dtype: torch.dtype, still: Sequence[str], impl: str, device: str) -> None:
    """Assert that outputs, tangents and all gradients of both keep the tolerance rule; `still` have no tangent."""
    case = OPS[name]
    sizes, given = case.variant(variant, ODD)
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in given.items()}
    names = [key for key in case.tensors if key not in options and key != "attn_mask"]
    shapes = case.shapes(sizes, names)
    primals, tangents = (
        {key: x.to(dtype).to(device) for key, x in draw(shapes, seed).items() if seed == 0 or key not in still}
        for seed in (0, 1)
    )

    def joined(outs: Sequence[Tensor]) -> Tensor:
        return torch.cat([y.flatten() for y in outs])

    def formula(**x: Any) -> Tensor:
        return joined([y.to(x[names[0]].dtype) for y in case.of_reference(x, options)])

    leaves, moving = ({key: x.clone().requires_grad_() for key, x in part.items()} for part in (primals, tangents))
    outs, t_outs = (joined(part) for part in case.of_pair(leaves, moving, options, tangent_grad=True, impl=impl))
    exact, t_exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths, baselines = reference_jvp(formula, exact, t_exact), reference_jvp(formula, primals, tangents)
    for what, actual, truth, baseline in zip(("outputs", "tangents"), (outs, t_outs), truths, baselines):
        assert_accurate(actual.detach(), truth, baseline, name=what)

    d, dt = (torch.randn_like(outs) for _ in range(2))
    gradients = torch.autograd.grad((outs, t_outs), [*leaves.values(), *moving.values()], (d, dt))
    found = dict(zip([*leaves, *(f"t_{key}" for key in moving)], gradients, strict=True))
    truth = reference_vjp(formula, exact, t_exact, d.double(), dt.double())
    baseline = reference_vjp(formula, primals, tangents, d, dt)
    assert found.keys() == truth.keys()
    for key, gradient in found.items():
        assert_accurate(gradient, truth[key], baseline[key], name=f"gradient of {key}", order=2)


def odd_problems(triton: bool) -> Iterator[tuple[str, str, torch.dtype, tuple[str, ...]]]:
    """Yield every op and variant in every dtype with all tangents, and in float32 with that of its first tensor."""
    for name, case in OPS.items():
        for variant in case.variants if case.triton or not triton else ():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield name, variant, dtype, ()
            yield name, variant, torch.float32, tuple(case.tensors)[1:]
