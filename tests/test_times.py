"""Test laws of times: they are reproducible, ordered, and have the requested share of distinct rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill import objectives, times
from fastdistill.paths import EDM, LINEAR, VE, Cosine, Path, TrigFlow
from fastdistill.times import (
    ArctanLogNormal,
    KarrasLevel,
    LogitNormal,
    LogNormalLevel,
    ShiftedLevel,
    TimeSampler,
    Uniform,
    distinct_rows,
    pair_times,
)

COUNT = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "sampler",
    [
        LogitNormal(),
        Uniform(),
        ArctanLogNormal(),
        LogNormalLevel(EDM()),
        KarrasLevel(LINEAR),
        ShiftedLevel(LINEAR),
    ],
)
def test_times_are_a_function_of_the_generator_seed(sampler: TimeSampler) -> None:
    assert torch.equal(sampler(64, seeded(3)), sampler(64, seeded(3)))
    assert not torch.equal(sampler(64, seeded(3)), sampler(64, seeded(4)))


def test_times_without_a_generator_follow_the_global_seed() -> None:
    torch.manual_seed(5)
    first = LogitNormal()(64)
    torch.manual_seed(5)
    assert torch.equal(first, LogitNormal()(64))


def test_logit_normal_has_its_mean_and_deviation_before_the_sigmoid() -> None:
    count = 100_000
    logits = LogitNormal(-0.4, 1.6)(count, seeded()).double().logit()
    five_sigma = 5 * 1.6 / math.sqrt(count)
    assert abs(logits.mean().item() + 0.4) < five_sigma
    assert abs(logits.std().item() - 1.6) < five_sigma


def test_uniform_keeps_to_its_bounds_and_fills_them() -> None:
    times = Uniform(0.2, 0.6)(100_000, seeded())
    assert 0.2 <= times.min() < 0.201
    assert 0.599 < times.max() < 0.6 + 1e-6
    assert abs(times.mean().item() - 0.4) < 0.002


@pytest.mark.parametrize(("distinct", "count"), [(0.0, 0), (0.25, 16), (0.3, 19), (1.0, 64)])
def test_exactly_the_asked_share_of_rows_is_distinct_and_comes_first(distinct: float, count: int) -> None:
    t, s = pair_times(64, LogitNormal(), distinct, generator=seeded())
    assert distinct_rows(64, distinct) == count
    assert (s[:count] < t[:count]).all()
    assert torch.equal(s[count:], t[count:])
    assert t.shape == s.shape == (64,)
    assert t.dtype == s.dtype == torch.float32
    assert s.min() >= 0
    assert t.max() <= 1


def test_the_share_of_distinct_rows_leaves_t_as_it_was() -> None:
    """Check that t is the larger of two draws in every row, with s = t or not."""
    draws = [pair_times(64, LogitNormal(), share, generator=seeded(1))[0] for share in (0.0, 0.5, 1.0)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    first, second = (Uniform()(20_000, generator) for generator in [seeded(2)] for _ in range(2))
    assert torch.equal(pair_times(20_000, Uniform(), 0.0, generator=seeded(2))[0], torch.maximum(first, second))


def test_a_second_law_moves_the_ends_towards_the_data() -> None:
    t, s = pair_times(10_000, LogitNormal(-0.6, 1.6), 1.0, end_sampler=LogitNormal(-4.0, 1.6), generator=seeded())
    _, same = pair_times(10_000, LogitNormal(-0.6, 1.6), 1.0, generator=seeded())
    assert s.median() < 0.05 < same.median()
    assert (s <= t).all()


def near(draws: Tensor, mean: float, std: float) -> bool:
    """Return whether draws have a normal law's moments, to five of their own deviations."""
    off = 5 * std / math.sqrt(len(draws))
    return abs(draws.mean().item() - mean) < off and abs(draws.std().item() - std) < off


def test_arctan_log_normal_has_its_law_before_the_arctan() -> None:
    t = ArctanLogNormal(-0.8, 1.6, 0.5)(COUNT, seeded()).double()
    assert t.min() >= 0
    assert t.max() <= 1
    assert near((0.5 * (0.5 * math.pi * t).tan()).log(), -0.8, 1.6)


