"""What every test runs under: one thread, one seed, repeatable algorithms, and no window for a plot to open."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same random numbers for each test, whichever ran before it, and settings restored after it.

    Deterministic mode has a second use: it fills `torch.empty` with NaN, so an element nobody wrote can't go unseen.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)
