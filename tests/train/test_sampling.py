"""Samples: pure functions of the seed, with or without labels and guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.samplers import PARAMETERS, SPECS, Learnt, Parameter, Sampler
from fastdistill.train import ConfigError, generate
from fastdistill.train.run import build_network
from fastdistill.train.sampling import OWN, Sampling
from tests.train.conftest import MakeConfig


def serving(*learnt: Learnt) -> str:
    """Return the names of the samplers that a network which learnt this serves."""
    return ", ".join(name for name, spec in SPECS.items() if spec.serves(learnt))


class Recorder(torch.nn.Module):
    """Network that stays at zero and remembers its labels and times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels: list[Tensor | None] = []
        self.times: list[tuple[float, float]] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.labels.append(y)
        self.times.append((round(t[0].item(), 6), round(s[0].item(), 6)))
        return x * self.weight


def test_a_seed_gives_the_same_samples_and_another_seed_others(tiny: MakeConfig) -> None:
    """Check that the caller's generator plays no part."""
    config = tiny()
    net = build_network(config)
    first = generate(net, config, 5)
    torch.manual_seed(99)
    assert torch.equal(generate(net, config, 5), first)
    assert not torch.equal(generate(net, config, 5, seed=1), first)
    assert first.shape == (5, 2)


def test_labels_are_one_class_or_all_in_turn(tiny_digits: MakeConfig) -> None:
    """Check also that steps count the calls."""
    net, config = Recorder(), tiny_digits()
    generate(net, config, 12, steps=3)
    generate(net, config, 2, label=7)
    assert [y.tolist() for y in net.labels if y is not None] == [[*range(10), 0, 1]] * 3 + [[7, 7]]


def test_a_generator_of_several_steps_starts_at_the_times_it_was_trained_at(tiny: MakeConfig) -> None:
    """Check as many steps as it has times, here uneven ones, and other numbers of steps, which are equal."""
    config = tiny(method={"name": "dmd", "generator_times": (1.0, 0.9, 0.3)}, teacher="x")
    for steps, starts in ((3, [1.0, 0.9, 0.3]), (2, [1.0, 0.5]), (4, [1.0, 0.75, 0.5, 0.25])):
        net = Recorder()
        generate(net, config, 2, steps=steps)
        assert net.times == [(t, 0.0) for t in starts]


def test_imm_starts_at_the_last_time_that_it_learnt(tiny: MakeConfig) -> None:
    """Check that it doesn't start at 1, where its noise level may be infinite."""
    net = Recorder()
    generate(net, tiny(method={"name": "imm", "high": 0.75}), 2, steps=3)
    assert net.times == [(0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]


def test_a_run_is_measured_in_the_steps_that_it_learnt(tiny: MakeConfig) -> None:
    """Check a generator in as many steps as it has times, a distilled ReFlow in one, and the others in all."""
    for method, expected in (
        ({"name": "dmd", "generator_times": (1.0, 0.5)}, [1, 2]),
        ({"name": "dmd", "generator_times": (1.0, 0.9, 0.3)}, [1]),  # two and four equal steps start elsewhere
        ({"name": "rcm"}, [1, 2, 4, 8]),
        ({"name": "reflow", "distil": True}, [1]),
        ({"name": "reflow"}, [1, 2, 4, 8]),
    ):
        config = tiny(method=method | {"sample_steps": 1}, teacher="x")
        assert OWN.resolve(config).measured_steps(config, (1, 2, 4, 8)) == expected


def test_guidance_pairs_labels_with_none(tiny_digits: MakeConfig) -> None:
    """Check that it is on one doubled batch."""
    net = Recorder()
    generate(net, tiny_digits(), 2, label=3, guidance=2.0)
    assert net.labels[0] is not None
    assert net.labels[0].tolist() == [3, 3, 10, 10]


def test_imm_s_jumps_are_guided_and_those_of_a_learnt_guidance_are_not(tiny_digits: MakeConfig) -> None:
    """Check guidance by pairs where labels were dropped, refused where it is in the target, or nowhere."""
    imm, net = tiny_digits(method={"name": "imm", "sample_guidance": 2.0}), Recorder()
    generate(net, imm, 2, label=3)
    generate(net, imm, 1, label=3, sampler="gamma", guidance=1.5)
    generate(net, imm, 1, label=3, sampler="consistency", guidance=1.0)
    assert [y.tolist() for y in net.labels if y is not None] == [[3, 3, 10, 10], [3, 10], [3]]
    undropped = tiny_digits(method={"name": "imm"}, data={"name": "digits"})
    with pytest.raises(ConfigError, match="guidance: the run never learnt what no label means"):
        generate(net, undropped, 1, guidance=2.0)
    with pytest.raises(ConfigError, match="guidance: a network of ect has no guidance, so expected 1, got 2"):
        generate(net, tiny_digits(method={"name": "ect"}), 1, guidance=2.0)


def test_noise_on_the_way_follows_from_the_seed(tiny: MakeConfig) -> None:
    """Check that a sampler that renoises repeats itself, and that gamma goes from the jumps of the map to it."""
    config = tiny()
    net = build_network(config)

    def draw(**how: Any) -> Tensor:
        return generate(net, config, 6, steps=3, **how)

    assert torch.equal(draw(sampler="consistency"), draw(sampler="consistency"))
    assert not torch.equal(draw(sampler="consistency"), draw(sampler="consistency", seed=1))
    assert torch.equal(draw(sampler="gamma", gamma=0.0), draw())
    torch.testing.assert_close(draw(gamma=1.0), draw(sampler="consistency"))
    assert not torch.equal(draw(gamma=0.5), draw())


@pytest.mark.parametrize("changes", [{"path": {"name": "ot_cfm"}}, {"coupling": "optimal_transport"}])
def test_coupled_noise_is_not_renewed(tiny: MakeConfig, changes: dict[str, Any]) -> None:
    """Check that several steps of fresh noise are refused, and that one step, and jumps along the map, serve."""
    config = tiny(**changes)
    for how in ({"sampler": "consistency"}, {"gamma": 0.5}):
        generate(Recorder(), config, 2, **how)
        with pytest.raises(ConfigError, match=r"steps: .* adds fresh noise between steps, .* expected 1, got 2"):
            generate(Recorder(), config, 2, steps=2, **how)
    for how in ({}, {"gamma": 0.0}, {"sampler": "heun"}):
        generate(Recorder(), config, 2, steps=2, **how)


def test_a_network_told_its_guidance_gets_it_as_an_input(tiny_digits: MakeConfig) -> None:
    """Check that there is no pair of evaluations."""
    method = {"name": "improved_meanflow", "guidance": {"scale": 1.0, "scale_to": 3.0}}
    config = tiny_digits(method=method, model={"preset": "mlp-digits", "width": 8, "depth": 1, "guidance": True})
    net = build_network(config)
    assert torch.equal(generate(net, config, 4), generate(net, config, 4, guidance=1.0))
    assert not torch.equal(generate(net, config, 4, guidance=1.0), generate(net, config, 4, guidance=2.5))


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        (
            "flow_matching",
            {"sampler": "average_velocity"},
            f"a network of flow_matching serves {serving('velocity')}, got",
        ),
        ("ect", {"sampler": "euler"}, "a network of ect serves consistency, got euler"),
        ("ect", {"gamma": 0.5}, "gamma: expected none, .* a network of ect serves consistency; got 0.5"),
        ("ect", {"gamma": 7.0}, "gamma: expected none, .* a network of ect serves consistency; got 7.0"),
        ("ect", {"sampler": "gamma", "gamma": 0.5}, "sampler: a network of ect serves consistency, got gamma"),
        ("facm", {"sampler": "average_velocity"}, f"a network of facm serves {serving('velocity', 'end')}, got"),
        ("meanflow", {"sampler": "ddim"}, "sampler: expected one of euler, .*, got 'ddim'"),
        ("meanflow", {"gamma": 1.5}, r"gamma: expected in \[0, 1\], got 1.5"),
        ("meanflow", {"sampler": "consistency", "gamma": 0.5}, "gamma: expected none with the sampler consistency"),
    ],
)
def test_a_sampler_that_a_network_was_not_trained_for_is_refused(
    tiny: MakeConfig, method: str, how: dict[str, Any], message: str
) -> None:
    """Check that it says which ones the network serves."""
    config = tiny(method={"name": method})
    with pytest.raises(ConfigError, match=message):
        generate(build_network(config), config, 2, **how)


