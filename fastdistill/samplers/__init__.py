"""Sample by free functions, a file each, which take noise at t = 1 to data at t = 0.

Three samplers integrate a velocity: `euler`, `heun`, and `adaptive`, which needs scipy. Three jump along the flow map
of a network: `average_velocity`, `consistency`, and `gamma`, which lies between the other two. `sample` calls any of
them by name.

Every file here that isn't a helper is a sampler. It holds the function, which has the file's name, and `SPEC`, from
which settings, options of the command line and checks follow (`fastdistill.samplers.spec`).

On most paths the state x starts as unit noise; `path.prior(noise)` is right on every path. `steps` is a number of equal
steps from t = 1 to 0, or a falling sequence of times. Samplers run in the caller's gradient mode: wrap them in
`torch.no_grad()` to generate. Times reach the network as (B,) tensors in float32, or in float64 if the state is
float64.
"""

from __future__ import annotations

from fastdistill.samplers.adaptive import adaptive
from fastdistill.samplers.average_velocity import average_velocity
from fastdistill.samplers.consistency import consistency
from fastdistill.samplers.euler import euler
from fastdistill.samplers.gamma import gamma
from fastdistill.samplers.guidance import conditional_pair, guided, guided_map
from fastdistill.samplers.heun import heun
from fastdistill.samplers.registry import PARAMETERS, SAMPLERS, SPECS, sample, taking
from fastdistill.samplers.spec import LEARNT, Learnt, Parameter, Sampler
from fastdistill.samplers.steps import Net, Steps, Velocity, intervals

globals().update(SAMPLERS)  # Each function hides its module of the same name, even one that no line above imports.

__all__ = [
    "LEARNT",
    "PARAMETERS",
    "SAMPLERS",
    "SPECS",
    "Learnt",
    "Net",
    "Parameter",
    "Sampler",
    "Steps",
    "Velocity",
    "adaptive",
    "average_velocity",
    "conditional_pair",
    "consistency",
    "euler",
    "gamma",
    "guided",
    "guided_map",
    "heun",
    "intervals",
    "sample",
    "taking",
]
