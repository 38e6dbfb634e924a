"""A run that an older version of this program began is continued by this one, to the losses that the older one had.

Run: uv run pytest tests/training/test_older_runs.py      (half a minute)

``run_of_an_older_version.tar.xz`` is the checkpoint after ten of twenty updates, made on 30 November 2026 before the
rooms of ``src/agent``: π0 of some 20,000 numbers on the data set of ``Workplace.make``, without validation.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml
from support.forked import ForkServer
from support.launching import REPOSITORY, Workplace

ARCHIVE = Path(__file__).parent / "run_of_an_older_version.tar.xz"
# Loss and gradient norm of updates 11 to 20, as the older version's own run had them (two cores, torch 2.11.0).
THEN = [
    (2.0964765548706055, 1.8410584926605225),
    (2.3409907817840576, 2.3430211544036865),
    (1.8151402473449707, 2.20817232131958),
    (2.3241260051727295, 2.2661333084106445),
    (2.204760789871216, 2.455713987350464),
    (2.1124842166900635, 2.29693341255188),
    (2.1754298210144043, 2.1490871906280518),
    (1.9592046737670898, 1.9085862636566162),
    (1.9036487340927124, 2.353459119796753),
    (2.2489819526672363, 1.7863013744354248),
]


def test_a_run_of_an_older_version_ends_as_it_would_have(tmp_path: Path, server: ForkServer) -> None:
    place = Workplace.make(tmp_path)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place.folder / "runs", filter="data")
    saved = place.folder / "runs" / "old" / "checkpoints" / "step_00000010" / "training_state" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    config["data"]["train"]["datasets"][0]["root"] = str(place.folder / "data")
    config["model_cfg"]["tokenizer_path"] = str(REPOSITORY / "demo" / "tokenizer")
    (place.folder / "tiny.yaml").write_text(json.dumps(config))
    output = server.start(place, "old", ranks=1).wait()
    assert place.status("old")["state"] == "finished", output
    lines = place.metrics("old")
    assert [line["step"] for line in lines] == list(range(11, 21)), output
    for line, (loss, norm) in zip(lines, THEN, strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))
