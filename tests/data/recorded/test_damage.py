"""Data sets that are missing, damaged or of another format are refused, with what to do.

Run: uv run pytest tests/data/recorded/test_damage.py
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from support.samples import FRONT, opened

from agent.data.configuration import DatasetConfig
from agent.data.source import open_source


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist( in .*)?. Correct `root`"):
        opened(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is empty. `root` is the folder that holds"):
        opened(tmp_path / "empty")
    (tmp_path / "other" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="other has no meta/info.json"):
        opened(tmp_path / "other")


def set_info(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_feature(path, value):
    set_info(path, features={**json.loads(path.read_text())["features"], "action": value})


END = f"videos/{FRONT}/to_timestamp"


def set_episodes(path, name, values):
    """A column of the table of episodes; None takes it out."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    number = table.column_names.index(name)
    pq.write_table(table.set_column(number, name, [values]) if values else table.drop_columns([name]), path)


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("data/*/*.parquet", cut_short, r"file-000.parquet is empty, cut short or damaged .* episodes 0-3"),
        ("data/*/*.parquet", Path.unlink, r"file-000.parquet is missing. It holds episodes 0-3"),
        ("data/*/*.parquet", lambda path: path.write_bytes(b""), r"file-000.parquet is empty"),
        ("videos/*/*/*.mp4", cut_short, r"file-000.mp4 is cut short or damaged after byte .* episodes 0-3"),
        ("videos/*/*/*.mp4", Path.unlink, r"file-000.mp4 is missing. It holds episodes 0-3"),
        ("videos/*/*/*.mp4", lambda path: path.write_bytes(b""), r"file-000.mp4 is empty or no complete mp4"),
        ("meta/episodes/*/*.parquet", cut_short, r"episodes.*file-000.parquet is damaged"),
        (
            "meta/episodes/*/*.parquet",
            lambda path: set_episodes(path, "length", None),
            r"meta/episodes lacks length, for all",
        ),
        ("meta/episodes/*/*.parquet", lambda path: set_episodes(path, END, [1, 2, 3, None]), rf"lacks {END}, for all"),
        (
            "meta/episodes/*/*.parquet",
            lambda path: set_episodes(path, "episode_index", [0, 2, 3, 5]),
            r"row 1 of meta/episodes is episode 2, and LeRobot .*: number the episodes from 0 to 3",
        ),
        (
            "meta/info.json",
            lambda path: set_info(path, total_episodes=5),
            r"counts 5 episodes, .* holds 4 \(0-3\); copy",
        ),
        ("meta/info.json", cut_short, r"info.json is not valid JSON"),
        ("meta/info.json", lambda path: path.write_text("[]"), r"info.json holds a list"),
        ("meta/info.json", lambda path: set_info(path, fps=0), r"info.json has fps 0"),
        ("meta/info.json", lambda path: set_info(path, fps="ten", features=None), r"has fps 'ten', features None"),
        ("meta/info.json", lambda path: set_feature(path, None), r"describes action as null, which needs a dtype and"),
        (
            "meta/info.json",
            lambda path: set_feature(path, {"dtype": "float32"}),
            r"action as .*, which needs a dtype and",
        ),
        ("meta/info.json", lambda path: set_info(path, video_path=None), r"front is a video and has no video_path"),
        (
            "meta/info.json",
            lambda path: set_info(path, fps=float("nan")),
            r"info.json has fps nan; copy the file again",
        ),
        ("meta/info.json", lambda path: set_info(path, robot_type=["so100"]), r"has robot_type \['so100'\]"),
        (
            "meta/info.json",
            lambda path: set_info(path, data_path="data/chunk-{episode_chunk:03d}/{episode_index}.parquet"),
            r"info.json has data_path 'data/chunk-\{episode_chunk:03d\}.*cannot be filled in with chunk_index, file_index",
        ),
        (
            "meta/info.json",
            lambda path: set_info(path, video_path="videos/{camera}.mp4"),
            r"has video_path 'videos/\{camera\}.mp4', which cannot be filled in with .*video_key \(KeyError: 'camera'\)",
        ),
        (
            "meta/info.json",
            lambda path: set_feature(path, {"dtype": "float32", "shape": [7], "info": "arm"}),
            r"has features.action.info 'arm', which must be an object or null",
        ),
        (
            "meta/episodes/*/*.parquet",
            lambda path: set_episodes(path, "length", [12, 12, 11.5, 12]),
            r"test/data: length in row 2 of meta/episodes is 11.5, which must be a whole number",
        ),
        ("meta/tasks.parquet", Path.unlink, r"lacks its episodes/ or tasks.parquet"),
    ],
)
def test_damaged_files(video, tmp_path, pattern, damage, message):
    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob(pattern)
    damage(path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "copy")


