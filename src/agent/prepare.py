"""Fetches and checks what a training needs from the hub, for compute nodes without internet:
``uv run python -m agent.prepare --config_path config/train/X.yaml [--KEY VALUE …]``, on a machine that has it.

Takes the arguments of the training itself. What is here already is not asked for again; then everything is looked up
once more the way a job without internet will, without a GPU and without reading the weights. The last lines are the
environment that the job needs. With ``--frame_store true`` the videos are decoded into frame stores as well, as
``agent.data.prepare`` does. Exit codes: 0 ready, 2 something is missing or does not fit.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import command_line, hub
from agent.data.prepare import own_arguments, prepare_all

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.source import DatasetConfig, Source

_DATASET_REVISION = "v3.0"  # what agent.data.files asks for
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
    """Something that a training needs, on this machine."""

    folder: Path
    files: list[Path]
    note: str

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)


@dataclass
class Item:
    """Something that a training needs."""

    kind: str
    key: str
    """The config key that asks for it."""
    name: str
    look: Callable[[], Found]
    """Finds and checks it; raises ValueError if it is not here or does not fit."""
    fetch: Callable[[], Any] | None
    """Gets it from the hub; None if it is to be a local folder."""

    def obtain(self, away: bool) -> Found:
        """What is here, or can be had from the hub.

        Args:
            away: the hub was asked before and does not answer.

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


def items(config: TrainPipelineConfig, sources: list[Source]) -> Iterator[Item]:
    """What the config needs, in the order of a training's start; looking at a data set adds it to ``sources``."""
    model: Any = config.model_cfg
    for role, datasets in (("train", config.data.train.datasets), ("val", config.data.val.datasets)):
        for number, dataset in enumerate(datasets):
            key = f"data.{role}.datasets.{number}"
            look = partial(_look_for_dataset, dataset, config, sources)
            download = partial(_fetch_dataset, dataset, key) if dataset.root is None else None
            yield Item("data set", key, dataset.repo_id, look, download)
    yield _tokenizer("model_cfg.tokenizer_path", model.tokenizer_path)
    for key, reference in (
        ("load_from_checkpoint", config.load_from_checkpoint),
        ("model_cfg.paligemma_pretrained_path", model.paligemma_pretrained_path),
    ):
        if reference is not None:  # the first one that is given counts
            yield _weights(config, key, reference)
            return


def _tokenizer(key: str, path: str) -> Item:
    repository = None if Path(path).expanduser().is_dir() or "@" in path else hub.parse(path)
    fetch = partial(_fetch_tokenizer, repository, key) if repository else None
    return Item("tokenizer", key, path, partial(_look_for_tokenizer, path), fetch)


def _weights(config: TrainPipelineConfig, key: str, reference: str) -> Item:
    from agent import weights

    local = Path(reference).expanduser().exists() or hub.parse(reference) is None
    fetch = None if local else partial(weights.find_weights, reference, key)
    return Item("weights", key, reference, partial(_look_for_weights, config, key, reference), fetch)


def _look_for_weights(config: TrainPipelineConfig, key: str, reference: str) -> Found:
    from agent import weights
    from agent.models import registry

    files = weights.find_weights(reference, key)
    adapter = registry.adapter(config.model_cfg)
    match = adapter.from_lerobot if key == "load_from_checkpoint" else adapter.from_paligemma
    shapes = adapter.shapes(config.model_cfg)
    coverage, _ = weights.account(shapes, files, partial(match, config=config.model_cfg), adapter.fit)
    return Found(files[0].parent, files, coverage.table())


def _fetch_dataset(dataset: DatasetConfig, key: str) -> None:
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    from agent.data import files
    from agent.data.episodes import choose_episodes

    repository = hub.Repository(dataset.repo_id, "dataset", dataset.revision or _DATASET_REVISION)
    folder = hub.snapshot(repository, key, ["meta/*"], HF_LEROBOT_HUB_CACHE)
    metadata = files.read_metadata(dataset.repo_id, folder)
    wanted = set()
    for episode in choose_episodes(metadata, dataset.episodes, dataset.split):
        wanted.add(metadata.data_file(episode))
        wanted.update(metadata.video_file(episode, camera) for camera in metadata.video_keys)
    patterns = sorted(str(path.relative_to(folder)) for path in wanted)
    hub.snapshot(repository, key, ["meta/*", *patterns], HF_LEROBOT_HUB_CACHE)


def _look_for_dataset(dataset: DatasetConfig, config: TrainPipelineConfig, sources: list[Source]) -> Found:
    from agent.data.source import open_source

    model: Any = config.model_cfg
    source = open_source(dataset, model.chunk_size, config.data.train.video_backend, config.data.train.tolerance_s)
    sources.append(source)
    root = source.metadata.root
    note = f"{source}: {len(source.episodes)} episodes, {len(source)} frames"
    return Found(root, [path for path in root.rglob("*") if path.is_file()], note)


def _fetch_tokenizer(repository: hub.Repository, key: str) -> None:
    folder = hub.snapshot(repository, key, _TOKENIZER_FILES)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{key}: '{repository}' has no config.json, and without one transformers loads no tokenizer from its cache when "
            f"there is no internet; set {key} to the folder {folder}"
        )


def _look_for_tokenizer(path: str) -> Found:
    from huggingface_hub import snapshot_download

    from agent.data.transforms import load_tokenizer

    tokenizer = load_tokenizer(path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=[], local_files_only=True))
    files = sorted({file for pattern in _TOKENIZER_FILES[:-1] for file in folder.glob(pattern) if file.is_file()})
    return Found(folder, files, f"tokenizer {path}: {len(tokenizer)} tokens")


def check_together(config: TrainPipelineConfig, sources: list[Source]) -> list[str]:
    """What concerns the data sets and the model at once, as far as the metadata tell.

    Args:
        config: of the run.
        sources: the data sets, training first.

    Returns:
        Lines for the log.

    Raises:
        ValueError: as the training would.
    """
    from agent.data.episodes import hold_out
    from agent.data.features import check_features
    from agent.data.transforms import SampleSpec, load_paraphrases

    values: dict[str, Any] = {field.name: getattr(config.model_cfg, field.name) for field in fields(SampleSpec)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    _, notes = check_features(sources, SampleSpec(**values))
    training = sources[: len(config.data.train.datasets)]
    if not config.data.val.datasets and config.data.val.fraction:
        for source in training:
            hold_out(source.episodes, config.data.val.fraction)
    if config.task_paraphrase is not None:
        load_paraphrases(config.task_paraphrase, {task for source in training for task in source.metadata.tasks})
    return notes


def environment(config: TrainPipelineConfig) -> dict[str, str]:
    """The variables under which a job finds the same things, and asks nobody."""
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
        rows.append((item.kind, _readable(found.size), item.key, str(found.folder.resolve())))
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


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\nThe arguments are those of run.py:\n")
    if os.environ.get("WANDB_MODE", "online") == "online":
        os.environ["WANDB_MODE"] = "offline"  # as the job will have it: no key is needed
    try:
        arguments, skip_bad_episodes, workers, stores = own_arguments(arguments)
        parsed = command_line.parse(arguments, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if parsed is None:  # --help
        return 0
    config, notes = parsed
    # stdout is for what was found and what to export
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for note in notes:
        log.info(note)
    problems = prepare(config)
    if stores and not problems:
        problems = prepare_all(config, skip_bad_episodes=skip_bad_episodes, workers=workers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("\n# ready; a job needs this environment:")
    for name, value in environment(config).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
