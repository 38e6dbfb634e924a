"""The files of a small config, and an environment without anything of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.config_files import Files, use_no_settings_of_this_machine


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_no_settings_of_this_machine(monkeypatch, tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "config")
