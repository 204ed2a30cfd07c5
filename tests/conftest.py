"""Give every test one thread, one seed, repeatable algorithms, and no window in which a plot could open."""

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
    """Seed each test anew, whichever ran before it, and restore the settings after it.

    Deterministic mode has a second use: it fills `torch.empty` with NaN, so that an element that nobody wrote is
    noticed.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)
