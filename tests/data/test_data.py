"""Data sets, transforms and the loader, on small real files. Run: pytest tests/data/test_data.py"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from support.datasets import DEFAULT_TASKS, frame_image, write_dataset, write_tokenizer
from support.launching import with_support
from support.samples import (
    FRONT,
    SPEC,
    WRIST,
    broken_draw,
    built,
    by_number,
    dataset_config,
    lives,
    micro_batches,
    opened,
    worker_processes,
)

from agent.data import source as source_module
from agent.data.loading.loader import TrainLoader, ValDataConfig, validation_batches
from agent.data.recorded.episodes import hold_out
from agent.data.samples.task_tokens import cached_task_tokens, load_tokenizer, make_task_tokens
from agent.data.samples.transforms import SampleSpec, load_paraphrases, pad_vector, paraphrase, resize_with_pad
from agent.data.source import DatasetConfig, choose_video_backend, open_source


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keeps the Arrow copies of these data sets out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def video(folder):
    """Four episodes of 12 frames, one camera as video."""
    return write_dataset(folder / "video")


@pytest.fixture(scope="module")
def pictures(folder):
    """Three episodes of different lengths, two cameras as PNG."""
    sizes = {FRONT: (32, 48), WRIST: (48, 48)}
    return write_dataset(folder / "pictures", episodes=3, length=[3, 9, 6], cameras=sizes, video=False, seed=1)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return str(write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def data(video, pictures, tokenizer, cache):
    """Both data sets mixed; the second one's wrist camera is left out."""
    configs = [dataset_config(video, weight=1.0), dataset_config(pictures, weight=3.0, cameras={FRONT: FRONT})]
    return built(*configs, tokenizer=tokenizer)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["pyav", None])
def test_read_gives_what_was_recorded(video, backend):
    source = open_source(dataset_config(video, episodes=[1, 3]), 4, backend, 1e-4)
    source.cameras = {FRONT: FRONT}
    assert len(source) == 24
    assert source.frame(0) == (1, 0)
    assert source.frame(23) == (3, 11)
    states, actions = source.columns("observation.state"), source.columns("action")
    for position in (0, 10, 12, 23):
        sample = source.read(position)
        episode, frame = source.frame(position)
        assert (sample.episode, sample.frame, sample.task) == (episode, frame, DEFAULT_TASKS[episode % 2])
        recorded = frame_image(episode, frame, 0, (64, 80)).transpose(2, 0, 1).astype(int)
        assert np.abs(sample.images[FRONT].numpy() - recorded).mean() < 6  # H.264 loses some; a frame is 4 apart in red
        assert abs(sample.images[FRONT].numpy()[0].mean() - recorded[0].mean()) < 2
        np.testing.assert_array_equal(sample.state, states[position])
        real = min(4, 12 - frame)
        np.testing.assert_array_equal(sample.actions[:real], actions[position : position + real])
        assert sample.action_is_pad.tolist() == [False] * real + [True] * (4 - real)
        assert sample.previous_action is None


def test_png_images_are_exact_and_previous_actions_are_read(pictures):
    source = opened(pictures)
    source = source.view(np.array([1, 2]), with_previous_action=True)
    source.cameras = {"slot": WRIST}
    actions = source.columns("action")
    for position in (0, 1, 9, 14):
        sample = source.read(position)
        recorded = frame_image(sample.episode, sample.frame, 1, (48, 48), seed=1)
        np.testing.assert_array_equal(sample.images["slot"].numpy(), recorded.transpose(2, 0, 1))
        assert set(sample.images) == {"slot"}
        assert sample.previous_is_pad == (sample.frame == 0)
        np.testing.assert_array_equal(sample.actions[0], actions[position])
        np.testing.assert_array_equal(sample.previous_action, actions[position - (sample.frame > 0)])


