"""Training: what a run leaves behind, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from fastdistill.data import Digits, Ring
from fastdistill.objectives.meanflow import MeanFlow
from fastdistill.objectives.settings import Context
from fastdistill.train import NonFiniteError, TrainConfig, load_config, load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.loop import make_batch, make_context, mixed_precision
from fastdistill.train.state import new_state, ramped_ema
from tests.train.conftest import MakeConfig

METRICS = {
    "step", "loss", "raw_error", "tangent_norm", "distinct_share", "grad_norm", "lr",
    "samples_per_second", "peak_memory_bytes",
}  # fmt: skip


def points_of(run: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finish one run for every test that only looks at it."""
    out = tmp_path_factory.mktemp("runs") / "ring"
    arguments = ["--out", str(out), "--steps", "9", "--data.batch", "8", "--model.width", "8", "--device", "cpu"]
    often = ["--log.log-every", "3", "--log.sample-every", "6", "--log.checkpoint-every", "2"]
    return train(load_config("ring", arguments + often))


def test_a_run_folder_holds_all_that_was_promised(run: Path) -> None:
    """Check that nothing in it is half-written, either."""
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events/")}
    assert len(events) == 1
    checkpoints = {f"checkpoints/step_{step:08d}.pt{end}" for step in (6, 8, 9) for end in ("", ".sha256")}
    assert files - events == checkpoints | {
        ".lock", "config.yaml", "env.json", "metrics.jsonl", "samples/step_00000006.png", "samples/step_00000009.png",
        "export/ema.safetensors", "export/ema.safetensors.sha256",
    }  # fmt: skip


def test_metrics_are_one_finite_json_object_a_line(run: Path) -> None:
    """Check lines at step 1, at every multiple of log_every and at the end."""
    points = points_of(run)
    assert [point["step"] for point in points] == [1, 3, 6, 9]
    for point in points:
        assert set(point) == METRICS
        assert all(isinstance(value, int | float) and abs(value) < float("inf") for value in point.values())
        assert point["tangent_norm"] > 0
        assert point["samples_per_second"] > 0


def test_tensorboard_reads_the_same_metrics(run: Path) -> None:
    """Check that there is one series for each metric."""
    events = EventAccumulator(str(run / "events")).Reload()
    assert set(events.Tags()["scalars"]) == METRICS - {"step"}
    assert [point.step for point in events.Scalars("loss")] == [1, 3, 6, 9]


def test_the_environment_is_recorded(run: Path) -> None:
    """Check versions and processor, as JSON."""
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cpu"]["cores"] >= 1


