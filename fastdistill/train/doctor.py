"""Tell what this machine has, and which implementations of the ops run on it: tried, not guessed."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.train.environment import describe_environment


def report() -> str:
    """Return the text of `fastdistill doctor`. Runs each implementation once on a small input; downloads nothing."""
    found = describe_environment()
    gpu, packages = found["gpu"], found["packages"]
    device = torch.device("cuda" if gpu else "cpu")
    absent = [name for name, version in packages.items() if version is None and name != "fastdistill"]
    outcomes = {impl: try_attention(impl, device) for impl in ("torch", "triton")}
    lines = [
        ("fastdistill", f"{fd.__version__}, Python {found['python']}, {found['platform']}"),
        ("torch", f"{packages['torch']}, built for {'CUDA ' + found['cuda'] if found['cuda'] else 'the CPU alone'}"),
        ("triton", packages["triton"] or "not installed"),
        ("missing", f"{', '.join(absent)}: pip install 'fastdistill[train]'" if absent else "nothing"),
        ("CPU", f"{found['cpu']['cores']} cores, {found['cpu']['torch_threads']} threads for torch"),
        ("GPU", _gpu_words(gpu)),
        *((f"impl={impl!r}", outcome) for impl, outcome in outcomes.items()),
        ("impl='auto'", "triton" if gpu and outcomes["triton"].startswith("runs") else "torch"),
        ("training", f"on {device.type} in {'bf16' if gpu and gpu['bf16'] else 'fp32'}"),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def try_attention(impl: str, device: torch.device) -> str:
    """Run attention and its tangent by `impl`: "runs, ..." with its error against float64, or why it doesn't."""
    q, k, v, t_q, t_k, t_v = torch.randn(6, 1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        actual = fd.attention_jvp(q, k, v, t_q, t_k, t_v, impl=impl)
    except Exception as error:  # whatever the reason is, it is what the user came for
        return f"no: {error}"
    truth = fd.attention_jvp(*(x.double() for x in (q, k, v, t_q, t_k, t_v)), impl="torch")
    errors = (_relative_error(a, b) for a, b in zip(actual, truth, strict=True))
    return "runs, attention and its tangent within {:.0e} and {:.0e} of float64".format(*errors)


def _relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).abs().max() / truth.abs().max())


def _gpu_words(gpu: dict | None) -> str:
    if gpu is None:
        return "none that torch can use"
    return (
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['count']} in all"
    )
