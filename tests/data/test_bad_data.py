"""Bad data through the commands themselves: what is said, where it is, what to do. Run: uv run pytest tests/data/test_bad_data.py

Processes are forked from a server that has imported everything; each test damages a copy of the data set of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from support.checking import check
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import Workplace

from agent.configuration_pipeline import load_config
from agent.data.configuration import DatasetConfig
from agent.data.frames.making import prepare_all
from agent.data.frames.store import WantedStore
from agent.data.recorded.metadata import read_metadata
from agent.data.recorded.stretches import Stretches
from agent.data.resizing import resize_with_pad
from agent.data.source import open_source

FRONT = "observation.images.front"
FEW = ("--n_updates", "4", "--eval_start", "false")


@pytest.fixture
def refusal(place, server, tmp_path) -> Callable[..., str]:
    """What a run says that cannot start: a mistake of the user's, without a traceback."""

    def run(*overrides: str) -> str:
        status = tmp_path / "status.json"
        run = server.start(place, tmp_path.name, *overrides, VLA_STATUS_FILE=str(status), VLA_ATTEMPT="1")
        output = run.wait()
        record = json.loads(status.read_text())
        assert (record["state"], record["error_kind"]) == ("failed", "config"), output
        assert "Traceback" not in output and record["reason"] in output
        return record["reason"]

    return run


def train(place: Workplace, server: ForkServer, name: str, *overrides: str) -> str:
    output = server.start(place, name, *FEW, *overrides).wait()
    assert place.status(name)["state"] == "finished", output
    return output


def root(path: Path) -> tuple[str, str]:
    return "--data.train.datasets.0.root", str(path)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def rewrite(path: Path, change: Callable) -> None:
    """A parquet file, its table changed."""
    import pyarrow.parquet as pq

    pq.write_table(change(pq.read_table(path)), path)


