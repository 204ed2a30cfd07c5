"""Test bfloat16 in Triton's interpreter, as a user meets it: without this folder's fixtures."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import triton
import triton.language as tl

from tests.kernels.device import INTERPRETED

# This is a user's script: every family of kernels in bfloat16, with tangents and all gradients, against float64.
SCRIPT = """
import torch
import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import assert_accurate

torch.manual_seed(0)
angles = fd.rope_angles((5,), 16)


def attend(impl, *x):
    return fd.scaled_dot_product_attention(*x, impl=impl) if impl else reference.attention(*x)


def norm(impl, x, w):
    return fd.rms_norm(x, (16,), w, impl=impl) if impl else reference.rms_norm(x, (16,), w)


def gelu(impl, x):
    return fd.gelu(x, impl=impl) if impl else torch.nn.functional.gelu(x)


def turn(impl, q, k):
    given = (q, k, *(x.to(q) for x in angles))
    return torch.cat(fd.qk_norm_rope(*given, impl=impl) if impl else reference.qk_norm_rope(*given), 1)


def results(fn, impl, primals, tangents, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in (*primals, *tangents)]
    half = len(primals)
    both = torch.func.jvp(lambda *x: fn(impl, *x), tuple(leaves[:half]), tuple(leaves[half:]))
    cotangents = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape) for x in both]
    gradients = torch.autograd.grad(both, leaves, [x.bfloat16().to(dtype) for x in cotangents])
    return [x.detach() for x in (*both, *gradients)]


shapes = {attend: [(1, 2, 20, 16)] * 3, norm: [(5, 16), (16,)], gelu: [(5, 16)], turn: [(1, 2, 5, 16)] * 2}
for fn, sizes in shapes.items():
    primals, tangents = ([torch.randn(size).bfloat16() for size in sizes] for _ in range(2))
    found = results(fn, "triton", primals, tangents, torch.bfloat16)
    truths = results(fn, None, primals, tangents, torch.float64)
    baselines = results(fn, None, primals, tangents, torch.bfloat16)
    for i, (x, truth, baseline) in enumerate(zip(found, truths, baselines)):
        assert_accurate(x, truth, baseline, name=f"{fn.__name__} {i}", order=2)
"""

if INTERPRETED:

    @triton.jit
    def _round_trip_kernel(X, Y, LOW, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)
        low = tl.load(X + offs).to(tl.bfloat16)
        tl.store(LOW + offs, low)
        tl.store(Y + offs, low.to(tl.float32))

    def test_rounding_is_to_nearest_even() -> None:
        """Check ties both ways, carries into the exponent, numbers at both ends, and NaN."""
        bits = [0x3F808000, 0x3F818000, 0x3F818001, 0x3FFF8000, 0x7F7F8000, 1, 0x80018000, 0x7F800000, 0xFF800001]
        x = torch.tensor(bits + [0] * 7, dtype=torch.int64).to(torch.int32).view(torch.float32)
        back, low = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
        _round_trip_kernel[(1,)](x, back, low, SIZE=16)
        torch.testing.assert_close(low, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_a_fresh_process_computes_bfloat16_rightly() -> None:
    """Check it with nothing but the package and TRITON_INTERPRET=1."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
