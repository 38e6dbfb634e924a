"""``--check true`` on what is damaged: data sets, weights, the run's own checkpoints. Each fail says what to change.

Run: uv run pytest tests/preflight/test_preflight_damage.py      (half a minute)
"""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checking import check, contents, rewrite
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import Workplace

from agent.preflight.report import Row, failed, table

ROOT = "--data.train.datasets.0.root"


def spoil_packets(video: Path, first: int, last: int) -> None:
    """Overwrites the packets of these frames; the file stays whole, so that only decoding them tells."""
    import av

    with av.open(str(video)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(video.read_bytes())
    for begin, size in places[first : last + 1]:
        content[begin : begin + size] = b"\xff" * size
    video.write_bytes(content)


def in_two_files(root: Path, first_of_second: int) -> Path:
    """Moves the episodes from this one on to a second data file, and returns it."""
    one = root / "data" / "chunk-000" / "file-000.parquet"
    other = one.with_name("file-001.parquet")
    table = pq.read_table(one)
    later = np.asarray(table["episode_index"]) >= first_of_second
    pq.write_table(table.filter(pa.array(~later)), one)
    pq.write_table(table.filter(pa.array(later)), other)
    (path,) = (root / "meta" / "episodes").rglob("*.parquet")
    episodes = pq.read_table(path)
    place = episodes.column_names.index("data/file_index")
    files = (np.asarray(episodes["episode_index"]) >= first_of_second).astype(np.int64)
    pq.write_table(episodes.set_column(place, "data/file_index", pa.array(files)), path)
    return other


# ---- data


def test_a_damaged_page_costs_the_episodes_of_its_file(server: ForkServer, place: Workplace, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=6, length=8)
    path = in_two_files(root, 4)
    content = bytearray(path.read_bytes())
    content[100:600] = bytes(500)  # the footer, with the number of rows, is whole
    path.write_bytes(content)
    checked = check(server, place, "page", ROOT, str(root))
    (row,) = checked.rows("data: test/data", "fail")
    assert "2 of 6 episodes cannot be used (4-5)" in row["text"] and f"{path} is damaged" in row["text"]
    assert row["details"]["good_episodes"] == [0, 1, 2, 3]
    assert checked.rows("update", "pass") and "Traceback" not in checked.output


def test_a_frame_within_an_episode_is_met(server: ForkServer, place: Workplace, tmp_path: Path) -> None:
    """Of few episodes more frames are read than their ends."""
    root = write_dataset(tmp_path / "data", episodes=3, length=60)
    (video,) = (root / "videos").rglob("*.mp4")
    spoil_packets(video, 84, 96)
    checked = check(server, place, "within", ROOT, str(root))
    (row,) = checked.rows("data: test/data", "fail")
    assert list(row["details"]["bad_episodes"]) == ["1"]
    assert checked.rows("map: test/data", "pass") and checked.rows("cameras", "pass")


def test_a_frame_that_nobody_met_before_costs_its_thumbnail_alone(
    server: ForkServer, place: Workplace, tmp_path: Path
) -> None:
    root = write_dataset(tmp_path / "data", episodes=33, length=6)
    (video,) = (root / "videos").rglob("*.mp4")
    spoil_packets(video, 16 * 6, 16 * 6 + 5)  # the episode in the middle, which is not among the sixteen
    checked = check(server, place, "unmet", ROOT, str(root))
    assert checked.rows("map: test/data", "pass")
    (row,) = checked.rows("map: test/data", "fail")
    assert "episode 16, frame 3 cannot be read" in row["text"] and "leave the episode out" in row["change"]


def test_pictures_of_another_size_than_the_metadata_say(server: ForkServer, place: Workplace, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=3, length=6)
    info = root / "meta" / "info.json"
    content = json.loads(info.read_text())
    content["features"]["observation.images.front"]["shape"] = [480, 640, 3]
    info.write_text(json.dumps(content))
    checked = check(server, place, "size", ROOT, str(root))
    (row,) = checked.rows("data: test/data", "warn")
    assert "observation.images.front have 64 × 80 pixels, meta/info.json says 480 × 640" in row["text"]


# ---- the run's own checkpoints


@pytest.fixture(scope="module")
def trained(server: ForkServer, place: Workplace) -> Path:
    """A run of 8 updates that has checkpoints of update 4 and 8."""
    server.start(place, "trained", "--n_updates", "8").wait()
    return place.folder / "runs" / "trained"


def cut_short(checkpoint: Path) -> None:
    weights = checkpoint / "pretrained_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def test_a_damaged_checkpoint_is_passed_over_as_training_does(
    server: ForkServer, place: Workplace, trained: Path
) -> None:
    run = shutil.copytree(trained, trained.with_name("one_damaged"), symlinks=True)
    cut_short(run / "checkpoints" / "step_00000008")
    for name, old, new in (("metrics.jsonl", '"step": 3,', '"stdp": 3,'), ("status.json", '"started"', '"rtarted"')):
        (run / name).write_text((run / name).read_text().replace(old, new))
    before = contents(run)
    checked = check(server, place, "one_damaged", "--n_updates", "8")
    (row,) = checked.rows("start", "pass")
    assert row["text"].endswith("step_00000004")
    row, records = checked.rows("start", "warn")
    assert "step_00000008: pretrained_model/model.safetensors has" in row["text"]
    assert f"{run}/metrics.jsonl: line 3 has no 'step'" in records["text"]
    assert f"{run}/status.json: attempt 1: it has no 'started'" in records["text"]
    assert checked.row("time")["details"]["updates"] == 4
    assert {name: value for name, value in contents(run).items() if not name.startswith("check/")} == before


