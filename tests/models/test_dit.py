"""Compare the DiT with its plain twin: values, tangents, gradients, in float64, float32 and under autocast."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdistill as fd
from fastdistill.models import DiT
from fastdistill.testing import assert_accurate, relative_error
from tests.models.plain_dit import plain_dit

SMALL: dict[str, Any] = {"channels": 3, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
# Both kinds of position come with and without QK norm; then one head, and patches of one pixel.
CONFIGS: dict[str, dict[str, Any]] = {
    "sincos": {},
    "sincos-qknorm": {"qk_norm": True},
    "rope": {"pos": "rope"},
    "rope-qknorm": {"pos": "rope", "qk_norm": True, "mlp_ratio": 2.5},
    "one-head-unlabelled": {"heads": 1, "num_classes": 0},
    "pixels": {"patch_size": 1, "channels": 1, "depth": 1, "pos": "rope"},
}
every_config = pytest.mark.parametrize("config", [pytest.param(SMALL | c, id=name) for name, c in CONFIGS.items()])
Jvp = Callable[..., Any]
Net = Callable[[Tensor, Tensor, Tensor], Tensor]


def randomised(config: dict[str, Any], std: float = 0.2) -> DiT:
    """Return a float64 DiT in which no weight is zero, so that a comparison sees every part of it."""
    net = DiT(**config).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net


def twin_of(net: DiT, y: Tensor | None) -> Net:
    state = dict(net.named_parameters())
    return lambda x, t, s: plain_dit(state, net.config, x, t, s, y)


def with_labels(net: nn.Module, y: Tensor | None) -> Net:
    return lambda x, t, s: net(x, t=t, s=s, y=y)


def inputs(net: DiT, batch: int = 3, size: tuple[int, int] = (6, 4)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, t, s and a velocity w; the image is not square, and one row lies on the diagonal s = t."""
    x, w = torch.randn(2, batch, net.channels, *size, dtype=torch.float64).unbind(0)
    t = torch.rand(batch, dtype=torch.float64)
    s = t * torch.rand(batch, dtype=torch.float64)
    s[-1] = t[-1]
    return x, t, s, w


def labels(net: DiT, batch: int = 3) -> Tensor:
    return torch.arange(batch) % (net.num_classes + 1)


@every_config
@pytest.mark.parametrize("jvp", [torch.func.jvp, fd.jvp], ids=["torch.func.jvp", "fd.jvp"])
@pytest.mark.parametrize("labelled", [True, False])
def test_value_and_tangent_equal_those_of_the_plain_twin(config: dict[str, Any], jvp: Jvp, labelled: bool) -> None:
    net = randomised(config)
    x, t, s, w = inputs(net)
    y = labels(net) if labelled else None
    directions = (w, torch.ones_like(t), torch.full_like(s, 0.3))
    actual = jvp(with_labels(net, y), (x, t, s), directions)
    truth = torch.func.jvp(twin_of(net, y), (x, t, s), directions)
    torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)


@every_config
def test_gradients_of_a_meanflow_loss_equal_those_of_the_plain_twin(config: dict[str, Any]) -> None:
    net = randomised(config)
    x, t, s, w = inputs(net)
    y = labels(net)

    def gradients(fn: Net, jvp: Jvp) -> tuple[Tensor, ...]:
        u, du_dt = jvp(fn, (x, t, s), (w, torch.ones_like(t), torch.zeros_like(s)))
        target = (w - (t - s)[:, None, None, None] * du_dt).detach()
        return torch.autograd.grad((u - target).square().sum(), list(net.parameters()))

    actual, truth = gradients(with_labels(net, y), fd.jvp), gradients(twin_of(net, y), torch.func.jvp)
    for (name, _), dp, dp_twin in zip(net.named_parameters(), actual, truth, strict=True):
        assert dp_twin.abs().max() > 0, name
        torch.testing.assert_close(dp, dp_twin, rtol=1e-9, atol=1e-10 * float(dp_twin.abs().max()), msg=name)


