"""Frame stores: made, read, interrupted, refused. Run: uv run pytest tests/data/frames/test_frame_store.py

Most tests prepare with ``prepare_all`` in this process, which starts real processes for the work; two use the command.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.datasets import write_dataset
from support.launching import REPOSITORY
from support.samples import FRONT, SPEC, WRIST, built, by_number, dataset_config, micro_batches

from agent.configuration_pipeline import load_config
from agent.data import prepare
from agent.data.frames import making
from agent.data.frames import preparation as frame_preparation
from agent.data.frames.encoding import Encoding
from agent.data.frames.manifest import Manifest, SourceFile, index_name, seal, unseal
from agent.data.frames.parts import decode, resize
from agent.data.frames.store import WantedStore, read_index
from agent.data.frames.times import FileIndex, times_of_episodes
from agent.data.recorded.stretches import Stretches, wrong_by_the_table
from agent.data.resizing import resize_with_pad
from agent.data.source import open_source

SIZE = (32, 32)


def config_of(place, root, *overrides):
    """The run's config with another data set."""
    arguments = ["--data.train.datasets.0.root", str(root), *overrides]
    return load_config(place.folder / "tiny.yaml", arguments, 1)[0]


def prepared(place, root, *overrides, skip=False, workers=2):
    """Problems, after preparing."""
    return making.prepare_all(config_of(place, root, *overrides), skip_bad_episodes=skip, workers=workers)


def source_of(root, setting="auto", size=SIZE, quality=95, **settings):
    wanted = WantedStore(setting, quality, size)
    source = open_source(dataset_config(root, **settings), 4, "pyav", 1e-4, wanted=wanted)
    source.cameras = {FRONT: FRONT}
    return source


def video_of(root) -> Path:
    (path,) = root.glob("videos/*/*/*.mp4")
    return path


def write_over(path: Path, content: bytes) -> None:
    """A file with other contents and another time."""
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.fixture(scope="module")
def stores(place):
    """All three kinds beside the data set."""
    root = place.folder / "stores"
    shutil.copytree(place.folder / "data", root)
    for kind in ("jpeg", "lossless", "raw"):
        assert prepared(place, root, "--data.train.frame_store", kind) == []
    return root


# ── what is in a store ──────────────────────────────────────────────────────────────────────────────────────────


def test_pictures_are_those_of_the_video(stores):
    plain = source_of(stores, "none")
    assert plain.store is None
    expected = [resize_with_pad(plain.read(position).images[FRONT], *SIZE) for position in range(len(plain))]
    for kind in ("lossless", "raw", "jpeg"):
        source = source_of(stores, kind)
        pictures = [source.read(position).images[FRONT] for position in range(len(source))]
        if kind == "jpeg":
            errors = [((a.double() - b.double()) ** 2).mean() for a, b in zip(pictures, expected, strict=True)]
            assert 0 < max(errors) < 255**2 / 10**3.8
        else:
            assert all(a.equal(b) for a, b in zip(pictures, expected, strict=True))
    assert str(source_of(stores).store).endswith("32x32-raw")  # of several, the fastest that loses nothing


def test_two_cameras_as_pictures_in_data_files(place, tmp_path):
    sizes = {FRONT: (32, 48), WRIST: (48, 48)}
    root = write_dataset(tmp_path / "pictures", episodes=3, length=[3, 9, 6], cameras=sizes, video=False, seed=1)
    config = config_of(place, root, "--data.train.frame_store", "raw")
    config.model_cfg.image_resolution = [48, 48]
    assert making.prepare_all(config, workers=1) == []
    with_store, without = source_of(root, size=(48, 48)), source_of(root, "none")
    for source in (with_store, without):
        source.cameras = {FRONT: FRONT, WRIST: WRIST}
    for position in range(18):
        ours, theirs = with_store.read(position).images, without.read(position).images
        assert all(ours[key].equal(resize_with_pad(theirs[key], 48, 48)) for key in sizes)


@pytest.mark.parametrize("name", ["jpeg95", "jpeg50", "lossless", "raw"])
def test_encodings(name):
    rows, columns = np.mgrid[0:40, 0:56]
    image = np.stack([rows * 6, columns * 4, (rows * columns) % 256], axis=-1).clip(0, 255).astype(np.uint8)
    encoding = Encoding.parse(name)
    assert str(encoding) == name
    decoded = encoding.decode(np.frombuffer(encoding.encode(image, halved_colours=False), np.uint8), 40, 56)
    assert decoded.shape == (3, 40, 56) and decoded.dtype == np.uint8
    if name.startswith("jpeg"):
        assert np.abs(decoded.transpose(1, 2, 0).astype(int) - image)[..., :2].mean() < 12
        with pytest.raises(ValueError, match=r"a picture of \(40, 56\) in a store of \(40, 40\)"):
            encoding.decode(np.frombuffer(encoding.encode(image, halved_colours=True), np.uint8), 40, 40)
    else:
        np.testing.assert_array_equal(decoded.transpose(1, 2, 0), image)


@pytest.mark.parametrize("size", [(480, 640), (64, 80), (80, 64), (720, 1280), (31, 97), (10, 10), (481, 643)])
def test_resizing_is_the_readers(size):
    import torch

    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        theirs = resize_with_pad(torch.from_numpy(image.transpose(2, 0, 1).copy()), 48, 56)
        np.testing.assert_array_equal(resize(image, (48, 56)).transpose(2, 0, 1), theirs.numpy())


