"""``--check true``: a run looked through before it waits in a queue, through run.py in processes of their own.

Run: uv run pytest tests/preflight/test_preflight.py      (half a minute; needs no GPU)
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checking import check, contents, rewrite
from support.datasets import frame_image, write_dataset
from support.forked import ForkServer
from support.launching import MODEL, REPOSITORY, RUN, Workplace

from agent.configuration_pipeline import load_config
from agent.models.common.memory import Training
from agent.models.pi.memory import predict
from agent.parallel.launch import Launch
from agent.preflight import memory, rehearsal
from agent.preflight.context import Context
from agent.preflight.slurm import Job, find_job, seconds_of
from agent.settings.gpus import GPUS, recognised

THEMES = [
    "config: keys", "config: values", "environment", "HF_HUB_OFFLINE", "run folder", "wandb", "data: ", "map: ",
    "cameras", "statistics: ", "start", "weights", "tokenizer", "batch", "epochs", "learning rate", "instructions",
    "memory", "disk", "update", "save and load", "loader", "time",
]  # fmt: skip

EVAL_KEYS = ("eval_freq", "eval_size")  # that tiny.yaml sets


# ---- a sound run


def test_the_demo_passes_and_nothing_is_left_out(server: ForkServer, place: Workplace) -> None:
    demo = ["--config_path", str(REPOSITORY / "config" / "train" / "pi0_demo.yaml"), "--per_device_batch_size", "4"]
    demo += ["--data.train.datasets.0.episodes", "[0,1,2,3]", "--model_cfg.vision_variant.depth", "1"]  # little time
    checked = check(server, place, "demo", *demo)
    assert checked.state["state"] == "finished" and checked.report["result"] != "fail", checked.output
    names = [row["name"] for row in checked.report["rows"]]
    assert [theme for theme in THEMES if not any(name.startswith(theme) for name in names)] == []
    lines = checked.output.splitlines()
    for row in checked.report["rows"]:
        assert any(line.startswith(row["result"]) and row["name"] in line for line in lines), row
    assert "action: dx, dy, dz, gripper (4, padded to 4)" in checked.row("map: ")["text"]
    left = (place.folder / "runs" / "demo").rglob("*")
    assert sorted(path.name for path in left if path.is_file()) == ["cameras.png", "report.json"]


def test_what_is_measured_and_computed(server: ForkServer, place: Workplace) -> None:
    checked = check(server, place, "sound")
    assert checked.state["state"] == "finished"
    update, saved = checked.row("update")["details"], checked.row("save and load")["details"]
    assert len(update["losses"]) == 2 and all(map(math.isfinite, update["losses"])) and update["grad_norm"] > 0
    disk = checked.row("disk")["details"]
    assert disk["weights_bytes"] + disk["training_bytes"] == pytest.approx(saved["bytes"], rel=0.25)
    rates = checked.rows("learning rate")[0]["details"]["lr"]
    assert list(rates) == ["0", "4", "9", "14", "19"]
    assert rates["4"] > rates["9"] > rates["14"] > rates["19"]
    loader = checked.row("loader")["details"]
    assert loader["needed_per_gpu"] == pytest.approx(4 / update["seconds"])  # two micro-batches of two samples
    assert loader["workers_to_ask_for"] == math.ceil(1.2 * loader["needed_per_gpu"] / loader["per_worker"])


@pytest.mark.parametrize(
    "changes",
    [
        ["--ema_decay", "0.9", "--save_dtype", "bfloat16"],
        ["--ema_decay", "0.9", "--precision", "bfloat16_stochastic"],
        ["--optimizer", "adamw8bit", "--freeze_vlm", "true"],
    ],
    ids=lambda changes: "+".join(changes[1::2]),
)
def test_the_bytes_of_a_checkpoint(server: ForkServer, place: Workplace, changes: list[str]) -> None:
    wide = ["--model_cfg.paligemma_variant.width", "128", "--model_cfg.paligemma_variant.mlp_dim", "512"]
    checked = check(server, place, "bytes", *wide, *changes)
    disk, saved = checked.row("disk")["details"], checked.row("save and load")
    assert disk["weights_bytes"] + disk["training_bytes"] == pytest.approx(saved["details"]["bytes"], rel=0.04)
    assert saved["result"] == "pass" and checked.rows("config: keys", "pass")  # each of them has an effect


def test_no_more_checkpoints_are_kept_than_are_made(server: ForkServer, place: Workplace) -> None:
    keep = ["--keep_checkpoints", "1000", "--save_model_freq", "8"]  # of 20 updates
    disk = check(server, place, "keep", *keep).row("disk")
    details = disk["details"]
    assert details["needed_bytes"] == 3 * (details["weights_bytes"] + details["training_bytes"])
    assert "the 3 that the run makes are" in disk["text"]


def test_reading_between_the_updates_of_a_gpu_is_no_pass(server: ForkServer, place: Workplace) -> None:
    row = check(server, place, "between", "--check_gpu", "h100", "--per_device_batch_size", "8").row("loader")
    needed, each = row["details"]["needed_per_gpu"], row["details"]["per_worker"]
    assert row["result"] == "warn" and "data.train.num_workers" in row["change"]
    assert f"between the updates, {needed / (needed + each):.0%} of the time" in row["text"]


def test_what_only_validation_reads_has_no_effect_without_it(server: ForkServer, place: Workplace) -> None:
    checked = check(server, place, "unheld", "--data.val.fraction", "0")
    texts = [row["text"] for row in checked.rows("config: keys", "warn")]
    assert texts == [f"{key} has no effect, because data.val.fraction is 0: nothing is held out" for key in EVAL_KEYS]


def test_an_evaluation_that_cannot_be_is_warned_of(server: ForkServer, place: Workplace) -> None:
    """It would say so in a log of its own, at the first checkpoint."""
    simulation = {"tasks": ["reach-v3"], "every": 4, "start": "sbatch"}
    checked = check(server, place, "simulated", "--eval_cfg", json.dumps(simulation), PATH="/nowhere")
    (row,) = checked.rows("config: values", "warn")
    assert row["text"] == "eval_cfg.start is sbatch, and there is no sbatch here"


def test_eight_bits_are_not_for_a_gpu_without_them(server: ForkServer, place: Workplace) -> None:
    eight = ("--fp8", "mlp", "--use_bf16", "true", "--check_gpu")
    (row,) = check(server, place, "eight", *eight, "a100-80g").rows("config: values", "warn")
    assert (
        row["text"] == "fp8: mlp needs arithmetic in 8 bits, which a100-80g lacks"
        and row["change"] == "write fp8: none"
    )


def test_the_sheet_shows_what_the_camera_sees(server: ForkServer, place: Workplace) -> None:
    checked = check(server, place, "sheet", "--check_gpu", "4090")
    sheet = np.asarray(Image.open(place.folder / "runs" / "sheet" / "check" / "cameras.png").convert("RGB"))
    text = checked.row("map: ")["text"]
    assert "observation.images.front ← observation.images.front" in text
    episode, frame, size = 3, 6, (64, 80)
    recorded = frame_image(episode, frame, 0, size).astype(float)
    shown = sheet[8 + 58 : 8 + 58 + 256, 8 : 8 + 256].astype(float)
    # 64 × 80 fits into 32 × 32 as 25 × 32, below and above a black bar; a pixel is eight in the sheet.
    assert shown[:16].max() < 30 and shown[-16:].max() < 30
    middle = shown[128 - 80 : 128 + 80 : 32, 16:240:32]
    expected = recorded[12:52:8, 5:75:10]
    assert middle.shape == expected.shape
    assert np.abs(middle - expected).mean() < 15, (middle - expected).round()


def test_a_run_with_checkpoints_is_left_as_it_is(server: ForkServer, place: Workplace) -> None:
    server.start(place, "trained", "--n_updates", "4", "--eval_freq", "0").wait()
    folder = place.folder / "runs" / "trained"
    before = contents(folder)
    assert any("step_00000004" in name for name in before)
    again = check(server, place, "trained", "--n_updates", "4", "--eval_freq", "0")
    assert again.row("start")["result"] == "warn" and "is finished with its 4 updates" in again.row("start")["text"]
    other = check(server, place, "trained", "--n_updates", "4", "--seed", "7")
    assert "seed: 42 → 7" in other.row("start")["text"] and "resume_changes" in other.row("start")["change"]
    assert other.state["error_kind"] == "config"
    assert {name: value for name, value in contents(folder).items() if not name.startswith("check/")} == before


def test_a_run_that_owes_a_validation_is_not_finished(server: ForkServer, place: Workplace) -> None:
    settings = ("--n_updates", "4", "--eval_freq", "4", "--eval_start", "false")
    run = server.start(place, "owes", *settings, hook="slow_validation")
    run.wait_for_output("validation begins")
    run.kill(0, signal.SIGTERM)
    output = run.wait(timeout=60)
    assert place.status("owes")["state"] == "preempted" and len(place.metrics("owes")) == 3, output
    row = check(server, place, "owes", *settings).row("start")
    assert row["result"] == "pass" and "step_00000004; only a validation is left to do" in row["text"]
    output = server.start(place, "owes", *settings).wait()
    assert place.status("owes")["state"] == "finished" and len(place.metrics("owes")) == 4, output
    assert "is finished with its 4 updates" in check(server, place, "owes", *settings).row("start")["text"]


# ---- what is wrong


def test_everything_wrong_is_named_at_once_with_what_to_change(place: Workplace, tmp_path: Path) -> None:
    """Nothing that fails hides another; the exit code is 2."""
    write_dataset(tmp_path / "cut", episodes=2, length=8)
    (video,) = (tmp_path / "cut" / "videos").rglob("*.mp4")
    video.write_bytes(video.read_bytes()[:-200])
    datasets = [
        {"repo_id": "test/data", "root": str(place.folder / "data")},
        {"repo_id": "test/cut", "root": str(tmp_path / "cut")},
        {"repo_id": "test/missing", "root": str(tmp_path / "nowhere")},
        {"repo_id": "test/damaged", "root": str(tmp_path / "damaged")},
    ]
    info = shutil.copytree(place.folder / "data", tmp_path / "damaged") / "meta" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "data_path": "data/{nothing}.parquet"}))
    config = json.loads((place.folder / "tiny.yaml").read_text())
    config |= {"load_from_checkpoint": str(tmp_path / "weights"), "use_wandb": True, "n_epochs": 3}
    config |= {"global_batch_size": 6, "per_device_batch_size": 4}
    config["eval_cfg"] = {"tasks": ["reach-v3"], "every": 4, "start": "process", "script": "nowhere.sh"}
    config["model_cfg"] = MODEL | {"tokenizer_path": str(tmp_path / "words")}
    config["data"]["train"]["datasets"] = datasets
    (tmp_path / "broken.yaml").write_text(json.dumps(config))
    command = [sys.executable, str(RUN), "--config_path", str(tmp_path / "broken.yaml"), "--check", "true"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"VLA_LOG_DIR": str(tmp_path / "runs"), "NETRC": str(tmp_path / "none")}
    process = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 2, process.stdout + process.stderr
    report = json.loads((tmp_path / "runs" / "broken" / "check" / "report.json").read_text())
    failed = {row["name"]: row for row in report["rows"] if row["result"] == "fail"}
    for name, text, change in (
        ("wandb", "no wandb key", "use_wandb: false"),
        ("data: test/missing", "does not exist", "`root`"),
        ("data: test/damaged", "which cannot be filled in with chunk_index", "copy the file again"),
        ("weights", "there is no file or folder", ""),
        ("tokenizer", "there is no such folder", "model_cfg.tokenizer_path to a local folder"),
        ("batch", "6 is not a multiple", "write global_batch_size: 4 or 8"),
    ):
        assert text in failed[name]["text"] + failed[name]["change"] and change in failed[name]["change"], failed[name]
    cut = [row for row in report["rows"] if row["name"] == "data: test/cut" and row["result"] == "fail"]
    assert any("cut short" in row["text"] and "0-1" in row["text"] for row in cut)
    assert all(row["change"].strip() for row in report["rows"] if row["result"] != "pass")
    assert all(row["change"].split()[0] in process.stdout for row in failed.values())
    sound = [row for row in report["rows"] if row["name"] == "data: test/data"]
    assert [row["result"] for row in sound] == ["pass"] and "72 frames" in sound[0]["text"]
    warned = [row["text"] for row in report["rows"] if row["result"] == "warn"]
    assert any(text.startswith("n_epochs has no effect") for text in warned)
    assert any("not checked" in text for text in warned)
    assert any("there is no nowhere.sh in" in text for text in warned)
    assert "Traceback" not in process.stderr + process.stdout
    assert Image.open(tmp_path / "runs" / "broken" / "check" / "cameras.png").size[0] > 256


def test_bad_episodes_are_listed_by_number(server: ForkServer, place: Workplace, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=7, length=12, tasks=("push the red button", "", "open the drawer"))

    def spoil(columns: dict[str, np.ndarray]) -> None:
        episode, frame = columns["episode_index"], columns["frame_index"]
        columns["action"][(episode == 2) & (frame == 5), 3] = np.nan
        columns["timestamp"][(episode == 5) & (frame == 7)] = 0.1
        columns["timestamp"][episode == 6] += 0.04  # no frame of the video is there

    rewrite(root, spoil)
    checked = check(server, place, "episodes", "--data.train.datasets.0.root", str(root))
    (row,) = checked.rows("data: test/data", "fail")
    bad = row["details"]["bad_episodes"]
    assert {int(number) for number in bad} == {1, 2, 4, 5, 6}
    assert row["details"]["good_episodes"] == [0, 3]
    assert "1-2, 4-6" in row["text"] and "5 of 7 episodes" in row["text"]
    assert bad["1"] == "frame 0: its instruction is empty or missing"
    assert bad["2"] == "frame 5: action is not finite"
    assert "frame 7 has the time stamp 0.1" in bad["5"] and "shows frame 1 of the episode" in bad["5"]
    assert "has no frame within" in bad["6"]
    assert checked.state["state"] == "failed" and checked.rows("update", "pass")  # with what is good
    good = ["--data.train.datasets.0.episodes", json.dumps(row["details"]["good_episodes"])]
    again = check(server, place, "episodes", "--data.train.datasets.0.root", str(root), *good)
    assert again.state["state"] == "finished", again.output


def test_times_that_stand_still_are_bad_where_no_video_is_read(
    server: ForkServer, place: Workplace, tmp_path: Path
) -> None:
    root = write_dataset(tmp_path / "data", episodes=3, video=False)

    def spoil(columns: dict[str, np.ndarray]) -> None:
        columns["timestamp"][(columns["episode_index"] == 1) & (columns["frame_index"] == 7)] = 0.1

    rewrite(root, spoil)
    (row,) = check(server, place, "still", "--data.train.datasets.0.root", str(root)).rows("data: test/data", "fail")
    assert row["details"]["bad_episodes"] == {"1": "frame 7: its time stamp is not after the one before it"}


def test_damage_that_nobody_has_thought_of_costs_the_data_set_alone(server: ForkServer, place: Workplace) -> None:
    checked = check(server, place, "unforeseen", hook="unforeseen_damage")
    (row,) = checked.rows("data: test/data", "fail")
    assert "could not be looked through (ZeroDivisionError: division by zero)" in row["text"]
    assert (
        checked.output.count("Traceback") == 1 and checked.rows("memory", "pass") and checked.rows("tokenizer", "pass")
    )


def test_statistics_and_instructions_name_what_is_odd(server: ForkServer, place: Workplace, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=8, length=20)

    def spoil(columns: dict[str, np.ndarray]) -> None:
        columns["observation.state"][:, 2] = 0.25
        columns["action"][(columns["episode_index"] == 1) & (columns["frame_index"] < 3), 4] = 300

    rewrite(root, spoil)
    info = root / "meta" / "info.json"
    content = json.loads(info.read_text())
    content["features"]["action"]["names"] = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    info.write_text(json.dumps(content))
    short = ["--model_cfg.tokenizer_max_length", "4", "--data.val.fraction", "0.2"]
    checked = check(server, place, "odd", "--data.train.datasets.0.root", str(root), *short)
    texts = {row["text"]: row for row in checked.rows("statistics", "warn")}
    assert any(text == "state: dimension 2 hardly varies and stays unnormalised" for text in texts)
    (outlier,) = (text for text in texts if "pitch" in text)
    share = texts[outlier]["details"]["beyond_5"]
    assert share["pitch"] == pytest.approx(3 / 140, abs=0.004) and share["x"] == 0
    assert "at episode 1, frame" in outlier and "QUANTILES" in texts[outlier]["change"]
    cut = checked.row("instructions")
    assert cut["result"] == "warn" and "are cut at 4 tokens" in cut["text"]
    assert "tokenizer_max_length: 8" in cut["change"]
    assert checked.state["state"] == "finished"  # odd, not wrong


@pytest.mark.parametrize("use_bf16", ["true", "false"])
@pytest.mark.parametrize("hook", ["processor_without_bfloat16", "processor_with_bfloat16"])
def test_bfloat16_without_instructions_for_it_is_warned_of(
    server: ForkServer, place: Workplace, hook: str, use_bf16: str
) -> None:
    name, arguments = f"{hook}_{use_bf16}", ["--use_bf16", use_bf16, "--n_updates", "1"]
    slow = hook == "processor_without_bfloat16" and use_bf16 == "true"
    checked = check(server, place, f"{name}_check", *arguments, hook=hook)
    found = [row for row in checked.rows("config: values") if "no instructions for bfloat16" in row["text"]]
    assert [row["result"] for row in found] == ["warn"] * slow
    assert all("use_bf16: false" in row["change"] for row in found)
    run = server.start(place, name, *arguments, hook=hook)
    output = run.wait()
    assert place.status(name)["state"] == "finished" and ("no instructions for bfloat16" in output) == slow, output


def test_what_training_warns_of_is_warned_of_before(server: ForkServer, place: Workplace) -> None:
    same = {"repo_id": "test/data", "root": str(place.folder / "data"), "episodes": [2, 3]}
    checked = check(server, place, "overlap", "--data.val.datasets", json.dumps([same]))
    (row,) = checked.rows("data: together", "warn")
    assert "episodes 2-3 are trained on and validated on" in row["text"] and "WARNING" not in row["text"]
    assert checked.state["state"] == "finished"


def test_a_run_folder_that_cannot_be_made_costs_no_other_check(
    server: ForkServer, place: Workplace, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    output = server.start(place, "x", "--check", "true", VLA_LOG_DIR=str(tmp_path / "file" / "runs")).wait()
    words = " ".join(output.split())  # the table wraps
    assert re.search(r"fail run folder \S+ cannot be written \(Not a directory\)", words), output
    assert "pass map: test/data" in words and "warn update not checked, because the run folder" in words, output
    assert "report.json could not be written: the run folder cannot be written" in words
    assert "Traceback" not in output


# ---- predictions


def test_the_largest_batch_is_the_predictors(server: ForkServer, place: Workplace) -> None:
    """A shipped config of the full model, without data and weights: a fail for each, and the prediction all the same."""
    config = REPOSITORY / "config" / "train" / "pi0_finetune_bridge.yaml"
    environment = {"VLA_DATA_DIR": str(place.folder / "none"), "HF_HOME": str(place.folder / "hf")}
    checked = check(server, place, "full", "--config_path", str(config), "--check_gpu", "h100", **environment)
    assert {"data: IPEC-COMMUNITY/bridge_orig_lerobot", "weights", "tokenizer"} <= {
        row["name"] for row in checked.rows("", "fail")
    }
    assert "agent.prepare" in checked.row("weights")["change"]
    found = checked.row("memory")["details"]
    os.environ["VLA_DATA_DIR"] = "/data"
    try:
        model: Any = load_config(config, ["--wandb.mode", "offline"], 1)[0].model_cfg
    finally:
        del os.environ["VLA_DATA_DIR"]

    def card(batch: int) -> int:
        return predict(model, Training(batch, 1, None, activation_checkpointing="full", accumulates=True)).card

    assert found["predicted_bytes"] == card(32)
    assert card(found["largest_batch"]) <= GPUS["h100"].memory < card(found["largest_batch"] + 1)


@pytest.mark.parametrize("share, result", [(0.9, "pass"), (0.97, "warn"), (1.1, "fail")])
def test_the_advised_batch_passes(place: Workplace, monkeypatch: pytest.MonkeyPatch, share: float, result: str) -> None:
    """Of a batch that fits hardly or not, what is to be written instead is smaller, and is fine."""

    def context(batch: int) -> Context:
        sizes = ["--per_device_batch_size", str(batch), "--global_batch_size", "2048"]
        return Context(load_config(place.folder / "tiny.yaml", ["--check_gpu", "4090", *sizes], 1)[0], Launch())

    need = memory.predicted(context(2048), 2048)
    monkeypatch.setitem(GPUS, "4090", replace(GPUS["4090"], memory=int(need / share)))
    (row,) = memory.check(context(2048))
    assert row.result == result
    if result != "pass":
        advised = re.match(r"write per_device_batch_size: (\d+) ", row.change)
        assert advised is not None and 0 < int(advised[1]) < 2048, row
        assert memory.check(context(int(advised[1])))[0].result == "pass"


def test_a_model_too_large_for_the_gpu_is_a_row(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Already building it runs out of memory, as on a GPU, and nothing is left behind."""
    import torch

    from agent.training import building

    def build(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")

    monkeypatch.setenv("VLA_LOG_DIR", str(place.folder / "runs"))
    monkeypatch.setattr(building, "build", build)
    context = Context(load_config(place.folder / "tiny.yaml", ["--name", "too_large"], 1)[0], Launch())
    (row,) = rehearsal.check(context)
    assert row.result == "fail" and row.text.endswith("CUDA out of memory. Tried to allocate 2 GiB.")
    assert row.change.startswith("write a smaller per_device_batch_size than 2")
    assert not (context.folder / "rehearsal").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    sharded = ["--name", "too_large", "--parallel", "fsdp"]  # of which one process holds all here, and a fourth there
    (row,) = rehearsal.check(Context(load_config(place.folder / "tiny.yaml", sharded, 1)[0], Launch()))
    assert row.result == "warn" and "does not hold what 4 GPUs share" in row.text


def test_requeues_follow_from_the_time_limit(server: ForkServer, place: Workplace) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 3600), "SLURM_GPUS_ON_NODE": "2"}
    long = ["--n_updates", "10000000", "--check_gpu", "h100"]
    checked = check(server, place, "pi0_demo", *long, **job)  # the script of this name asks to be requeued
    row = checked.row("time")
    details = row["details"]
    assert details["updates"] == 10_000_000 and 3000 < details["limit_s"] <= 3600
    assert details["seconds"] == pytest.approx(10_000_000 * 2 * 0.02)  # 8 samples, 2 on each of 2, at the assumed least
    assert details["requeues"] == math.ceil(details["seconds"] / (details["limit_s"] - 60 - 180)) - 1
    assert row["result"] == "pass" and checked.report["gpus"] == 2
    without = check(server, place, "no_script", *long, **job).row("time")
    assert without["result"] == "fail" and "#SBATCH --requeue" in without["change"]


