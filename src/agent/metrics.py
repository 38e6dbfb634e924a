"""What a run reports: ``metrics.jsonl`` always, wandb when asked for, a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import netrc
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.run_folder import write_atomically
from agent.validation_record import ValidationRecords, totals

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0


@dataclass
class WandbConfig:
    """Where and how to log to Weights & Biases."""

    project: str = "agent"
    """Project."""
    entity: str | None = None
    """User or team. Not set: `$VLA_WANDB_ENTITY`, else your default on wandb."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes to the run folder; `wandb sync` uploads it later."""
    run_id: str | None = None
    """Id of an existing wandb run to continue. Not set: made once per run folder and kept."""

    def actual_mode(self) -> str:
        """The mode as it comes to be: ``WANDB_MODE`` wins, and its older word `dryrun` means offline."""
        mode = os.environ.get("WANDB_MODE") or self.mode
        return "offline" if mode == "dryrun" else mode

    def check(self) -> None:
        """Refuses online logging without a key now, rather than asking for one on a compute node.

        Raises:
            ValueError: if no key is found in the environment or in the netrc file, or ``WANDB_MODE`` is none of wandb's.
        """
        mode = os.environ.get("WANDB_MODE", self.mode)
        if mode not in ("online", "offline", "disabled", "dryrun"):  # wandb itself refuses it, when the run has started
            raise ValueError(f"WANDB_MODE is '{mode}': export WANDB_MODE=offline, online or disabled, or unset it")
        if mode != "online" or os.environ.get("WANDB_API_KEY"):
            return
        key = "WANDB_MODE" if "WANDB_MODE" in os.environ else "wandb.mode"
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        try:
            if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
                return
        except (OSError, netrc.NetrcParseError):
            pass
        raise ValueError(
            f"{key} is online but there is no wandb key for {host}: run `wandb login` once or `export WANDB_API_KEY=…`; "
            "or write wandb.mode: offline, or use_wandb: false"
        )


class JsonLines:
    """``metrics.jsonl``: one object per logged update, steps strictly increasing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._size = 0
        self._pending = b""  # lines that a full disk did not take; they go first once there is room

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Opens the file for the updates after ``step``; lines beyond it, and a torn last line, are dropped.

        Returns:
            The lines that stay.
        """
        kept = [record for record in self._whole_lines() if record["step"] <= step]  # others will be done again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size
        return kept

    def has(self, step: int) -> bool:
        """Whether there is a line of this update."""
        return any(record["step"] == step for record in self._whole_lines())

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the process died in the middle of this line
                yield json.loads(line)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line, whole. What a full disk does not take is kept and written later."""
        waiting = bool(self._pending)
        self._pending += (json.dumps(record) + "\n").encode()
        error = self._flush()
        if error is not None and not waiting:
            log.warning("%s cannot be written (%s); its lines wait until there is room", self.path, error.strerror)

    def _flush(self) -> OSError | None:
        assert self._handle is not None
        try:
            written = os.write(self._handle, self._pending)
            if written < len(self._pending):
                os.ftruncate(self._handle, self._size)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        self._size += len(self._pending)
        self._pending = b""
        return None

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint must not outlive the lines of its updates."""
        if self._handle is None:
            return
        self._flush()
        try:
            os.fsync(self._handle)
        except OSError as error:  # NFS says so late that the disk is full
            log.warning("%s could not be brought to the disk: %s", self.path, error.strerror)

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._flush()
            if self._pending:
                log.error("%d lines of %s are lost, the disk was full", self._pending.count(b"\n"), self.path)
            os.close(self._handle)
            self._handle = None


def _unreachable() -> str | None:
    """Why wandb's server cannot be reached; None if it can, or if a proxy stands between, which would answer for it.

    wandb itself tries for many minutes to reach a server that is not there, and training would wait for it.
    """
    import socket
    import urllib.parse
    import urllib.request

    server = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or ""
    if {server.scheme, "all"} & set(urllib.request.getproxies()) and not urllib.request.proxy_bypass(host):
        return None
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        return f"{host}:{port}: {error}"
    return None