def set_column(table, name: str, values: list):
    import pyarrow as pa

    number, kind = table.column_names.index(name), table.schema.field(name).type
    return table.set_column(number, name, pa.array(values, type=kind))


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_truncated_video(place, server, copy, refusal):
    video = only(copy, "videos/*/*/*.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    reason = refusal(*root(copy))
    assert f"data set test/data: {video} is cut short or damaged after byte" in reason
    assert "It holds episodes 0-5: copy the file again, or leave these episodes out with `episodes`" in reason


@pytest.fixture
def damaged(copy) -> Path:
    """A data set of which frame 6 of episode 2 cannot be decoded."""
    import av

    video = only(copy, "videos/*/*/*.mp4")
    with av.open(str(video)) as container:
        packets = [(p.pts, p.pos, p.size) for p in container.demux(video=0) if p.pts is not None]
    _, begin, size = sorted(packets)[30]
    content = bytearray(video.read_bytes())
    content[begin : begin + size] = bytes(size)
    video.write_bytes(content)
    return copy


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_a_frame_that_cannot_be_decoded(place, server, damaged, tmp_path, backend):
    one = ("--data.train.datasets.0.episodes", "[2]", "--data.val.fraction", "0", "--data.train.video_backend", backend)
    output = server.start(place, tmp_path.name, *FEW, *root(damaged), *one).wait()
    reason = place.status(tmp_path.name)["reason"]
    assert "data set test/data, episode 2, frame " in reason and "cannot be read" in reason, output
    assert f"{only(damaged, 'videos/*/*/*.mp4')}. Copy them again, or leave the episode out with `episodes`" in reason
    assert "python -m agent.data.prepare --skip_bad_episodes" in reason


def test_preparing_leaves_a_bad_episode_out_and_so_does_training(place, server, damaged, tmp_path, refusal):
    config = load_config(place.folder / "tiny.yaml", [*root(damaged)], 1)[0]
    (problem,) = prepare_all(config, workers=1)
    assert "data set test/data: episodes 2 cannot be read. The first: " in problem and "at frame " in problem
    assert "--skip_bad_episodes" in problem
    assert prepare_all(config, skip_bad_episodes=True, workers=1) == []
    output = train(place, server, tmp_path.name, *root(damaged))
    assert "WARNING: episodes 2 are left out: they could not be read when the frame store" in output
    assert "training: data set test/data, 4 episodes" in output and "32x32-jpeg95" in output
    # The same store for a model that sees more.
    reason = refusal(*root(damaged), "--model_cfg.image_resolution", "[48, 48]")
    assert (
        "32x32-jpeg95 holds frames of 32 × 32, the model wants 48 × 48" in reason
        and "uv run python -m agent.data.prepare" in reason
    )


SHORT = "its stretch of {video}, 0.0000 to 1.1000 s, has room for 11 frames at 10 a second, and it has 12 rows"


def set_times(root: Path, starts: list[float], ends: list[float]) -> None:
    def change(table):
        for name, values in (("from", starts), ("to", ends)):
            table = set_column(table, f"videos/{FRONT}/{name}_timestamp", values)
        return table

    rewrite(only(root, "meta/episodes/*/*.parquet"), change)


@pytest.fixture
def short(copy) -> Path:
    """A data set of which episode 0 has one picture too few and episode 1 one more than it has rows: the sum agrees."""
    set_times(copy, [0.0, 1.1, 2.4, 3.6, 4.8, 6.0], [1.1, 2.4, 3.6, 4.8, 6.0, 7.2])
    return copy


def test_fewer_pictures_than_rows_are_said_alike_everywhere(place, server, short, tmp_path, refusal):
    told = f"{FRONT}: " + SHORT.format(video=only(short, "videos/*/*/*.mp4"))
    reason = refusal(*root(short))
    assert f"videos and rows of episodes 0 do not fit together. Episode 0: {told}. Leave these episodes out" in reason
    assert "`episodes`" in reason and "--skip_bad_episodes" in reason
    (row,) = check(server, place, tmp_path.name, *root(short)).rows("data: test/data", "fail")
    assert row["details"]["bad_episodes"] == {"0": told} and row["details"]["good_episodes"] == [1, 2, 3, 4, 5]
    config = load_config(place.folder / "tiny.yaml", [*root(short), "--data.train.frame_store", "lossless"], 1)[0]
    (problem,) = prepare_all(config, workers=1)
    assert f"episodes 0 cannot be read. The first: {told}." in problem

    assert prepare_all(config, skip_bad_episodes=True, workers=1) == []
    wanted = WantedStore("lossless", 95, (32, 32))
    stored, plain, recorded = (
        open_source(DatasetConfig("test/data", str(data), episodes=episodes), 4, "pyav", 1e-4, wanted=store)
        for data, episodes, store in ((short, None, wanted), (short, [1, 2], None), (place.folder / "data", None, None))
    )
    assert stored.episodes.tolist() == [1, 2, 3, 4, 5]
    for source in (stored, plain, recorded):
        source.cameras = {FRONT: FRONT}
    for position in range(24):  # the second episode begins with the twelfth picture of the video, at 1.1 s
        theirs = recorded.read(position + (11 if position < 12 else 12)).images[FRONT]
        assert plain.read(position).images[FRONT].equal(theirs)
        assert stored.read(position).images[FRONT].equal(resize_with_pad(theirs, 32, 32))


def test_a_store_that_was_made_without_heeding_the_stretches_is_made_anew(place, server, short, refusal, monkeypatch):
    config = load_config(place.folder / "tiny.yaml", [*root(short)], 1)[0]
    with monkeypatch.context() as before:  # the fingerprints of then
        before.setattr(Stretches, "counted", lambda self: np.ones(len(self.lengths), bool))
        assert prepare_all(config, skip_bad_episodes=True, workers=1) == []
    assert "when the ends of the episodes' stretches of video were not heeded. Make it anew" in refusal(*root(short))
    assert prepare_all(config, skip_bad_episodes=True, workers=1) == []
    stretches = Stretches.of(read_metadata("test/data", short), FRONT)
    assert not stretches.counted().any()
    assert Stretches.of(read_metadata("test/data", place.folder / "data"), FRONT).counted().all()


def test_a_video_that_lacks_a_frame_of_an_episode(place, copy, refusal):
    """The metadata say nothing of it, and the file has as many frames as all rows."""
    import av

    video = only(copy, "videos/*/*/*.mp4")
    with av.open(str(video)) as source, av.open(str(copy / "other.mp4"), "w") as target:
        inward = source.streams.video[0]
        outward = target.add_stream_from_template(inward)
        packets = [packet for packet in source.demux(inward) if packet.pts is not None]
        step = packets[1].dts - packets[0].dts
        for number, packet in enumerate(packets):
            packet.stream = outward
            # From frame 17 on everything comes a frame later, and that it ends later is not seen by the metadata.
            if number >= 17:
                packet.pts, packet.dts = packet.pts + step, packet.dts + step
            target.mux(packet)
    (copy / "other.mp4").replace(video)
    reason = refusal(*root(copy))
    assert "videos and rows of episodes 1 do not fit together" in reason
    assert (
        f"{video} holds 11 of its 12 frames from 1.2000 to 2.4000 s, not frame 5 (72 frames in all where the " in reason
    )


def test_stretches_that_overlap(copy, refusal):
    set_times(copy, [0.0, 1.1, 2.4, 3.6, 4.8, 6.0], [1.2, 2.3, 3.6, 4.8, 6.0, 7.2])
    reason = refusal(*root(copy))
    assert "videos and rows of episodes 0 do not fit together" in reason
    assert "its 12 rows take" in reason and "0.0000 to 1.2000 s, and episode 1 begins there at 1.1000 s" in reason


def test_time_stamps_of_another_clock(place, server, copy, tmp_path, refusal):
    rewrite(
        only(copy, "data/*/*.parquet"),
        lambda table: set_column(table, "timestamp", [1.7e9 + value for value in table["timestamp"].to_pylist()]),
    )
    said = "frame 0 has the time stamp 1700000000 s, and its stretch of"
    reason = refusal(*root(copy))
    assert "episodes 0-5 do not fit together" in reason and said in reason
    assert "`timestamp` counts seconds from the episode's first frame, write frame_index / fps there" in reason
    checked = check(server, place, tmp_path.name, *root(copy))
    assert "Traceback" not in checked.output, checked.output
    first, second = checked.rows("data: test/data", "fail")
    assert said in first["text"] and "6 of 6 episodes cannot be used" in first["text"]
    assert "none of the 6 episodes can be used" in second["text"] and second["details"] == {}
    # A store goes by the numbers of the frames.
    config = load_config(place.folder / "tiny.yaml", [*root(copy)], 1)[0]
    assert prepare_all(config, workers=1) == []


def test_a_check_whose_frames_are_all_unreadable(place, server, copy, tmp_path):
    rewrite(
        only(copy, "data/*/*.parquet"),
        lambda table: set_column(table, "timestamp", [0.04 + value for value in table["timestamp"].to_pylist()]),
    )
    checked = check(server, place, tmp_path.name, *root(copy))
    assert "Traceback" not in checked.output, checked.output
    bad, none = checked.rows("data: test/data", "fail")
    assert "6 of 6 episodes cannot be used" in bad["text"] and "raise data.train.tolerance_s above 0.04" in bad["text"]
    assert "none of the 6 episodes can be used" in none["text"]


# ── data files ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_fewer_rows_than_the_metadata_counts(copy, refusal):
    path = only(copy, "data/*/*.parquet")
    rewrite(path, lambda table: table.slice(0, 70))
    assert f"{path} has 70 rows where the metadata counts 72. It holds episodes 0-5: copy" in refusal(*root(copy))


def test_rows_of_another_episode(copy, refusal):
    path = only(copy, "data/*/*.parquet")
    rewrite(path, lambda table: set_column(table, "frame_index", [*table["frame_index"].to_pylist()[:-1], 3]))
    reason = refusal(*root(copy))
    assert "hold 71 of the 72 frames" in reason and "frame 11 of episode 5 in" in reason and str(path) in reason


def test_frames_that_are_counted_on(copy, refusal):
    path = only(copy, "data/*/*.parquet")
    rewrite(path, lambda table: set_column(table, "frame_index", table["index"].to_pylist()))
    reason = refusal(*root(copy))
    assert f"frame_index of episode 1 in {path} runs from 12 to 23, and LeRobot counts the 12 frames of each" in reason
    assert "what it is less the first of its episode" in reason


def test_a_value_that_is_not_finite(copy, refusal):
    def spoil(table):
        actions = table["action"].to_pylist()
        actions[13][5] = float("nan")
        return set_column(table, "action", actions)

    rewrite(only(copy, "data/*/*.parquet"), spoil)
    reason = refusal(*root(copy))
    assert "data set test/data: action is nan in dimension 5 at episode 1, frame 1: repair" in reason
    assert "leave this episode out with `episodes`" in reason


def test_a_column_that_is_missing(copy, refusal):
    path = only(copy, "data/*/*.parquet")
    rewrite(path, lambda table: table.drop_columns(["task_index"]))
    reason = refusal(*root(copy))
    assert f"{path} has no column task_index; copy the file again" in reason, reason


def test_rows_without_an_action(copy, refusal):
    path = only(copy, "data/*/*.parquet")
    rewrite(path, lambda table: set_column(table, "action", [*table["action"].to_pylist()[:-1], None]))
    assert "data set test/data: action is nan in dimension 0 at episode 5, frame 11: repair" in refusal(*root(copy))


def test_rows_with_more_or_fewer_dimensions(copy, refusal):
    """One number too few in one row, one too many in the next: all together there are as many as there should be."""
    import pyarrow as pa

    def spoil(table):
        actions = table["action"].to_pylist()
        actions[13], actions[14] = actions[13][:6], [*actions[14], 0.5]
        column = pa.array(actions, type=pa.list_(pa.float32()))
        return table.set_column(table.column_names.index("action"), "action", column)

    rewrite(only(copy, "data/*/*.parquet"), spoil)
    reason = refusal(*root(copy))
    assert "data set test/data: action is nan in dimension 0 at episode 1, frame 1: repair" in reason


def test_a_column_of_other_dimensions_than_the_metadata_say(copy, refusal):
    import pyarrow as pa

    def widen(table):
        wide = pa.array([[*row, 0.5] for row in table["action"].to_pylist()], type=pa.list_(pa.float32()))
        return table.set_column(table.column_names.index("action"), "action", wide)

    path = only(copy, "data/*/*.parquet")
    rewrite(path, widen)
    assert f"{path}: action has 8 dimensions, meta/info.json says 7; copy the data set again" in refusal(*root(copy))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("action", {"x": 0.5}, "struct<x: double>"),
        ("observation.state", ["left"] * 7, "string"),
        ("timestamp", datetime(2026, 1, 1), "timestamp[us]"),
        ("task_index", None, "null"),
        ("frame_index", "one", "string"),
        ("episode_index", [0, 1], "list<element: int64>"),
    ],
    ids=["named", "words", "dates", "nothing", "places", "lists"],
)
def test_a_column_of_something_else_than_numbers(copy, refusal, place, server, tmp_path, column, value, told):
    import pyarrow as pa

    path = only(copy, "data/*/*.parquet")
    rewrite(
        path, lambda table: table.set_column(table.column_names.index(column), column, pa.array([value] * len(table)))
    )
    whole = "whole " if column in ("frame_index", "episode_index") else ""
    said = f"{path}: {column} holds {told} instead of {whole}numbers"
    assert f"{said}; convert the data set again" in refusal(*root(copy))
    (row,) = check(server, place, tmp_path.name, *root(copy)).rows("data: test/data", "fail")
    assert said in row["text"]


