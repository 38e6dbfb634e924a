"""Jobs on nodes without internet: what ``agent.prepare`` fetches and checks, and that a job then asks nobody.

Run: uv run pytest tests/preflight/test_prepare.py      (two minutes; needs no GPU)

The hub is a small server on this machine that the real client talks to. Where nothing may be asked, a hook in every
Python process notes and refuses each attempt to look up a host or to connect to another machine.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.datasets import write_tokenizer
from support.hub import MockHub, Refusal, commit_of, mock_hub
from support.launching import MODEL, REPOSITORY, Workplace

from agent.configuration_pipeline import load_config
from agent.models.pi import adapter
from agent.models.pi.model import PI0

ELSEWHERE = "http://hub.invalid"  # no such name can exist
GUARD = r"""
import os, sys, traceback

def _watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # the path of a Unix socket
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host in ("localhost", "::1", os.uname().nodename) or host.startswith("127."):
        return
    with open(os.environ["ATTEMPTS"], "a") as log:
        log.write(f"{event} {arguments[-1 if event == 'socket.connect' else 0]!r}\n")
        log.write("".join(traceback.format_stack()) + "\n")
    raise OSError(f"this test allows no connection: {event} {host}")

sys.addaudithook(_watch)
with open(os.environ["ATTEMPTS"] + ".processes", "a") as log:
    log.write(" ".join(sys.orig_argv) + "\n")
