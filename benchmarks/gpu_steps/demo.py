"""Trainings of the demo as a user starts them: a run that is killed and started again ends with the same bits.

The demo's pictures come from a frame store that travelled (scripts/gpu_wheels.sh makes it), because no decoder did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu_steps.place import Place

ROOT = Path(__file__).resolve().parents[2]
QUALITY = "80"  # of the frame store's pictures, as scripts/gpu_wheels.sh asks for
LOW_MEMORY = ("--optimizer", "adamw8bit", "--precision", "bfloat16_stochastic", "--ema_decay", "0.99")


def run(place: Place) -> None:
    """All runs at once: one after the other, starting them alone would take minutes."""
    kills = (8, 14) if place.gpu else (4,)
    exact = ("--deterministic", "true")
    low_memory = (*LOW_MEMORY, *([] if place.gpu else ["--use_bf16", "true"]))
    runs: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "low_memory": ((*exact, *low_memory), ()),
        "low_memory_killed": ((*exact, *low_memory), kills),
    }
    if place.gpu:  # on a CPU these would show nothing more
        runs |= {"straight": (exact, ()), "killed": (exact, kills)}
        runs |= {name: (("--deterministic", "false"), ()) for name in ("free", "free_again")}
    with ThreadPoolExecutor(len(runs) if place.gpu else 1) as pool:
        outcomes = dict(zip(runs, pool.map(lambda name: train(place, name, *runs[name]), runs), strict=True))
    for name, (problem, starts) in outcomes.items():
        place.tell(f"run {name}", problem is None, starts=starts, why=problem)
    compare = partial(_compare, place)
    compare("low_memory_killed", "low_memory", must_be_equal=True)
    if place.gpu:
        compare("killed", "straight", must_be_equal=True)
        compare("free", "straight", must_be_equal=False)
        compare("free_again", "free", must_be_equal=False)


def command(place: Place, name: str, *options: str) -> list[str]:
    """The demo's training, short, in this folder's runs."""
    frames = place.carried / "frames"
    # Where a rehearsal has no store, it has a decoder.
    stored = ["--data.train.datasets.0.frames", str(frames), "--data.train.frame_store", "jpeg",
              "--data.train.frame_quality", QUALITY] if frames.is_dir() or place.gpu else []  # fmt: skip
    updates, every, batch = ("20", "5", "32") if place.gpu else ("6", "2", "2")
    return [
        sys.executable, "src/agent/run.py", "--config_path", "config/train/pi0_demo.yaml", "--name", name,
        "--use_wandb", "false", "--n_updates", updates, "--save_model_freq", every, "--log_freq", "1",
        "--keep_training_states", "2", "--eval_freq", "0", "--global_batch_size", batch, "--per_device_batch_size", batch,
        *(["--use_bf16", "true"] if place.gpu else []), "--model_cfg.device", place.device.type, *stored, *options,
    ]  # fmt: skip


def train(place: Place, name: str, options: tuple[str, ...], kills: tuple[int, ...]) -> tuple[str | None, int]:
    """Starts the run until it has finished, killing it at these updates; what went wrong, and how many starts it took."""
    folder = place.work / "runs" / name
    environment = os.environ | {"VLA_LOG_DIR": str(folder.parent)}
    for start, kill in enumerate((*kills, None), start=1):
        log = place.work / f"{name}.{start}.log"
        with open(log, "w") as stream:
            process = subprocess.Popen(command(place, name, *options), cwd=ROOT, env=environment, stdout=stream,
                                       stderr=subprocess.STDOUT)  # fmt: skip
        while process.poll() is None and (kill is None or _updates(folder) < kill):
            time.sleep(0.01)
        if kill is not None and process.poll() is None:
            process.kill()
            process.wait()
            continue
        if process.wait() != 0 or kill is not None:
            print(f"---- {name}\n{log.read_text()[-4000:]}", flush=True)
            problem = f"exit code {process.returncode}"
            return problem if process.returncode else f"finished before it was killed at update {kill}", start
    return None, len(kills) + 1


def _updates(folder: Path) -> int:
    lines = _metrics(folder)
    return int(lines[-1]["step"]) if lines else 0


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def _compare(place: Place, one: str, other: str, must_be_equal: bool) -> None:
    """The losses of all updates, and every tensor of the last checkpoint."""
    folders = [place.work / "runs" / name for name in (one, other)]
    losses = [[line["loss"] for line in _metrics(folder)] for folder in folders]
    files = [sorted((folder / "checkpoints" / "last").rglob("*.safetensors")) for folder in folders]
    tensors = [{(p.name, k): t for p in some for k, t in load_file(p).items()} for some in files]
    if not tensors[0] or tensors[0].keys() != tensors[1].keys():
        place.tell(f"{one} and {other}", False, why="their last checkpoints hold other tensors, or none")
        return
    pairs = [(tensor, tensors[1][key]) for key, tensor in tensors[0].items()]
    different = sum(not torch.equal(a, b) for a, b in pairs)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())
    equal = different == 0 and losses[0] == losses[1]
    place.tell(f"{one} and {other}", equal if must_be_equal else None, bit_equal=equal, tensors=len(pairs),
               different=different, largest=largest, same_losses=losses[0] == losses[1])  # fmt: skip
