"""A policy in the real simulator: the same outcome in any order, from where it was stopped, and what is refused.

Run: REQUIRE_SIM=1 uv run --extra sim pytest tests/simulation/test_evaluate_sim.py      (skipped without the extra)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.forked import ForkServer
from support.launching import MODEL, REPOSITORY, Workplace

from agent import evaluate_sim
from agent.checkpoints.manifest import seal
from agent.deployment.saved_checkpoint import statistics_of
from agent.simulation import starting, watching
from agent.simulation.configuration import SimulationConfig, known_tasks
from agent.simulation.evaluation import Request, digest_of
from agent.simulation.rendering import check_not_blank, choose_backend
from agent.simulation.results import EpisodeResult, ResultsFolder, wilson

HAVE_SIM = find_spec("metaworld") is not None
needs_sim = pytest.mark.skipif(
    not HAVE_SIM and not os.environ.get("REQUIRE_SIM"), reason="the extra `sim` is not installed (uv sync --extra sim)"
)
REACH, BUTTON = "reach-v3", "button-press-topdown-v3"
STEPS = 12  # of an episode; a random policy does not succeed, and need not
choose_backend()  # before anything imports mujoco
EVAL_CFG = {"tasks": [REACH], "episodes": 1, "every": 1, "max_steps": STEPS}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    """A run of two updates on the demonstration data, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("sim")
    config = {
        "model_cfg": MODEL | {"image_resolution": [32, 32], "chunk_size": 8, "n_action_steps": 4},
        "data": {
            "train": {
                "datasets": [{"repo_id": "demo/metaworld", "root": str(REPOSITORY / "demo" / "metaworld")}],
                "num_workers": 0,
            }
        },
        "global_batch_size": 2,
        "per_device_batch_size": 2,
        "n_updates": 2,
        "save_model_freq": 1,
        "eval_freq": 0,
        "use_wandb": False,
        "eval_cfg": EVAL_CFG,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    code, output = server.run(Workplace(folder), "tiny")
    assert code == 0, output
    return folder / "runs" / "tiny"


def evaluate(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """The command as a user gives it."""
    return subprocess.run(
        [sys.executable, "-m", "agent.evaluate_sim", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    )


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the command says of arguments with which it does nothing; here, where the simulator is imported already."""
    capsys.readouterr()
    assert evaluate_sim.main(list(arguments)) == 2
    return capsys.readouterr().err


def episodes_of(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What each episode came to, without the time that it took."""
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return {(row["task"], row["episode"]): {k: v for k, v in row.items() if k != "seconds"} for row in rows}


@pytest.fixture(scope="module")
def reference(run_folder: Path) -> tuple[Path, str]:
    """Both tasks, two episodes each, the first one filmed; folder of the results, and what was printed."""
    command = ["--checkpoint", str(run_folder), "--tasks", f"{REACH},{BUTTON}", "--episodes", "2", "--videos", "1"]
    process = evaluate(*command, "--max_steps", str(STEPS))
    assert process.returncode == 0, process.stderr
    return run_folder / "simulation" / "step_00000002", process.stdout


@needs_sim
def test_prints_a_table_and_writes_results_and_videos(reference: tuple[Path, str]) -> None:
    folder, printed = reference
    assert re.search(rf"{REACH} +0 of 2 +0\.0% +0\.0 to +65\.8%", printed)
    summary = json.loads((folder / "results.json").read_text())
    assert [(row["task"], row["episodes"], row["successes"]) for row in summary["tasks"]] == [
        (REACH, 2, 0),
        (BUTTON, 2, 0),
    ]
    assert summary["tasks"][0]["wilson95"] == list(wilson(0, 2))
    assert summary["settings"]["seed"] == 1000 and summary["settings"]["action_steps"] == 4
    assert [row["environment_seed"] for row in summary["episodes"]] == [1000, 1001] * 2
    assert sorted(path.name for path in (folder / "videos").iterdir()) == [f"{BUTTON}_000.mp4", f"{REACH}_000.mp4"]


@needs_sim
def test_a_video_shows_the_episode(reference: tuple[Path, str]) -> None:
    import av

    with av.open(str(reference[0] / "videos" / f"{REACH}_000.mp4")) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(images) == STEPS + 1
    assert images[0].shape[0] >= 384 and images[0].std() > 20
    assert np.abs(images[0].astype(int) - images[-1]).max() > 60  # the arm has moved


@needs_sim
def test_order_and_number_of_episodes_change_no_outcome(
    run_folder: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    command = [
        "--checkpoint",
        str(run_folder),
        "--tasks",
        f"{BUTTON},{REACH}",
        "--episodes",
        "1",
        "--out",
        str(tmp_path),
    ]
    process = evaluate(*command, "--max_steps", str(STEPS))
    assert process.returncode == 0, process.stderr
    again, before = episodes_of(tmp_path), episodes_of(reference[0])
    assert again == {key: row for key, row in before.items() if key[1] == 0}
    assert len({row["reward"] for row in before.values()}) == 4  # and they are not all alike


@needs_sim
def test_continues_after_a_kill(run_folder: Path, reference: tuple[Path, str], tmp_path: Path) -> None:
    command = [
        "--checkpoint",
        str(run_folder),
        "--tasks",
        f"{REACH},{BUTTON}",
        "--episodes",
        "2",
        "--out",
        str(tmp_path),
    ]
    command += ["--max_steps", str(STEPS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.evaluate_sim", *command], stderr=subprocess.DEVNULL, cwd=REPOSITORY
    )
    episodes = tmp_path / "episodes.jsonl"
    while not episodes.exists() or not episodes.read_text().strip():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(episodes.read_text().splitlines())
    assert 1 <= done < 4
    with episodes.open("a") as stream:  # as if it had died in the middle of a line
        stream.write('{"task": "reach-v3", "epis')
    process = evaluate(*command)
    assert process.returncode == 0, process.stderr
    assert len(re.findall(r"episode \d+:", process.stderr)) == 4 - done
    assert episodes_of(tmp_path) == episodes_of(reference[0])


@needs_sim
def test_repeated_plays_only_what_is_missing_and_no_other_settings(
    run_folder: Path, reference: tuple[Path, str], capsys: pytest.CaptureFixture
) -> None:
    before = (reference[0] / "episodes.jsonl").read_text()
    command = ["--checkpoint", str(run_folder), "--tasks", REACH, "--episodes", "2", "--max_steps", str(STEPS)]
    process = evaluate(*command)
    assert process.returncode == 0 and "0 of 2 episodes to play" in process.stderr
    assert (reference[0] / "episodes.jsonl").read_text() == before
    assert "seed: 1000 → 7" in refused(capsys, *command, "--seed", "7")
    other = run_folder / "checkpoints" / "step_00000001"
    said = refused(capsys, "--checkpoint", str(other), *command[2:], "--out", str(reference[0]))
    assert re.search(r"results of another evaluation \(checkpoint: \w{32} → \w{32}\)", said)


@needs_sim
def test_evaluates_the_checkpoints_that_eval_cfg_names(run_folder: Path) -> None:
    process = evaluate("--run", str(run_folder))
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in (run_folder / "simulation" / "success.jsonl").read_text().splitlines()]
    assert [(row["step"], row["task"], row["episodes"]) for row in rows if row["task"] == REACH][0] == (1, REACH, 1)
    assert {row["step"] for row in rows} == {1, 2}
    config = run_folder / "config.yaml"
    written = config.read_text()
    config.write_text(written.replace("  seed: 1000\n", "  seed: 7\n"))
    try:
        process = evaluate("--run", str(run_folder), "--once")
    finally:
        config.write_text(written)
    assert process.returncode == 1 and "step_00000001, step_00000002 could not be evaluated" in process.stderr
    assert "step_00000001 holds results of another evaluation (seed: 1000 → 7)" in process.stderr


def edited(run_folder: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the policy whose config.json ``change`` has changed."""
    copy = tmp_path / "policy"
    shutil.copytree(run_folder / "checkpoints" / "last" / "pretrained_model", copy)
    content = json.loads((copy / "config.json").read_text())
    change(content)
    (copy / "config.json").write_text(json.dumps(content))
    return copy


def other_camera(config: dict[str, Any]) -> None:
    features = config["input_features"]
    features["observation.images.wrist"] = features.pop("observation.image")


@needs_sim
def test_refuses_a_policy_that_sees_something_else(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy = edited(run_folder, tmp_path, other_camera)
    said = refused(capsys, "--checkpoint", str(policy), "--tasks", REACH, "--out", str(tmp_path / "out"))
    assert "the environment has observation.image, the policy wants observation.images.wrist" in said


@needs_sim
def test_a_policy_of_several_robots_acts_on_the_one_that_is_named(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy = edited(run_folder, tmp_path, lambda config: None)
    own = {
        feature: {name: values.tolist() for name, values in entry.items()}
        for feature, entry in (statistics_of(policy) or {}).items()
    }
    robots = {name: {"statistics": own, "action_names": None} for name in ("lab/arm", "lab/sawyer")}
    (policy / "robots.json").write_text(json.dumps({"processors_are_of": "lab/arm", "robots": robots}))
    command = ["--checkpoint", str(policy), "--tasks", REACH, "--episodes", "1", "--max_steps", "2"]
    process = evaluate(*command, "--out", str(tmp_path / "out"), "--statistics", "lab/sawyer")
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["statistics"] == "lab/sawyer"
    assert "(statistics: lab/sawyer → lab/arm)" in refused(capsys, *command, "--out", str(tmp_path / "out"))


@needs_sim
@pytest.mark.parametrize(
    ("file", "said"),
    [("policy_preprocessor.json", "policy_preprocessor.json"), ("model.safetensors", "model.safetensors")],
)
def test_refuses_a_checkpoint_that_lacks_a_part(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, file: str, said: str
) -> None:
    policy = edited(run_folder, tmp_path, lambda config: None)
    (policy / file).unlink()
    out = tmp_path / "out"
    assert said in refused(capsys, "--checkpoint", str(policy), "--tasks", REACH, "--out", str(out))
    assert not out.exists()


@needs_sim
def test_asks_where_results_are_to_go_before_it_loads(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy = edited(run_folder, tmp_path, lambda config: None)
    (policy / "model.safetensors").write_bytes(b"never read")
    said = refused(capsys, "--checkpoint", str(policy), "--tasks", REACH)
    assert f"--out: {policy} is not in a run folder, so say where the results are to go" in said


@needs_sim
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "reech-v3"], "no task 'reech-v3'; the nearest name is reach-v3"),
        (["--tasks", ""], "--tasks names no task"),
        (["--tasks", REACH, "--episodes", "0"], "--episodes must be at least 1"),
        (["--tasks", REACH, "--max_steps", "501"], "--max_steps must be 1 to 500"),
        (["--tasks", REACH, "--seed", "99990"], "from where on the demonstrations were recorded"),
    ],
)
def test_refuses_what_cannot_be_played(arguments: list[str], said: str) -> None:
    from agent.simulation.metaworld import TASK_DESCRIPTIONS

    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    request = Request(
        tuple(options["--tasks"].split(",")) if options["--tasks"] else (),
        int(options.get("--episodes", 20)),
        int(options.get("--seed", 1000)),
        int(options.get("--max_steps", 500)),
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        request.check(list(TASK_DESCRIPTIONS))


@needs_sim
def test_two_environments_at_once_show_what_each_shows_alone() -> None:
    from agent.simulation.metaworld import PlainMetaworldEnv

    def pictures(environment: PlainMetaworldEnv) -> list[np.ndarray]:
        first, _ = environment.reset(seed=1003)
        return [first["pixels"], environment.step(np.array([1, 1, -1, 1], np.float32))[0]["pixels"]]

    alone = {}
    for task in (REACH, BUTTON):
        environment = PlainMetaworldEnv(task, 64, 64)
        alone[task] = pictures(environment)
        environment.close()
    both = {task: PlainMetaworldEnv(task, 64, 64) for task in (REACH, BUTTON)}
    for environment in both.values():
        environment.reset(seed=5)
    for task, environment in both.items():
        assert all(np.array_equal(a, b) for a, b in zip(pictures(environment), alone[task], strict=True))
        check_not_blank(environment.render())
    both[REACH].close()
    assert np.array_equal(pictures(both[BUTTON])[0], alone[BUTTON][0])
    both[BUTTON].close()
    assert not np.array_equal(alone[REACH][0], alone[BUTTON][0])


@needs_sim
def test_the_tasks_are_known_without_the_simulator() -> None:
    from agent.simulation.metaworld import TASK_DESCRIPTIONS

    assert known_tasks() == list(TASK_DESCRIPTIONS)


@needs_sim
def test_lerobot_knows_the_environment() -> None:
    from lerobot.envs.factory import make_env

    from agent.simulation.metaworld import PlainMetaworldConfig

    config = PlainMetaworldConfig(task=f"{REACH},{BUTTON}", height=32, width=32)
    assert config.type == "metaworld_plain"
    environments = make_env(config, n_envs=1)
    assert list(environments) == [REACH, BUTTON]
    observation, _ = environments[BUTTON][0].reset(seed=[3])
    assert observation["pixels"].shape == (1, 32, 32, 3) and observation["pixels"].std() > 20
    for group in environments.values():
        group[0].close()


# ---- without the simulator


def test_says_how_to_install_the_simulator(tmp_path: Path) -> None:
    (tmp_path / "metaworld.py").write_text("raise ModuleNotFoundError('no', name='metaworld')")
    process = evaluate("--checkpoint", "x", "--tasks", REACH, PYTHONPATH=str(tmp_path))
    assert process.returncode == 2
    assert "metaworld is not installed" in process.stderr and "uv sync --extra sim" in process.stderr


@pytest.mark.parametrize(
    "error",
    [
        "AttributeError(\"'NoneType' object has no attribute 'eglQueryString'\")",
        "ImportError('Cannot initialize a EGL')",
    ],
)
def test_says_what_a_machine_needs_that_cannot_render(tmp_path: Path, error: str) -> None:
    """As PyOpenGL and MuJoCo put it, when the library or a device is not there."""
    (tmp_path / "metaworld.py").write_text(f"raise {error}")
    process = evaluate("--checkpoint", "x", "--tasks", REACH, PYTHONPATH=str(tmp_path))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert re.search(r"error: MuJoCo cannot render here \(.*try the other of egl and osmesa.*libegl1", process.stderr)


def test_answers_at_once_what_it_is_to_do() -> None:
    process = evaluate("--tasks", REACH, timeout=60)
    assert process.returncode == 2 and "--checkpoint DIR, or --run DIR" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "runs/x", "--episodes", "20"], "--episodes: with --run, runs/x/config.yaml says this in eval_cfg"),
        (["--run", "runs/x", "--tasks", REACH, "--out", "o"], "--tasks, --out: with --run, "),
        (
            ["--run", "runs/x", "--statistics", "arm"],
            "--statistics: with --run, a policy acts on its run's data.train.deploy",
        ),
        (["--checkpoint", "runs/x", "--tasks", REACH, "--once"], "--once has no effect with --checkpoint"),
    ],
)
def test_refuses_an_option_without_effect(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in refused(capsys, *arguments)


def test_an_interrupt_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_sim, "evaluate_sim", interrupted)
    assert evaluate_sim.main(["--checkpoint", "x", "--tasks", REACH]) == 130
    assert capsys.readouterr().err == "stopped; the same command plays what is missing\n"


def test_finds_blank_images() -> None:
    random = np.random.default_rng(0)
    check_not_blank(random.integers(0, 255, (32, 32, 3), np.uint8))
    for grey in (0, 128):
        with pytest.raises(RuntimeError, match="blank image .* egl and osmesa"):
            check_not_blank(np.full((32, 32, 3), grey, np.uint8))


@pytest.mark.parametrize(
    # From the formula's closed form for 0 and n, and from R's binom.confint(…, methods = "wilson").
    ("successes", "episodes", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (8, 20, 0.21880, 0.61342), (40, 50, 0.66964, 0.88756)],
)
def test_wilson(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=2e-5)


def test_results_survive_and_are_not_mixed(tmp_path: Path) -> None:
    row = EpisodeResult(REACH, 0, 1000, True, 40, 12.5, 1.0)
    first = ResultsFolder(tmp_path, {"checkpoint": "a", "seed": 1})
    with pytest.raises(ValueError, match="another evaluation is writing"):
        ResultsFolder(tmp_path, {"checkpoint": "a", "seed": 1})
    first.add(row)
    first.close()
    second = ResultsFolder(tmp_path, {"checkpoint": "a", "seed": 1})
    assert {key: asdict(value) for key, value in second.done.items()} == {(REACH, 0): asdict(row)}
    second.close()
    with pytest.raises(ValueError, match="checkpoint: a → b"):
        ResultsFolder(tmp_path, {"checkpoint": "b", "seed": 1})
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1, is no result"):
        ResultsFolder(tmp_path, {"checkpoint": "a", "seed": 1})


def test_the_summary_keeps_what_was_done_before(tmp_path: Path) -> None:
    results = ResultsFolder(tmp_path, {"checkpoint": "a"})
    for task, episode, success in ((REACH, 0, True), (REACH, 1, False), (REACH, 3, True), (BUTTON, 0, True)):
        results.add(EpisodeResult(task, episode, 1000 + episode, success, 40, 12.5, 1.0))
    summary = results.summarize([BUTTON], 1)
    assert summary == json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], row["episodes"], row["successes"]) for row in summary["tasks"]] == [
        (BUTTON, 1, 1),
        (REACH, 2, 1),
    ]
    assert [(row["task"], row["episode"]) for row in summary["episodes"]] == [(BUTTON, 0), (REACH, 0), (REACH, 1)]
    assert results.summarize([REACH], 1)["tasks"][0]["episodes"] == 2  # fewer asked for than there are
    results.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": []}, "eval_cfg.tasks is empty"),
        ({"episodes": 0}, "eval_cfg.episodes must be at least 1"),
        ({"max_steps": 501}, "eval_cfg.max_steps must be 1 to 500"),
        ({"tasks": ["reech-v3"]}, "eval_cfg.tasks: Meta-World has no task 'reech-v3'; the nearest name is reach-v3"),
        ({"tasks": [REACH, REACH]}, "eval_cfg.tasks names a task twice; raise eval_cfg.episodes instead"),
        ({"seed": 99_990, "episodes": 11}, "eval_cfg.seed 99990 with 11 episodes reaches 100000"),
        (
            {"every": 7},
            "eval_cfg.every: 7 is not a multiple of save_model_freq (4), so that there is no checkpoint; write 4 or 8",
        ),
    ],
)
def test_eval_cfg_is_checked(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        SimulationConfig(**(EVAL_CFG | change)).check(4)


def test_training_starts_the_evaluation_beside_itself(tmp_path: Path, server: ForkServer) -> None:
    place = Workplace.make(tmp_path)
    script = tmp_path / "evaluate.sh"
    script.write_text('echo "$1" "gpus:$CUDA_VISIBLE_DEVICES" "attempt:${VLA_ATTEMPT-}" >"$1/started.txt"; sleep 600')
    config = yaml.safe_load((tmp_path / "tiny.yaml").read_text()) | {"n_updates": 1, "eval_freq": 0}
    config["eval_cfg"] = EVAL_CFG | {"every": 4, "start": "process", "script": str(script)}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    code, output = server.run(place, "tiny", VLA_ATTEMPT="of the training")
    assert code == 0, output
    (process,) = re.findall(r"evaluation in simulation: process (\d+)", output)
    os.killpg(int(process), signal.SIGKILL)  # it is still there, the leader of a session of its own
    run = tmp_path / "runs" / "tiny"
    assert (run / "started.txt").read_text() == f"{run} gpus: attempt:\n"


def started(config: SimulationConfig, run_dir: Path) -> None:
    thread = starting.start(config, run_dir)
    assert thread is not None
    thread.join(60)


def test_a_start_that_takes_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\nuntil [[ -e {tmp_path}/answer ]]; do sleep 0.05; done; echo job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    thread = starting.start(SimulationConfig(**EVAL_CFG, start="sbatch"), tmp_path / "run")
    assert thread is not None and thread.is_alive()
    (tmp_path / "answer").touch()
    thread.join(60)
    assert "evaluation in simulation: job 7" in caplog.text


def test_a_start_that_fails_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 'Invalid account' >&2; exit 1\n")
    sbatch.chmod(0o755)
    config = SimulationConfig(**EVAL_CFG, start="sbatch")
    for path in (str(tmp_path), str(tmp_path / "nowhere")):
        monkeypatch.setenv("PATH", path + os.pathsep + "/usr/bin" if path == str(tmp_path) else path)
        started(config, tmp_path / "run")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("could not be started, training goes on: Invalid account")
    assert "could not be started, training goes on" in second and "sbatch" in second
    assert starting.start(SimulationConfig(**EVAL_CFG), tmp_path / "run") is None
    assert starting.start(None, tmp_path / "run") is None
    assert len(caplog.records) == 2
    monkeypatch.undo()
    started(SimulationConfig(**EVAL_CFG, start="process", script="nowhere.sh"), tmp_path / "run")
    assert "could not be started, training goes on: eval_cfg.script: there is no nowhere.sh in" in caplog.messages[-1]


def test_the_script_evaluates_a_run(tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/bash\necho "$UV_PROJECT_ENVIRONMENT|$MUJOCO_GL|${CUDA_VISIBLE_DEVICES-unset}|$*"\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "JobId=4 TRES=cpu=2 $FAKE_TRES"\n')
    for file in ("uv", "scontrol"):
        (tmp_path / file).chmod(0o755)
    script = REPOSITORY / "slurms" / "eval_scripts" / "pi0_metaworld.sh"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "VLA_LOG_DIR": "/logs"}

    def said(*arguments: str, **more: str) -> str:
        command = ["bash", str(script), *arguments]
        done = subprocess.run(command, env=environment | more, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    module = "run --extra sim python -m agent.evaluate_sim --run"
    assert said() == f"{REPOSITORY}/.venv-sim|egl|unset|{module} /logs/pi0_metaworld"
    assert said("/logs/mine", "--once") == f"{REPOSITORY}/.venv-sim|egl|unset|{module} /logs/mine --once"
    assert "|egl|1|" in said(CUDA_VISIBLE_DEVICES="1")
    job = {"SLURM_JOB_ID": "4", "CUDA_VISIBLE_DEVICES": "0,1"}  # as a training that submits it has them
    assert "|egl||" in said(**job)
    assert "|egl|0,1|" in said(**job, FAKE_TRES="TresPerNode=gres:gpu:1")


def test_a_run_without_eval_cfg_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*config.yaml"):
        watching.read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match="has no eval_cfg"):
        watching.read_config(tmp_path)


def test_a_checkpoint_that_cannot_be_evaluated_is_told_in_the_exit_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"eval_cfg": EVAL_CFG}))
    watching.watch(tmp_path, [REACH], once=True)
    assert f"{tmp_path} has no complete checkpoint to evaluate" in caplog.text
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(RuntimeError, match="step_00000001 could not be evaluated"):
        watching.watch(tmp_path, [REACH], once=True)


def played(out: Path, checkpoint: Path, episodes: int = 1, **settings: Any) -> None:
    """The results of an evaluation."""
    folder = ResultsFolder(out, {"checkpoint": digest_of(checkpoint / "pretrained_model"), **settings})
    for episode in range(episodes):
        folder.add(EpisodeResult(REACH, episode, 1000 + episode, True, 9, 1.0, 1.0))
    folder.summarize([REACH], episodes)
    folder.close()


def saved(run: Path, step: int, contents: str = "{}") -> Path:
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    (checkpoint / "pretrained_model").mkdir(parents=True)
    (checkpoint / "pretrained_model" / "config.json").write_text(contents)
    seal(checkpoint, step)
    return checkpoint


def test_knows_what_is_evaluated_already(tmp_path: Path) -> None:
    checkpoint, out = saved(tmp_path, 4), tmp_path / "simulation" / "step_00000004"
    played(out, checkpoint, seed=1000, max_steps=STEPS)
    request = Request((REACH,), episodes=1, max_steps=STEPS)
    assert watching.is_complete(out, request, checkpoint)
    for change in ({"seed": 7}, {"max_steps": 13}, {"episodes": 2}, {"tasks": (REACH, BUTTON)}, {"videos": 1}):
        assert not watching.is_complete(out, replace(request, **change), checkpoint), change
    (out / "videos").mkdir()
    (out / "videos" / f"{REACH}_000.mp4").touch()
    assert watching.is_complete(out, replace(request, videos=1), checkpoint)
    (checkpoint / "pretrained_model" / "config.json").write_text("[]")  # the run went back and came here again
    assert not watching.is_complete(out, request, checkpoint)


def test_the_curve_is_of_what_eval_cfg_evaluates(tmp_path: Path) -> None:
    for name, step, seed in (("step_00000004", 4, 1000), ("step_00000004_ema", 5, 1000), ("step_00000006", 6, 7)):
        played(tmp_path / "simulation" / name, saved(tmp_path, step), seed=seed, max_steps=STEPS)
    (tmp_path / "simulation" / "step_00000008").mkdir()  # not evaluated to the end
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"eval_cfg": EVAL_CFG}))
    with pytest.raises(RuntimeError, match="step_00000005, step_00000006 could not be evaluated"):
        watching.watch(tmp_path, [REACH], once=True)  # nothing is new
    (line,) = (tmp_path / "simulation" / "success.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 4


def test_says_which_checkpoints_it_came_too_late_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"eval_cfg": EVAL_CFG | {"every": 2}}))
    for step in (4, 9):
        played(tmp_path / "simulation" / f"step_{step:08d}", saved(tmp_path, step), seed=1000, max_steps=STEPS)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")  # after its evaluation
    watching.watch(tmp_path, [REACH], once=True)
    assert "the checkpoints of the updates 2, 6, 8 were removed before they could be evaluated" in caplog.text


def test_a_run_that_trains_again_is_watched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second attempt starts finds the first one's process at work, and leaves."""

    def say(state: str) -> None:
        (tmp_path / "status.json").write_text(json.dumps({"state": state, "updated": time.time()}))

    def fake_evaluate(checkpoint: str, request: Request, out: Any, **_: Any) -> dict[str, Any]:
        evaluated.append(Path(checkpoint).name)
        if len(evaluated) == 1:  # during which the run is requeued and goes on
            say("running")
            saved(tmp_path, 8)
        else:
            say("finished")
        played(out(Path(checkpoint)), Path(checkpoint), seed=1000, max_steps=STEPS)
        return json.loads((out(Path(checkpoint)) / "results.json").read_text())

    evaluated: list[str] = []
    monkeypatch.setattr(watching, "evaluate", fake_evaluate)
    monkeypatch.setattr(watching, "POLL_S", 0.0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"eval_cfg": EVAL_CFG}))
    say("preempted")
    saved(tmp_path, 4)
    watching.watch(tmp_path, [REACH], once=False)
    assert evaluated == ["step_00000004", "step_00000008"]


def test_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    ResultsFolder(tmp_path / "out", {"checkpoint": "a"}).close()
    assert f"{tmp_path / 'out'} cannot be locked" in caplog.text
    (tmp_path / ".lock").touch()
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "updated": time.time() - 7200}))
    assert not watching.is_training(tmp_path)


def test_chooses_checkpoints(tmp_path: Path) -> None:
    for step in (500, 1000, 1500, 2000, 2300):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        if step != 1000:  # which is being written
            (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "last").symlink_to("step_00002300")
    names = [path.name for path in watching.chosen(tmp_path, 1000, last=False)]
    assert names == ["step_00002000"]
    assert [path.name for path in watching.chosen(tmp_path, 1000, last=True)] == ["step_00002000", "step_00002300"]


def test_knows_whether_a_run_trains(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    assert not watching.is_training(tmp_path)
    lock = tmp_path / ".lock"
    lock.touch()
    for state, age, held, expected in (
        ("finished", 0, False, False),
        ("running", 0, False, True),
        ("running", 7200, False, False),
        ("running", 7200, True, True),
    ):
        status.write_text(json.dumps({"state": state, "updated": time.time() - age}))
        with open(lock) as stream:
            if held:
                fcntl.flock(stream, fcntl.LOCK_EX)
            assert watching.is_training(tmp_path) is expected


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt install shellcheck)")
def test_shellcheck() -> None:
    scripts = sorted(map(str, (REPOSITORY / "slurms" / "eval_scripts").glob("*.sh")))
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stdout
