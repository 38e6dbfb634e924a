"""Saving in the background: one process and two, failures on either, full disks, and kills at random moments.

Run: pytest tests/checkpoints/test_checkpoint_writer.py            (about ten seconds)
     pytest -m slow tests/checkpoints/test_checkpoint_writer.py    (a save killed 200 times, about a minute)
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import save_in_ranks as ranks
from support.launching import with_support
from support.save_in_ranks import OPTIMIZER, STATE, WEIGHTS
from support.stores import newest

from agent.checkpoints import manifest, tensor_file
from agent.checkpoints import store as checkpoint
from agent.checkpoints.host_snapshot import HostSnapshot
from agent.checkpoints.manifest import MANIFEST, verify
from agent.checkpoints.store import PRETRAINED, TRAINING, CheckpointStore
from agent.checkpoints.writer import CheckpointWriter, Outcome, share
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes


@pytest.fixture
def alone() -> Processes:
    return Processes(Launch(), torch.device("cpu"))


def writer_for(run_dir: Path, processes: Processes, **retention) -> tuple[CheckpointStore, CheckpointWriter]:
    store = CheckpointStore(run_dir, **{"keep": 3, **retention})
    return store, CheckpointWriter(store, processes)


def save_and_wait(writer: CheckpointWriter, step: int, size: int = 1000) -> Outcome:
    ranks.start_save(writer, step, size)
    outcome = writer.wait()
    assert outcome is not None and writer.poll() is None
    return outcome


def test_a_save_in_the_background_is_a_checkpoint(tmp_path, alone):
    store, writer = writer_for(tmp_path, alone)
    assert writer.poll() is None and writer.wait() is None
    outcome = save_and_wait(writer, 5)
    path = tmp_path / "checkpoints" / "step_00000005"
    assert (outcome.step, outcome.path, outcome.error) == (5, path, None) and outcome.background_s > 0
    assert outcome.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name != MANIFEST)
    assert newest(store).path == path and os.readlink(store.folder / "last") == path.name
    assert ranks.wrong_contents(path) is None
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", path.name]
    assert writer.poll() is None and writer.wait() is None
    assert set(manifest.files_of(path)) == {WEIGHTS, STATE, f"{OPTIMIZER}.safetensors"}


def test_the_outcome_comes_at_a_boundary_without_waiting(tmp_path, alone):
    _, writer = writer_for(tmp_path, alone)
    ranks.start_save(writer, 5)
    polls = 1
    while (outcome := writer.poll()) is None:
        polls += 1
        time.sleep(0.001)
    assert outcome.step == 5 and outcome.error is None and polls > 1


def test_what_changes_after_the_save_is_not_written(tmp_path, alone, monkeypatch):
    _, writer = writer_for(tmp_path, alone)
    finish = HostSnapshot.finish  # what the thread begins with: the copy; here nothing is copied before `settle`
    monkeypatch.setattr(HostSnapshot, "finish", lambda self: (time.sleep(0.2), finish(self))[1])
    for step in (5, 10, 15):
        files = ranks.tensors(step, 10_000)
        expected = {path: {name: t.clone() for name, t in tensors.items()} for path, tensors in files.items()}
        stall = writer.save(step, files, {f"{OPTIMIZER}.safetensors"}, ranks.small(step))
        writer.settle()
        for tensors in files.values():
            for tensor in tensors.values():
                tensor.fill_(-1)
        assert stall < 0.2
        outcome = writer.wait()
        assert outcome is not None and outcome.path is not None
        for path, tensors in expected.items():
            loaded = load_file(outcome.path / path)
            assert loaded.keys() == tensors.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_memory_of_the_snapshot_is_reused(tmp_path, alone):
    _, writer = writer_for(tmp_path, alone)
    writer.prepare(ranks.tensors(1, 1000), {f"{OPTIMIZER}.safetensors"})
    blocks = {writer._snapshot._block.data_ptr()}  # type: ignore[union-attr]
    for step in (5, 10, 15):
        save_and_wait(writer, step)
        blocks.add(writer._snapshot._block.data_ptr())  # type: ignore[union-attr]
    assert len(blocks) == 1
    writer.close()
    assert writer._snapshot._block is None


def test_a_save_waits_for_the_one_before_and_loses_no_outcome(tmp_path, alone, monkeypatch):
    store, writer = writer_for(tmp_path, alone)
    write = tensor_file.write
    monkeypatch.setattr(tensor_file, "write", lambda *args: (time.sleep(0.2), write(*args))[1])
    assert ranks.start_save(writer, 5) < 0.2
    assert ranks.start_save(writer, 10) > 0.3  # two files
    first, second = writer.poll(), writer.wait()
    assert first is not None and second is not None
    assert (first.step, first.error, second.step, second.error) == (5, None, 10, None)
    assert writer.poll() is None and newest(store).step == 10


def test_closing_gives_up_and_the_next_start_clears_what_is_left(tmp_path, alone, monkeypatch):
    store, writer = writer_for(tmp_path, alone)
    save_and_wait(writer, 5)
    write = tensor_file.write
    monkeypatch.setattr(tensor_file, "write", lambda *args: (time.sleep(0.2), write(*args))[1])
    ranks.start_save(writer, 10)
    writer.close()
    assert writer.wait() is None
    names = {p.name for p in store.folder.iterdir()}
    assert names == {"last", "step_00000005", ".step_00000010.tmp"} and newest(store).step == 5
    store.recover()
    assert {p.name for p in store.folder.iterdir()} == {"last", "step_00000005"}


# ── who writes what ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_the_processes_share_the_bytes(world):
    generator = torch.Generator().manual_seed(world)
    sizes = torch.randint(1, 50_000, (300,), generator=generator).tolist()
    weights = {f"w{i}": torch.empty(size) for i, size in enumerate(sizes)}
    states = {f"{kind}/{name}": torch.empty_like(t) for name, t in weights.items() for kind in ("avg", "square")}
    shares = share({"m": weights, "o.safetensors": states}, {"o.safetensors"}, world)
    bytes_of = [sum(t.nbytes for tensors in files.values() for t in tensors.values()) for files in shares]
    assert sum(bytes_of) == 3 * 4 * sum(sizes)
    # Rank 0 has the weights, which are a third; where that is more than a share, it has nothing else.
    others = bytes_of[1:] or bytes_of
    assert max(others) - min(others) < 300_000
    if world > 3:
        assert set(shares[0]) == {"m"}
    else:
        assert max(bytes_of) - min(bytes_of) < 300_000
    split = [name for files in shares for name in files if name != "m"]
    writers = world if world <= 3 else world - 1
    expected = [f"o-{n:05d}-of-{writers:05d}.safetensors" for n in range(writers)] if world > 1 else ["o.safetensors"]
    assert split == expected
    together = {
        name: t for files in shares for path, tensors in files.items() if path != "m" for name, t in tensors.items()
    }
    assert together.keys() == states.keys() and all(together[name] is states[name] for name in states)


def test_a_file_without_tensors_is_written_all_the_same():
    assert share({"m": {"x": torch.ones(1)}, "o.safetensors": {}}, {"o.safetensors"}, 3)[0]["o.safetensors"] == {}


# ── the order of things (G2) ────────────────────────────────────────────────────────────────────────────────────


def test_synced_then_listed_then_renamed_then_linked_then_pruned(tmp_path, alone, monkeypatch):
    store, writer = writer_for(tmp_path, alone, keep=1)
    save_and_wait(writer, 5)
    events: list[tuple[str, str]] = []
    sizes: dict[str, int] = {}
    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, checkpoint.shutil.rmtree

    def name_of(path) -> str:
        return str(Path(path).relative_to(store.folder))

    def record_fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_file():
            sizes[path.name] = os.fstat(handle).st_size
        events.append(("sync", name_of(path)))
        fsync(handle)

    def record(kind, original):
        def call(*args, **kwargs):
            events.append((kind, " → ".join(name_of(path) for path in args)))
            original(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record("rename", rename))
    monkeypatch.setattr(os, "replace", record("rename", replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", record("remove", rmtree))
    assert save_and_wait(writer, 10).error is None

    temporary, final = ".step_00000010.tmp", "step_00000010"
    listed = events.index(("sync", f"{temporary}/{MANIFEST}"))
    files = [f"{temporary}/{name}" for name in (WEIGHTS, f"{OPTIMIZER}.safetensors", STATE)]
    folders = [f"{temporary}/{PRETRAINED}", f"{temporary}/{TRAINING}"]
    assert {name for kind, name in events[:listed] if kind == "sync"} >= {*files, *folders}
    assert events[listed:] == [
        ("sync", f"{temporary}/{MANIFEST}"),
        ("sync", temporary),
        ("rename", f"{temporary} → {final}"),
        ("sync", "."),
        ("rename", ".last.tmp → last"),
        ("sync", "."),
        ("rename", "step_00000005 → .step_00000005.pruned"),
        ("remove", ".step_00000005.pruned"),
    ]
    # When they were synced they were whole.
    for name, (size, _) in manifest.files_of(store.folder / final).items():
        assert sizes[Path(name).name] == size > 0, name
    assert sizes[MANIFEST] == (store.folder / final / MANIFEST).stat().st_size


# ── failures (G4) ───────────────────────────────────────────────────────────────────────────────────────────────


def full_disk(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["weights", "json", "sync", "manifest", "rename", "parent"])
def test_a_full_disk_costs_one_checkpoint(tmp_path, alone, monkeypatch, place):
    store, writer = writer_for(tmp_path, alone)
    save_and_wait(writer, 5)
    before = ranks.contents(store.folder)
    with monkeypatch.context() as patch:
        if place == "weights":
            patch.setattr(os, "write", full_disk)
        elif place == "json":
            patch.setattr(ranks, "write_state", full_disk)
        elif place == "sync":
            patch.setattr(os, "fsync", full_disk)
        elif place == "manifest":
            patch.setattr(manifest, "_text", full_disk)
        elif place == "rename":
            patch.setattr(os, "rename", full_disk)
        else:
            patch.setattr(checkpoint, "sync", full_disk)
        outcome = save_and_wait(writer, 10)
    assert outcome.path is None and outcome.error is not None and "No space left on device" in outcome.error
    assert (outcome.step, outcome.bytes) == (10, 0)
    assert ranks.contents(store.folder) == before
    assert save_and_wait(writer, 15).error is None and newest(store).step == 15


def test_an_error_that_is_not_the_disks_costs_one_checkpoint_too(tmp_path, alone, caplog):
    store, writer = writer_for(tmp_path, alone)

    def broken(folder: Path) -> None:
        raise TypeError("not JSON serializable")

    writer.save(5, ranks.tensors(5), set(), broken)
    outcome = writer.wait()
    assert outcome is not None and outcome.error == "rank 0: not JSON serializable"
    assert "Traceback" in caplog.text and not list(store.folder.iterdir())


def test_too_little_space_is_found_before_anything_is_written(tmp_path, alone, monkeypatch):
    store, writer = writer_for(tmp_path, alone)
    save_and_wait(writer, 5)
    before = ranks.contents(store.folder)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=3000))
        ranks.start_save(writer, 10, 1000)
        assert ranks.contents(store.folder) == before
        outcome = writer.poll()
    assert outcome is not None and outcome.path is None and "GB are needed" in str(outcome.error)
    assert save_and_wait(writer, 15).error is None


def test_a_small_disk_that_fills_up(small_disk, alone, monkeypatch):
    store, writer = writer_for(small_disk / "run", alone, keep=1)
    assert save_and_wait(writer, 5, 40_000).error is None  # half a megabyte
    before = ranks.contents(store.folder)
    assert "GB are needed" in str(save_and_wait(writer, 10, 300_000).error)
    # Another job fills it after the look.
    with monkeypatch.context() as patch:
        usage = checkpoint.shutil.disk_usage(small_disk)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
        outcome = save_and_wait(writer, 15, 300_000)
    assert "No space left on device" in str(outcome.error)
    assert ranks.contents(store.folder) == before and newest(store).step == 5
    assert save_and_wait(writer, 20, 40_000).error is None


# ── two processes ───────────────────────────────────────────────────────────────────────────────────────────────


def run_ranks(scenario: str, folder: Path, *arguments: str) -> list[dict]:
    """What each of two ranks reports of a scenario in save_in_ranks.py."""
    command = [sys.executable, "-m", "support.save_in_ranks", scenario, str(folder), *arguments]
    process = subprocess.run(command, env=with_support(), capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]


def test_two_ranks_write_one_checkpoint_and_a_failure_of_one_ends_it_for_both(tmp_path):
    reports = run_ranks("failures", tmp_path)
    assert len(reports) == 2 and reports[0] == reports[1]  # all ranks have the same outcomes
    outcomes = {outcome["step"]: outcome for outcome in reports[0]["outcomes"]}
    assert list(outcomes) == [5, 10, 15, 20, 25]
    assert [step for step, outcome in outcomes.items() if outcome["error"] is None] == [5, 25]
    assert outcomes[10]["error"].startswith("rank 1: No space left on device")
    assert outcomes[15]["error"].startswith("rank 0: No space left on device")  # in JSON
    assert "GB are needed" in outcomes[20]["error"]
    assert reports[0]["unharmed"] and reports[0]["cancelled"]
    store = CheckpointStore(tmp_path / "run", keep=3)
    assert newest(store).step == 25 and newest(store).path is not None
    for step in (5, 25):
        path = store.folder / f"step_{step:08d}"
        assert verify(path) is None and ranks.wrong_contents(path) is None
        parts = sorted(p.name for p in (path / TRAINING).iterdir() if p.suffix == ".safetensors")
        assert parts == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", "step_00000005", "step_00000025"]


def check_kills(folder: Path, trials: int) -> None:
    reports = run_ranks("kills", folder, str(trials))[0]
    assert reports["trials"] == trials and reports["wrong"] == []
    # Kills hit both ranks, and saves before, during and after they were acknowledged.
    assert min(reports["killed"]) > trials // 5
    assert reports["torn"] > trials // 10 and reports["acknowledged"] > trials // 2


def test_a_rank_killed_in_a_save_loses_nothing(tmp_path):
    check_kills(tmp_path, 12)


@pytest.mark.slow
def test_a_rank_killed_in_a_save_200_times_loses_nothing(tmp_path):
    check_kills(tmp_path, 200)
