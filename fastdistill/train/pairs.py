"""ReFlow's data: noise, and where a teacher's flow takes it. Made once, kept in the run folder, shard by shard.

A shard is whole or absent, and a pure function of (seed, shard, teacher): a run that was killed while it made them goes
on with the next one. k rounds are k runs, each with the one before as its teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastdistill import paths
from fastdistill.data import DataSet, epoch_rows, generator_at
from fastdistill.objectives.reflow import ReFlow, coupled_pairs
from fastdistill.train.config import TrainConfig
from fastdistill.train.files import intact, write_checked, writing

SHARD = 2048


class Pairs:
    """Coupled pairs (x0, x1), with labels where the data has them.

    Args:
        num_classes: of the data that the teacher learnt.
        x0, x1: (N, ...); y: (N,) int64 or None.
    """

    def __init__(self, num_classes: int, x0: Tensor, x1: Tensor, y: Tensor | None) -> None:
        self.num_classes = num_classes
        self.x0, self.x1, self.y = x0, x1, y

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return rows x0, x1 (size, ...) and y (size,) without replacement, epoch after epoch, as digits are drawn."""
        rows = epoch_rows(len(self.x0), seed, step, size)
        return self.x0[rows], self.x1[rows], None if self.y is None else self.y[rows]


def make_pairs(
    config: TrainConfig, teacher: nn.Module, path_of_teacher: paths.Path, digest: str, dataset: DataSet, run: Path
) -> Pairs:
    """Make the pairs of a run, or read them where they are whole.

    Args:
        config: of a run of ReFlow.
        teacher: whose flow makes them, on the path that it learnt; digest: the checksum of its weights.
        dataset: for the frequencies of the labels.
        run: the run folder; the shards go into its `pairs`.
    """
    method = config.method
    assert isinstance(method, ReFlow)
    folder, total = run / "pairs", method.pairs
    with writing(folder):
        folder.mkdir(exist_ok=True)
    settings = {"pair_steps": str(method.pair_steps), "pair_guidance": str(method.pair_guidance)}
    made_by = {"teacher": digest, "seed": str(config.seed), **settings}
    shards = range(0, total, SHARD)
    for start in tqdm(shards, desc="pairs", unit="shard", disable=not sys.stderr.isatty()):
        path, count = folder / f"pairs_{start:08d}.safetensors", min(SHARD, total - start)
        if not (intact(path) and _metadata(path) == made_by | {"count": str(count)}):
            tensors = _make_shard(config.seed, method, teacher, path_of_teacher, dataset, start, count)
            described = made_by | {"count": str(count)}
            write_checked(path, lambda out, t=tensors, d=described: save_file(t, out, d))  # type: ignore[misc]
    return _read(dataset.num_classes, [folder / f"pairs_{start:08d}.safetensors" for start in shards])


@torch.no_grad()
def _make_shard(
    seed: int, method: ReFlow, teacher: nn.Module, path: paths.Path, dataset: DataSet, start: int, count: int
) -> dict[str, Tensor]:
    device = next(teacher.parameters()).device
    x1 = torch.randn(count, *dataset.shape, generator=generator_at(seed, "pairs", start))
    y = None
    if dataset.num_classes:
        _, y = dataset.batch(seed, start, count)
        assert y is not None
    x0, _ = coupled_pairs(
        teacher,
        x1.to(device),
        None if y is None else y.to(device),
        method.pair_steps,
        path=path,
        scale=method.pair_guidance,
        null=dataset.num_classes,
    )
    return {"x0": x0.cpu().contiguous(), "x1": x1} | ({} if y is None else {"y": y})


def _read(num_classes: int, files: list[Path]) -> Pairs:
    parts: dict[str, list[Tensor]] = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                parts.setdefault(key, []).append(file.get_tensor(key))
    whole: dict[str, Any] = {key: torch.cat(tensors) for key, tensors in parts.items()}
    return Pairs(num_classes, whole["x0"], whole["x1"], whole.get("y"))


def _metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