def test_a_run_whose_checkpoints_are_all_damaged_fails(server: ForkServer, place: Workplace, trained: Path) -> None:
    run = shutil.copytree(trained, trained.with_name("all_damaged"), symlinks=True)
    for step in (4, 8):
        cut_short(run / "checkpoints" / f"step_{step:08d}")
    checked = check(server, place, "all_damaged", "--n_updates", "8")
    (row,) = checked.rows("start", "fail")
    assert "none that it can continue from" in row["text"] and "step_00000004: pretrained_model/" in row["text"]
    assert "load_from_checkpoint" in row["change"]


def test_a_finished_run_says_so(server: ForkServer, place: Workplace, trained: Path) -> None:
    checked = check(server, place, "trained", "--n_updates", "8")
    (row,) = checked.rows("start", "warn")
    assert row["text"] == "this run is finished with its 8 updates: nothing is left to do"
    assert checked.state["state"] == "finished"


def test_statistics_of_weights_that_are_gone_are_the_checkpoints(
    server: ForkServer, place: Workplace, trained: Path, tmp_path: Path
) -> None:
    """As training has it: what a run began with is not needed to continue it."""
    weights = shutil.copytree(trained / "checkpoints" / "step_00000008" / "pretrained_model", tmp_path / "weights")
    begun = ["--load_from_checkpoint", str(weights), "--data.statistics", "checkpoint", "--n_updates"]
    server.start(place, "gone", *begun, "8", "--save_model_freq", "4").wait()
    shutil.rmtree(weights)
    checked = check(server, place, "gone", *begun, "12", "--resume_changes", "true")
    assert checked.state["state"] == "finished" and checked.rows("start", "pass"), checked.output


def test_a_folder_that_a_run_holds_is_named(server: ForkServer, place: Workplace) -> None:
    """The check neither waits for the run nor disturbs it."""
    run = server.start(place, "live", "--n_updates", "100000", "--eval_freq", "0")
    try:
        run.wait_for_step(5)
        (row,) = check(server, place, "live", "--n_updates", "100000", "--eval_freq", "0").rows("run folder", "warn")
        assert f"is in use by host {socket.gethostname()}, process {run.pids[0]}" in row["text"]
        assert run.alive()
        run.wait_for_step(place.metrics("live")[-1]["step"] + 1)
    finally:
        run.kill_all()
    assert check(server, place, "live", "--n_updates", "100000", "--eval_freq", "0").rows("run folder", "pass")


