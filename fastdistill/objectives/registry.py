"""Every method as a row of one table: what it regresses, what it needs, its formula, reductions and sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdistill.objectives.alpha_flow import alpha_flow
from fastdistill.objectives.ayf import ayf_emd, ayf_lmd
from fastdistill.objectives.consistency import consistency
from fastdistill.objectives.dmd import dmd
from fastdistill.objectives.ect import ect
from fastdistill.objectives.esd import esd
from fastdistill.objectives.facm import facm
from fastdistill.objectives.flow_matching import flow_matching
from fastdistill.objectives.imm import imm
from fastdistill.objectives.improved_meanflow import improved_meanflow
from fastdistill.objectives.lsd import lsd
from fastdistill.objectives.meanflow import meanflow
from fastdistill.objectives.psd import psd
from fastdistill.objectives.rcm import rcm
from fastdistill.objectives.scm import scm
from fastdistill.objectives.shortcut import shortcut
from fastdistill.objectives.tvm import tvm
from fastdistill.paths import PATHS

# Keywords that mean the same in all methods: everything else that a function takes is an option of its own.
SHARED = frozenset({"y", "undropped", "path", "jvp", "teacher", "weak_teacher", "guidance", "target"}) | {
    "weighting", "warmup", "factor", "distinct_rows",
}  # fmt: skip
IDENTITIES = ("fm", "eulerian", "lagrangian", "semigroup", "moment", "score")


@dataclass(frozen=True)
class Objective:
    """A method and what it needs.

    Args:
        function: called as function(net, x0, x1, *times, y=y, ...) -> (loss, metrics).
        identity: which identity of the flow map its residual is: one of `IDENTITIES`.
        times: the names of the times it takes, in order.
        tangent: what the jvp differentiates along, and where gradients flow; "none" without a jvp.
        formula: the loss, in plain text; [.] is a stopped gradient.
        sources: papers, and where in them.
        reduction: sum or mean over a row's elements, and which share of the rows has t != s.
        sampler: the name of its default sampler in `fastdistill.samplers.SAMPLERS`.
        needs: the keywords it can't do without.
        paths: the names of the paths that it fits; None is all.
        anywhere: an option and its value with which it fits every path, where `paths` names some.
        takes, options: all its keywords, and its own with their defaults, both read from the function.
    """

    function: Callable[..., tuple[Tensor, dict[str, Any]]]
    identity: str
    times: tuple[str, ...]
    tangent: str
    formula: str
    sources: tuple[str, ...]
    reduction: str
    sampler: str
    needs: frozenset[str] = frozenset()
    paths: frozenset[str] | None = None
    anywhere: tuple[str, Any] | None = None
    takes: frozenset[str] = field(init=False)
    options: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        missing = inspect.Parameter.empty
        parameters = inspect.signature(self.function).parameters.values()
        keywords = {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}
        object.__setattr__(self, "takes", frozenset(keywords))
        own = {name: value for name, value in keywords.items() if name not in SHARED and value is not missing}
        object.__setattr__(self, "options", own)
        if self.identity not in IDENTITIES:
            raise ValueError(f"identity: expected one of {', '.join(IDENTITIES)}, got {self.identity!r}")
        if unknown := self.needs - self.takes:
            raise ValueError(f"needs: expected keywords of {self.function.__name__}, got {', '.join(sorted(unknown))}")
        if self.anywhere is not None and self.anywhere[0] not in own:
            raise ValueError(f"anywhere: expected an option of {self.function.__name__}, got {self.anywhere[0]!r}")

    @property
    def two_times(self) -> bool:
        """Whether it takes a second time after t."""
        return len(self.times) > 1

    @property
    def takes_teacher(self) -> bool:
        """Whether it takes the keyword `teacher`."""
        return "teacher" in self.takes


# Paths that start at the data itself, for methods that write the consistency function as a data prediction.
FROM_DATA = frozenset({"linear", "cosine", "trig", "icfm", "ot_cfm", "vp_si", "gaussian"})
INDEPENDENT = frozenset(PATHS) - {"ot_cfm"}  # a score is that of x_t given x0 alone
ALONG = "D_w u = jvp(u, (x_t, t, s), (w, 1, 0)); no gradient through it"
AT_THE_END = "du/ds = jvp(u, (x_t, t, s), (0, 0, 1))"

OBJECTIVES: dict[str, Objective] = {
    "flow_matching": Objective(
        flow_matching, "fm", ("t",),
        tangent="none",
        formula="w(t) ‖u(x_t, t, t) − v̂‖²",
        sources=("Lipman et al. 2023, arXiv:2210.02747, theorem 2",),
        reduction="mean over elements; s = t in all rows",
        sampler="euler",
    ),
    "meanflow": Objective(
        meanflow, "eulerian", ("t", "s"),
        tangent=ALONG,
        formula="A(p, c) of Δ = u − [w − (t−s) D_w u];  A(p, c) = e / [e + c]^p, e = ‖Δ‖²",
        sources=("Geng et al. 2025, arXiv:2505.13447, algorithm 1, section 4",),
        reduction="sum over elements; t != s in 25 % of the rows (on CIFAR-10: 75 %)",
        sampler="average_velocity",
    ),
    "improved_meanflow": Objective(
        improved_meanflow, "eulerian", ("t", "s"),
        tangent="D_v u = jvp(u, (x_t, t, s), (v, 1, 0)) along the predicted v; no gradient through it",
        formula="A(p, c) of V − w, V = u + (t−s) [D_v u], v = [u(x_t, t, t)] or a velocity head trained alongside",
        sources=("Geng et al. 2025, arXiv:2512.02012, algorithm 1, equation 12",),
        reduction="sum over elements; t != s in 50 % of the rows",
        sampler="average_velocity",
    ),
    "alpha_flow": Objective(
        alpha_flow, "semigroup", ("t", "s"),
        tangent="none for alpha > 0; at alpha = 0 MeanFlow's, along (w, 1, 0)",
        formula="s = t: e / ([e] + c), e = ‖u − w‖²; else a e / ([e] + c), "
        "e = ‖u − [a w + (1−a) u⁻(x_t − Δ w, t − Δ, s)]‖², Δ = a (t−s), a: 1 → 0",
        sources=("Zhang et al. 2025, arXiv:2510.20771, definition 1",),
        reduction="sum over elements; t != s in 50 % of the rows (its code also has 75 %)",
        sampler="average_velocity",
    ),
    "consistency": Objective(
        consistency, "semigroup", ("t", "r"),
        tangent="none",
        formula="λ(t, r) dist(f(x_t, t, 0), [f⁻(x_r, r, 0)]); x_r by the teacher's flow (CD; Heun, on edm in the noise "
        "level) or from x0, x1 (CT)",
        sources=("Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3", "Song and Dhariwal 2024, arXiv:2310.14189"),
        reduction="l2 and huber sum over elements; s = 0 in all rows",
        sampler="consistency",
    ),
    "ect": Objective(
        ect, "semigroup", ("t", "r"),
        tangent="none",
        formula="‖f(x_t, t, 0) − [f(x_r, r, 0)]‖ / (σ(t) − σ(r)), σ = β/α, x_t and x_r from the same x0, x1; "
        "r = 0: ‖f(x_t, t, 0) − x0‖ / σ(t)",
        sources=("Geng et al. 2025, arXiv:2406.14548, section 3",),
        reduction="norm of the sum over elements; s = 0 in all rows",
        sampler="consistency",
    ),
    "scm": Objective(
        scm, "eulerian", ("t",),
        tangent="D_w u = jvp(u, (x_t, t, 0), (w, 1, 0)), turned into F's inside; no gradient through it",
        formula="‖F − [F + ĝ]‖², g = k (k (w/W − F) + r (D_w f/W − k (w/W − F))), ĝ = g/(‖g‖+c); linear path: "
        "g = (w − F) − r t D_w F; trigonometric: g = −cos²(F − w) − r cos sin (x + dF/dt)",
        sources=("Lu and Song 2025, arXiv:2410.11081, equations 6 and 8, algorithm 1",),
        reduction="mean over elements, the tangent's norm over their sum; s = 0 in all rows",
        sampler="consistency",
        paths=FROM_DATA,
        anywhere=("parameterization", "average"),
    ),
    "facm": Objective(
        facm, "eulerian", ("t",),
        tangent="D_w F = jvp(F, (x_t, t, 0), (w, 1, 0)); no gradient through it",
        formula="‖F(x_t, t, t) − w‖² + 1 − cos(F, w) + cos(π(1−t)/2) e/[e + c]^½, "
        "e = ‖F − ([F] − (1 − (1−t)^p) clamp(g, ±1))‖², g = [F − (w − t D_w F)], F = F(x_t, t, 0)",
        sources=("Peng et al. 2025, arXiv:2507.03738",),
        reduction="mean over elements; both s = t and s = 0 in all rows",
        sampler="consistency",
    ),
    "ayf_emd": Objective(
        ayf_emd, "eulerian", ("t", "s"),
        tangent=ALONG + "; w is the teacher's",
        formula="‖u − [u − ĝ]‖², g = (u − w) + r (t−s) D_w u, ĝ = g/(‖g‖+c), w = λ v + (1−λ) v_weak",
        sources=("Sabour et al. 2025, arXiv:2506.14603, theorem 3.2, algorithm 1",),
        reduction="sum over elements; t != s in all rows",
        sampler="gamma",
        needs=frozenset({"teacher"}),
    ),
    "ayf_lmd": Objective(
        ayf_lmd, "lagrangian", ("t", "s"),
        tangent=AT_THE_END + "; no gradient through it",
        formula="‖u − [u − ĝ]‖², g = u − r (t−s) du/ds − w(f, s), f = x_t − (t−s) u, ĝ = g/(‖g‖+c)",
        sources=("Sabour et al. 2025, arXiv:2506.14603, AYF-LMD",),
        reduction="sum over elements; t != s in all rows",
        sampler="gamma",
        needs=frozenset({"teacher"}),
    ),
    "shortcut": Objective(
        shortcut, "semigroup", ("t", "delta"),
        tangent="none",
        formula="δ = 0: ‖u(x_t, t, t) − w‖²; else ‖u(x_t, t, t−2δ) − [½ (u⁻(x_t, t, t−δ) + u⁻(x′, t−δ, t−2δ))]‖²; "
        "the finest halves by u⁻(x_t, t, t) and u⁻(x′, t−δ, t−δ)",
        sources=("Frans et al. 2025, arXiv:2410.12557",),
        reduction="mean over elements; t != s in 1/8 of the rows",
        sampler="average_velocity",
    ),
    "esd": Objective(
        esd, "eulerian", ("t", "s"),
        tangent="D_v u = jvp(u, (x_t, t, s), (v, 1, 0)) along the own diagonal v, with gradient through du/dt alone; "
        "by option through all of it, or none",
        formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖u − v + (t−s) (du/dt + [(du/dx) v])‖², v = [u(x_t, t, t)]",
        sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3",),
        reduction="mean over elements; t != s in 25 % of the rows",
        sampler="average_velocity",
    ),
    "lsd": Objective(
        lsd, "lagrangian", ("t", "s"),
        tangent=AT_THE_END + ", with gradient through it",
        formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖∂_s f − [u(f, s, s)]‖², ∂_s f = u − (t−s) du/ds",
        sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3",),
        reduction="mean over elements; t != s in 25 % of the rows",
        sampler="average_velocity",
    ),
    "psd": Objective(
        psd, "semigroup", ("t", "s"),
        tangent="none",
        formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖u − [a u⁻(x_t, t, m) + (1−a) u⁻(x_m, m, s)]‖², m = t − a (t−s)",
        sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3", "Guo et al. 2025, arXiv:2507.16884"),
        reduction="mean over elements; t != s in 25 % of the rows",
        sampler="average_velocity",
    ),
    "tvm": Objective(
        tvm, "lagrangian", ("t", "s"),
        tangent=AT_THE_END + ", with gradient through it",
        formula="‖∂_s f − [u⁻(f, s, s)]‖² + ‖u(x_s, s, s) − w‖², ∂_s f = u − (t−s) du/ds",
        sources=("Zhou et al. 2025, arXiv:2511.19797, equations 9, 11 and 12",),
        reduction="mean over elements; t != s in all rows",
        sampler="average_velocity",
    ),
    "rcm": Objective(
        rcm, "eulerian", ("t",),
        tangent="as scm, another warm-up",
        formula="‖F − [F + ĝ]‖² + λ ½ ‖G − [G − δ]‖², ĝ = g/(‖g‖+c), G = f(x_1, 1, 0), δ = score_gradient(G); linear "
        "path: g = (w − F) − t D_w F; trigonometric: g = −cos √(1 − r² sin²) (F − w) − cos sin (r x + dF/dt)",
        sources=("Zheng et al. 2025, arXiv:2510.08431, section 4.1, algorithm 1; weights and warm-up of its code",),
        reduction="mean over elements, the tangent's norm over their sum; s = 0 in all rows; λ = 0.02 is the authors' "
        "100 and 1 of sums without a half",
        sampler="consistency",
        needs=frozenset({"score_gradient"}),
        paths=FROM_DATA,
        anywhere=("parameterization", "average"),
    ),
    "imm": Objective(
        imm, "moment", ("t", "r", "s"),
        tangent="none",
        formula="w(t) MMD²(f(x_t, t, s), [f(x_r, r, s)]), kernel exp(−w̃ max(‖·‖, ε)/D), w̃ = 1/(t−s), "
        "x_r = α_r x0 + (β_r/β_t)(x_t − α_t x0), r = max(s, η⁻¹(η(t) − (η_max − η_min)/2^k)), η = β/α",
        sources=("Zhou et al. 2025, arXiv:2503.07565, equations 8, 12 and 13, algorithm 1",),
        reduction="mean over the pairs of a group (V-statistic; U by option) of M = 4 rows; t != s in all rows",
        sampler="average_velocity",
    ),
    "dmd": Objective(
        dmd, "score", ("t",),
        tangent="none; gradient through the samples alone",
        formula="½ ‖G − [G − δ]‖², G = f(x_t, t, 0), x_1 noise alone, "
        "δ = (x̂0_fake − x̂0_teacher)/mean |G − x̂0_teacher| at x_τ; "
        "DMD2: + λ softplus(−D(x_τ)), x_t from the generator's own steps",
        sources=("Yin et al. 2024, arXiv:2311.18828, equations 7 and 8", "Yin et al. 2024 (DMD2), arXiv:2405.14867"),
        reduction="mean over elements; s = 0 in all rows",
        sampler="consistency",
        needs=frozenset({"teacher", "fake"}),
        paths=INDEPENDENT,
    ),
}  # fmt: skip


def get(name: str) -> Objective:
    """The objective called `name`; ValueError lists the names there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]
