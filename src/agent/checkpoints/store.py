"""Saves checkpoints so that each is either whole or not there, finds them again, and removes old ones.

A checkpoint is written to a hidden sibling folder, every file is flushed to the disk, the manifest with each file's
size and checksum is written last, and only then is the folder renamed into place. A folder under its final name is
therefore complete; the manifest is checked all the same before it is loaded, because a disk can damage what was once
good. This module knows no model: what goes into a checkpoint is the caller's business, and so is which of them is the
best. Only one process writes to a store, the one that holds the lock of the run folder.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from agent.checkpoints.manifest import FOLDERS, Damaged, Known, check_sizes, files_of, forget, seal
from agent.safe_files import sync, write_link

log = logging.getLogger(__name__)

PRETRAINED, PRETRAINED_EMA, TRAINING = FOLDERS


class CheckpointStore:
    """``<run>/checkpoints``: saving, finding, pruning.

    Args:
        run_dir: the run's folder.
        keep: how many complete checkpoints.
        keep_training_states: how many of these, the newest, keep their training state; None for all.
        choose_best: of the updates that there are checkpoints of, the one that the link ``best`` leads to and that is
            never pruned; None where none is known to be better than another.
        require_place: called before each save; raises OSError where ``run_dir`` is not the run's own any more.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        keep_training_states: int | None = None,
        choose_best: Callable[[Iterable[int]], int | None] = lambda steps: None,
        require_place: Callable[[], None] | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._choose_best, self._require_place = choose_best, require_place
        self.keep = keep
        assert keep >= 1 and (keep_training_states is None or keep_training_states >= 1)
        self.keep_training_states = keep_training_states

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, step: int, needed: int = 0) -> Path:
        """An empty folder to write a checkpoint to, after which :meth:`finish` or :meth:`abandon` follows.

        Raises:
            OSError: if fewer than ``needed`` bytes are free, the folder cannot be made, or the run's is elsewhere.
        """
        if self._require_place is not None:
            self._require_place()
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            for parent in (self.folder.parent, self.folder.parent.parent):  # the run's folder may be as new
                sync(parent)
        self.recover()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            text = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            raise OSError(errno.ENOSPC, text, str(self.folder))
        temporary = self._temporary(step)
        try:
            (temporary / PRETRAINED).mkdir(parents=True)
            (temporary / TRAINING).mkdir()
        except OSError:
            self.abandon(step)
            raise
        return temporary

    def finish(self, step: int, known: Mapping[str, Known] | None = None) -> tuple[Path, int]:
        """Makes what was written a checkpoint: manifest, rename, ``last`` and ``best``, then pruning.

        Args:
            step: as begun.
            known: the files that are synced and hashed already.

        Returns:
            The checkpoint and its bytes.

        Raises:
            OSError: if that failed; nothing of it is left then.
        """
        temporary, final = self._temporary(step), self.folder / f"step_{step:08d}"
        try:
            size = seal(temporary, step, known)
            self._publish(temporary, final)
        except BaseException:
            self.abandon(step)
            raise
        # From here on it is a checkpoint, whatever happens to the rest.
        try:
            self._link("last", final)
        except OSError as error:
            log.warning("%s is complete, but the link `last` could not be set to it: %s", final, error)
        try:
            self._prune(step)
        except OSError as error:  # not even the sizes of an older one can be had
            log.warning("the checkpoints before %s could not be pruned yet: %s", final, error)
        return final, size

    def abandon(self, step: int) -> None:
        """Removes what was written of a checkpoint that will not be one."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def recover(self) -> None:
        """Clears what a killed process left in the middle of a save; to be called before a run looks for its own."""
        for replaced in self.folder.glob(".step_*.replaced"):
            final = self.folder / replaced.name[1:].removesuffix(".replaced")
            if not final.exists():  # killed between the two renames: the old one is still the one
                os.rename(replaced, final)
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.tmp"

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = self.folder / f".{final.name}.replaced"
        if final.exists():  # left by a run that went back behind it; the newer copy is the true one
            os.rename(final, replaced)
        renamed = False
        try:
            os.rename(temporary, final)
            renamed = True
            sync(self.folder)
        except BaseException:
            # Whether it would survive a crash is not known, so it must not be taken for a checkpoint.
            if renamed:
                os.rename(final, temporary)
            if replaced.exists():
                os.rename(replaced, final)
            raise

    def _link(self, name: str, target: Path) -> None:
        if os.path.lexists(self.folder / name) and os.readlink(self.folder / name) == target.name:
            return
        write_link(self.folder / name, target.name)

    def relink(self) -> None:
        """Sets ``last`` and ``best`` anew: a kill between the end of a save and its links leaves older ones."""
        complete = [path for path in self._named() if check_sizes(path) is None]
        try:
            self._link_last(complete)
        except OSError as error:
            log.warning("the link `last` in %s could not be set: %s", self.folder, error)
        self._link_best(complete)

    def link_best(self) -> Path | None:
        """Sets the link ``best`` to what is the best now, or removes it where nothing is. Returns the checkpoint."""
        return self._link_best([path for path in self._named() if check_sizes(path) is None])

    def _link_last(self, complete: list[Path]) -> None:
        if complete:
            self._link("last", complete[-1])
        else:
            (self.folder / "last").unlink(missing_ok=True)

    def _link_best(self, complete: list[Path]) -> Path | None:
        by_step = {_step_of(path): path for path in complete}
        step = self._choose_best(by_step)
        try:
            if step is not None:
                self._link("best", by_step[step])
            else:
                (self.folder / "best").unlink(missing_ok=True)
        except OSError as error:
            log.warning("the link `best` in %s could not be set: %s", self.folder, error)
        return by_step[step] if step is not None else None

    def _prune(self, step: int) -> None:
        complete = []
        for path in self._named():
            damage = check_sizes(path)
            if _step_of(path) > step:
                # These are damaged and were passed over: the run went back behind them.
                self._tolerant("removed", path, self._remove)
            elif damage is not None:
                self._tolerant("set aside", path, partial(self.set_aside, reason=damage))
            else:
                complete.append(path)
        # The link first: it must not lead to what is being removed.
        best = self._link_best(complete)
        kept = [path for path in complete if path in complete[-self.keep :] or path == best]
        for path in complete:
            if path not in kept:
                self._tolerant("removed", path, self._remove)
        if self.keep_training_states is not None:
            for path in kept[: -self.keep_training_states]:
                self._tolerant("freed of its training state", path, self._drop_training_state)
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _tolerant(self, what: str, path: Path, action: Callable[[Path], object]) -> None:
        try:
            action(path)
        except (OSError, Damaged) as error:
            # Somebody may be reading it over NFS. The new checkpoint is safe, and the next save tries again.
            log.warning("the old checkpoint %s could not be %s yet: %s", path, what, error)

    def _remove(self, path: Path) -> None:
        # Renamed first, so that a crash in the middle leaves nothing that looks like a checkpoint.
        aside = self.folder / f".{path.name}.pruned"
        os.rename(path, aside)
        shutil.rmtree(aside)

    def _drop_training_state(self, path: Path) -> None:
        if any(name.startswith(f"{TRAINING}/") for name in files_of(path)):
            forget(path, f"{TRAINING}/")  # the manifest first: it must never list what is not there
        if (path / TRAINING).exists():
            shutil.rmtree(path / TRAINING)

    # ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────

    def candidates(self) -> list[Path]:
        """What might be resumed from, the newest first, unverified.

        Left out are those that are known to hold weights only; a damaged one is among them.
        """
        return [path for path in reversed(self._named()) if not _holds_weights_only(path)]

    def unusable(self) -> list[Path]:
        """What shows that the run has been further than any candidate: damaged ones set aside, and weights only.

        Where there is no candidate but one of these, a run must not start over as if nothing had been.
        """
        aside = sorted(self.folder.glob("damaged_step_*")) if self.folder.is_dir() else []
        return aside + [path for path in self._named() if _holds_weights_only(path)]

    def set_aside(self, path: Path, reason: str) -> Path:
        """Renames a damaged checkpoint to ``damaged_…``: never chosen, counted or pruned again, kept for a look."""
        aside = self.folder / f"damaged_{path.name}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"damaged_{path.name}_{number}"
        os.rename(path, aside)
        sync(self.folder)
        log.warning("the checkpoint %s is damaged and was renamed to %s: %s", path, aside.name, reason)
        good = [other for other in self._named() if check_sizes(other) is None]
        self._link_last(good)
        self._link_best(good)
        return aside

    def _named(self) -> list[Path]:
        # Exactly our names: a copy that somebody made beside them is neither loaded nor pruned.
        named = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted((p for p in named if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()), key=_step_of)


def _holds_weights_only(path: Path) -> bool:
    try:
        return not any(name.startswith(f"{TRAINING}/") for name in files_of(path))
    except Damaged:
        return False


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