def test_a_job_is_read_from_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "slurms" / "train_scripts"
    folder.mkdir(parents=True)
    lines = ["#!/bin/bash", "#SBATCH --time=1-12:00:00", "#SBATCH --gres=gpu:h100:4  # a node", "##SBATCH --gpus=8"]
    lines += ["#SBATCH -c 54", "#SBATCH --requeue", "#SBATCH --signal=B:USR1@300", "#SBATCH --constraint='a100|h200'"]
    (folder / "mine.sh").write_text("\n".join(lines))
    job = find_job("mine", [tmp_path], 0.0)
    assert job is not None
    assert (job.limit_s, job.gpus, job.cores, job.requeue, job.warning_s) == (36 * 3600, 4, 54, True, 300)
    assert job.gpu_words == ["h100", "a100", "h200"]
    assert find_job("other", [tmp_path], 0.0) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "mine")
    job = find_job("other", [tmp_path], 0.0)  # sbatch mine.sh --name other
    assert job is not None and job.source == "job 7" and job.requeue and job.warning_s == 300
    monkeypatch.delenv("SLURM_JOB_ID")
    (folder / "disk.sh").write_text("#SBATCH --gres=tmp:200,gpu:a100:2\n#SBATCH --gpus-per-node=a100:2\n")
    job = find_job("disk", [tmp_path], 0.0)
    assert job is not None and job.gpus == 2 and set(job.gpu_words) == {"a100"}
    (folder / "disk.sh").write_text("#SBATCH --gres=disk:200\n")
    job = find_job("disk", [tmp_path], 0.0)
    assert job is not None and job.gpus is None


