"""Whole runs in real processes. Run with ``uv run pytest tests/training/test_training.py``."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import RUN, Workplace, kill_all
from support.records import TIMES, what_was_computed

from agent.checkpoints.manifest import MANIFEST, seal
from agent.checkpoints.store import TRAINING

WORKERS = ("--data.train.num_workers", "1")  # elsewhere the samples are read in the training process: a faster start


@pytest.fixture(scope="module")
def through(place: Workplace) -> str:
    """A run of 20 updates that nothing interrupts: two processes, accumulation 2."""
    code, output = place.run("--name", "through", *WORKERS, processes=2)
    assert code == 0, output
    return "through"


def test_a_run_leaves_what_the_design_says(place: Workplace, through: str) -> None:
    lines = place.metrics(through)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["samples_seen"] for line in lines] == list(range(8, 168, 8))
    names = set(TIMES) | {"step", "loss", "lr", "grad_norm", "epoch", "samples_seen"}
    assert all(names <= set(line) for line in lines)
    for line in lines:
        assert line["samples_per_s"] == pytest.approx(8 / line["step_s"])
        assert line["eta_s"] == pytest.approx((20 - line["step"]) * line["step_s"])
        assert 0 <= line["data_wait"] <= line["data_wait_max"] <= 1
        assert 0.1 < line["memory_gb"] < 10
        assert line["epoch"] == pytest.approx(line["samples_seen"] / 60)  # one of six episodes of 12 frames is held out
    validated = [line["step"] for line in lines if "val/loss" in line]
    assert validated == [10, 20]
    assert {"val/action_l1", "val/baseline_last_l1", "val/baseline_mean_l1", "val/acc_0.05"} <= set(lines[-1])
    status = place.status(through)
    assert (status["state"], status["step"], status["restarts"]) == ("finished", 20, 0)
    folder = place.checkpoint(through)
    assert folder.name == "step_00000020"
    assert {p.name for p in folder.parent.iterdir()} == {"step_00000016", "step_00000020", "last", "best"}
    assert os.readlink(folder.parent / "last") == "step_00000020"
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"} <= {
        p.name for p in (folder / "pretrained_model").iterdir()
    }
    assert (folder.parents[1] / "config.yaml").exists()


def test_killed_and_continued_is_bit_for_bit_the_same(place: Workplace, through: str) -> None:
    process = place.start("--name", "killed", *WORKERS, processes=2)
    place.wait_for_step("killed", 8, process)
    kill_all(process)
    assert place.status("killed")["state"] == "running"
    code, output = place.run("--name", "killed", *WORKERS, processes=2)
    assert code == 0, output
    assert "own checkpoint" in output
    assert what_was_computed(place.metrics("killed")) == what_was_computed(place.metrics(through))
    assert place.tensors("killed") == place.tensors(through)
    assert place.status("killed")["restarts"] == 1


def test_the_split_over_processes_does_not_matter(place: Workplace, through: str) -> None:
    # One process, no worker, accumulation 4, against two processes, one worker each, accumulation 2.
    code, output = place.run("--name", "alone")
    assert code == 0, output
    for ours, theirs in zip(place.metrics("alone"), place.metrics(through), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        if "val/loss" in theirs:
            assert ours["val/loss"] == pytest.approx(theirs["val/loss"], rel=1e-4)


def test_a_finished_run_says_so(place: Workplace, server: ForkServer, through: str) -> None:
    before = place.metrics(through)
    code, output = server.run(place, "through", ranks=2)
    assert code == 0 and "this run is finished" in output
    assert place.metrics(through) == before
    assert place.status(through)["state"] == "finished"


def test_another_config_is_refused_on_resume(place: Workplace, server: ForkServer, through: str) -> None:
    code, output = server.run(place, "through", "--model_cfg.optimizer_lr", "0.002", "--seed", "7")
    assert code == 2
    assert "seed: 42 → 7" in output and "model_cfg.optimizer_lr: 0.001 → 0.002" in output
    assert "resume_changes" in output
    # What changes neither mathematics nor data is free, and a change is taken when it is asked for.
    allowed = ("--per_device_batch_size", "4", "--log_freq", "5", "--n_updates", "22", "--resume_changes", "true")
    shutil.copytree(place.folder / "runs" / "through", place.folder / "runs" / "longer", symlinks=True)
    code, output = server.run(place, "longer", *allowed)
    assert code == 0, output
    assert "n_updates: 20 → 22" in output and "per_device_batch_size" not in output
    assert place.status("longer")["step"] == 22


def test_a_run_keeps_the_schedule_that_it_began_with(place: Workplace, server: ForkServer, through: str) -> None:
    """One that begins now: at the peak when the warm-up of two updates ends, and cosine from there."""
    expected = [1e-3 / 3, 2e-3 / 3, *(cosine(update, 1e-3, begin=2, end=20) for update in range(2, 20))]
    assert [line["lr"] for line in place.metrics(through)] == pytest.approx(expected, rel=1e-12)
    # A checkpoint of the code before, which had no such key: the cosine counted from the first update.
    shutil.copytree(place.folder / "runs" / "through", place.folder / "runs" / "older", symlinks=True)
    checkpoint = place.checkpoint("older")
    saved = checkpoint / TRAINING / "config.yaml"
    text = saved.read_text()
    assert "  scheduler_decay_start: after_warmup\n" in text  # not null: later code may have another default
    saved.write_text(text.replace("  scheduler_decay_start: after_warmup\n", ""))
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, 20)
    said = "model_cfg.scheduler_decay_start: first_update"
    longer = ("--n_updates", "22", "--resume_changes", "true")
    code, output = server.run(place, "older", *longer, "--check", "true")
    report = json.loads((place.folder / "runs" / "older" / "check" / "report.json").read_text())
    course = next(row["text"] for row in report["rows"] if row["name"] == "learning rate")
    assert f"{said}, with which this run began; one that begins now has after_warmup" in course, output
    code, output = server.run(place, "older", *longer)
    assert code == 0 and f"{said}, with which this run began" in output and "falls to" in output, output
    rates = [line["lr"] for line in place.metrics("older")[20:]]
    assert rates == pytest.approx([cosine(update, 1e-3, begin=0, end=22) for update in (20, 21)], rel=1e-12)
    # Which stands in its checkpoints from then on.
    assert (
        "  scheduler_decay_start: first_update\n" in (place.checkpoint("older") / TRAINING / "config.yaml").read_text()
    )


def cosine(update: int, peak: float, begin: int, end: int, final: float = 2.5e-6) -> float:
    return final + (peak - final) * (1 + math.cos(math.pi * (update - begin) / (end - begin))) / 2


def test_moved_data_continues_and_other_data_does_not(place: Workplace, server: ForkServer, through: str) -> None:
    shutil.copytree(place.folder / "runs" / "through", place.folder / "runs" / "moved", symlinks=True)
    shutil.copytree(place.folder / "data", place.folder / "copy")
    code, output = server.run(place, "moved", "--data.train.datasets.0.root", str(place.folder / "copy"))
    assert code == 0 and "this run is finished" in output, output
    write_dataset(place.folder / "other", episodes=6, length=12, seed=1)
    code, output = server.run(place, "moved", "--data.train.datasets.0.root", str(place.folder / "other"))
    assert code == 2 and "the training data itself" in output and "fingerprint" in output, output


def continued(place: Workplace, server: ForkServer, through: str, name: str, root: Path | None = None) -> str:
    """Runs a copy of a finished run again from update 16 on; the log. It ends with the same losses and weights."""
    shutil.copytree(place.folder / "runs" / through, place.folder / "runs" / name, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(place.folder / "runs" / name / "checkpoints" / "step_00000020")
    where = ("--data.train.datasets.0.root", str(root)) if root is not None else ()
    code, output = server.run(place, name, *where, ranks=2)
    assert code == 0 and "own checkpoint" in output, output
    assert what_was_computed(place.metrics(name)) == what_was_computed(place.metrics(through))
    assert place.tensors(name) == place.tensors(through)
    return output


def test_only_what_the_manifest_lists_is_loaded(
    place: Workplace, server: ForkServer, through: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from agent.export import main as export

    last = place.folder / "runs" / "extra" / "checkpoints" / "step_00000016"
    whole = place.folder / "runs" / through / "checkpoints" / "step_00000016"
    (last / "pretrained_model").mkdir(parents=True)
    (last / "training_state").mkdir()
    zero = {name: tensor.zero_() for name, tensor in load_file(whole / "pretrained_model/model.safetensors").items()}
    for name in ("pretrained_model/other.safetensors", "training_state/model.safetensors"):
        save_file(zero, last / name, {"format": "pt"})
    index = json.dumps({"weight_map": dict.fromkeys(zero, "other.safetensors")})
    (last / "pretrained_model" / "model.safetensors.index.json").write_text(index)
    (last / "pretrained_model" / "robots.json").write_text("{}")
    (last / "training_state" / "optimizer-00002-of-00003.safetensors").write_bytes(b"")
    output = continued(place, server, through, "extra")
    for name in (
        "pretrained_model/other.safetensors",
        "training_state/model.safetensors",
        "pretrained_model/robots.json",
    ):
        assert name in next(line for line in output.splitlines() if "not in its manifest.json, and ignored" in line)
    # Nor where the weights are taken to.
    exports = [tmp_path / name for name in ("extra", "through")]
    for checkpoint, out in zip((last, whole), exports, strict=True):
        assert export(["--checkpoint", str(checkpoint), "--to", "lerobot", "--out", str(out)]) == 0
    assert {p.name: p.read_bytes() for p in exports[0].iterdir() if p.name != "README.md"} == {
        p.name: p.read_bytes() for p in exports[1].iterdir() if p.name != "README.md"
    }


def test_a_run_does_not_begin_from_damaged_weights_of_another(
    place: Workplace, server: ForkServer, through: str
) -> None:
    shutil.copytree(place.checkpoint(through), place.folder / "damaged")
    path = place.folder / "damaged" / "pretrained_model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    code, output = server.run(place, "from_damaged", "--load_from_checkpoint", str(path.parent))
    assert code == 2 and "model.safetensors is damaged: its checksum does not match; name another one" in output, output


def test_a_resume_normalises_as_the_run_began(place: Workplace, server: ForkServer, through: str) -> None:
    """Every kept file is damaged but one, which holds other statistics, as another version may have computed them."""
    from agent.checkpoints.manifest import checksum

    root = place.folder / "cached"
    shutil.copytree(place.folder / "data", root)
    damaged = sorted(path for path in (root / "agent_cache").iterdir() if path.suffix != ".xxh3")
    other = damaged.pop(next(n for n, path in enumerate(damaged) if path.name.startswith("statistics")))
    values = json.loads(other.read_text())
    values["std"][0] *= 2
    other.write_text(json.dumps(values))
    other.with_name(f"{other.name}.xxh3").write_text(json.dumps({"": checksum(other)}))
    assert len(damaged) == 3
    for file in [file for path in damaged for file in (path.iterdir() if path.is_dir() else [path])]:
        os.truncate(file, file.stat().st_size * 2 // 3)
    lines = continued(place, server, through, "cached", root).splitlines()
    told = "\n".join(line for line in lines if "is not used but computed anew" in line)
    assert all(str(path) in told for path in damaged) and str(other) not in told
    (line,) = [line for line in lines if "statistics: std of dimension 0 is" in line and "[rank" not in line]
    assert f"(kept in {other})" in line and "step_00000016/pretrained_model" in line
    assert "goes on with the checkpoint's, with which it began" in line


def test_a_tokenizer_beyond_the_vocabulary_is_refused(place: Workplace, server: ForkServer) -> None:
    code, output = server.run(place, "small", "--model_cfg.paligemma_variant.vocab_size", "40")
    assert code == 2 and "the model's vocabulary has 40" in output, output


def test_a_config_error_is_reported_by_whichever_process_leaves_first(place: Workplace, tmp_path: Path) -> None:
    # Rank 0 starts late, so that torchrun ends it before it has said a word.
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import os, sys, time\nif os.environ.get('RANK') == '0' and 'run.py' in ' '.join(sys.orig_argv): time.sleep(3)\n"
    )
    status = tmp_path / "status.json"
    code, _ = place.run(
        "--modle_cfg", "1", processes=2, VLA_STATUS_FILE=str(status), VLA_ATTEMPT="9", PYTHONPATH=str(late)
    )
    assert code == 1  # torchrun's
    record = json.loads(status.read_text())
    assert (record["attempt"], record["error_kind"]) == ("9", "config")


def test_a_second_job_is_refused_while_the_first_lives(place: Workplace, server: ForkServer) -> None:
    first = server.start(place, "locked", "--n_updates", "2000", "--save_model_freq", "1000")
    first.wait_for_step(1)
    code, output = server.run(place, "locked")
    assert code == 2 and f"process {first.pids[0]}" in output and "in use" in output
    assert place.status("locked")["state"] == "running"
    first.kill_all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_the_run_continues(
    place: Workplace, server: ForkServer, through: str, number: signal.Signals
) -> None:
    name = f"stopped_{number.name}"
    process = place.start("--name", name, "--save_model_freq", "1000")
    place.wait_for_step(name, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    status = place.status(name)
    by_person = number is signal.SIGINT
    assert status["state"] == ("stopped" if by_person else "preempted"), output
    assert status["reason"] == ("Ctrl-C" if by_person else "received SIGTERM")
    assert place.checkpoint(name).name == f"step_{status['step']:08d}"
    command = f"{starter()} {RUN} --config_path {place.folder / 'tiny.yaml'} --name {name} "
    assert f"to continue: {command}" in last_line(output)
    assert not by_person or "once more leaves at once" in output
    code, output = server.run(place, name)
    assert code == 0, output
    losses = [line["loss"] for line in place.metrics(name)]
    assert losses == pytest.approx([line["loss"] for line in place.metrics(through)], rel=1e-5)


def starter() -> str:
    """What a person starts Python with: uv says in ``UV`` that it started us."""
    return "uv run python" if "UV" in os.environ else "python"


def last_line(output: str) -> str:
    """What a person sees last."""
    return output.strip().splitlines()[-1]


def test_ctrl_c_leaves_a_start_at_once(place: Workplace, tmp_path: Path) -> None:
    told = tmp_path / "status.json"
    process = place.start("--name", "left", VLA_STATUS_FILE=str(told), VLA_ATTEMPT="7")
    while not told.exists():  # written before torch is imported
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    record = json.loads(told.read_text())
    assert (record["attempt"], record["state"], record["reason"]) == ("7", "stopped", "Ctrl-C")
    assert last_line(output).startswith(f"Ctrl-C: left at once; to continue: {starter()} ")


def test_ranks_end_when_their_torchrun_is_killed(place: Workplace) -> None:
    process = place.start("--name", "orphans", processes=2)  # while they import
    while len(ranks := [p for p in psutil.Process(process.pid).children() if str(RUN) in p.cmdline()]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    output = orphaned(process, ranks)
    assert "torchrun, which started this process, is gone" in output
    process = place.start(
        "--name", "orphans", "--n_updates", "5000", "--eval_freq", "0", processes=2
    )  # while they train
    place.wait_for_step("orphans", 3, process)
    output = orphaned(process, psutil.Process(process.pid).children())
    status = place.status("orphans")
    assert status["state"] == "preempted" and status["reason"] == "torchrun, which started this process, is gone", (
        output
    )
    assert place.checkpoint("orphans").name == f"step_{status['step']:08d}"


def orphaned(process: subprocess.Popen, ranks: list[psutil.Process]) -> str:
    """Kills torchrun; the output of its ranks, which must end by themselves."""
    process.kill()
    _, left = psutil.wait_procs(ranks, timeout=120)
    for rank in left:
        rank.kill()
    output, _ = process.communicate()
    assert not left, output
    return output


def test_a_loss_that_is_not_finite_stops_before_the_update(place: Workplace, server: ForkServer) -> None:
    code, output = server.run(place, "exploding", "--model_cfg.optimizer_lr", "1e30", "--max_grad_norm", "0")
    assert code == 1
    status = place.status("exploding")
    assert status["state"] == "failed" and status["error_kind"] == "runtime"
    assert "is not finite" in status["reason"] or "although every loss is finite" in status["reason"]
    assert "update" in status["reason"] and "sample" in status["reason"] and "weights are unchanged" in status["reason"]
    assert "FloatingPointError" in output


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(place: Workplace, server: ForkServer, through: str) -> None:
    small = place.folder / "small_disk"
    small.mkdir()
    size = sum(p.stat().st_size for p in place.checkpoint(through).rglob("*") if p.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size) + 200_000}", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        # Room for one checkpoint, not for two: update 4's stays, those of 8, 12 and 16 fail, and the third is one too many.
        code, output = server.run(place, "full", VLA_LOG_DIR=str(small))
        assert code == 1, output
        assert "the checkpoint at update 8 could not be written" in output and "training goes on" in output
        assert "GB are free" in output  # seen before anything is written; a write that fails is tested elsewhere
        assert {p.name for p in (small / "full" / "checkpoints").iterdir()} == {"step_00000004", "last"}
        status = json.loads((small / "full" / "status.json").read_text())
        assert status["state"] == "failed" and "update 16 could not be written" in status["reason"]
        # With room again it continues from what survived.
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(small)], check=True)
        code, output = server.run(place, "full", VLA_LOG_DIR=str(small))
        assert code == 0 and "step_00000004" in output, output
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_damaged_checkpoint_is_passed_over(place: Workplace, server: ForkServer, through: str) -> None:
    run = place.folder / "runs" / "damaged"
    shutil.copytree(place.folder / "runs" / "through", run, symlinks=True)
    weights = run / "checkpoints" / "step_00000020" / "pretrained_model" / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    code, output = server.run(place, "damaged", ranks=2)
    assert code == 0, output
    assert "is damaged and was renamed to damaged_step_00000020" in output and "checksum" in output
    assert what_was_computed(place.metrics("damaged")) == what_was_computed(place.metrics(through))
    assert weights.read_bytes() == (place.checkpoint(through) / "pretrained_model/model.safetensors").read_bytes()


def test_weights_of_another_run_can_be_the_start(place: Workplace, server: ForkServer, through: str) -> None:
    source = place.folder / "runs" / "through"
    code, output = server.run(place, "tuned", "--load_from_checkpoint", str(source), "--n_updates", "1")
    assert code == 0, output
    assert "weights from" in output and "taking weights of" in output
    assert place.metrics("tuned")[0]["loss"] < place.metrics(through)[0]["loss"]


BAD = {
    "data": (["--data.train.datasets.0.root", "/nowhere/data"], "/nowhere/data does not exist"),
    "weights": (["--load_from_checkpoint", "/nowhere/weights"], "load_from_checkpoint: there is no file or folder"),
    "camera": (
        ["--data.train.datasets.0.cameras", "{observation.images.wrist: observation.images.front}"],
        "observation.images.wrist",
    ),
    "tokenizer": (["--model_cfg.tokenizer_path", "/nowhere/tokenizer"], "model_cfg.tokenizer_path"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_exit_code_2(
    place: Workplace, server: ForkServer, case: str, tmp_path: Path
) -> None:
    overrides, message = BAD[case]
    if case == "camera":
        overrides = [*overrides, "--model_cfg.input_features", json.dumps(INPUT_FEATURES)]
    status = tmp_path / "status.json"
    code, output = server.run(place, f"bad_{case}", *overrides, VLA_STATUS_FILE=str(status), VLA_ATTEMPT="17-0")
    assert code == 2, output
    assert message in output and "Traceback" not in output
    record = json.loads(status.read_text())
    assert (record["state"], record["error_kind"], record["attempt"]) == ("failed", "config", "17-0")
    assert message in record["reason"]


INPUT_FEATURES = {
    "observation.images.front": {"type": "VISUAL", "shape": [3, 32, 32]},
    "observation.state": {"type": "STATE", "shape": [7]},
}


def test_weights_of_another_shape_are_refused(place: Workplace, server: ForkServer, through: str) -> None:
    source = str(place.checkpoint(through))
    code, output = server.run(place, "wide", "--load_from_checkpoint", source, "--model_cfg.max_action_dim", "7")
    assert code == 2
    assert "other shape: model.action_in_proj.weight: [32, 8] in the file, [32, 7] in the model" in output
