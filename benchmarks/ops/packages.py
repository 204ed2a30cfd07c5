"""Find other people's implementations when a benchmark runs; all are optional, and each absence has its reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib import metadata
from typing import Any, NamedTuple

import torch

from fastdistill import ops

# Maps an import's name to its distribution. All of them need a GPU, and some take seconds to import without one.
DISTRIBUTIONS = {
    "apex": "apex",
    "flash_attn": "flash-attn",
    "jvp_flash_attention": "jvp-flash-attention",
    "liger_kernel": "liger-kernel",
    "xformers": "xformers",
}
APEX_IMPOSTOR = (
    "refused: the package `apex` installed here is not NVIDIA's but another one of that name on PyPI. NVIDIA's is "
    "built from source and brings apex.normalization together with fused_layer_norm_cuda"
)


class Found(NamedTuple):
    """Hold a module, or the reason why there is none."""

    module: Any
    absent: str | None


def find(name: str, device: torch.device) -> Found:
    """Import the module `name` of a package in `DISTRIBUTIONS`, if it is installed and can run on this device."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return Found(None, f"not installed: {DISTRIBUTIONS[package]}")
    if package == "apex" and not is_nvidia_apex():
        return Found(None, APEX_IMPOSTOR)
    if device.type != "cuda":
        return Found(None, f"{DISTRIBUTIONS[package]} needs a CUDA device")
    return _imported(name)


def is_nvidia_apex() -> bool:
    """Return whether `apex` is NVIDIA's, by modules that only NVIDIA's has, without importing its CUDA part."""
    try:
        has_norms = importlib.util.find_spec("apex.normalization") is not None
    except Exception:  # Looking for a submodule imports its parent, and an old package may fail in any way.
        return False
    return has_norms and importlib.util.find_spec("fused_layer_norm_cuda") is not None


@functools.cache
def _imported(name: str) -> Found:
    try:
        return Found(importlib.import_module(name), None)
    except Exception as error:  # A broken extension may raise anything, and counts as absent.
        return Found(None, f"{name} can't be imported: {_first_line(error)}")


def impl_problem(impl: str, device: torch.device) -> str | None:
    """Return why our ops can't run by `impl` on this device, in the words of their error, or None if they can."""
    try:
        ops.layer_norm(torch.ones(1, 1, 16, device=device), (16,), impl=impl)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def versions() -> dict[str, str]:
    """Return the versions of the optional packages that are installed, even of those that can't run here."""
    found = {}
    for name in ("triton", "pytest-benchmark", "nvidia-ml-py", *DISTRIBUTIONS.values()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
