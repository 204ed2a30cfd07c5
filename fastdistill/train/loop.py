"""Train: the loop itself.

Every step is a pure function of the state before it and of (seed, step): a run that was killed and started again
continues from its newest checkpoint and ends with the weights of one that never stopped (bit for bit on a CPU).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from fastdistill import couplings
from fastdistill.data import Batch, DataSet, drop_labels, generator_at
from fastdistill.objectives.scores import ScoreMethod
from fastdistill.objectives.settings import Context
from fastdistill.train.checkpoint import list_checkpoints, save_checkpoint
from fastdistill.train.checks import check_config, check_one_process, check_teacher
from fastdistill.train.config import TrainConfig, couples
from fastdistill.train.diagnostics import attribute, measure, why_flat, why_no_cosines
from fastdistill.train.files import WriteError, intact, set_aside
from fastdistill.train.logging import RunLog, peak_memory, save_samples, tell
from fastdistill.train.pairs import Pairs, make_pairs
from fastdistill.train.run import begin_run, export_network, open_run
from fastdistill.train.sampling import sample_grid
from fastdistill.train.state import new_state, pick_device, resume, set_aside_what_is_left, snapshot


class NonFiniteError(RuntimeError):
    """Training diverged. The message names the step, the metric, what broke first, and the last good checkpoint."""


def train(config: TrainConfig) -> Path:
    """Train to `config.steps`, from the newest checkpoint where there is one, and export the averaged weights.

    Args:
        config: checked as a whole before anything is built.

    Returns:
        The run folder.

    Raises:
        ConfigError: settings that can't be run, or that differ from those of the run in the folder.
        CheckpointError: the checkpoint to go on from is damaged, or the teacher changed since; as WriteError, a file
            can't be written, e.g. because the disk is full.
        NonFiniteError: the loss or the gradient's norm is NaN or infinite. Nothing of that step is kept.
    """
    check_one_process()
    check_config(config)
    check_teacher(config)
    device = pick_device(config)
    with (
        naming_files(config.out),
        open_run(config) as run,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        state = new_state(config, device)
        chosen = resume(state, config, run)
        # Nothing was written so far: what is refused is as it was.
        if chosen is not None:
            set_aside_what_is_left(run, chosen)
        begin_run(run, config)
        export = run / "export" / "ema.safetensors"
        if export.exists() and not intact(export):
            tell(f"{export} is damaged, or not the trainer's; it was set aside as {set_aside(export, 'damaged').name}")
        if state["step"] < config.steps:
            export.unlink(missing_ok=True)  # that of a shorter run, if any
            run_steps(state, config, run)
        if not intact(export):  # otherwise written once: students know their teacher by the file's checksum
            export_network(run, state["ema"].module, config, state["step"])
    return config.out


@contextmanager
def naming_files(run: Path) -> Iterator[None]:
    """Turn an OSError that nothing beneath has turned into an error of ours into one that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"{error.filename or run} can't be used: {reason}; see to it, and start again") from error


def run_steps(state: dict[str, Any], config: TrainConfig, run: Path) -> None:
    """Run all steps from `state["step"]` to `config.steps`, with what happens once in a while between them."""
    data = config.data.build()
    dataset: DataSet | Pairs = data
    if config.method.makes_pairs:
        dataset = make_pairs(config, state["teacher"], state["teacher_path"], state["teacher_sha256"], data, run)
    if (reason := why_flat(config.method)) is not None:
        tell(reason)
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
            if step % every.log_every == 0 or step == 1 or last or is_looked_at(config, step):
                point = read_metrics(metrics) | pace(state, config.data.batch)
                log.write(step, point)
                summary = f"loss {point['loss']:.4g}, raw error {point['raw_error']:.4g}"
                bar.set_postfix_str(summary)
                if not show and (step % every.sample_every == 0 or last):
                    tell(f"step {step}/{config.steps}: {summary}, {point['samples_per_second']:,.0f} samples/s")

            # once in a while: draw samples from the averaged weights
            if step % every.sample_every == 0 or last:
                samples, columns = sample_grid(state["ema"].module, config)
                save_samples(run / "samples" / f"step_{step:08d}.png", data, samples, columns)
                restart_clock(state)

            # once in a while: save everything that going on needs
            if step % every.checkpoint_every == 0 or last:
                log.sync()
                save_checkpoint(run, step, snapshot(state), every.keep_checkpoints)
                restart_clock(state)


