"""Find the judge of a data set, which measures a network's samples, by the reference that the set gives."""

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
    """Declare what every judge has.

    A data set names the judge's maker, usually its class, which is called with a folder and the data set. In the folder
    the judge may keep files that are slow to make, such as a classifier. The maker has the attribute `headline`. Four
    more attributes are optional:

        caption         sentences about the numbers, for below the first figure of a comparison.
        at_once         True if a run is measured as soon as it is trained.
        plot            plot(run) -> the path of a picture of the finished run, drawn when it is measured at once.
        training_steps  the number of steps for which `fastdistill compare` trains; the configuration's by default.
    """

    headline: tuple[str, str]
    """The two metrics that a comparison shows. It ranks by the first, where less is better."""

    def evaluate(
        self, net: nn.Module, config: TrainConfig, steps: Sequence[int], *, count: int | None, how: Sampling, seed: int
    ) -> dict[str, Any]:
        """Draw samples in each number of steps, from the same noise, and measure them.

        Args:
            net, config: network and configuration, as `fastdistill.train.load_run` returns them.
            steps: the numbers of sampling steps.
            count: the number of samples; None leaves it to the judge.
            how: the way of sampling, as `fastdistill.train.sampling.draw` takes it.
            seed: the seed of all noise.

        Returns:
            `samples`, the number of samples in all; `set`, the number of samples behind each value; `steps`,
            {number: {metric: value}} with the same metrics in each, including `seconds_per_sample`; `references`,
            {name: {metric: value}}, which give the numbers their meaning. A judge may add more.
        """
        ...


def judge_maker(name: str, reference: str | None) -> Any:
    """Return the maker of a data set's judge.

    Args:
        name: the name of the set, for messages.
        reference: the set's attribute `judge`.

    Raises:
        ConfigError: The reference is None, leads nowhere, or leads to something that doesn't make a judge.
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
    """Return the maker of the judge of a run's data set; the ConfigError of `judge_maker` is possible."""
    return judge_maker(config.data.name, getattr(config.data.build(), "judge", None))


def make_judge_of(name: str, folder: Path) -> Judge:
    """Make the judge of a data set that needs no settings; the ConfigError of `judge_maker` is possible."""
    data = make_data_set(name)
    return judge_maker(name, getattr(data, "judge", None))(folder, data)


def make_judge(config: TrainConfig, folder: Path) -> Judge:
    """Make the judge of a run's data set, which may keep files in the folder; see `judge_maker` for errors."""
    return judge_maker_of(config)(folder, config.data.build())


def headline_of(name: str) -> tuple[str, str]:
    """Return the headline of the judge of one of fastdistill's data sets; see `judge_maker` for errors."""
    return judge_maker(name, getattr(DATASETS.get(name), "judge", None)).headline


def judged() -> list[str]:
    """Return the names of fastdistill's data sets that have a judge."""
    return [name for name, maker in DATASETS.items() if getattr(maker, "judge", None) is not None]
