"""Judges: what measures the samples of a network on one data set, found by the reference that the set gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastdistill.data import DATASETS, make_data_set
from fastdistill.lookup import find
from fastdistill.train import ConfigError, TrainConfig
from fastdistill.train.sampling import Sampling


class Judge(Protocol):
    """Protocol of a judge. A data set names what makes it, which is called with a folder and the data set.

    The folder is where it may keep what is slow to make, such as a classifier. What makes a judge, e.g. its class, has
    the attribute `headline`. Four more may be left out:

        caption         sentences about the numbers, below the first figure of a comparison.
        at_once         whether a run is measured as soon as it is trained.
        plot            plot(run) -> the path of a picture of the finished run, drawn when it is measured at once.
        training_steps  how long `fastdistill compare` trains; without it as long as the configuration says.
    """

    headline: tuple[str, str]
    """The metrics that a comparison shows: the one that it ranks by, where less is better, and a second one."""

    def evaluate(
        self, net: nn.Module, config: TrainConfig, steps: Sequence[int], *, count: int | None, how: Sampling, seed: int
    ) -> dict[str, Any]:
        """Draw samples in each number of steps, from the same noise, and measure them.

        Args:
            net, config: as `fastdistill.train.load_run` returns them.
            count: of samples; None: the judge's own choice.
            how: as `fastdistill.train.sampling.draw` takes it.
            seed: of all noise.

        Returns:
            `samples` and `set` (how many in all, and of how many each number is); `steps`, {number: {metric: value}}
            with the same metrics in each, among them `seconds_per_sample`; `references`, {name: {metric: value}}, of
            what gives the numbers their meaning; and more if it likes.
        """
        ...


def judge_maker(name: str, reference: str | None) -> Any:
    """Return what makes the judge of a data set.

    Args:
        name: of the set, for messages.
        reference: the set's attribute `judge`.

    Raises:
        ConfigError: there is none, or it leads nowhere, or what it makes isn't a judge.
    """
    if reference is None:
        raise ConfigError(
            f"data.name: {name} has no judge, so nothing can measure its samples; give the set an attribute judge = "
            f"'package.module:attribute' of one, with the attribute headline and the method evaluate of "
            f"fastdistill.eval.judges.Judge"
        )
    try:
        found = find(reference, "the judge")
    except ValueError as error:
        raise ConfigError(f"data.name: the judge of {name}: {error}") from error
    missing = [attribute for attribute in ("headline", "evaluate") if not hasattr(found, attribute)]
    if missing or not callable(found):
        lacks = f"without {' and '.join(missing)}" if missing else "which can't be called to make one"
        raise ConfigError(
            f"data.name: the judge of {name}: expected what makes a fastdistill.eval.judges.Judge, got {reference}, "
            f"{lacks}"
        )
    return found


def judge_maker_of(config: TrainConfig) -> Any:
    """Return what makes the judge of a run's data set; ConfigError as `judge_maker`."""
    return judge_maker(config.data.name, getattr(config.data.build(), "judge", None))


def make_judge_of(name: str, folder: Path) -> Judge:
    """Return the judge of a data set that needs no settings; ConfigError as `judge_maker`."""
    data = make_data_set(name)
    return judge_maker(name, getattr(data, "judge", None))(folder, data)


def make_judge(config: TrainConfig, folder: Path) -> Judge:
    """Return the judge of a run's data set, which may keep files in the folder; ConfigError as `judge_maker`."""
    return judge_maker_of(config)(folder, config.data.build())


def headline_of(name: str) -> tuple[str, str]:
    """Return the headline of the judge of a set that comes with fastdistill; ConfigError as `judge_maker`."""
    return judge_maker(name, getattr(DATASETS.get(name), "judge", None)).headline


def judged() -> list[str]:
    """Return the names of the data sets that come with fastdistill and have a judge."""
    return [name for name, maker in DATASETS.items() if getattr(maker, "judge", None) is not None]
