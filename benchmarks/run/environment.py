"""Describe the machine on which a benchmark ran; the description is stored beside the numbers."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

# The root of the checkout; in an installed package, the root of the package.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def fingerprint() -> dict[str, str | int | None]:
    """Return processor, cores, threads, versions, and commit.

    The commit is None outside a repository, or before the repository's first commit.
    """
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": commit(),
    }


def machine_info(device: torch.device, clock: Any, meter: Any, meter_name: str) -> dict[str, Any]:
    """Return the `machine_info` of pytest-benchmark's files, with all that numbers of a GPU depend on.

    The machine's name is left empty.
    """
    from fastdistill.benchmarks.ops import packages

    return {
        "node": "",
        "processor": processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": processor(), "count": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": _gpu(device, meter),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": packages.versions(),
        "clock": clock.name,
        "counters": meter_name,
        "triton_interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "ceilings": ceilings(device, clock),
    }


def _gpu(device: torch.device, meter: Any) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": None if meter is None else meter.driver(),
    }


def ceilings(device: torch.device, clock: Any) -> dict[str, Any]:
    """Measure the ceilings of this device: TFLOP/s of a large matmul, and GB/s read and written by a copy."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(1 << (28 if on_gpu else 22), device=device)
    target = torch.empty_like(source)
    product = clock.warm_up(lambda: (x @ y,))
    copy = clock.warm_up(lambda: (target.copy_(source),))
    rounds = 10
    matmul_s, copy_s = (statistics.median(clock.sample(timed) for _ in range(rounds)) for timed in (product, copy))
    return {
        "matmul_tflops": _rate(2.0 * size**3 / 1e12, matmul_s),
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "copy_gbs": _rate(2.0 * source.nbytes / 1e9, copy_s),
    }


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def commit_info(named: str | None = None) -> dict[str, Any]:
    """Return the `commit_info` of pytest-benchmark's files; `named` gives the commit where there is no repository."""
    found = named or commit()
    return {
        "id": None if found is None else found.removesuffix("+"),
        "dirty": found is not None and found.endswith("+"),
        "time": _git("log", "-1", "--format=%cI") if named is None else None,
        "author_time": _git("log", "-1", "--format=%aI") if named is None else None,
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD") if named is None else None,
        "project": "fastdistill",
    }


def now() -> str:
    """Return the time in the form that pytest-benchmark's files use."""
    return datetime.now(UTC).isoformat()


def processor() -> str:
    """Return the processor's name as the system gives it, with its widest vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = " ".join(line for line in lines if line.startswith("flags"))
    widest = next((isa for isa in ("avx512f", "avx2") if isa in flags), "")
    return " ".join(filter(None, [names[0] if names else platform.processor(), widest]))


def commit() -> str | None:
    """Return the commit of the checkout, with a + if files differ from it, or None outside a checkout."""
    head = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return None
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    command: Sequence[str] = ("git", *arguments)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # This machine has no git.
        return None
    return done.stdout.strip() if done.returncode == 0 else None
