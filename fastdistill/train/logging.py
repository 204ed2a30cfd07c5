"""What a run tells: lines of metrics.jsonl, TensorBoard events, sample grids."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fastdistill.train.files import replacing, write_text


class RunLog:
    """Writes each point to metrics.jsonl and to TensorBoard. Opened at a step, it forgets all that came after it.

    Args:
        run: the run folder.
        step: the steps done so far. Lines of later steps are cut off, and a line that a kill left unfinished.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        path = run / "metrics.jsonl"
        write_text(path, "".join(_lines_up_to(path, step)) if path.exists() else "")
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "events"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point: a line of JSON, flushed, and one TensorBoard scalar for each metric."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that this process took in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def save_samples(path: Path, samples: Tensor, columns: int) -> None:
    """Write samples as one PNG: images (B, 1 or 3, H, W) in [-1, 1] as a grid, points (B, 2) as a scatter plot."""
    with replacing(path) as temporary:
        if samples.ndim == 2:
            save_panels(temporary, {"": samples.float().cpu()})
        else:
            _draw_grid(temporary, samples.float().cpu(), columns)


def _draw_grid(path: Path, images: Tensor, columns: int, height: int = 48) -> None:
    from PIL import Image

    side = max(1, height // images.shape[2])  # enlarge small images, pixel by pixel
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(side, 2).repeat_interleave(side, 3)
    pixels = torch.nn.functional.pad(pixels, (0, 2, 0, 2), value=255)  # a line between images
    blank = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((blank, *pixels.shape[1:]), 255)])
    rows = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (H, W, C)
    Image.fromarray(rows.squeeze(2).numpy()).save(path, format="PNG")


def save_panels(path: Path, panels: Mapping[str, Tensor]) -> None:
    """Write scatter plots of points (B, 2), each under its title, side by side as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4.3), dpi=100, layout="constrained")
    for column, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), column, aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
        axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
        axes.set_title(title)
    figure.savefig(path, format="png")