@pytest.mark.parametrize("value", ["all", "0-2", [0, 1], None, "-1:3", "3:1"])
def test_a_split_that_is_no_pair_of_numbers(video, tmp_path, value):
    shutil.copytree(video, tmp_path / "copy")
    info = tmp_path / "copy" / "meta" / "info.json"
    set_info(info, splits={"train": value})
    assert len(opened(tmp_path / "copy").episodes) == 4  # it is not asked for
    said = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(
        ValueError, match=rf"data set test/data: {info} says that split 'train' is the episodes "
    ) as error:
        opened(tmp_path / "copy", split="train[:50%]")
    assert f" {said}, of which there are 4" in str(error.value)
    set_info(info, splits=["train"])
    with pytest.raises(ValueError, match=rf"data set test/data: {info} has splits \['train'\]"):
        opened(tmp_path / "copy", split="train")


def test_the_table_of_episodes_counts_by_their_numbers(video, tmp_path):
    """A merge leaves its rows in any order, and pandas makes floats of their numbers where one was missing."""
    import pandas as pd

    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("meta/episodes/*/*.parquet")
    table = pd.read_parquet(path).iloc[[2, 0, 3, 1]]
    table = table.astype({"data/file_index": float, "length": "uint32"})
    table.to_parquet(path)
    expected, found = opened(video), opened(tmp_path / "copy")
    for position in (0, 13, 26, 47):
        one, other = expected.read(position), found.read(position)
        assert (one.episode, one.frame, one.task) == (other.episode, other.frame, other.task)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.images[FRONT].equal(other.images[FRONT])


def test_a_file_of_the_table_of_episodes_that_lacks_a_column(video, tmp_path):
    """The others' values would be those of other episodes."""
    import pyarrow.parquet as pq

    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2).drop_columns([END]), path)
    pq.write_table(table.slice(2), path.with_name("file-001.parquet"))
    with pytest.raises(ValueError, match=rf"meta/episodes lacks {END}, for all episodes or for some"):
        opened(tmp_path / "copy")


def test_a_video_that_may_not_be_read(video, monkeypatch):
    import errno

    from agent.data.recorded import files

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "_missing_bytes", refuse)
    with pytest.raises(ValueError, match=r"file-000.mp4 cannot be read \(Permission denied\). It holds episodes 0-3"):
        opened(video)


def test_fewer_rows_than_the_metadata_counts(video, tmp_path):
    import pyarrow.parquet as pq

    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("data/*/*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 40), path)
    with pytest.raises(ValueError, match="has 40 rows where the metadata counts 48"):
        opened(tmp_path / "copy")


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([64, 80, 3], ["height", "width", "channels"]),
        ([3, 64, 80], ["channels", "height", "width"]),
        ([3, 64, 80], None),
        ([3, 64, 80], ["rgb", "height", "width"]),
        ([64, 80, 3], ["channels", "height", "width"]),
        ([64, 80, 3], {"axes": ["height", "width", "channels"]}),
        ([64, 80], None),
    ],
)
def test_sizes_of_pictures_whatever_the_names_of_their_axes(video, tmp_path, shape, names):
    shutil.copytree(video, tmp_path / "copy")
    path = tmp_path / "copy" / "meta" / "info.json"
    features = json.loads(path.read_text())["features"]
    set_info(path, features={**features, FRONT: {**features[FRONT], "shape": shape, "names": names}})
    source = opened(tmp_path / "copy")
    assert source.recorded_sizes() == {FRONT: (64, 80)}


def test_older_formats(video, tmp_path):
    shutil.copytree(video, tmp_path / "copy")
    info = tmp_path / "copy" / "meta" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match=r"format v2.1.*python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo"):
        opened(tmp_path / "copy")


def test_an_older_format_at_the_hub(video, monkeypatch, tmp_path):
    """What lies in the cache is a link, and its metadata alone: nothing to be converted in place."""
    from lerobot.utils import constants

    from agent.data.recorded.metadata import read_metadata

    monkeypatch.setattr(constants, "HF_LEROBOT_HUB_CACHE", tmp_path)
    root = tmp_path / "datasets--lab--old" / "snapshots" / "abc123"
    shutil.copytree(video / "meta", root / "meta")
    set_info(root / "meta" / "info.json", codebase_version="v2.1")
    with pytest.raises(
        ValueError, match=r"format v2.1 at the hub.*`hf download .*lab/old --revision abc123 --local-dir DIR`"
    ):
        read_metadata("lab/old", root)


def test_a_data_set_at_the_hub_without_the_tag_of_its_format():
    import httpx
    from huggingface_hub.errors import RevisionNotFoundError

    from agent import hub

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    error = hub._answered(
        hub.Repository("lab/old", "dataset", "v3.0"), "data set lab/old", RevisionNotFoundError("no", response=response)
    )
    assert "it has no revision 'v3.0'" in str(error) and "in the data set's entry, such as `revision: main`" in str(
        error
    )


def test_not_on_this_machine_and_no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants
    from lerobot.utils import constants

    monkeypatch.setattr(constants, "HF_LEROBOT_HOME", tmp_path)
    monkeypatch.setattr(constants, "HF_LEROBOT_HUB_CACHE", tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"(?s)data set nobody/nothing: cannot get .*hf download.*`root: DIR`"):
        open_source(DatasetConfig("nobody/nothing"), 4, None, 1e-4)
    assert time.monotonic() - begin < 15
