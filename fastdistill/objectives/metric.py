"""How an objective measures its residual."""

from __future__ import annotations

from torch import Tensor


def adaptive(residual: Tensor, p: float, c: float) -> Tensor:
    """A(p, c): the row errors e = ||residual||^2, summed over all but the batch axis, as e / [e + c]^p; (B,).

    The denominator carries no gradient. p = 0 is the plain sum of squares; p = 1 gives rows of every error nearly the
    same gradient norm, and a value near 1 whatever the error: watch the raw error instead. c is in units of the sum,
    so its meaning depends on the number of elements a row.
    Source: Geng et al. 2025 (ECT), arXiv:2406.14548; MeanFlow, arXiv:2505.13447, section 4.3 "Loss metrics".
    """
    error = residual.square().flatten(1).sum(1)
    return error if p == 0 else error / (error.detach() + c) ** p
