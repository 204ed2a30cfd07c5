"""Test clocks, throttling, power and energy, read from a made-up library."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdistill.benchmarks.run.nvml import Load, Meter, meter_for
from tests.benchmarks.toy import CPU, Time


class NVMLError(Exception):
    """Stand for the library's error."""


class Library:
    """Stand for a GPU that draws 500 W at 1410 MHz, and is held back by its power cap and its heat."""

    NVML_CLOCK_SM = 1
    NVMLError = NVMLError

    def __init__(self, time: Time) -> None:
        self.time = time
        self.asked: list[tuple[object, ...]] = []

    def nvmlInit(self) -> None:
        """Note that this must come first."""
        self.asked.append(("init",))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        """Return an opaque handle."""
        return f"GPU {index}"

    def nvmlSystemGetDriverVersion(self) -> str:
        """Return the version; this function takes no handle."""
        return "580.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        """Return millijoules since long ago."""
        return 1e9 + 500e3 * self.time.now

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        """Return MHz."""
        self.asked.append((handle, clock))
        return 1410

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        """Return the bits of a power cap, of a thermal slowdown, and of the application's own setting."""
        return 0x04 | 0x40 | 0x02

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        """Return the milliwatts of this moment."""
        return 480_000


def measured(library: Library, seconds_a_call: float = 0.1) -> Load:
    """Return the load under a run of a tenth of a second."""
    time = library.time

    def run() -> tuple[torch.Tensor, ...]:
        time.now += 0.1
        return ()

    return Meter(library, 3, synchronize=lambda: None, timer=time).load_under(run, seconds_a_call, seconds=1.0)


def test_energy_is_that_of_one_call() -> None:
    """Check ten calls of 0.1 s at 500 W: 50 J each; the application's setting is no throttling."""
    library = Library(Time())
    load = measured(library)
    assert load.energy_j == pytest.approx(50.0) and load.power_w == pytest.approx(500.0)
    assert load.sm_clock_mhz == 1410
    assert load.throttle == ["software power cap", "hardware thermal slowdown"]
    assert library.asked == [("init",), ("GPU 3", 1)]
    assert Meter(library, synchronize=lambda: None).driver() == "580.1"


def test_a_counter_that_is_missing_is_none() -> None:
    """Check an older GPU without energy counter, whose sensor gives the power, and a library with older names."""

    class Old(Library):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
            raise NVMLError("not supported")

        nvmlDeviceGetCurrentClocksEventReasons = None  # type: ignore[assignment]

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return 0

    load = measured(Old(Time()))
    assert load == Load(sm_clock_mhz=1410, throttle=[], power_w=480.0, energy_j=None)


def test_a_cpu_has_no_meter() -> None:
    """Check that the reason is given."""
    assert meter_for(CPU) == (None, "no GPU")


@pytest.mark.parametrize(("visible", "current", "index"), [(None, 1, 1), ("3,5", 1, 5), ("GPU-8a2f", 0, 0), ("", 0, 0)])
def test_the_right_gpu_is_read(visible: str | None, current: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the index that NVML uses, which also counts the GPUs that CUDA_VISIBLE_DEVICES hides from torch."""
    library = Library(Time())
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter, name = meter_for(torch.device("cuda"))
    assert name == "pynvml" and meter is not None
    assert meter._handle == f"GPU {index}"


def test_without_the_library_or_its_rights_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the result file says why it has no clocks."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter_for(torch.device("cuda")) == (None, "nvidia-ml-py is not installed: no clocks, power and energy")

    class Forbidden(Library):
        def nvmlInit(self) -> None:
            raise NVMLError("Insufficient Permissions")

    monkeypatch.setitem(sys.modules, "pynvml", Forbidden(Time()))
    assert meter_for(torch.device("cuda")) == (None, "NVML: Insufficient Permissions")
