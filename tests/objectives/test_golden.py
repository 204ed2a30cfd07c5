"""Methods against numbers of their official codes: loss, loss of each row, target and gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.jvp import jvp
from fastdistill.objectives import Guidance, adapters, dmd_gradient
from fastdistill.objectives.dmd import generator_input, surrogate
from fastdistill.objectives.solvers import solver_step
from fastdistill.objectives.velocity import target_velocity
from fastdistill.samplers import Net
from tests.objectives.golden_cases import (
    NAMES,
    Golden,
    agree,
    agree_in_gradient,
    agree_in_loss,
    agree_in_pull,
    always,
    backwards,
    off,
    offset_net,
    to_data,
)


def named(*prefixes: str) -> pytest.MarkDecorator:
    """Return the files whose names start with one of these; each of them is in some test."""
    return pytest.mark.parametrize("case", [pytest.param(n, id=n) for n in NAMES if n.startswith(prefixes)])


@pytest.fixture(autouse=True)
def float64() -> None:
    """Set the default dtype of these tests, restored by the suite's own fixture."""
    torch.set_default_dtype(torch.float64)


def test_every_file_is_asked_by_a_test() -> None:
    methods = {Golden(name).options["method"] for name in NAMES}
    assert methods == {
        "meanflow", "improved_meanflow", "facm", "ect", "consistency", "scm", "rcm", "rcm_scm", "tvm", "dmd",
        "shortcut", "alpha_flow", "lsd", "psd", "esd", "path",
    }  # fmt: skip
    assert len(NAMES) == 42


# From velocities


@named("path_")
def test_paths_and_flow_matching(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check states and velocities of pairs, and the square by them; the noise on top of a pair is the file's."""
    golden = Golden(case)
    shared = golden.options["path"] == "fm"  # whose noise is the pair's own

    def loss(one: Golden, net: Net) -> Tensor:
        monkeypatch.setattr(torch, "randn_like", lambda like: one["noise"])
        x1 = one["noise"] if shared else one["x1"]
        return objectives.flow_matching(net, one["x0"], x1, one["t"], path=one.path)[0]

    path, x0, t = golden.path, golden["x0"], golden["t"]
    x1, extra = (golden["noise"], {}) if shared else (golden["x1"], {"noise": golden["noise"]})
    x = path.interpolate(x0, x1, t, **extra)
    agree(x, golden["x_t"], "x_t")
    agree(path.velocity(x0, x1, t), golden["velocity"], "velocity")
    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, golden.net(x, t, t) - golden["target"], always)


def meanflow_guidance(case: Golden) -> Guidance | None:
    options = case.options
    if "omega" not in options:
        return None
    return Guidance(options["omega"], options["classes"], options["kappa"], tuple(options["interval"]))


@named("meanflow_")
def test_meanflow(case: str) -> None:
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.meanflow(
            net, one["x0"], one["x1"], one["t"], one["s"], y=one.get("y"), guidance=meanflow_guidance(one),
            p=one.options["p"], c=one.options["c"],
        )[0]  # fmt: skip

    x, v = state(golden), golden["x1"] - golden["x0"]
    if (official := golden.get("guided_velocity")) is not None:
        labelled = golden["y"]
        agree(target_velocity(golden.net, x, v, golden["t"], y=labelled, guidance=meanflow_guidance(golden)), official,
              "guided velocity")  # fmt: skip
    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, average(golden, x) - golden["target"], always)


@named("improved_meanflow")
def test_improved_meanflow(case: str) -> None:
    """Check u and v as two networks; the tangent of a row whose label was dropped runs along that of the label."""
    golden = Golden(case)
    asked: list[tuple[Tensor, Tensor]] = []

    def loss(one: Golden, net: Net) -> Tensor:
        head, null, omega = one.networks["_head"], one.options["classes"], one.get("omega")

        def listening(x: Tensor, t: Tensor, s: Tensor, y: Any = None, g: Any = None) -> Tensor:
            if g is not None:
                asked.append((y, g))
            return head(x, t, s, y, g)

        undropped = {} if one.get("y_before_drop") is None else {"undropped": one["y_before_drop"]}
        return objectives.improved_meanflow(
            net, one["x0"], one["x1"], one["t"], one["s"], y=one.get("y"), p=one.options["p"], c=one.options["c"],
            guidance=None if omega is None else Guidance.improved(omega, null), velocity_head=listening, **undropped,
        )[0]  # fmt: skip

    loss(golden, golden.net)
    if "asked_g" in golden.arrays and "y_before_drop" not in golden.arrays:  # a dropped label keeps its row's scale
        null = golden.options["classes"]
        without = torch.cat([g[y == null] for y, g in asked])
        assert (without == 1).all(), "without a label, a network that embeds the scale is asked at scale 1"
    agree_in_loss(golden, loss, ends=("", "_head"))
    x, g = state(golden), golden.get("omega")
    u, rate = jvp(lambda x, t: golden.net(x, t, golden["s"], golden.get("y"), g), (x, golden["t"]),
                  (golden["direction"], 1.0))  # fmt: skip
    compound = u + (golden["t"] - golden["s"])[:, None] * rate
    agree_in_pull(golden, loss, (compound - golden["target"]).detach(), always)


