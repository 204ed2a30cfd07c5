"""Define the suites: which shapes of which models are measured, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from fastdistill.benchmarks.ops.attention import ATTENTION
from fastdistill.benchmarks.ops.block import BLOCK
from fastdistill.benchmarks.ops.pointwise import LETTERS, POINTWISE, ROWS, shape_of
from fastdistill.benchmarks.ops.step import STEP, measured_objectives
from fastdistill.benchmarks.ops.timed_op import Op, TimedCase

OPS: dict[str, Op] = {"attention": ATTENTION, "block": BLOCK, "step": STEP, **POINTWISE}
BACKWARDS = ("forward", "primal", "mixed")
# The number of tokens in a batch of images; it is fixed, so that every length gives a GPU the same work.
TOKENS = 32768
QUICK = 48  # Number of tokens with --quick.


Lengths = tuple[int, int, int, int, int]  # The order is B, H, N, M, D.


class Model(NamedTuple):
    """Describe the attention of a model: its name, heads, and head dim."""

    name: str
    heads: int
    d: int


DITS = (Model("DiT-S/2", 6, 64), Model("DiT-B/2", 12, 64), Model("DiT-L/2", 16, 64), Model("DiT-XL/2", 16, 72))
# Maps an image's side in pixels to its tokens, with 8 x 8 latents and patches of 2.
PIXELS = {256: 256, 512: 1024, 1024: 4096}
WANS = (Model("Wan2.1-1.3B", 12, 128), Model("Wan2.1-14B", 40, 128))
FRAMES = {"480p-17f": 7800, "480p-81f": 32760, "720p-81f": 75600}  # Maps a video's format to its tokens.
WAN_TEXT = 512
# Each model has its text tokens, which join the image tokens of 512 and 1024 px.
MMDITS = (
    (Model("SD3-M", 24, 64), 333),
    (Model("SD3.5-L", 38, 64), 333),
    (Model("FLUX.1", 24, 128), 512),
    (Model("FLUX.2", 48, 128), 512),
)
LARGE_STEPS = (
    "flow_matching",
    "meanflow",
    "scm",
    "ayf_emd",
    "tvm",
)  # One of each kind, for the largest network and for --quick.
SCALING_LENGTHS = tuple(2**i for i in range(8, 18))
SCALING_DIMS = (32, 40, 64, 72, 80, 96, 112, 128, 256)
SCALING_TOKENS = 4096


def _attention(suite: str, label: str, shape: Lengths, dtype: str, modes: tuple[str, ...]) -> Iterator[TimedCase]:
    b, h, n, m, d = shape
    name = f"{label}-B{b}-H{h}-N{n}{'' if m == n else f'-M{m}'}-D{d}"
    sizes = {"batch": b, "heads": h, "n": n, "m": m, "d": d}
    for mode in modes:
        yield TimedCase(suite, "attention", name, mode, {**sizes, "model": label}, dtype)


def _dit(dtype: str) -> Iterator[TimedCase]:
    for pixels, n in PIXELS.items():
        for name, heads, d in DITS:
            yield from _attention("dit", f"{name}-{pixels}px", (max(1, TOKENS // n), heads, n, n, d), dtype, BACKWARDS)


def _video(dtype: str) -> Iterator[TimedCase]:
    for frames, n in FRAMES.items():
        for name, heads, d in WANS:
            yield from _attention("video", f"{name}-{frames}", (1, heads, n, n, d), dtype, BACKWARDS)
            yield from _attention("video", f"{name}-{frames}-text", (1, heads, n, WAN_TEXT, d), dtype, BACKWARDS)


def _mmdit(dtype: str) -> Iterator[TimedCase]:
    for pixels in (512, 1024):
        for (name, heads, d), text in MMDITS:
            n = PIXELS[pixels] + text
            yield from _attention(
                "mmdit", f"{name}-{pixels}px", (max(1, TOKENS // n), heads, n, n, d), dtype, BACKWARDS
            )


def _norms(dtype: str) -> Iterator[TimedCase]:
    for op in POINTWISE:
        row, _ = ROWS[op]
        for model, sizes in row.models.items():
            shape = shape_of(row, sizes)
            label = "-".join(f"{letter}{shape[LETTERS[letter]]}" for letter in "BHNDCF" if LETTERS[letter] in shape)
            for mode in BACKWARDS:
                yield TimedCase("norms", op, f"{op}-{model}-{label}", mode, {**shape, "model": model}, dtype)


def _block(dtype: str) -> Iterator[TimedCase]:
    for pixels, n in PIXELS.items():
        for name, heads, d in DITS:
            sizes = {"batch": max(1, TOKENS // n), "n": n, "width": heads * d, "heads": heads}
            label = f"{name}-{pixels}px-B{sizes['batch']}-N{n}-C{heads * d}"
            for mode in BACKWARDS:
                yield TimedCase("block", "block", label, mode, {**sizes, "model": name}, dtype)


def _step(dtype: str) -> Iterator[TimedCase]:
    for preset, batch in (("dit-b/2", 64), ("dit-xl/2", 32)):
        for objective in measured_objectives() if preset == "dit-b/2" else LARGE_STEPS:
            yield _step_case(preset, objective, batch, 32, dtype)


def _step_case(preset: str, objective: str, batch: int, pixels: int, dtype: str) -> TimedCase:
    shape: dict[str, int | str] = {
        "preset": preset,
        "objective": objective,
        "batch": batch,
        "px": pixels,
        "model": preset,
    }
    return TimedCase("step", "step", f"{objective}-{preset}-B{batch}-px{pixels}", "step", shape, dtype)


def _scaling(dtype: str) -> Iterator[TimedCase]:
    """Return lengths up to where (N, M) matrices run out of memory, which is caught and recorded, and head dims."""
    for d in (64, 128):
        for n in SCALING_LENGTHS:
            yield from _attention("scaling", "lengths", (1, 16, n, n, d), dtype, ("forward", "mixed"))
    for d in SCALING_DIMS:
        yield from _attention("scaling", "head dims", (8, 16, SCALING_TOKENS, SCALING_TOKENS, d), dtype, BACKWARDS)


SUITES: dict[str, Callable[[str], Iterator[TimedCase]]] = {
    "dit": _dit,
    "video": _video,
    "mmdit": _mmdit,
    "norms": _norms,
    "block": _block,
    "step": _step,
    "scaling": _scaling,
}
WHAT = {
    "dit": "attention of DiT-S, B, L, XL at 256, 512 and 1024 px",
    "video": "attention of Wan 1.3B and 14B up to 75,600 tokens, and to their text",
    "mmdit": "joint attention of image and text: SD3, FLUX",
    "norms": "every op that is bound by memory: norms, gated residual, QK-norm with RoPE, activations",
    "block": "a whole DiT block, with the gradients of its parameters",
    "step": "a training step of each objective with a tangent: loss and gradient",
    "scaling": "attention over lengths and head dims, until memory ends",
}


def cases(suite: str, dtype: str, quick: bool = False) -> list[TimedCase]:
    """Return the cases of a suite; with `quick`, one of each op in every mode, at a size for a CPU.

    Raises:
        ValueError: the suite is unknown.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    every = list(SUITES[suite](dtype))
    return every if not quick else _quick(suite, every, dtype)


def _quick(suite: str, every: list[TimedCase], dtype: str) -> list[TimedCase]:
    found: dict[tuple[str, ...], TimedCase] = {}
    for case in every:
        if case.op == "step" and case.shape["objective"] not in LARGE_STEPS:
            continue
        kind = (case.op, case.mode, str(case.shape.get("objective")))
        if kind not in found:
            found[kind] = _tiny(case)
    if suite == "scaling":
        for n in (32, 64, 128):
            for case in _attention("scaling", "lengths", (1, 2, n, n, 16), dtype, ("forward",)):
                found[("scaling", case.name, "")] = replace(case, quick=True)
    return list(found.values())


def _tiny(case: TimedCase) -> TimedCase:
    if case.op == "step":
        objective = str(case.shape["objective"])
        return replace(_step_case("dit-digits", objective, 8, 8, case.dtype), quick=True)
    sizes = {"batch": 2, "heads": 2, "kv_heads": 2, "n": QUICK, "m": QUICK, "d": 8, "width": 16, "hidden": 16}
    shape = {**case.shape, **{name: size for name, size in sizes.items() if name in case.shape}}
    return replace(case, name=f"{case.op}-quick", shape=shape, quick=True)
