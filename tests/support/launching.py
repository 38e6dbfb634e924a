"""Starts real training runs of a model of a few thousand parameters, on a real data set of a few seconds."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.datasets import write_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = REPOSITORY / "src" / "agent" / "run.py"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

MODEL = {
    "type": "pi0",
    "paligemma_variant": {
        "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 512,
    },
    "action_expert_variant": {
        "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 512,
    },
    "vision_variant": {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch_size": 16},
    "tokenizer_path": str(REPOSITORY / "demo" / "tokenizer"),
    "image_resolution": [32, 32],
    "chunk_size": 4,
    "max_state_dim": 8,
    "max_action_dim": 8,
    "num_inference_steps": 2,
    "optimizer_lr": 1e-3,
    "scheduler_warmup_steps": 2,
}  # fmt: skip

SHARED: Path | None = None
"""A folder that the processes of a test session have in common; `conftest.py` sets it."""


def with_support(**more: str) -> dict[str, str]:
    """The environment of a process that imports ``support`` as these tests do."""
    path = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def copy_of_small_dataset(target: Path) -> None:
    """Six episodes of 12 frames, which one process of a test session writes and all others copy."""
    if SHARED is None:
        write_dataset(target, episodes=6, length=12)
        return
    with open(SHARED / "small_dataset.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        written = SHARED / "small_dataset"
        if not written.exists():
            write_dataset(SHARED / "unfinished", episodes=6, length=12)
            (SHARED / "unfinished").rename(written)
    shutil.copytree(written, target)


@dataclass
class Workplace:
    """A folder with a data set, a config, and a place for runs."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Workplace:
        """Writes the data set and ``tiny.yaml``."""
        copy_of_small_dataset(folder / "data")
        config = {
            "model_cfg": MODEL,
            "data": {"train": {"datasets": [{"repo_id": "test/data", "root": str(folder / "data")}], "num_workers": 0}},
            "global_batch_size": 8,
            "per_device_batch_size": 2,
            "n_updates": 20,
            "save_model_freq": 4,
            "eval_freq": 10,
            "eval_size": 6,
            "log_freq": 1,
            "use_wandb": False,
        }
        (folder / "tiny.yaml").write_text(json.dumps(config), encoding="utf-8")
        return cls(folder)

    def start(self, *overrides: str, processes: int = 0, **environment: str) -> subprocess.Popen:
        """A run in a process group of its own: under torchrun, or plain python for ``processes`` 0."""
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, str(RUN), "--config_path", str(self.folder / "tiny.yaml"), *overrides]
        environment = {**os.environ, "VLA_LOG_DIR": str(self.folder / "runs"), **environment}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def run(self, *overrides: str, processes: int = 0, **environment: str) -> tuple[int, str]:
        """A run to its end: exit code and output."""
        process = self.start(*overrides, processes=processes, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of ``metrics.jsonl``; a reader beside the run may meet the last one half written."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def status(self, name: str) -> dict[str, Any]:
        """``status.json``."""
        return json.loads((self.folder / "runs" / name / "status.json").read_text())

    def checkpoint(self, name: str) -> Path:
        """The newest checkpoint."""
        return (self.folder / "runs" / name / "checkpoints" / "last").resolve()

    def tensors(self, name: str) -> dict[str, bytes]:
        """Weights and optimizer of the newest checkpoint: file → contents; the optimizer is split over the ranks."""
        folder = self.checkpoint(name)
        files = [
            *folder.glob("pretrained_model/model.safetensors"),
            *folder.glob("training_state/optimizer*.safetensors"),
        ]
        assert len(files) >= 2
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen) -> None:
        """Returns once an update with at least this number is logged."""
        while not (lines := self.metrics(name)) or lines[-1]["step"] < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)


def kill_alone(process: subprocess.Popen) -> None:
    """SIGKILL for a process, whose children must end by themselves."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    for child in left:
        child.kill()
    process.communicate()
    assert not left


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL for a run with all its processes, torchrun's workers included: they have sessions of their own."""
    import psutil

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    psutil.wait_procs(family, timeout=30)
