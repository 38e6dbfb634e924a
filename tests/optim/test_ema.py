"""The moving average of the weights: what it is, that it resumes exactly and that training does not notice it.

Run: uv run pytest tests/optim/test_ema.py      (forked runs of a tiny model, half a minute)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.forked import ForkServer
from support.launching import Workplace

TWO = ("--per_device_batch_size", "2")
SHORT = ("--n_updates", "12", "--save_model_freq", "4", "--eval_freq", "6")
EMA = ("--ema_decay", "0.3")  # which the warm-up reaches at the fourth update


def finish(place: Workplace, server: ForkServer, name: str, *overrides: str, ranks: int = 2, **more) -> str:
    output = server.start(place, name, *TWO, *SHORT, *overrides, ranks=ranks, **more).wait()
    assert place.status(name)["state"] == "finished", output
    return output


@pytest.fixture(scope="module")
def through(place: Workplace, server: ForkServer) -> str:
    """Two ranks, 12 updates, nothing interrupts them."""
    finish(place, server, "through", *EMA)
    return "through"


def checkpoint(place: Workplace, name: str, step: int) -> Path:
    return place.folder / "runs" / name / "checkpoints" / f"step_{step:08d}"


def weights(place: Workplace, name: str, step: int, folder: str = "pretrained_model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint(place, name, step) / folder / "model.safetensors")


def everything(place: Workplace, name: str) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    folder = place.checkpoint(name)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert {"pretrained_model/model.safetensors", "pretrained_model_ema/model.safetensors"} <= set(files)
    return files


def record(place: Workplace, name: str, step: int) -> dict:
    return json.loads((place.folder / "runs" / name / "validation" / f"step_{step:08d}.json").read_text())


def trained(place: Workplace, name: str, step: int) -> set[str]:
    """What the updates have changed."""
    before, after = weights(place, name, step - 4), weights(place, name, step)
    return {key for key in after if not torch.equal(before[key], after[key])}


def test_the_average_is_what_the_formula_says(place: Workplace, server: ForkServer, through: str) -> None:
    start = checkpoint(place, through, 12) / "pretrained_model"
    own = ("--n_updates", "6", "--save_model_freq", "1", "--keep_checkpoints", "6", "--eval_freq", "0")
    finish(place, server, "formula", *EMA, *own, "--load_from_checkpoint", str(start), ranks=1)
    average = {key: tensor.double() for key, tensor in load_file(start / "model.safetensors").items()}
    moved = 0.0
    for update in range(6):
        decay = min(0.3, (1 + update) / (10 + update))
        now = weights(place, "formula", update + 1)
        average = {key: decay * average[key] + (1 - decay) * now[key].double() for key in now}
        saved = weights(place, "formula", update + 1, "pretrained_model_ema")
        for key, tensor in saved.items():
            assert tensor.dtype == now[key].dtype
            torch.testing.assert_close(tensor.double(), average[key], rtol=1e-6, atol=1e-8)
            moved = max(moved, float((tensor - now[key]).abs().max()))
    assert moved > 1e-4


def test_training_does_not_notice_it(place: Workplace, server: ForkServer, through: str) -> None:
    finish(place, server, "without", "--eval_freq", "4", "--eval_start", "false")  # nor other validations
    for line, with_ema in zip(place.metrics("without"), place.metrics(through), strict=True):
        assert (line["loss"], line["grad_norm"]) == (with_ema["loss"], with_ema["grad_norm"])
    assert line["val/action_l1"] == with_ema["val/action_l1"]  # the last one
    assert all(
        torch.equal(tensor, weights(place, "without", 12)[key]) for key, tensor in weights(place, through, 12).items()
    )
    assert not (checkpoint(place, "without", 12) / "pretrained_model_ema").exists()


def test_killed_and_continued_is_bit_for_bit_the_same(place: Workplace, server: ForkServer, through: str) -> None:
    run = server.start(place, "killed", *TWO, *SHORT, *EMA, ranks=2)
    run.wait_for_step(7)
    run.kill_all()
    finish(place, server, "killed", *EMA)
    assert place.status("killed")["restarts"] == 1
    assert everything(place, "killed") == everything(place, through)
    assert [record(place, "killed", step) for step in (0, 6, 12)] == [record(place, through, s) for s in (0, 6, 12)]


def test_rounded_files_hold_no_less_for_a_resume(place: Workplace, server: ForkServer, through: str) -> None:
    run = server.start(place, "rounded", *TWO, *SHORT, *EMA, "--save_dtype", "bfloat16", ranks=2)
    run.wait_for_step(6)
    run.kill_all()
    finish(place, server, "rounded", *EMA, "--save_dtype", "bfloat16")
    exact, expected = (
        weights(place, "rounded", 12, "training_state/ema"),
        weights(place, through, 12, "pretrained_model_ema"),
    )
    assert set(exact) == set(expected) and all(torch.equal(exact[key], expected[key]) for key in expected)
    for key, tensor in weights(place, "rounded", 12, "pretrained_model_ema").items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key].bfloat16())


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param((), id="float32"),
        pytest.param(("--precision", "bfloat16_stochastic"), id="bfloat16", marks=pytest.mark.slow),
    ],
)
def test_fsdp_keeps_a_share_of_it_and_resumes_exactly(
    place: Workplace, server: ForkServer, through: str, precision: tuple[str, ...]
) -> None:
    options, name = (*EMA, "--parallel", "fsdp", *precision), f"fsdp{len(precision)}"
    finish(place, server, name, *options)
    run = server.start(place, f"{name}-killed", *TWO, *SHORT, *options, ranks=2)
    run.wait_for_step(6)
    run.kill_all()
    finish(place, server, f"{name}-killed", *options)
    assert everything(place, f"{name}-killed") == everything(place, name)
    average, now = weights(place, name, 12, "pretrained_model_ema"), weights(place, name, 12)
    changed = trained(place, name, 12)
    assert len(changed) > 20 and all(average[key].dtype == torch.float32 for key in changed)
    if not precision:
        for key, tensor in weights(place, through, 12, "pretrained_model_ema").items():
            torch.testing.assert_close(average[key], tensor, rtol=1e-3, atol=1e-5)
    else:
        # Float32 has kept what bfloat16 cannot hold, and validating with it has moved no bit of the weights.
        assert any(not torch.equal(average[key], average[key].bfloat16().float()) for key in changed)
        finish(place, server, f"{name}-blind", *options, "--eval_freq", "0")
        assert all(torch.equal(tensor, now[key]) for key, tensor in weights(place, f"{name}-blind", 12).items())


def test_validated_beside_the_weights_as_whoever_loads_it_would(
    place: Workplace, server: ForkServer, through: str
) -> None:
    lines = {line["step"]: line for line in place.metrics(through)}
    for step in (6, 12):
        ema = record(place, through, step)["ema"]
        assert ema["action_l1"] == lines[step]["val/ema_action_l1"] != lines[step]["val/action_l1"]
        assert (ema["loss"], ema["acc"]["0.1"]) == (lines[step]["val/ema_loss"], lines[step]["val/ema_acc_0.1"])
    assert record(place, through, 0)["ema"] is None
    saved = checkpoint(place, through, 12) / "pretrained_model_ema"
    finish(place, server, "from-ema", "--load_from_checkpoint", str(saved), "--n_updates", "1")
    start = record(place, "from-ema", 0)
    assert start["validation_set"] == record(place, through, 12)["validation_set"]
    assert start["per_dimension_l1"] == ema["per_dimension_l1"] and start["loss"] == ema["loss"]


def test_the_folder_is_a_policy_of_its_own(place: Workplace, through: str) -> None:
    raw, ema = (checkpoint(place, through, 12) / name for name in ("pretrained_model", "pretrained_model_ema"))
    names = sorted(path.name for path in raw.iterdir())
    assert sorted(path.name for path in ema.iterdir()) == names and len(names) >= 5
    for name in names:
        assert (name == "model.safetensors") == ((raw / name).read_bytes() != (ema / name).read_bytes())
    theirs, ours = load_file(raw / "model.safetensors"), load_file(ema / "model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in theirs.items()} == {k: (t.shape, t.dtype) for k, t in ours.items()}
    manifest = json.loads((raw.parent / "manifest.json").read_text())["files"]
    assert {f"pretrained_model_ema/{name}" for name in names} <= set(manifest)


def test_a_skipped_update_is_not_taken_in(place: Workplace, server: ForkServer) -> None:
    own = ("--n_updates", "5", "--save_model_freq", "1", "--keep_checkpoints", "5", "--eval_freq", "3")
    finish(
        place, server, "skips", *EMA, *own, "--skip_nonfinite", "1",
        hook="infinite_gradient", BREAK_AT="[3]",
    )  # fmt: skip
    assert place.metrics("skips")[-1]["skipped_updates"] == 1
    averages = [weights(place, "skips", step, "pretrained_model_ema") for step in range(1, 6)]
    alike = [all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(averages, averages[1:], strict=False)]
    assert alike.count(True) == 1
    # The update after it has the decay of the number of updates applied.
    skipped = alike.index(True) + 2
    before, after = averages[skipped - 1], averages[skipped]
    decay, now = min(0.3, skipped / (9 + skipped)), weights(place, "skips", skipped + 1)
    for key in after:
        torch.testing.assert_close(after[key], decay * before[key] + (1 - decay) * now[key], rtol=1e-5, atol=1e-7)


def test_a_resume_with_another_decay_is_refused_and_with_consent_begins_anew(
    place: Workplace, server: ForkServer
) -> None:
    finish(place, server, "late", "--n_updates", "4")
    more = ("--n_updates", "5", "--eval_freq", "0", *EMA)
    output = server.start(place, "late", *TWO, *SHORT, *more).wait()
    assert place.status("late")["error_kind"] == "config" and "ema_decay: None → 0.3" in output
    output = finish(place, server, "late", *more, "--resume_changes", "true", ranks=1)
    assert "no moving average of the weights; it begins now" in output
    before, now = weights(place, "late", 4), weights(place, "late", 5)
    for key, tensor in weights(place, "late", 5, "pretrained_model_ema").items():
        torch.testing.assert_close(tensor, 0.3 * before[key] + 0.7 * now[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", ["0", "1", "1.5", "-0.1"])
def test_a_decay_that_is_none_is_refused(place: Workplace, capsys: pytest.CaptureFixture[str], decay: str) -> None:
    from agent import run

    assert run.main(["--config_path", str(place.folder / "tiny.yaml"), "--ema_decay", decay]) == run.EXIT_CONFIG
    assert "ema_decay must be between 0 and 1" in capsys.readouterr().err


def test_the_predicted_memory_has_it() -> None:
    from agent.models.common.memory import Training
    from agent.models.pi.configuration import PI0Config
    from agent.models.pi.memory import predict

    for frozen, precision in ((False, "float32_master"), (True, "bfloat16_stochastic")):
        config = PI0Config(train_expert_only=frozen)
        without, with_it = (predict(config, Training(2, 1, precision=precision, ema=ema)) for ema in (False, True))
        size = 2 if precision == "bfloat16_stochastic" else 4
        assert with_it.ema == 4 * without.gradients // size and without.ema == 0
        assert with_it.peak == without.peak + with_it.ema