# ---- weights


def altered(trained: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the run's weights, of which some are other ones."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "checkpoints" / "last" / "pretrained_model", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_met_by_the_update(
    server: ForkServer, place: Workplace, trained: Path, tmp_path: Path
) -> None:
    weights = altered(trained, tmp_path / "nan", lambda t: t["model.action_out_proj.weight"].fill_(math.nan))
    checked = check(server, place, "nan", "--load_from_checkpoint", str(weights))
    row = checked.row("update")
    assert row["result"] == "fail" and "is not finite" in row["text"] and "--debug true" in row["change"]
    assert "Traceback" not in checked.output


def test_weights_that_cannot_be_taken_come_with_what_to_change(
    server: ForkServer, place: Workplace, trained: Path, tmp_path: Path
) -> None:
    weights = altered(trained, tmp_path / "cut", dict.clear)
    (weights / "model.safetensors").write_bytes(b"no header")
    row = check(server, place, "cut", "--load_from_checkpoint", str(weights)).row("weights")
    assert row["result"] == "fail" and "it is truncated or damaged" in row["text"]
    assert row["change"] == "copy or download it again, or write another load_from_checkpoint"


def test_without_tokenizer_and_paraphrases_all_else_is_checked(
    server: ForkServer, place: Workplace, tmp_path: Path
) -> None:
    absent = ["--model_cfg.tokenizer_path", str(tmp_path / "words"), "--task_paraphrase", str(tmp_path / "said.json")]
    checked = check(server, place, "absent", *absent)
    failed = {row["name"]: row for row in checked.rows("", "fail")}
    assert set(failed) == {"tokenizer", "data: together"} and "said.json" in failed["data: together"]["text"]
    assert "not checked, because the tokenizer is not here" in checked.row("instructions")["text"]
    for name in ("statistics", "epochs", "learning rate", "update", "loader", "time"):
        assert checked.rows(name, "pass"), checked.output


def test_a_constant_dimension_shows_beside_statistics_that_were_given(
    server: ForkServer, place: Workplace, trained: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(place.folder / "data", tmp_path / "data")
    rewrite(root, lambda columns: columns["observation.state"].__setitem__((slice(None), 2), 0.25))
    weights = str(trained / "checkpoints" / "last" / "pretrained_model")
    given = ["--load_from_checkpoint", weights, "--data.statistics", "checkpoint"]
    (row,) = check(server, place, "constant", ROOT, str(root), *given).rows("statistics", "warn")
    assert row["text"] == "state: dimension 2 hardly varies"


def test_the_table_keeps_the_columns_of_a_table() -> None:
    coverage = "weights from here:\n  module" + " " * 90 + "expected       loaded\n  vision" + " " * 90 + "3"
    lines = table([Row("weights", "pass", coverage), Row("a name", "warn", "words " * 40, "more " * 40)]).splitlines()
    assert [line[15:] for line in lines[:3]] == coverage.splitlines()
    assert max(map(len, lines[3:])) <= 120


@pytest.mark.parametrize(
    "message, text, change",
    [
        ("7 is not a multiple of 3; write 6 or 9", "7 is not a multiple of 3", "write 6 or 9"),
        ("it ends at 2.5 s. Copy it again.", "it ends at 2.5 s", "Copy it again."),
        ("there are no names: write them as names", "there are no names", "write them as names"),
        ("x.safetensors is damaged", "x.safetensors is damaged", "copy it again"),
    ],
)
def test_a_message_is_parted_into_what_is_wrong_and_what_to_write(message: str, text: str, change: str) -> None:
    row = failed("name", message, "copy it again")
    assert (row.result, row.text, row.change) == ("fail", text, change)
