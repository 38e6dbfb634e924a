"""Defines the keys under `data` of a training YAML: data sets, and how they are mixed, read, normalised and augmented.

Every class checks its own values when it is filled, so that a mistake is told before anything is opened. Nothing heavy is
imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal


@dataclass
class CameraAugmentation:
    """What is different for one camera; what is not given is as for the others."""

    crop_scale: tuple[float, float] | None = None
    """For this camera alone."""
    crop_ratio: tuple[float, float] | None = None
    """For this camera alone."""
    brightness: float | None = None
    """For this camera alone."""
    contrast: tuple[float, float] | None = None
    """For this camera alone."""
    saturation: tuple[float, float] | None = None
    """For this camera alone."""
    hue: float | None = None
    """For this camera alone."""


@dataclass
class AugmentationConfig:
    """Random changes of a data set's pictures; every value is drawn anew for each sample and camera."""

    crop_scale: tuple[float, float] = (0.8, 1.0)
    """Share of the picture's area that is cut out and enlarged to the whole again, least and most; [1, 1] with `crop_ratio`
    [1, 1] keeps all of it."""
    crop_ratio: tuple[float, float] = (0.9, 1.1)
    """Width by height of what is cut out, least and most, relative to the picture's own: 1 distorts nothing."""
    brightness: float = 0.1
    """Every value is multiplied by a factor from 1 - `brightness` to 1 + `brightness`; 0 leaves it."""
    contrast: tuple[float, float] = (0.9, 1.1)
    """Least and largest factor of the differences from the picture's mean grey; [1, 1] leaves them."""
    saturation: tuple[float, float] = (0.9, 1.1)
    """Least and largest factor of the differences from each pixel's own grey; [1, 1] leaves them."""
    hue: float = 0.05
    """Hues are turned by up to this share of the colour circle, either way; 0 leaves them."""
    cameras: dict[str, CameraAugmentation | None] | None = None
    """Model camera → keys of these that are different for it, or null to leave its pictures as they are."""

    def __post_init__(self) -> None:
        self._check("augmentation")
        for camera in self.cameras or {}:
            if (own := self.of_camera(camera)) is not None:
                own._check(f"augmentation.cameras.{camera}")

    def of_camera(self, camera: str) -> AugmentationConfig | None:
        """The values for one camera; None if its pictures are left as they are."""
        given = (self.cameras or {}).get(camera, CameraAugmentation())
        if given is None:
            return None
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        own = {name: value for name, value in values.items() if value is not None}
        merged = replace(self, cameras=None)
        for name, value in own.items():  # not by ``replace``, whose message would not name the camera
            setattr(merged, name, value)
        return merged

    def _check(self, key: str) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"{key}.crop_scale must be two shares 0 < least ≤ most ≤ 1, such as [0.8, 1], got {[low, high]}"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(
                f"{key}.crop_ratio must be two ratios 0 < least ≤ most, such as [0.9, 1.1], got {[low, high]}"
            )
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 2:
                raise ValueError(
                    f"{key}.{name} must be two factors 0 ≤ least ≤ largest ≤ 2, such as [0.9, 1.1], got {[low, high]}"
                )
        if not 0 <= self.brightness <= 1:
            raise ValueError(
                f"{key}.brightness must be 0 to 1, such as 0.1 for factors of 0.9 to 1.1, got {self.brightness}"
            )
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"{key}.hue must be 0 to 0.5, a share of the colour circle, such as 0.05, got {self.hue}")