@pytest.mark.parametrize(
    "lines, found",
    [
        ("--gres=gpu", (1, [], None)),
        ("--gres=gpu:a100", (1, ["a100"], None)),
        ("--gres=gres/gpu:a100:4(S:0-1)", (4, ["a100"], None)),
        ("--gpus-per-task=1 --ntasks=4 -c 8", (4, [], 32)),
        ("--gres=gpu:h100:2 --cpus-per-gpu=12", (2, ["h100"], 24)),
        ("--gres=tmp:200", (None, [], None)),
    ],
)
def test_forms_of_what_is_asked_for(tmp_path: Path, lines: str, found: tuple) -> None:
    job = written_job(tmp_path, f"#SBATCH {lines}\n")
    assert (job.gpus, job.gpu_words, job.cores) == found


def test_sbatch_reads_no_further_than_the_first_command(tmp_path: Path) -> None:
    job = written_job(
        tmp_path, "#!/bin/bash\n\n#SBATCH --time=60\ncd somewhere\n#SBATCH --requeue\n#SBATCH --signal=USR1\n"
    )
    assert (job.limit_s, job.requeue, job.warning_s) == (3600, False, 0)
    job = written_job(tmp_path, "#SBATCH --requeue --signal=B:USR1\n")
    assert job.requeue and job.warning_s == 60  # SLURM's own
    assert not written_job(tmp_path, "#SBATCH --requeue\n#SBATCH --no-requeue\n").requeue


