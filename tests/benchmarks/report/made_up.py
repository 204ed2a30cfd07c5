"""Make up a benchmark file, in the schema that `fastdistill bench` writes; its GPU does not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GPU = "Made-up GPU 80GB"
LENGTHS = (256, 1024, 4096, 16384, 65536)
SPEEDS = {"ours triton": 400.0, "func.jvp, math SDPA": 30.0, "jvp-flash-attention": 200.0, "SDPA flash": 600.0}
KINDS = {"ours triton": "ours", "SDPA flash": "floor"}
MATMULS = {"forward": 6, "primal": 5, "mixed": 15}


def info(provider: str, n: int, mode: str = "forward", **more: Any) -> dict[str, Any]:
    """Return the `extra_info` of an attention that was not timed."""
    shape = {"batch": max(1, 32768 // n), "heads": 16, "n": n, "m": n, "d": 64, "model": "lengths"}
    return {
        "suite": "scaling",
        "op": "attention",
        "case": f"N{n}-D64",
        "mode": mode,
        "provider": provider,
        "kind": KINDS.get(provider, "peer"),
        "status": "unavailable",
        "reason": None,
        "shape": shape,
        "dtype": "bfloat16",
        "device": "cuda",
        **more,
    }


def timed(provider: str, n: int, mode: str = "forward", speed: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a benchmark; it is faster if `speed` is larger."""
    flops = 2.0 * MATMULS[mode] * max(1, 32768 // n) * 16 * n**2 * 64
    tflops = SPEEDS.get(provider, 100.0) * speed * n / (n + 800)
    median = flops / tflops * 1e-12
    moved = 9.0 * max(1, 32768 // n) * 16 * n * 64 * 2
    matrices = 8 * 4 * max(1, 32768 // n) * 16 * n**2 if "math" in provider else 0
    extra = {
        "status": "ok",
        "flops": flops,
        "bytes": moved,
        "tflops": tflops,
        "gbs": moved / median * 1e-9,
        "p20_s": median * 0.98,
        "p80_s": median * 1.04,
        "peak_memory_bytes": int(moved + matrices),
        "error": {"output": 2.1e-3, "tangent": 3.4e-3 if provider != "SDPA flash" else None},
        "allowed_error": {"output": 5.5e-3, "tangent": 8.6e-3 if provider != "SDPA flash" else None},
        "floor_provider": "SDPA flash",
        "ratio_to_floor": 600 / (SPEEDS.get(provider, 100.0) * speed),
        "sm_clock_mhz": 1755,
        "throttle": [],
        "power_w": 640.0,
        "energy_j": 640.0 * median,
        **more,
    }
    whole = info(provider, n, mode, **extra)
    stats = dict.fromkeys(("min", "max", "mean", "median", "q1", "q3"), median) | {"stddev": 0.0, "iqr": 0.0}
    name = f"{whole['op']}-{whole['case']}-{mode}-{provider}"
    group = f"{whole['suite']}/{whole['case']}/{mode}"
    return {
        "name": name,
        "fullname": f"{group}/{name}",
        "group": group,
        "params": None,
        "param": None,
        "options": {},
        "stats": stats | {"rounds": 20, "iterations": 1},
        "extra_info": whole,
    }


def document(speed: float = 1.0, gpu: str | None = GPU, **machine: Any) -> dict[str, Any]:
    """Return a sweep over N in three modes, with lost memory, failed parity, throttling, and absent providers."""
    benchmarks, not_timed = [], []
    for mode in MATMULS:
        for n in LENGTHS:
            throttled = {"throttle": ["software power cap"], "sm_clock_mhz": 1410} if n == 16384 else {}
            benchmarks.append(timed("ours triton", n, mode, speed, **throttled))
            if n <= 4096:
                benchmarks.append(timed("func.jvp, math SDPA", n, mode))
            else:
                reason = "tried to allocate 256.00 GiB <of> 80 GiB"
                not_timed.append(info("func.jvp, math SDPA", n, mode, status="oom", reason=reason))
            if mode == "mixed":
                reason = "dt_q: error 3.1e-01 > 2.0e-02"
                not_timed.append(info("jvp-flash-attention", n, mode, status="failed parity", reason=reason))
            else:
                benchmarks.append(timed("jvp-flash-attention", n, mode))
            if mode != "mixed":
                benchmarks.append(timed("SDPA flash", n, mode))
    not_timed.append(info("xformers", 256, kind="floor", reason="no package xformers"))
    return {
        "machine_info": {
            "node": "test",
            "gpu": gpu and {"name": gpu, "memory_bytes": 80 << 30, "driver": "1.2.3"},
            "processor": "Made-up CPU",
            "threads": 1,
            "torch": "2.13.0",
            "triton": "3.9.0",
            "ceilings": {"matmul_tflops": 700.0, "copy_gbs": 2900.0},
            **machine,
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-25T12:00:00+00:00",
        "version": "5.2.3",
        "benchmarks": benchmarks,
        "not_timed": not_timed,
    }


def written(path: Path, table: Any) -> Path:
    """Write the table to a file and return its path."""
    path.write_text(json.dumps(table), encoding="utf-8")
    return path
