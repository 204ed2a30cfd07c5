"""Samples from a trained network, a pure function of the seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.train.config import TrainConfig
from fastdistill.train.data import DATASETS, generator_at
from fastdistill.train.methods import FlowMatching
from fastdistill.train.settings import ConfigError

GRID_ROWS, GRID_POINTS = 8, 2000


@torch.no_grad()
def generate(
    net: nn.Module,
    config: TrainConfig,
    count: int,
    *,
    label: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw samples the way the run's method does.

    The noise is drawn on the CPU, so that a seed gives the same start on every device.

    Args:
        net: as `load_run` returns it.
        config: of its run.
        count: how many.
        label: one class for all; None: all classes in turn, 0, 1, ... (nothing where the data has none).
        steps: of the sampler; None: the configuration's.
        guidance: classifier-free guidance scale of flow matching; None: the configuration's.
        seed: of the noise.

    Returns:
        Samples (count, *shape) float32 on the network's device.

    Raises:
        ConfigError: an argument that the run can't serve, by name.
    """
    dataset, method = DATASETS[config.data.name], config.method
    classes = dataset.num_classes
    if label is not None and not 0 <= label < classes:
        expected = f"one of 0 to {classes - 1}" if classes else f"none, because {config.data.name} has no labels"
        raise ConfigError(f"label: expected {expected}, got {label}")
    if guidance is None:
        guidance = method.sample_guidance if isinstance(method, FlowMatching) else 1.0
    if isinstance(method, FlowMatching) and guidance != 1 and not config.data.label_dropout:
        raise ConfigError(f"guidance: the run never learnt what no label means, so expected 1, got {guidance}")
    device = next(net.parameters()).device
    x1 = torch.randn(count, *dataset.shape, generator=generator_at(seed, "samples")).to(device)
    y = None
    if classes:
        y = torch.arange(count, device=device) % classes if label is None else x1.new_full((count,), label).long()
    return method.sample(net, x1, y, steps or method.sample_steps, guidance, classes)


def sample_grid(net: nn.Module, config: TrainConfig) -> tuple[Tensor, int]:
    """The samples that a run draws as it trains, always from the same noise, and the columns of their grid."""
    classes = DATASETS[config.data.name].num_classes
    return generate(net, config, classes * GRID_ROWS or GRID_POINTS, seed=config.seed), max(classes, 1)