def test_the_size_of_a_store_of_pictures_is_estimated_from_pictures(place, tmp_path, caplog):
    root = write_dataset(tmp_path / "pictures", episodes=3, length=40, cameras={FRONT: (32, 48)}, video=False)
    caplog.set_level(logging.INFO)
    assert prepared(place, root, workers=1) == []
    (said,) = re.findall(r"120 pictures to decode .* about ([\d.]+) kB \(from \d+ frames", caplog.text)
    (part,) = root.glob("frames/*/*/*.arrow")
    assert float(said) * 1000 == pytest.approx(part.stat().st_size, rel=0.2)


def test_any_arrow_library_reads_the_pictures(stores):
    import pyarrow as pa

    (part,) = stores.glob("frames/32x32-raw/*/*.arrow")
    with pa.memory_map(str(part)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema.metadata == {b"encoding": b"raw", b"height": b"32", b"width": b"32"}
    assert table["episode_index"].to_pylist() == [episode for episode in range(6) for _ in range(12)]
    picture = np.frombuffer(table["image"][13].as_py(), dtype=np.uint8).reshape(3, *SIZE)
    np.testing.assert_array_equal(picture, source_of(stores, "raw").read(13).images[FRONT].numpy())


def test_samples_of_workers_are_the_same_with_and_without(stores, place):
    spec = SPEC.__class__(**{**vars(SPEC), "image_resolution": SIZE})
    tokenizer = str(REPOSITORY / "demo" / "tokenizer")

    def samples(setting, workers):
        data = built(dataset_config(stores), tokenizer=tokenizer, spec=spec, frame_store=setting)
        return data, by_number(micro_batches(data, 3, batch=16, workers=workers))

    without, expected = samples("none", 0)
    for setting in ("raw", "lossless"):
        with_store, found = samples(setting, 2)
        assert found == expected and with_store.fingerprint == without.fingerprint
        assert any(f"32x32-{setting}" in line for line in with_store.report)
    assert samples("jpeg", 0)[0].fingerprint != without.fingerprint  # other pictures: not the same run


def test_a_log_line_says_what_a_store_would_gain(place, copy):
    tokenizer = str(REPOSITORY / "demo" / "tokenizer")
    spec = SPEC.__class__(**{**vars(SPEC), "image_resolution": SIZE})
    data = built(dataset_config(copy), tokenizer=tokenizer, spec=spec, frame_store="auto")
    assert sum("python -m agent.data.prepare" in line for line in data.report) == 1


def test_training_with_a_store_has_the_same_losses(place, server, stores):
    root = ("--data.train.datasets.0.root", str(stores))
    code, output = server.run(place, "videos", *root, "--n_updates", "6", "--data.train.frame_store", "none")
    assert code == 0, output
    code, output = server.run(place, "store", *root, "--n_updates", "6", "--data.train.frame_store", "raw")
    assert code == 0 and "32x32-raw" in output, output
    losses = [[line["loss"] for line in place.metrics(name)] for name in ("videos", "store")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # The same pictures: the run may go on without its store. Other pictures are another run.
    code, output = server.run(place, "store", *root, "--n_updates", "6", "--data.train.frame_store", "none")
    assert code == 0 and "this run is finished" in output, output
    code, output = server.run(place, "store", *root, "--n_updates", "6", "--data.train.frame_store", "jpeg")
    change = (
        f"came from the frame store {stores}/frames/32x32-raw → come from the frame store {stores}/frames/32x32-jpeg95"
    )
    assert code == 2 and change in output, output


def test_training_with_a_store_needs_no_decoder(place, stores, tmp_path):
    for name in ("av", "torchcodec", "lerobot"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    root = ("--data.train.datasets.0.root", str(stores), "--data.train.frame_store", "jpeg")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    code, output = place.run("--name", "no-decoder", *root, "--n_updates", "1", "--eval_freq", "0", PYTHONPATH=path)
    assert code == 0 and "32x32-jpeg95" in output, output


def test_under_auto_a_run_keeps_to_the_pictures_that_it_began_with(place, server, copy, stores):
    def run(name, root, *more):
        root = ("--data.train.datasets.0.root", str(root))
        return server.run(place, name, *root, "--n_updates", "4", "--save_model_freq", "2", *more)

    def losses(name):
        return [line["loss"] for line in place.metrics(name)]

    code, output = run("began", copy)
    assert code == 0, output
    before = losses("began")
    assert prepared(place, copy) == []
    store = copy / "frames" / "32x32-jpeg95"
    shutil.rmtree(place.checkpoint("began"))
    code, output = run("began", copy)
    assert code == 0 and "decoded from the data set, as when this run began, not from 32x32-jpeg95" in output, output
    assert losses("began") == before and len(before) == 4
    # One that began with JPEG: when it is gone, no other will do.
    code, output = run("jpeg", copy)
    assert code == 0 and f"pictures from the frame store {store}" in output, output
    shutil.rmtree(store)
    code, output = run("jpeg", copy)
    assert code == 2 and f"the frame store {store}, which is not there any more" in output, output
    assert "--data.train.frame_store jpeg --data.train.frame_quality 95" in output


@pytest.mark.parametrize(("began", "taken"), [(None, "raw"), ("lossless", "raw"), ("raw", "raw"), ("jpeg95", "jpeg95")])
def test_which_stores_serve_a_run_under_way(stores, began, taken):
    """Raw and lossless ones hold the very pictures of the videos."""
    began_with = {"test/data": began and f"32x32-{began}"}
    wanted = WantedStore("auto", 95, SIZE, began_with)
    source = open_source(dataset_config(stores), 4, "pyav", 1e-4, wanted=wanted)
    assert source.store_name == f"32x32-{taken}"


# ── which frame is whose ────────────────────────────────────────────────────────────────────────────────────────


def frames_of(times, starts, lengths, ends=None, unit=0.01, fps=10.0):
    """What belongs to the episodes of one video that begin and end at these seconds; without ends, when their rows do."""
    starts, lengths = np.asarray(starts, np.float64), np.asarray(lengths)
    ends = starts + lengths / fps if ends is None else np.asarray(ends)
    stretches = Stretches(np.arange(len(starts)), np.zeros(len(starts), np.int64), starts, ends, lengths, fps)
    bad = wrong_by_the_table(stretches, lambda _: Path("v.mp4"))
    index = FileIndex(Path("v.mp4"), SourceFile(0, 0, ""), np.asarray(times, np.int64), unit)
    return times_of_episodes(index, stretches, stretches.offsets(), bad)


def test_frames_are_counted_where_the_clock_is_another_one_and_nothing_contradicts_it():
    first, second = frames_of(np.arange(20) * 11, [0.0, 1.2], [12, 8])  # 10 % slower than it says
    assert first.tolist() == list(range(0, 132, 11)) and second.tolist() == list(range(132, 220, 11))
    # One per cent slower, so that at 10 s every time is that of the frame before.
    _, second = frames_of(np.arange(120) * 101, [0.0, 10.0], [100, 20], unit=0.001)
    assert second.tolist() == list(range(10100, 12120, 101))
    # With frames to spare, such as those of a deleted episode, the clock decides.
    assert frames_of(np.arange(30) * 10, [2.0], [10])[0].tolist() == list(range(200, 300, 10))
    whole, cut = frames_of(np.arange(15) * 10, [0.0, 1.2], [12, 8])
    assert len(whole) == 12
    assert cut == (
        "v.mp4 holds 3 of its 8 frames from 1.2000 to 2.0000 s, not frame 3 (15 frames in all where the metadata count 20)"
    )


def test_the_stretches_of_the_metadata_win_where_they_fit():
    """The sum agrees: one picture is missing in the first episode, and the second has one more than it has rows."""
    times = np.arange(36) * 10
    first, second, third = frames_of(times, [0.0, 1.1, 2.4], [12, 12, 12], ends=[1.1, 2.4, 3.6])
    assert first == (
        "its stretch of v.mp4, 0.0000 to 1.1000 s, has room for 11 frames at 10 a second, and it has 12 rows"
    )
    assert second.tolist() == list(range(110, 230, 10)) and third.tolist() == list(range(240, 360, 10))
    # The stretches are as long as the rows need, and a picture is missing in one and there twice in the other.
    gap = np.delete(np.append(times[:24], 125), 5)
    first, second = frames_of(np.sort(gap), [0.0, 1.2], [12, 12])
    assert "v.mp4 holds 11 of its 12 frames from 0.0000 to 1.2000 s, not frame 5 (24 frames in all" in first
    assert second.tolist() == list(range(120, 240, 10))
    # Of a stretch with as many frames as rows they are all, however uneven.
    uneven = [0, 16, 18, 29, 40]
    assert frames_of([*uneven, 50, 60], [0.0, 0.5], [5, 2])[0].tolist() == uneven


def test_stretches_that_overlap():
    first, second = frames_of(np.arange(23) * 10, [0.0, 1.1], [12, 12])
    assert first == ("its 12 rows take v.mp4 from 0.0000 to 1.2000 s, and episode 1 begins there at 1.1000 s")
    assert second.tolist() == list(range(110, 230, 10))
    # Every episode begins at 0, as after merging data sets without moving their times.
    assert all("begins there at 0.0000 s" in why for why in frames_of(np.arange(30) * 10, [0.0, 0.0], [12, 18]))
    # Two that are the same on purpose, with other instructions perhaps.
    first, second = frames_of(np.arange(12) * 10, [0.0, 0.0], [12, 12])
    assert first.tolist() == second.tolist() == list(range(0, 120, 10))


def test_of_several_frames_near_a_time_the_nearest_is_taken():
    """As LeRobot's decoders do; here the camera ran three times as fast as the rest was recorded."""
    (found,) = frames_of(np.arange(90), [1.0], [10], unit=1 / 30)
    assert found.tolist() == list(range(30, 60, 3))
    (found,) = frames_of([0, 60, 130], [0.0], [2], unit=1e-3)
    assert found.tolist() == [0, 130]


def test_a_video_without_a_frame():
    assert frames_of([], [0.0, 0.3], [3, 2]) == ["v.mp4 holds no frame"] * 2


def test_decoding_begins_anywhere(place):
    import av

    path = video_of(place.folder / "data")
    with av.open(str(path)) as container:
        frames = {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    times = np.asarray(sorted(frames))
    for begin in (0, 1, 7, 36, 71):
        found = [frame.to_ndarray(format="rgb24") for frame in decode(path, times[begin : begin + 9])]
        assert len(found) == min(9, 72 - begin)
        assert all((a == frames[t]).all() for a, t in zip(found, times[begin:], strict=False))


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_parts(monkeypatch):
    """Every episode a part of its own."""
    monkeypatch.setattr(frame_preparation, "PART_FRAMES", 12)


def test_what_is_done_is_not_done_again(place, copy, small_parts, caplog, monkeypatch):
    assert prepared(place, copy) == []
    parts = {path: path.stat().st_mtime_ns for path in copy.glob("frames/*/*/*.arrow")}
    assert len(parts) == 6
    gone = sorted(parts)[2]
    gone.unlink()
    caplog.set_level(logging.INFO)
    assert prepared(place, copy) == []
    assert "12 pictures to decode" in caplog.text
    again = {path: path.stat().st_mtime_ns for path in copy.glob("frames/*/*/*.arrow")}
    assert {path for path in again if again[path] != parts[path]} == {gone}
    # With everything there no process is started.
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda _: pytest.fail("a process is started"))
    assert prepared(place, copy) == []


def test_killed_in_the_middle_and_continued(place, tmp_path):
    root = write_dataset(tmp_path / "long", episodes=4, length=150)
    command = [sys.executable, "-c", SLOW, "--config_path", str(place.folder / "tiny.yaml")]
    command += ["--data.train.datasets.0.root", str(root), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = root / "frames" / "32x32-jpeg95"
    give_up = time.monotonic() + 100
    while len(list(folder.glob("*/*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "manifest.json").exists()
    assert source_of(root).store is None  # an unfinished store is none
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.arrow")}
    (folder / FRONT / ".left-by-the-killed.arrow.tmp").touch()
    time.sleep(0.5)  # its workers see that it is gone
    finish = subprocess.run(command, env={**os.environ, "SLOW": "0"}, capture_output=True, text=True)
    assert finish.returncode == 0, finish.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.arrow")}
    assert len(after) == 4 and not list(folder.glob("*/.*.tmp"))
    assert sum(after[path] == done[path] for path in done) >= 2
    plain, stored = source_of(root, "none"), source_of(root)
    for position in (0, 149, 150, 599):
        theirs = resize_with_pad(plain.read(position).images[FRONT], *SIZE)
        assert (theirs.double() - stored.read(position).images[FRONT].double()).abs().mean() < 4


SLOW = """
import os, sys, time
from agent.data import prepare
from agent.data.frames import making
from agent.data.frames import preparation as frame_preparation
frame_preparation.PART_FRAMES = 150
run = making._Pool.each
def slow(self, *arguments):
    for result in run(self, *arguments):
        yield result
        time.sleep(float(os.environ.get("SLOW", "1")))
making._Pool.each = slow
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_two_preparations_of_one_store(place, copy):
    import fcntl

    folder = copy / "frames" / "32x32-jpeg95"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (problem,) = prepared(place, copy)
    assert "another preparation is at work" in problem


def test_more_episodes_are_added(place, copy, small_parts):
    entry = "--data.train.datasets.0.episodes"
    assert prepared(place, copy, entry, "[1, 2]") == []
    assert source_of(copy, episodes=[1, 2]).store is not None
    with pytest.raises(ValueError, match=r"lacks the frames of episodes 0, 3-5"):
        source_of(copy)
    first = {path: path.stat().st_mtime_ns for path in copy.glob("frames/*/*/*.arrow")}
    assert prepared(place, copy, entry, "[4]") == []
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())
    source = source_of(copy, episodes=[1, 2, 4])
    assert source.store.manifest.frames == 36 and source.read(35).frame == 11


@pytest.mark.parametrize("kind", [("frame_store", "raw"), ("frame_quality", "80")])
def test_the_command_that_completes_a_store_is_of_its_kind(place, copy, kind):
    """`auto` takes what is there; what it would make would not be taken."""
    setting = f"--data.train.{kind[0]}"
    assert prepared(place, copy, "--data.train.datasets.0.episodes", "[1, 2]", setting, kind[1], workers=1) == []
    with pytest.raises(
        ValueError, match=rf"lacks the frames of episodes 0, 3-5. Add them with\n  .* {setting} {kind[1]}$"
    ):
        source_of(copy)


def test_a_store_is_read_as_it_was_until_more_episodes_are_all_there(place, copy, monkeypatch):
    """Raw pictures have no form: read from a part that was written anew, they would be other pictures without an error."""
    entry, raw = "--data.train.datasets.0.episodes", ("--data.train.frame_store", "raw")
    assert prepared(place, copy, *raw, entry, "[0, 1, 2]") == []
    before = [source_of(copy, "raw", episodes=[0, 1, 2]).read(position).images[FRONT] for position in range(36)]

    def stop(*_):
        raise ValueError("stopped")

    for owner, moment in ((frame_preparation.Preparation, "finish"), (Manifest, "write")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, moment, stop)
            assert prepared(place, copy, *raw) == ["stopped"]
        source = source_of(copy, "raw", episodes=[0, 1, 2])
        assert all(source.read(position).images[FRONT].equal(picture) for position, picture in enumerate(before))
    assert prepared(place, copy, *raw) == []
    source = source_of(copy, "raw")
    assert all(source.read(position).images[FRONT].equal(picture) for position, picture in enumerate(before))
    assert (
        len(source) == 72
        and len(list(copy.glob("frames/*/*/*.arrow"))) == len(list(copy.glob("frames/*/*.arrow"))) == 1
    )


def test_episodes_that_were_left_out_stay_so_when_others_are_asked_for(place, copy, small_parts):
    video = video_of(copy)
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    assert prepared(place, copy, skip=True) == []
    left_out = source_of(copy).store.manifest.left_out
    assert prepared(place, copy, "--data.train.datasets.0.episodes", "[0, 1]") == []
    assert source_of(copy).store.manifest.left_out == left_out != {}


def test_a_file_of_which_nothing_could_be_read(place, copy):
    """The last episode has a video of its own."""
    import pyarrow.parquet as pq

    video = video_of(copy)
    other, content = video.with_name("file-001.mp4"), video.read_bytes()
    other.write_bytes(content[:1000])
    (path,) = copy.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    for name, value in ((f"videos/{FRONT}/file_index", 1), (f"videos/{FRONT}/from_timestamp", 0.0)):
        column = [*table[name].to_pylist()[:-1], value]
        table = table.set_column(table.column_names.index(name), name, [column])
    pq.write_table(table, path)
    assert prepared(place, copy, skip=True, workers=1) == []
    assert prepared(place, copy, "--data.train.datasets.0.episodes", "[0, 1]", workers=1) == []
    assert source_of(copy).episodes.tolist() == [0, 1, 2, 3, 4]
    write_over(other, content)
    with pytest.raises(ValueError, match=r"file-001.mp4 has changed"):
        source_of(copy)


def test_what_could_not_be_read_is_tried_again_when_the_file_is_copied_again(place, copy):
    """Reading may fail without the file being damaged; then its contents are the same."""
    assert prepared(place, copy, workers=1) == []
    (note,) = copy.glob("frames/*/*/*.json")
    note.write_bytes(seal({**unseal(note.read_bytes()), "bad": {"2": "Input/output error"}}))
    assert "Copy the files again" in prepared(place, copy, workers=1)[0]
    write_over(video_of(copy), video_of(copy).read_bytes())
    assert prepared(place, copy, workers=1) == []


def test_rows_of_pictures_in_another_order(place, tmp_path):
    import pyarrow.parquet as pq

    root = write_dataset(tmp_path / "pictures", episodes=3, length=[3, 9, 6], cameras={FRONT: (32, 32)}, video=False)
    expected = [source_of(root, "none").read(position).images[FRONT] for position in range(18)]
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    assert prepared(place, root, "--data.train.frame_store", "raw", workers=1) == []
    for kind in ("raw", "none"):
        source = source_of(root, kind)
        assert all(source.read(position).images[FRONT].equal(picture) for position, picture in enumerate(expected))


def test_transparent_and_missing_pictures(tmp_path):
    """A simulator's pictures have four channels."""
    import io
    from types import SimpleNamespace

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from agent.data.frames.parts import Part, _from_data_file
    from agent.data.recorded.pictures import stored_picture

    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    Image.fromarray(picture).save(file := io.BytesIO(), "png")
    rows = [{"bytes": file.getvalue(), "path": None}, None]
    pq.write_table(pa.table({FRONT: rows}), path := tmp_path / "file.parquet")
    episodes = {0: np.asarray([0]), 1: np.asarray([1])}
    part, stored, bad = Part(FRONT, path, tmp_path, episodes, Encoding("raw"), SIZE, False), {}, {}
    writer = SimpleNamespace(add=lambda episode, _, data: stored.update({episode: np.frombuffer(data, np.uint8)}))
    _from_data_file(part, writer, bad)
    assert list(bad) == [1] and "the picture of frame 0 in" in bad[1]
    read = stored_picture(rows[0])  # type: ignore[arg-type]
    assert stored[0].reshape(3, *SIZE).tolist() == read.transpose(2, 0, 1).tolist()
    assert read.tolist() == picture[:, :, :3].tolist()


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_truncated_video(place, copy, small_parts):
    video = video_of(copy)
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    (problem,) = prepared(place, copy)
    assert "cannot be read" in problem and "--skip_bad_episodes" in problem and str(video) in problem
    with pytest.raises(ValueError, match="is cut short or damaged"):
        source_of(copy)
    assert prepared(place, copy, skip=True) == []
    source = source_of(copy)
    left_out = source.store.manifest.left_out
    assert left_out and 0 not in left_out and 5 in left_out
    assert source.episodes.tolist() == [episode for episode in range(6) if episode not in left_out]
    with pytest.raises(ValueError, match="(?s)data set test/data: none of the episodes .*choose others.*data.prepare"):
        source_of(copy, episodes=[5])
    plain = source_of(place.folder / "data", "none")
    theirs = resize_with_pad(plain.read(5).images[FRONT], *SIZE).double()
    assert (theirs - source.read(5).images[FRONT].double()).abs().mean() < 4


def test_damage_in_the_middle_of_a_video_costs_its_episode_alone(place, copy, small_parts):
    import av

    video = video_of(copy)
    with av.open(str(video)) as container:
        packets = [
            (packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.pts is not None
        ]
    _, begin, size = sorted(packets)[30]  # frame 6 of episode 2
    content = bytearray(video.read_bytes())
    content[begin + 8 : begin + size] = bytes(255 - value for value in content[begin + 8 : begin + size])
    write_over(video, bytes(content))
    (problem,) = prepared(place, copy)
    assert "episodes 2 cannot be read" in problem
    assert prepared(place, copy, skip=True) == []
    assert source_of(copy).episodes.tolist() == [0, 1, 3, 4, 5]


def test_a_store_for_another_resolution_or_quality(place, stores, copy):
    with pytest.raises(ValueError, match=r"holds the frame store .*32x32-raw.*, not 48x48") as error:
        source_of(stores, size=(48, 48))
    assert "uv run python -m agent.data.prepare" in str(error.value)
    with pytest.raises(ValueError, match="not 32x32-jpeg80"):
        source_of(stores, "jpeg", quality=80)
    with pytest.raises(ValueError, match=r"(?s)no frame store.*--data.train.frame_store raw"):
        source_of(copy, "raw")
    # A folder that was given another's name.
    shutil.copytree(stores / "frames" / "32x32-raw", copy / "frames" / "48x48-raw")
    with pytest.raises(ValueError, match="holds frames of 32 × 32, the model wants 48 × 48"):
        source_of(copy, "raw", size=(48, 48))


def test_a_store_that_no_longer_matches(place, copy):
    import pyarrow.parquet as pq

    assert prepared(place, copy) == []
    moved = copy.with_name("moved")
    shutil.copytree(copy, moved, copy_function=shutil.copy)  # with other times
    assert source_of(moved).store is not None
    recorded = Manifest.read(moved / "frames" / "32x32-jpeg95" / "manifest.json").sources
    assert [source.mtime_ns for source in recorded.values()] == [video_of(moved).stat().st_mtime_ns]
    video, content = video_of(copy), video_of(copy).read_bytes()
    for other in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        write_over(video, other)
        with pytest.raises(ValueError, match=r"no longer matches its data set: .*mp4 has changed") as error:
            source_of(copy)
        assert "uv run python -m agent.data.prepare" in str(error.value)
    write_over(video, content)
    assert source_of(copy).store is not None
    (path,) = copy.glob("meta/episodes/*/*.parquet")
    table, name = pq.read_table(path), f"videos/{FRONT}/from_timestamp"
    column = [value + 0.5 for value in table[name].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(name), name, [column]), path)
    with pytest.raises(ValueError, match="was made of other metadata"):
        source_of(copy)


def test_noting_that_a_copy_is_unchanged_may_fail(place, copy, tmp_path, monkeypatch):
    """It saves the next start some reading; a full disk must not keep this one from training."""
    assert prepared(place, copy) == []
    moved = tmp_path / "moved"
    shutil.copytree(copy, moved, copy_function=shutil.copy)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Manifest, "write", full)
    assert source_of(moved).read(71).frame == 11


def test_two_nodes_replace_a_manifest_at_once_under_one_process_id(tmp_path, monkeypatch):
    from agent.safe_files import write_bytes

    path, sync = tmp_path / "manifest.json", os.fsync

    def second(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        write_bytes(path, b"second")
        assert path.read_bytes() == b"second"
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", second)
    write_bytes(path, b"first")
    assert path.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_a_changed_video_is_decoded_again(place, copy, tmp_path):
    assert prepared(place, copy) == []
    other = write_dataset(tmp_path / "other", episodes=6, length=12, seed=9)
    video_of(copy).write_bytes(video_of(other).read_bytes())
    assert prepared(place, copy) == []
    theirs = resize_with_pad(source_of(other, "none").read(30).images[FRONT], *SIZE).double()
    assert (theirs - source_of(copy).read(30).images[FRONT].double()).abs().mean() < 4


def test_other_metadata_of_the_same_video_are_prepared_anew(place, copy):
    """What was decoded before is of the episodes that they were then."""
    import pyarrow.parquet as pq

    assert prepared(place, copy, "--data.train.frame_store", "raw", workers=1) == []
    (path,) = copy.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    for end in ("from_timestamp", "to_timestamp"):
        name = f"videos/{FRONT}/{end}"
        first, second, third, *others = table[name].to_pylist()
        table = table.set_column(table.column_names.index(name), name, [[first, third, second, *others]])
    pq.write_table(table, path)
    assert prepared(place, copy, "--data.train.frame_store", "raw", workers=1) == []
    plain, stored = source_of(copy, "none"), source_of(copy, "raw")
    for position in (0, 12, 24, 35):
        theirs = resize_with_pad(plain.read(position).images[FRONT], *SIZE)
        assert stored.read(position).images[FRONT].equal(theirs)


def test_a_manifest_of_another_version(place, copy):
    assert prepared(place, copy) == []
    path = copy / "frames" / "32x32-jpeg95" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="of version 99, this program reads 1"):
        source_of(copy)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no manifest"):
        source_of(copy)


def test_a_part_that_is_cut_short_is_named(place, copy):
    assert prepared(place, copy) == []
    (part,) = copy.glob("frames/*/*/*.arrow")
    source = source_of(copy)
    part.write_bytes(part.read_bytes()[:3000])
    with pytest.raises(RuntimeError, match=r"episode 5, frame 11 cannot be read .*arrow is cut short"):
        source.read(71)


def test_half_a_copy_of_a_store_is_refused_before_training(place, copy):
    assert prepared(place, copy, workers=1) == []
    (part,), (index,) = copy.glob("frames/*/*/*.arrow"), copy.glob("frames/*/index-*.arrow")
    for path in (part, index):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ValueError, match=rf"{path} is .*cut short.* run `.*agent.data.prepare .*` again, which makes"
        ):
            source_of(copy)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path} is missing.* run `.*agent.data.prepare .*` again, which makes"):
            source_of(copy)
        assert prepared(place, copy, workers=1) == []
        assert path.read_bytes() == whole and source_of(copy).store is not None


@pytest.mark.parametrize("kind", ["jpeg", "lossless", "raw"])
def test_a_damaged_picture_is_found_and_made_anew(place, copy, small_parts, caplog, kind):
    """The data set's own files, which are sound and may be far away, are not named for it."""
    setting = ("--data.train.frame_store", kind)
    assert prepared(place, copy, *setting) == []
    index = read_index(next(copy.glob("frames/*/index-*.arrow")))
    part = sorted(copy.glob("frames/*/*/*.arrow"))[index[f"{FRONT}/part"][71]]
    whole, decoded = part.read_bytes(), part.stat().st_mtime_ns
    others = {path: path.stat().st_mtime_ns for path in copy.glob("frames/*/*/*.arrow") if path != part}
    content = bytearray(whole)
    content[index[f"{FRONT}/offset"][71] + index[f"{FRONT}/size"][71] // 2] ^= 1  # one bit of its last picture
    part.write_bytes(content)
    source = source_of(copy, kind)
    source.read(70)
    with pytest.raises(
        RuntimeError, match=r"episode 5, frame 11 cannot be read .* of the frame store \S+\. Run"
    ) as caught:
        source.read(71)
    text = str(caught.value)
    assert f"the picture of {FRONT} in {part} is damaged: its checksum does not match" in text
    assert "python -m agent.data.prepare" in text and "data.train.frame_store: none" in text and ".mp4" not in text
    assert prepared(place, copy, *setting) == []
    assert f"{part} is damaged, and made anew" in caplog.text and decoded != part.stat().st_mtime_ns
    assert part.read_bytes() == whole and {path: path.stat().st_mtime_ns for path in others} == others
    source_of(copy, kind).read(71)


def test_what_else_of_a_store_is_damaged(place, copy, small_parts, caplog):
    """A digit of index, note or manifest; and a whole picture that is another frame's."""
    assert prepared(place, copy) == []
    before = {path: path.read_bytes() for path in copy.glob("frames/**/*") if path.is_file()}

    def change(pattern: str, old: bytes | None = None) -> Path:
        path = next(copy.glob(pattern))
        content = bytearray(path.read_bytes())
        content[content.index(old) + len(old) if old else len(content) // 2] ^= 1
        path.write_bytes(content)
        return path

    index = change("frames/*/index-*.arrow")
    with pytest.raises(ValueError, match=f"{index} is missing, cut short or damaged .* makes the index anew"):
        source_of(copy)
    assert prepared(place, copy) == []
    note = change("frames/*/*/*.json", b'"frames": ')
    assert prepared(place, copy) == []
    assert f"{note} is damaged, and its part is made anew" in caplog.text
    manifest = change("frames/*/manifest.json", b'"frames": ')
    with pytest.raises(ValueError, match=f"{manifest} is no manifest .*its checksum does not match.* Remove this file"):
        source_of(copy)
    manifest.unlink()
    assert prepared(place, copy) == []
    assert {path: path.read_bytes() for path in copy.glob("frames/**/*") if path.is_file()} == before
    store = source_of(copy).store
    store.open()
    store._index = {name: values.copy() for name, values in store._index.items()}
    for name in ("part", "offset", "size"):
        store._index[f"{FRONT}/{name}"][3] = store._index[f"{FRONT}/{name}"][4]
    with pytest.raises(ValueError, match="its checksum does not match"):
        store.image(FRONT, 0, 3)


def test_a_store_of_an_earlier_version_is_read_and_gets_checksums(place, copy, small_parts, caplog):
    assert prepared(place, copy) == []
    before = {path: path.read_bytes() for path in copy.glob("frames/**/*") if path.is_file()}
    as_before_checksums(copy)
    caplog.set_level(logging.INFO)
    with_none = source_of(copy).read(71).images[FRONT]
    (line,) = [line for line in caplog.messages if "holds no checksums" in line]
    assert "agent.data.prepare" in line
    assert prepared(place, copy) == []
    assert "were written by an earlier version, without checksums" in caplog.text
    assert {path: path.read_bytes() for path in copy.glob("frames/**/*") if path.is_file()} == before
    assert np.array_equal(source_of(copy).read(71).images[FRONT], with_none)


def as_before_checksums(root: Path) -> None:
    """What is in a store of a version that wrote none."""
    import pyarrow as pa

    (manifest,) = root.glob("frames/*/manifest.json")
    folder, values = manifest.parent, json.loads(manifest.read_text())
    index = read_index(folder / values["index"])
    batch = pa.record_batch({name: pa.array(column) for name, column in index.items() if not name.endswith("xxh3")})
    with pa.ipc.new_file(folder / "index-0123456789abcdef.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    content = (folder / "index-0123456789abcdef.arrow").read_bytes()
    (folder / "index-0123456789abcdef.arrow").rename(folder / index_name(content))
    (folder / values["index"]).unlink()
    values["index"] = index_name(content)
    for path in [manifest, *folder.glob("*/*.json")]:
        values = values if path == manifest else json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in ("xxh3", "checksums")}))


def test_a_camera_that_the_store_lacks(place, stores, copy):
    store = source_of(stores, "raw").store
    with pytest.raises(ValueError, match=f"lacks the camera {WRIST}; it has {FRONT}. Add it with"):
        store.require([FRONT, WRIST], WantedStore("raw", 95, SIZE))


def test_a_full_disk(place, copy, small_disk, small_parts, monkeypatch):
    frames = ("--data.train.datasets.0.frames", str(small_disk), "--data.train.frame_store", "raw")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_950_000))
    (problem,) = prepared(place, copy, *frames)
    assert "takes about" in problem and "free. Make room" in problem
    # Others write to the disk meanwhile.
    monkeypatch.setattr(making, "_announce", lambda *_: None)
    (problem,) = prepared(place, copy, *frames, workers=1)
    assert f"the disk of {small_disk / '32x32-raw'} is full" in problem and "the same command again" in problem
    assert not list(small_disk.glob("*/*/.*.tmp"))
    filler.unlink()
    assert prepared(place, copy, *frames) == []
    assert source_of(copy, frames=str(small_disk)).read(71).frame == 11


def test_a_process_that_is_killed():
    with making._Pool(1) as pool, pytest.raises(ValueError, match=r"a process that decodes was killed.*--workers"):
        pool.run(os._exit, [(1,)])


def test_a_folder_that_cannot_be_written(place, copy, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    (problem,) = prepared(place, copy)
    assert "cannot be written (Permission denied)" in problem and "`frames: FOLDER`" in problem


def test_a_video_that_may_not_be_read(place, copy, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(video_of(copy)))

    monkeypatch.setattr(making._Pool, "run", refuse)
    (problem,) = prepared(place, copy)
    assert problem == f"data set test/data: {video_of(copy)} cannot be read (Permission denied)"


def test_a_disk_without_room_for_a_folder(place, copy, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "mkdir", refuse)
    (problem,) = prepared(place, copy)
    assert f"the disk of {copy / 'frames' / '32x32-jpeg95'} is full (" in problem and "`frames: FOLDER`" in problem


def test_a_disk_that_knows_no_locks(place, copy, monkeypatch, caplog):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert prepared(place, copy) == []
    assert f"{copy / 'frames' / '32x32-jpeg95'} cannot be locked" in caplog.text
    assert (copy / "frames" / "32x32-jpeg95" / "manifest.json").is_file()


def test_two_data_sets_with_one_folder_of_stores(place, copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    entries = [{"repo_id": f"lab/{root.name}", "root": str(root), "frames": str(tmp_path)} for root in (copy, other)]
    config = load_config(place.folder / "tiny.yaml", ["--data.train.datasets", json.dumps(entries)], 1)[0]
    (problem,) = making.prepare_all(config)
    assert f"data set lab/data and data set lab/other both have `frames: {tmp_path}`" in problem
    assert f"give each a folder of its own, such as {tmp_path / 'other'}" in problem
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_missing_video(place, copy):
    video_of(copy).unlink()
    (problem,) = prepared(place, copy)
    assert "file-000.mp4 is missing" in problem


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command(place, copy, capsys):
    arguments = ["--config_path", str(place.folder / "tiny.yaml"), "--data.train.datasets.0.root", str(copy)]
    command = [sys.executable, "-m", "agent.data.prepare", *arguments]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "72 pictures to decode" in done.stderr and "is complete" in done.stderr
    assert prepare.main([*arguments, "--workers", "0"]) == 2
    assert "--workers takes a number of processes, got '0'" in capsys.readouterr().err
    write_over(video_of(copy), b"")
    assert prepare.main([*arguments, "--frame_store", "raw"]) == 2
    assert "the kind of store is --data.train.frame_store" in capsys.readouterr().err
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2 and "error: data set test/data: episodes 0-5 cannot be read" in bad.stderr, bad.stderr


@pytest.mark.parametrize(("given", "skip"), [("", True), ("=true", True), ("=false", False)])
def test_skipping_may_be_said_to_be_false(given, skip):
    assert prepare.own_arguments([f"--skip_bad_episodes{given}"]) == ([], skip, None, False)
    with pytest.raises(ValueError, match="--skip_bad_episodes takes no value, or =true or =false, got 'no'"):
        prepare.own_arguments(["--skip_bad_episodes=no"])


def test_agent_prepare_makes_stores_too(place, copy):
    arguments = ["--config_path", str(place.folder / "tiny.yaml"), "--data.train.datasets.0.root", str(copy)]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "agent.prepare", *arguments, "--workers", "1"]
    for value, expected in (("false", 0), ("true", 1)):
        done = subprocess.run([*command, "--frame_store", value], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(list(copy.glob("frames/*/manifest.json"))) == expected