@pytest.mark.parametrize("value", [None, 7])
def test_an_instruction_that_is_missing(copy, refusal, value):
    def spoil(table):
        indices = table["task_index"].to_pylist()
        return set_column(table, "task_index", [*indices[:24], value, *indices[25:]])

    rewrite(only(copy, "data/*/*.parquet"), spoil)
    reason = refusal(*root(copy))
    which = "no task_index" if value is None else "task 7 in meta/tasks.parquet"
    assert f"data set test/data: the instruction of episode 2, frame 0 is missing ({which}). Give it words" in reason


def test_an_instruction_that_is_empty(copy, refusal):
    import pandas as pd

    path = copy / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = [tasks.index[0], " "]
    tasks.to_parquet(path)
    reason = refusal(*root(copy))
    assert "data set test/data: the instruction of episode 1, frame 0 is empty (task 1 in meta/tasks.parquet)" in reason
    assert "Give it words there, or leave the episode out with `episodes`" in reason


def test_episodes_shorter_than_a_chunk_are_trained_on(place, server, tmp_path):
    folder = write_dataset(tmp_path / "short", episodes=5, length=[1, 2, 3, 1, 9], video=False)
    output = train(place, server, "short", *root(folder), "--data.val.fraction", "0")
    assert "5 episodes" in output and "16 frames" in output
    assert np.isfinite([line["loss"] for line in place.metrics("short")]).all()