def test_arctan_log_normal_is_the_level_law_of_trigflow() -> None:
    """Check sCM's angle: sigma = sigma_data tan(a) is the noise level of its path."""
    by_angle = ArctanLogNormal(-1.0, 1.4, 0.5)(1000, seeded(2))
    by_level = LogNormalLevel(TrigFlow(0.5), -1.0, 1.4)(1000, seeded(2))
    torch.testing.assert_close(by_angle, by_level)


@pytest.mark.parametrize("path", [LINEAR, Cosine(), EDM(1e-5, 1e5), VE(1e-5, 1e5)], ids=repr)
def test_level_law_is_log_normal_in_the_noise_level_of_any_path(path: Path) -> None:
    t = LogNormalLevel(path, -1.1, 2.0)(COUNT, seeded())
    assert t.dtype == torch.float32
    assert near(times.level_of_time(path, t).log(), -1.1, 2.0)
    levels = torch.tensor([1e-3, 0.5, 7.0, 50.0])
    torch.testing.assert_close(
        times.level_of_time(path, times.time_of_level(path, levels)).float(), levels, rtol=1e-4, atol=0
    )


def test_karras_levels_are_edms_times_and_the_same_levels_on_every_path() -> None:
    """Check shares of its grid; a path that ends at less noise, or starts at more, has a grid between its own ends."""
    share = Uniform(0.02, 0.98)(COUNT, seeded())
    torch.testing.assert_close(KarrasLevel(EDM())(COUNT, seeded()), share, rtol=0, atol=1e-5)
    level = EDM().beta(share.double())
    for path in (LINEAR, Cosine(), TrigFlow(0.5)):
        t = KarrasLevel(path)(COUNT, seeded())
        torch.testing.assert_close(times.level_of_time(path, t), level, rtol=1e-3, atol=1e-6)
    short = EDM(0.1, 4.0)
    torch.testing.assert_close(KarrasLevel(short, 0, 1)(64, seeded()), Uniform()(64, seeded()), rtol=0, atol=1e-5)