@dataclass
class DatasetConfig:
    """One data set of a mixture."""

    repo_id: str
    """Name of the LeRobot v3 data set, ``user/name``; downloaded from the hub when `root` is not given."""
    root: str | None = None
    """Local folder of the data set: the one that holds ``meta/``, ``data/`` and ``videos/``."""
    weight: float | None = None
    """Relative share of the samples. Give it to every data set or to none; with none, all frames form one pool."""
    episodes: list[int] | None = None
    """The episodes to use; all when neither this nor `split` is given."""
    split: str | None = None
    """The episodes to use, as a slice: ``train``, ``train[:95%]``, ``train[10:200]``, ``train[5%:]``."""
    cameras: dict[str, str | None] | None = None
    """Model camera → key in the data set, or null where this robot has no such camera. Without it the keys must
    be the model's own. Cameras of the data set that are not named here are left out."""
    robot: str | None = None
    """Name of the robot. Under `data.train.normalization: per_dataset`, data sets of one name are normalised together; when
    not given, each by itself. A validation data set says here which one it is of."""
    state: str = "observation.state"
    """Key of the robot's state in the data set."""
    action: str = "action"
    """Key of the actions in the data set."""
    augmentation: AugmentationConfig | None = None
    """Random crops and colours of the training pictures; none when not given. `{}` stands for the values below. Validation
    pictures are never changed."""
    frames: str | None = None
    """Folder of this data set's frame stores; ``frames`` in its own when not given. For a fast disk, or a data set that
    cannot be written to."""
    revision: str | None = None
    """Revision on the hub: a branch, tag or commit; LeRobot's v3.0 tag when not given."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(
                f"weight of data set {self.repo_id} must be above 0, got {self.weight}; leave out a data set of weight 0"
            )
        if self.episodes is not None and self.split is not None:
            raise ValueError(f"data set {self.repo_id}: give `episodes` or `split`, not both")

    @property
    def robot_or_own(self) -> str:
        """The robot that it is normalised as under `per_dataset`: the one named, or one of its own."""
        return self.robot or self.repo_id


@dataclass
class TrainDataConfig:
    """The training data and how it is read."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """The data sets to train on."""
    balance: Literal["frames", "equal", "given"] | None = None
    """Which share of the samples a data set gives: `frames`, that of its frames, each of which then comes once an epoch;
    `equal`, the same for all; `given`, its `weight`. When not given, `given` if there are weights and else `frames`."""
    normalization: Literal["merged", "per_dataset"] | None = None
    """Statistics of states and actions: `merged`, one set over all data sets; `per_dataset`, one for each, or for all of
    one `robot`, which may then have dimensions of its own. When not given, `merged` unless the robots differ, which is
    refused."""
    deploy: str | None = None
    """Under `per_dataset`: the data set or `robot` that a checkpoint's own processors are made for; the first one when
    not given. `agent.export --statistics` takes another later."""
    num_workers: int = 4
    """Processes that read samples, per GPU; 0 reads in the training process. Changes speed, never the samples."""
    prefetch_factor: int = 2
    """Micro-batches that each worker keeps ready."""
    frame_store: Literal["auto", "none", "jpeg", "lossless", "raw"] = "auto"
    """Where pictures come from: a store that `python -m agent.data.prepare` made of this kind; `auto` for whichever is
    there, and the videos themselves when there is none; `none` for the videos."""
    frame_quality: int = 95
    """Quality of the JPEGs in a store, 1 to 100."""
    video_backend: Literal["torchcodec", "pyav"] | None = None
    """What decodes videos; when not given, torchcodec where it loads and otherwise pyav."""
    tolerance_s: float = 1e-4
    """How far a video frame's time stamp may be from the one asked for, in seconds."""

    def __post_init__(self) -> None:
        self.weights()
        if self.deploy is not None and self.normalization != "per_dataset":
            raise ValueError(
                f"data.train.deploy is {self.deploy}, but there is one set of statistics: leave it out, or write "
                "data.train.normalization: per_dataset"
            )
        if not 1 <= self.frame_quality <= 100:
            raise ValueError(f"data.train.frame_quality must be 1 to 100, got {self.frame_quality}")
        for key, least in (("num_workers", 0), ("prefetch_factor", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"data.train.{key} must be at least {least}, got {getattr(self, key)}")
        if self.tolerance_s <= 0:
            raise ValueError(f"data.train.tolerance_s must be above 0, got {self.tolerance_s}")

    def weights(self) -> list[float | None] | None:
        """The share of each data set's samples, relative to the others; None for one pool of all frames.

        Raises:
            ValueError: if `balance` and the weights contradict each other.
        """
        weights = [dataset.weight for dataset in self.datasets]
        weighted = [dataset.repo_id for dataset in self.datasets if dataset.weight is not None]
        if self.balance in ("frames", "equal") and weighted:
            raise ValueError(
                f"data.train.balance is {self.balance}, but {', '.join(weighted)} has a weight: leave `weight` out, or "
                "write data.train.balance: given"
            )
        if self.balance == "given" and len(weighted) < len(weights):
            without = ", ".join(dataset.repo_id for dataset in self.datasets if dataset.weight is None)
            raise ValueError(
                f"data.train.balance is given, but {without} has no weight: write `weight: NUMBER` in its entry, or "
                "data.train.balance: equal or frames"
            )
        return [1.0] * len(weights) if self.balance == "equal" else weights


@dataclass
class ValDataConfig:
    """The validation data."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Data sets of their own for validation. When empty, `fraction` is held out of the training data."""
    fraction: float = 0.05
    """Fraction of each training data set's episodes that is held out for validation, evenly spaced, at least one
    episode; 0 trains on everything. Ignored when `datasets` is given."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"data.val.fraction must be at least 0 and below 1, got {self.fraction}")


@dataclass
class DataConfig:
    """Training and validation data."""

    train: TrainDataConfig = field(default_factory=TrainDataConfig)
    """The training data."""
    val: ValDataConfig = field(default_factory=ValDataConfig)
    """The validation data."""
    statistics: Literal["dataset", "checkpoint"] = "dataset"
    """What states and actions are normalised with: statistics of the training data, or those that the weights of
    `load_from_checkpoint` were trained with, for a robot that they know."""

    def __post_init__(self) -> None:
        if self.statistics == "checkpoint" and self.train.normalization == "per_dataset":
            raise ValueError(
                "data.statistics: checkpoint is one set of statistics, and data.train.normalization: per_dataset wants "
                "one for each data set: write data.statistics: dataset, or data.train.normalization: merged"
            )