def test_what_a_run_cannot_serve_is_named(tiny: MakeConfig, tiny_digits: MakeConfig) -> None:
    """Check labels outside the classes, labels without classes, and guidance where none was learnt."""
    net, ring, digits = Recorder(), tiny(), tiny_digits()
    undropped = tiny_digits(data={"name": "digits"})
    meanflow = tiny_digits(method={"name": "meanflow"})
    with pytest.raises(ConfigError, match="label: expected one of 0 to 9, got 10"):
        generate(net, digits, 1, label=10)
    with pytest.raises(ConfigError, match="label: expected none, because ring has no labels, got 0"):
        generate(net, ring, 1, label=0)
    with pytest.raises(ConfigError, match="guidance: the run never learnt"):
        generate(net, undropped, 1, guidance=2.0)
    with pytest.raises(ConfigError, match="guidance: a network of meanflow has its guidance built in"):
        generate(net, meanflow, 1, guidance=2.0)


def planted(*parameters: str) -> Sampler:
    """Return one more sampler of maps, which takes these parameters and nothing is done with."""

    def other(net: Any, x: Tensor, steps: Any, y: Any, **_: Any) -> Tensor:
        return x

    return Sampler(other, ("map",), 1, parameters={name: Parameter(0.5, 0.0, 1.0, "of mine") for name in parameters})


def test_parameters_alone_choose_the_one_sampler_that_takes_them(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the run's own is first, that one is named where several would do, and that together they fit one."""
    for name, spec in {"other": planted("gamma"), "third": planted("delta")}.items():
        monkeypatch.setitem(SPECS, name, spec)
    monkeypatch.setitem(PARAMETERS, "delta", Parameter(0.5, 0.0, 1.0, "of mine"))
    meanflow, ayf = tiny(), tiny(method={"name": "ayf_emd"}, teacher="x")
    with pytest.raises(ConfigError, match=r"^sampler: expected one of gamma, other, which take these parameters, got"):
        Sampling(gamma=0.5).resolve(meanflow)
    assert Sampling(gamma=0.5).resolve(ayf).sampler == "gamma"
    with pytest.raises(ConfigError, match=r"^gamma: expected parameters of one sampler, got {'gamma': 0.5, 'delta'"):
        Sampling(gamma=0.5, delta=0.5).resolve(meanflow)
    with pytest.raises(ConfigError, match=r"^gamma: .* only gamma, other take it; got 0.5"):
        Sampling("average_velocity", gamma=0.5).resolve(meanflow)


def test_a_parameter_of_no_sampler_is_a_mistake_in_the_call(tiny: MakeConfig) -> None:
    """Check that it suggests the nearest one."""
    config = tiny()
    with pytest.raises(TypeError, match=r"^gama: expected a parameter of a sampler; did you mean 'gamma'\?"):
        generate(build_network(config), config, 2, gama=0.5)
