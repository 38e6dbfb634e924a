"""Exports a checkpoint: writes its weights, config, statistics and model card in the format of another program."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.checkpoints.manifest import Folder
from agent.deployment.saved_checkpoint import (
    PREPROCESSOR,
    Source,
    bases,
    datasets_of,
    open_checkpoint,
    prevailing_dtype,
    statistics_of,
    trained_on,
)
from agent.safe_files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from agent.deployment.robots import Deployment
    from agent.models.family import Contents


def export(options: argparse.Namespace) -> None:
    """Writes the export, and uploads it if ``--push_to_hub`` is given.

    Args:
        options: the command line of ``agent.export``.

    Raises:
        ValueError: for every mistake that the user has to correct.
        OSError: if a file cannot be written.
    """
    from agent.deployment import publishing

    out = Path(options.out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not an empty folder; name another, nothing is overwritten")
    if options.push_to_hub:
        publishing.check(options.push_to_hub, options.private)

    import torch

    source = open_checkpoint(options.checkpoint)
    cast = getattr(torch, options.save_dtype) if options.save_dtype else None
    dtype = cast or prevailing_dtype(source.files)
    deployed = _deployment(options, source)
    if deployed is not None:
        source = replace(source, config=deployed.config, written=deployed.written)
    statistics = deployed.statistics if deployed is not None else statistics_of(source.pretrained)
    contents = _contents(options.to, source, statistics, dtype)
    contents.notes.extend(_other_robots(options, source))
    small = _small_files(options, source, contents, deployed)
    if options.push_to_hub:
        publishing.create(options.push_to_hub, options.private)
    with replacing(out) as temporary:
        temporary.mkdir(parents=True)
        size = _write_weights(temporary / "model.safetensors", source, contents, cast)
        for name, content in small.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        _write_card(temporary, options, source, contents, dtype)
    for note in contents.notes:
        print(f"note: {note}")
    print(f"{out}: {options.to}, {len(contents.names) + len(contents.further)} tensors, {size / 1e9:.3g} GB")
    if options.push_to_hub:
        print(publishing.upload(options.push_to_hub, out, f"{source.name}, format {options.to}"))


def _deployment(options: argparse.Namespace, source: Source) -> Deployment | None:
    """Returns config and processors for the robot that ``--statistics`` names; None for the checkpoint's own."""
    from agent.deployment.robots import deployment

    if options.statistics is None:
        return None
    return deployment(source.pretrained, source.config, source.written, options.statistics)


def _other_robots(options: argparse.Namespace, source: Source) -> list[str]:
    """Returns a note if the checkpoint could be exported for other robots too."""
    from agent.deployment.robots import robots_of

    robots = robots_of(source.pretrained)
    chosen = options.statistics or (robots[0] if robots else None)
    others = [robot for robot in robots if robot != chosen]
    return [f"it acts on {chosen}; --statistics exports it for {' or '.join(others)}"] if others else []


def _contents(target: str, source: Source, statistics: Any, dtype: torch.dtype) -> Contents:
    from agent.models import registry

    datasets = [entry["repo_id"] for entry in datasets_of(source.training)]
    asset = datasets[0] if len(datasets) == 1 and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", datasets[0]) else source.name
    saved = registry.family(source.config).saved
    if target not in saved.formats:
        raise ValueError(
            f"--to: a {source.config.title} policy cannot be exported to {target}; write {' or '.join(saved.formats)}"
        )
    return saved.export(target, source.config, source.written, statistics, dtype, asset)


