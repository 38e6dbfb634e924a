"""The acceptance on a GPU: its steps run on a CPU, a step that fails costs only itself, and the tables are filled.

Run: pytest tests/system/test_gpu_acceptance.py            (seconds)
     pytest tests/system/test_gpu_acceptance.py -m slow    (the rehearsal of all steps: two to three minutes)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu.py"
PAGE = ROOT / "docs" / "benchmarks.md"


def gpu(*options: str, program: Path = GPU, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program), *options]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900
    )


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_runs_on_a_cpu_and_passes(tmp_path: Path) -> None:
    done = gpu("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = results(tmp_path)
    ends = {line["step"]: line for line in lines if line["check"] == "end"}
    assert sorted({int(step.split()[0]) for step in ends}) == list(range(10))
    for step, end in ends.items():
        own = [line for line in lines if line["step"] == step and line["check"] != "end"]
        assert end["passed"] and own, (step, end)
        assert [line for line in own if line["passed"] is False] == []
    refused = gpu("--report", str(tmp_path / "results.jsonl"), "--docs", str(shutil.copy(PAGE, tmp_path)))
    assert refused.returncode == 1 and "is not of a GPU" in refused.stderr
    assert (tmp_path / PAGE.name).read_text() == PAGE.read_text()


STEPS = """
import os, subprocess, sys, time

def run(place, how):
    place.tell("began", True)
    if how == "dies":
        os.kill(os.getpid(), 9)
    if how == "raises":
        raise ZeroDivisionError("by nought")
    if how == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        place.tell("child", True, pid=child.pid)
        time.sleep(600)
    if how == "finds":
        place.tell("found", False)
"""
PROGRAM = f"""
import sys
sys.path.insert(0, {str(GPU.parent)!r})
import gpu
steps = [gpu.Step(n, "steps_of_the_test", limit, arguments=(how,)) for n, how, limit in
         [(0, "dies", 60), (1, "raises", 60), (2, "hangs", 10), (3, "finds", 60), (4, "passes", 60), (5, "long", 1e6)]]