# ── data sets that do not go together ───────────────────────────────────────────────────────────────────────────


def edit_info(folder: Path, change: Callable) -> None:
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def both(one: Path, other: Path) -> tuple[str, str]:
    entries = [{"repo_id": "test/one", "root": str(one)}, {"repo_id": "test/other", "root": str(other)}]
    return "--data.train.datasets", json.dumps(entries)


def test_two_frame_rates(place, server, tmp_path, refusal):
    other = write_dataset(tmp_path / "other", episodes=2, fps=5)
    sets = both(place.folder / "data", other)
    reason = refusal(*sets)
    assert (
        "data set test/one has 10 frames a second, data set test/other has 5: a chunk of 4 actions lasts 0.4 s"
        in reason
    )
    assert "0.8 s in the other" in reason and "data.train.normalization: per_dataset" in reason
    output = train(place, server, "rates", *sets, "--data.train.normalization", "per_dataset")
    assert "WARNING: the robots' frames a second differ (test/one 10, test/other 5)" in output


def test_two_meanings_of_the_actions(place, copy, tmp_path, refusal):
    names = [f"joint_{number}" for number in range(7)]
    one = tmp_path / "one"
    shutil.copytree(copy, one)
    edit_info(one, lambda info: info["features"]["action"].update(names=names))
    edit_info(copy, lambda info: info["features"]["action"].update(names={"motors": [names[1], names[0], *names[2:]]}))
    reason = refusal(*both(one, copy))
    assert "the actions of data set test/one and data set test/other are not of the same things: dimension 0" in reason
    assert "'joint_0' in one and 'joint_1' in the other (the same names in another order)" in reason
    assert "`action:`" in reason and "data.train.normalization: per_dataset" in reason
