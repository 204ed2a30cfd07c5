"""Define data sets as a user writes them: good ones of several shapes, and some that don't keep the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data import generator_at
from fastdistill.train import TrainConfig


class Blobs:
    """Noisy colour images, made from settings."""

    @dataclass
    class Settings:
        """Settings that stand under `data:`."""

        side: int = field(default=4, metadata={"help": "Side of an image."})
        classes: int = 0

    def __init__(self, settings: Settings) -> None:
        self.shape, self.num_classes = (3, settings.side, settings.side), settings.classes

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor | None]:
        generator = generator_at(seed, "blobs", step)
        y = torch.randint(self.num_classes, (size,), generator=generator) if self.num_classes else None
        return torch.randn(size, *self.shape, generator=generator).clamp(-1, 1), y


class Points:
    """Points on a line in the plane, with a judge of their own."""

    shape: tuple[int, ...] = (2,)
    num_classes = 0
    judge: str | None = f"{__name__}:Spread"

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        return torch.randn(size, 1, generator=generator_at(seed, "points", step)).expand(
            -1, self.shape[0]
        ).clone(), None


class Spread:
    """Judge that measures how far points are from the line."""

    headline = ("off_line", "spread")

    def __init__(self, folder: Path, data: Points) -> None:
        self.folder, self.data = folder, data

    def evaluate(self, net: nn.Module, config: TrainConfig, steps: Any, *, count: Any, how: Any, seed: int) -> Any:
        from fastdistill.train.sampling import draw

        x1 = torch.randn(count or 64, 2, generator=generator_at(seed, "evaluate"))
        rows = {
            str(n): {
                "off_line": float((x := draw(net, config, x1, None, n, how)).diff(dim=1).abs().mean()),
                "spread": float(x.std()),
                "seconds_per_sample": 0.0,
            }
            for n in steps
        }
        zero = {"off_line": 0.0, "spread": 1.0, "seconds_per_sample": 0.0}
        return {"samples": len(x1), "set": len(x1), "steps": rows, "references": {"data": zero}}


class Series(Points):
    """Rows of five numbers, which have neither a picture nor a judge."""

    shape, judge = (5,), None


POINTS = Points()


class Greedy(Blobs):
    """Data set with a setting whose name the trainer already uses."""

    @dataclass
    class Settings:
        """Settings that stand under `data:`."""

        build: int = 1


class Empty:
    """Data set without any attribute."""


class Crooked:
    """Data set whose attributes all exist, and are all wrong."""

    shape, num_classes, batch, judge, picture = [2], True, 3, 4, 5


class JudgedByNothing(Points):
    """Data set whose judge is no judge."""

    judge = f"{__name__}:Empty"


def short(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.zeros(1, 2), None


def labelled(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.zeros(size, 2), torch.zeros(size).long()


def unlabelled(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.zeros(size, 2), None


def beyond(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.zeros(size, 2), torch.full((size,), 3)


def infinite(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.full((size, 2), torch.inf), None


def drifting(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.randn(size, 2), None


def lonely(self: Any, seed: int, step: int, size: int) -> Any:
    return torch.zeros(size, 2)


def failing(self: Any, seed: int, step: int, size: int) -> Any:
    raise OSError("the disk is gone")


def with_batch(batch: Any, classes: int = 0) -> Any:
    """Return a data set that draws its batches by the given function."""
    return type("Planted", (Points,), {"batch": batch, "num_classes": classes})()
