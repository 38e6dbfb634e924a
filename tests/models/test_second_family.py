"""A second family, defined in ``support/tiny_family.py`` alone, through the program's own commands: what a policy that is
no π0 can do without a change outside its folder.

Run: uv run pytest tests/models/test_second_family.py      (a minute)
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from safetensors.torch import load_file
from support import tiny_family
from support.forked import ForkServer
from support.launching import REPOSITORY, Workplace, with_support

from agent.inference import load_policy

# openpi's client connects in a way that its library will give up.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")

HOOK = "know_the_tiny_family"
MODEL = {"type": "tiny", "hidden": 16, "chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8, "optimizer_lr": 1e-2}


known = pytest.fixture(scope="module", autouse=True)(tiny_family.known)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace.make(tmp_path_factory.mktemp("work"))
    file = workplace.folder / "tiny.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_cfg": MODEL | {"scheduler_warmup_steps": 2}}))
    return workplace


@pytest.fixture(scope="module")
def trained(place: Workplace, server: ForkServer) -> Path:
    """A finished run of twenty updates."""
    run = server.start(place, "whole", ranks=1, hook=HOOK)
    output = run.wait()
    assert place.status("whole")["state"] == "finished", output
    return place.folder / "runs" / "whole"


def ran(place: Workplace, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the program's commands to its end."""
    environment = with_support(VLA_LOG_DIR=str(place.folder / "runs"))
    command = tiny_family.command(module, *arguments)
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=240)


def test_it_learns_and_reports_its_losses_by_name(place: Workplace, trained: Path) -> None:
    lines = place.metrics("whole")
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/squared"] + 0.5 * line["loss/absolute"], rel=1e-5)
    assert {"val/loss", "val/action_l1", "val/baseline_mean_l1"} <= lines[-1].keys()


def test_it_resumes_to_the_same_bits_and_is_the_same_on_two_ranks(
    place: Workplace, trained: Path, server: ForkServer
) -> None:
    run = server.start(place, "killed", ranks=1, hook=HOOK)
    run.wait_for_step(6)
    run.kill_all()
    output = server.start(place, "killed", ranks=1, hook=HOOK).wait()
    assert place.status("killed")["state"] == "finished", output
    assert place.tensors("killed") == place.tensors("whole")
    output = server.start(place, "two", ranks=2, hook=HOOK).wait()
    assert place.status("two")["state"] == "finished", output
    for one, two in zip(place.metrics("whole"), place.metrics("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_sharded_averaged_recomputed_and_in_bfloat16(place: Workplace, server: ForkServer) -> None:
    settings = ("--parallel", "fsdp", "--ema_decay", "0.9", "--activation_checkpointing", "full")
    settings += ("--precision", "bfloat16_stochastic", "--optimizer", "adamw8bit", "--n_updates", "4")
    output = server.start(place, "settings", *settings, ranks=2, hook=HOOK).wait()
    assert place.status("settings")["state"] == "finished", output
    assert "val/ema_loss" in place.metrics("settings")[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--flow_samples_per_observation", "2"), "flow_samples_per_observation: Tiny draws nothing at random"),
        (("--freeze_vlm", "true"), "freeze_vlm: Tiny has no such part to freeze"),
        (("--model_cfg.hidden", "0"), "hidden: 0 is not positive"),
    ],
)
def test_what_it_cannot_do_is_refused(
    place: Workplace, server: ForkServer, arguments: tuple[str, ...], message: str
) -> None:
    assert message in server.start(place, "refused", *arguments, ranks=1, hook=HOOK).wait()


def test_the_check_passes(place: Workplace) -> None:
    process = ran(place, "agent.run", "--config_path", str(place.folder / "tiny.yaml"), "--check", "true")
    assert process.returncode == 0, process.stdout + process.stderr
    for row in ("pass  update ", "pass  save and load ", "pass  memory ", "pass  data: test/data "):
        assert row in process.stdout, process.stdout
    for row in ("thumbnails", "instructions", "tokenizer"):  # it sees no images and reads nothing
        assert row not in process.stdout, process.stdout


def test_its_export_acts_as_the_run_does(place: Workplace, trained: Path) -> None:
    out = place.folder / "exported"
    process = ran(place, "agent.export", "--checkpoint", str(trained), "--to", "lerobot", "--out", str(out))
    assert process.returncode == 0, process.stderr
    ours = load_file(trained / "checkpoints" / "last" / "pretrained_model" / "model.safetensors")
    theirs = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert "A Tiny policy ([paper](https://example.org/tiny))" in (out / "README.md").read_text()
    observation = {"observation.state": np.linspace(-1, 1, 7), "task": "open the drawer"}
    answers = []
    for folder in (trained, out):
        policy = load_policy(str(folder), device="cpu")
        assert policy.cameras == {}
        answers += policy.act([observation], [policy.draws(seed=0, purpose="robot", k=0)])
    assert answers[0].shape == (4, 7) and np.array_equal(*answers)
    refused = ran(place, "agent.export", "--checkpoint", str(trained), "--to", "openpi", "--out", str(out / "not"))
    assert refused.returncode == 2 and "a Tiny policy cannot be exported to openpi; write lerobot" in refused.stderr


def test_it_is_served(place: Workplace, trained: Path) -> None:
    command = tiny_family.command("agent.serve", "--checkpoint", str(trained), "--port", "0", "--device", "cpu")
    process = subprocess.Popen(
        command, env=with_support(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        port = next(
            int(m[1]) for line in process.stdout if (m := re.search(r"serving on ws://127\.0\.0\.1:(\d+)", line))
        )
        client = WebsocketClientPolicy("127.0.0.1", port)
        answer: dict[str, Any] = client.infer({"observation/state": np.linspace(-1, 1, 7), "prompt": "open the drawer"})
        client._ws.close()
        assert np.asarray(answer["actions"]).shape == (4, 7)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
