"""Two real processes that save together: forked, as importing torch takes longer than all they do.

Run by tests/checkpoints/test_checkpoint_writer.py: python -m support.save_in_ranks SCENARIO FOLDER [TRIALS].
Each rank leaves its report.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from agent.checkpoints import store as checkpoint
from agent.checkpoints import tensor_file, tensor_reader
from agent.checkpoints.manifest import verify
from agent.checkpoints.store import PRETRAINED, TRAINING, CheckpointStore
from agent.checkpoints.writer import CheckpointWriter
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from support.stores import contents, newest

WEIGHTS = f"{PRETRAINED}/model.safetensors"
OPTIMIZER = f"{TRAINING}/optimizer"
STATE = f"{TRAINING}/state.json"


def tensors(step: int, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    """A state whose every number says which step it is of."""
    weight = {f"layer.{i}": torch.full((size,), step + i / 8) for i in range(4)}
    moments = {f"exp_avg/{name}": tensor * 2 for name, tensor in weight.items()}
    steps = {f"step/{name}": torch.tensor(float(step)) for name in weight}
    return {WEIGHTS: weight, f"{OPTIMIZER}.safetensors": moments | steps}


def write_state(path: Path, step: int) -> None:
    path.write_text(json.dumps({"step": step}))


def small(step: int) -> Callable[[Path], None]:
    return lambda folder: write_state(folder / STATE, step)


def start_save(writer: CheckpointWriter, step: int, size: int = 1000) -> float:
    return writer.save(step, tensors(step, size), {f"{OPTIMIZER}.safetensors"}, small(step))


def wrong_contents(path: Path) -> str | None:
    """None if a checkpoint holds exactly what was saved at its step."""
    step = int(path.name.removeprefix("step_"))
    found = {
        WEIGHTS: tensor_reader.read(path / WEIGHTS),
        f"{OPTIMIZER}.safetensors": {
            name: tensor
            for part in tensor_reader.parts(path, OPTIMIZER)
            for name, tensor in tensor_reader.read(part).items()
        },
    }
    expected = tensors(step, len(found[WEIGHTS]["layer.0"]))
    for name, group in expected.items():
        if group.keys() != found[name].keys() or any(not torch.equal(t, found[name][key]) for key, t in group.items()):
            return f"{path}: {name} is not what was saved"
    if json.loads((path / STATE).read_text()) != {"step": step}:
        return f"{path}: {STATE} is not what was saved"
    return None


def fork_ranks(action: Callable[[int, Processes], None], world: int = 2) -> list[int]:
    """Starts processes in one process group; their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                launch = Launch(rank, rank, world, world, under_torchrun=True)
                action(rank, Processes(launch, torch.device("cpu")))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    return pids


def report(folder: Path, rank: int, content: dict[str, Any]) -> None:
    (folder / f"report-{rank}.json").write_text(json.dumps(content, default=str))


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────


def failures(folder: Path) -> None:
    """Saves that fail on one rank only, between two that do not."""

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(rank: int, processes: Processes) -> None:
        store = CheckpointStore(folder / "run", keep=3)
        writer = CheckpointWriter(store, processes)
        outcomes, unharmed, cancelled = [], True, False
        write, disk_usage, state = tensor_file._blocks, checkpoint.shutil.disk_usage, write_state

        def slow_blocks(*arguments: Any) -> Any:
            for block in write(*arguments):
                yield block
                for _ in range(100):  # twenty seconds for two files, if nobody calls it off
                    time.sleep(0.05)
                    yield memoryview(b"")

        for step in (5, 10, 15, 20, 25):
            before = processes.gather(contents(store.folder))
            if step == 10 and rank == 1:
                tensor_file.os = type("FullDisk", (), {**vars(os), "write": staticmethod(full)})  # type: ignore[attr-defined]
            if step == 10 and rank == 0:
                tensor_file._blocks = slow_blocks
            if step == 15:
                globals()["write_state"] = full
            if step == 20 and rank == 0:
                usage = disk_usage(folder)
                checkpoint.shutil.disk_usage = lambda _, usage=usage: usage._replace(free=0)
            begin = time.monotonic()
            start_save(writer, step)
            outcome = writer.wait()
            if step == 10:
                cancelled = time.monotonic() - begin < 10  # rank 0 did not go on writing in vain
            tensor_file.os, tensor_file._blocks = os, write  # type: ignore[attr-defined]
            globals()["write_state"], checkpoint.shutil.disk_usage = state, disk_usage
            assert outcome is not None
            outcomes.append(asdict(outcome))
            if outcome.error is not None:
                unharmed = unharmed and processes.gather(contents(store.folder)) == before
        report(folder, rank, {"outcomes": outcomes, "unharmed": unharmed, "cancelled": cancelled})
        writer.close()
        processes.close()

    for pid in fork_ranks(run):
        assert os.waitpid(pid, 0)[1] == 0


