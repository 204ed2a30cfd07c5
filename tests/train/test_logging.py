"""Pictures and logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdistill.train.logging import RunLog, peak_memory, save_panels, save_samples


def test_a_grid_shows_each_image_in_its_place(tmp_path: Path) -> None:
    """Row by row, -1 black, 1 white, values beyond clipped, the rest of the last row blank."""
    images = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0, -7.0, 7.0)])
    save_samples(tmp_path / "grid.png", images, columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 50, 3 * 50)
    assert [pixels[25, 25 + 50 * column] for column in range(3)] == [0, 128, 255]
    assert [pixels[75, 25 + 50 * column] for column in range(3)] == [0, 255, 255]


def test_colour_images_keep_their_channels(tmp_path: Path) -> None:
    """Red stays red."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    save_samples(tmp_path / "red.png", red, columns=1)
    assert Image.open(tmp_path / "red.png").getpixel((10, 10)) == (255, 0, 0)


def test_points_become_a_scatter_plot(tmp_path: Path) -> None:
    """More ink where there are points."""
    for name, points in (("none", torch.full((10, 2), 99.0)), ("some", torch.randn(500, 2))):
        save_samples(tmp_path / f"{name}.png", points, columns=1)
    none, some = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("none", "some"))
    assert (255.0 - some).sum() > (255.0 - none).sum() + 50_000


def test_panels_stand_side_by_side(tmp_path: Path) -> None:
    """As wide as there are of them."""
    save_panels(tmp_path / "panels.png", {"exact": torch.randn(5, 2), "one step": torch.randn(5, 2)})
    with Image.open(tmp_path / "panels.png") as image:
        assert image.size == (800, 430)


def test_a_log_opened_at_a_step_forgets_what_came_after(tmp_path: Path) -> None:
    """Later lines and half a line are cut off; new ones follow."""
    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 4})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"loss": 9.0})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"step": 1, "loss": 0.25}', '{"step": 2, "loss": 0.5}', '{"step": 3, "loss": 9.0}']


def test_peak_memory_is_in_bytes() -> None:
    """It notices 64 MiB more than there ever were, or the peak lies above already."""
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(before // 4 + 2**24)  # float32: the peak so far again, and 64 MiB
    assert peak_memory(torch.device("cpu")) >= block.nbytes
    assert before > 2**26


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 8, 8)])
def test_a_picture_is_a_pure_function_of_the_samples(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Byte for byte, so that fixed-seed grids can be compared."""
    samples = torch.randn(shape)
    for name in ("a", "b"):
        save_samples(tmp_path / f"{name}.png", samples, columns=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
