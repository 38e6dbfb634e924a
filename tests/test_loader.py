"""The way of samples from worker processes to training: same samples on any split, errors with a name, flat memory.

Run with ``uv run pytest tests/test_loader.py``       (about half a minute)
         ``uv run pytest -m slow tests/test_loader.py`` (100,000 samples, about as long again)
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ForkedRun, ForkServer, fork_server
from launching import Workplace
from test_reliability import recorded, samples_of_updates

from agent.data import prepare

FEW = ("--n_updates", "3", "--eval_freq", "0", "--save_model_freq", "100")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With two frame stores beside the videos; the raw one holds the very same pictures."""
    place = Workplace.make(tmp_path_factory.mktemp("place"))
    for kind in ("raw", "jpeg"):
        arguments = ["--config_path", str(place.folder / "tiny.yaml"), "--data.train.frame_store", kind]
        assert prepare.main(arguments) == 0
    return place


def started(server: ForkServer, place: Workplace, name: str, split: tuple[int, int, int], store: str) -> ForkedRun:
    """A recorded run of three updates with (workers, ranks, accumulation steps)."""
    workers, ranks, accumulation = split
    return server.start(
        place,
        name,
        *FEW,
        "--data.train.frame_store",
        store,
        "--data.train.num_workers",
        str(workers),
        "--per_device_batch_size",
        str(8 // ranks // accumulation),
        ranks=ranks,
        hook=("hooks", "record"),
        **recorded(place, name),
    )


@pytest.fixture(scope="module")
def alone(place: Workplace, server: ForkServer) -> str:
    """One process, no worker, no accumulation, from the videos."""
    output = started(server, place, "alone", (0, 1, 1), "none").wait()
    assert place.status("alone")["state"] == "finished", output
    return "alone"


WITH_STORE = [(workers, ranks, steps) for workers in (0, 1, 4) for ranks in (1, 2) for steps in (1, 4)]
WITHOUT_STORE = [(0, 2, 1), (1, 1, 4), (4, 1, 1), (4, 2, 4)]


@pytest.mark.parametrize(
    ("store", "split"), [("raw", s) for s in WITH_STORE] + [("none", s) for s in WITHOUT_STORE], ids=str
)
def test_the_split_changes_neither_samples_nor_losses(
    place: Workplace, server: ForkServer, alone: str, store: str, split: tuple[int, int, int]
) -> None:
    name = "-".join([store, *map(str, split)])
    output = started(server, place, name, split, store).wait()
    assert place.status(name)["state"] == "finished", output
    expected = samples_of_updates(place, alone, 1)
    assert samples_of_updates(place, name, split[1]) == expected
    assert [[sample[0] for sample in samples] for samples in expected.values()] == [
        list(range(8 * update, 8 * update + 8)) for update in range(3)
    ]
    losses = [line["loss"] for line in place.metrics(name)]
    assert losses == pytest.approx([line["loss"] for line in place.metrics(alone)], rel=1e-5)
