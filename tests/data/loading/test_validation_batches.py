"""Validation's samples through training's workers: the same bits, and training's own samples stay where they are.

Run: uv run pytest tests/data/loading/test_validation_batches.py      (about half a minute)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.records import recorded, samples_of_updates, what_was_computed
from support.samples import broken_draw, by_number, worker_processes

from agent.batch import ValidationBatch, map_tensors
from agent.data.build import Data
from agent.data.loading.loader import TrainLoader, ValidationBatches


def contents(item: ValidationBatch) -> list[tuple[str, tuple[int, ...], bytes]]:
    """All that a batch holds: type, shape and bits of each tensor and array."""
    found: list[tuple[str, tuple[int, ...], bytes]] = []

    def note(value: Any) -> None:
        found.append((type(value).__name__ + str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()))

    map_tensors(item, note)
    assert len(found) >= 5 + 11 and fields(item)[0].name == "batch"
    return found


def loader_of(data: Data, workers: int, ahead: int = 2, samples: int = 23) -> TrainLoader:
    held_out = ValidationBatches(data.validation, samples, 3)
    return TrainLoader(
        data.reader,
        data.mixture,
        per_device_batch=4,
        validation=held_out,
        num_workers=workers,
        prefetch_factor=ahead,
    )


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 2), (3, 2), (16, 1)])
def test_workers_change_no_bit_of_a_validation_and_no_sample_of_training(data: Data, workers: int, ahead: int) -> None:
    alone, helped = loader_of(data, 0), loader_of(data, workers, ahead)
    expected = [contents(item) for item in alone.validation_batches()]
    assert len(expected) == 7  # the two episodes that are held out have 12 frames and 9
    given_up = helped.validation_batches()  # before training's first batch, and a stop comes
    assert contents(next(given_up)) == expected[0]
    for _ in range(3):
        assert [contents(item) for item in helped.validation_batches()] == expected
        ours, theirs = ([next(loader) for _ in range(5)] for loader in (helped, alone))
        assert by_number(ours) == by_number(theirs)
    helped.close()


def sizes_of_batch_files() -> list[int]:
    """Bytes of the files that batches cross in, two for each worker once it has sent something."""
    names = {int(path.name): os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    return [os.fstat(number).st_blocks * 512 for number, name in names.items() if "agent-batches" in name]


def room(batch: Any) -> int:
    """Bytes that a batch takes up at most in a file, in whole pages."""
    return batch.observation.state.untyped_storage().nbytes() + 2 * 4096


def test_what_is_ahead_is_bounded_and_its_memory_is_given_back(data: Data) -> None:
    loader = loader_of(data, workers=2, ahead=1, samples=0)
    of_training = 2 * room(next(loader))
    batches = loader.validation_batches()
    of_validation = 2 * max(room(next(batches).batch) for _ in range(2))
    time.sleep(0.5)  # enough to make all of them
    sizes = sizes_of_batch_files()
    assert len(sizes) == 4 and 0 < sum(sizes) <= of_training + of_validation  # a batch for each worker and kind
    assert len(list(batches)) == 5
    assert sum(sizes_of_batch_files()) <= of_training
    loader.close()
    assert sizes_of_batch_files() == []


def test_an_error_keeps_its_message_and_ends_the_workers(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.validation, "draw", broken_draw)
    loader = loader_of(data, workers=2)
    next(loader)
    workers = worker_processes()
    assert len(workers) == 2
    with pytest.raises(RuntimeError, match="no noise for sample 0"):
        next(loader.validation_batches())
    assert not set(workers) & set(worker_processes())


def test_a_worker_that_is_killed_during_a_validation_is_reported(data: Data) -> None:
    loader = loader_of(data, workers=2)
    batches = loader.validation_batches()
    next(batches)
    os.kill(worker_processes()[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a data worker was killed \(number \d of 2, .*--mem"):
        list(batches)
    loader.close()


# ---- in runs


VALIDATING = ("--eval_size", "12", "--ema_decay", "0.9", "--n_updates", "10", "--eval_freq", "5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.make(tmp_path_factory.mktemp("place"))


def validations(place: Workplace, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place.folder / "runs" / name / "validation").glob("*.json")}


def validating(server: ForkServer, place: Workplace, name: str, workers: int) -> str:
    """A recorded run on two ranks with three validations, which nothing interrupts."""
    options = (*VALIDATING, "--data.train.num_workers", str(workers))
    output = server.start(place, name, *options, ranks=2, hook="record", **recorded(place, name)).wait()
    assert place.status(name)["state"] == "finished", output
    assert len(validations(place, name)) == 3
    return name


@pytest.fixture(scope="module")
def alone(place: Workplace, server: ForkServer) -> str:
    """Without any worker."""
    return validating(server, place, "alone", workers=0)


def test_a_run_with_workers_is_the_same(place: Workplace, server: ForkServer, alone: str) -> None:
    helped = validating(server, place, "helped", workers=2)
    assert validations(place, helped) == validations(place, alone)
    assert what_was_computed(place.metrics(helped)) == what_was_computed(place.metrics(alone))
    assert samples_of_updates(place, helped, 2) == samples_of_updates(place, alone, 2)


@pytest.mark.parametrize("begun", [1, 2])
def test_a_stop_during_a_validation_leaves_no_worker(
    place: Workplace, server: ForkServer, alone: str, begun: int
) -> None:
    name = f"stopped-{begun}"  # in the first validation no update is made, the second comes after five
    options = (*VALIDATING, "--data.train.num_workers", "2")
    run = server.start(place, name, *options, ranks=2, hook="slow_validation")
    while run.output().count("validation begins") < 2 * begun:
        assert run.alive(), run.output()
        time.sleep(0.02)
    workers = [
        child
        for rank in run.pids
        for child in psutil.Process(rank).children(recursive=True)
        if child.ppid() != rank  # but the fork server's
    ]
    run.kill(0, signal.SIGTERM)
    output = run.wait(timeout=60)
    assert (place.status(name)["state"], place.status(name)["step"]) == ("preempted", 5 * (begun - 1)), output
    assert output.count("validation ends") == 2 * (begun - 1)
    _, left = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 4 and not left
    output = server.start(place, name, *options, ranks=2).wait()
    assert place.status(name)["state"] == "finished", output
    assert validations(place, name) == validations(place, alone)


def test_a_video_that_validation_cannot_decode_is_named(place: Workplace, server: ForkServer, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(place.folder / "data", root, ignore=shutil.ignore_patterns("frames"))
    (path,) = root.glob("videos/*/*/*.mp4")
    movie = bytearray(path.read_bytes())
    begin = movie.index(b"mdat")
    end = movie.index(b"moov") if movie.index(b"moov") > begin else len(movie)
    movie[begin + 4 : end - 4] = bytes(torch.randint(0, 256, (end - begin - 8,), dtype=torch.uint8).tolist())
    path.write_bytes(movie)
    reasons = []
    for workers in ("0", "2"):
        name = f"video-{workers}"
        options = (*VALIDATING, "--data.train.num_workers", workers, "--data.train.datasets.0.root", str(root))
        output = server.start(place, name, *options).wait()
        assert place.status(name)["state"] == "failed", output
        assert "validation of the starting weights" in output
        reasons.append(place.status(name)["reason"])
    assert (
        re.search(r"data set test/data, episode \d, frame \d+ cannot be read", reasons[0]) and str(path) in reasons[0]
    )
    assert reasons[0] == reasons[1]
