"""Read clocks, throttling, power and energy while a run repeats, by NVIDIA's management library (nvidia-ml-py)."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastdistill.benchmarks.ops.timed_op import Run

SECONDS = 0.4  # The time of the repetitions; the counters of energy and power are renewed about every 0.1 s.
# These are bits of nvmlDeviceGetCurrentClocksEventReasons. Bits 1 (idle) and 2 (the application's own setting) are left
# out, because they are no throttling.
THROTTLE = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class Load(NamedTuple):
    """Store the GPU's counters under a run; `energy_j` is the energy of one call, and None means unreadable."""

    sm_clock_mhz: float | None = None
    throttle: list[str] | None = None
    power_w: float | None = None
    energy_j: float | None = None


class Meter:
    """Read the counters of one GPU.

    Args:
        library: the module pynvml, or one with the same functions.
        index: index of the GPU.
        synchronize: waits for the GPU.
        timer: returns seconds.
    """

    def __init__(
        self,
        library: Any,
        index: int = 0,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._library, self._synchronize, self._timer = library, synchronize, timer
        library.nvmlInit()
        self._handle = library.nvmlDeviceGetHandleByIndex(index)

    def driver(self) -> str | None:
        """Return the driver's version."""
        version = self._ask("nvmlSystemGetDriverVersion", device=False)
        return None if version is None else str(version)

    def load_under(self, run: Run, seconds_a_call: float, seconds: float = SECONDS) -> Load:
        """Repeat a run for a while, and read the counters before, in the middle and after."""
        calls = max(1, round(seconds / 2 / max(seconds_a_call, 1e-6)))
        self._synchronize()
        before, started = self._ask("nvmlDeviceGetTotalEnergyConsumption"), self._timer()
        self._repeat(run, calls)
        clock = self._ask("nvmlDeviceGetClockInfo", getattr(self._library, "NVML_CLOCK_SM", 1))
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        self._repeat(run, calls)
        self._synchronize()
        after, elapsed = self._ask("nvmlDeviceGetTotalEnergyConsumption"), self._timer() - started
        joules = None if before is None or after is None else (after - before) / 1000  # The counter has millijoules.
        average = joules / elapsed if joules and elapsed > 0 else None
        return Load(
            sm_clock_mhz=clock,
            throttle=None if reasons is None else [name for bit, name in THROTTLE.items() if reasons & bit],
            power_w=average if average is not None else None if milliwatts is None else milliwatts / 1000,
            energy_j=joules / (2 * calls) if joules else None,
        )

    def _repeat(self, run: Run, calls: int) -> None:
        """Repeat a run, at most eight calls ahead of the GPU, so that the counters are read while the GPU works."""
        for i in range(calls):
            run()
            if i % 8 == 7:
                self._synchronize()

    def _ask(self, function: str, *arguments: Any, device: bool = True) -> Any:
        ask = getattr(self._library, function, None)
        if ask is None:
            return None
        try:
            return ask(*((self._handle,) if device else ()), *arguments)
        except self._library.NVMLError:  # This GPU, or this user, doesn't have the counter.
            return None


def meter_for(device: torch.device) -> tuple[Meter | None, str]:
    """Return the meter of a device and "pynvml", or None and the reason why there is none."""
    if device.type != "cuda":
        return None, "no GPU"
    try:
        library = importlib.import_module("pynvml")
        return Meter(library, _physical_index()), "pynvml"
    except ImportError:
        return None, "nvidia-ml-py is not installed: no clocks, power and energy"
    except Exception as error:  # Without a library or rights NVMLError comes, which has no name before the import.
        return None, f"NVML: {error}"


def _physical_index() -> int:
    """Return the index that NVML gives to the current GPU.

    NVML counts all GPUs. torch counts only those that CUDA_VISIBLE_DEVICES leaves, if it names them by number.
    """
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    current = torch.cuda.current_device()
    return int(visible[current]) if current < len(visible) and visible[current].strip().isdigit() else current
