"""Provide a law whose flow is known exactly, and noise to start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian


@pytest.fixture
def law() -> Gaussian:
    factor = torch.randn(4, 4, dtype=torch.float64)
    return Gaussian(torch.randn(4, dtype=torch.float64), factor @ factor.T / 4 + 0.1 * torch.eye(4).double())


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(16, 4, dtype=torch.float64)
