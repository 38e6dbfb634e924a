"""Many real runs in little time: a server that has imported everything forks a process for each rank.

The processes are real, with real signals and a real process group; only the imports, some ten seconds a process, are
done once. What torchrun adds, its own signals and exit codes, is tested with torchrun in training/test_training.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.launching import REPOSITORY, Workplace

_SERVER = r"""
import json, os, sys
import torch, transformers, lerobot.datasets.lerobot_dataset, agent.run, agent.training.building, agent.training.trainer
import agent.models.pi.model, agent.models.pi.adapter, agent.models.pi.saved
import torch.nn.parallel, torch.distributed, safetensors.numpy, PIL.PngImagePlugin
try:
    import torchcodec.decoders
except Exception:  # on some machines it cannot be imported; there runs read videos with PyAV
    pass
sys.path.insert(0, sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "ended" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["ended"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["environment"])
        torch.set_num_threads(1)
        try:
            if job["hook"]:
                import support.hooks; getattr(support.hooks, job["hook"])()
            code = agent.run.main(job["arguments"])
        except BaseException:
            import traceback; traceback.print_exc(); code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


@dataclass
class ForkedRun:
    """The ranks of one run."""

    place: Workplace
    name: str
    pids: list[int]
    log: Path

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends one rank a signal."""
        os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        """SIGKILL for all ranks, as a node failure does."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def alive(self) -> list[int]:
        """The ranks that still run."""
        return [rank for rank, pid in enumerate(self.pids) if _runs(pid)]

    def wait(self, timeout: float = 120) -> str:
        """Until all ranks are gone; the output."""
        end = time.monotonic() + timeout
        while self.alive():
            assert time.monotonic() < end, f"ranks {self.alive()} still run\n{self.output()}"
            time.sleep(0.02)
        return self.output()

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Until an update with at least this number is logged."""
        end = time.monotonic() + timeout
        while not (lines := self.place.metrics(self.name)) or lines[-1]["step"] < step:
            assert self.alive() and time.monotonic() < end, self.output()
            time.sleep(0.01)

    def wait_for_output(self, text: str, timeout: float = 120) -> None:
        """Until a text has been printed."""
        end = time.monotonic() + timeout
        while text not in self.output():
            assert self.alive() and time.monotonic() < end, self.output()
            time.sleep(0.01)

    def output(self) -> str:
        """What all ranks have printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _runs(pid: int) -> bool:
    try:
        # The server does not collect its children, so one that has ended stays as a zombie. A thread that waits for
        # the disk outlives its main thread, and the process holds its files until it is gone too.
        threads = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return any(text.rpartition(")")[2].split()[0] != "Z" for text in threads)
    except OSError:
        return Path(f"/proc/{pid}/task").exists() and _runs(pid)


class ForkServer:
    """Starts runs; one per test session."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(REPOSITORY / "tests")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(
        self,
        place: Workplace,
        name: str,
        *overrides: str,
        ranks: int = 1,
        hook: str | None = None,
        **environment: str,
    ) -> ForkedRun:
        """A run named ``name``; ``hook`` is a function of `hooks.py` that each rank calls first."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ["--config_path", str(place.folder / "tiny.yaml"), "--name", name, "--data.train.num_workers", "0"]
        log = place.folder / f"{name}-{time.monotonic_ns()}.log"
        pids = []
        for rank in range(ranks):
            launch: dict[str, Any] = {"VLA_LOG_DIR": str(place.folder / "runs"), **environment}
            if ranks > 1:
                launch |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            job = {"arguments": [*arguments, *overrides], "environment": launch, "log": str(log), "hook": hook}
            pids.append(self._ask(job))
        return ForkedRun(place, name, pids, log)

    def run(self, place: Workplace, name: str, *overrides: str, ranks: int = 1, **environment: str) -> tuple[int, str]:
        """A run to its end: the largest exit code of its ranks, and the output."""
        run = self.start(place, name, *overrides, ranks=ranks, **environment)
        output = run.wait(240)
        return max(self._ask({"ended": pid}) for pid in run.pids), output

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the server."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server while the context lasts."""
    server = ForkServer()
    try:
        yield server
    finally:
        server.close()
