"""DMD: no gradient where the laws agree, and one towards the data where they don't; the critic beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastdistill import objectives, paths, samplers
from fastdistill.eval.exact import Gaussian
from fastdistill.objectives import Guidance, flow_matching
from fastdistill.objectives.critic import fake_score_loss, gan_critic_loss, gan_generator_loss
from fastdistill.objectives.dmd import dmd, dmd_gradient, simulate, surrogate
from fastdistill.paths import EDM, FM, LINEAR, OTCFM, VE, Cosine, Path
from fastdistill.samplers import Net
from fastdistill.times import Constant
from tests.objectives.cases import WIDTH, Gate, exact_net
from tests.objectives.descent import Case, ones, state


def fake_of_shifted_samples(gate: Gate, theta: float) -> None:
    """Return DMD's second network, exact for samples that are off by -theta e."""
    gate.keywords["fake"] = exact_net(Gaussian(gate.law.mean - theta, gate.law.covariance, gate.path))
    gate.keywords |= {"levels": Constant(0.5), "generator": torch.Generator().manual_seed(1)}


def dmd_slope(gate: Gate, d: Tensor) -> Tensor:
    """Return the slope: samples are off by -theta t^3 e, and delta is -theta B e over a mean, B = beta^2 C^-1.

    B e = e - alpha S C^-1 alpha e, the second part being how the teacher's data prediction moves with x = G + alpha e.
    """
    tau = torch.full_like(d, 0.5)
    samples = gate.law.flow_map(state(gate), gate.times["t"], 0 * tau)
    noise = torch.randn(len(d), WIDTH, generator=torch.Generator().manual_seed(1)).double()
    x = LINEAR.interpolate(samples, noise, tau)

    def data(x: Tensor) -> Tensor:
        return x - 0.5 * gate.law.velocity(x, tau)

    pull = ones(gate) - (data(x + 0.5) - data(x))
    return d**3 * pull.mean(1) / (samples - data(x)).abs().mean(1)


DESCENT = {
    "dmd": Case("dmd", dmd_slope, prepare=fake_of_shifted_samples),
}


PATHS = [pytest.param(path, id=type(path).__name__) for path in (LINEAR, Cosine(), FM(0.1), EDM(0.05, 20.0))]
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
ROWS = 4000


def law_at(shift: float, path: Path = LINEAR, factor: float = 1.0) -> Gaussian:
    return Gaussian(torch.tensor([0.4, -0.7], dtype=torch.float64) + shift, factor * COVARIANCE, path)


