"""Check the third tier of proof quickly: after 300 steps a small network's map is near the exact one on the ring.

The map is measured in one step, where a wrong tangent shows. The control, flow matching, learns velocities and is
therefore far off the map. One method stands for each identity and driver; methods that distil have the control as their
teacher. `make evidence` has the long form: all methods, three seeds of 3,000 steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.benchmarks.methods import evidence
from fastdistill.benchmarks.methods.evidence import Job, mutated, wrong_sign
from fastdistill.eval.evaluate import evaluate
from fastdistill.train import train

QUICK = [
    *("--steps", "300", "--data.batch", "128", "--optim.lr", "4e-3", "--optim.ema", "0.98"),
    *("--device", "cpu", "--diagnostics.every", "0"),
]


def measure(name: str, folder: Path) -> dict[str, float]:
    """Train a method, or a mutant of one, anew, and return its map error and SW2 in one step."""
    job = Job("ring", 0, name)
    warmup = ["--method.tangent-warmup", "30"] if job.method == "ayf_emd" else []  # Its own warm-up takes 500 steps.
    config = job.configure(folder, [*QUICK, *warmup])
    with mutated(job):
        train(config)
    return evaluate(config.out, [1], n=1024)["steps"]["1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs, with the control, which is also the teacher."""
    folder = tmp_path_factory.mktemp("ring")
    control = measure("flow_matching", folder)
    assert control["map_error"] > 0.75
    assert control["sliced_wasserstein"] > 1.0
    return folder


# The comment at each gate gives the numbers of seeds 0, 1 and 2. The control has map errors of .89, .95 and .93, and
# SW2 of 1.22, 1.26 and 1.28.
MEMBERS = [
    ("meanflow", "map_error", 0.36),  # Eulerian, from data: .24 .24 .20
    ("facm", "map_error", 0.45),  # Eulerian, to the data alone (s = 0): .31 .29 .29
    ("ayf_emd", "map_error", 0.5),  # Eulerian, from the teacher alone: .35 .32 .29
    ("lsd", "map_error", 0.36),  # Lagrangian, with gradients through the tangent: .24 .22 .22
    ("psd", "map_error", 0.4),  # Semigroup: .27 .27 .25
    ("imm", "sliced_wasserstein", 0.4),  # Moments: .22 .22 .25
    ("dmd", "sliced_wasserstein", 0.4),  # Scores, with a critic: .16 .15 .23
]


@pytest.mark.parametrize(("name", "metric", "gate"), MEMBERS)
def test_method_learns_the_exact_map(name: str, metric: str, gate: float, folder: Path) -> None:
    assert measure(name, folder)[metric] < gate


@pytest.mark.parametrize("name", ["facm", "ayf_emd"])
def test_a_tangent_of_the_wrong_sign_does_not(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the error stays large; seeds 0, 1 and 2 gave .69 .77 .59 (FACM) and .67 1.02 .69 (AYF-EMD)."""
    mutant = f"{name}, wrong sign"
    monkeypatch.setitem(evidence.MUTANTS, mutant, (name, wrong_sign))
    assert measure(mutant, folder)["map_error"] > 0.55
