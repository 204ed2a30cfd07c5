"""Find all samplers by name, each by being there, and call any of them by one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.lookup import discover
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers.guidance import check_guidable, guided, guided_map
from fastdistill.samplers.spec import Parameter, Sampler, order
from fastdistill.samplers.steps import Net, Steps

HELPERS = frozenset({"guidance", "registry", "spec", "steps"})  # every other module here is a sampler
# Keywords of all samplers, options of the commands that sample, and settings that begin with sample_.
RESERVED = frozenset({
    "g", "generator", "guidance", "label", "n", "net", "null", "out", "path", "run", "sampler", "scale", "seed",
    "steps", "velocity", "x", "y",
})  # fmt: skip


def collect(specs: Mapping[str, Sampler]) -> tuple[dict[str, Sampler], dict[str, Parameter]]:
    """Return samplers and parameters by name, from the specification in each file.

    Raises:
        ImportError: a sampler hasn't its file's name, or a parameter has a name that means something else already.
    """
    parameters: dict[str, Parameter] = {}
    for name, spec in specs.items():
        if spec.name != name:
            raise ImportError(f"fastdistill.samplers.{name}: expected SPEC of a function {name}, got {spec.name}")
        for parameter, meaning in spec.parameters.items():
            if parameter in RESERVED:
                raise ImportError(
                    f"fastdistill.samplers.{name}: {parameter} means something else; rename the parameter"
                )
            if parameters.setdefault(parameter, meaning) != meaning:
                raise ImportError(
                    f"fastdistill.samplers.{name}: expected {parameter} as another sampler has it, "
                    f"{parameters[parameter]}, got {meaning}; give it another name"
                )
    return {spec.name: spec for spec in sorted(specs.values(), key=order)}, parameters


SPECS, PARAMETERS = collect(discover(__package__ or "", "SPEC", HELPERS))
SAMPLERS: dict[str, Callable[..., Tensor]] = {name: spec.function for name, spec in SPECS.items()}


def taking(parameters: set[str]) -> list[str]:
    """Return the names of the samplers that take all of these parameters."""
    return [name for name, spec in SPECS.items() if parameters <= spec.parameters.keys()]


def sample(
    name: str,
    net: Net,
    x1: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    path: Path = LINEAR,
    g: float | Tensor | None = None,
    scale: float = 1.0,
    null: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Take unit noise x1 (B, ...) to data by the sampler called `name`, on any path.

    Args:
        net: called as net(x, t=t, s=s, y=y), with g=g (B,) where g isn't None.
        scale, null: classifier-free guidance by two evaluations: of velocities, see `guided`, or of jumps, see
            `guided_map`. Only of networks that learnt it neither in their target nor as an input.
        options: of the one sampler, such as `gamma` or `rtol`.

    Raises:
        ValueError: an unknown name, or a `scale` with g, or without labels.
    """
    if name not in SPECS:
        raise ValueError(f"sampler: expected one of {', '.join(SPECS)}, got {name!r}")
    x, spec = path.prior(x1), SPECS[name]
    if spec.follows_velocity:
        return spec.function(guided(net, y, scale, null, g=g), x, steps, **options)
    if spec.renoises is not False:
        options |= {"path": path, "generator": generator}
    if scale != 1:
        net = guided_map(net, scale, check_guidable(y, scale, null, g))
    return spec.function(net, x, steps, y, g=g, **options)
