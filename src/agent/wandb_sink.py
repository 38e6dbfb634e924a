"""The numbers of a run on Weights & Biases: one run across restarts, whatever of them was online or offline."""

from __future__ import annotations

import logging
import netrc
import os
import uuid
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
