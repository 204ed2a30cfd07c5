"""Measure an objective's residual: row errors, weights of t, and what keeps a tangent in bounds.

Every function says whether it sums or averages over the elements of a row; batches are always averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fastdistill.objectives.checks import check_choice, check_positive, check_present
from fastdistill.paths import Path

Reduce = Literal["sum", "mean"]
Weighting = Callable[[Tensor, Tensor], Tensor]  # weighting(t, s) -> (B,), a learned log-variance
WeightOfTime = str | Callable[[Tensor], Tensor] | None


def squared(residual: Tensor, reduce: Reduce = "sum") -> Tensor:
    """Return ||residual||^2 of each row, summed or averaged over its elements; (B,)."""
    check_choice("reduce", reduce, ("sum", "mean"))
    squares = residual.square().flatten(1)
    return squares.sum(1) if reduce == "sum" else squares.mean(1)


def adaptive(residual: Tensor, p: float, c: float, reduce: Reduce = "sum") -> Tensor:
    """Return A(p, c): the row errors e = ||residual||^2, summed (or averaged) over elements, as e / [e + c]^p; (B,).

    The denominator carries no gradient. p = 0 is the plain sum of squares; p = 1 gives rows of every error nearly the
    same gradient norm, and a value near 1 whatever the error: watch the raw error instead. c is in units of e,
    so its meaning depends on `reduce` and, for "sum", on the number of elements a row.

    Where the target holds noise, as from data, p > 0 moves the optimum: it solves E[[e + c]^-p residual | x_t] = 0, not
    E[residual | x_t] = 0, and lies nearer to the likeliest target. p = 0, or a target that is a function of x_t as a
    teacher's is, keeps the mean.
    Source: Geng et al. 2025 (ECT), arXiv:2406.14548; MeanFlow, arXiv:2505.13447, section 4.3 "Loss metrics".
    """
    error = squared(residual, reduce)
    return error if p == 0 else error / (error.detach() + c) ** p


def pseudo_huber(residual: Tensor, c: float) -> Tensor:
    """Return sqrt(||residual||^2 + c^2) - c of each row, the square summed over its elements; (B,).

    Quadratic below c, then linear: of a noisy target it finds a smoothed median, and not the mean. c > 0, so that its
    gradient exists at zero; iCT takes 0.00054 sqrt(elements).
    Source: Song and Dhariwal 2024 (iCT), arXiv:2310.14189, its Pseudo-Huber metric.
    """
    check_positive(c=c)
    return (squared(residual) + c**2).sqrt() - c


def row_distance(
    a: Tensor, b: Tensor, name: str, c: float, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Return how far a is from b in each row, (B,).

    Args:
        name: "l2", the sum of squares; "huber", `pseudo_huber` with c; "lpips", the user's own network `perceptual`.
        perceptual: perceptual(a, b) -> one value a row, of shape (B,) or (B, 1, ...), e.g. an LPIPS network.
    """
    check_choice("distance", name, ("l2", "huber", "lpips"))
    if name == "l2":
        return squared(a - b)
    if name == "huber":
        return pseudo_huber(a - b, c)
    check_present("perceptual", perceptual, "distance='lpips'", "a network perceptual(a, b) -> (B,)")
    assert perceptual is not None
    value = perceptual(a, b)
    if value.shape[:1] != a.shape[:1] or value.numel() != len(a):
        raise ValueError(f"perceptual: expected one value a row, ({len(a)},), got shape {tuple(value.shape)}")
    return value.reshape(len(a))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - the cosine of the angle between a and b, each row being one vector; (B,)."""
    return 1 - nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def normalise_tangent(g: Tensor, c: float = 0.1) -> Tensor:
    """Return g / (||g|| + c), the norm being that of a whole row: a row's pull on the network is then below 1.

    Of a noisy g (from data) the mean of the result vanishes elsewhere than that of g: this moves the optimum.

    Source: Lu and Song 2025 (sCM), arXiv:2410.11081, section 4.2 "Tangent Normalization".
    """
    check_positive(c=c)
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / (norm + c).reshape((-1,) + (1,) * (g.ndim - 1))


def weigh(error: Tensor, weighting: Weighting | None, t: Tensor, s: Tensor) -> Tensor:
    """Return exp(-a) error + a with a = weighting(t, s), (B,): every (t, s) then counts alike, however large its error.

    At its optimum a is the logarithm of the expected error at (t, s). None leaves the error as it is.
    Source: Kendall and Gal 2017, arXiv:1703.04977, equation 8; Karras et al. 2024 (EDM2), arXiv:2312.02696.
    """
    if weighting is None:
        return error
    a = weighting(t, s)
    if a.shape != error.shape:
        raise ValueError(f"weighting: expected it to return shape {tuple(error.shape)}, got {tuple(a.shape)}")
    return torch.exp(-a) * error + a


class LogVariance(nn.Module):
    """Log-variance a(t, s) learned for `weigh`: random Fourier features of both times and one linear layer.

    It starts at 0, where `weigh` leaves the error as it is. Never part of the sampled network; train it with the same
    optimizer.

    Args:
        features: how many cosines.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(2, features))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(features))
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Return a(t, s), shape (B,), in the dtype of the weights."""
        times = torch.stack((t, s), 1).to(self.frequencies)
        return self.linear(torch.cos(times @ self.frequencies + self.phases)).squeeze(1)


# w(t) of flow matching, by the prediction whose plain square it amounts to. With W = alpha beta' - beta alpha', an
# error e of the velocity is an error beta e / W of the implied data and alpha e / W of the implied noise.
WEIGHTS: dict[str, str] = {
    "velocity": "1: the plain square of the velocity's error",
    "data": "(beta / W)^2: the plain square of the data prediction's error; little weight near the data",
    "noise": "(alpha / W)^2: the plain square of the noise prediction's error (DDPM's simple loss); little near noise",
    "min_snr": "min(alpha^2 / beta^2, 5) (beta / W)^2: the noise prediction's, capped near the data (Hang et al. 2023)",
    "edm": "(beta^2 + alpha^2 / 4) 4 / W^2: EDM's, which equalises the loss of its preconditioned network at std 1/2",
}


def weight_of_time(weight: WeightOfTime, path: Path, t: Tensor) -> Tensor | None:
    """Return w(t), shape (B,), by a name of `WEIGHTS` or the caller's own function; None is 1.

    For each t the minimiser is the marginal velocity, so that any w > 0 keeps the optimum of a network of unlimited
    capacity; w only spends capacity and gradient variance across noise levels. To draw t from a density p(t) is the
    same as to draw it uniformly with the weight w(t) p(t).
    Source: Kingma and Gao 2023, arXiv:2303.00848; Hang et al. 2023, arXiv:2303.09556; EDM, arXiv:2206.00364.
    """
    if weight is None or weight == "velocity":
        return None
    if not isinstance(weight, str):
        return weight(t)
    check_choice("weight", weight, WEIGHTS)
    a, b = path.alpha(t).square(), path.beta(t).square()
    squared_w = (path.alpha(t) * path.d_beta(t) - path.beta(t) * path.d_alpha(t)).square()
    top = {"data": b, "noise": a, "min_snr": torch.minimum(a, 5 * b), "edm": 4 * b + a}[weight]
    return top / squared_w
