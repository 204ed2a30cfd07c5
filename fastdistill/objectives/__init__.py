"""Training objectives: plain functions (net, x0, x1, *times, **options) -> (loss, metrics), one method a file.

`OBJECTIVES` says of each by name what it needs, so that a trainer treats them all alike:

    objective = objectives.get(name)
    loss, metrics = objective.function(net, x0, x1, *times, y=y, **options)

`objective.times` names the times and `objective.takes` the keywords. What all of them share:

    net         called as net(x, t=t, s=s, y=y) -> u (B, ...), the average velocity from t to s; with g=g (B,) where the
                guidance scale differs by row. Networks of other conventions: `fastdistill.objectives.adapters`.
    x0, x1      data and noise, (B, ...), of one shape; the state is path.interpolate(x0, x1, t).
    t, s, r     (B,), 0 <= s <= t <= 1, 0 being data and 1 noise.
    y           (B,) int64 labels, or None.
    teacher     a network whose u(x, t, t) is the velocity; None: the conditional velocity of the data stands for it.
    guidance    `Guidance` or `Autoguidance` inside that velocity, in target and tangent alike.
    target      the network of a stopped bracket, e.g. an EMA; None is `net` itself.
    weighting   a learned log-variance, `metric.LogVariance`: exp(-a) error + a.
    jvp         jvp(fn, primals, tangents) -> (out, t_out), `fastdistill.jvp` by default.

The loss is a scalar with gradient. Metrics are detached: scalars `loss`, `raw_error` (the mean square residual before
any weight) and, where they exist, `tangent_norm` and `distinct_share`; and under "rows" a dict of (B,) tensors.
A loss composed of terms also gives these, under "terms", scalars with their graph, so that gradients can be compared.
"""

from __future__ import annotations

from fastdistill.objectives.alpha_flow import alpha_flow
from fastdistill.objectives.ayf import ayf_emd, ayf_lmd
from fastdistill.objectives.consistency import consistency
from fastdistill.objectives.dmd import dmd, dmd_gradient
from fastdistill.objectives.ect import ect
from fastdistill.objectives.esd import esd
from fastdistill.objectives.facm import facm
from fastdistill.objectives.flow_matching import flow_matching
from fastdistill.objectives.imm import imm
from fastdistill.objectives.improved_meanflow import improved_meanflow
from fastdistill.objectives.lsd import lsd
from fastdistill.objectives.meanflow import meanflow
from fastdistill.objectives.metric import LogVariance
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.psd import psd
from fastdistill.objectives.rcm import rcm
from fastdistill.objectives.registry import OBJECTIVES, get
from fastdistill.objectives.scm import scm
from fastdistill.objectives.shortcut import shortcut
from fastdistill.objectives.tvm import tvm
from fastdistill.objectives.velocity import Autoguidance, Guidance

# A method that isn't named above is an attribute all the same, and hides its module.
globals().update({name: row.function for name, row in OBJECTIVES.items()})

__all__ = [
    "OBJECTIVES",
    "Autoguidance",
    "Guidance",
    "LogVariance",
    "Objective",
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "consistency",
    "dmd",
    "dmd_gradient",
    "ect",
    "esd",
    "facm",
    "flow_matching",
    "get",
    "imm",
    "improved_meanflow",
    "lsd",
    "meanflow",
    "psd",
    "rcm",
    "scm",
    "shortcut",
    "tvm",
]