"""


BRIDGE = ["--wandb.mode", "offline", "--data.val.fraction", "0.2"]
BRIDGE += ["--model_cfg.tokenizer_path", MODEL["tokenizer_path"], "--data.train.datasets", "[{repo_id: here}]"]


@dataclass
class Site:
    """A workplace, its hub, and the home of what is fetched."""

    place: Workplace
    hub: MockHub
    home: Path

    def configure(self, **changes: Any) -> None:
        """Writes ``tiny.yaml`` anew: everything from the hub, then the changes."""
        config = json.loads((self.place.folder / "local.yaml").read_text(encoding="utf-8"))
        config["model_cfg"]["tokenizer_path"] = "lab/tokenizer"
        config["data"]["train"]["datasets"] = [{"repo_id": "lab/data"}]
        config["load_from_checkpoint"] = "lab/policy@v2"
        (self.place.folder / "tiny.yaml").write_text(json.dumps(config | changes), encoding="utf-8")

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a machine with internet."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLA_", "WANDB_"))}
        return {**kept, "HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", **changes}

    def guarded(self, name: str) -> dict[str, str]:
        """Of a process that may connect to no other machine; ``attempts(name)`` is what it tried."""
        folder = self.place.folder / "guard"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        log = self.place.folder / f"{name}.attempts"
        return {"PYTHONPATH": str(folder), "ATTEMPTS": str(log), "HF_ENDPOINT": ELSEWHERE}

    def attempts(self, name: str) -> str:
        """What was tried, with the stack of each."""
        log = self.place.folder / f"{name}.attempts"
        return log.read_text() if log.exists() else ""

    def guarded_processes(self, name: str) -> list[str]:
        """The command lines of the processes that were watched."""
        return (self.place.folder / f"{name}.attempts.processes").read_text().splitlines()

    def prepare(self, *overrides: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """``python -m agent.prepare``."""
        command = [sys.executable, "-m", "agent.prepare", "--config_path", str(self.place.folder / "tiny.yaml")]
        return subprocess.run(
            [*command, *overrides],
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=120,
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    place = Workplace.make(folder)
    (folder / "tiny.yaml").rename(folder / "local.yaml")
    with mock_hub() as hub:
        site = Site(place, hub, folder / "home")
        config, _ = load_config(folder / "local.yaml", [], 1)
        model: Any = config.model_cfg
        policy = PI0(model)
        policy.init_weights(torch.Generator().manual_seed(5))
        published = {name: t.contiguous().clone() for name, t in adapter.to_lerobot(policy.state_dict(), model).items()}
        (folder / "policy").mkdir()
        save_file(published, folder / "policy" / "model.safetensors")
        (folder / "policy" / "config.json").write_text('{"type": "pi0"}')
        (folder / "policy" / "README.md").write_text("A policy.")
        hub.add("models/lab/policy", folder / "policy", "v2")
        # transformers asks the hub about tokenizers as large as PaliGemma's, unless it is told not to
        write_tokenizer(folder / "tokenizer", [f"word{number}" for number in range(100_001)])
        (folder / "tokenizer" / "config.json").write_text(
            '{"model_type": "paligemma", "transformers_version": "4.41.0"}'
        )
        hub.add("models/lab/tokenizer", folder / "tokenizer")
        hub.add("models/lab/bare", write_tokenizer(folder / "bare"))
        hub.add("datasets/lab/data", folder / "data", "v3.0")
        site.configure()
        yield site


def exports(output: str) -> dict[str, str]:
    """The environment that ``prepare`` prints."""
    lines = [shlex.split(line) for line in output.splitlines() if line.startswith("export ")]
    return dict(words[1].split("=", 1) for words in lines)


@pytest.fixture(scope="module")
def prepared(site: Site) -> subprocess.CompletedProcess[str]:
    return site.prepare("--use_wandb", "true", VLA_LOG_DIR=str(site.place.folder / "runs"), VLA_ATTEMPT="7")


# ── with internet ───────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_fetched_and_named(site: Site, prepared: subprocess.CompletedProcess[str]) -> None:
    assert prepared.returncode == 0, prepared.stderr
    rows = {words[-2]: words for line in prepared.stdout.splitlines() if len(words := line.split()) >= 4}
    policy = site.home / "hub/models--lab--policy/snapshots" / commit_of("models/lab/policy", "v2")
    tokenizer = site.home / "hub/models--lab--tokenizer/snapshots" / commit_of("models/lab/tokenizer", "main")
    data = site.home / "lerobot/hub/datasets--lab--data/snapshots" / commit_of("datasets/lab/data", "v3.0")
    assert rows["load_from_checkpoint"][-1] == str(policy)
    assert rows["model_cfg.tokenizer_path"][-1] == str(tokenizer)
    assert rows["data.train.datasets.0"][-1] == str(data)
    size = (site.place.folder / "policy" / "model.safetensors").stat().st_size
    assert rows["load_from_checkpoint"][1:3] == [f"{size / 1000:.1f}", "kB"]
    assert {path.name for path in policy.iterdir()} == {"model.safetensors", "config.json"}  # not its README
    # the coverage, per module
    assert re.search(r"^  expert +(\d+) +\1 +0 +0 +0 +0$", prepared.stderr, flags=re.MULTILINE), prepared.stderr
    assert "6 episodes, 72 frames" in prepared.stderr
    assert exports(prepared.stdout) == {
        "HF_HOME": str(site.home),
        "HF_HUB_OFFLINE": "1",
        "VLA_LOG_DIR": str(site.place.folder / "runs"),
        "WANDB_MODE": "offline",
    }


def test_a_job_asks_nobody(site: Site, prepared: subprocess.CompletedProcess[str]) -> None:
    environment = {**exports(prepared.stdout), **site.guarded("job")}
    code, output = site.place.run(
        *("--name", "job", "--n_updates", "2", "--use_wandb", "true", "--data.train.num_workers", "1"),
        processes=1,
        **environment,
    )
    assert code == 0, output
    assert "taking weights of lab/policy@v2" in output and "finished at update 2" in output
    assert list((site.place.folder / "runs/job/wandb").glob("offline-run-*/*.wandb"))
    assert any("run.py" in line for line in site.guarded_processes("job"))
    assert site.attempts("job") == ""


def test_what_is_here_is_not_asked_for_again(site: Site, prepared: subprocess.CompletedProcess[str]) -> None:
    # and a data set that LeRobot has recorded here needs no hub at all
    shutil.copytree(site.place.folder / "data", site.home / "lerobot" / "lab" / "recorded")
    datasets = "[{repo_id: lab/data}, {repo_id: lab/recorded}]"
    again = site.prepare("--data.train.datasets", datasets, **site.guarded("again"))
    assert again.returncode == 0, again.stderr
    assert site.attempts("again") == ""
    assert str(site.home / "lerobot/lab/recorded") in again.stdout


def test_everything_missing_is_named_at_once(site: Site, tmp_path: Path) -> None:
    site.hub.add("models/lab/gated", site.place.folder / "policy")
    site.hub.refuse("models/lab/gated", Refusal(403, "GatedRepo", files_only=True))
    done = site.prepare(
        *("--load_from_checkpoint", "lab/gated", "--model_cfg.tokenizer_path", "lab/bare"),
        *("--data.train.datasets.0.revision", "v9"),
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 2 and "export" not in done.stdout
    assert done.stdout.count("missing") == 3
    assert "error: load_from_checkpoint: cannot get 'lab/gated' from the hub: it is gated." in done.stderr
    assert "Open https://huggingface.co/lab/gated, log in and accept its licence" in done.stderr
    assert "hf auth login" in done.stderr
    assert "error: data.train.datasets.0: cannot get 'lab/data@v9' from the hub: it has no revision 'v9'" in done.stderr
    folder = tmp_path / "hub/models--lab--bare/snapshots" / commit_of("models/lab/bare", "main")
    assert f"set model_cfg.tokenizer_path to the folder {folder}" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_do_not_fit_are_refused(site: Site, prepared: subprocess.CompletedProcess[str]) -> None:
    tensors = load_file(site.place.folder / "policy" / "model.safetensors")
    prefix, layout = "model.paligemma_with_expert.paligemma.", adapter.PALIGEMMAS[0]
    folder = site.place.folder / "paligemma"
    folder.mkdir()
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    save_file(inner, folder / "model.safetensors")
    done = site.prepare(
        *("--load_from_checkpoint", "null", "--model_cfg.paligemma_pretrained_path", str(folder)),
        *("--model_cfg.vision_variant.mlp_dim", "65"),
    )
    assert done.returncode == 2 and "export" not in done.stdout
    assert f"the weights in {folder / 'model.safetensors'} (PaliGemma" in done.stderr and layout.title in done.stderr
    assert "do not fit this model" in done.stderr and "fc1.weight: [64, 32] in the file, [65, 32]" in done.stderr
    assert "PaliGemma has no action expert" in done.stderr


MEASURED = r"""
import resource, sys
from agent import prepare
code = prepare.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


