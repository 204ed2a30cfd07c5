"""Compute exact fused tangents for transformer flow maps, and train with them."""

from __future__ import annotations

from fastdistill import ops
from fastdistill.jvp import jvp
from fastdistill.ops import *  # noqa: F403 -- an op is exported in one place, the list of fastdistill.ops

__version__ = "0.1.0"

__all__ = ["jvp", "ops"]
__all__ += ops.__all__
