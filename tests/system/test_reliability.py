"""What a run promises when things go wrong, with real processes and real signals.

Run with ``uv run pytest tests/system/test_reliability.py``. docs/reliability.md lists the guarantees by these numbers.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import time

import psutil
import pytest
import torch
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import Workplace
from support.records import (
    offline_records,
    recorded,
    records,
    samples_of_updates,
    wandb_process,
    wandb_processes,
    what_was_computed,
)

from agent.checkpoints import tensor_reader
from agent.checkpoints.manifest import files_of
from agent.optim.learning_rate import LearningRate

FOUR = ("--per_device_batch_size", "1")  # with a global batch of 8 on four ranks: accumulation 2


@pytest.fixture(scope="module")
def through(place: Workplace, server: ForkServer) -> str:
    """20 updates on four ranks with accumulation 2, recorded; nothing interrupts them."""
    output = server.start(place, "through", *FOUR, ranks=4, hook="record", **recorded(place, "through")).wait()
    assert place.status("through")["state"] == "finished", output
    return "through"


def test_g3_when_every_checkpoint_is_damaged_the_run_does_not_start_over(
    place: Workplace, server: ForkServer, through: str
) -> None:
    run = place.folder / "runs" / "g3"
    shutil.copytree(place.folder / "runs" / through, run, symlinks=True)
    for file, damage in (("pretrained_model/model.safetensors", -1), ("training_state/state.json", 0)):
        path = sorted(run.glob("checkpoints/step_*"))[damage] / file
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)
    for said in ("every checkpoint of this run is damaged", "none that it could continue from"):
        output = server.start(place, "g3", *FOUR, ranks=2).wait()
        assert place.status("g3")["state"] == "failed" and said in place.status("g3")["reason"], output
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"damaged_step_00000016", "damaged_step_00000020"}


def test_g3_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_damaged(
    place: Workplace, server: ForkServer, through: str
) -> None:
    run = place.folder / "runs" / "g3-moment"
    shutil.copytree(place.folder / "runs" / through, run, symlinks=True)
    more = (*FOUR, "--n_updates", "22", "--resume_changes", "true")
    output = server.start(place, "g3-moment", *more, ranks=2, hook="unanswered_files").wait()
    status = place.status("g3-moment")
    assert status["error_kind"] == "runtime" and "Stale file handle" in status["reason"], output  # and is requeued
    output = server.start(place, "g3-moment", *more, ranks=2).wait()
    status = place.status("g3-moment")
    assert status["state"] == "finished" and status["attempts"][-1]["first_step"] == 20, output
    assert not list(run.glob("checkpoints/damaged*"))


def test_weights_that_nothing_can_continue_from_are_not_overwritten(place: Workplace, server: ForkServer) -> None:
    few = ("--n_updates", "6", "--save_model_freq", "2", "--keep_checkpoints", "3", "--keep_training_states", "1")
    server.start(place, "weights", *few, "--eval_freq", "0").wait()
    folder = place.folder / "runs" / "weights" / "checkpoints"
    (folder / "step_00000006").rename(folder / "damaged_step_00000006")
    for resume_run, said in (
        ("false", "exists and would be overwritten"),
        ("true", "none that it could continue from"),
    ):
        output = server.start(place, "weights", *few, "--eval_freq", "0", "--resume_run", resume_run).wait()
        status = place.status("weights")
        assert status["error_kind"] == "config" and said in status["reason"], output
    assert {p.name for p in folder.glob("*step*")} == {"damaged_step_00000006", "step_00000002", "step_00000004"}


def test_g3_damage_to_any_file_of_the_newest_checkpoint(place: Workplace, server: ForkServer, through: str) -> None:
    files = [p for p in sorted(place.checkpoint(through).rglob("*")) if p.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        name = f"g3-{number}"
        run = place.folder / "runs" / name
        shutil.copytree(place.folder / "runs" / through, run, symlinks=True)
        damaged = run / "checkpoints" / "step_00000020" / file.relative_to(place.checkpoint(through))
        contents = damaged.read_bytes()
        damaged.write_bytes(b"\0" * (len(contents) // 4 + 1) + contents[len(contents) // 4 + 1 :])
        output = server.start(place, name, "--per_device_batch_size", "8", "--eval_freq", "0").wait()
        assert place.status(name)["state"] == "finished", f"{damaged}\n{output}"
        assert "damaged_step_00000020" in output and place.status(name)["attempts"][-1]["first_step"] == 16


def test_g5_resume_is_bit_identical_on_four_ranks(place: Workplace, through: str, server: ForkServer) -> None:
    expected = {r["step"]: r["digest"] for r in records(place, through, 0)}
    for attempt, kill_at in enumerate([3, 6, 11, 17, None]):
        run = server.start(place, "g5", *FOUR, ranks=4, hook="record", **recorded(place, "g5"))
        if kill_at is None:
            output = run.wait()
        else:
            run.wait_for_step(kill_at)
            run.kill_all()
            assert len(place.status("g5")["attempts"]) == attempt + 1
            if kill_at > 10:  # since the validation at update 10
                assert (place.folder / "runs" / "g5" / "report.html").exists()
    assert place.status("g5")["state"] == "finished", output
    for rank in range(4):
        found = records(place, "g5", rank)
        assert len(found) > 20  # some updates were done twice
        # The state before every update, the first ones after each start included.
        assert [r["digest"] for r in found] == [expected[r["step"]] for r in found]
    assert what_was_computed(place.metrics("g5")) == what_was_computed(place.metrics(through))
    assert place.tensors("g5") == place.tensors(through)
    status = place.status("g5")
    assert status["restarts"] == 4 and status["updates_redone"] > 0 and 0 < status["ettr"] < 1


def test_g6_resume_on_other_world_sizes(place: Workplace, through: str, server: ForkServer) -> None:
    for ranks, until in ((4, 6), (2, 13), (1, None)):
        run = server.start(place, "g6", *FOUR, ranks=ranks, hook="record", **recorded(place, "g6"))
        if until is not None:
            run.wait_for_step(until)
            (place.folder / "runs" / "g6" / "stop").write_text("another world size")
            run.wait()
            assert place.status("g6")["state"] == "preempted" and place.status("g6")["reason"] == "another world size"
    output = run.wait()
    assert place.status("g6")["state"] == "finished", output
    # Noise and time come from the same draws; the time is recorded beside each sample.
    assert samples_of_updates(place, "g6", 4) == samples_of_updates(place, through, 4)
    for ours, theirs in zip(place.metrics("g6"), place.metrics(through), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_g7_the_samples_are_those_of_the_uninterrupted_run(place: Workplace, server: ForkServer) -> None:
    datasets = [{"repo_id": "test/data", "root": str(place.folder / "data"), "weight": 1.0}]
    for number, weight in ((1, 2.0), (2, 0.5)):
        root = write_dataset(place.folder / f"mixed{number}", episodes=3, length=9, seed=number)
        datasets.append({"repo_id": f"test/mixed{number}", "root": str(root), "weight": weight})
    # About 90 training frames: an epoch ends at update 11 or 12.
    mixed = (
        "--data.train.datasets",
        json.dumps(datasets),
        "--save_model_freq",
        "1",
        "--n_updates",
        "24",
        "--eval_freq",
        "0",
    )
    hook = {"hook": "record"}
    server.start(place, "g7", *mixed, **hook, **recorded(place, "g7")).wait()  # type: ignore[arg-type]
    for workers, kill_at in (("2", 5), ("4", 11), ("0", 12), ("2", None)):
        run = server.start(
            place, "g7-killed", *mixed, "--data.train.num_workers", workers, **hook, **recorded(place, "g7-killed")
        )  # type: ignore[arg-type]
        if kill_at is None:
            run.wait()
        else:
            run.wait_for_step(kill_at)
            run.kill_all()
    assert place.status("g7-killed")["state"] == "finished", run.output()
    expected, found = (samples_of_updates(place, name, 1) for name in ("g7", "g7-killed"))
    assert found == expected and len(expected) == 24
    assert {sample[1] for samples in expected.values() for sample in samples} == {0, 1, 2}
    assert what_was_computed(place.metrics("g7-killed")) == what_was_computed(place.metrics("g7"))


def test_another_global_batch_goes_on_with_the_next_sample(place: Workplace, server: ForkServer) -> None:
    common = ("--per_device_batch_size", "4", "--save_model_freq", "2", "--eval_freq", "0", "--resume_changes", "true")
    for batch, updates in ((8, 2), (4, 6)):
        sizes = ("--global_batch_size", str(batch), "--n_updates", str(updates))
        run = server.start(place, "batch", *common, *sizes, hook="record", **recorded(place, "batch"))
        output = run.wait()
        assert place.status("batch")["state"] == "finished", output
    numbers = [
        [sample[0] for sample in samples] for _, samples in sorted(samples_of_updates(place, "batch", 1).items())
    ]
    assert numbers == [list(range(k, k + size)) for k, size in ((0, 8), (8, 8), (16, 4), (20, 4), (24, 4), (28, 4))]
    epochs = [line["epoch"] for line in place.metrics("batch")]
    assert epochs == sorted(epochs) and place.metrics("batch")[-1]["samples_seen"] == 32


@pytest.mark.parametrize(("error", "kind"), [("RuntimeError", "runtime"), ("ValueError", "config")])
def test_the_error_of_a_rank_that_cannot_build_is_the_runs(
    place: Workplace, server: ForkServer, error: str, kind: str
) -> None:
    name = f"unbuilt-{error}"
    output = server.start(place, name, ranks=2, hook="fail_on_rank_1_while_building", BROKEN=error).wait()
    status = place.status(name)
    told = "rank 1: RuntimeError: no such kernel here" if kind == "runtime" else "rank 1: no such kernel here"
    assert (status["state"], status["error_kind"], status["reason"]) == ("failed", kind, told), output
    assert output.count(f"error: {told}\n") == 1, output


@pytest.mark.parametrize("how", ["one rank", "different ranks", "twice", "file", "environment"])
def test_g8_a_stop_request_ends_all_ranks_at_one_update(place: Workplace, server: ForkServer, how: str) -> None:
    name = f"g8-{how.replace(' ', '-')}"
    stop_file = place.folder / f"{name}.stop"
    endless = ("--n_updates", "5000", "--save_model_freq", "5000", "--eval_freq", "0")
    run = server.start(place, name, *FOUR, *endless, ranks=4, VLA_STOP_FILE=str(stop_file))
    run.wait_for_step(3)
    if how == "file":
        (place.folder / "runs" / name / "stop").touch()
    elif how == "environment":
        stop_file.write_text("the time limit is near")
    else:
        run.kill(2, signal.SIGUSR1)
        if how == "different ranks":
            run.kill(0, signal.SIGTERM)
        if how == "twice":
            run.kill(2, signal.SIGUSR1)
    output = run.wait(timeout=30)
    status = place.status(name)
    assert status["state"] == "preempted", output
    assert output.count("preempted at update") == 1
    assert place.checkpoint(name).name == f"step_{status['step']:08d}"
    assert len(list(place.checkpoint(name).parent.glob("step_*"))) == 1
    assert status["attempts"][-1]["checkpoint_step"] == status["step"] == place.metrics(name)[-1]["step"]
    assert how != "environment" or status["reason"] == "the time limit is near"


@pytest.mark.parametrize("when", ["save", "build"])
def test_g8_a_stop_request_at_an_awkward_moment(place: Workplace, server: ForkServer, when: str) -> None:
    name = f"g8-during-{when}"
    hook = {"save": "slow_save", "build": "slow_start"}[when]
    run = server.start(place, name, "--n_updates", "500", ranks=2, hook=hook)
    run.wait_for_output(f"{when} begins")
    run.kill(1, signal.SIGTERM)
    output = run.wait(timeout=60)
    status = place.status(name)
    assert status["state"] == "preempted", output
    assert when == "save" or status["step"] == 0
    if status["step"]:
        assert place.checkpoint(name).name == f"step_{status['step']:08d}"
    # And it continues.
    run = server.start(place, name, "--n_updates", "500", ranks=2)
    run.wait_for_step(status["step"] + 2)
    run.kill_all()


def test_a_second_ctrl_c_does_not_wait_for_the_save(place: Workplace, server: ForkServer) -> None:
    run = server.start(place, "twice", "--n_updates", "500", "--eval_freq", "0", hook="slow_save", SAVE_S="60")
    run.wait_for_output("save begins")
    run.kill(0, signal.SIGINT)
    run.wait_for_output("once more leaves at once")
    time.sleep(0.6)  # nearer together they are one press, which torchrun or uv has doubled
    run.kill(0, signal.SIGINT)
    output = run.wait(timeout=60)
    status = place.status("twice")
    assert (status["state"], status["reason"]) == ("stopped", "Ctrl-C twice") and "Traceback" not in output, output
    assert "Ctrl-C twice: left at once; " in output and "stopped at update" not in output


VALIDATING = ("--eval_size", "12", "--ema_decay", "0.9")  # six batches of two samples, on two ranks


@pytest.fixture(scope="module")
def validated(place: Workplace, server: ForkServer) -> str:
    """20 updates on two ranks with three validations, which nothing interrupts."""
    output = server.start(place, "validated", *VALIDATING, ranks=2).wait()
    assert place.status("validated")["state"] == "finished", output
    return "validated"


def all_validations(place: Workplace, name: str) -> dict[str, bytes]:
    """The records of every validation, and which checkpoint is the best."""
    run = place.folder / "runs" / name
    records = {path.name: path.read_bytes() for path in (run / "validation").glob("*.json")}
    return records | {"best": (run / "checkpoints" / "best").readlink().name.encode()}


@pytest.mark.parametrize(("begun", "step"), [(1, 0), (2, 10), (3, 10), (4, 20)])
def test_g8_a_validation_is_cut_short_by_a_stop_and_made_by_the_next_start(
    place: Workplace, server: ForkServer, validated: str, begun: int, step: int
) -> None:
    name = f"g8-validation-{begun}"  # the third is of the averaged weights
    hook = "slow_validation"
    run = server.start(place, name, *VALIDATING, ranks=2, hook=hook)
    while run.output().count("validation begins") < 2 * begun - 1:
        assert run.alive(), run.output()
        time.sleep(0.02)
    run.kill(1, signal.SIGTERM)
    output = run.wait(timeout=60)
    assert output.count("validation ends") == 2 * (begun - 1), output
    status = place.status(name)
    assert (status["state"], status["step"]) == ("preempted", step), output
    assert [line["step"] for line in place.metrics(name)] == list(range(1, step))
    assert not step or place.checkpoint(name).name == f"step_{step:08d}"
    # Stopped once more in the same validation, and continued.
    run = server.start(place, name, *VALIDATING, ranks=2, hook=hook)
    run.wait_for_output("validation begins")
    run.kill(0, signal.SIGTERM)
    output = run.wait(timeout=60)
    status = place.status(name)
    assert (status["state"], status["step"]) == ("preempted", step) and "validation ends" not in output, output
    output = server.start(place, name, *VALIDATING, ranks=2).wait()
    assert place.status(name)["state"] == "finished", output
    assert what_was_computed(place.metrics(name)) == what_was_computed(place.metrics(validated))
    assert all_validations(place, name) == all_validations(place, validated)
    if step == 20:  # nothing was saved since
        output = server.start(place, name, *VALIDATING, ranks=2, hook=hook).wait()
        assert "this run is finished" in output and "validation begins" not in output


def test_g8_a_validation_that_was_cut_short_can_be_turned_off(place: Workplace, server: ForkServer) -> None:
    name, hook = "g8-validation-off", "slow_validation"
    run = server.start(place, name, *VALIDATING, ranks=2, hook=hook)
    while run.output().count("validation begins") < 3:
        assert run.alive(), run.output()
        time.sleep(0.02)
    run.kill(0, signal.SIGTERM)
    run.wait(timeout=60)
    assert [line["step"] for line in place.metrics(name)] == list(range(1, 10))
    output = server.start(place, name, *VALIDATING, "--eval_freq", "0", ranks=2, hook=hook).wait()
    assert place.status(name)["state"] == "finished" and "validation begins" not in output, output
    assert [line["step"] for line in place.metrics(name)] == list(range(1, 21))


def test_an_update_that_finds_no_memory_says_what_to_write(place: Workplace, server: ForkServer) -> None:
    output = server.start(place, "no-memory", ranks=2, hook="memory_exhausted").wait()
    status = place.status("no-memory")
    assert (status["state"], status["error_kind"], status["step"]) == ("failed", "runtime", 3), output
    for wanted in ("2.00 GiB", "a smaller per_device_batch_size than 2", "optimizer: adamw8bit", "parallel: fsdp"):
        assert wanted in status["reason"], status


def test_g8_a_crash_after_a_validation_that_was_made_later_repeats_no_line(
    place: Workplace, server: ForkServer, validated: str
) -> None:
    name = "g8-validation-crash"
    run = server.start(place, name, *VALIDATING, ranks=2, hook="slow_validation")
    while run.output().count("validation begins") < 3:
        assert run.alive(), run.output()
        time.sleep(0.02)
    run.kill(0, signal.SIGTERM)
    run.wait(timeout=60)
    late = ("--save_model_freq", "1000", "--resume_changes", "true")  # so that update 10 stays the last one saved
    run = server.start(place, name, *VALIDATING, *late, ranks=2)
    run.wait_for_step(12)
    run.kill_all()
    output = server.start(place, name, *VALIDATING, ranks=2).wait()
    assert place.status(name)["state"] == "finished", output
    assert what_was_computed(place.metrics(name)) == what_was_computed(place.metrics(validated))


def test_g9_when_a_rank_dies_the_others_leave_without_saving(place: Workplace, server: ForkServer) -> None:
    endless = ("--n_updates", "5000", "--save_model_freq", "5000", "--eval_freq", "0")
    run = server.start(place, "g9-kill", *FOUR, *endless, ranks=4)
    run.wait_for_step(3)
    run.kill(1)
    output = run.wait(timeout=30)
    status = place.status("g9-kill")
    assert (status["state"], status["error_kind"]) == ("failed", "runtime"), output
    assert not list((place.folder / "runs" / "g9-kill").glob("checkpoints/*"))


def test_g9_a_hang_ends_with_the_stacks_of_every_rank(place: Workplace, server: ForkServer) -> None:
    endless = ("--n_updates", "5000", "--eval_freq", "0", "--hang_timeout_minutes", "0.05")
    run = server.start(place, "g9-stop", *endless, ranks=2)
    run.wait_for_step(3)
    run.kill(1, signal.SIGSTOP)
    run.wait_for_output("ending the run", timeout=30)
    output = run.wait(timeout=30)
    assert "no progress for" in output and "in: update" in output
    for pid in run.pids:
        assert f"process {pid}" in output
    # Both printed where they were: two dumps, each of which goes down to the training loop, wherever in it they were.
    assert len(re.findall(r'trainer\.py", line \d+ in train$', output, re.MULTILINE)) >= 2, output
    status = place.status("g9-stop")
    assert status["state"] == "failed" and status["reason"].startswith("hang: no progress")


def test_g9_what_fails_while_a_hang_is_ended_is_not_the_reason(place: Workplace, server: ForkServer) -> None:
    brief = ("--n_updates", "6", "--hang_timeout_minutes", "0.03")
    output = server.start(place, "g9-ending", *brief, hook="fail_while_ending").wait()
    status = place.status("g9-ending")
    assert status["state"] == "failed" and status["reason"].startswith("hang: no progress"), output
    assert status["error_kind"] == "runtime"


def test_checkpoints_by_the_clock_and_retention(place: Workplace, server: ForkServer) -> None:
    often = ("--n_updates", "60", "--save_model_freq", "5000", "--checkpoint_interval_minutes", "0.005")
    kept = ("--keep_checkpoints", "3", "--keep_training_states", "1", "--eval_freq", "0")
    output = server.start(place, "clock", *often, *kept).wait()
    assert place.status("clock")["state"] == "finished", output
    assert output.count("checkpoint at update") >= 3
    folders = sorted(place.checkpoint("clock").parent.glob("step_*"))
    assert [(folder / "training_state").exists() for folder in folders] == [False, False, True]
    assert all((folder / "pretrained_model" / "model.safetensors").exists() for folder in folders)


def test_the_wait_for_checkpoints_is_counted_once_and_to_the_last(place: Workplace, server: ForkServer) -> None:
    often = ("--n_updates", "5", "--save_model_freq", "1", "--eval_freq", "0", "--per_device_batch_size", "8")
    output = server.start(place, "waits", *often, hook="slow_save").wait()
    assert place.status("waits")["state"] == "finished", output
    (attempt,) = place.status("waits")["attempts"]
    since_the_first_update = attempt["ended"] - attempt["started"] - attempt["first_update_s"]
    assert 5 <= attempt["checkpoint_stall_s"] < since_the_first_update + 0.1  # a second each, at least


def test_a_checkpoint_holds_the_state_of_its_update_however_late_it_is_copied(
    place: Workplace, server: ForkServer
) -> None:
    few = ("--n_updates", "6", "--save_model_freq", "2", "--eval_freq", "0", "--keep_checkpoints", "3")
    for name, hook in (("in time", None), ("late", "slow_copies")):
        output = server.start(place, name, *few, ranks=2, hook=hook).wait()
        assert place.status(name)["state"] == "finished", output
    for step in (2, 4, 6):
        in_time, late = (place.folder / "runs" / name / f"checkpoints/step_{step:08d}" for name in ("in time", "late"))
        tensors = {path: known for path, known in files_of(in_time).items() if path.endswith(".safetensors")}
        assert len(tensors) >= 2
        assert {path: files_of(late)[path] for path in tensors} == tensors


@pytest.mark.slow
def test_g12_every_step_is_logged_once_after_any_history(place: Workplace, server: ForkServer, through: str) -> None:
    draw = random.Random(12)
    for _ in range(20):
        run = server.start(place, "g12", *FOUR, "--save_model_freq", "1", ranks=2)
        time.sleep(draw.uniform(0.5, 2.5))
        run.kill_all()
    output = server.start(place, "g12", *FOUR, "--save_model_freq", "1", ranks=2).wait()
    assert place.status("g12")["state"] == "finished", output
    lines = place.metrics("g12")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["loss"] for line in lines] == pytest.approx([x["loss"] for x in place.metrics(through)], rel=1e-5)


def test_an_update_is_adamw_on_the_clipped_gradient_of_the_mean_loss(place: Workplace, server: ForkServer) -> None:
    lr = [LearningRate.plan(1e-3, 1e-4, 2, None, 5).at(update) for update in range(5)]
    adamw = {"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.5}
    reference = {"lr": lr, "adamw": adamw, "max_norm": 0.25, "target": str(place.folder / "reference")}
    given = [("optimizer_lr", 1e-3), ("scheduler_decay_lr", 1e-4), *((f"optimizer_{key}", adamw[key]) for key in adamw)]
    options = [text for key, value in given for text in (f"--model_cfg.{key}", str(value))]
    options += ["--n_updates", "5", "--eval_freq", "0", "--max_grad_norm", "0.25"]
    hook = "follow_a_reference"
    output = server.start(place, "reference", *options, hook=hook, REFERENCE=json.dumps(reference)).wait()
    assert place.status("reference")["state"] == "finished", output
    expected = [json.loads(line) for line in (place.folder / "reference").read_text().splitlines()]
    for line, other, rate in zip(place.metrics("reference"), expected, lr, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line["lr"] == pytest.approx(rate)
        assert other["furthest"] < 1e-6  # of the 1e-3 that an update moves a weight


def test_deterministic_kernels_are_asked_for(place: Workplace, server: ForkServer) -> None:
    brief = ("--n_updates", "1", "--eval_freq", "0", "--deterministic", "true")
    output = server.start(place, "deterministic", *brief, hook="report_determinism").wait()
    assert "deterministic: True, benchmark: False, workspace: :4096:8, filled: False" in output


@pytest.mark.parametrize("most", [0.0, 0.25])
def test_the_optimizer_gets_gradients_of_at_most_max_grad_norm(
    place: Workplace, server: ForkServer, most: float
) -> None:
    name = f"clipped-{most}"
    limits = ("--n_updates", "1", "--eval_freq", "0", "--max_grad_norm", str(most))
    output = server.start(place, name, *limits, "--model_cfg.optimizer_betas", "[0.5, 0.95]").wait()
    assert place.status(name)["state"] == "finished", output
    (path,) = place.checkpoint(name).glob("training_state/optimizer*.safetensors")
    # After its first update AdamW's first moment is (1 - beta1) times the gradient that it was given.
    given = [2 * tensor for key, tensor in tensor_reader.read(path).items() if key.startswith("exp_avg/")]
    norm = float(torch.cat([tensor.flatten() for tensor in given]).norm())
    (line,) = place.metrics(name)
    assert line["grad_norm"] > 1  # the norm before clipping
    assert norm == pytest.approx(most or line["grad_norm"], rel=1e-4)


def test_g17_a_validation_that_cannot_be_drawn_does_not_end_the_run(place: Workplace, server: ForkServer) -> None:
    few = ("--n_updates", "2", "--eval_freq", "1", "--eval_start", "false")
    output = server.start(place, "undrawn", *few, hook="broken_picture").wait()
    assert place.status("undrawn")["state"] == "finished", output
    assert output.count("could not be drawn") == 2 and "ZeroDivisionError: no pixels" in output
    assert len(list((place.folder / "runs" / "undrawn" / "validation").glob("*.json"))) == 2


@pytest.mark.slow
def test_g17_a_storm_with_wandbs_processes_among_what_is_killed(
    place: Workplace, server: ForkServer, validated: str
) -> None:
    gate, folder = place.folder / "g17.gate", place.folder / "runs" / "g17"
    endings = ["SIGTERM", "all killed", "SIGKILL", "all asked", "all asked", "its parent", "all killed", "SIGSTOP"]
    run, open_to = None, 0
    for ending in [*endings, "SIGKILL", "finished"]:
        open_to += 1 if ending != "finished" else 20
        gate.write_text(str(open_to))
        if run is None:
            wandb = (*VALIDATING, "--use_wandb", "true", "--wandb.mode", "offline")
            run = server.start(place, "g17", *wandb, ranks=2, hook="gated", GATE=str(gate))
        if ending == "finished":
            break
        run.wait_for_step(open_to)
        if ending == "all killed":
            with contextlib.suppress(psutil.Error):  # wandb's have perhaps ended by themselves
                for process in wandb_processes(folder):
                    process.kill()
            run.kill_all()
            run = None
            continue
        service = wandb_process(folder)
        if ending == "its parent":
            service.parent().kill()  # type: ignore[union-attr]
            continue
        service.send_signal(signal.SIGTERM if ending == "all asked" else getattr(signal, ending))
        open_to += 1  # training goes on, with one more update at least
        if ending == "all asked":
            service.parent().terminate()  # type: ignore[union-attr]
            for rank in range(2):
                run.kill(rank, signal.SIGTERM)
        gate.write_text(str(open_to))
        run.wait_for_step(open_to)
        if ending == "all asked":
            output = run.wait(timeout=60)
            status, run = place.status("g17"), None
            assert (status["state"], status["step"]) == ("preempted", open_to), output
        elif ending == "SIGSTOP":
            service.kill()
    output = run.wait()  # type: ignore[union-attr]
    assert place.status("g17")["state"] == "finished" and place.status("g17")["restarts"] == 4, output
    assert what_was_computed(place.metrics("g17")) == what_was_computed(place.metrics(validated))
    assert place.tensors("g17") == place.tensors(validated)
    assert all_validations(place, "g17") == all_validations(place, validated)
    (newest,) = folder.glob("wandb/offline-run-*")
    _, (start, *history) = offline_records(newest)
    assert start["_step"] == 0 and start["val/loss"] > 0  # the validation of the starting weights
    shown = [(entry["_step"], entry["loss"]) for entry in history]
    assert shown == [(line["step"], line["loss"]) for line in place.metrics("g17")]


def test_g13_a_gradient_that_is_not_finite_is_skipped_by_all(place: Workplace, server: ForkServer) -> None:
    two = ("--per_device_batch_size", "4", "--skip_nonfinite", "2", "--n_updates", "12", "--eval_freq", "0")
    broken = {"hook": "infinite_gradient", "BREAK_AT": "[5, 6, 9]"}
    run = server.start(place, "g13", *two, ranks=2, **broken)  # type: ignore[arg-type]
    output = run.wait()
    assert place.status("g13")["state"] == "finished", output
    lines = place.metrics("g13")
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [5, 6, 9]
    assert lines[-1]["skipped_updates"] == 3
    assert "although every loss is finite" in output and "skipped (2 in a row, 2 in all)" in output
    # The counts are resumed, and one more in a row than allowed ends the run before the update.
    state = json.loads((place.checkpoint("g13") / "training_state" / "state.json").read_text())
    assert (state["skipped_updates"], state["skipped_in_a_row"]) == (3, 0)
    broken = {"hook": "infinite_gradient", "BREAK_AT": "[2, 3, 4]"}
    output = server.start(place, "g13-stop", *two, ranks=2, **broken).wait()  # type: ignore[arg-type]
    status = place.status("g13-stop")
    assert status["state"] == "failed" and "FloatingPointError: update 4" in status["reason"], output


def test_g13_a_skipped_update_changes_nothing(place: Workplace, server: ForkServer) -> None:
    two = ("--per_device_batch_size", "4", "--skip_nonfinite", "9", "--n_updates", "6", "--eval_freq", "0")
    environment = {"BREAK_AT": "[1, 2, 3, 4, 5, 6]", **recorded(place, "g13-same")}
    output = server.start(place, "g13-same", *two, ranks=2, hook="record_and_break", **environment).wait()
    assert place.status("g13-same")["state"] == "finished", output
    digests = {r["digest"] for rank in range(2) for r in records(place, "g13-same", rank)}
    assert len(digests) == 1  # weights and optimizer on both ranks, before each of the six updates


def test_g13_a_run_that_has_skipped_every_update_continues(place: Workplace, server: ForkServer) -> None:
    two = ("--per_device_batch_size", "4", "--skip_nonfinite", "9", "--save_model_freq", "2", "--eval_freq", "0")
    broken = {"hook": "infinite_gradient", "BREAK_AT": "[1, 2]"}
    server.start(place, "g13-through", *two, "--n_updates", "6", ranks=2, **broken).wait()  # type: ignore[arg-type]
    server.start(place, "g13-none", *two, "--n_updates", "2", ranks=2, **broken).wait()  # type: ignore[arg-type]
    assert place.metrics("g13-none")[-1]["skipped_updates"] == 2
    longer = ("--n_updates", "6", "--resume_changes", "true")
    output = server.start(place, "g13-none", *two, *longer, ranks=2).wait()
    assert place.status("g13-none")["state"] == "finished", output
    assert what_was_computed(place.metrics("g13-none"))[2:] == what_was_computed(place.metrics("g13-through"))[2:]
    assert place.tensors("g13-none") == place.tensors("g13-through")


def test_g14_weights_that_drifted_apart_are_found_before_a_save(place: Workplace, server: ForkServer) -> None:
    run = server.start(place, "g14", ranks=2, hook="flip_a_bit")
    output = run.wait()
    status = place.status("g14")
    assert status["state"] == "failed" and "drifted apart" in status["reason"], output
    assert "rank 1: state_proj.weight" in status["reason"]
    assert {p.name for p in place.checkpoint("g14").parent.iterdir()} == {"step_00000004", "last"}
    assert [line["step"] for line in place.metrics("g14")][-1] == 8