def test_shifted_levels_are_a_uniform_time_pushed_towards_the_noise() -> None:
    """Check 5 q / (1 + 4 q) on the linear path, and the same noise on any other."""
    q = Uniform()(COUNT, seeded())
    t = ShiftedLevel(LINEAR, 5.0)(COUNT, seeded())
    torch.testing.assert_close(t, 5 * q / (1 + 4 * q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ShiftedLevel(LINEAR, 1.0)(COUNT, seeded()), q, rtol=1e-5, atol=1e-6)
    angle = ShiftedLevel(Cosine(), 5.0)(1000, seeded()).double() * math.pi / 2
    torch.testing.assert_close(angle.tan(), times.level_of_time(LINEAR, t[:1000]), rtol=1e-2, atol=1e-6)


def test_triangle_is_uniform_and_so_is_its_diagonal() -> None:
    """Check the moments on a triangle, E t = 2/3, E s = 1/3, E ts = 1/4, and on the diagonal, E t = 1/2."""
    t, s = times.triangle_times(COUNT, 0.5, generator=seeded())
    off = 5 / math.sqrt(COUNT // 2)
    assert (s[: COUNT // 2] < t[: COUNT // 2]).all()
    assert torch.equal(s[COUNT // 2 :], t[COUNT // 2 :])
    upper_t, upper_s, diagonal = t[: COUNT // 2], s[: COUNT // 2], t[COUNT // 2 :]
    assert abs(upper_t.mean() - 2 / 3) < off
    assert abs(upper_s.mean() - 1 / 3) < off
    assert abs((upper_t * upper_s).mean() - 1 / 4) < off
    assert abs(diagonal.mean() - 1 / 2) < off
    assert abs(diagonal.square().mean() - 1 / 3) < off


def test_gaps_have_their_law_and_starts_are_uniform_below() -> None:
    t, s = times.gap_times(COUNT, LogitNormal(-0.8, 1.0), generator=seeded())
    assert (s <= t).all()
    assert s.min() >= 0
    assert t.max() <= 1
    gap = (t - s).double()
    assert near(gap.logit(), -0.8, 1.0)
    place = s / (1 - gap)
    assert abs(place.mean() - 0.5) < 0.01
    assert abs(((place - 0.5) * (gap - gap.mean())).mean()) < 0.002, "independent of the gap"
    t, s = times.gap_times(64, Uniform(), 0.25, generator=seeded())
    assert (s[:16] < t[:16]).all()
    assert torch.equal(s[16:], t[16:])


def test_dyadic_times_lie_on_their_grid() -> None:
    t, delta = times.dyadic_times(COUNT, 0.5, generator=seeded())
    half = COUNT // 2
    steps, counts = (2 * delta[:half]).unique(return_counts=True)
    assert steps.tolist() == [2.0**-k for k in range(6, -1, -1)]
    assert (counts / half - 1 / 7).abs().max() < 0.01
    slots = t[:half] / (2 * delta[:half])
    assert torch.equal(slots, slots.round())
    assert (t[:half] - 2 * delta[:half] >= 0).all()
    assert t.max() <= 1
    ends = t[:half][delta[:half] == 0.25]
    assert abs((ends == 1.0).float().mean() - 0.5) < 0.05, "both halves, as often"
    assert (delta[half:] == 0).all()
    assert abs(t[half:].mean() - 0.5) < 0.01
    assert times.dyadic_times(8, 1.0, finest=2, generator=seeded())[1].unique().tolist() == [0.5]


@pytest.mark.parametrize("path", [LINEAR, Cosine(), EDM()], ids=repr)
def test_imm_times_are_ordered_shared_in_groups_and_a_fixed_step_of_noise_apart(path: Path) -> None:
    t, r, s = times.imm_times(4000, 4, path=path, k=7, generator=seeded())
    for value in (t, r, s):
        assert value.dtype == torch.float32
        groups = value.reshape(-1, 4)
        assert torch.equal(groups, groups[:, :1].expand(-1, 4))
    assert (s <= r).all()
    assert (r <= t).all()
    assert t.max() <= 0.994
    assert (r < t).float().mean() > 0.99
    low, high = times.level_of_time(path, torch.tensor([0.0, 0.994]))
    inside = r > s
    steps = (times.level_of_time(path, t) - times.level_of_time(path, r))[inside]
    assert inside.sum() > 100
    scale = times.level_of_time(path, t)[inside]
    assert ((steps - (high - low) / 2**7).abs() < 1e-4 * (1 + scale)).all()
    wider = times.imm_middle(t, s, path=path, k=3)
    assert (wider <= r).all()
    assert (wider < r).any()


def test_imm_times_stay_above_the_data_where_the_draw_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda batch, generator, **where: torch.zeros(batch, **where))
    t, r, s = times.imm_times(8, 2, k=7, generator=seeded())
    assert (t > 0).all()
    assert not r.any()
    x0, x1 = torch.randn(2, 8, 3, generator=seeded())
    loss, _ = objectives.imm(lambda x, **_: x, x0, x1, t, r, s, group=2)
    assert loss.isfinite()


def test_neighbours_are_one_slot_apart_and_even_or_weighted() -> None:
    t, r = times.neighbour_times(COUNT, 18, generator=seeded())
    slots = (r * 17).round()
    torch.testing.assert_close(t - r, torch.full((COUNT,), 1 / 17))
    assert (torch.bincount(slots.long(), minlength=17) / COUNT - 1 / 17).abs().max() < 0.005
    assert (t.max().item(), r.min().item()) == (1, 0)
    path = EDM()
    t, r = times.neighbour_times(COUNT, 11, log_normal=(-1.1, 2.0), generator=seeded())
    levels = path.beta(torch.linspace(0, 1, 11, dtype=torch.float64))
    mass = torch.erf((levels.log() + 1.1) / (2.0 * math.sqrt(2))).diff()
    found = torch.bincount((r * 10).round().long(), minlength=10) / COUNT
    assert (found - mass / mass.sum()).abs().max() < 0.005
    assert (times.neighbour_times(9, 2)[0] == 1).all()


def test_numbers_of_points_follow_the_papers_schedules() -> None:
    assert [times.ct_points(k, 800) for k in (0, 800)] == [2, 151]
    assert times.ct_points(200, 800) == math.ceil(math.sqrt((151**2 - 4) / 4 + 4) - 1) + 1
    assert [times.ict_points(k, 800) for k in (0, 99, 100, 200, 699, 700, 800)] == [11, 11, 21, 41, 641, 1281, 1281]
    assert [times.ect_stage(k, 80) for k in (0, 9, 10, 79, 80)] == [0, 0, 1, 7, 7]


def test_ect_levels_are_the_papers_and_approach_each_other() -> None:
    sigma = torch.tensor([0.01, 1.0, 10.0, 80.0], dtype=torch.float64)
    sigmoid = 1 / (1 + sigma.exp())
    torch.testing.assert_close(times.ect_level(sigma, 3), sigma * (1 - (1 + 8 * sigmoid) / 16))
    assert times.ect_level(sigma, 0)[0] == 0
    gaps = [(sigma - times.ect_level(sigma, stage, q=4)) / sigma for stage in (2, 3)]
    torch.testing.assert_close(gaps[0], 4 * gaps[1])
    t, r = times.ect_times(COUNT, 7, generator=seeded())
    assert (r < t).all()
    level, start = (times.level_of_time(EDM(), value) for value in (t, r))
    expected = times.ect_level(level, 7).clamp_min(0.002)
    assert ((start - expected).abs() < 1e-4 * level + 1e-5).all()
    first = times.ect_times(COUNT, 0, generator=seeded())[1]
    assert 0.5 < (first == 0).float().mean() < 0.99


@pytest.mark.parametrize(
    "law",
    [
        lambda generator: times.triangle_times(64, 0.5, generator=generator),
        lambda generator: times.gap_times(64, LogitNormal(), generator=generator),
        lambda generator: times.dyadic_times(64, generator=generator),
        lambda generator: times.imm_times(64, generator=generator),
        lambda generator: times.neighbour_times(64, 10, generator=generator),
        lambda generator: times.ect_times(64, 2, generator=generator),
    ],
)
def test_joint_laws_are_functions_of_the_generator_seed(law: Callable[[torch.Generator], tuple[Tensor, ...]]) -> None:
    first, again, other = law(seeded(3)), law(seeded(3)), law(seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(value.shape == (64,) and value.dtype == torch.float32 for value in first)


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^std: .* > 0, got 0"):
        LogitNormal(0.0, 0.0)
    with pytest.raises(ValueError, match=r"^mean: .* finite number, got nan"):
        LogitNormal(math.nan, 1.0)
    with pytest.raises(ValueError, match=r"^low, high: .* got 0.5, 0.5"):
        Uniform(0.5, 0.5)
    with pytest.raises(ValueError, match=r"^distinct: .* got 1.5"):
        pair_times(8, Uniform(), 1.5)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: ArctanLogNormal(sigma_data=0), r"^sigma_data: .* got 0"),
        (lambda: ArctanLogNormal(std=-1), r"^std: "),
        (lambda: LogNormalLevel(EDM(), math.inf), r"^mean: "),
        (lambda: KarrasLevel(EDM(), 0.9, 0.1), r"^low, high: .* got 0.9, 0.1"),
        (lambda: KarrasLevel(EDM(), rho=0.5), r"^rho: .* >= 1, got 0.5"),
        (lambda: ShiftedLevel(LINEAR, 0.0), r"^shift: .* > 0, got 0"),
        (lambda: times.triangle_times(8, 1.5), r"^distinct: "),
        (lambda: times.gap_times(8, Uniform(), -0.1), r"^distinct: "),
        (lambda: times.dyadic_times(8, finest=100), r"^finest: expected a power of 2, at least 2, got 100"),
        (lambda: times.dyadic_times(8, finest=1), r"^finest: "),
        (lambda: times.imm_times(10, 4), r"^group: expected a divisor of the batch, 10, got 4"),
        (lambda: times.imm_times(8, 0), r"^group: "),
        (lambda: times.imm_times(8, high=1.0), r"^low, high: .* finite noise level, got 0.0, 1.0"),
        (lambda: times.imm_times(8, low=0.5, high=0.4), r"^low, high: "),
        (lambda: times.imm_times(8, k=-1), r"^k: "),
        (lambda: times.neighbour_times(8, 1), r"^points: expected at least 2, got 1"),
        (lambda: times.neighbour_times(8, 10, log_normal=(0.0, 0.0)), r"^std: "),
        (lambda: times.neighbour_times(8, 10, log_normal=(900.0, 0.1)), r"^log_normal: "),
        (lambda: times.ct_points(9, 8), r"^step: expected a number in \[0, 8\], got 9"),
        (lambda: times.ict_points(1, 8, start=5, end=4), r"^start, end: "),
        (lambda: times.ect_times(8, -1), r"^stage: "),
        (lambda: times.ect_times(8, 1, q=1.0), r"^q: "),
        (lambda: times.ect_times(8, 1, low=0.0), r"^low: "),
        (lambda: times.ect_stage(9, 8), r"^step, total, stages: "),
    ],
)
def test_bad_settings_of_joint_laws_are_refused_by_name(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
