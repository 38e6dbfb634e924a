"""Decides which data sets are of one robot, and are thus normalised alike."""

from __future__ import annotations

from collections.abc import Sequence

from agent.data.configuration import DatasetConfig, TrainDataConfig
from agent.data.source import Source


def robot_names(training: Sequence[Source], config: TrainDataConfig) -> list[str]:
    """Names the robot of each training data set: those of one name are normalised together.

    Raises:
        ValueError: if the config leaves open how data sets of different robots are to be normalised.
    """
    named = [source.config.robot_or_own for source in training]
    if config.normalization == "per_dataset":
        return named
    kinds: dict[str, str] = {}
    for source in training:
        kind = source.config.robot or source.metadata.info.get("robot_type")
        if kind and kind != "unknown":
            kinds.setdefault(kind, str(source))
    if config.normalization is None and len(kinds) > 1:
        listed = ", ".join(f"{source} of {kind}" for kind, source in kinds.items())
        raise ValueError(
            f"the data sets are of different robots ({listed}), and one set of statistics would normalise them all alike: "
            "write data.train.normalization: per_dataset, or merged if their states and actions do mean the same"
        )
    return [named[0]] * len(named)


def assign_robots(
    training: Sequence[Source], validation: Sequence[Source], config: TrainDataConfig
) -> tuple[list[str], str]:
    """Names the robot of each data set, those of validation last, and the one that a checkpoint's own processors are made for.

    Raises:
        ValueError: if a data set is validated on whose robot is not trained on, or ``deploy`` is none that is.
    """
    names = robot_names(training, config)
    known = list(dict.fromkeys(names))
    if config.deploy is not None and config.deploy not in known:
        raise ValueError(
            f"data.train.deploy is {config.deploy!r}, which is no robot of the training data: write one of "
            f"{', '.join(known)}"
        )
    for source in validation:
        name = source.config.robot_or_own
        if config.normalization == "per_dataset" and name not in known:
            raise ValueError(
                f"{source}, for validation, would be normalised as {name!r}, which is not trained on: write `robot:` in its "
                f"entry, one of {', '.join(known)}"
            )
        names.append(name if config.normalization == "per_dataset" else known[0])
    return names, config.deploy or known[0]


def robot_alone(dataset: DatasetConfig, config: TrainDataConfig) -> tuple[list[str], str]:
    """Names them for one data set by itself, to look at its features before the others are opened."""
    if config.normalization != "per_dataset":
        return [""], ""
    return [dataset.robot_or_own], config.deploy or config.datasets[0].robot_or_own
