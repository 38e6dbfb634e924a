"""Lists what a training needs from the hub or from this machine; looks whether it is here and fits, and fetches it.

``agent.prepare`` fetches; ``--check true`` only looks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import hub
from agent.preflight.refusal import Refusal
from agent.spelling import amount

if TYPE_CHECKING:
    from agent.batch import Prompt
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.configuration import DatasetConfig
    from agent.data.source import Source

_DATASET_REVISION = "v3.0"  # what agent.data.recorded.files asks for
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "config.json",  # transformers looks there for whose tokenizer it is
)

log = logging.getLogger("agent.prepare")


@dataclass
class Found:
    """Files on this machine that a training needs."""

    folder: Path
    files: list[Path]
    note: str

    @property
    def size(self) -> int:
        """How many bytes the files have."""
        return sum(path.stat().st_size for path in self.files)


@dataclass
class Item:
    """Something that a training needs."""

    kind: str
    key: str
    """The config key that names it."""
    name: str
    look: Callable[[], Found]
    """Finds and checks it; raises ValueError if it is not here or does not fit."""
    fetch: Callable[[], Any] | None
    """Gets it from the hub; None if it is to be a local folder."""

    def obtain(self, away: bool) -> Found:
        """Takes what is here, else fetches it from the hub.

        Args:
            away: whether the hub was asked before and did not answer.

        Raises:
            ValueError: if it cannot be had, or does not fit.
            HubTrouble: if it can perhaps be had later.
        """
        try:
            with hub.offline():
                return self.look()
        except ValueError as error:
            if self.fetch is None:
                raise
            if away:  # one wait for a hub that does not answer is enough
                reason = "not here either" if isinstance(error, hub.Unreachable) else str(error).splitlines()[0]
                raise hub.Unreachable(f"{self.key}: '{self.name}': {reason}") from None
        log.info("fetching %s %s", self.kind, self.name)
        self.fetch()
        with hub.offline():
            return self.look()


def prepare(config: TrainPipelineConfig) -> list[str]:
    """Fetches and checks everything, and prints what is where.

    Returns:
        What is wrong, all of it; empty if a job can start.
    """
    problems: list[str] = []
    sources: list[Source] = []
    rows = [("what", "size", "config key", "where")]
    away = False
    for item in items(config, sources):
        try:
            found = item.obtain(away)
        except (ValueError, hub.HubTrouble) as error:
            away = away or isinstance(error, hub.Unreachable)
            problems.append(str(error))
            rows.append((item.kind, "missing", item.key, item.name))
            continue
        for line in found.note.splitlines():
            log.info(line)
        rows.append((item.kind, amount(found.size), item.key, str(found.folder.resolve())))
    if not any(row[0] == "data set" and row[1] == "missing" for row in rows):
        try:
            for line in check_together(config, sources):
                log.info(line)
        except ValueError as error:
            problems.append(str(error))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for what, size, key, where in rows:
        print(f"{what:<{widths[0]}}  {size:>{widths[1]}}  {key:<{widths[2]}}  {where}")
    return problems


def items(config: TrainPipelineConfig, sources: list[Source]) -> Iterator[Item]:
    """Yields what the config needs, in the order of a training's start; a look at a data set adds it to ``sources``."""
    for key, dataset in data_sets(config):
        look = partial(_look_for_dataset, dataset, config, sources)
        download = partial(_fetch_dataset, dataset, key) if dataset.root is None else None
        yield Item("data set", key, dataset.repo_id, look, download)
    if (words := tokenizer(config)) is not None:
        yield words
    if (item := weights(config)) is not None:
        yield item


def data_sets(config: TrainPipelineConfig) -> Iterator[tuple[str, DatasetConfig]]:
    """Yields config key and entry of each data set; those to train on come first."""
    for role, datasets in (("train", config.data.train.datasets), ("val", config.data.val.datasets)):
        yield from ((f"data.{role}.datasets.{number}", dataset) for number, dataset in enumerate(datasets))


def tokenizer(config: TrainPipelineConfig) -> Item | None:
    """The tokenizer; None for a policy that reads no instructions."""
    if (prompt := config.family.prompt(config.trainable)) is None:
        return None
    path, key = prompt.tokenizer, f"model_cfg.{prompt.key}"
    repository = None if Path(path).expanduser().is_dir() or "@" in path else hub.parse(path)
    fetch = partial(_fetch_tokenizer, repository, key) if repository else None
    return Item("tokenizer", key, path, partial(_look_for_tokenizer, prompt), fetch)


def weights(config: TrainPipelineConfig) -> Item | None:
    """The weights that a new run begins with; None if it draws them."""
    from agent.checkpoints.finding import find_weights

    model = config.trainable
    base = ((f"model_cfg.{key}", getattr(model, key)) for key in model.base_weights)
    for key, reference in (("load_from_checkpoint", config.load_from_checkpoint), *base):
        if reference is not None:  # the first one that is given counts
            local = Path(reference).expanduser().exists() or hub.parse(reference) is None
            fetch = None if local else partial(find_weights, reference, key)
            return Item("weights", key, reference, partial(_look_for_weights, config, key, reference), fetch)
    return None


