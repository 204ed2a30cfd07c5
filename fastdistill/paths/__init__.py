"""Define probability paths x_t = alpha(t) x0 + beta(t) x1 from data x0 (t = 0) to Gaussian noise x1 (t = 1).

`PATHS` holds the class of each by name, and `get(name, **options)` makes one.
"""

from __future__ import annotations

import inspect

from fastdistill.paths.base import Path, expand_time
from fastdistill.paths.conversion import (
    PREDICTIONS,
    carry_average_velocity,
    carry_time,
    carry_velocity,
    convert,
    rescale,
)
from fastdistill.paths.schedules import EDM, FM, ICFM, OTCFM, VE, VPSI, Cosine, Gaussian, Linear, TrigFlow

__all__ = [
    "EDM",
    "FM",
    "ICFM",
    "LINEAR",
    "OTCFM",
    "PATHS",
    "PREDICTIONS",
    "VE",
    "VPSI",
    "Cosine",
    "Gaussian",
    "Linear",
    "Path",
    "TrigFlow",
    "carry_average_velocity",
    "carry_time",
    "carry_velocity",
    "convert",
    "expand_time",
    "get",
    "rescale",
]

LINEAR = Linear()  # The default everywhere.

PATHS: dict[str, type[Path]] = {
    "linear": Linear,
    "cosine": Cosine,
    "vp_si": VPSI,
    "fm": FM,
    "icfm": ICFM,
    "ot_cfm": OTCFM,
    "gaussian": Gaussian,
    "trig": TrigFlow,
    "edm": EDM,
    "ve": VE,
}


def get(name: str, **options: object) -> Path:
    """Return the path called `name` with these options; a ValueError lists the known names, or the path's options.

    Equivalent to:
        PATHS[name](**options)
    """
    if name not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {name!r}")
    parameters = inspect.signature(PATHS[name]).parameters
    unknown = [option for option in options if option not in parameters]
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if unknown or missing:
        expected = ", ".join(parameters) or "no options"
        raise ValueError(f"path {name}: expected {expected}; unknown: {unknown}, missing: {missing}")
    return PATHS[name](**options)
