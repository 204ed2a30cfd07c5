"""Give the formulas of linear layers for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    primals, tangents = zip(*inputs)
    """The formulas of the forward, differentiable any number of times."""
    (x, weight, bias), (t_x, t_weight, t_bias) = primals, tangents
    y = x @ weight.mT if bias is None else x @ weight.mT + bias
    terms = [
        None if t_x is None else t_x @ weight.mT,
        None if t_weight is None else x @ t_weight.mT,
        None if t_bias is None else t_bias.expand(y.shape),
    ]
    moving = [term for term in terms if term is not None]
    return paired([y], [sum(moving[1:], moving[0]) if moving else None])


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    (d_outs, dt_outs), (primals, tangents), needs = zip(*cotangents), zip(*inputs), flat(needs)
    """The formulas of both backward passes."""
    (x, weight, _), (t_x, t_weight, _) = primals, tangents
    zero = torch.zeros_like(d_outs[0] if d_outs[0] is not None else dt_outs[0])
    dy, dt_y = (zero if z is None else z for z in (d_outs[0], dt_outs[0]))
    outer = lambda a, b: a.flatten(0, -2).mT @ b.flatten(0, -2)  # noqa: E731
    grads = [
        dy @ weight if t_weight is None else dy @ weight + dt_y @ t_weight,
        outer(dy, x) if t_x is None else outer(dy, x) + outer(dt_y, t_x),
        dy.flatten(0, -2).sum(0),
        dt_y @ weight,
        outer(dt_y, x),
        dt_y.flatten(0, -2).sum(0),
    ]
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return paired(grads[:3], grads[3:])
