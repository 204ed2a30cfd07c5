"""Test what rounding costs: absolute caps, common modes, large logits, and that each piece of the kernel matters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdistill import reference
from fastdistill.kernels import attention as kernel
from fastdistill.testing import assert_accurate, cast, reference_jvp, relative_error
from tests.kernels.attention_cases import Tensors, check, inputs, run


def edited(tmp_path: Path, old: str, new: str) -> ModuleType:
    """Return the kernel's module with one piece of its source replaced."""
    source = Path(kernel.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "edited_attention.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fastdistill.kernels.edited_attention", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_logits_beyond_a_hundred() -> None:
    """Check that the running maximum keeps exp(100) from overflowing."""
    primals, tangents = inputs(n=20, m=70, d=32)
    primals["q"] *= 60
    outputs = run(primals, tangents)
    truths = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    baselines = reference_jvp(reference.attention, primals, tangents)
    assert outputs.lse.max() > 100
    for actual, truth, baseline in zip((outputs.o, outputs.t_o), truths, baselines):
        assert_accurate(actual, truth, baseline, name="o and t_o")


def offset_inputs(t_k_offset: float, v_offset: float, std: float) -> tuple[Tensors, Tensors]:
    """Draw bfloat16 inputs with a common offset in T (about |mu| / std T), an offset in v, and peaked logits."""
    primals, tangents = inputs(n=32, m=256, d=64, dtype=torch.float32)
    primals["q"], primals["v"] = primals["q"] * std, primals["v"] + v_offset
    tangents["k"] = tangents["k"] + t_k_offset
    return cast(primals, torch.bfloat16), cast(tangents, torch.bfloat16)


def tangent_errors(module: ModuleType, primals: Tensors, tangents: Tensors) -> tuple[float, float]:
    """Return the relative error of t_o before and after its own rounding."""
    _, t_truth = reference_jvp(reference.attention, cast(primals, torch.float64), cast(tangents, torch.float64))
    outputs = run(primals, tangents, tangent_grad=True, module=module)
    unrounded = outputs.t_o if outputs.t_o_rest is None else outputs.t_o.float() + outputs.t_o_rest.float() / 256
    return relative_error(unrounded, t_truth), relative_error(outputs.t_o, t_truth)


@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("v_offset", [0.0, 3.0])
@pytest.mark.parametrize("t_k_offset", [0.0, 10.0, 100.0])
def test_common_modes_cost_no_accuracy(t_k_offset: float, v_offset: float, std: float) -> None:
    """Check the absolute caps, before and after t_o is rounded; PyTorch's own bfloat16 errs by 0.5 % to 1000 % here."""
    unrounded, rounded = tangent_errors(kernel, *offset_inputs(t_k_offset, v_offset, std))
    assert unrounded < 2e-3 and rounded < 3e-3


@pytest.mark.parametrize(("t_k_offset", "cap"), [(0.0, 5e-6), (100.0, 3e-5)])
def test_common_modes_in_float32(t_k_offset: float, cap: float) -> None:
    """Check offset v and peaked logits; the inputs are rounded, and what is left of their tails counts as exact."""
    primals, tangents = (cast(tensors, torch.float32) for tensors in offset_inputs(t_k_offset, 3.0, 4.0))
    assert max(tangent_errors(kernel, primals, tangents)) < cap


STEP = "step = tl.sum(e * z, 1) / at_least(e_sum, LIVE)"
ROUNDED_SUM = "tl.sum(h_low.to(tl.float32), 1)"
MEAN = "a = add_scaled_rows(scale_rows(a, inverse), -h_dot * inverse, o)"


@pytest.mark.parametrize(
    ("old", "new", "v_offset", "worse"),
    [
        (STEP, "step = tl.zeros_like(rho)", 0, 50),
        (ROUNDED_SUM, "tl.sum(e * (z - step[:, None]), 1)", 3, 1.5),
        (MEAN, "a = scale_rows(a, inverse)", 3, 1.5),
    ],
    ids=["centring", "the sum of the rounded H", "its use"],
)
def test_what_the_accuracy_rests_on(old: str, new: str, v_offset: float, worse: float, tmp_path: Path) -> None:
    """Check that the same kernel without it errs many times more; otherwise the cap would prove nothing."""
    primals, tangents = offset_inputs(100, v_offset, 1.0)
    error, _ = tangent_errors(kernel, primals, tangents)
    assert tangent_errors(edited(tmp_path, old, new), primals, tangents)[0] > worse * error


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h_dot = (h_dot - step * e_dot) * decay", "h_dot = h_dot * decay"),
        ("e * (z - step[:, None])", "e * z"),
        ("a = add_scaled_rows(scale_rows(a, decay), -step * decay, o)", "a = scale_rows(a, decay)"),
        ("o = scale_rows(o, decay)", "pass"),
    ],
)
def test_a_wrong_kernel_is_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every piece of the recurrence matters to the checks above."""
    monkeypatch.setattr(kernel, "attention_forward", edited(tmp_path, old, new).attention_forward)
    primals, tangents = inputs(n=20, m=70, d=32, dtype=torch.float16)
    with pytest.raises(AssertionError):
        check(primals, tangents)
