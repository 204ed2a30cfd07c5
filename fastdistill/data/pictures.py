"""Draw samples as the bytes of a PNG file: images as a grid, and points in the plane as a scatter plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.protocol import DataSet

GRID_ROWS, GRID_COLUMNS, GRID_POINTS = 8, 16, 2000


class NoPictureError(ValueError):
    """Report rows that can't be drawn: this module can't draw their shape, and the data set draws no pictures."""


def grid_of(data: DataSet) -> tuple[int, int]:
    """Return how many samples a picture shows, and in how many columns.

    Each class has a column, but at most 16 have one. Images without classes stand in 8 columns. Rows that are neither
    labelled nor images are drawn as one cloud of points.
    """
    columns = min(data.num_classes, GRID_COLUMNS)
    if not columns and len(data.shape) != 3:
        return GRID_POINTS, 1
    columns = columns or GRID_ROWS
    return columns * GRID_ROWS, columns


def draw(data: DataSet, samples: Tensor, columns: int) -> bytes:
    """Draw samples (B, *shape) by the set's own `picture`, or else as images in [-1, 1] or points by their shape.

    Raises:
        NoPictureError: The set has no `picture`, and its rows are neither images nor points in the plane.
    """
    samples, own = samples.float().cpu(), getattr(data, "picture", None)
    if own is not None:
        return own(samples, columns)
    if len(data.shape) == 3 and data.shape[0] in (1, 3):
        return draw_images(samples, columns)
    if data.shape == (2,):
        return draw_points({"": samples})
    raise NoPictureError(
        f"rows of shape {data.shape} have no picture: expected (1 or 3, height, width) or (2,), or a data set with a "
        f"method picture(samples, columns) -> bytes of a PNG file"
    )


def draw_images(images: Tensor, columns: int, height: int = 48) -> bytes:
    """Draw images (B, 1 or 3, H, W) in [-1, 1] as a grid; small images are enlarged to about `height` pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile_images(images, columns, max(1, height // images.shape[2]))).save(buffer, format="PNG")
    return buffer.getvalue()


def tile_images(images: Tensor, columns: int, scale: int) -> Any:
    """Return a grid of images as a numpy array, (H, W) or (H, W, 3) uint8, with white lines between the images."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = torch.nn.functional.pad(pixels, (0, 2, 0, 2), value=255)
    blank = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((blank, *pixels.shape[1:]), 255)])
    rows = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (H, W, C)
    return rows.squeeze(2).numpy()


def draw_points(panels: Mapping[str, Tensor], limit: float | None = None) -> bytes:
    """Draw scatter plots of points (B, 2) side by side, each under its title.

    Args:
        limit: half the side of each plot, in the units of the points; None fits the plot to its points.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4.3), dpi=100, layout="constrained")
    for column, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), column, aspect="equal")
        if limit is not None:
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
        axes.set_title(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