def test_the_full_model_is_checked_by_its_headers(site: Site, tmp_path: Path) -> None:
    config, _ = load_config(REPOSITORY / "config/train/pi0_finetune_bridge.yaml", BRIDGE, 1)
    model: Any = config.model_cfg
    header: dict[str, Any] = {}
    end = 0
    for name, shape in adapter.shapes(model).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[adapter.LEROBOT.theirs(name)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # takes no room on the disk
    cameras = "{observation.images.image_0: observation.images.front}"
    dataset = f"{{repo_id: here, root: {site.place.folder / 'data'}, cameras: {cameras}}}"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "--config_path", "config/train/pi0_finetune_bridge.yaml", *BRIDGE]
        + ["--load_from_checkpoint", str(tmp_path), "--data.train.datasets", f"[{dataset}]"],
        env=site.environment(**site.guarded("bridge")),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert f"{end / 1e9:.1f} GB  load_from_checkpoint" in done.stdout and end > 10e9
    # MB: the libraries themselves come to some 1,500, the model to more than 10,000.
    assert int(done.stdout.split("peak ")[1]) < 4000
    assert site.attempts("bridge") == ""


def test_a_mistake_in_the_config_answers_before_anything_heavy(site: Site) -> None:
    begin = time.monotonic()
    done = site.prepare("--globl_batch_size", "8")
    assert done.returncode == 2 and "global_batch_size" in done.stderr
    assert time.monotonic() - begin < 5


# ── without ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_network_is_told_in_seconds(site: Site, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = site.prepare(HF_HOME=str(tmp_path), **site.guarded("unreachable"))
    assert time.monotonic() - begin < 90  # most of it is imports
    assert done.returncode == 2 and done.stdout.count("missing") == 3
    assert "data.train.datasets.0: cannot get 'lab/data@v3.0' from the hub: it cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert "load_from_checkpoint: 'lab/policy@v2': not here either" in done.stderr
    assert "HF_HUB_OFFLINE" not in done.stderr
    # The hook that the tests above trust does see.
    assert "hub.invalid" in site.attempts("unreachable")


def test_a_training_from_a_hub_id_without_network(site: Site, tmp_path: Path) -> None:
    datasets, tokenizer = f"[{{repo_id: here, root: {site.place.folder / 'data'}}}]", MODEL["tokenizer_path"]
    status = tmp_path / "status.json"
    begin = time.monotonic()
    code, output = site.place.run(
        *("--name", "nobody", "--load_from_checkpoint", "nobody/nothing"),
        *("--model_cfg.tokenizer_path", tokenizer, "--data.train.datasets", datasets),
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="0",
        VLA_STATUS_FILE=str(status),
        VLA_ATTEMPT="1",
        **site.guarded("nobody"),
    )
    assert time.monotonic() - begin < 90
    assert code == 2, output
    assert "load_from_checkpoint: cannot get 'nobody/nothing' from the hub: it cannot be reached" in output
    assert "python -m agent.prepare" in output and "https://huggingface.co/nobody/nothing" in output
    assert json.loads(status.read_text())["error_kind"] == "config"


def test_what_is_in_the_cache_is_enough_without_network(site: Site, prepared: subprocess.CompletedProcess[str]) -> None:
    # Nobody has said that there is none: weights, data set and a tokenizer of 100,000 entries are looked for here first.
    assert prepared.returncode == 0, prepared.stderr
    code, output = site.place.run(
        *("--name", "cached", "--n_updates", "1", "--eval_freq", "0"),
        HF_HOME=str(site.home),
        HF_HUB_OFFLINE="0",
        **site.guarded("cached"),
    )
    assert code == 0, output
    assert "taking the copy in the cache" in output