def test_choice_of_episodes(video):
    def chosen(**settings):
        return opened(video, **settings).episodes.tolist()

    assert chosen() == [0, 1, 2, 3]
    assert chosen(episodes=[3, 1]) == [1, 3]
    assert chosen(split="train") == [0, 1, 2, 3]
    assert chosen(split="train[:50%]") == [0, 1]
    assert chosen(split="train[50%:]") == [2, 3]
    assert chosen(split="train[1:3]") == [1, 2]
    assert chosen(split="train[-1:]") == [3]
    for split in ("train[:95", "test", "train[1-3]", "train[5]"):
        with pytest.raises(ValueError, match=r"split .* is not understood; write one of train"):
            chosen(split=split)
    with pytest.raises(ValueError, match="selects none of the 4 episodes"):
        chosen(split="train[:1%]")
    with pytest.raises(ValueError, match="asks for 4, 9, the data set has the episodes 0 to 3"):
        chosen(episodes=[9, 1, 4])
    with pytest.raises(ValueError, match="names 1 twice"):
        chosen(episodes=[1, 1])
    with pytest.raises(ValueError, match="not both"):
        chosen(episodes=[1], split="train")


def test_a_split_that_reaches_beyond_the_episodes(video, tmp_path):
    shutil.copytree(video, tmp_path / "copy")
    info = tmp_path / "copy" / "meta" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "splits": {"train": "0:9"}}))
    with pytest.raises(
        ValueError, match=r"'train' is the episodes 0:9, of which there are 4: correct it there to FIRST:END"
    ):
        opened(tmp_path / "copy", split="train[:50%]")


def test_hold_out():
    for count in (2, 3, 10, 20, 101):
        for fraction in (0.01, 0.05, 0.5, 0.99):
            train, held = hold_out(np.arange(count) + 5, fraction)
            assert len(train) and len(held)
            assert sorted([*train, *held]) == list(range(5, count + 5))
    train, held = hold_out(np.arange(100), 0.05)
    assert held.tolist() == [10, 30, 50, 70, 90]
    assert len(hold_out(np.arange(3), 0)[1]) == 0
    with pytest.raises(ValueError, match="set data.val.fraction to 0"):
        hold_out(np.arange(1), 0.1)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        hold_out(np.arange(9), 1.0)


def test_a_failing_frame_is_named(video, monkeypatch):
    source = opened(video)
    monkeypatch.setattr(source_module, "decode_frame", lambda *where: 1 / 0)
    with pytest.raises(RuntimeError, match=r"data set test/data, episode 2, frame 1 .*by zero.*file-000.mp4"):
        source.read(25)


