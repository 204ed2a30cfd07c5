"""The adaptive weight."""

from __future__ import annotations

import torch

from fastdistill.objectives.metric import adaptive


def test_adaptive_weight_sums_over_elements_and_holds_its_denominator() -> None:
    delta = torch.randn(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    error = delta.detach().square().sum((1, 2, 3))
    torch.testing.assert_close(adaptive(delta, 0.0, 0.01).detach(), error)
    value = adaptive(delta, 0.5, 0.01)
    torch.testing.assert_close(value.detach(), error / (error + 0.01).sqrt())
    (grad,) = torch.autograd.grad(value.sum(), delta)
    torch.testing.assert_close(grad, 2 * delta.detach() / (error + 0.01).sqrt()[:, None, None, None])
