"""Choose where the kernels run in tests: on a GPU if there is one, otherwise interpreted on the CPU."""

from __future__ import annotations

import os
import sys

import torch

# TRITON_INTERPRET=1 asks for the interpreter on a machine with a GPU, too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("tests/kernels needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels")
    os.environ["TRITON_INTERPRET"] = "1"