def exact(law: Gaussian) -> Net:
    """Return its velocity and flow map as a network."""
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    x0, x1 = torch.randn(2, rows, 2, dtype=torch.float64)
    return x0, x1, torch.ones(rows, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_vanishes_at_a_match_and_points_back_after_a_shift(path: Path) -> None:
    """Check that a generator and a fake score exact for their own law make delta, whose descent undoes the shift."""
    x0, x1, t = batch()
    data = exact(law_at(0.0, path))
    found = {}
    for shift in (-0.3, 0.0, 0.3):
        own = exact(law_at(shift, path))
        samples = law_at(shift).sample(ROWS)
        tau = torch.full((ROWS,), 0.5, dtype=torch.float64)
        delta = dmd_gradient(samples, x1, tau, teacher=data, fake=own, path=path)
        found[shift] = delta.mean().item()
        _, metrics = dmd(own, x0, x1, t, teacher=data, fake=own, path=path)
        assert (metrics["raw_error"] < 1e-20) == (shift == 0)
    assert abs(found[0.0]) < 1e-12
    assert found[0.3] > 0.02
    assert found[-0.3] < -0.02
    swapped = dmd_gradient(law_at(0.3).sample(ROWS), x1, tau, teacher=exact(law_at(0.3, path)), fake=data, path=path)
    assert swapped.mean() < -0.02, "the two networks in each other's place go the wrong way"


def test_gradient_is_the_papers_formula_on_the_linear_path() -> None:
    """Check delta against both formulas: of the velocities, and of the scores times tau^2 / (1 - tau)."""
    samples, noise = law_at(0.3).sample(8), torch.randn(8, 2, dtype=torch.float64)
    tau = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    data, own = law_at(0.0), law_at(0.3, factor=1.4)
    x = LINEAR.interpolate(samples, noise, tau)
    column = tau[:, None]
    scale = (samples - (x - column * data.velocity(x, tau))).abs().mean(1, keepdim=True)
    delta = dmd_gradient(samples, noise, tau, teacher=exact(data), fake=exact(own))
    torch.testing.assert_close(delta, column * (data.velocity(x, tau) - own.velocity(x, tau)) / scale)
    scores = own.score(x, tau) - data.score(x, tau)
    torch.testing.assert_close(delta, column**2 / (1 - column) * scores / scale)


def test_loss_has_delta_as_its_gradient_and_no_other_network_has_one() -> None:
    samples, delta = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = surrogate(samples, delta)
    (dsamples,) = torch.autograd.grad(loss, samples)
    torch.testing.assert_close(dsamples, delta / 12)
    torch.testing.assert_close(loss.detach(), 0.5 * delta.square().mean())
    factors = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    laws = [law_at(shift) for shift in (0.0, 0.2, 0.4)]
    nets = [lambda x, t, s, y=None, a=a, law=law: a * law.velocity(x, t) for a, law in zip(factors, laws)]
    x0, x1, t = batch(16)
    loss, _ = dmd(nets[0], x0, x1, t, teacher=nets[1], fake=nets[2])
    loss.backward()
    assert factors[0].grad is not None
    assert factors[0].grad != 0
    assert factors[1].grad is None
    assert factors[2].grad is None


def test_descent_brings_a_generator_to_the_data() -> None:
    """Check G = scale x1 + shift in one step, with its exact fake score: it ends at the data's mean and deviation."""
    mean, deviation = torch.tensor([0.8], dtype=torch.float64), 0.5
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.03)
    teacher = exact(Gaussian(mean, torch.tensor([[deviation**2]]).double()))

    def generator(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return x - (scale * x + shift)

    for _ in range(300):
        x1 = torch.randn(256, 1, dtype=torch.float64)
        own = exact(Gaussian(shift.detach()[None], scale.detach().square()[None, None]))
        loss, _ = dmd(generator, x1, x1, torch.ones(256).double(), teacher=teacher, fake=own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(shift.item() - 0.8) < 0.1
    assert abs(scale.item() - 0.5) < 0.1


def test_fake_score_learns_the_velocity_of_the_samples() -> None:
    """Check that its loss is flow matching on detached samples."""
    samples = torch.randn(64, 2, requires_grad=True)
    noise, tau = torch.randn(64, 2), torch.rand(64)
    net = nn.Linear(2, 2)
    loss, metrics = fake_score_loss(lambda x, t, s, y: net(x), samples, noise, tau, path=Cosine())
    truth, _ = flow_matching(lambda x, t, s, y: net(x), samples.detach(), noise, tau, path=Cosine())
    assert torch.equal(loss, truth)
    loss.backward()
    assert samples.grad is None
    assert net.weight.grad is not None
    assert metrics["raw_error"] > 0


def test_own_inputs_are_what_sampling_makes() -> None:
    """Check by hand on the linear path, with the same noise: each row's state at its own time, without gradient."""
    times, x1 = [1.0, 0.7, 0.4], torch.randn(6, 2, dtype=torch.float64)
    t = torch.tensor([1.0, 0.7, 0.4, 0.4, 0.7, 1.0])
    net = exact(law_at(0.2))
    states = simulate(net, x1, t, times, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    first = x1 - law_at(0.2).average_velocity(x1, torch.ones(6).double(), torch.zeros(6).double())
    second = 0.3 * first + 0.7 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    jump = law_at(0.2).average_velocity(second, torch.full((6,), 0.7).double(), torch.zeros(6).double())
    third = 0.6 * (second - 0.7 * jump) + 0.4 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    rows = {1.0: x1, 0.7: second, 0.4: third}
    expected = torch.stack([rows[round(time, 1)][i] for i, time in enumerate(t.tolist())])
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("path", [EDM(), VE(), Cosine()], ids=lambda path: type(path).__name__)
def test_a_generator_of_one_step_never_sees_data(path: Path) -> None:
    """Check that it starts from the sampler's own prior where data don't fade, and later from states of the path."""
    x0, x1, _ = batch(8)
    t = torch.tensor([1.0, 0.5] * 4, dtype=torch.float64)
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        seen.append(x)
        return 0 * x

    own = exact(law_at(0.0, path))
    dmd(net, x0, x1, t, teacher=own, fake=own, path=path)
    assert torch.equal(seen[0][::2], path.prior(x1)[::2])
    assert torch.equal(seen[0][1::2], path.interpolate(x0, x1, t)[1::2])


def test_backward_simulation_replaces_noised_data() -> None:
    x0, x1, _ = batch(8)
    t = torch.tensor([1.0, 0.5] * 4, dtype=torch.float64)
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert (s == 0).all()
        seen.append(x)
        return law_at(0.0).average_velocity(x, t, s)

    def inputs(**options: Any) -> Tensor:
        dmd(net, x0, x1, t, teacher=exact(law_at(0.0)), fake=exact(law_at(0.0)), **options)
        return seen[-1]

    assert torch.equal(inputs(), LINEAR.interpolate(x0, x1, t))
    simulated = inputs(backward_simulation=[1.0, 0.5], generator=torch.Generator().manual_seed(2))
    assert torch.equal(simulated, simulate(net, x1, t, [1.0, 0.5], generator=torch.Generator().manual_seed(2)))
    assert torch.equal(simulated[::2], x1[::2])
    assert not torch.allclose(simulated[1::2], LINEAR.interpolate(x0, x1, t)[1::2])


def test_adversarial_losses_are_logistic_and_reach_the_right_network() -> None:
    weight = torch.tensor([1.0, -0.5], requires_grad=True)

    def gan(x: Tensor, tau: Tensor, y: Tensor | None) -> Tensor:
        return x @ weight + tau

    x0, samples, noise = torch.randn(3, 16, 2).unbind()
    samples, tau = samples.clone().requires_grad_(), torch.rand(16)
    false, true = (gan(LINEAR.interpolate(x.detach(), noise, tau), tau, None) for x in (samples, x0))
    critic = gan_critic_loss(gan, x0, samples, noise, tau)
    torch.testing.assert_close(critic, -(true.sigmoid().log() + (1 - false.sigmoid()).log()).mean())
    critic.backward()
    assert samples.grad is None
    assert weight.grad is not None
    generator = gan_generator_loss(gan, samples, noise, tau)
    torch.testing.assert_close(generator, softplus(-false).mean())
    (dsamples,) = torch.autograd.grad(generator, samples)
    assert (dsamples @ weight.detach() < 0).all(), "downhill is towards what the discriminator takes for data"


def test_adversarial_loss_is_added_with_its_weight() -> None:
    x0, x1, t = batch(16)

    def gan(x: Tensor, tau: Tensor, y: Tensor | None) -> Tensor:
        return x.sum(1) + tau

    def loss(**options: Any) -> tuple[Tensor, dict[str, Any]]:
        own = exact(law_at(0.3))
        return dmd(
            own, x0, x1, t, teacher=exact(law_at(0.0)), fake=own, generator=torch.Generator().manual_seed(1), **options
        )

    plain, with_gan = loss()[0], loss(gan=gan, gan_weight=0.5)
    torch.testing.assert_close(with_gan[0], plain + 0.5 * with_gan[1]["gan_loss"])
    assert "gan_loss" not in loss()[1]
    assert "terms" not in loss()[1], "a single one"
    terms = with_gan[1]["terms"]
    assert torch.equal(terms["score"], plain)
    assert torch.equal(terms["score"] + terms["gan"], with_gan[0])
    assert torch.equal(plain, loss()[0]), "a function of the generator's seed"


def test_labels_and_guidance_reach_the_teacher_and_labels_the_others() -> None:
    x0, x1, t = batch(4)
    labels = torch.tensor([0, 1, 2, 2])
    seen: dict[str, list[Tensor | None]] = {"net": [], "teacher": [], "fake": []}

    def named(name: str) -> Callable[..., Tensor]:
        def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
            seen[name].append(y)
            assert y is not None
            return (y[:, None] + 1) * x

        return net

    guidance = Guidance(omega=2.0, null=3)
    _, metrics = dmd(
        named("net"), x0, x1, t, teacher=named("teacher"), fake=named("fake"), y=labels, guidance=guidance,
        levels=Constant(0.5), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert seen["net"] == [labels] and seen["fake"] == [labels]
    (both,) = seen["teacher"]
    assert both is not None
    assert both.tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    samples = x1 - (labels[:, None] + 1) * x1
    x = 0.5 * samples + 0.5 * noise
    v_guided = 4 * x + 2.0 * ((labels[:, None] + 1) * x - 4 * x)
    difference = 0.5 * (v_guided - (labels[:, None] + 1) * x)
    torch.testing.assert_close(metrics["raw_error"], difference.square().mean())


def test_registry_names_what_it_needs_and_the_paths_that_have_a_score() -> None:
    row = objectives.get("dmd")
    assert row.function is dmd
    assert row.needs == {"teacher", "fake"}
    assert row.sampler in samplers.SAMPLERS
    assert row.paths == {name for name, path in paths.PATHS.items() if path.coupling == "independent"}
    assert {"gan", "gan_weight", "backward_simulation"} <= set(row.options)


def test_bad_arguments_are_refused_by_name() -> None:
    x0, x1, t = batch(4)
    net = exact(law_at(0.0))

    def call(**options: Any) -> object:
        return dmd(net, x0, x1, options.pop("t", t), teacher=net, fake=net, **options)

    with pytest.raises(ValueError, match=r"^t: expected shape \(4,\)"):
        call(t=t[:3])
    with pytest.raises(ValueError, match=r"^path: .* got OTCFM"):
        call(path=OTCFM())
    for name in ("teacher", "fake"):
        networks: dict[str, Any] = {"teacher": net, "fake": net, name: None}
        with pytest.raises(ValueError, match=rf"^{name}: expected a network, which matching of scores needs, got None"):
            dmd(net, x0, x1, t, **networks)
    with pytest.raises(ValueError, match=r"^y: expected labels for guidance"):
        call(guidance=Guidance(omega=2.0, null=3))
    with pytest.raises(ValueError, match=r"^backward_simulation: expected falling times that start at 1, got \[0.9\]"):
        call(backward_simulation=[0.9])
    with pytest.raises(ValueError, match=r"^steps: expected two or more falling times"):
        call(backward_simulation=[1.0, 0.5, 0.6])
    with pytest.raises(ValueError, match=r"^t: expected times among \[1.0, 0.5\], got 0.7"):
        call(t=torch.full((4,), 0.75).double() - 0.05, backward_simulation=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"^gan: expected logits of shape \(4,\), one a row, got \(4, 2\)"):
        call(gan=lambda x, tau, y: x)
