"""Write what a run tells: lines of metrics.jsonl, TensorBoard events, sample grids."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from fastdistill.data import DataSet, pictures
from fastdistill.train.files import (
    CheckpointError,
    WriteError,
    copy_aside,
    free_name,
    replacing,
    write_text,
    writing,
)


class RunLog:
    """Writes each point to metrics.jsonl and to TensorBoard. Opened at a step, it forgets all that came after it.

    Args:
        run: the run folder.
        step: the steps done so far. Lines of later steps are cut off, and a line that a kill left unfinished. Lines
            that are damaged are left out, which is told, and the file that holds them stays as metrics.jsonl.damaged.

    Raises:
        WriteError: the disk is full, or something else than the trainer's files lies in their place.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / "metrics.jsonl"
        points, damaged = read_points(path) if path.exists() else ([], 0)
        if damaged:
            kept = copy_aside(path, "damaged")
            tell(f"{path}: {damaged} damaged lines are left out; the file as it was is {kept.name}")
        write_text(path, "".join(json.dumps(point) + "\n" for point in points if point["step"] <= step))
        with writing(path):
            self._file = path.open("a", encoding="utf-8")
        try:
            self._events = Events(run / "events", step)
        except BaseException:
            self._file.close()
            raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one point: a line of JSON, flushed, and one TensorBoard scalar for each metric."""
        with writing(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        self._events.write(step, metrics)

    def sync(self) -> None:
        """Make all lines so far durable: before a checkpoint that the run can go on from without them."""
        with writing(Path(self._file.name)):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._file, self._events):
            try:
                file.close()
            except OSError as failed:  # what a failed write left in a buffer
                if error is None:
                    raise WriteError(f"{self._file.name} can't be written: {failed.strerror}") from failed


class Events:
    """TensorBoard's scalars, each on the disk when it is written.

    tensorboard's own writer leaves that to a thread, whose failure on a full disk nobody could catch.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here, for they take a second.
        from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        self._event, self._scalar = event_pb2.Event, summary.scalar
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._file = (self._path if not self._path.exists() else free_name(self._path, "more")).open("wb")
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # TensorBoard forgets what came after it
        try:
            self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
            self._append(self._event(wall_time=time.time(), step=step + 1, session_log=start))
            self._flush()
        except BaseException:
            with suppress(OSError):  # of what is left in its buffer
                self._file.close()
            raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one point."""
        for name, value in metrics.items():
            self._append(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        self._flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        with writing(self._path):
            self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        with writing(self._path):
            self._records.flush()


def read_points(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the points of a metrics.jsonl, and how many of its lines are damaged.

    A last line without its end is what a kill leaves, and no damage. What a power loss leaves is: NUL bytes, most often
    before a good line, or half a line.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    points = [_point(line.strip(b"\0")) for line in lines]
    damaged = sum(point is None or b"\0" in line for point, line in zip(points, lines, strict=True))
    return [point for point in points if point is not None], damaged


def _point(line: bytes) -> dict[str, Any] | None:
    try:
        point = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(point, dict) and type(point.get("step")) is int and point["step"] >= 0
    return point if whole and all(isinstance(value, int | float) for value in point.values()) else None


def tell(message: str) -> None:
    """Say something to whoever watches, below the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors took on a GPU, or that this process took in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def save_samples(path: Path, data: DataSet, samples: Tensor, columns: int) -> None:
    """Write samples of a set as one PNG file, drawn as the set says; say so where it can't be drawn.

    Raises:
        WriteError: the disk is full, or something else lies there.
    """
    try:
        png = pictures.draw(data, samples, columns)
    except pictures.NoPictureError as error:
        return tell(f"{path.name} is not drawn: {error}")
    save_picture(path, png)


def save_picture(path: Path, png: bytes) -> None:
    """Write the bytes of a picture, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(png)
