"""Writes the numbers of a run to Weights & Biases: as one run across restarts, whichever of them were online or offline."""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.safe_files import write_text
from agent.validation.record import ValidationRecords, totals

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
    """`offline` stays in the run folder; `python -m agent.sync_wandb RUN_DIR` uploads it later."""
    run_id: str | None = None
    """Id of an existing wandb run to continue. Not set: made once per run folder and kept."""

    def actual_mode(self) -> str:
        """Returns the mode that counts: ``WANDB_MODE`` wins, and its older word `dryrun` means offline."""
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
        if mode != "online" or (missing := missing_key()) is None:
            return
        key = "WANDB_MODE" if "WANDB_MODE" in os.environ else "wandb.mode"
        raise ValueError(f"{key} is online but {missing}; or write wandb.mode: offline, or use_wandb: false")


def missing_key() -> str | None:
    """Says what to do about a key that is neither in the environment nor in the netrc file; None if there is one."""
    if os.environ.get("WANDB_API_KEY"):
        return None
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return None
    except (OSError, netrc.NetrcParseError):
        pass
    return f"there is no wandb key for {host}: run `wandb login` once or `export WANDB_API_KEY=…`"


def kept_id(run_dir: Path) -> str:
    """Returns the id of the run on wandb, which is made once per run folder."""
    path = run_dir / "wandb" / "run_id"
    if path.exists() and (kept := path.read_text(encoding="utf-8", errors="replace").strip()).isalnum():
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8")


def _unreachable() -> str | None:
    """Says why wandb's server cannot be reached; None if it can, or if a proxy stands between, which would answer for it.

    wandb itself tries for many minutes to reach a server that is not there.
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
    """A run on wandb, open for lines. Any call may raise anything or take long: no training process makes one.

    Args:
        config: where to; its ``mode`` counts, not ``WANDB_MODE``.
        run_dir: the run's folder.
        name: of the run on wandb.
        settings: the run's config.
        pid: of the training process, whose use of the machine wandb shows; None where there is none any more.

    Raises:
        OSError: if wandb's server cannot be reached.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, name: str, settings: dict, pid: int | None) -> None:
        import wandb

        self.run_id = config.run_id or kept_id(run_dir)
        self._validations = ValidationRecords(run_dir)
        online = config.mode == "online"
        if online and (problem := _unreachable()) is not None:
            raise OSError(f"it cannot be reached: {problem}")
        if not online:
            self._set_aside_offline(run_dir)
        machine: dict[str, Any] = {"x_disable_stats": True} if pid is None else {"x_stats_pid": pid}
        # A job that has saved must not wait for wandb's servers until it is killed.
        patience: dict[str, Any] = {} if pid is None else {"finish_timeout": 30, "finish_timeout_raises": True}
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or os.environ.get("VLA_WANDB_ENTITY") or None,
            name=name,
            id=self.run_id,
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(console="off", quiet=True, **patience, **machine),
            mode=config.mode,
            resume="allow" if online else None,
        )
        self.place = self._run.url if online else f"offline, in {run_dir / 'wandb'}"
        """Where it can be looked at."""
        # An offline folder knows nothing of the one before it, and uploading it replaces what was uploaded under the
        # same id: each begins with the first line, and the newest folder alone is complete.
        self.first_missing = self._run.starting_step
        """The first update that wandb does not have: it ignores those before."""

    @staticmethod
    def _set_aside_offline(run_dir: Path) -> None:
        superseded = run_dir / "wandb" / "superseded"
        for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
            superseded.mkdir(exist_ok=True)
            # Numbered: wandb names a folder by the second, which a quick restart can share.
            folder.rename(superseded / f"{len(list(superseded.iterdir())):03d}_{folder.name}")

    def write(self, record: dict[str, Any]) -> None:
        """Logs one line at its own step, with the picture of a validation that was made at it.

        Before the first line goes the validation of the starting weights, which has no line of its own.
        """
        start = self._validations.read(0) if self.first_missing == 0 else None
        self.first_missing = max(record["step"] + 1, self.first_missing)
        if start is not None:
            self._log(0, totals(start))
        self._log(record["step"], {key: value for key, value in record.items() if key != "step"})

    def _log(self, step: int, numbers: dict[str, Any]) -> None:
        # wandb takes no null, which a skipped update has.
        values = {key: value for key, value in numbers.items() if value is not None}
        picture = self._validations.path(step, ".png")
        try:
            self._run.log(values | self._shown(picture), step=step)
        except ConnectionError:  # wandb's own process has gone
            raise
        except OSError as error:  # damaged, or the disk has no room for wandb's copy
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
