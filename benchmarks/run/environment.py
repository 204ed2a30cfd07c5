"""Where a benchmark ran: stored beside its numbers."""

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

ROOT = Path(__file__).resolve().parents[2]  # of the checkout; in an installed package, the package itself
RESULTS = ROOT / "benchmarks" / "results"


def fingerprint() -> dict[str, str | int | None]:
    """Processor, cores, threads, versions, and the commit (None outside a repository, or before its first commit)."""
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
    """The `machine_info` of pytest-benchmark's files, without the machine's name, and what GPU numbers depend on."""
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
    """What this device does at best: a large matrix product, and a copy, counting bytes read and written."""
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
    """The `commit_info` of pytest-benchmark's files. named: the commit, where there is no repository."""
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
    """The time as pytest-benchmark's files have it."""
    return datetime.now(UTC).isoformat()


def processor() -> str:
    """Its name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = " ".join(line for line in lines if line.startswith("flags"))
    widest = next((isa for isa in ("avx512f", "avx2") if isa in flags), "")
    return " ".join(filter(None, [names[0] if names else platform.processor(), widest]))


def commit() -> str | None:
    """Of the checkout, with a + where files differ from it; None outside one."""
    head = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return None
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    command: Sequence[str] = ("git", *arguments)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
