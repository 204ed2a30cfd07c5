"""Test the gate itself: the tolerance rule refuses what it should, and the recorder counts rightly."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.testing import (
    MemoryRecorder,
    assert_accurate,
    cast,
    errors_against,
    make_packed,
    make_qkv,
    reference_jvp,
    reference_vjp,
    relative_error,
)

EPS = torch.finfo(torch.float32).eps


def off_by(error: float) -> Tensor:
    return torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) + torch.tensor([0.0, 0.0, error], dtype=torch.float64)


@pytest.mark.parametrize(("order", "factor"), [(1, 2), (2, 3)])
def test_an_error_passes_up_to_the_factor_and_no_further(order: int, factor: int) -> None:
    """Check 2 * err(baseline) + 2 * eps * max|truth|, and a factor of 3 for second order."""
    truth, baseline = off_by(0), off_by(1 / 64).float()
    limit = factor / 64 + 2 * EPS * 4
    assert_accurate(off_by(limit * 0.999), truth, baseline, name="x", order=order)
    with pytest.raises(AssertionError, match="x: error"):
        assert_accurate(off_by(limit * 1.001), truth, baseline, name="x", order=order)


def test_an_exact_baseline_leaves_room_for_one_rounding() -> None:
    """Check for 2 eps of the tested dtype and, in float64, where the truth itself is rounded, 1e-12."""
    assert_accurate(off_by(6 * EPS), off_by(0), off_by(0).float(), name="x")
    with pytest.raises(AssertionError, match="float32"):
        assert_accurate(off_by(9 * EPS), off_by(0), off_by(0).float(), name="x")
    assert_accurate(off_by(3.9e-12), off_by(0), off_by(0), name="x")
    with pytest.raises(AssertionError, match="float64"):
        assert_accurate(off_by(4.1e-12), off_by(0), off_by(0), name="x")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_anything_non_finite_fails(bad: float) -> None:
    """Check that it fails even if the baseline overflows too."""
    for role in ("actual", "baseline", "truth"):
        actual, truth, baseline = (off_by(bad if name == role else 0) for name in ("actual", "truth", "baseline"))
        with pytest.raises(AssertionError, match=f"x: {role} has 1 non-finite"):
            assert_accurate(actual, truth, baseline, name="x")


def test_a_wrong_shape_or_a_rounded_truth_is_refused() -> None:
    """Check both: broadcasting would hide a wrong shape, and a float32 truth proves nothing."""
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_accurate(off_by(0)[None], off_by(0), off_by(0), name="x")
    with pytest.raises(TypeError, match="truth of x: expected float64"):
        assert_accurate(off_by(0), off_by(0).float(), off_by(0), name="x")


def test_relative_error_is_of_the_norm() -> None:
    """Check that it is absolute where the truth is zero."""
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "packed"])
def test_layouts_are_the_views_that_they_say(layout: str) -> None:
    """Check that all have the shape (B, H, N, D), and the memory that their name says."""
    q, k, v = make_qkv(2, 3, 5, 7, layout=layout)
    assert q.shape == k.shape == v.shape == (2, 3, 5, 7)
    assert q.is_contiguous() == (layout == "bhnd")
    assert q.transpose(1, 2).is_contiguous() == (layout == "bnhd")
    assert (q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()) == (layout == "packed")
    assert not torch.equal(q, k)
    assert not torch.equal(q, make_qkv(2, 3, 5, 7, layout=layout, seed=1)[0])


def test_an_impossible_layout_is_refused() -> None:
    """Check an unknown name, and shapes that a packed tensor can't hold."""
    with pytest.raises(ValueError, match=r"^layout: expected .* got 'bdhn'"):
        make_qkv(layout="bdhn")
    with pytest.raises(ValueError, match=r"^layout: 'packed'"):
        make_qkv(layout="packed", m=5)


def test_packed_sequences_lie_between_their_bounds() -> None:
    """Check spare tokens at both ends, and the lengths that were asked for."""
    (q, k, v), (cu_n, cu_m, max_n, max_m) = make_packed((3, 0, 5), (2, 4, 1), 4, 8, kv_heads=2, dv=6, spare=2)
    assert [x.shape for x in (q, k, v)] == [(1, 4, 12, 8), (1, 2, 11, 8), (1, 2, 11, 6)]
    assert (cu_n.tolist(), cu_m.tolist(), max_n, max_m) == ([2, 5, 5, 10], [2, 4, 8, 9], 5, 4)
    assert cu_n.dtype == cu_m.dtype == torch.int32


def test_truths_by_autodiff_agree_with_hand_made_ones() -> None:
    """Check y = x^2 w along (t_x, none): t_y = 2 x t_x w, and the gradients of <dy, y> + <dt_y, t_y>."""
    x, w, t_x, dy, dt_y = torch.randn(5, 3, dtype=torch.float64)

    def fn(x: Tensor, w: Tensor, mask: None) -> Tensor:
        return x.square() * w

    primals, tangents = {"x": x, "w": w, "mask": None}, {"x": t_x, "w": None}
    y, t_y = reference_jvp(fn, primals, tangents)
    torch.testing.assert_close((y, t_y), (x * x * w, 2 * x * t_x * w))
    assert reference_jvp(fn, primals, {})[1].eq(0).all()
    gradients = reference_vjp(fn, primals, tangents, dy, dt_y)
    expected = {"x": 2 * w * (x * dy + t_x * dt_y), "w": x * x * dy + 2 * x * t_x * dt_y, "t_x": 2 * x * w * dt_y}
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(reference_vjp(fn, primals, tangents, dy), {"x": 2 * x * w * dy, "w": x * x * dy})


def test_cast_leaves_masks_and_gaps_alone() -> None:
    """Check that only floating-point entries change dtype."""
    result = cast({"q": torch.zeros(2), "mask": torch.ones(2, dtype=torch.bool), "t": None}, torch.float64)
    assert [None if x is None else x.dtype for x in result.values()] == [torch.float64, torch.bool, None]


def test_the_recorder_counts_storages_once_and_while_they_live() -> None:
    """Check that views and in-place results are free, and that dropped storages are freed."""
    with MemoryRecorder() as memory:
        x = torch.zeros(100, 10)
        x.view(10, 100).add_(1)
        del x
        y = torch.ones(50, 10, dtype=torch.float64)
        z = y + 1
    assert memory.largest == 1000
    assert memory.peak == y.nbytes + z.nbytes == 8000
    with MemoryRecorder() as memory:
        reference.attention(*make_qkv(1, 1, 64, 8))
    assert memory.largest == 64 * 64


def test_errors_against_is_the_same_rule_in_numbers() -> None:
    """Check shares of the largest truth; an error passes as a number exactly if the assertion passes."""
    truth = torch.tensor([4.0, -2.0], dtype=torch.float64)
    baseline = (truth + torch.tensor([0.0, 0.5], dtype=torch.float64)).float()
    for off, passes in ((0.9, True), (1.1, False), (float("nan"), False)):
        actual = (truth + torch.tensor([off, 0.0], dtype=torch.float64)).float()
        error, allowed = errors_against(actual, truth, baseline)
        assert allowed == pytest.approx(2 * 0.5 / 4 + 2 * torch.finfo(torch.float32).eps)
        assert (error <= allowed) is passes
        with nullcontext() if passes else pytest.raises(AssertionError):
            assert_accurate(actual, truth, baseline, name="x")
    assert errors_against(torch.zeros(3), truth, baseline)[0] == float("inf")
    assert errors_against(torch.zeros(2), 0 * truth, baseline * 0)[0] == 0.0
