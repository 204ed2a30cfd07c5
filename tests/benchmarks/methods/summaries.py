"""Make a comparison's summary by hand, of the schema that `fastdistill.compare` writes."""

from __future__ import annotations

from typing import Any

STEPS = ("1", "2", "4", "8")


def spread(*values: float) -> dict[str, Any]:
    """Return a metric over the seeds, with the standard deviation of two."""
    mean = sum(values) / len(values)
    return {"mean": mean, "std": abs(values[0] - values[-1]) / 2**0.5, "values": list(values)}


def method(errors: tuple[float, ...], seconds: float = 0.002, teacher: bool = False) -> dict[str, Any]:
    """Return a method with these map errors at 1, 2, 4, 8 steps, and half of them as SW2."""
    return {
        "settings": {
            "identity": "eulerian",
            "tangent": "(w, 1, 0)",
            "teacher": teacher,
            "second_network": False,
            "method": {"name": "meanflow", "p": 0.5, "distinct": 0.75},
        },
        "failed": None,
        "sampler": "average_velocity",
        "quality": {
            steps: {"map_error": spread(error, 1.1 * error), "sliced_wasserstein": spread(error / 2, error / 2)}
            for steps, error in zip(STEPS, errors)
        },
        "cost": {"seconds_per_step": spread(seconds), "peak_bytes": spread(2.0**20)},
        "whole": {
            "steps": spread(3000.0),
            "teacher_steps": spread(3000.0 * teacher),
            "pairs": spread(0.0),
            "critic_updates": spread(0.0),
            "prior_evaluations": spread(768000.0 * teacher),
            "prior_seconds": spread(6.0 * teacher),
            "evaluations": spread(1536000.0 + 768000.0 * teacher),
            "seconds": spread(3000 * seconds + 6.0 * teacher),
        },
    }


def ring(**methods: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison on the ring."""
    return {
        "data": "ring",
        "budget": {
            "steps": 3000,
            "batch": 256,
            "network": "mlp-ring",
            "parameters": 22000,
            "seeds": [0, 1],
            "samples": 4096,
        },
        "methods": methods,
        "references": {"euler 1": {"map_error": 0.9, "sliced_wasserstein": 1.43}, "data": {"sliced_wasserstein": 0.05}},
        "environment": {"python": "3.12", "torch": "2.13"},
        "mutants": {},
    }


def small() -> dict[str, Any]:
    """Return a comparison of flow matching and MeanFlow on the ring."""
    control = method((0.8, 0.4, 0.2, 0.1))
    return {"ring": ring(flow_matching=control, meanflow=method((0.2, 0.15, 0.15, 0.15), seconds=0.005))}