class Wandb:
    """The same numbers on wandb, in one run across restarts."""

    def __init__(self, config: WandbConfig, run_dir: Path, name: str, settings: dict, earlier: list[dict]) -> None:
        import wandb

        self.run_id = config.run_id or self._kept_id(run_dir)
        self._validations = ValidationRecords(run_dir)
        entity = config.entity or os.environ.get("VLA_WANDB_ENTITY") or None
        mode: Any = config.actual_mode()
        if mode == "offline":
            self._set_aside_offline(run_dir)
        keywords: dict[str, Any] = {
            "project": config.project,
            "entity": entity,
            "name": name,
            "id": self.run_id,
            "dir": str(run_dir),
            "config": settings,
            # A run that has saved must not wait for wandb's servers until its job is killed.
            "settings": wandb.Settings(console="off", quiet=True, finish_timeout=30),
        }
        problem = _unreachable() if mode == "online" else None
        if problem is None:
            try:
                self._run = wandb.init(**keywords, mode=mode, resume="allow" if mode == "online" else None)
            except wandb.errors.Error as error:
                if mode != "online":
                    raise
                problem = str(error)
        if problem is not None:
            log.error("wandb cannot be reached, logging offline; `python -m agent.sync_wandb` uploads: %s", problem)
            mode = "offline"
            self._set_aside_offline(run_dir)
            self._run = wandb.init(**keywords, mode=mode)
        self.mode = mode
        """As it came to be."""
        log.info(
            "wandb: %s",
            self._run.url if mode == "online" else f"offline, in {run_dir / 'wandb'}; upload with `wandb sync`",
        )
        self._begun = self._run.starting_step > 0
        # An offline folder knows nothing of the one before it, and syncing it replaces what was synced under the
        # same id: each start therefore begins with every line so far, and the newest folder alone is complete.
        if mode == "offline":
            for record in earlier:
                self.write(record)

    @staticmethod
    def _kept_id(run_dir: Path) -> str:
        path = run_dir / "wandb" / "run_id"
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, uuid.uuid4().hex[:8])
        return path.read_text(encoding="utf-8")

    @staticmethod
    def _set_aside_offline(run_dir: Path) -> None:
        superseded = run_dir / "wandb" / "superseded"
        for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
            superseded.mkdir(exist_ok=True)
            # Numbered: wandb names a folder by the second, which a quick restart can share.
            folder.rename(superseded / f"{len(list(superseded.iterdir())):03d}_{folder.name}")

    def write(self, record: dict[str, Any]) -> None:
        """Logs one line at its own step, with the picture of a validation that was made at it.

        Before the first line goes the validation of the starting weights, which has no line of its own. wandb ignores a
        step it has already; a resume repeats them exactly.
        """
        start = None if self._begun else self._validations.read(0)
        self._begun = True
        if start is not None:
            self._log(0, totals(start))
        self._log(record["step"], {key: value for key, value in record.items() if key != "step"})

    def _log(self, step: int, numbers: dict[str, Any]) -> None:
        # null, for a skipped update, is no number to wandb
        values = {key: value for key, value in numbers.items() if value is not None}
        picture = self._validations.path(step, ".png")
        try:
            self._run.log(values | self._shown(picture), step=step)
        except OSError as error:  # damaged, or the disk has no room for wandb's copy: a picture is not worth the run
            log.warning("wandb does not show %s: %s", picture, error)
            self._run.log(values, step=step)

    def _shown(self, picture: Path) -> dict[str, Any]:
        import wandb

        return {"val/chunks": wandb.Image(str(picture))} if picture.exists() else {}

    def summarize(self, facts: dict[str, Any]) -> None:
        """Sets figures of the whole run."""
        self._run.summary.update(facts)

    def close(self, exit_code: int) -> None:
        """Ends the wandb run."""
        self._run.finish(exit_code=exit_code)


class Metrics:
    """All sinks of one run, on rank 0; the other ranks have none."""

    def __init__(self, run_dir: Path, n_updates: int) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl")
        self._wandb: Wandb | None = None
        self._bar: Any = None
        self._above_bar = contextlib.ExitStack()
        self._n_updates = n_updates

    def has(self, step: int) -> bool:
        """Whether an earlier start has reported this update."""
        return self._lines.has(step)

    def open(self, step: int, wandb: WandbConfig | None, run_dir: Path, name: str, settings: dict) -> str | None:
        """Starts after ``step``. Returns the wandb id, if there is one."""
        earlier = self._lines.rewind(step)
        if wandb is not None and "disabled" not in (wandb.mode, wandb.actual_mode()):
            self._wandb = Wandb(wandb, run_dir, name, settings, earlier)
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            # Log lines then appear above the bar instead of tearing it.
            self._above_bar.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(total=self._n_updates, initial=step, unit="update", dynamic_ncols=True)
        return self._wandb.run_id if self._wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """One logged update."""
        self._lines.write(record)
        if self._wandb is not None:
            self._wandb.write(record)
        text = "  ".join(
            f"{_short(key)} {_format(value)}" for key, value in record.items() if key in _SHOWN or "/" in key
        )
        if self._bar is not None:
            self._bar.update(record["step"] - self._bar.n)
            self._bar.set_postfix_str(text)
        else:
            eta = int(record["eta_s"])
            log.info(
                f"update {record['step']}/{self._n_updates}  {text}  eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
            )

    def sync(self) -> None:
        """Before a checkpoint: what was logged until now is on the disk."""
        self._lines.sync()

    def summarize(self, facts: dict[str, Any]) -> None:
        """Figures of the whole run for wandb's summary."""
        if self._wandb is not None:
            self._wandb.summarize(facts)

    def close(self, exit_code: int) -> None:
        """Closes every sink."""
        if self._bar is not None:
            self._bar.close()
            self._above_bar.close()
        self._lines.close()
        if self._wandb is not None:
            self._wandb.close(exit_code)


_SHOWN = ("loss", "lr", "grad_norm", "samples_per_s", "data_wait")


def _short(key: str) -> str:
    return {"samples_per_s": "samples/s", "grad_norm": "grad", "data_wait": "wait"}.get(key, key)


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def setup_logging(rank: int, debug: bool) -> None:
    """Rank 0 says what it does; the others only what goes wrong."""
    level = logging.DEBUG if debug else logging.INFO
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=level if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "datasets", "filelock", "asyncio", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
