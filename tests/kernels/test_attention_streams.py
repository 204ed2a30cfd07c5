"""Test configs that stream rows, a few columns at a time: the values are the same, and no matmul is added."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdistill.kernels import configs
from fastdistill.kernels.configs import Config
from tests.kernels.attention_cases import CAUSAL, SUBSETS, check, inputs, normal, packed_inputs
from tests.kernels.backward_cases import check_backward, cotangents_of, run_backward

STREAMED = Config(32, 32, 4, 2, stream=16)
MIXED = ("do", "dt_o")


@pytest.fixture(autouse=True)
def streaming() -> Iterator[None]:
    """Make all kernels stream, as on a GPU without descriptors; a test may still ask for descriptors."""
    with configs.forced(configs.INTERPRETER, dict.fromkeys(configs.KERNELS, STREAMED)):
        yield


@pytest.mark.parametrize("tangents", [*SUBSETS, "M"])
def test_every_subset_of_tangents(tangents: str) -> None:
    """Check several parts, two tiles each way; M is that of a float mask alone."""
    primals, directions = inputs(tangents, n=35, m=40, d=40)
    if tangents == "M":
        primals["attn_mask"], directions["attn_mask"] = normal(1, 1, 35, 40), normal(1, 1, 35, 40)
    check(primals, directions)
    check_backward(primals, directions, cotangents_of(primals, *(MIXED if directions else ("do",))))


@pytest.mark.parametrize(
    ("d", "dv", "dtype"), [(72, 24, torch.float32), (136, 16, torch.float16), (8, 80, torch.bfloat16)]
)
def test_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    """Check partial tails, values of another width, both launches of wide heads, and shared keys."""
    primals, tangents = inputs(heads=2, kv_heads=1, n=20, m=30, d=d, dv=dv, dtype=dtype)
    check(primals, tangents)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED))


@pytest.mark.parametrize("names", [("d_mu",), ("dt_o",), ("d_lse", "dt_o")], ids="+".join)
def test_cotangents_that_are_zero(names: tuple[str, ...]) -> None:
    """Check calls without do, and without dt_o beside tangents that move the logits."""
    primals, tangents = inputs(n=20, m=30, d=24)
    check_backward(primals, tangents, cotangents_of(primals, *names))


def test_masks_and_bands() -> None:
    """Check a float mask with dead rows and a tangent beside a band, and the masks' gradients."""
    primals, tangents = inputs(n=40, m=70, d=24)
    primals["attn_mask"], tangents["attn_mask"] = normal(1, 1, 40, 70), normal(1, 1, 40, 70)
    primals["attn_mask"][..., 5, :] = -torch.inf
    check(primals, tangents, window=(30, 10))
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), window=CAUSAL)


def test_packed_sequences() -> None:
    """Check that no row of a neighbour is read."""
    primals, tangents, cu_seqlens = packed_inputs([38, 0, 9], [20, 13, 40], d=24, spare=2)
    check(primals, tangents, cu_seqlens=cu_seqlens)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("d", [64, 72])
def test_rows_by_descriptor(d: int) -> None:
    """Check one descriptor for all parts, whose coordinate runs along the columns."""
    shape = {"batch": 2, "heads": 2, "kv_heads": 1, "n": 35, "m": 20, "d": d, "dv": 40, "dtype": torch.float16}
    primals, tangents = inputs(**shape)
    check(primals, tangents, descriptors=True)
    check_backward(primals, tangents, cotangents_of(primals, *MIXED), descriptors=True)


def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that results are rounded to 10 bits: not exact, and not far off."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    primals, tangents = inputs(n=20, m=40, d=24)
    cotangents = cotangents_of(primals, *MIXED)
    streamed = run_backward(primals, tangents, cotangents)
    with configs.forced(configs.INTERPRETER, dict.fromkeys(configs.KERNELS, configs.INTERPRETED)):
        held = run_backward(primals, tangents, cotangents)
    for name, x in held.items():
        if x is not None:
            torch.testing.assert_close(streamed[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tangents", ["", "v", "qk", "qkv"])
def test_no_matmul_is_added(tangents: str, matmuls: list[tuple[int, ...]]) -> None:
    """Count the forward's and both backward kernels' matmuls: each once a part, whatever has a tangent."""
    primals, directions = inputs(tangents, n=20, m=24, d=32)
    cotangents = cotangents_of(primals, *(MIXED if tangents else ("do",)))
    counts = []
    for config in (configs.INTERPRETED, STREAMED):
        with configs.forced(configs.INTERPRETER, dict.fromkeys(configs.KERNELS, config)):
            matmuls.clear()
            run_backward(primals, directions, cotangents)
            counts.append(sum(rows * summed * columns for rows, summed, columns in matmuls))
    assert counts[0] == counts[1] > 0
