"""Checkpoints that are either whole or not there.

A checkpoint is written to a hidden sibling folder, every file is flushed to the disk, the manifest with each file's
size and checksum is written last, and only then is the folder renamed into place. A folder under its final name is
therefore complete; the manifest is checked all the same before it is loaded, because a disk can damage what was once
good. This module knows no model: what goes into a checkpoint is the caller's business.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)

PRETRAINED = "pretrained_model"
TRAINING = "training_state"
MANIFEST = "manifest.json"
_HASH_BLOCK = 1 << 24


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint, and what was passed over to get to it."""

    path: Path | None
    step: int
    passed_over: list[str]


class CheckpointStore:
    """``<run>/checkpoints``: saving, finding, pruning."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Makes one checkpoint; returns only after it is safely on the disk.

        Args:
            step: optimizer updates done.
            write: fills the folder it is given.

        Raises:
            OSError: if it could not be written (a full disk, say); nothing of it is left and the earlier
                checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            (temporary / PRETRAINED).mkdir(parents=True)
            (temporary / TRAINING).mkdir()
            write(temporary)
            seal(temporary, step)
            if final.exists():  # left by a run that was rewound past it; the newer copy is the true one
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._link_last(final)
        self._prune(step)
        return final

    def newest(self) -> Found:
        """The newest checkpoint whose manifest holds; damaged ones are passed over with the reason."""
        passed_over: list[str] = []
        for path in reversed(self._complete()):
            damage = verify(path)
            if damage is None:
                return Found(path, _step_of(path), passed_over)
            passed_over.append(f"{path}: {damage}")
        return Found(None, 0, passed_over)

    def _complete(self) -> list[Path]:
        # Exactly our names: a copy that somebody made beside them is neither loaded nor pruned.
        named = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted((p for p in named if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()), key=_step_of)

    def _link_last(self, final: Path) -> None:
        temporary = self.folder / ".last.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(final.name)
        os.replace(temporary, self.folder / "last")
        _sync(self.folder)

    def _prune(self, step: int) -> None:
        # Later steps than the one just saved are damaged and were passed over: the run went back behind them.
        complete = self._complete()
        kept = [path for path in complete if _step_of(path) <= step][-self.keep :]
        for path in complete:
            if path in kept:
                continue
            try:
                # The manifest goes first: a folder half removed by a crash is then not mistaken for a whole one.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
            except OSError as error:
                # Somebody may be reading it over NFS. The new checkpoint is safe, and the next save tries again.
                log.warning("the old checkpoint %s could not be removed yet: %s", path, error)
        for leftover in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def seal(folder: Path, step: int) -> None:
    """Flushes every file of a folder to the disk, then writes the manifest that lists them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "xxh3_128": checksum(path)}
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def verify(folder: Path) -> str | None:
    """None if every file of the manifest is there, unchanged; otherwise what is wrong."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [(name, entry["size"], entry["xxh3_128"]) for name, entry in manifest["files"].items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if not files:
        return f"its {MANIFEST} lists no file"
    for name, size, _ in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    for name, _, expected in files:
        try:
            if checksum(folder / name) != expected:
                return f"{name} is damaged: its checksum does not match"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def checksum(path: Path) -> str:
    """xxh3-128 of a file's contents."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
