"""The training loop.

Every step is a pure function of the state before it and of (seed, step): a run that was killed and started again
continues from its newest checkpoint and ends with the weights of one that never stopped (bit for bit on a CPU).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastdistill.models import count_parameters
from fastdistill.train.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_checkpoint,
    read_newest_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from fastdistill.train.config import TrainConfig, check_config, check_teacher
from fastdistill.train.data import DATASETS, Batch, Dataset, drop_labels, generator_at
from fastdistill.train.files import intact, sha256
from fastdistill.train.logging import RunLog, peak_memory, save_samples
from fastdistill.train.run import build_network, export_network, load_run, open_run
from fastdistill.train.sampling import sample_grid
from fastdistill.train.settings import ConfigError

STATEFUL = ("net", "ema", "optimizer", "scheduler")


class NonFiniteError(RuntimeError):
    """Training diverged. The message names the step, the metric and the last good checkpoint."""


def train(config: TrainConfig) -> Path:
    """Train to `config.steps`, from the newest checkpoint where there is one, and export the averaged weights.

    Args:
        config: checked as a whole before anything is built.

    Returns:
        The run folder.

    Raises:
        ConfigError: settings that can't be run, or that differ from those of the run in the folder.
        CheckpointError: the checkpoint to go on from is damaged, or the teacher changed since.
        NonFiniteError: the loss or the gradient's norm is NaN or infinite. Nothing of that step is kept.
    """
    check_config(config)
    check_teacher(config)
    device = pick_device(config)
    with open_run(config) as run, torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = new_state(config, device)
        resume(state, config, run)
        export = run / "export" / "ema.safetensors"
        if state["step"] < config.steps:
            export.unlink(missing_ok=True)  # that of a shorter run, if any
            run_steps(state, config, run)
        if not intact(export):  # otherwise written once: students know their teacher by the file's checksum
            export_network(run, state["ema"].module, config, state["step"])
    return config.out


def run_steps(state: dict[str, Any], config: TrainConfig, run: Path) -> None:
    """All steps from `state["step"]` to `config.steps`, with what happens once in a while between them."""
    dataset = DATASETS[config.data.name]()
    every, show = config.log, sys.stderr.isatty()
    with (
        RunLog(run, state["step"]) as log,
        tqdm(initial=state["step"], total=config.steps, unit="step", disable=not show, dynamic_ncols=True) as bar,
    ):
        restart_clock(state)
        while state["step"] < config.steps:
            metrics = train_step(state, config, dataset, run)
            step = state["step"]
            last = step == config.steps
            bar.update()

            # once in a while: tell how it goes
            if step % every.log_every == 0 or step == 1 or last:
                point = read_metrics(metrics) | pace(state, config.data.batch)
                log.write(step, point)
                summary = f"loss {point['loss']:.4g}, raw error {point['raw_error']:.4g}"
                bar.set_postfix_str(summary)
                if not show and (step % every.sample_every == 0 or last):
                    tell(f"step {step}/{config.steps}: {summary}, {point['samples_per_second']:,.0f} samples/s")

            # once in a while: draw samples from the averaged weights
            if step % every.sample_every == 0 or last:
                samples, columns = sample_grid(state["ema"].module, config)
                save_samples(run / "samples" / f"step_{step:08d}.png", samples, columns)
                restart_clock(state)

            # once in a while: save everything that going on needs
            if step % every.checkpoint_every == 0 or last:
                save_checkpoint(run, step, snapshot(state), every.keep_checkpoints)
                restart_clock(state)


def train_step(state: dict[str, Any], config: TrainConfig, dataset: Dataset, run: Path) -> dict[str, Tensor]:
    """One update. Raises NonFiniteError before the weights are touched."""
    net, optimizer, step = state["net"], state["optimizer"], state["step"]
    batch = make_batch(dataset, config, step, state["device"])
    times = generator_at(config.seed, "times", step)
    with mixed_precision(state):
        loss, metrics = config.method.loss(net, batch, times, state["teacher"])
        metrics.pop("rows", None)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.clip_norm)
    refuse_non_finite(step + 1, {"loss": loss.detach(), "grad_norm": norm}, run)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics |= {"grad_norm": norm, "lr": torch.tensor(optimizer.param_groups[0]["lr"])}
    state["scheduler"].step()
    state["ema"].update_parameters(net)
    state["step"] = step + 1
    return metrics


def mixed_precision(state: dict[str, Any]) -> torch.autocast:
    """Autocast to bf16 where the run asks for it.

    Without its cache: guidance casts the weights under no_grad first, and a cast kept from there has no gradient.
    """
    bf16 = state["precision"] == "bf16"
    return torch.autocast(state["device"].type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def make_batch(dataset: Dataset, config: TrainConfig, step: int, device: torch.device) -> Batch:
    """The batch of a step. All of it is drawn on the CPU: the same numbers whatever the device."""
    x0, y = dataset.batch(config.seed, step, config.data.batch)
    x1 = torch.randn(x0.shape, generator=generator_at(config.seed, "noise", step))
    if y is not None:
        dropped = generator_at(config.seed, "labels", step)
        y = drop_labels(y, config.data.label_dropout, dataset.num_classes, dropped).to(device)
    return Batch(x0.to(device), x1.to(device), y, dataset.num_classes)


def new_state(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """All that the loop carries from step to step, as it is before the first one."""
    torch.manual_seed(config.seed)
    net = build_network(config).to(device).train()
    teacher = digest = None
    if config.teacher is not None:
        teacher, _ = load_run(config.teacher, device=device)
        digest = sha256(config.teacher / "export" / "ema.safetensors")
        if config.init_from_teacher:
            net.load_state_dict(teacher.state_dict())
    optim = config.optim
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    return {
        "step": 0,
        "net": net,
        "ema": AveragedModel(net, multi_avg_fn=ramped_ema(optim.ema)).eval().requires_grad_(False),
        "optimizer": optimizer,
        "scheduler": LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / (optim.warmup_steps + 1))),
        "teacher": teacher,
        "teacher_sha256": digest,
        "device": device,
        "precision": pick_precision(config, device),
    }


def ramped_ema(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """An average of decay min(decay, (1 + k) / (10 + k)) at update k, so that it soon forgets the initial weights."""

    def update(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        k = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + k) / (10 + k)))(averages, weights, count)

    return update


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds. Data, times and noise follow from (seed, step); the RNG is for a network's dropout."""
    saved: dict[str, Any] = {name: state[name].state_dict() for name in STATEFUL}
    saved["device"] = state["device"].type
    saved["rng"] = {"cpu": torch.get_rng_state()}
    if state["device"].type == "cuda":
        saved["rng"]["cuda"] = torch.cuda.get_rng_state(state["device"])
    return saved | {name: state[name] for name in ("step", "teacher_sha256", "precision")}