def test_warm_up_is_linear(tiny: MakeConfig) -> None:
    """Check that it goes from lr / (warmup + 1) to lr."""
    run = train(tiny(steps=6, optim={"lr": 1.0, "warmup_steps": 3}, log={"log_every": 1}))
    points = points_of(run)
    assert [point["lr"] for point in points] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_gradient_is_clipped(tiny: MakeConfig) -> None:
    """Check that the optimiser sees a gradient of at most clip_norm, and the metric keeps the norm before."""
    seen = []
    register = torch.optim.Optimizer.register_step_pre_hook

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        seen.append(torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item())

    original = torch.optim.AdamW.__init__

    def init(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        register(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", init)
        run = train(tiny(steps=3, optim={"clip_norm": 1e-3}, log={"log_every": 1}))
    points = points_of(run)
    assert all(point["grad_norm"] > 1e-2 for point in points)
    assert all(abs(norm - 1e-3) < 1e-6 for norm in seen)


def test_the_average_is_the_ramped_one() -> None:
    """Check that at update k it decays by min(decay, (1 + k) / (10 + k))."""
    average, weights = [torch.zeros(3)], [torch.ones(3)]
    ramped_ema(0.999)(average, weights, 2)
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 3 / 12))
    average = [torch.zeros(3)]
    ramped_ema(0.5)(average, weights, torch.tensor(10**6))
    torch.testing.assert_close(average[0], torch.full((3,), 0.5))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: MakeConfig) -> None:
    """Check it whatever the global generator was, and that the caller's generator is left as it was."""
    first = load_run(train(tiny("a")))[0].state_dict()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = load_run(train(tiny("b")))[0].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = load_run(train(tiny("c", seed=1)))[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_samples_are_pictures_that_differ_as_training_goes_on(tiny_digits: MakeConfig) -> None:
    """Check ten columns, one a class, and eight rows, from the same noise each time."""
    run = train(tiny_digits(log={"sample_every": 1}))
    with (
        Image.open(run / "samples" / "step_00000001.png") as first,
        Image.open(run / "samples" / "step_00000002.png") as second,
    ):
        assert first.size == second.size
        assert first.size[0] / first.size[1] == 10 / 8
        assert first.tobytes() != second.tobytes()


def test_bf16_autocast_trains_close_to_fp32(tiny_digits: MakeConfig) -> None:
    """Check that weights stay float32, and that the loss moves by bf16's rounding, and by something."""
    losses = []
    for precision in ("fp32", "bf16"):
        run = train(tiny_digits(precision, precision=precision, steps=4, optim={"warmup_steps": 0, "lr": 0.03}))
        state = read_checkpoint(list_checkpoints(run)[0])
        assert {value.dtype for value in state["net"].values()} == {torch.float32}
        losses.append(points_of(run)[-1]["loss"])
    assert losses[0] != losses[1]
    assert abs(losses[0] / losses[1] - 1) < 0.02


def test_bf16_gradients_of_guided_meanflow_are_close_to_fp32(tiny_digits: MakeConfig) -> None:
    """Check that none is lost: the network runs under no_grad for guidance, under forward AD, and for its gradient."""
    method = {"name": "meanflow", "distinct": 0.5, "p": 0.0, "guidance": {"scale": 2.0, "kappa": 0.5}}
    gradients = []
    for precision in ("fp32", "bf16"):
        config = tiny_digits(method=method, precision=precision)
        state = new_state(config, torch.device("cpu"))
        weights = dict(state["net"].named_parameters())
        generator = torch.Generator().manual_seed(0)
        for weight in weights.values():
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
        batch = make_batch(Digits(), config, 0, state["device"])
        with mixed_precision(state):
            loss, _ = config.method.loss(make_context(state, config, batch))
        loss.backward()
        gradients.append({name: weight.grad for name, weight in weights.items()})
    exact, rounded = gradients
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    for name in exact:
        assert (rounded[name] - exact[name]).norm() <= 0.02 * exact[name].norm(), name


def test_meanflow_distils_a_teacher_on_digits(tiny_digits: MakeConfig) -> None:
    """Check that the student starts from the teacher's weights, follows its guided velocity, and ends elsewhere."""
    teacher = train(tiny_digits("teacher"))
    method = {"name": "meanflow", "distinct": 0.5, "guidance": {"scale": 2.0}}
    config = tiny_digits("student", teacher=teacher, init_from_teacher=True, method=method)
    weights = load_run(teacher)[0].state_dict()
    state = new_state(config, torch.device("cpu"))
    assert all(torch.equal(value, weights[name]) for name, value in state["net"].state_dict().items())
    student = load_run(train(config))[0].state_dict()
    assert any(not torch.equal(student[name], weights[name]) for name in weights)


def poisoned(batch: Any, at: int) -> Any:
    """Return a dataset's `batch` whose rows are infinite at one step."""

    def poison(self: Ring, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        x0, _ = batch(self, seed, step, size)
        return (torch.full_like(x0, float("inf")) if step == at else x0), None

    return poison


def test_a_non_finite_loss_stops_the_run_by_name(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the message has step, metric and last good checkpoint, and that nothing of that step is saved."""
    monkeypatch.setattr(Ring, "batch", poisoned(Ring.batch, at=5))
    config = tiny(log={"log_every": 1, "checkpoint_every": 1})
    with pytest.raises(NonFiniteError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith("step 6: loss is nan")
    assert "step_00000005.pt" in message
    state = read_checkpoint(list_checkpoints(config.out)[0])
    assert state["step"] == 5
    assert all(value.isfinite().all() for part in ("net", "ema") for value in state[part].values())
    assert [point["step"] for point in points_of(config.out)] == [1, 2, 3, 4, 5]
    assert not (config.out / "export" / "ema.safetensors").exists()


def test_a_non_finite_gradient_stops_the_run_by_name(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a finite loss with an infinite slope, before the first checkpoint."""

    def steep(self: MeanFlow, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sum((weight * 0).abs().sqrt().sum() for weight in context.net.parameters())
        assert isinstance(loss, Tensor)
        return loss, {"loss": loss.detach(), "raw_error": loss.detach()}

    monkeypatch.setattr(MeanFlow, "loss", steep)
    with pytest.raises(NonFiniteError, match=r"step 1: grad_norm is nan.* none yet"):
        train(tiny())


def test_nothing_is_built_before_the_configuration_is_checked(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check that a bad combination leaves no folder behind and reads no data."""

    def fail(*_: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr("fastdistill.train.loop.new_state", fail)
    config: TrainConfig = tiny(init_from_teacher=True)
    with pytest.raises(ValueError, match="init_from_teacher"):
        train(config)
    assert list(tmp_path.iterdir()) == []


def test_noise_is_coupled_to_data_where_the_path_or_the_run_says_so(tiny: MakeConfig) -> None:
    """Check that rows are the same, in an order that brings them nearer, and that data stay where they are."""
    cpu = torch.device("cpu")
    plain, *coupled = (
        make_batch(Ring(), config, 3, cpu)
        for config in (tiny(), tiny(path={"name": "ot_cfm"}), tiny(coupling="optimal_transport"))
    )
    for batch in coupled:
        assert torch.equal(batch.x0, plain.x0)
        assert not torch.equal(batch.x1, plain.x1)
        assert torch.equal(batch.x1.sort(0).values, plain.x1.sort(0).values)
        assert (batch.x1 - batch.x0).square().sum() < (plain.x1 - plain.x0).square().sum()
    alone = make_batch(Ring(), tiny(path={"name": "ot_cfm"}, coupling="independent"), 3, cpu)
    assert torch.equal(alone.x1, plain.x1)


def test_a_finished_run_keeps_its_export_byte_for_byte(tmp_path: Path) -> None:
    """Check it, for a student knows its teacher by that file, and safetensors orders its metadata anew each time."""
    config = load_config("ring", ["--steps", "2", "--data.batch", "8", "--device", "cpu"], out=tmp_path / "run")
    export = train(config) / "export" / "ema.safetensors"
    before = (export.read_bytes(), export.stat().st_mtime_ns)
    train(config)
    assert (export.read_bytes(), export.stat().st_mtime_ns) == before
