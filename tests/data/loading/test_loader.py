"""The way of samples from worker processes to training: same samples on any split, errors with a name, flat memory.

Run with ``uv run pytest tests/data/loading/test_loader.py``       (about half a minute)
         ``uv run pytest -m slow tests/data/loading/test_loader.py`` (100,000 samples, about as long again)
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support.forked import ForkedRun, ForkServer
from support.launching import MODEL, Workplace
from support.records import recorded, samples_of_updates
from support.samples import built, dataset_config, worker_processes

from agent.batch import SampleSpec, map_tensors
from agent.data import prepare
from agent.data.frames.manifest import Manifest
from agent.data.frames.store import read_index
from agent.data.loading.loader import TrainLoader
from agent.data.recorded.video import Moment, decode_frame

FRONT = "observation.images.front"
FEW = ("--n_updates", "3", "--eval_freq", "0", "--save_model_freq", "100")


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
        hook="record",
        **recorded(place, name),
    )


@pytest.fixture(scope="module")
def alone(place: Workplace, server: ForkServer) -> str:
    """One process, no worker, no accumulation, from the videos."""
    output = started(server, place, "alone", (0, 1, 1), "none").wait()
    assert place.status("alone")["state"] == "finished", output
    return "alone"


SPLITS = [(workers, ranks, steps) for workers in (0, 1, 4) for ranks in (1, 2) for steps in (1, 4)]
GRID = [("raw", split) for split in SPLITS] + [("none", split) for split in SPLITS[1::2]]
OFTEN = [("raw", (0, 2, 4)), ("raw", (1, 1, 1)), ("raw", (4, 2, 4)), ("none", (0, 1, 4)), ("none", (4, 1, 4))]


@pytest.mark.parametrize(
    ("store", "split"),
    [pytest.param(*case, id=str(case), marks=() if case in OFTEN else pytest.mark.slow) for case in GRID],
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


# ---- when a sample cannot be read


def picture_of(place: Workplace, episode: int, frame: int) -> tuple[Path, int, int]:
    """File, offset and length of a picture in the JPEG store."""
    folder = place.folder / "data" / "frames" / "32x32-jpeg95"
    index = read_index(folder / Manifest.read(folder / "manifest.json").index)
    row = int(np.flatnonzero((index["episode_index"] == episode) & (index["frame_index"] == frame))[0])
    part, offset, size = (int(index[f"{FRONT}/{name}"][row]) for name in ("part", "offset", "size"))
    return folder / FRONT / Manifest.read(folder / "manifest.json").cameras[FRONT][part], offset, size


def test_a_picture_that_cannot_be_decoded_is_named(place: Workplace, server: ForkServer) -> None:
    path, offset, size = picture_of(place, episode=2, frame=5)
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    try:
        overrides = (
            "--data.train.num_workers",
            "2",
            "--data.train.frame_store",
            "jpeg",
            "--per_device_batch_size",
            "8",
        )
        output = server.start(place, "picture", *overrides).wait()
    finally:
        path.write_bytes(whole)
    status = place.status("picture")
    assert (status["state"], status["error_kind"]) == ("failed", "runtime")
    assert "data set test/data, episode 2, frame 5 cannot be read" in status["reason"], output
    assert "in a data worker" in output and "_stored" in output  # where it happened in the worker


def test_a_video_that_cannot_be_decoded_is_named(place: Workplace, server: ForkServer, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(place.folder / "data", root, ignore=shutil.ignore_patterns("frames"))
    (path,) = root.glob("videos/*/*/*.mp4")
    contents = bytearray(path.read_bytes())
    begin, length = contents.index(b"mdat"), len(contents)
    end = contents.index(b"moov") if contents.index(b"moov") > begin else length
    contents[begin + 4 : end - 4] = os.urandom(end - begin - 8)
    path.write_bytes(contents)
    output = server.start(
        place, "video", "--data.train.num_workers", "1", "--data.train.datasets.0.root", str(root)
    ).wait()
    assert place.status("video")["state"] == "failed", output
    found = re.search(r"data set test/data, episode \d, frame \d+ cannot be read", place.status("video")["reason"])
    assert found and str(path) in place.status("video")["reason"], output


def test_what_cannot_be_prepared_is_named(place: Workplace, server: ForkServer) -> None:
    output = server.start(place, "broken", "--data.train.num_workers", "1", hook="broken_noise").wait()
    reason = place.status("broken")["reason"]
    assert re.search(r"data set test/data, episode \d, frame \d+, sample \d of the run, cannot be prepared", reason), (
        output
    )


# ---- when a worker dies


def workers_of(rank: int) -> list[int]:
    """The workers of a rank's process: children of its fork server, once all are there."""
    children = [child for child in psutil.Process(rank).children(recursive=True)]
    return [child.pid for child in children if child.ppid() != rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_reported_within_seconds(place: Workplace, server: ForkServer, rank: int) -> None:
    name = f"killed-{rank}"
    run = server.start(place, name, "--n_updates", "100000", "--data.train.num_workers", "3", ranks=2)
    try:
        run.wait_for_step(2)
        workers = workers_of(run.pids[rank])
        assert len(workers) == 3
        os.kill(workers[1], signal.SIGKILL)
        begin = time.monotonic()
        while rank in run.alive():
            assert time.monotonic() - begin < 20, run.output()
            time.sleep(0.05)
    finally:
        run.kill_all()
    said = f"a data worker was killed (number 1 of 3, process {workers[1]}, signal 9, Killed)"
    assert said in run.output()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() - begin < 60, "workers live on without their trainers"
        time.sleep(0.05)
    reason = place.status(name)["reason"]
    assert place.status(name)["state"] == "failed"
    assert said in reason and "data.train.num_workers (now 3)" in reason and "GB" in reason


def test_waiting_for_data_is_measured_on_every_rank(place: Workplace, server: ForkServer) -> None:
    arguments = ("--data.train.num_workers", "1", "--per_device_batch_size", "4")
    more = ("--n_updates", "9")  # one worker has made five batches or six before the first update
    run = server.start(place, "slow", *FEW, *more, *arguments, ranks=2, hook="slow_samples")
    output = run.wait()
    assert place.status("slow")["state"] == "finished", output
    last = place.metrics("slow")[-1]
    # Rank 1's four samples take 0.8 s; rank 0 waits as long, but for rank 1.
    assert last["step_s"] >= 0.75
    assert last["data_wait_max"] > 0.2
    assert last["data_wait"] == pytest.approx(last["data_wait_max"] / 2, abs=0.1)
    assert place.metrics("slow")[0]["data_wait_max"] < 0.1


# ---- memory


def own_memory(pid: int) -> int:
    """Bytes of memory that this process alone has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def batch_files() -> list[int]:
    """Bytes of memory of the files that batches cross in, one for each worker."""
    names = {int(path.name): os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    return [os.fstat(number).st_blocks * 512 for number, name in names.items() if "agent-batches" in name]


@pytest.fixture
def data(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The data of a run, with pictures of 32 × 32 from the raw store."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    spec = SampleSpec(4, 8, 8, (32, 32), 48)
    config = dataset_config(place.folder / "data", cameras={FRONT: FRONT})
    return built(config, tokenizer=MODEL["tokenizer_path"], spec=spec, frame_store="raw")


def test_a_batch_is_one_block_and_workers_keep_no_more_than_they_may(data: Any) -> None:
    loader = TrainLoader(data.reader, data.mixture, per_device_batch=64, num_workers=2)
    batches = [next(loader) for _ in range(3)]
    seen = [batch.sample_index.tolist() for batch in batches]
    tensors: list[torch.Tensor] = []
    map_tensors(batches[0], tensors.append)
    assert len(tensors) >= 11 and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    block = tensors[0].untyped_storage().nbytes()
    pictures = batches[0].observation.images[FRONT].clone()
    time.sleep(1.0)  # enough to make a hundred of them
    for _ in range(30):
        next(loader)
    slots = 2 * 2 * (block + 4096 + 4096 * len(tensors))  # two workers, two batches ahead each; whole pages
    assert len(batch_files()) == 2 and 0 < sum(batch_files()) <= slots
    # Batches live on when their slots have been written to many times.
    assert [batch.sample_index.tolist() for batch in batches] == seen
    assert batches[0].observation.images[FRONT].equal(pictures) and pictures.any()
    loader.close()
    assert batch_files() == []


@pytest.mark.parametrize("samples", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat(data: Any, samples: int) -> None:
    loader = TrainLoader(data.reader, data.mixture, per_device_batch=100, num_workers=2)
    next(loader)
    processes = {"trainer": os.getpid()} | {f"worker {pid}": pid for pid in worker_processes()}
    assert len(processes) == 3

    def after(count: int) -> dict[str, int]:
        for _ in range(count // 100):
            next(loader)
        return {name: own_memory(pid) for name, pid in processes.items()} | {"batches": sum(batch_files())}

    before, end = after(samples // 5), after(samples - samples // 5)
    loader.close()
    grown = {name: (end[name] - before[name]) / 1e6 for name in end}
    assert max(grown.values()) < 4, grown


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_update_keeps_one_micro_batch(place: Workplace, server: ForkServer, workers: str) -> None:
    name = f"micro-batches-{workers}"
    few = ("--n_updates", "3", "--per_device_batch_size", "1", "--eval_freq", "0", "--data.train.num_workers", workers)
    target = place.folder / name
    output = server.start(place, name, *few, hook="count_batches_in_memory", BATCHES=str(target)).wait()
    assert place.status(name)["state"] == "finished", output
    kept = [int(line) for line in target.read_text().splitlines()]
    assert len(kept) == 3 * 8 and max(kept[8:]) == 1, kept  # the one before, while the next is made


@pytest.mark.parametrize("backend", ["torchcodec", "pyav"])
def test_few_videos_are_open_at_a_time(place: Workplace, tmp_path: Path, backend: str) -> None:
    (original,) = (place.folder / "data").glob("videos/*/*/*.mp4")
    videos = [Path(shutil.copy(original, tmp_path / f"{number}.mp4")) for number in range(100)]

    def look_at_all() -> int:
        for path in videos:
            assert decode_frame(path, Moment(0.3, 1e-4, 0.1, 0.0, 1.0), backend).shape == (3, 64, 80)
        gc.collect()
        assert sum(path.parent == tmp_path for path in open_files()) <= 32
        return own_memory(os.getpid())

    sizes = [look_at_all() for _ in range(5)]
    # A decoder that stays takes 2 MB, 600 MB for these three rounds. What the allocator leaves between them grows by up to
    # 3 MB a round and ends after some hundred, no higher for 300 videos than for 100.
    assert sizes[-1] - sizes[1] < 30e6, sizes


def open_files() -> list[Path]:
    return [Path(os.readlink(path)) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
