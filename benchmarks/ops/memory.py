"""Measure the memory that a device has left for a run."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of the GPU, or of this machine; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
