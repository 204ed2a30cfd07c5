"""Ops in plain PyTorch, at awkward sizes and in every dtype: outputs, tangents and all gradients of both."""

from __future__ import annotations

import pytest
import torch

from tests.ops.op_cases import check_accuracy, odd_problems


@pytest.mark.parametrize(("name", "variant", "dtype", "still"), list(odd_problems(triton=False)))
def test_every_op_keeps_the_tolerance_rule(name: str, variant: str, dtype: torch.dtype, still: tuple[str, ...]) -> None:
    check_accuracy(name, variant, dtype, still, "torch", "cpu")
