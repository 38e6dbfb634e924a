"""What tests do with checkpoints: save one in one go, find what a resume would take, and write the published form."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.checkpoints import tensor_file
from agent.checkpoints.manifest import verify
from agent.checkpoints.store import CheckpointStore
from agent.models.pi.saved import PI0Saved


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that a run would continue from, and what was passed over to get to it."""

    path: Path | None
    passed_over: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_")) if self.path is not None else 0


def save(store: CheckpointStore, step: int, write: Callable[[Path], object]) -> Path:
    """One checkpoint of what ``write`` puts into the folder; what it raises leaves nothing behind."""
    temporary = store.begin(step)
    try:
        write(temporary)
    except BaseException:
        store.abandon(step)
        raise
    return store.finish(step)[0]


def newest(store: CheckpointStore) -> Found:
    """The newest candidate whose manifest holds, as `agent.training.resuming` looks for it."""
    passed_over: list[str] = []
    for path in store.candidates():
        if (damage := verify(path)) is None:
            return Found(path, passed_over)
        passed_over.append(f"{path}: {damage}")
    return Found(None, passed_over)


def write_pretrained(folder: Path, *arguments: Any, **settings: Any) -> None:
    """Writes what `pretrained_contents` says of these arguments into an existing folder."""
    files, write_small = PI0Saved().pretrained_contents(*arguments, **settings)
    for name, tensors in files.items():
        on_host = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        tensor_file.write(
            folder / name,
            {
                key: tensor if tensor_file.is_one_number(tensor) else tensor.contiguous()
                for key, tensor in on_host.items()
            },
        )
    write_small(folder)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files by their bytes, links by their target."""
    entries = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in entries
    }
