"""Finds the safetensors files behind what a user wrote: a folder, a file, a run, or a repository of the hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from agent import hub
from agent.checkpoints.manifest import Folder, is_inside

# The weights, and what may hold their statistics.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "assets/*norm_stats.json"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weights(reference: str, key: str) -> list[Path]:
    """Finds the safetensors files behind a folder, a file or a hub id (``owner/name`` or ``owner/name@revision``).

    Args:
        reference: what the user wrote.
        key: the config key it stands under, for messages.

    Raises:
        ValueError: if there is nothing there; never an empty list.
        HubTrouble: if the hub may have it another time.
    """
    path = Path(reference).expanduser()
    if path.suffix in _PICKLES and path.exists():
        raise ValueError(f"{key}: {path} is a pickle file, which can run code when opened{_converting(path)}")
    if path.is_file():
        if Folder(path.parent).file(path.name) is None:
            raise ValueError(
                f"{key}: {path} is in a checkpoint, whose manifest does not list it; copy it to a folder of its own if it is "
                "meant"
            )
        return [path]
    for folder in (
        path,
        path / "pretrained_model",
        path / "last" / "pretrained_model",
        path / "checkpoints/last/pretrained_model",
    ):
        if folder.is_dir() and (files := _files_in(folder, key)):
            return files
    if path.is_dir():
        pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
        hint = f"; its {pickles[0].name} is a pickle file{_converting(pickles[0])}" if pickles else ""
        raise ValueError(
            f"{key}: the folder {path} holds no model.safetensors and no model.safetensors.index.json{hint}"
        )
    repository = None if path.is_absolute() or reference.startswith((".", "~")) else hub.parse(reference)
    if repository is None:
        raise ValueError(
            f"{key}: there is no file or folder {reference}, and it does not look like a hub id (owner/name)"
        )
    return _files_on_hub(repository, key)


def _files_in(folder: Path, key: str) -> list[Path]:
    there = Folder(folder)
    if (index := there.file("model.safetensors.index.json")) is not None:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            names = []
        if not names:
            raise ValueError(f"{key}: {index} cannot be read as an index, it is truncated or damaged")
        if outside := [name for name in names if not is_inside(name)]:
            raise ValueError(
                f"{key}: {index} names {outside[0]}, which is outside of its folder; nothing is read from there"
            )
        absent = [name for name in names if there.file(name) is None]
        if absent:
            raise ValueError(
                f"{key}: {index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there"
            )
        return [folder / name for name in names]
    single = there.file("model.safetensors")
    return [single] if single is not None else []


def _files_on_hub(repository: hub.Repository, key: str) -> list[Path]:
    folder = hub.snapshot(repository, key, _HUB_FILES)
    files = _files_in(folder, key)
    if not files:
        # Without internet this is what the cache has, which can be less than the hub.
        raise ValueError(
            f"{key}: '{repository}' holds no model.safetensors, as far as it was downloaded to {folder}; if the hub has "
            f"one, run {repository.command} on a machine with internet and the same HF_HOME"
        )
    return files


def _converting(pickle: Path) -> str:
    """Says how to convert a pickle file. Read this way it runs no code, and tensors that share memory are written apart."""
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        "tensors = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({name: t.clone().contiguous() for name, t in tensors.items()}, sys.argv[2])"
    )
    command = ["uv", "run", "python", "-c", program, str(pickle), str(pickle.with_name("model.safetensors"))]
    return f"; convert it to safetensors first:\n{shlex.join(command)}"