def _small_files(
    options: argparse.Namespace, source: Source, contents: Contents, deployed: Deployment | None
) -> dict[str, bytes]:
    """Maps file → contents, for all files but the weights and the model card."""
    from agent.deployment.model_card import is_hub_id

    documents = dict(contents.documents)
    files: dict[str, bytes] = {}
    if options.to == "lerobot":
        documents["config.json"] = dict(documents["config.json"])
        if not is_hub_id(documents["config.json"].get("pretrained_path") or ""):
            documents["config.json"]["pretrained_path"] = None  # it is a folder on this machine
        there = Folder(source.pretrained)
        for path in [*there.matching("policy_*"), *there.matching("dimension_names.json")]:
            files[path.name] = path.read_bytes()
        files |= deployed.processors if deployed is not None else {}
        if PREPROCESSOR in files:
            documents[PREPROCESSOR] = _with_tokenizer(options, json.loads(files[PREPROCESSOR]))
        else:
            contents.notes.append("the checkpoint has no processors, so LeRobot cannot normalise for it")
    elif options.tokenizer:
        raise ValueError(f"--tokenizer: {options.to} stores no tokenizer's name; leave it out")
    return files | {name: (json.dumps(entry, indent=2) + "\n").encode() for name, entry in documents.items()}


def _with_tokenizer(options: argparse.Namespace, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the preprocessor with the tokenizer that ``--tokenizer`` names, or else its own."""
    for step in content.get("steps", []):
        if step.get("registry_name") == "tokenizer_processor":
            name = step["config"]["tokenizer_name"] = options.tokenizer or step["config"]["tokenizer_name"]
            if options.push_to_hub and Path(name).expanduser().is_absolute():
                raise ValueError(
                    f"--push_to_hub: the preprocessor takes the tokenizer from {name}, which others do not have; name it "
                    "by its place on the hub: --tokenizer google/paligemma-3b-pt-224"
                )
    return content


def _write_weights(path: Path, source: Source, contents: Contents, cast: torch.dtype | None) -> int:
    """Writes ``model.safetensors`` and returns its size in bytes.

    Raises:
        ValueError: if the checkpoint's tensors do not match its config.
    """
    from agent.checkpoints.weights import account
    from agent.deployment import exported_weights
    from agent.models import registry

    naming = registry.family(source.config).names
    match = partial(naming.from_policy, config=source.config)
    coverage, places = account(naming.shapes(source.config), source.files, match, naming.fit)
    if coverage.adapted:
        first = next(iter(coverage.adapted))
        raise ValueError(
            f"{coverage.source}: {coverage.expected[first]} has another shape than config.json says "
            f"({coverage.adapted[first]}); correct config.json"
        )
    places_of = {ours: (file, theirs) for file, found in places.items() for theirs, (ours, _) in found.items()}
    with exported_weights.Archives(source.files) as archives:
        tensors: dict[str, Callable[[], Tensor]] = {
            name: partial(archives.tensor, *places_of[ours]) for name, ours in contents.names.items()
        }
        tensors |= {name: partial(lambda tensor: tensor, tensor) for name, tensor in contents.further.items()}
        fixed = {name: tensor.dtype for name, tensor in contents.further.items()}
        return exported_weights.write(path, tensors, fixed, cast)


def _write_card(
    folder: Path, options: argparse.Namespace, source: Source, contents: Contents, dtype: torch.dtype
) -> None:
    from agent.deployment import model_card
    from agent.models import registry

    saved = registry.family(source.config).saved
    location = options.push_to_hub or Path(options.out).expanduser().resolve().name
    facts = model_card.Facts(
        name=options.push_to_hub.split("/")[1] if options.push_to_hub else source.name,
        target=options.to,
        title=source.config.title,
        paper=saved.paper,
        format=saved.formats[options.to],
        usage=saved.usage(options.to, location, source.written),
        model=source.written,
        dtype=str(dtype).removeprefix("torch."),
        step=source.step,
        averaged=source.averaged,
        training=source.training,
        data=[trained_on(entry, source.training, contents.notes) for entry in datasets_of(source.training)],
        validation=model_card.last_validation(source.run / "metrics.jsonl", source.step) if source.run else {},
        bases=bases(source),
        notes=contents.notes,
    )
    model_card.write(folder, facts)
