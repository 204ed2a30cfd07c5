"""Samplers: from noise at t = 1 to data at t = 0, one family of free functions, one file each.

Three take a velocity and integrate it (`euler`, `heun`, and `adaptive` with the help of scipy); three take a network
and jump along its flow map (`average_velocity`, `consistency`, and `gamma`, whose extremes the other two are). `sample`
calls any of them by name.

A file here is a sampler by being here: it holds the function, which has the file's name, and beside it `SPEC`, from
which settings, options of the command line and checks follow (`fastdistill.samplers.spec`).

The state x starts as unit noise on most paths, and as `path.prior(noise)` on any. `steps` is a number of equal steps
from t = 1 to 0, or the times themselves, falling. Samplers run in the caller's gradient mode (wrap them in
`torch.no_grad()` to generate). Times reach the network as (B,) tensors in float32, or float64 for a float64 state.
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

globals().update(SAMPLERS)  # a sampler that isn't named above is an attribute all the same, and hides its module

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