def train_step(state: dict[str, Any], config: TrainConfig, dataset: DataSet | Pairs, run: Path) -> dict[str, Tensor]:
    """Make one update. Raises NonFiniteError before any of it is saved; of the loss, before weights are touched."""
    net, optimizer, step = state["net"], state["optimizer"], state["step"]
    context = make_context(state, config, make_batch(dataset, config, step, state["device"]))
    critic = state["critic"]
    if critic is not None:
        assert isinstance(config.method, ScoreMethod)
        critic.warm_up(context, config.method, mixed_precision(state))
    with mixed_precision(state):
        loss, metrics = config.method.loss(context)
    rows, terms = metrics.pop("rows", None), metrics.pop("terms", {})
    looked_at = is_looked_at(config, step + 1)
    if looked_at:
        metrics |= measure(rows, terms, net, config.diagnostics.bins, config.diagnostics.gradients)
        first = step + 1 == config.diagnostics.every
        if config.diagnostics.gradients and first and (reason := why_no_cosines(config.method, terms)) is not None:
            tell(reason)
    loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if not all(map(math.isfinite, read_metrics({"loss": loss, "norm": norm}).values())):
        where = attribute(context.batch, metrics, rows, terms, net, config.diagnostics.bins)
        stop_non_finite(
            step + 1, "grad_norm" if loss.isfinite() else "loss", norm if loss.isfinite() else loss, where, run
        )
    clip_grads_with_norm_(weights, config.optim.clip_norm, norm)
    metrics |= {"grad_norm": norm, "lr": torch.tensor(optimizer.param_groups[0]["lr"])}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state["scheduler"].step()
    for average in (state["ema"], state["target"]):
        if average is not None:
            average.update_parameters(net)
    if critic is not None:
        assert isinstance(config.method, ScoreMethod)
        found = critic.update(context, config.method, mixed_precision(state))
        for name, value in read_metrics({"loss": loss} | found).items():
            if not math.isfinite(value):  # now: the next checkpoint would hold it, and be called good
                stop_non_finite(step + 1, name, found[name], "in the critic's own update", run)
        metrics |= found
    state["step"] = step + 1
    return metrics


def make_context(state: dict[str, Any], config: TrainConfig, batch: Batch) -> Context:
    """Make what the method sees of the state in this step."""
    target = state["target"] and state["target"].module
    return Context(
        net=state["net"],
        batch=batch,
        generator=generator_at(config.seed, "times", state["step"]),
        seed=config.seed,
        step=state["step"],
        steps=config.steps,
        path=state["path"],
        teacher=state["teacher"],
        weak_teacher=state["weak_teacher"],
        target=target,
        weighting=state["weighting"],
        velocity_layer=state["velocity_layer"],
        perceptual=state["perceptual"],
        critic=state["critic"],
    )


def is_looked_at(config: TrainConfig, step: int) -> bool:
    """Return whether diagnostics are due after this step."""
    every = config.diagnostics.every
    return bool(every) and step % every == 0


def mixed_precision(state: dict[str, Any]) -> torch.autocast:
    """Return a context of autocast to bf16 where the run asks for it.

    Without its cache: guidance casts the weights under no_grad first, and a cast kept from there has no gradient.
    """
    bf16 = state["precision"] == "bf16"
    return torch.autocast(state["device"].type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def make_batch(dataset: DataSet | Pairs, config: TrainConfig, step: int, device: torch.device) -> Batch:
    """Make the batch of a step. All of it is drawn on the CPU: the same numbers whatever the device."""
    seed, size = config.seed, config.data.batch
    if isinstance(dataset, Pairs):
        x0, x1, y = dataset.batch(seed, step, size)
    else:
        x0, y = dataset.batch(seed, step, size)
        x1 = torch.randn(x0.shape, generator=generator_at(seed, "noise", step))
        if couples(config):
            x0, x1 = couplings.optimal_transport(x0, x1)
    undropped = None if y is None else y.to(device)
    if y is not None:
        dropped = generator_at(seed, "labels", step)
        y = drop_labels(y, config.data.label_dropout, dataset.num_classes, dropped).to(device)
    return Batch(x0.to(device), x1.to(device), y, dataset.num_classes, undropped)


def stop_non_finite(step: int, name: str, value: Tensor, where: str, run: Path) -> NoReturn:
    """Raise the NonFiniteError of a step whose metric `name` isn't finite."""
    good = list_checkpoints(run)
    raise NonFiniteError(
        f"step {step}: {name} is {value.item()} ({where}). The run stopped there, and nothing of that step was "
        f"saved; the last good checkpoint is {good[0] if good else 'none yet'}. The same settings would stop at the "
        f"same step: try a smaller --optim.lr or a longer --optim.warmup-steps, with another --out"
    )


def read_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Read scalars as Python numbers, in one transfer from each device."""
    device = metrics["loss"].device
    values = torch.stack([value.detach().double().to(device) for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def restart_clock(state: dict[str, Any]) -> None:
    """Leave sampling and saving out of the pace."""
    state["clock"] = (time.perf_counter(), state["step"])


def pace(state: dict[str, Any], batch: int) -> dict[str, float]:
    """Return samples a second since the clock was last started, and the peak memory; start it anew."""
    started, first = state["clock"]
    rate = (state["step"] - first) * batch / max(time.perf_counter() - started, 1e-9)
    restart_clock(state)
    return {"samples_per_second": rate, "peak_memory_bytes": peak_memory(state["device"])}
