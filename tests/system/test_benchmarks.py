"""The benchmarks run, and their last line is what programs read.

Run: pytest tests/system/test_benchmarks.py -m slow   (one to two minutes, for the one against LeRobot; the other takes seconds)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def last_line(script: str, *options: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
)
def test_a_benchmark_starts_in_a_shell_with_the_paths_set(script: str) -> None:
    command = f'source ./set_path.sh && "$0" benchmarks/{script} --help'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stdout + done.stderr


@pytest.mark.slow
def test_the_training_step_against_lerobots() -> None:
    result = last_line("train_step.py", "--present", "1", "--batch", "1", "--rounds", "1", "--device", "cpu")
    assert list(result) == [
        "ratio",
        "loss_relative_difference",
        "samples_per_s",
        "peer_samples_per_s",
        "flop_per_sample",
        "matrix_flops",
        "fraction",
        "peak_bytes",
        "peer_peak_bytes",
    ]
    assert result["loss_relative_difference"] < 1e-5
    assert 0 < result["fraction"] < 1
    assert 0 < result["peak_bytes"] < result["peer_peak_bytes"]
    assert result["ratio"] > 1


def test_memory_is_predicted_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--batch", "4", "--cameras", "2", "--freeze_lm_head"]
    result = last_line("memory.py", *options)
    assert not result["measured"] and len(result["rows"]) == 12
    assert all(row["measured_bytes"] is None for row in result["rows"])
    peaks = {tuple(row.values())[2:5]: row["predicted_bytes"] for row in result["rows"]}
    assert min(peaks, key=lambda key: peaks[key]) == ("full", "adamw8bit", "bfloat16_stochastic")
    assert max(peaks, key=lambda key: peaks[key]) == ("none", "adamw", "float32_master")
