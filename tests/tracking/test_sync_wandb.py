"""One wandb run out of a run folder, every step once.

Run: uv run pytest tests/tracking/test_sync_wandb.py   (about ten seconds: wandb's own processes)
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.records import offline_records


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 1 / step, "val/loss": step / 2}) for step in range(1, 8)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')  # killed in the middle of a line
    (folder / "config.yaml").write_text("seed: 3\nwandb: {project: mine, mode: offline, entity: null, run_id: null}\n")
    (folder / "validation").mkdir()
    for step in (4, 8):  # no line tells of the update that the second is of
        Image.new("RGB", (8, 6), (step, 2, 3)).save(folder / "validation" / f"step_{step:08d}.png")
    return folder


def sync(run_dir: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("WANDB") and not k.lower().endswith("_proxy")
    }
    environment |= {"HOME": str(run_dir.parent), "NETRC": str(run_dir.parent / "netrc"), **variables}
    command = [sys.executable, "-m", "agent.sync_wandb", str(run_dir), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_the_newest_offline_folder_holds_every_step_once(run_dir: Path) -> None:
    for _ in range(2):  # again, as after more training
        code, said = sync(run_dir, "--mode", "offline")
        assert code == 0, said
        assert "7 lines, steps 1 to 7, offline" in said
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    run_id, history = offline_records(folder)
    assert run_id == (run_dir / "wandb" / "run_id").read_text()
    assert [entry["_step"] for entry in history] == list(range(1, 8))
    assert [entry["loss"] for entry in history] == [1 / step for step in range(1, 8)]
    assert [entry["val/loss"] for entry in history] == [step / 2 for step in range(1, 8)]
    (shown,) = [entry for entry in history if "val/chunks.path" in entry]
    assert shown["_step"] == 4 and (shown["val/chunks.width"], shown["val/chunks.height"]) == (8, 6)
    copy = folder / "files" / shown["val/chunks.path"]
    assert copy.read_bytes() == (run_dir / "validation" / "step_00000004.png").read_bytes()


@pytest.mark.parametrize("damage", ["cut short", "no room"])
def test_a_picture_that_cannot_be_shown_costs_no_line(run_dir: Path, damage: str, small_disk: Path) -> None:
    if damage == "cut short":
        (run_dir / "validation" / "step_00000004.png").write_bytes(b"")
    else:
        (run_dir / "wandb").symlink_to(small_disk)
        noise = Image.effect_noise((2000, 2000), 80)  # four megabytes
        noise.save(run_dir / "validation" / "step_00000004.png")
    code, said = sync(run_dir, "--mode", "offline")
    assert code == 0 and "wandb does not show" in said and "step_00000004.png" in said, said
    if damage == "cut short":
        (folder,) = (run_dir / "wandb").glob("offline-run-*")
        assert [entry["_step"] for entry in offline_records(folder)[1]] == list(range(1, 8))


def test_damaged_records_cost_no_more_than_what_is_damaged(run_dir: Path) -> None:
    content = (run_dir / "metrics.jsonl").read_text()
    content = (
        content.replace('"step": 2', '"stdp": 2').replace('"step": 5', '"step": 4').replace('{"step": 6', '["step": 6')
    )
    (run_dir / "metrics.jsonl").write_text(content)
    (run_dir / "config.yaml").write_text("seed: [")
    (run_dir / "status.json").write_text(
        '{"restarts": 1, "ettr": "x", "attempts": [{"started": 1.0, "rtate": "x"}, 3]}'
    )
    code, said = sync(run_dir, "--mode", "offline")
    assert code == 0 and "4 lines, steps 1 to 7, offline" in said, said
    for problem in ("line 2 has no 'step'", "line 5 tells of update 4, out of order behind 4", "line 6 is not JSON"):
        assert problem in said
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert [entry["_step"] for entry in offline_records(folder)[1]] == [1, 3, 4, 7]


def test_the_id_of_the_run_is_kept_and_another_can_be_given(run_dir: Path) -> None:
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb" / "run_id").write_text("kept1234")
    assert "wandb run kept1234:" in sync(run_dir, "--mode", "offline")[1]
    assert "wandb run other:" in sync(run_dir, "--mode", "offline", "--id", "other")[1]


def test_a_live_run_is_refused_unless_forced(run_dir: Path) -> None:
    with open(run_dir / ".lock", "w") as lock:
        lock.write("host node7, process 12")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = sync(run_dir, "--mode", "offline")
        assert code == 2 and "is being trained by host node7, process 12" in said and "--force" in said
        assert sync(run_dir, "--mode", "offline", "--force")[0] == 0
    assert sync(run_dir, "--mode", "offline")[0] == 0


@pytest.mark.parametrize("mode", [None, "offline", "dryrun", "disabled"])  # of the training, as our own advice sets it
def test_it_uploads_whatever_the_mode_or_says_what_to_do(run_dir: Path, mode: str | None) -> None:
    variables = {} if mode is None else {"WANDB_MODE": mode}
    code, said = sync(run_dir, **variables)
    assert code == 2 and "nothing was uploaded: there is no wandb key for api.wandb.ai: run `wandb login`" in said
    assert not (run_dir / "wandb").exists()


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_server_that_is_not_there_is_said(run_dir: Path, mode: str) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": mode}
    code, said = sync(run_dir, **nowhere)
    assert code == 2 and "it cannot be reached: 127.0.0.1:9: [Errno 111] Connection refused" in said
    assert ("WANDB_MODE=offline is for the training; this command uploads" in said) == (mode == "offline")
    assert not list((run_dir / "wandb").glob("*run-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "RUN_DIR is the folder of one run"),
        ("", "holds no update yet"),
        ('{"step": 1', "holds no update yet"),
    ],
)
def test_nothing_to_show_is_said(run_dir: Path, content: str | None, message: str) -> None:
    (run_dir / "metrics.jsonl").unlink()
    if content is not None:
        (run_dir / "metrics.jsonl").write_text(content)
    code, said = sync(run_dir, "--mode", "offline")
    assert code == 2 and message in said, said
