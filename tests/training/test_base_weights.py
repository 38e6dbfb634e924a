"""Runs that start from weights of elsewhere, with their statistics, and runs that save rounded weights.

Run with ``uv run pytest tests/training/test_base_weights.py``   (about half a minute)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from support.forked import ForkServer
from support.launching import Workplace
from support.records import what_was_computed

from agent.models.pi import adapter

OLD = next(layout for layout in adapter.POLICIES if "v1" in layout.title)
NORMALIZER = "policy_preprocessor_step_6_normalizer_processor.safetensors"
MEAN_STD = {
    f"{place}.buffer_{name}.{kind}": (place, name, kind)
    for place, name in (
        ("normalize_inputs", "observation_state"),
        ("normalize_targets", "action"),
        ("unnormalize_outputs", "action"),
    )
    for kind in ("mean", "std")
}


@pytest.fixture(scope="module")
def base(place: Workplace, server: ForkServer) -> str:
    """A run whose weights the others start from."""
    output = server.start(place, "base", "--n_updates", "8").wait()
    assert place.status("base")["state"] == "finished", output
    return "base"


def pretrained(place: Workplace, name: str) -> Path:
    return place.checkpoint(name) / "pretrained_model"


def statistics(folder: Path) -> dict[str, np.ndarray]:
    return load_arrays(folder / NORMALIZER)


def shifted(folder: Path) -> dict[str, np.ndarray]:
    """Statistics that no data here has."""
    return {
        name: (values * 2 + 0.5).astype(np.float32) for name, values in statistics(folder).items() if values.ndim == 1
    }


def as_v1(source: Path, folder: Path, fill: float | None = None) -> Path:
    """The weights of a checkpoint as LeRobot v1 named them, with buffers that hold shifted statistics."""
    own = load_file(source / "model.safetensors")
    match = adapter.match(own, adapter.POLICIES, _config(source))
    tensors = {str(OLD.theirs(ours)): own[theirs] for ours, theirs in match.sources.items()}
    moved = shifted(source)
    for buffer, (_, name, kind) in MEAN_STD.items():
        values = moved[f"{name.replace('observation_', 'observation.')}.{kind}"]
        tensors[buffer] = torch.from_numpy(values.copy() if fill is None else np.full_like(values, fill))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def as_lerobot(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    from safetensors.numpy import save_file as save_arrays

    save_arrays(shifted(source), folder / NORMALIZER)
    return folder


def as_openpi(source: Path, folder: Path) -> Path:
    tensors = {name.removeprefix("model."): t for name, t in load_file(source / "model.safetensors").items()}
    moved = shifted(source)
    (folder / "assets" / "robot").mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    content = {
        theirs: {kind: moved[f"{ours}.{kind}"].tolist() for kind in ("mean", "std", "q01", "q99")}
        for ours, theirs in (("observation.state", "state"), ("action", "actions"))
    }
    (folder / "assets/robot/norm_stats.json").write_text(json.dumps({"norm_stats": content}))
    return folder


def _config(source: Path):
    import draccus

    from agent.models.base import ModelConfig

    text = json.loads((source / "config.json").read_text())
    return draccus.decode(ModelConfig, {key: value for key, value in text.items()})


FORMATS = {"v1": as_v1, "lerobot": as_lerobot, "openpi": as_openpi}
TITLES = {"v1": "LeRobot v1, of 2025", "lerobot": "LeRobot 0.4 to 0.6", "openpi": "openpi's PyTorch export"}


def test_the_weights_of_every_format_and_their_statistics(place: Workplace, server: ForkServer, base: str) -> None:
    made = {}
    for name, make in FORMATS.items():
        folder = make(pretrained(place, base), place.folder / f"weights-{name}")
        overrides = ("--load_from_checkpoint", str(folder), "--data.statistics", "checkpoint", "--n_updates", "3")
        output = server.start(place, f"from-{name}", *overrides).wait()
        assert place.status(f"from-{name}")["state"] == "finished", output
        assert f"({TITLES[name]}" in output and f"action statistics are those of {folder}" in output
        made[name] = what_was_computed(place.metrics(f"from-{name}"))
        saved = statistics(pretrained(place, f"from-{name}"))
        for kind in ("mean", "std"):
            expected = shifted(pretrained(place, base))[f"action.{kind}"]
            assert np.array_equal(saved[f"action.{kind}"], expected)
        assert ("action.min" in saved) == (name == "lerobot")  # nothing is made up
    assert made["v1"] == made["lerobot"] == made["openpi"]
    # They matter, and those of the data set are the default.
    output = server.start(place, "own-statistics", *overrides, "--data.statistics", "dataset").wait()
    ours = what_was_computed(place.metrics("own-statistics"))
    assert ours[0]["loss"] != made["openpi"][0]["loss"], output
    # The baseline of the mean action is the data's, whatever the statistics.
    assert ours[-1]["val/baseline_mean_l1"] == made["openpi"][-1]["val/baseline_mean_l1"]


def test_such_a_run_continues(place: Workplace, server: ForkServer, base: str) -> None:
    folder = as_v1(pretrained(place, base), place.folder / "weights-continued")
    overrides = ("--load_from_checkpoint", str(folder), "--data.statistics", "checkpoint", "--n_updates", "12")
    server.start(place, "whole", *overrides).wait()
    for step in (4, 8):
        run = server.start(place, "killed", *overrides)
        run.wait_for_step(step)
        run.kill_all()
    shutil.rmtree(folder)  # nothing in it is needed any more
    output = server.start(place, "killed", *overrides).wait()
    assert place.status("killed")["restarts"] == 2, output
    assert place.tensors("killed") == place.tensors("whole")
    assert what_was_computed(place.metrics("killed")) == what_was_computed(place.metrics("whole"))


def _remove(folder: Path) -> Path:
    (folder / NORMALIZER).unlink()
    return folder


def _none(source: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(source / "model.safetensors", folder)
    return folder


def _other_robot(source: Path, folder: Path) -> Path:
    from safetensors.numpy import save_file as save_arrays

    as_lerobot(source, folder)
    save_arrays({name: values[:2].copy() for name, values in shifted(source).items()}, folder / NORMALIZER)
    return folder


UNUSABLE = {
    "never filled": (lambda source, folder: as_v1(source, folder, float("inf")), "mean is inf: they were never filled"),
    "a constant": (lambda source, folder: as_v1(source, folder, 0.0), "dimension 0 has no width"),
    "none": (_none, "holds no statistics"),
    "a missing file": (
        lambda source, folder: _remove(as_lerobot(source, folder)),
        f"it names {NORMALIZER}, which is not there",
    ),
    "another robot": (_other_robot, "mean is of 2 dimensions, the data has"),
    "other bounds": (as_v1, "QUANTILES needs q01 and q99, they hold mean, std"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_statistics_that_cannot_be_used(place: Workplace, server: ForkServer, base: str, case: str) -> None:
    make, message = UNUSABLE[case]
    name = f"refused-{case.replace(' ', '-')}"
    folder = make(pretrained(place, base), place.folder / name)
    overrides = ["--load_from_checkpoint", str(folder), "--data.statistics", "checkpoint"]
    if case == "other bounds":
        overrides += ["--model_cfg.normalization_mapping", "{VISUAL: IDENTITY, STATE: QUANTILES, ACTION: QUANTILES}"]
    output = server.start(place, name, *overrides).wait()
    status = place.status(name)
    assert (status["state"], status["error_kind"]) == ("failed", "config"), output
    assert message in status["reason"] and "data.statistics" in status["reason"], status["reason"]


def test_rounded_weights_for_others_and_exact_ones_for_the_run(place: Workplace, server: ForkServer) -> None:
    lines, tensors = {}, {}
    for kind in ("float32", "bfloat16"):
        overrides = ("--n_updates", "12", "--save_dtype", kind)
        run = server.start(place, kind, *overrides, "--per_device_batch_size", "4", ranks=2)
        run.wait_for_step(6)
        run.kill_all()
        output = server.start(place, kind, *overrides, "--per_device_batch_size", "4", ranks=2).wait()
        assert place.status(kind)["state"] == "finished" and place.status(kind)["restarts"] == 1, output
        lines[kind] = what_was_computed(place.metrics(kind))
        tensors[kind] = load_file(pretrained(place, kind) / "model.safetensors")
    assert lines["float32"] == lines["bfloat16"]
    exact = load_file(place.checkpoint("bfloat16") / "training_state" / "model.safetensors")
    assert not (place.checkpoint("float32") / "training_state" / "model.safetensors").exists()
    for name, tensor in tensors["float32"].items():
        assert torch.equal(exact[name], tensor), name
        assert tensors["bfloat16"][name].dtype == torch.bfloat16
        assert torch.equal(tensors["bfloat16"][name], tensor.bfloat16()), name
    # The choice is free on a resume, and rounded weights start other runs.
    longer = ("--n_updates", "14", "--save_dtype", "float32", "--resume_changes", "true")
    output = server.start(place, "bfloat16", *longer).wait()
    assert place.status("bfloat16")["state"] == "finished" and place.status("bfloat16")["step"] == 14, output
    start = ("--load_from_checkpoint", str(place.folder / "runs" / "float32"), "--n_updates", "2")
    output = server.start(place, "from-rounded", *start).wait()
    assert place.status("from-rounded")["state"] == "finished", output
