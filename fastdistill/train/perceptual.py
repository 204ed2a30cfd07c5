"""Import and try a perceptual distance of the user's own, by the name that a configuration gives it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data import generator_at
from fastdistill.lookup import UnresolvedError, make
from fastdistill.objectives.metric import row_distance
from fastdistill.settings import ConfigError
from fastdistill.train.config import TrainConfig

Distance = Callable[[Tensor, Tensor], Tensor]  # distance(a, b) -> one value a row, (B,) or (B, 1, ...)


def perceptual_of(config: TrainConfig, device: torch.device) -> Distance | None:
    """Return the distance that a configuration's method names, on a device; None where it names none."""
    name = getattr(config.method, "perceptual", None)
    return None if name is None else load_distance(name, config.data.build().shape, device)


@functools.lru_cache(maxsize=2)  # each check of a configuration asks, and a pretrained network is slow to make
def load_distance(name: str, shape: tuple[int, ...], device: torch.device) -> Distance:
    """Import a distance and call it once on two random rows.

    Args:
        name: "package.module:attribute" of what is called with two batches, or "package.module:attribute()" of what is
            called once, without arguments, to make it. A module's code runs when it is imported.
        shape: of a row.
        device: where the rows are. A network is moved there, frozen, and put in eval mode.

    Raises:
        ConfigError: it can't be imported or made, isn't callable, fails on rows of this shape, gives another shape than
            one value a row, or values without gradient.
    """
    try:
        found: Any = make(name, "the distance")
    except UnresolvedError as error:
        raise ConfigError(f"method.perceptual: {error}") from error
    if isinstance(found, type) or not callable(found):
        made = "its instances, as " + name + "()" if isinstance(found, type) else "a function or a network"
        raise ConfigError(f"method.perceptual: expected {made}, got {name}, which is {found!r}")
    if isinstance(found, nn.Module):
        found = found.to(device).eval().requires_grad_(False)
    _try(name, found, shape, device)
    return found


def _try(name: str, distance: Distance, shape: tuple[int, ...], device: torch.device) -> None:
    a, b = torch.randn(2, 2, *shape, generator=generator_at(0, "perceptual")).to(device)
    a.requires_grad_()
    try:
        values = row_distance(a, b, "lpips", 1.0, distance)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"method.perceptual: expected {name} to take two batches of rows {shape} and to give one value a row, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not values.requires_grad:
        raise ConfigError(f"method.perceptual: expected {name} to pass gradients on to its first argument, got none")
