"""Downloads repositories from the Hugging Face hub within a time limit, and says what to do when that fails.

The hub's own client waits without limit for a server that does not answer, and retries again and again if it cannot
connect. Behind a firewall that drops packets a job would lose its time; with the one timed request made here first, it
loses seconds.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

TIMEOUT_S = 10


class Unreachable(ValueError):
    """Is raised if the hub cannot be reached from here, or must not be asked."""


class HubTrouble(RuntimeError):
    """Is raised if the hub answers with a server error: the same command may work later."""


@dataclass(frozen=True)
class Repository:
    """Names a repository on the hub."""

    name: str
    """``owner/name``."""
    kind: Literal["model", "dataset"] = "model"
    revision: str | None = None
    """Branch, tag or commit; None is the main branch."""

    @property
    def page(self) -> str:
        """Returns the address of its page."""
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def command(self) -> str:
        """Returns the command that downloads it by hand."""
        revision = f" --revision {self.revision}" if self.revision else ""
        if self.kind == "dataset":  # LeRobot has its own cache
            return f"`hf download --repo-type dataset {self.name}{revision} --local-dir DIR`, with `root: DIR`"
        return f"`hf download {self.name}{revision}`"

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def parse(reference: str) -> Repository | None:
    """Parses ``owner/name`` or ``owner/name@revision``; returns None if the reference does not look like one."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", reference):
        return None
    name, _, revision = reference.partition("@")
    return Repository(name, revision=revision or None)


def snapshot(
    repository: Repository, key: str, patterns: Sequence[str] | None = None, cache: Path | None = None
) -> Path:
    """Returns a repository's folder in the local cache, brought up to date if the hub can be reached.

    If the hub refuses or cannot be reached, a copy in the cache is used, and the log says so.

    Args:
        repository: the repository to download.
        key: the config key that names it, for messages.
        patterns: patterns of the files to download; None for all.
        cache: the cache's folder; None for the hub client's own.

    Raises:
        ValueError: if it is not in the cache and cannot be downloaded, with what to do; without a network this takes about
            ``TIMEOUT_S`` seconds.
        HubTrouble: if it is not in the cache and the hub has an error that may pass.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "repo_id": repository.name,
        "repo_type": repository.kind,
        "revision": repository.revision,
        "allow_patterns": None if patterns is None else list(patterns),
        "cache_dir": cache,
    }
    try:
        with _explained(repository, key):
            _within(TIMEOUT_S, lambda: _ask(repository))
            return Path(snapshot_download(**wanted, etag_timeout=TIMEOUT_S))
    except (ValueError, HubTrouble) as refusal:
        try:
            folder = Path(snapshot_download(**wanted, local_files_only=True))
        except IncompleteSnapshotError as gap:
            missing = str(gap).partition(" is incomplete: ")[2].partition("). ")[0]
            raise type(refusal)(f"{refusal}\nWhat is in the cache of it is incomplete: {missing})") from None
        except (LocalEntryNotFoundError, HFValidationError):
            raise refusal from None
        if not is_offline():
            log.warning("taking the copy in the cache, for %s", str(refusal).splitlines()[0])
        return folder


def is_offline() -> bool:
    """Says whether the hub must not be asked (``HF_HUB_OFFLINE=1``)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def offline() -> Iterator[None]:
    """Makes this process behave, within the block, as if it had been started with ``HF_HUB_OFFLINE=1``."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE  # every library reads this variable at each request
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _ask(repository: Repository) -> None:
    from huggingface_hub import HfApi

    kind, revision = repository.kind, repository.revision
    HfApi().repo_info(repository.name, repo_type=kind, revision=revision, timeout=TIMEOUT_S)


def _within(seconds: float, question: Callable[[], None]) -> None:
    """Asks with a limit on the total time.

    A client's own limit holds for each address of the server, of which there may be many.

    Raises:
        TimeoutError: if there is no answer in time. Errors that the question raises are raised here too.
    """
    outcome: list[BaseException | None] = []

    def asked() -> None:
        try:
            question()
            outcome.append(None)
        except BaseException as error:  # it is raised again below, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0] is not None:
        raise outcome[0]


@contextmanager
def _explained(repository: Repository, key: str) -> Iterator[None]:
    """Turns errors of the hub's client into messages that say what the user can do."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HfHubHTTPError as error:
        raise _answered(repository, key, error) from None
    except HFValidationError as error:
        raise ValueError(f"{key}: '{repository}' cannot be the name of a repository: {error}") from None
    except (httpx.HTTPError, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else None
        if cause is not None:  # the client wraps the hub's answer to one of the files
            raise _answered(repository, key, cause) from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise ValueError(
                f"{key}: cannot write '{repository}' to the cache: {error}.\nMake room there, or set HF_HOME to a folder "
                "that has it."
            ) from None
        raise Unreachable(_unreachable(repository, key, error)) from None
    except ValueError as error:  # a page in HTML where JSON was expected
        raise ValueError(
            f"{key}: cannot get '{repository}' from the hub: what answers is not the hub ({type(error).__name__}: {error})."
            "\nIs there a login page of the network or a proxy in between, or does HF_ENDPOINT name something else?"
        ) from None


def _answered(repository: Repository, key: str, error: Any) -> Exception:
    """Returns the exception to raise for an error status of the hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status, page = error.response.status_code, repository.page
    if isinstance(error, GatedRepoError):
        reason = "it is gated"
        advice = (
            f"Open {page}, log in and accept its licence; then run `hf auth login` here with a token of that account "
            f"(`hf auth whoami` says whose it is). Or set {_key_of_folder(repository, key)} to a local folder that holds it."
        )
    elif isinstance(error, RevisionNotFoundError):
        reason = f"it has no revision '{repository.revision or 'main'}'"
        advice = f"{page}/tree/main lists its branches and tags."
        if repository.kind == "dataset":  # where the config names no revision, the tag of the format is requested
            advice += " Write one of them in the data set's entry, such as `revision: main`."
    elif isinstance(error, RepositoryNotFoundError):
        reason = f"there is no such {'data set' if repository.kind == 'dataset' else 'model'}, or it is private"
        advice = (
            f"Check the spelling at {page}; if it is private, run `hf auth login` with a token that may read it. If it is "
            "meant to be a folder, that does not exist here."
        )
    elif status in (401, 403):
        reason = f"the hub refuses this account's token (status {status})"
        advice = f"Run `hf auth login` again, or set {_key_of_folder(repository, key)} to a local folder that holds it."
    elif status == 429 or status >= 500:
        return HubTrouble(f"{key}: cannot get '{repository}' from the hub: it answers with status {status}, try later")
    else:
        reason = f"it answers with status {status}: {str(error).splitlines()[0]}"
        advice = f"See {page}, or set {_key_of_folder(repository, key)} to a local folder that holds it."
    return ValueError(f"{key}: cannot get '{repository}' from the hub: {reason}.\n{advice}")


def _key_of_folder(repository: Repository, key: str) -> str:
    return f"{key}.root" if repository.kind == "dataset" else key


def _unreachable(repository: Repository, key: str, error: Exception) -> str:
    if is_offline():
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"it cannot be reached ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return (
        f"{key}: cannot get '{repository}' from the hub: {reason}.\nIt is not in the cache of this machine. On one with "
        "internet and the same HF_HOME (a cluster's login node) run `python -m agent.prepare --config_path …`, or "
        f"{repository.command}. If {repository.page} is gated, accept its licence there and run `hf auth login` first. "
        f"Or set {_key_of_folder(repository, key)} to a local folder that holds it; if it is meant to be one, that does "
        "not exist here."
    )
