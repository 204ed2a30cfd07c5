"""Laws of times: reproducible, ordered, and with the share of distinct rows that was asked for."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.times import LogitNormal, TimeSampler, Uniform, distinct_rows, pair_times


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", [LogitNormal(), Uniform()])
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
    """So the law of t is the larger of two draws in every row, with s = t or not."""
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


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^std: .* > 0, got 0"):
        LogitNormal(0.0, 0.0)
    with pytest.raises(ValueError, match=r"^mean: .* finite number, got nan"):
        LogitNormal(math.nan, 1.0)
    with pytest.raises(ValueError, match=r"^low, high: .* got 0.5, 0.5"):
        Uniform(0.5, 0.5)
    with pytest.raises(ValueError, match=r"^distinct: .* got 1.5"):
        pair_times(8, Uniform(), 1.5)