@every_config
def test_gradients_through_the_tangent_equal_those_of_the_plain_twin(config: dict[str, Any]) -> None:
    net = randomised(config)
    x, t, s, w = inputs(net)
    y = labels(net)

    def gradients(fn: Net, jvp: Jvp) -> tuple[Tensor, ...]:
        u, du_dt = jvp(fn, (x, t, s), (w, torch.ones_like(t), torch.zeros_like(s)))
        return torch.autograd.grad((u + du_dt).square().sum(), list(net.parameters()))

    actual = gradients(with_labels(net, y), lambda *args: fd.jvp(*args, tangent_grad=True))
    truth = gradients(twin_of(net, y), torch.func.jvp)
    for (name, _), dp, dp_twin in zip(net.named_parameters(), actual, truth, strict=True):
        torch.testing.assert_close(dp, dp_twin, rtol=1e-8, atol=1e-10 * float(dp_twin.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("autocast", "cap"),
    [pytest.param(False, 5e-6, id="float32"), pytest.param(True, 1.2e-2, id="bf16-autocast")],
)
def test_twelve_blocks_are_as_accurate_as_the_plain_twin(autocast: bool, cap: float) -> None:
    config = SMALL | {"width": 64, "depth": 12, "qk_norm": True, "pos": "rope"}
    net = randomised(config, std=0.08)
    x, t, s, w = inputs(net, size=(8, 8))
    y = labels(net)
    moving = ((x, t, s), (w, torch.ones_like(t), torch.zeros_like(s)))
    truth = torch.func.jvp(twin_of(net, y), *moving)
    net = net.float()
    point, direction = (tuple(part.float() for part in parts) for parts in moving)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        actual = fd.jvp(with_labels(net, y), point, direction)
        baseline = torch.func.jvp(twin_of(net, y), point, direction)
    for name, got, true, plain in zip(("u", "t_u"), actual, truth, baseline, strict=True):
        assert_accurate(got, true.detach(), plain, name=name)
        assert relative_error(got, true.detach()) < cap


def test_autocast_leaves_the_residual_stream_its_tangent_and_the_condition_in_float32() -> None:
    net = randomised(SMALL).float()
    x, t, s, w = (part.float() for part in inputs(net))
    seen: list[tuple[str, torch.dtype, torch.dtype]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor | tuple[Tensor, ...]) -> None:
            dual = torch.autograd.forward_ad.unpack_dual(out if isinstance(out, Tensor) else out[0])
            assert dual.tangent is not None
            seen.append((name, dual.primal.dtype, dual.tangent.dtype))

        return hook

    for name, module in net.named_modules():
        if name.split(".")[-1] in ("0", "1", "modulation", "t_embedder", "qkv", "fc1") and "embedder.fc" not in name:
            module.register_forward_hook(note(name))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.forward_ad.dual_level():
        dual_x = torch.autograd.forward_ad.make_dual(x, w)
        dual_t = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
        u, t_u = torch.autograd.forward_ad.unpack_dual(net(dual_x, dual_t, s))
    low = {name for name, *dtypes in seen if dtypes == [torch.bfloat16] * 2}
    assert low == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "mlp.fc1")}
    assert all(dtypes == [torch.float32] * 2 for name, *dtypes in seen if name not in low)
    assert {"blocks.1", "blocks.0.modulation", "final_layer.modulation", "t_embedder"} <= {name for name, *_ in seen}
    assert u.dtype == t_u.dtype == torch.float32


@torch.no_grad()
def test_bf16_weights_take_float32_times_and_return_the_dtype_of_x() -> None:
    net = randomised(SMALL)
    x, t, s, _ = inputs(net)
    truth = net(x, t, s)
    net = net.bfloat16()
    assert net(x.float(), t.float(), s.float()).dtype == torch.float32
    assert relative_error(net(x.bfloat16(), t.float(), s.float()), truth) < 0.05


def test_compiled_forward_has_one_graph_and_the_same_values() -> None:
    net = randomised(SMALL | {"pos": "rope", "qk_norm": True, "depth": 1}).float()
    x, t, s, _ = (part.float() for part in inputs(net))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, t, s), net(x, t, s))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
