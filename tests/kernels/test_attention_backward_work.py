"""Test what the backward kernels leave out: products with zeros, gradients that nobody needs, and unseen tiles.

Nothing else may be left out. The interpreter counts, and takes edited source.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.kernels import attention_backward as kernel
from fastdistill.kernels import attention_tile
from fastdistill.testing import MemoryRecorder
from tests.kernels.attention_cases import CAUSAL, UNLIMITED, Tensors, inputs, normal
from tests.kernels.backward_cases import NAMES, check_backward, cotangents_of, run_backward
from tests.kernels.device import DEVICE

Shapes = list[tuple[int, ...]]
MIXED = ("do", "dt_o")


def backward_matmuls(matmuls: Shapes, primals: Tensors, tangents: Tensors, *names: str, **options: Any) -> int:
    """Return how many matmuls the backward takes for these cotangents: those of a run, less the forward's."""
    cotangents = cotangents_of(primals, *names)
    counts = []
    for needs in ((False,) * 8, options.pop("needs", (True,) * 8)):
        matmuls.clear()
        run_backward(primals, tangents, cotangents, needs=needs, **options)
        counts.append(len(matmuls))
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("tangents", "count"),
    [("", 7), ("v", 10), ("q", 14), ("k", 14), ("qv", 17), ("kv", 17), ("qk", 18), ("qkv", 21)],
)
def test_zero_tangents_cost_no_matmul(tangents: str, count: int, matmuls: Shapes) -> None:
    """Count the matmuls of one tile and one part, in both kernels."""
    names = MIXED if tangents else ("do",)
    assert backward_matmuls(matmuls, *inputs(tangents, n=20, d=16), *names) == count


@pytest.mark.parametrize(("names", "count"), [(("do",), 7), (("d_lse",), 4), (("d_mu",), 12), (("dt_o",), 18), ((), 0)])
def test_zero_cotangents_cost_no_matmul(names: tuple[str, ...], count: int, matmuls: Shapes) -> None:
    """Count them with all tangents; do alone asks about none of them."""
    assert backward_matmuls(matmuls, *inputs(n=20, d=16), *names) == count


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        *[("q", 8), ("k", 8), ("v", 5), ("attn_mask", 6), ("t_q", 3), ("t_k", 3), ("t_v", 2), ("t_attn_mask", 2)],
        *[("q t_q", 9), ("k t_v", 9)],
    ],
)
def test_only_what_is_needed_is_computed(wanted: str, count: int, matmuls: Shapes) -> None:
    """Check that it is the same to the bit."""
    primals, tangents = inputs(n=20, d=16)
    primals["attn_mask"], tangents["attn_mask"] = normal(1, 1, 20, 20), normal(1, 1, 20, 20)
    needs = tuple(name in wanted.split() for name in NAMES)
    assert backward_matmuls(matmuls, primals, tangents, *MIXED, needs=needs) == count
    cotangents = cotangents_of(primals, *MIXED)
    everything = run_backward(primals, tangents, cotangents)
    for (name, x), need in zip(run_backward(primals, tangents, cotangents, needs=needs).items(), needs):
        assert torch.equal(x, everything[name]) if need else x is None, name


@pytest.mark.parametrize(("names", "count"), [(MIXED, 21 + 3), (("do",), 7)])
def test_wide_heads_take_the_keys_in_two_launches(names: tuple[str, ...], count: int, matmuls: Shapes) -> None:
    """Check one launch for k and one for v, which both rebuild P and T; two accumulators alone need no second one."""
    assert backward_matmuls(matmuls, *inputs(n=20, d=128), *names) == count


@pytest.mark.parametrize(
    ("masked", "window", "tiles"), [(False, CAUSAL, 6), (True, UNLIMITED, 3), (True, CAUSAL, 3), (False, (0, 0), 3)]
)
def test_hidden_tiles_cost_nothing(masked: bool, window: tuple[int, int], tiles: int, matmuls: Shapes) -> None:
    """Count the tiles, of 3 x 3; the mask hides the last two tiles of keys."""
    primals, _ = inputs("", n=96, d=16)
    if masked:
        primals["attn_mask"] = torch.arange(96, device=DEVICE).expand(1, 1, 1, 96) < 32
    assert backward_matmuls(matmuls, primals, {}, "do", window=window) == 7 * tiles


def test_memory_is_linear_in_the_length() -> None:
    """Check that nothing of the logits' size is allocated; row statistics are three or four numbers each."""
    primals, tangents = inputs(n=96, d=16)
    cotangents = cotangents_of(primals, *MIXED)
    with MemoryRecorder() as recorder:
        run_backward(primals, tangents, cotangents)
    assert recorder.largest == 96 * 16


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d_s = d_t * z", "d_s = d_t"),
        (" - _statistic(mu, P, first_n, at, BY_KEYS)", ""),
        ("g = add_cross(g, dt_o, t_v, BY_KEYS, PRECISION, D_V, STREAM)", "pass"),
        ("add_pair(dt_x, dx, d_t, d_s, x, t_x,", "add_pair(dt_x, dx, d_t, d_s, x, None,"),
        ("_add_products(acc, others, None, pz_low,", "_add_products(acc, others, None, None,"),
        ("(g - _statistic(delta, P, first_n, at, BY_KEYS))", "g"),
        ("(w - _statistic(delta_t, P, first_n, at, BY_KEYS))", "w"),
    ],
)
def test_a_wrong_kernel_is_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every term of the formulas matters to the checks above, in 16 bits as well."""
    source = Path(attention_tile.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "edited_attention_tile.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fastdistill.kernels.edited_attention_tile", path)
    assert spec is not None and spec.loader is not None
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    monkeypatch.setattr(kernel, "add_tile", edited.add_tile)
    primals, tangents = inputs(n=20, m=24, d=16, dtype=torch.float16)
    with pytest.raises(AssertionError, match="gradient of"):
        check_backward(primals, tangents, cotangents_of(primals, *MIXED))
