"""Describe what a run ran on: for env.json, and for `fastdistill doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastdistill", "torch", "triton", "numpy", "pydantic", "safetensors", "scikit-learn", "tensorboard", "tyro")


def describe_environment() -> dict[str, Any]:
    """Return versions, processor and GPU, ready for JSON. Reads only what is installed; touches no network."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},  # with +cu130
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda": torch.version.cuda,
        "gpu": _gpu(),
        "command": sys.argv,
    }


def memory_of_machine() -> int:
    """Return the bytes of main memory that this process may use: the machine's, or those of its container."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # absent, or the word max
            found.append(int(limit.read_text(encoding="ascii")))
    return min(found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
        "bf16": torch.cuda.is_bf16_supported(),
    }
