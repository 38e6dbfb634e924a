"""A shell in which the scripts around a run are tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.slurm_shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)