sys.exit(gpu.main(steps=steps))
"""


def alive(pid: int) -> bool:
    """Whether a process of this number still computes; one that has ended may wait to be taken notice of."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_that_dies_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "steps_of_the_test.py").write_text(STEPS)
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ("--out", str(tmp_path), "--rehearse", "--patience", "1", "--budget_s", "5000")
    done = gpu(*options, program=tmp_path / "program.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = results(tmp_path)
    ends = {line["step"].split()[-1]: line for line in lines if line["check"] == "end"}
    assert {how: end["why"] for how, end in ends.items() if how != "long"} == {
        "dies": "exit code -9",
        "raises": "exit code 1",
        "hangs": "killed at its limit of 10 s",
        "finds": None,
        "passes": None,
    }
    assert ends["long"]["why"].startswith("skipped: ") and not ends["long"]["passed"]
    assert [line["step"].split()[-1] for line in lines if line["check"] == "began"] == list(ends)[:5]
    assert not alive(next(line["pid"] for line in lines if line["check"] == "child"))
    assert "ZeroDivisionError: by nought" in (tmp_path / "log.txt").read_text()
    table = [line for line in done.stdout.splitlines() if "FAILED" in line or "passed" in line]
    assert ["passed" in line for line in table] == [False] * 4 + [True, False], table


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    done = gpu("--rehearse", "--steps", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [line["check"] for line in results(tmp_path)]
    assert checks == ["machine", "copy", "product", "end"]


MACHINE = {
    "step": "0 ceilings", "check": "machine", "passed": True, "device": "cuda", "name": "A made card", "cuda": "13.0",
    "memory_bytes": 100 << 30, "cudnn": 91900, "date": "2001-02-03", "torch": "2.11.0", "triton": "3.6.0",
}  # fmt: skip
SETTINGS = {
    "batch": 4,
    "cameras": 2,
    "recomputed": "full",
    "optimizer": "adamw8bit",
    "precision": "bfloat16_stochastic",
}
SPEED = {"passed": None, "contender": "LeRobot bfloat16 checkpointed", "samples_per_s": 20.0, "fraction": 0.3,
         "peak_bytes": 100 << 30, "batch": 32}  # fmt: skip
MADE = [
    MACHINE,
    {"step": "0 ceilings", "check": "end", "passed": True},
    {"step": "1 attention", "check": "vision, mask none", "passed": True, "chosen": "cudnn", "chosen_s": 2e-3,
     "errors": [1e-3, 2e-3], "fastest": "flash", "fastest_s": 1e-3},
    {"step": "5 peaks", "check": "row", "passed": False, **SETTINGS, "measured_bytes": 17 << 30},
    {"step": "5 peaks", "check": "end", "passed": True},
    {"step": "6 speed lerobot", "check": "LeRobot, eager, 3 of 3", **SPEED},
    {"step": "6 speed compiled", "check": "ours, compiled, 3 of 3", **SPEED, "contender": "agent bfloat16",
     "samples_per_s": 50.0},
    {"step": "6 speed compiled", "check": "end", "passed": False, "why": "killed"},
    {"step": "7 snapshot", "check": "stall", "passed": True, "share": 0.011},
]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page. No made number comes near the real one."""
    return Path(shutil.copy(PAGE, tmp_path))


def report(page: Path, lines: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    made = page.parent / "made.jsonl"
    made.write_text("\n".join(map(json.dumps, lines)))
    return gpu("--report", str(made), "--docs", str(page))


def test_the_report_fills_what_was_measured_and_empties_the_rest(page: Path) -> None:
    before = page.read_text()
    done = report(page, MADE)
    assert done.returncode == 0, done.stderr
    after = page.read_text().splitlines()
    for line in (
        "Measured on 2001-02-03: A made card, 100.0 GiB; torch 2.11.0, triton 3.6.0, CUDA 13.0, cuDNN 91900.",
        "| ours, compiled, 3 of 3 | 50.0 | 2.50 | 1.6 | 0.30 | 0.60 | 100.0 | no |",
        "| LeRobot, eager, 3 of 3 | 20.0 | | | 0.30 | | 100.0 | yes |",
        "| 4 | 2 | full | adamw8bit | bfloat16_stochastic | 16.0 | 17.0 |",
        "| vision | none | cudnn | 2.0e-03 | 2.00 | flash | 1.00 |",
        "| stall of a save | 1.1% of ten updates |",
        "| peaks | peaks within a tenth of the prediction, a full fine-tune within 24 GB | 1 | row |",
        "| speed | every row ends | 2 | end of 6 speed compiled |",
    ):
        assert line in after, line
    assert len(after) == len(before.splitlines())
    # Results of another day, with less in them: nothing of the first is left.
    assert report(page, [MACHINE | {"name": "Another"}]).returncode == 0
    text = page.read_text()
    assert "A made card" not in text and "| ours, compiled, 3 of 3 | | | 1.6 | | 0.60 | | |" in text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([MACHINE | {"device": "cpu"}], "is not of a GPU"),
        (MADE[1:], "is without the line of step 0 that names the machine"),
    ],
)
def test_what_is_not_of_a_gpu_is_not_written(page: Path, lines: list[dict[str, Any]], said: str) -> None:
    before = page.read_text()
    done = report(page, lines)
    assert done.returncode == 1 and said in done.stderr
    assert page.read_text() == before


SUITE = """
import os
import pytest

def test_on_the_cpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

@pytest.mark.gpu
def test_on_the_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
"""


@pytest.mark.parametrize(
    ("options", "passed"), [((), "1 passed, 1 deselected"), (("-m", "gpu"), "1 passed, 1 deselected")]
)
def test_only_tests_that_ask_for_a_gpu_see_one(tmp_path: Path, options: tuple[str, ...], passed: str) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text().replace(
        "assert [path for path in order if not path.is_file()] == []", ""))  # fmt: skip
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), *options,
               "-p", "no:cacheprovider", str(tmp_path)]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and passed in done.stdout, done.stdout + done.stderr