def test_a_line_of_a_script_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.sh: the line `#SBATCH --comment=don't` cannot be read"):
        written_job(tmp_path, "#SBATCH --comment=don't\n")


def written_job(folder: Path, script: str) -> Job:
    (folder / "slurms" / "train_scripts").mkdir(parents=True, exist_ok=True)
    (folder / "slurms" / "train_scripts" / "mine.sh").write_text(script)
    job = find_job("mine", [folder], 0.0)
    assert job is not None
    return job


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("0", None),
        ("90", 5400),
        ("5:30", 330),
        ("44:00:00", 158400),
        ("2-3", 183600),
        ("1-0:30", 88200),
        ("UNLIMITED", None),
    ],
)
def test_slurm_times(limit: str, seconds: float | None) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    "text, names",
    [
        ("NVIDIA H100 80GB HBM3", ["h100"]),
        ("NVIDIA A100-SXM4-80GB", ["a100-80g"]),
        ("NVIDIA A100-PCIE-40GB", ["a100-40g"]),
        ("NVIDIA A100 80GB PCIe", ["a100-80g"]),
        ("a100", ["a100-40g", "a100-80g"]),
        ("NVIDIA GeForce RTX 4090", ["4090"]),
        ("NVIDIA H200", ["h200"]),
        ("NVIDIA GH200 480GB", []),
        ("a100_80gb", ["a100-80g"]),
        ("A100-SXM-80GB", ["a100-80g"]),
        ("nvidia_h100_80gb_hbm3_1g.10gb", ["h100 1g.10gb"]),
        ("Tesla K80", []),
    ],
)
def test_gpus_are_recognised(text: str, names: list[str]) -> None:
    assert [gpu.name for gpu in recognised(text)] == names


def test_a_slice_of_a_gpu_has_its_share() -> None:
    (part,) = recognised("a100_3g.20gb")
    assert 17 < part.memory / 2**30 < 19.5 and part.bfloat16 == pytest.approx(312e12 * 3 / 7)


def test_a_gpu_that_is_not_known_is_refused(place: Workplace) -> None:
    with pytest.raises(ValueError, match="check_gpu: 'h1000' is not known; write one of a100-40g"):
        load_config(place.folder / "tiny.yaml", ["--check", "true", "--check_gpu", "h1000"], 1)
    config, _ = load_config(place.folder / "tiny.yaml", ["--check", "true", "--check_gpu", "4090"], 1)
    assert config.check_gpu == "4090"