@named("alpha_flow")
def test_alpha_flow(case: str) -> None:
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        options = {"alpha": one.options["alpha"], "c": one.options["c"]}
        return objectives.alpha_flow(net, one["x0"], one["x1"], one["t"], one["s"], **options)[0]

    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, average(golden, state(golden)) - golden["target"], always)


# To the data


@named("cm_")
def test_consistency(case: str) -> None:
    """Check that distillation is by the solver that is called heun, a step of Heun's in the noise level."""
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.consistency(
            net, one["x0"], one["x1"], one["t"], one["r"], path=one.path, target=one.other("_ema"),
            teacher=one.other("_teacher"), distance=one.options["distance"], solver="heun",
        )[0]  # fmt: skip

    x, t, teacher = state(golden), golden["t"], golden.other("_teacher")
    if teacher is not None:
        agree(solver_step("heun", lambda x, t: teacher(x, t, t), x, t, golden["r"], golden.path), golden["x_r"], "x_r")
        otherwise = solver_step("heun_in_time", lambda x, t: teacher(x, t, t), x, t, golden["r"], golden.path)
        assert off(otherwise, golden["x_r"]) > 1e-4, "a step in time is another one"
    else:
        agree(golden.path.interpolate(golden["x0"], golden["x1"], golden["r"]), golden["x_r"], "x_r")
    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, jump(golden, x) - golden["target"], backwards)


@named("ect_")
def test_ect(case: str) -> None:
    """Check it where the official constant under the root is 0; ours is the least that rounding leaves."""
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.ect(net, one["x0"], one["x1"], one["t"], one["r"], path=one.path, c=1e-12)[0]

    clean = golden["sigma_r"] == 0
    assert clean.any() and not clean.all()
    assert torch.equal(golden["target"][clean], golden["x0"][clean])
    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, jump(golden, state(golden)) - golden["target"], backwards)


@named("scm_")
def test_scm(case: str) -> None:
    """Check the network as sCM's F, of scaled states and angles; its pull is minus the normalised tangent."""
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        teacher, path = one.other("_teacher"), one.path
        return objectives.scm(
            adapters.trigflow(net, path), one["x0"], one["x1"], one["t"], path=path, c=one.options["c"],
            teacher=None if teacher is None else adapters.trigflow(teacher, path), warmup=one.options["warmup"],
        )[0]  # fmt: skip

    agree_in_loss(golden, loss)
    agree_in_pull(golden, loss, -golden["direction"], to_data)
    scaled, angle = state(golden) / golden.options["sigma_data"], golden["angle"]
    f_net = golden.net(scaled, angle, torch.zeros_like(angle)).detach()
    agree(f_net + golden["direction"], golden["target"], "target")


@named("facm")
def test_facm(case: str) -> None:
    golden = Golden(case)

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.facm(
            net, one["x0"], one["x1"], one["t"], y=one["y"], teacher=one.other("_teacher"), guidance=guidance(one),
            p=one.options["p"], c=one.options["c"], clamp=one.options["clamp"],
        )[0]  # fmt: skip

    def guidance(one: Golden) -> Guidance | None:
        scale = one.options["scale"]
        return None if scale == 1 else Guidance(scale, one.options["classes"], interval=tuple(one.options["interval"]))

    x, t = state(golden), golden["t"]
    v = target_velocity(golden.net, x, golden["x1"] - golden["x0"], t, y=golden["y"],
                        teacher=golden.other("_teacher"), guidance=guidance(golden))  # fmt: skip
    agree(v, golden["velocity"], "velocity")
    agree_in_loss(golden, loss)
    to_end = golden.net(x, t, torch.zeros_like(t), golden["y"]).detach()
    agree_in_pull(golden, loss, to_end - golden["target"], to_data)


# Several jumps


