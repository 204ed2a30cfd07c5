"""Define the protocol of a data set, which the trainer, the samplers and the judges rely on, and check that it is kept.

A set has a shape, classes and batches. Two more attributes are optional:

    judge     "package.module:attribute" of the set's judge. `fastdistill.eval` calls that attribute with a folder and
              the set, and gets a judge (see `fastdistill.eval.judges.Judge`). Without a judge, or with None, the set
              can be trained on, but not measured.
    picture   picture(samples, columns) -> the bytes of a PNG file. Without it `fastdistill.data.pictures` draws images
              as a grid and points as a scatter plot.

The maker of a set is usually its class. If the maker has an attribute `Settings`, a dataclass, it is called with an
instance of that; the fields stand under `data:` in a configuration, beside the name. Otherwise it is called without
arguments. Making a set must be cheap, because every check of a configuration makes one: slow work belongs into
`batch`, or into a function that `batch` calls first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class DataSet(Protocol):
    """Declare what every data set has; an instance belongs to one process, where several users may share it."""

    shape: tuple[int, ...]
    """The shape of a row: (channels, height, width) for images, (n,) for points."""
    num_classes: int
    """The number of classes; 0 where there are no labels."""

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Return the batch of a step, which must depend on nothing but the arguments.

        Args:
            seed: the run's seed.
            step: the number of the step, from 0.
            size: the number of rows in the batch.

        Returns:
            The data x0 (size, *shape) float32, of about unit scale (images in [-1, 1]), and the labels y (size,) int64
            in 0 to num_classes - 1, or None if there are no classes. Both are on the CPU.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Hold one training batch, on the device of the network."""

    x0: Tensor  # (B, ...) data
    x1: Tensor  # (B, ...) noise
    y: Tensor | None  # (B,) int64 labels; None if the data has no classes
    null: int  # the label that stands for "no label": the number of classes
    undropped: Tensor | None = None  # (B,) int64 labels before some of those in y became null


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


# Each attribute has a description for messages, a test of its value, and whether it is optional.
ATTRIBUTES: Mapping[str, tuple[str, Callable[[Any], bool], bool]] = {
    "shape": (
        "a tuple of positive whole numbers",
        lambda value: isinstance(value, tuple) and bool(value) and all(map(_is_size, value)),
        False,
    ),
    "num_classes": ("a whole number from 0 up", lambda value: type(value) is int and value >= 0, False),
    "batch": ("a method batch(seed, step, size) -> (x0, y)", callable, False),
    "judge": ("'package.module:attribute' or None", lambda value: value is None or isinstance(value, str), True),
    "picture": ("a method picture(samples, columns) -> bytes of a PNG file", callable, True),
}


def check_protocol(name: str, found: Any) -> DataSet:
    """Return the data set that was found under a name, or raise a ValueError that names every fault.

    Args:
        name: the name of the set, for the message.
        found: the object that should be a data set.
    """
    if isinstance(found, type):
        raise ValueError(f"expected a data set, got the class {name}; its instances are named {name}()")
    faults = []
    for attribute, (expected, fits, optional) in ATTRIBUTES.items():
        if not hasattr(found, attribute):
            faults += [] if optional else [f"{attribute} is missing, {expected}"]
        elif not fits(value := getattr(found, attribute)):
            faults.append(f"{attribute} must be {expected}, and is {value!r:.80}")
    if faults:
        raise ValueError(f"expected {name} to keep the protocol fastdistill.data.DataSet: {'; '.join(faults)}")
    return found


def try_data_set(name: str, data: DataSet) -> None:
    """Draw two rows twice and a picture of them; raise a ValueError that says where this breaks the protocol."""
    x0 = _try_batch(name, data, seed=0)
    if hasattr(data, "picture"):
        try:
            png = data.picture(x0, 2)
        except Exception as error:  # The user's code may raise anything.
            raise ValueError(
                f"expected {name}.picture to draw two rows in two columns, got {type(error).__name__}: {error}"
            ) from error
        if not isinstance(png, bytes) or not png.startswith(b"\x89PNG"):
            raise ValueError(f"expected {name}.picture to return the bytes of a PNG file, got {png!r:.80}")


def _try_batch(name: str, data: DataSet, seed: int) -> Tensor:
    try:
        (x0, y), again = data.batch(seed, 0, 2), data.batch(seed, 0, 2)
    except Exception as error:  # The user's code may raise anything.
        raise ValueError(
            f"expected {name} to give a pair (x0, y) as batch(seed, step, size), got {type(error).__name__}: {error}"
        ) from error
    shape, classes = (2, *data.shape), data.num_classes
    if not isinstance(x0, Tensor) or x0.shape != shape or x0.dtype != torch.float32:
        raise ValueError(f"expected x0 of {name}.batch to be {shape} float32 for a size of 2, got {_described(x0)}")
    if not classes and y is not None:
        raise ValueError(f"expected y of {name}.batch to be None, for num_classes is 0, got {_described(y)}")
    if classes and (not isinstance(y, Tensor) or y.shape != (2,) or y.dtype != torch.int64):
        raise ValueError(f"expected y of {name}.batch to be (2,) int64 for a size of 2, got {_described(y)}")
    if isinstance(y, Tensor) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"expected y of {name}.batch in 0 to {classes - 1}, for num_classes, got {y.tolist()}")
    if not bool(x0.isfinite().all()):
        raise ValueError(f"expected x0 of {name}.batch to be finite, got NaN or infinity")
    if not torch.equal(x0, again[0]) or _differ(y, again[1]):
        raise ValueError(
            f"expected {name}.batch to give the same rows for the same seed, step and size, got others at the second "
            f"call; draw by fastdistill.data.generator_at(seed, name, step) or epoch_rows"
        )
    return x0


def _differ(y: Tensor | None, again: Tensor | None) -> bool:
    return y is not None and (again is None or not torch.equal(y, again))


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