# ── kills ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kills(folder: Path, trials: int) -> None:
    """Kills a random rank at a random moment of a save, again and again, in one run that goes on each time."""
    draw = random.Random(trials)
    store = CheckpointStore(folder / "run", keep=2)
    told = folder / "acknowledged"
    wrong: list[str] = []
    killed = [0, 0]
    torn = acknowledged = step = 0
    for trial in range(trials):
        begun_read, begun_write = os.pipe()
        first, kill_at_save = step + 1, draw.randrange(1, 3)

        def run(
            rank: int,
            processes: Processes,
            first: int = first,
            signal_at: int = kill_at_save,
            out: int = begun_write,
        ) -> None:
            writer = CheckpointWriter(store, processes)
            for number in range(20):
                if rank == 0 and number == signal_at:
                    os.write(out, b"x")
                start_save(writer, first + number, 30_000)
                while (outcome := writer.poll()) is None:
                    time.sleep(0.0005)
                assert outcome.error is None
                if rank == 0:
                    with open(told, "a") as stream:
                        stream.write(f"{outcome.step}\n")

        errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        kept = os.dup(2)
        os.dup2(errors, 2)
        pids = fork_ranks(run)
        os.dup2(kept, 2)
        os.close(errors)
        os.close(kept)
        os.close(begun_write)
        assert os.read(begun_read, 1) == b"x", (folder / "stderr").read_text()
        os.close(begun_read)
        time.sleep(draw.random() * 0.03)
        victim = draw.randrange(2)
        os.kill(pids[victim], signal.SIGKILL)
        killed[victim] += 1
        if not wait_all(pids, 10):
            wrong.append(f"trial {trial}: rank {1 - victim} outlived rank {victim} by 10 s")
        told_steps = [int(line) for line in told.read_text().split()] if told.exists() else []
        acknowledged = len(told_steps)
        torn += any(store.folder.glob(".step_*.tmp"))
        wrong += [f"trial {trial}: {text}" for text in what_is_wrong(store, told_steps)]
        step = newest(store).step
    report(folder, 0, {"trials": trials, "wrong": wrong, "killed": killed, "torn": torn, "acknowledged": acknowledged})


def wait_all(pids: list[int], seconds: float) -> bool:
    """Whether all end in time; those that do not are killed."""
    end = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < end:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.001)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not left


def what_is_wrong(store: CheckpointStore, told_steps: list[int]) -> list[str]:
    """Every guarantee that does not hold of a store, given the steps that were acknowledged."""
    problems = []
    found = newest(store)
    if found.passed_over:
        problems.append(f"damaged: {found.passed_over}")
    present = {int(p.name.removeprefix("step_")): p for p in store.folder.glob("step_*")}
    for step in told_steps:  # two are kept, acknowledged or not
        if step not in present and len([newer for newer in present if newer > step]) < 2:
            problems.append(f"step {step} was acknowledged and is gone; there are {sorted(present)}")
    if told_steps and found.step < max(told_steps):
        problems.append(f"step {max(told_steps)} was acknowledged, {found.step} is the newest")
    for path in present.values():
        if verify(path) is not None or wrong_contents(path) is not None:
            problems.append(f"{path}: {verify(path) or wrong_contents(path)}")
    last = store.folder / "last"
    if present and verify(last) is not None:
        problems.append(f"last: {verify(last)}")
    return problems


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "failures":
        failures(Path(sys.argv[2]))
    else:
        kills(Path(sys.argv[2]), int(sys.argv[3]))