@named("shortcut")
def test_shortcut(case: str) -> None:
    """Check that the halves of the finest jumps are asked at the condition that flow matching trains."""
    golden, asked = Golden(case), []

    def loss(one: Golden, net: Net) -> Tensor:
        ema = one.networks["_ema"]

        def listening(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
            asked.append(torch.stack((t, s), 1))
            return ema(x, t, s, y)

        return objectives.shortcut(
            net, one["x0"], one["x1"], one["t"], one["delta"], y=one["y"], target=listening, path=one.path,
            finest=one.options["finest"],
        )[0]  # fmt: skip

    loss(golden, golden.net)
    agree(torch.cat(asked), torch.stack((golden["asked_t"], golden["asked_s"]), 1), "times asked of the average")
    agree_in_loss(golden, loss)
    x, t, delta = state(golden), golden["t"], golden["delta"]
    prediction = golden.net(x, t, t - 2 * delta, golden["y"]).detach()
    agree_in_pull(golden, loss, prediction - golden["target"], always)


@named("lsd", "psd", "esd")
def test_self_distillation(case: str) -> None:
    """Check that ESD's gradient flows through the derivative by time, and the transport where the file says student."""
    golden = Golden(case)
    method = golden.options["method"]

    def loss(one: Golden, net: Net) -> Tensor:
        more: dict[str, Any] = {} if one.get("midpoint") is None else {"midpoint": one["midpoint"]}
        if method == "esd":
            more["through"] = {"teacher": "time", "student": "tangent"}[one.options["transport"]]
        function = getattr(objectives, method)
        return function(net, one["x0"], one["x1"], one["t"], one["s"], target=one.other("_ema"), **more)[0]

    agree_in_loss(golden, loss)


@named("tvm")
def test_tvm(case: str) -> None:
    """Check that the official residuals are over the scale of guidance; without a label the moving average is asked."""
    golden = Golden(case)

    def guidance(one: Golden) -> Guidance | None:
        scale = one.options["scale"]
        return None if scale == 1 else Guidance(scale, one.options["classes"])

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.tvm(
            net, one["x0"], one["x1"], one["t"], one["s"], y=one["y"], target=one.other("_ema"),
            guidance=guidance(one),
        )[0]  # fmt: skip

    def leaving(t: Tensor, s: Tensor) -> Tensor:
        return (s < t).to(t)  # the other term's calls are at s = t

    agree_in_loss(golden, loss)
    x, t, s, y = state(golden), golden["t"], golden["s"], golden["y"]
    u, rate = jvp(lambda s: golden.net(x, t, s, y), (s,), (1.0,))
    moving = (u - (t - s)[:, None] * rate).detach()
    agree_in_pull(golden, loss, moving - golden["target"], leaving)


# Distributions


@named("dmd2_")
def test_dmd(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that on every path the generator starts from noise alone, whatever the data beside it."""
    golden = Golden(case)
    networks = {"teacher": golden.networks["_teacher"], "fake": golden.networks["_fake"], "path": golden.path}
    one = golden["t"]
    start = generator_input(golden.path, golden["x0"], golden["x1"], one)
    agree(start, golden["generator_input"], "generator's input")
    samples = start - golden.net(start, one, 0 * one)
    agree(samples, golden["samples"], "samples")
    delta = dmd_gradient(samples.detach(), golden["noise"], golden["tau"], **networks)
    agree(delta, golden["delta"], "delta")
    agree(samples - delta, golden["target"], "target")
    agree(surrogate(samples, delta), golden["loss"], "surrogate")

    monkeypatch.setattr(torch, "randn", lambda *shape, **options: golden["noise"])
    loss, _ = objectives.dmd(
        golden.net, golden["x0"], golden["x1"], one, levels=lambda *_: golden["tau"], **networks
    )  # fmt: skip
    agree(loss, golden["loss"], "loss")
    agree_in_gradient(loss, golden)


# That these tests can fail


def test_a_wrong_target_a_wrong_row_and_a_wrong_gradient_are_found() -> None:
    """Check another target of the same distance, rows in another order, and a gradient of half the size."""
    golden = Golden("cm_ct")

    def loss(one: Golden, net: Net) -> Tensor:
        return objectives.consistency(
            net, one["x0"], one["x1"], one["t"], one["r"], path=one.path, target=one.other("_ema"), distance="l2"
        )[0]

    agree_in_loss(golden, loss)
    with pytest.raises(AssertionError, match="gradient by W1"):
        agree_in_gradient(0.5 * loss(golden, golden.net), golden)
    with pytest.raises(AssertionError, match="direction from the target"):
        agree_in_pull(golden, loss, (golden["target"] - jump(golden, state(golden))), backwards)
    golden.arrays["loss_rows"] = golden.arrays["loss_rows"].flip(0)
    with pytest.raises(AssertionError, match="loss_rows: off by"):
        agree_in_loss(golden, loss)
    moved = offset_net(golden.net, torch.ones(8), always)
    with pytest.raises(AssertionError, match=r"^loss: off by"):
        agree(golden.factor * loss(golden, moved), golden["loss"], "loss")


# What predictions are made of


def state(golden: Golden) -> Tensor:
    return golden.path.interpolate(golden["x0"], golden["x1"], golden["t"])


def average(golden: Golden, x: Tensor) -> Tensor:
    return golden.net(x, golden["t"], golden["s"], golden.get("y")).detach()


def jump(golden: Golden, x: Tensor) -> Tensor:
    t = golden["t"]
    return (x - t[:, None] * golden.net(x, t, torch.zeros_like(t))).detach()
