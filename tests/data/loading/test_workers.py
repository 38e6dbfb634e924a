"""Loader workers that fail, are killed, or outlive the process that trains.

Run: uv run pytest tests/data/loading/test_workers.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
from support.launching import with_support
from support.samples import broken_draw, lives, micro_batches, worker_processes

from agent.data.loading.loader import TrainLoader


def test_errors_in_workers_keep_their_message(data, monkeypatch):
    monkeypatch.setattr(data.reader, "draw", broken_draw)
    with pytest.raises(RuntimeError, match="no noise for sample 0"):
        micro_batches(data, 1, batch=4, workers=1)


def test_signals_spare_workers_and_a_killed_one_is_reported(data):
    loader = TrainLoader(data.reader, data.mixture, per_device_batch=4, num_workers=1)
    next(loader)
    workers = worker_processes()
    assert workers
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker, number)
    for _ in range(5):
        next(loader)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a data worker was killed.*--mem.*num_workers \(now 1\)"):
        for _ in range(20):
            next(loader)
    assert time.monotonic() - begin < 30
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_killed_fork_server_is_reported(data):
    loader = TrainLoader(data.reader, data.mixture, per_device_batch=4, num_workers=2)
    next(loader)
    workers = worker_processes()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the process that forks data workers was killed, as .*memory.*--mem"):
        for _ in range(1000):
            next(loader)
    give_up = time.monotonic() + 20
    while any(lives(worker) for worker in workers):
        assert time.monotonic() < give_up, "a worker lives on"
        time.sleep(0.05)
    assert len(micro_batches(data, 1, batch=4, workers=1)) == 1  # another server is there for those that come


def test_workers_end_with_a_killed_trainer(video, tokenizer, tmp_path):
    code = f"from support import samples; samples.wait_with_workers({str(video)!r}, {tokenizer!r})"
    environment = with_support(HF_DATASETS_CACHE=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    processes = [int(number) for number in trainer.stdout.readline().split()]
    assert len(processes) == 3
    trainer.kill()
    trainer.wait()
    give_up = time.monotonic() + 20
    while any(lives(process) for process in processes):
        assert time.monotonic() < give_up, "the fork server or a worker lives on"
        time.sleep(0.1)
