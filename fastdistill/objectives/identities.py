"""Compute the three identities of a flow map, as the parts that residuals are built from.

The network is the average velocity u(x, t, s) from t to s <= t; its flow map is f(x, t, s) = x - (t - s) u. With
d = t - s and w the velocity that is followed, the exact u satisfies, on every path,

    Eulerian:    D_w f = 0, i.e. u = w - d D_w u        moving the start along the flow changes nothing
    Lagrangian:  d/ds f = w(f, s)                        the end moves with the flow's own velocity
    semigroup:   f(x, t, s) = f(f(x, t, m), m, s)        two jumps make one

where D_w g = dg/dt + (dg/dx) w is one `jvp(g, (x, t, s), (w, 1, 0))`.

Source: Boffi et al. 2025, arXiv:2505.18825, proposition 2.2, in the other direction of time; first in Boffi et al. 2024
(flow map matching), arXiv:2406.07507.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.paths import expand_time
from fastdistill.samplers import Net

Jvp = Callable[..., Any]  # jvp(fn, primals, tangents) -> (out, t_out), None being a zero tangent: `fastdistill.jvp`


def evaluate(net: Net, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, g: Tensor | None = None) -> Tensor:
    """Return u(x, t, s), the network called by name; `g` (B,) is passed on only where there is one."""
    return net(x, t=t, s=s, y=y) if g is None else net(x, t=t, s=s, y=y, g=g)


def flow_map(net: Net, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, g: Tensor | None = None) -> Tensor:
    """Return f(x, t, s) = x - (t - s) u(x, t, s), shape (B, ...)."""
    return x - expand_time(t - s, x) * evaluate(net, x, t, s, y, g)


def eulerian(
    net: Net,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    w: Tensor | None,
    *,
    y: Tensor | None = None,
    g: Tensor | None = None,
    jvp: Jvp,
    time: float | None = 1.0,
    tangent_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return u(x, t, s) and D_w u, both (B, ...): how u changes while (x, t) moves along w and s stays.

    Args:
        w, time: the two parts of the direction; None leaves one out, for the other part of D_w u alone.
        tangent_grad: let gradients flow through D_w u; `jvp` must then take that keyword.

    Equivalent to: jvp(u, (x, t, s), (w, 1, 0)).
    """
    options = {"tangent_grad": True} if tangent_grad else {}
    u, du_dt = jvp(lambda x, t, s: evaluate(net, x, t, s, y, g), (x, t, s), (w, time, None), **options)
    return u, du_dt


def eulerian_residual(u: Tensor, du_dt: Tensor, w: Tensor, t: Tensor, s: Tensor, warmup: float = 1.0) -> Tensor:
    """Return u - [w - warmup (t - s) du_dt], (B, ...), no gradient in the bracket; -D_w f at warmup 1.

    At warmup 0 it is flow matching; raising it from 0 to 1 brings in the network's own tangent by degrees.
    """
    return u - (w - warmup * expand_time(t - s, u) * du_dt).detach()


def lagrangian(
    net: Net,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    y: Tensor | None = None,
    g: Tensor | None = None,
    jvp: Jvp,
    tangent_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return u(x, t, s) and its derivative by the end time s, both (B, ...).

    The flow map's own is d/ds f = u - (t - s) du/ds.

    Args:
        tangent_grad: let gradients flow through du/ds, which LSD and TVM need; `jvp` must then take that keyword.

    Equivalent to: jvp(u, (x, t, s), (0, 0, 1)).
    """
    options = {"tangent_grad": True} if tangent_grad else {}
    u, du_ds = jvp(lambda x, t, s: evaluate(net, x, t, s, y, g), (x, t, s), (None, None, 1.0), **options)
    return u, du_ds


@torch.no_grad()
def semigroup_target(
    net: Net,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    fraction: Tensor | float,
    *,
    y: Tensor | None = None,
    g: Tensor | None = None,
    least: float = 0.0,
) -> Tensor:
    """Return the average velocity from t to s by two jumps of `net` that meet at m = t - fraction (t - s); (B, ...).

    It is fraction u(x, t, m) + (1 - fraction) u(f(x, t, m), m, s): the semigroup identity, divided by t - s. In the
    state's dtype, so that a network of lower precision loses nothing in the sum.

    Args:
        fraction: a number or (B,) in [0, 1].
        least: jumps no longer than this are made with the velocity, u(x, t, t), which flow matching trains.
    """
    m = t - fraction * (t - s)

    def end(start: Tensor, stop: Tensor) -> Tensor:
        return torch.where(start - stop > least, stop, start) if least else stop

    first = evaluate(net, x, t, end(t, m), y, g).to(x.dtype)
    second = evaluate(net, x - expand_time(t - m, x) * first, m, end(m, s), y, g).to(x.dtype)
    part = expand_time(fraction.to(x), x) if isinstance(fraction, Tensor) else fraction
    return part * first + (1 - part) * second