def resume(state: dict[str, Any], config: TrainConfig, run: Path) -> None:
    """Bring the state to the newest checkpoint, or to `config.resume_from`; leave it as it is where there is none."""
    if config.resume_from is not None:
        path = run / "checkpoints" / config.resume_from.name
        saved = read_checkpoint(path)
        for newer in set_aside_newer(run, path):
            tell(f"{newer} was set aside as {newer.name}.abandoned")
    else:
        newest = read_newest_checkpoint(run)
        if newest is None:
            tell(f"training {count_parameters(state['net']):,} parameters on {state['device'].type} in {config.out}")
            return
        saved = newest
    if saved["step"] > config.steps:
        raise ConfigError(f"steps: {config.out} has done {saved['step']} already, so expected that or more")
    for name, meaning in (("teacher_sha256", "the teacher's weights"), ("precision", "the precision")):
        if saved[name] != state[name]:
            raise CheckpointError(
                f"{meaning} changed since this run's checkpoint at step {saved['step']} "
                f"({saved[name]} -> {state[name]}): choose another --out to start afresh"
            )
    for name in STATEFUL:
        state[name].load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"]["cpu"])
    if state["device"].type == "cuda" and "cuda" in saved["rng"]:
        torch.cuda.set_rng_state(saved["rng"]["cuda"], state["device"])
    state["step"] = saved["step"]
    tell(f"going on from step {state['step']} of {config.steps} in {config.out}")
    if saved["device"] != state["device"].type:
        tell(f"so far it ran on {saved['device']}, from here on {state['device'].type}: not bit for bit the same run")


def refuse_non_finite(step: int, metrics: dict[str, Tensor], run: Path) -> None:
    """Raise NonFiniteError if a metric of this step is NaN or infinite. On a GPU this waits for the step."""
    for name, value in read_metrics(metrics).items():
        if not math.isfinite(value):
            good = list_checkpoints(run)
            raise NonFiniteError(
                f"step {step}: {name} is {value}. The run stopped before that update, and nothing of it was saved; "
                f"the last good checkpoint is {good[0] if good else 'none yet'}. The same settings would stop at the "
                f"same step: try a smaller --optim.lr or a longer --optim.warmup-steps, with another --out"
            )


def read_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, in one transfer from each device."""
    device = metrics["loss"].device
    values = torch.stack([value.detach().double().to(device) for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def restart_clock(state: dict[str, Any]) -> None:
    """Leave sampling and saving out of the pace."""
    state["clock"] = (time.perf_counter(), state["step"])


def pace(state: dict[str, Any], batch: int) -> dict[str, float]:
    """Samples a second since the clock was last started, and the peak memory; starts it anew."""
    started, first = state["clock"]
    rate = (state["step"] - first) * batch / max(time.perf_counter() - started, 1e-9)
    restart_clock(state)
    return {"samples_per_second": rate, "peak_memory_bytes": peak_memory(state["device"])}


def pick_device(config: TrainConfig) -> torch.device:
    """The device that `config.device` means here."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision that `config.precision` means on this device."""
    if config.precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return config.precision


def tell(message: str) -> None:
    """Say something to whoever watches, below the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)
