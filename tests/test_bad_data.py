"""Bad data through the commands themselves: what is said, where it is, what to do. Run: uv run pytest tests/test_bad_data.py

Processes are forked from a server that has imported everything; each test damages a copy of the data set of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forked import ForkServer, fork_server
from launching import Workplace
from make_dataset import write_dataset

from agent.configuration_pipeline import load_config
from agent.data.prepare import prepare_all

FEW = ("--n_updates", "4", "--eval_start", "false")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """Six episodes of 12 frames in one video."""
    return Workplace.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def server():
    with fork_server() as server:
        yield server


@pytest.fixture
def copy(place, tmp_path) -> Path:
    shutil.copytree(place.folder / "data", tmp_path / "data", ignore=shutil.ignore_patterns("frames", "agent_cache"))
    return tmp_path / "data"


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
    assert "holds the frame store 32x32-jpeg95, not 48x48" in reason and "uv run python -m agent.data.prepare" in reason


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
