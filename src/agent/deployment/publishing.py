"""Uploads a folder to the Hugging Face hub as a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

_TIMEOUT_S = 10.0


def check(repo_id: str, private: bool) -> None:
    """Checks whether an upload can work, before the export is made; it changes nothing.

    Args:
        repo_id: ``owner/name``.
        private: whether the model has to be private.

    Raises:
        ValueError: if the name is invalid, there is no token, the hub refuses or cannot be reached, or the model has to be
            private and is public.
    """
    import httpx
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise ValueError(f"--push_to_hub: {repo_id!r} is no model on the hub; write OWNER/NAME")
    if constants.is_offline_mode():
        raise ValueError("--push_to_hub: HF_HUB_OFFLINE is set; unset it, or upload the folder later with `hf upload`")
    if get_token() is None:
        raise ValueError(
            "--push_to_hub: no token of the hub; run `hf auth login` with one that may write, or set HF_TOKEN"
        )
    try:
        found = HfApi().model_info(repo_id, timeout=_TIMEOUT_S)  # the other requests accept no time limit
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            _refuse(repo_id, error)  # the hub does not know the token
        return
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        _refuse(repo_id, error)
    if private and not found.private:
        raise ValueError(
            f"--private: {repo_id} exists and is public; make it private on its page, or take another name"
        )


def create(repo_id: str, private: bool) -> None:
    """Creates the model on the hub if it does not exist.

    Raises:
        ValueError: if the token may not write there, or the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().create_repo(repo_id, private=private or None, exist_ok=True)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        _refuse(repo_id, error)


def upload(repo_id: str, folder: Path, message: str) -> str:
    """Uploads all files of a folder in one commit and returns the commit's URL.

    Raises:
        ValueError: if the hub refuses or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error  # the library wraps the failure of a single file
        raise ValueError(
            f"--push_to_hub: the upload to {repo_id} failed: {_first_line(cause)}\nThe export itself is complete: upload "
            f"it with `hf upload {repo_id} {folder}`"
        ) from None


def _refuse(repo_id: str, error: Exception) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"--push_to_hub: the hub refuses to let you write {repo_id} ({status}); log in with a token that may write "
                f"for {repo_id.split('/')[0]}: `hf auth login`"
            ) from None
        raise ValueError(f"--push_to_hub: the hub refuses {repo_id}: {_first_line(error)}") from None
    raise ValueError(
        f"--push_to_hub: {constants.ENDPOINT} cannot be reached ({_first_line(error)}); export without --push_to_hub, and "
        f"run `hf upload {repo_id} FOLDER` on a machine with internet"
    ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