def test_video_backend(monkeypatch):
    assert choose_video_backend("pyav") == "pyav"
    with pytest.raises(ValueError, match="write torchcodec, pyav"):
        choose_video_backend("cv2")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # installed, but does not import
    source_module.choose_video_backend.cache_clear()
    assert choose_video_backend(None) == "pyav"
    with pytest.raises(ValueError, match="does not load here"):
        choose_video_backend("torchcodec")
    source_module.choose_video_backend.cache_clear()


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_non_finite_actions(video, tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("data/*/*.parquet")
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[13][5] = float("nan")
    column = pa.array(actions, type=table.schema.field("action").type)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(ValueError, match="action is nan in dimension 5 at episode 1, frame 1"):
        built(dataset_config(tmp_path / "copy"), tokenizer=tokenizer)


def test_empty_instruction(video, tmp_path, tokenizer):
    import pandas as pd

    shutil.copytree(video, tmp_path / "copy")
    path = tmp_path / "copy" / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = [DEFAULT_TASKS[0], " "]
    tasks.to_parquet(path)
    with pytest.raises(ValueError, match=r"instruction of episode 1, frame 0 is empty"):
        built(dataset_config(tmp_path / "copy"), tokenizer=tokenizer, val=ValDataConfig(fraction=0))


def numbered(root, numbers, tasks=DEFAULT_TASKS, wanted=(0, 1)):
    """Writes the table of tasks with these numbers, row by row; the data files have ``wanted`` for the two instructions."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pd.DataFrame({"task_index": numbers}, index=pd.Index(list(tasks), name="task"))
    frame.to_parquet(root / "meta" / "tasks.parquet")
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        number = np.asarray(wanted)[table["episode_index"].to_numpy() % 2]
        at = table.column_names.index("task_index")
        pq.write_table(table.set_column(at, "task_index", pa.array(number)), path)


@pytest.mark.parametrize(
    ("numbers", "tasks", "wanted"),
    [
        ([1, 0], DEFAULT_TASKS[::-1], (0, 1)),  # rows in another order
        ([1, 2], DEFAULT_TASKS, (1, 2)),  # from 1
        ([9, 4, 7], [DEFAULT_TASKS[1], "what no frame has", DEFAULT_TASKS[0]], (7, 9)),  # a subset of a larger one
        ([0.0, 1.0], DEFAULT_TASKS, (0, 1)),
    ],
)
def test_an_instruction_is_that_of_its_number_and_not_of_its_row(video, tmp_path, tokenizer, numbers, tasks, wanted):
    from agent.preflight.survey import Survey, _look_at_numbers

    root = tmp_path / "copy"
    shutil.copytree(video, root)
    numbered(root, numbers, tasks, wanted)
    source = opened(root)
    assert [source.read(position).task for position in (0, 12, 24, 36)] == [*DEFAULT_TASKS, *DEFAULT_TASKS]
    one, other = (
        built(dataset_config(path), tokenizer=tokenizer, val=ValDataConfig(fraction=0)) for path in (root, video)
    )
    assert one.fingerprint == other.fingerprint
    np.testing.assert_array_equal(one.reader.sample(0, 0, 12).tokens, other.reader.sample(0, 0, 12).tokens)
    found = Survey("data", dataset_config(root), chosen=source.chosen)
    _look_at_numbers(found, source.metadata, None)
    assert found.bad == {}


@pytest.mark.parametrize(
    ("numbers", "wanted", "message"),
    [
        ([1, 2], (0, 1), r"episode 0, frame 0 is missing \(task 0 in meta/tasks.parquet\)"),
        (
            [3, 3],
            (3, 3),
            r"test/data: task_index 3 of .*tasks.parquet is both 'push the red button' and 'open the drawer'",
        ),
        (
            [0.5, 1.0],
            (0, 1),
            r"test/data: the column task_index of .*tasks.parquet must hold a whole number in each row",
        ),
        (["0", None], (0, 1), r"needs one column of instructions|must hold a whole number in each row"),
    ],
)
def test_numbers_of_instructions_that_tell_nothing(video, tmp_path, tokenizer, numbers, wanted, message):
    root = tmp_path / "copy"
    shutil.copytree(video, root)
    numbered(root, numbers, wanted=wanted)
    with pytest.raises(ValueError, match=message):
        built(dataset_config(root), tokenizer=tokenizer, val=ValDataConfig(fraction=0))


def test_the_fingerprint_knows_which_frame_has_which_instruction(video, tmp_path, tokenizer):
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fingerprint(root):
        return built(dataset_config(root), tokenizer=tokenizer, val=ValDataConfig(fraction=0)).fingerprint

    root = tmp_path / "copy"
    shutil.copytree(video, root)
    path = root / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = list(tasks.index[::-1])
    tasks.to_parquet(path)
    assert len(tasks) == 2 and fingerprint(root) != fingerprint(video)
    (rows,) = root.glob("data/*/*.parquet")
    table = pq.read_table(rows)
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array(1 - table["task_index"].to_numpy())), rows)
    assert fingerprint(root) == fingerprint(video)  # other numbers for the same words


def test_mismatches_with_the_model(video, pictures, tokenizer):
    other = SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, "observation.images.top"), state_dim=8, action_dim=7)
    with pytest.raises(ValueError) as error:
        built(dataset_config(pictures), tokenizer=tokenizer, spec=other)
    text = str(error.value)
    assert "the model expects" in text and "the data set has" in text
    assert "  observation.images.top | -\n" in text
    assert "| observation.images.wrist\n" in text
    assert "state: 8" in text and "observation.state: 7" in text
    assert "cameras: {<camera of the model>: <key in the data set>}" in text

    def mapped(cameras, spec=SPEC, **settings):
        return built(dataset_config(video, cameras=cameras, **settings), tokenizer=tokenizer, spec=spec)

    with pytest.raises(ValueError, match="`cameras` says observation.image, the cameras are observation.images.front"):
        mapped({FRONT: "observation.image"})
    with pytest.raises(ValueError, match="maps other, which the model does not have"):
        mapped({FRONT: FRONT, "other": None})
    with pytest.raises(ValueError, match=r"not in `cameras`"):
        mapped({FRONT: FRONT}, spec=SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, WRIST), 7, 7))
    with pytest.raises(ValueError, match="every camera to null"):
        mapped({FRONT: None})
    with pytest.raises(ValueError, match="no observation.joints, it has observation.state, action"):
        mapped(None, state="observation.joints")
    with pytest.raises(ValueError, match="at most max_action_dim = 6"):
        mapped(None, spec=SampleSpec(4, 16, 6, (48, 48), 16, (FRONT,), 7, 7))
    with pytest.raises(ValueError, match="normalization_mapping.VISUAL must be IDENTITY"):
        built(dataset_config(video), tokenizer=tokenizer, normalization_mapping={"VISUAL": "MEAN_STD"})
    with pytest.raises(ValueError, match="data.train.datasets is empty"):
        built(tokenizer=tokenizer)


# ── transforms ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(64, 80), (80, 64), (48, 48), (31, 97), (10, 10)])
def test_resize_equals_lerobots(size):
    import torch
    from lerobot.policies.common.vla_utils import resize_with_pad_torch

    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    resized = resize_with_pad(image, 48, 48)
    assert resized.dtype == torch.uint8 and resized.shape == (3, 48, 48)
    theirs = resize_with_pad_torch(image[None].float() / 255, 48, 48)[0] * 255
    assert (resized.float() - theirs).abs().max() <= 0.501


def test_pad_vector():
    assert pad_vector(np.ones((2, 3)), 5).tolist() == [[1, 1, 1, 0, 0]] * 2
    with pytest.raises(ValueError, match="3 dimensions do not fit into 2"):
        pad_vector(np.ones(3), 2)


def test_tokens_equal_lerobots(tokenizer):
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.processor import TokenizerProcessorStep
    from lerobot.processor.converters import create_transition

    tasks = [DEFAULT_TASKS[0], "open the drawer\n", "open " * 30]
    tokens = make_task_tokens(tokenizer, 16, tasks)
    step = TokenizerProcessorStep(tokenizer_name=tokenizer, max_length=16)
    for task in tasks:
        transition = create_transition(observation={}, complementary_data={"task": task})
        theirs = step(Pi0NewLineProcessor()(transition))["observation"]
        mask = theirs["observation.language.attention_mask"][0].numpy()
        assert tokens(task).tolist() == theirs["observation.language.tokens"][0].numpy()[mask].tolist()
    assert tokens.too_long == {tasks[2]: 32}  # bos, 30 words, newline
    assert "32 tokens and is cut at 16" in tokens.warnings()[0]
    with pytest.raises(ValueError, match="an instruction is empty"):
        make_task_tokens(tokenizer, 16, ["\n"])


def test_tokens_are_kept_until_the_tokenizer_or_the_instructions_change(tokenizer, tmp_path):
    """Each time against fresh ones, which differ: a stale file would be seen."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    tasks = ["open the drawer", "open " * 30]

    def check(length: int, texts: list[str], files: int) -> None:
        for _ in range(2):
            kept = cached_task_tokens(str(folder), length, texts, tmp_path)
            fresh = make_task_tokens(str(folder), length, texts)
            assert [kept(t).tolist() for t in texts] == [fresh(t).tolist() for t in texts]
            assert (kept.too_long, kept.pad_token_id) == (fresh.too_long, fresh.pad_token_id)
            assert kept.warnings() == fresh.warnings()
        assert len(list((tmp_path / "agent_cache").glob("tokens-*.json"))) == files

    check(16, tasks, 1)
    check(8, tasks, 2)
    check(16, tasks[:1], 3)
    file = folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    words = vocabulary["model"]["vocab"]
    words["open"], words["drawer"] = words["drawer"], words["open"]
    file.write_text(json.dumps(vocabulary))
    check(16, tasks, 4)


def test_a_start_that_knows_the_tokens_needs_no_transformers(tokenizer, tmp_path):
    code = (
        "import sys; from agent.data.samples.task_tokens import cached_task_tokens as f; from pathlib import Path; "
        f"f({tokenizer!r}, 16, ['open the drawer'], Path({str(tmp_path)!r})); print('transformers' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["True", "False"]


def test_missing_tokenizer(tmp_path, monkeypatch):
    import huggingface_hub.constants

    with pytest.raises(ValueError, match=r"model_cfg.tokenizer_path\).*no such folder.*gated.*hf auth login"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="the folder holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="not in the local cache and the hub cannot be reached"):
        load_tokenizer("nobody/nothing")
    assert time.monotonic() - begin < 15


def test_paraphrases(tmp_path):
    path = tmp_path / "paraphrases.json"
    path.write_text(json.dumps({"a": ["b", "c"]}))
    paraphrases, missing = load_paraphrases(str(path), ["a", "x"])
    assert missing == ["x"]
    texts = [paraphrase("a", paraphrases, 0, k) for k in range(2000)]
    assert texts == [paraphrase("a", paraphrases, 0, k) for k in range(2000)]
    assert 900 < texts.count("a") < 1100 and 400 < texts.count("b") < 600
    assert paraphrase("x", paraphrases, 0, 1) == "x"
    with pytest.raises(ValueError, match="an entry for none of the tasks, such as 'y'"):
        load_paraphrases(str(path), ["y"])
    for content in ("{", "[]", '{"a": []}', '{"a": "b"}', '{"a": [""]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="task_paraphrase is a JSON file of the form"):
            load_paraphrases(str(path), ["a"])
    with pytest.raises(ValueError, match="cannot be read"):
        load_paraphrases(str(tmp_path / "nowhere.json"), ["a"])


# ── building and loading ────────────────────────────────────────────────────────────────────────────────────────


def test_build_reports_and_infers(video, pictures, tokenizer, data):
    assert data.mixture.shares == [0.25, 0.75]
    assert len(data.reader.sources[0].episodes) == 3 and len(data.validation.sources[0].episodes) == 1
    assert any("leaves out observation.images.wrist" in line for line in data.report)
    inferred = built(
        dataset_config(pictures),
        tokenizer=tokenizer,
        spec=SampleSpec(4, 16, 10, (48, 48), 16),
        val=ValDataConfig([], 0),
    )
    assert inferred.spec.camera_slots == (FRONT, WRIST)
    assert (inferred.spec.state_dim, inferred.spec.action_dim, inferred.validation) == (7, 7, None)
    both = built(dataset_config(video), tokenizer=tokenizer, val=ValDataConfig([dataset_config(video, episodes=[1])]))
    assert any("WARNING" in line and "episodes 1 are trained on" in line for line in both.report)


def test_statistics_are_those_of_the_training_frames(video, tokenizer):
    data = built(dataset_config(video), tokenizer=tokenizer)
    train, held = hold_out(np.arange(4), 0.05)
    actions = opened(video).columns("action").reshape(4, 12, 7)
    np.testing.assert_allclose(data.robots[0].action_statistics.mean, actions[train].mean((0, 1)), atol=1e-6)
    assert data.validation.sources[0].episodes.tolist() == held.tolist()


def test_the_stream_does_not_depend_on_the_split(data):
    whole = by_number(micro_batches(data, 3, batch=16))
    assert sorted(whole) == list(range(48))
    assert {sample[0][0] for sample in whole.values()} == {0, 1}
    assert by_number(micro_batches(data, 12, batch=4)) == whole  # accumulation over four
    ranks = [micro_batches(data, 6, batch=4, rank=rank, world=2) for rank in (0, 1)]
    assert by_number(ranks[0] + ranks[1]) == whole
    assert ranks[1][1].sample_index.tolist() == [12, 13, 14, 15]
    assert by_number(micro_batches(data, 12, batch=4, workers=2)) == whole
    resumed = micro_batches(data, 2, batch=16, first_sample=16)
    assert by_number(resumed) == {k: sample for k, sample in whole.items() if k >= 16}
    far = micro_batches(data, 1, batch=16, first_sample=16 * 10**9)
    assert far[0].sample_index[0] == 16 * 10**9


def test_shapes_and_masks(video, tokenizer):
    slots = (FRONT, WRIST, "observation.images.empty_camera_0")
    spec = SampleSpec(4, 16, 10, (48, 48), 16, slots, 7, 7)
    config = dataset_config(video, cameras={FRONT: FRONT, WRIST: None})
    batch = micro_batches(built(config, tokenizer=tokenizer, spec=spec), 1, batch=8)[0]
    assert len(batch) == 8
    assert {slot: image.shape for slot, image in batch.observation.images.items()} == {FRONT: (8, 3, 48, 48)}
    assert batch.observation.image_masks[FRONT].all()
    assert batch.observation.state.shape == (8, 16) and not batch.observation.state[:, 7:].any()
    assert batch.observation.tokens.shape == batch.observation.token_mask.shape == (8, 8)  # not 16
    assert batch.actions.values.shape == batch.noise.shape == (8, 4, 10)
    assert batch.actions.dim_mask.tolist() == [[True] * 7 + [False] * 3] * 8
    assert (batch.actions.values[..., 7:] == 0).all()
    assert str(batch.actions.values.dtype) == str(batch.noise.dtype) == "torch.float32"


def test_a_camera_that_some_robots_lack(video, pictures, tokenizer):
    spec = SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, WRIST), 7, 7)
    configs = [dataset_config(video, cameras={FRONT: FRONT, WRIST: None}), dataset_config(pictures)]
    batch = micro_batches(built(*configs, tokenizer=tokenizer, spec=spec), 1, batch=16)[0]
    has_wrist = batch.provenance[:, 0] == 1
    assert 0 < has_wrist.sum() < 16
    assert batch.observation.image_masks[WRIST].equal(has_wrist)
    assert not batch.observation.images[WRIST][~has_wrist].any()


def test_validation_is_a_fixed_set(data):
    def collected(size, batch, world):
        found = {}
        for rank in range(world):
            for item in validation_batches(data.validation, size, batch, rank, world):
                samples = by_number([item.batch])
                for row, index in enumerate(item.index.tolist()):
                    if index < 0:  # of a rank that is left with nothing
                        continue
                    found[index] = (samples[index], item.previous_action[row].tolist(), item.has_previous[row])
                    assert item.actions.shape[1:] == (4, 7)
        return found

    one = collected(9, 4, 1)
    assert sorted(one) == list(range(9))
    assert collected(9, 2, 2) == one
    together = [
        {tuple(item.index) for rank in range(world) for item in validation_batches(data.validation, 9, 2, rank, world)}
        - {(-1,)}
        for world in (1, 3)
    ]
    counts = {len(list(validation_batches(data.validation, 9, 2, rank, 4))) for rank in range(4)}
    assert counts == {2}  # five batches over four ranks, whose passes may be collectives
    assert together[0] == together[1] == {(0, 1), (2, 3), (4, 5), (6, 7), (8,)}  # whatever the number of ranks
    assert {sample[0][0][0] for sample in one.values()} == {0, 1}
    frames = sum(len(source) for source in data.validation.sources)
    assert len(collected(10**6, 8, 1)) == len(collected(0, 8, 1)) == frames
    held = [source.episodes.tolist() for source in data.validation.sources]
    assert all(sample[0][1] in held[sample[0][0]] for sample, _, _ in one.values())


def test_errors_in_workers_keep_their_message(data, monkeypatch):
    monkeypatch.setattr(data.reader, "draw", broken_draw)
    with pytest.raises(RuntimeError, match="no noise for sample 0"):
        micro_batches(data, 1, batch=4, workers=1)


def test_signals_spare_workers_and_a_killed_one_is_reported(data):
    loader = TrainLoader(data.reader, data.mixture, global_batch=4, per_device_batch=4, num_workers=1)
    next(loader)
    workers = worker_processes()
    assert workers
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker, number)
    for _ in range(5):
        next(loader)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a data worker was killed.*--mem.*num_workers \(now 1\)"):
        for _ in range(20):
            next(loader)
    assert time.monotonic() - begin < 30
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_killed_fork_server_is_reported(data):
    loader = TrainLoader(data.reader, data.mixture, global_batch=4, per_device_batch=4, num_workers=2)
    next(loader)
    workers = worker_processes()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the process that forks data workers was killed, as .*memory.*--mem"):
        for _ in range(1000):
            next(loader)
    give_up = time.monotonic() + 20
    while any(lives(worker) for worker in workers):
        assert time.monotonic() < give_up, "a worker lives on"
        time.sleep(0.05)
    assert len(micro_batches(data, 1, batch=4, workers=1)) == 1  # another server is there for those that come


def test_workers_end_with_a_killed_trainer(video, tokenizer, tmp_path):
    code = f"from support import samples; samples.wait_with_workers({str(video)!r}, {tokenizer!r})"
    environment = with_support(HF_DATASETS_CACHE=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    processes = [int(number) for number in trainer.stdout.readline().split()]
    assert len(processes) == 3
    trainer.kill()
    trainer.wait()
    give_up = time.monotonic() + 20
    while any(lives(process) for process in processes):
        assert time.monotonic() < give_up, "the fork server or a worker lives on"
        time.sleep(0.1)