def test_compiled_with_its_tangent_it_has_one_graph_and_the_same_gradients(autocast: bool) -> None:
    """Check MeanFlow's step: u carries the graph, and du/dt is a constant."""
    torch._dynamo.reset()
    net = randomised(SMALL | {"pos": "rope", "qk_norm": True, "depth": 2}).float()
    x, t, s, w = (part.float() for part in inputs(net))

    def push(x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fd.jvp(net, (x, t, s), (w, 1.0, None))

    def results(fn: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            u, du_dt = fn(x, t, s)
        assert not du_dt.requires_grad
        return [u, du_dt, *torch.autograd.grad((u - du_dt).square().sum(), list(net.parameters()))]

    compiled = results(torch.compile(push, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, results(push), strict=True):
        assert relative_error(actual.detach(), expected.detach().double()) < (2e-2 if autocast else 1e-5)


def test_checkpointing_around_the_jvp_leaves_gradients_as_they_are() -> None:
    net = randomised(SMALL)
    x, t, s, w = inputs(net)

    def loss() -> Tensor:
        u, du_dt = fd.jvp(net, (x, t, s), (w, 1.0, None))
        return (u - du_dt).square().sum()

    plain = torch.autograd.grad(loss(), list(net.parameters()))
    recomputed = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(loss, use_reentrant=False), list(net.parameters())
    )
    torch.testing.assert_close(recomputed, plain)


def test_missing_labels_mean_the_last_one() -> None:
    net = randomised(SMALL)
    x, t, s, _ = inputs(net)
    nobody = torch.full((3,), 5)
    assert torch.equal(net(x, t, s), net(x, t, s, nobody))
    assert not torch.allclose(net(x, t, s), net(x, t, s, torch.zeros_like(nobody)))


def test_a_fresh_network_is_zero_and_its_blocks_are_the_identity() -> None:
    net = DiT(**SMALL).double()
    x, t, s, _ = inputs(net)
    assert torch.equal(net(x, t, s), torch.zeros_like(x))
    tokens, condition = torch.randn(3, 6, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    stream, (gate, _) = net.get_submodule("blocks.0")(tokens, None, condition, None)
    assert torch.equal(stream, tokens) and not gate.any()


def test_weights_of_a_fresh_network_follow_the_initialisation_of_dit() -> None:
    net = DiT(**SMALL | {"width": 128})
    bound = (6 / (128 + 512)) ** 0.5
    assert 0.99 * bound < float(net.get_parameter("blocks.0.mlp.fc1.weight").detach().abs().max()) <= bound
    for name in ("t_embedder.fc1", "d_embedder.fc2", "y_embedder"):
        assert float(net.get_parameter(f"{name}.weight").detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_network_from_the_meta_device_is_filled_completely() -> None:
    config = SMALL | {"pos": "rope", "qk_norm": True}
    with torch.device("meta"):
        net = DiT(**config)
    net = net.to_empty(device="cpu")
    expected = DiT(**config)
    for each in (net, expected):
        torch.manual_seed(0)
        each.initialize()
    assert net.state_dict().keys() == expected.state_dict().keys()
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_names_in_the_state_dict() -> None:
    linears = ["x_embedder", *(f"{e}_embedder.fc{i}" for e in "td" for i in (1, 2))]
    linears += [f"blocks.0.{part}" for part in ("modulation.linear", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    linears += ["final_layer.modulation.linear", "final_layer.linear"]
    names = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    names |= {"y_embedder.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"}
    assert set(DiT(**SMALL | {"depth": 1, "qk_norm": True}).state_dict()) == names


def test_config_rebuilds_the_network_by_way_of_json() -> None:
    net = randomised(SMALL | {"pos": "rope", "qk_norm": True, "mlp_ratio": 2.0})
    rebuilt = DiT(**json.loads(json.dumps(net.config))).double()
    rebuilt.load_state_dict(net.state_dict())
    x, t, s, _ = inputs(net)
    assert torch.equal(rebuilt(x, t, s), net(x, t, s))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 3}, "width: expected a multiple of 4 and of heads=3, got 16"),
        ({"width": 18, "heads": 2}, "width: expected a multiple of 4"),
        ({"heads": 8, "pos": "rope"}, "heads: pos='rope' needs width / heads to be a multiple of 4, got 16 / 8"),
        ({"pos": "learned"}, "pos: expected one of sincos, rope, got 'learned'"),
        ({"depth": 0}, "depth: expected a positive integer, got 0"),
        ({"width": "16"}, "width: expected a positive integer, got '16'"),
        ({"num_classes": -1}, "num_classes: expected an integer from 0 up, got -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: expected a positive number, got 0.0"),
    ],
)
def test_bad_configuration_is_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | overrides)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (3, 2, 6, 4), r"x: expected \(B, 3, height, width\) .* got \(3, 2, 6, 4\)"),
        ("x", (3, 3, 5, 4), r"x: expected .* divisible by the patch size 2, got \(3, 3, 5, 4\)"),
        ("x", (3, 3, 6), "x: expected"),
        ("t", (), r"t: expected \(3,\), one for each image, got \(\)"),
        ("s", (3, 1), r"s: expected \(3,\), one for each image, got \(3, 1\)"),
        ("y", (2,), r"y: expected \(3,\), one for each image, got \(2,\)"),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused_by_name(name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = {"x": torch.zeros(3, 3, 6, 4), "t": torch.zeros(3), "s": torch.zeros(3), "y": torch.zeros(3).long()}
    arguments[name] = arguments[name].new_zeros(shape)
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL)(**arguments)