LOOK = r"""
import json, sys, time
from agent.checkpoints.finding import find_weights
for reference in sys.argv[1:]:
    begin = time.monotonic()
    try:
        kind, text = "found", str(find_weights(reference, "load_from_checkpoint")[0])
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    print(json.dumps([kind, text, time.monotonic() - begin]))
"""


def look(site: Site, *references: str, **changes: str) -> list[tuple[str, str, float]]:
    """What ``find_weights`` of one process says to each: outcome, text, seconds."""
    environment = site.environment(**changes)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *references], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("silent", [False, True], ids=["answers", "silent"])
def test_every_answer_of_the_hub(site: Site, tmp_path: Path, silent: bool) -> None:
    if silent:
        # It takes the connection and says nothing, as behind a firewall that drops packets.
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            ((kind, text, seconds),) = look(site, "lab/policy@v2", HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
        assert kind == "Unreachable" and "no answer within 10 s" in text and seconds < 13
        return
    page = "https://huggingface.co/lab"
    cases = {
        "lab/closed": (Refusal(401, "GatedRepo"), "ValueError", f"it is gated.\nOpen {page}/closed"),
        "lab/private": (Refusal(401, "RepoNotFound"), "ValueError", "no such model, or it is private"),
        "lab/token": (
            Refusal(401, message="Invalid credentials in Authorization header"),
            "ValueError",
            "the hub refuses this account's token (status 401).\nRun `hf auth login` again",
        ),
        "lab/broken": (Refusal(500), "HubTrouble", "it answers with status 500, try later"),
        "lab/busy": (Refusal(429), "HubTrouble", "it answers with status 429, try later"),
        "lab/portal": (Refusal(200, body=b"<html>Log in"), "ValueError", "what answers is not the hub"),
    }
    for name, (refusal, _, _) in cases.items():
        site.hub.refuse(f"models/{name}", refusal)
    expected = {name: (kind, text) for name, (_, kind, text) in cases.items()}
    expected |= {
        "lab/nothing": ("ValueError", f"no such model, or it is private.\nCheck the spelling at {page}/nothing"),
        "lab/policy@v3": ("ValueError", f"it has no revision 'v3'.\n{page}/policy/tree/main lists"),
        "lab/a..b": ("ValueError", "cannot be the name of a repository"),
    }
    for name, (kind, text, seconds) in zip(expected, look(site, *expected, HF_HOME=str(tmp_path)), strict=True):
        assert kind == expected[name][0], (name, text)
        assert text.startswith("load_from_checkpoint: ") and expected[name][1] in text, name
        assert seconds < 5, name


def test_preparing_frames_while_the_hub_is_in_trouble(site: Site, tmp_path: Path) -> None:
    site.hub.refuse("datasets/lab/ill", Refusal(500))
    command = [sys.executable, "-m", "agent.data.prepare", "--config_path", str(site.place.folder / "tiny.yaml")]
    done = subprocess.run(
        [*command, "--data.train.datasets", "[{repo_id: lab/ill}]"],
        env=site.environment(HF_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: data set lab/ill: " in done.stderr and "status 500, try later" in done.stderr


def test_the_cache_serves_when_the_hub_does_not(site: Site, tmp_path: Path) -> None:
    folder = site.place.folder / "policy"
    site.hub.add("models/lab/once", folder)
    home = str(tmp_path)
    ((kind, path, _),) = look(site, "lab/once", HF_HOME=home)
    assert kind == "found" and Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    for refusal in (Refusal(503), Refusal(401, "GatedRepo")):
        site.hub.refuse("models/lab/once", refusal)
        assert [found[:2] for found in look(site, "lab/once", HF_HOME=home)] == [("found", path)]
    assert [found[:2] for found in look(site, "lab/once", HF_HOME=home, HF_ENDPOINT="http://127.0.0.1:9")] == [
        ("found", path)
    ]


def test_a_download_that_was_cut_short(site: Site, tmp_path: Path) -> None:
    site.hub.add("models/lab/cut", site.place.folder / "policy")
    ((_, path, _),) = look(site, "lab/cut", HF_HOME=str(tmp_path))
    Path(path).unlink()
    ((kind, text, _),) = look(site, "lab/cut", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert kind == "Unreachable" and "HF_HUB_OFFLINE is set" in text
    assert "What is in the cache of it is incomplete: 1 file(s) are missing (model.safetensors)" in text
