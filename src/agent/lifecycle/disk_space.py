"""Finds out which disk is full, where an error says only that one is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = tuple(os.strerror(number) for number in _FULL)
_ENOUGH = 1 << 20  # bytes: with less than this free, a disk is named as full


def which_disk(error: BaseException, run_dir: Path) -> str:
    """Names the full places among those that a run writes to; empty if the error is another one, or names its file itself.

    Args:
        error: with what led to it.
        run_dir: the run's folder.
    """
    chain, cause = [error], error.__cause__ or error.__context__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not any(getattr(e, "errno", None) in _FULL or any(word in str(e) for word in _WORDS) for e in chain):
        return ""
    if any(isinstance(e, OSError) and e.errno in _FULL and e.filename for e in chain):
        return ""
    found = {name: _free(place) for name, place in _places(run_dir).items()}
    full = [name for name, (free, files) in found.items() if free < _ENOUGH or files == 0]
    if full:
        return f"full: {', '.join(full)}"
    rooms = ", ".join(f"{name} {free / 1e9:.1f} GB" for name, (free, _) in found.items())
    return f"free is now: {rooms}; a quota does not show here"


def _places(run_dir: Path) -> dict[str, Path]:
    """Maps what a start or a training may write to → where that is, the first existing folder above it."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = {
        "the run folder": run_dir,
        "HF_HOME": Path(os.environ.get("HF_HOME") or caches / "huggingface"),
        "the user's cache": caches / "agent",
        "WANDB_DIR": Path(os.environ.get("WANDB_DIR") or run_dir),
        "shared memory": Path("/dev/shm"),
    }
    with contextlib.suppress(FileNotFoundError):  # none can be written: the error says so itself
        named["TMPDIR"] = Path(tempfile.gettempdir())
    found: dict[str, Path] = {}
    for name, place in named.items():
        whole = Path(os.path.abspath(os.path.expanduser(place)))
        there = next((folder for folder in (whole, *whole.parents) if folder.is_dir()), None)
        if there is not None and there not in found.values():
            found[f"{name} ({whole})"] = there
    return found


def _free(place: Path) -> tuple[int, int]:
    """Bytes and files that this user may still write; -1 files where there is no such limit."""
    status = os.statvfs(place)
    return shutil.disk_usage(place).free, status.f_favail if status.f_files else -1
