"""Check how samples are drawn: by their shape, by the set itself, or not at all."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdistill.data import DataSet, Digits, Ring
from fastdistill.data.pictures import NoPictureError, draw, draw_points, grid_of


class Images:
    """Images of eight by eight pixels, without classes."""

    shape: tuple[int, ...] = (1, 8, 8)
    num_classes = 0

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        return torch.zeros(size, *self.shape), None


class Colours(Images):
    """Larger images in three colours."""

    shape = (3, 64, 64)


class Series(Images):
    """Rows that are neither images nor points in the plane."""

    shape = (5,)


class DrawnSeries(Series):
    """Rows of the same shape, in a set that draws its own pictures."""

    def picture(self, samples: Tensor, columns: int) -> bytes:
        return bytes([len(samples), columns])


def opened(png: bytes) -> Image.Image:
    """Return the image in the bytes of a file."""
    return Image.open(io.BytesIO(png))


def test_a_grid_shows_each_image_in_its_place() -> None:
    """Check that -1 is black and 1 white, that values beyond are clipped, and that free places are blank."""
    images = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0, -7.0, 7.0)])
    pixels = np.asarray(opened(draw(Images(), images, columns=3)))
    assert pixels.shape == (2 * 50, 3 * 50)
    assert [pixels[25, 25 + 50 * column] for column in range(3)] == [0, 128, 255]
    assert [pixels[75, 25 + 50 * column] for column in range(3)] == [0, 255, 255]


def test_colour_images_keep_their_channels() -> None:
    """Check that red stays red."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert opened(draw(Colours(), red, columns=1)).getpixel((10, 10)) == (255, 0, 0)


def test_points_become_a_scatter_plot() -> None:
    """Check that points in the picture add ink, and points outside of it don't."""
    drawn = (draw(Ring(), points, columns=1) for points in (torch.full((10, 2), 99.0), torch.randn(500, 2)))
    none, some = (np.asarray(opened(png).convert("L")) for png in drawn)
    assert (255.0 - some).sum() > (255.0 - none).sum() + 50_000


def test_panels_stand_side_by_side() -> None:
    """Check that the picture is as wide as there are panels."""
    assert opened(draw_points({"exact": torch.randn(5, 2), "one step": torch.randn(5, 2)})).size == (800, 430)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 8, 8)])
def test_a_picture_is_a_pure_function_of_the_samples(shape: tuple[int, ...]) -> None:
    """Check the bytes, because grids from a fixed seed are compared by them."""
    samples = torch.randn(shape)
    data = Ring() if len(shape) == 2 else Images()
    assert draw(data, samples, columns=2) == draw(data, samples, columns=2)


def test_what_has_no_picture_is_refused_or_drawn_by_the_set_itself() -> None:
    with pytest.raises(NoPictureError, match=r"rows of shape \(5,\) have no picture: expected .* a method picture"):
        draw(Series(), torch.randn(3, 5), columns=1)
    assert draw(DrawnSeries(), torch.randn(3, 5), columns=2) == bytes([3, 2])


def test_points_without_a_limit_are_all_in_the_picture() -> None:
    """Check that far points are still visible; the ring, in contrast, is always drawn at its own scale."""
    points = torch.tensor([[-50.0, 0.0], [50.0, 0.0]])
    dark = [(np.asarray(opened(draw_points({"": points}, limit)).convert("L")) < 200).sum() for limit in (None, 60.0)]
    assert min(dark) > 0
    assert draw(Ring(), points, 1) == draw(Ring(), 2 * points, 1)


@pytest.mark.parametrize(
    ("data", "grid"), [(Digits(), (80, 10)), (Ring(), (2000, 1)), (Images(), (64, 8)), (Series(), (2000, 1))]
)
def test_a_grid_shows_every_class_in_turn(data: DataSet, grid: tuple[int, int]) -> None:
    """Check up to sixteen classes: a thousand would be no picture."""
    assert grid_of(data) == grid
    many = Images()
    many.num_classes = 1000
    assert grid_of(many) == (128, 16)