def _look_for_weights(config: TrainPipelineConfig, key: str, reference: str) -> Found:
    from agent.checkpoints.finding import find_weights
    from agent.checkpoints.weights import account

    files = find_weights(reference, key)
    names, model = config.family.names, config.trainable
    match = (
        partial(names.from_policy, config=model)
        if key == "load_from_checkpoint"
        else partial(names.from_base, key.removeprefix("model_cfg."), config=model)
    )
    coverage, _ = account(names.shapes(model), files, match, names.fit)
    return Found(files[0].parent, files, coverage.table())


def _fetch_dataset(dataset: DatasetConfig, key: str) -> None:
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    from agent.data.recorded.episodes import choose_episodes
    from agent.data.recorded.metadata import read_metadata

    repository = hub.Repository(dataset.repo_id, "dataset", dataset.revision or _DATASET_REVISION)
    folder = hub.snapshot(repository, key, ["meta/*"], HF_LEROBOT_HUB_CACHE)
    metadata = read_metadata(dataset.repo_id, folder)
    wanted = set()
    for episode in choose_episodes(metadata, dataset.episodes, dataset.split):
        wanted.add(metadata.data_file(episode))
        wanted.update(metadata.video_file(episode, camera) for camera in metadata.video_keys)
    patterns = sorted(str(path.relative_to(folder)) for path in wanted)
    hub.snapshot(repository, key, ["meta/*", *patterns], HF_LEROBOT_HUB_CACHE)


def _look_for_dataset(dataset: DatasetConfig, config: TrainPipelineConfig, sources: list[Source]) -> Found:
    from agent.data.source import open_source

    source = open_source(
        dataset, config.trainable.chunk_size, config.data.train.video_backend, config.data.train.tolerance_s
    )
    sources.append(source)
    root = source.metadata.root
    note = f"{source}: {len(source.episodes)} episodes, {len(source)} frames"
    return Found(root, [path for path in root.rglob("*") if path.is_file()], note)


def _fetch_tokenizer(repository: hub.Repository, key: str) -> None:
    folder = hub.snapshot(repository, key, _TOKENIZER_FILES)
    if not (folder / "config.json").is_file():
        raise Refusal(
            f"{key}: '{repository}' has no config.json, and without one transformers loads no tokenizer from its cache when "
            "there is no internet",
            f"set {key} to the folder {folder}",
        )


def _look_for_tokenizer(prompt: Prompt) -> Found:
    from huggingface_hub import snapshot_download

    from agent.data.samples.task_tokens import load_tokenizer

    path, tokenizer = prompt.tokenizer, load_tokenizer(prompt.tokenizer, prompt.advice)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=[], local_files_only=True))
    files = sorted({file for pattern in _TOKENIZER_FILES[:-1] for file in folder.glob(pattern) if file.is_file()})
    return Found(folder, files, f"tokenizer {path}: {len(tokenizer)} tokens")


def check_together(config: TrainPipelineConfig, sources: list[Source]) -> list[str]:
    """Checks what concerns the data sets and the model at once, as far as the metadata tell it.

    Args:
        config: of the run.
        sources: the data sets, training first.

    Returns:
        Lines for the log.

    Raises:
        ValueError: as the training would.
    """
    from agent.data.features import check_features
    from agent.data.normalization.robot_names import assign_robots
    from agent.data.recorded.episodes import hold_out
    from agent.data.samples.transforms import load_paraphrases

    count = len(config.data.train.datasets)
    training, validation = sources[:count], sources[count:]
    _, notes = check_features(
        sources, config.family.sample_spec(config.trainable), *assign_robots(training, validation, config.data.train)
    )
    if not config.data.val.datasets and config.data.val.fraction:
        for source in training:
            hold_out(source.episodes, config.data.val.fraction)
    if config.task_paraphrase is not None:
        load_paraphrases(
            config.task_paraphrase, {task for source in training for task in source.metadata.tasks.values()}
        )
    return notes


def job_environment(config: TrainPipelineConfig) -> dict[str, str]:
    """Gives the variables with which a job finds the same files and does not ask the hub."""
    from huggingface_hub import constants
    from lerobot.utils.constants import HF_LEROBOT_HOME

    home = os.path.abspath(constants.HF_HOME)
    values = {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
    for name, place, usual in (
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE, "hub"),
        ("HF_LEROBOT_HOME", HF_LEROBOT_HOME, "lerobot"),
    ):
        if os.path.abspath(place) != os.path.join(home, usual):
            values[name] = os.path.abspath(place)
    of_one_attempt = ("VLA_ATTEMPT", "VLA_STATUS_FILE")
    values |= {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLA_") and v and k not in of_one_attempt}
    if config.use_wandb and config.wandb.mode == "online":
        values["WANDB_MODE"] = "offline"
    return values
