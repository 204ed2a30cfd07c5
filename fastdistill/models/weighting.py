"""The learned weight of a loss across times: a small function of (t, s) that the main optimiser trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.nn import full_precision, sinusoids

FEATURES, MAX_FREQUENCY = 16, 16.0


class LogVariance(nn.Module):
    """w(t, s), the logarithm of the error to expect at these times: a row's loss becomes exp(-w) e + w.

    Its minimum over w is at w = log e, so that each pair of times ends with a weighted error of 1, and with gradients
    of like size. One linear layer on sinusoids of t and of t - s, from zero: at first nothing is reweighted.
    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3.4 and appendix A.2, after Kendall et al. 2018.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """The log-variance (B,) of the rows with times t and s, (B,) each."""
        with full_precision(t.device):
            features = torch.cat([sinusoids(time, FEATURES, MAX_FREQUENCY) for time in (t, t - s)], dim=-1)
            return self.linear(features.to(self.linear.weight.dtype)).squeeze(-1)
