"""Find the samplers by the files in this folder, and call any of them by its name."""

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

HELPERS = frozenset({"guidance", "registry", "spec", "steps"})  # Every other module here is a sampler.
# No parameter may have these names: they are keywords of `sample`, options of the command line, or settings.
RESERVED = frozenset({
    "g", "generator", "guidance", "label", "n", "net", "null", "out", "path", "run", "sampler", "scale", "seed",
    "steps", "velocity", "x", "y",
})  # fmt: skip


def collect(specs: Mapping[str, Sampler]) -> tuple[dict[str, Sampler], dict[str, Parameter]]:
    """Return samplers and parameters by name, from the specification in each file.

    Raises:
        ImportError: A sampler has another name than its file, or a parameter has a name that already means something
            else.
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
        net: the network, called as net(x, t=t, s=s, y=y), and with g=g (B,) if g isn't None.
        scale, null: the scale of classifier-free guidance by two evaluations, and the label for "no label". `guided`
            explains it for samplers of velocities, `guided_map` for those that jump. The network must not have guidance
            in its target, nor take it as an input.
        options: parameters of this sampler, such as `gamma` or `rtol`.

    Raises:
        ValueError: The name is unknown, or a `scale` other than 1 comes with g or without labels.
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
