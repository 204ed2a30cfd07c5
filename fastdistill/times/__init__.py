"""Draw training times: t alone, pairs (t, s) with 0 <= s <= t <= 1, and the times of single methods.

Every draw takes a `torch.Generator`, so that a batch is a pure function of the generator's seed. Numbers are drawn
on the generator's device and then moved, so that a CPU generator gives the same times on every device.
"""

from __future__ import annotations

from fastdistill.times.discrete import ct_points, ect_level, ect_stage, ect_times, ict_points, neighbour_times
from fastdistill.times.laws import (
    ArctanLogNormal,
    Constant,
    KarrasLevel,
    LogitNormal,
    LogNormalLevel,
    ShiftedLevel,
    TimeSampler,
    Uniform,
    level_of_time,
    time_of_level,
)
from fastdistill.times.pairs import (
    distinct_rows,
    dyadic_times,
    gap_times,
    imm_middle,
    imm_times,
    pair_times,
    triangle_times,
)

__all__ = [
    "ArctanLogNormal",
    "Constant",
    "KarrasLevel",
    "LogNormalLevel",
    "LogitNormal",
    "ShiftedLevel",
    "TimeSampler",
    "Uniform",
    "ct_points",
    "distinct_rows",
    "dyadic_times",
    "ect_level",
    "ect_stage",
    "ect_times",
    "gap_times",
    "ict_points",
    "imm_middle",
    "imm_times",
    "level_of_time",
    "neighbour_times",
    "pair_times",
    "time_of_level",
    "triangle_times",
]
