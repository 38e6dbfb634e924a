"""Checkpoints are whole or not there: damage, full disks and crashes at every point.

Run: pytest tests/checkpoints/test_checkpoint.py   (about two seconds)
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import xxhash
from support.stores import contents, newest, save

from agent.checkpoints import manifest
from agent.checkpoints.manifest import MANIFEST, Verification, verify
from agent.checkpoints.store import PRETRAINED, TRAINING, CheckpointStore

WEIGHTS = f"{PRETRAINED}/model.safetensors"
STATE = f"{TRAINING}/state.json"


def writer(text: str, size: int = 5000) -> Callable[[Path], None]:
    """Writes a checkpoint of two files whose contents depend on ``text``."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((text * size).encode()[:size])
        (folder / STATE).write_text(json.dumps({"text": text}))

    return write


def store_with(run_dir: Path, *steps: int, keep: int = 10) -> CheckpointStore:
    store = CheckpointStore(run_dir, keep)
    for step in steps:
        save(store, step, writer(f"s{step}"))
    return store


def test_a_saved_checkpoint_is_found_and_its_manifest_lists_every_file(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    assert newest(store).path is None and newest(store).step == 0
    path = save(store, 200, writer("abc"))
    assert path == tmp_path / "checkpoints" / "step_00000200" and verify(path) is None
    found = newest(store)
    assert (found.path, found.step, found.passed_over) == (path, 200, [])
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 200
    on_disk = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert manifest["files"] == {
        name: {"size": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()} for name, data in on_disk.items()
    }
    assert set(manifest["files"]) == {WEIGHTS, STATE}


def test_last_is_a_relative_link_to_the_newest(tmp_path):
    store = store_with(tmp_path / "run", 5, 10)
    assert os.readlink(store.folder / "last") == "step_00000010"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved/checkpoints/last" / WEIGHTS).read_bytes().startswith(b"s10")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    store = store_with(tmp_path, 2, 4, 6, 8, keep=keep)
    left = sorted(p.name for p in store.folder.iterdir())
    assert left == ["last", *(f"step_{step:08d}" for step in (2, 4, 6, 8)[-keep:])]
    assert newest(store).step == 8


@pytest.mark.parametrize(
    "failure", [RuntimeError("boom"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_failing_save_leaves_nothing_and_harms_nothing(tmp_path, failure):
    store = store_with(tmp_path, 5, 10, keep=1)
    before = contents(store.folder)

    def write(folder: Path) -> None:
        writer("half")(folder)
        raise failure

    with pytest.raises(type(failure)) as caught:
        save(store, 15, write)
    assert caught.value is failure
    assert contents(store.folder) == before and len(list(store.folder.iterdir())) == 2
    assert newest(store).step == 10


def test_a_failing_save_of_a_step_that_exists_keeps_the_old_one(tmp_path):
    store = store_with(tmp_path, 5)
    before = contents(store.folder)

    def write(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(store, 5, write)
    assert contents(store.folder) == before


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    store = store_with(tmp_path, 5)
    (store.folder / "step_00000005" / STATE).unlink()
    save(store, 5, writer("again"))
    assert newest(store).step == 5 and (store.folder / "last" / WEIGHTS).read_bytes().startswith(b"again")


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (path / WEIGHTS).write_bytes(data)


def rename(path: Path, name: str) -> None:
    """Lists another file as well."""
    content = json.loads((path / MANIFEST).read_text())
    content["files"][name] = next(iter(content["files"].values()))
    (path / MANIFEST).write_text(json.dumps(content))


DAMAGES = {
    "a flipped bit": (flip_a_bit, "model.safetensors is damaged: its checksum does not match"),
    "a truncated file": (
        lambda path: os.truncate(path / WEIGHTS, 4000),
        "model.safetensors has 4000 bytes, 5000 were written",
    ),
    "a file gone": (lambda path: (path / STATE).unlink(), "state.json is missing"),
    "a folder gone": (lambda path: shutil.rmtree(path / PRETRAINED), "model.safetensors is missing"),
    "the manifest gone": (lambda path: (path / MANIFEST).unlink(), "it has no manifest.json"),
    "the manifest empty": (lambda path: os.truncate(path / MANIFEST, 0), "its manifest.json cannot be read"),
    "the manifest truncated": (lambda path: os.truncate(path / MANIFEST, 60), "its manifest.json cannot be read"),
    "the manifest not text": (
        lambda path: (path / MANIFEST).write_bytes(b"\xff\x00\xfe"),
        "its manifest.json cannot be read",
    ),
    "the manifest a list": (lambda path: (path / MANIFEST).write_text("[]"), "its manifest.json cannot be read"),
    "the manifest of another form": (
        lambda path: (path / MANIFEST).write_text('{"files": {"pretrained_model/model.safetensors": 5000}}'),
        "its manifest.json cannot be read",
    ),
    "the manifest without files": (
        lambda path: (path / MANIFEST).write_text('{"files": {}}'),
        "its manifest.json lists no file",
    ),
    "a name that leads out": (
        lambda path: rename(path, "../other/x"),
        "its manifest.json names ../other/x, which is outside of it",
    ),
    "an absolute name": (
        lambda path: rename(path, "/etc/hostname"),
        "its manifest.json names /etc/hostname, which is outside of it",
    ),
}


def zero_a_quarter(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[1250:2500] = bytes(1250)
    (path / WEIGHTS).write_bytes(data)


DAMAGES["a quarter zeroed"] = (zero_a_quarter, DAMAGES["a flipped bit"][1])


def read_some(verification: Verification, path: Path) -> None:
    """As a load does that ends early: one file to its end, one in part, the others not at all."""
    for file, whole in zip(sorted(p for p in path.rglob("*") if p.name != MANIFEST), (True, False), strict=False):
        if file.is_file():
            data = file.read_bytes()
            verification.checksum(file).update(memoryview(data if whole else data[: len(data) // 2]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_while_it_is_loaded_and_set_aside(tmp_path, damage):
    store = store_with(tmp_path, 5, 10)
    harm, reason = DAMAGES[damage]
    harm(store.folder / "step_00000010")
    taken = None
    for path in store.candidates():
        verification = Verification(path)
        read_some(verification, path)
        problem = verification.result()
        if problem is None:
            taken = path
            break
        assert problem.endswith(reason)
        assert store.set_aside(path, problem) == store.folder / "damaged_step_00000010"
    assert taken == store.folder / "step_00000005"
    assert store.unusable() == [store.folder / "damaged_step_00000010"]
    assert os.readlink(store.folder / "last") == "step_00000005"
    assert newest(store).step == 5 and not newest(store).passed_over
    # It is neither counted nor removed, and the run can get there again.
    store.keep = 2
    save(store, 10, writer("s10 again"))
    save(store, 15, writer("s15"))
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"last", "damaged_step_00000010", "step_00000010", "step_00000015"}
    harm(store.folder / "step_00000010")
    assert store.set_aside(store.folder / "step_00000010", "again").name == "damaged_step_00000010_2"


def test_a_damaged_only_checkpoint_leaves_no_link_and_is_remembered(tmp_path):
    store = store_with(tmp_path, 5)
    store.set_aside(store.folder / "step_00000005", "damaged")
    assert [path.name for path in store.folder.iterdir()] == ["damaged_step_00000005"]
    assert store.candidates() == [] and store.unusable() == [store.folder / "damaged_step_00000005"]


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    path = store_with(tmp_path, 5).folder / "step_00000005"
    verification = Verification(path)
    for file in path.rglob("*"):
        if file.is_file():
            verification.checksum(file).update(memoryview(file.read_bytes()))
    monkeypatch.setattr("agent.checkpoints.manifest.checksum", lambda _: pytest.fail("read again"))
    assert verification.result() is None


def test_a_file_that_cannot_be_verified_is_damage(tmp_path, monkeypatch):
    store = store_with(tmp_path, 5)
    monkeypatch.setattr("agent.checkpoints.manifest.check_sizes", lambda *_: 1 / 0)
    assert "could not be verified: ZeroDivisionError" in str(Verification(store.folder / "step_00000005").result())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, damage):
    store = store_with(tmp_path, 5, 10)
    harm, reason = DAMAGES[damage]
    harm(store.folder / "step_00000010")
    found = newest(store)
    assert (found.step, found.path) == (5, store.folder / "step_00000005")
    assert len(found.passed_over) == 1
    assert "step_00000010" in found.passed_over[0] and found.passed_over[0].endswith(reason)
    harm(store.folder / "step_00000005")
    everything = newest(store)
    assert everything.path is None and [text.split(":")[0][-2:] for text in everything.passed_over] == ["10", "05"]


def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    store = store_with(tmp_path, 5, 10)
    bad = str(store.folder / "step_00000010" / WEIGHTS)

    def reading(path, *args, **kwargs):
        if str(path) == bad:
            raise OSError(errno.EIO, "Input/output error", bad)
        return open(path, *args, **kwargs)

    monkeypatch.setattr("agent.checkpoints.manifest.open", reading, raising=False)
    found = newest(store)
    assert found.step == 5 and "model.safetensors" in found.passed_over[0]
    assert "Input/output error" in found.passed_over[0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.EACCES], ids=errno.errorcode.get)
def test_an_error_of_the_moment_is_no_damage(tmp_path, monkeypatch, number):
    store = store_with(tmp_path, 5, 10)
    path = store.folder / "step_00000010"

    def failing(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("open", "check_sizes", "files_of"):
        with monkeypatch.context() as patch:
            patch.setattr(f"agent.checkpoints.manifest.{name}", failing, raising=False)
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                Verification(path).result()
    assert verify(path) is None


def test_names_that_are_no_checkpoint_are_neither_taken_nor_removed(tmp_path):
    store = store_with(tmp_path, 5, 10, keep=2)
    latest = store.folder / "step_00000010"
    others = ["step_00000010.backup", "step_00000010_before_the_change", "my_step_00000010", "step_final", "notes"]
    for name in others:
        shutil.copytree(latest, store.folder / name)
    (store.folder / "step_00000099").write_text("a file, not a folder")
    assert newest(store).path == latest and not newest(store).passed_over
    save(store, 15, writer("s15"))
    left = {p.name for p in store.folder.iterdir()}
    assert left == {"last", "step_00000010", "step_00000015", "step_00000099", *others}


def test_a_save_cut_short_is_ignored_and_cleared_by_the_next(tmp_path):
    store = store_with(tmp_path, 5)
    for step in (7, 10):
        torn = store.folder / f".step_{step:08d}.tmp"
        (torn / PRETRAINED).mkdir(parents=True)
        (torn / "leftover").write_text("of a killed process")
    assert newest(store).step == 5 and not newest(store).passed_over
    path = save(store, 10, writer("s10"))
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", "step_00000005", "step_00000010"]
    assert not (path / "leftover").exists() and verify(path) is None


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    store = store_with(tmp_path, 5, 10, keep=2)
    with monkeypatch.context() as patch:
        busy = OSError(errno.ENOTEMPTY, "Directory not empty")  # as NFS has it while somebody reads in there
        remove = shutil.rmtree

        def removing(path, *args, **kwargs):
            if Path(path).name == ".step_00000005.pruned" and not kwargs:
                raise busy
            remove(path, *args, **kwargs)

        patch.setattr(shutil, "rmtree", removing)
        assert save(store, 15, writer("s15")).name == "step_00000015"
    assert "step_00000005 could not be removed yet" in caplog.text and "Directory not empty" in caplog.text
    assert newest(store).step == 15
    save(store, 20, writer("s20"))
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", "step_00000015", "step_00000020"]


def test_an_old_checkpoint_that_cannot_be_looked_at_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    store = store_with(tmp_path, 5, 10, keep=2)
    stat = os.stat

    def failing(path, *args, **kwargs):
        if "step_00000005" in str(path) and str(path).endswith(WEIGHTS):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        assert save(store, 15, writer("s15")).name == "step_00000015"
    assert "could not be pruned yet" in caplog.text and "Stale file handle" in caplog.text
    save(store, 20, writer("s20"))
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", "step_00000015", "step_00000020"]


def test_a_damaged_checkpoint_that_was_passed_over_does_not_cost_a_good_one(tmp_path):
    store = store_with(tmp_path, 10, 20, keep=2)
    flip_a_bit(store.folder / "step_00000020")
    assert newest(store).step == 10
    # The run goes on from 10 and saves more often than before.
    for step in (12, 14):
        save(store, step, writer(f"s{step}"))
        assert newest(store).step == step
    assert sorted(p.name for p in store.folder.iterdir()) == ["last", "step_00000012", "step_00000014"]


# ── weights that stay longer than training states ───────────────────────────────────────────────────────────────


def test_older_checkpoints_keep_their_weights_and_lose_their_training_state(tmp_path):
    store = CheckpointStore(tmp_path, keep=3, keep_training_states=1)
    for step in (5, 10, 15, 20):
        save(store, step, writer(f"s{step}"))
    paths = {int(path.name[-2:]): path for path in store.folder.glob("step_*")}
    assert sorted(paths) == [10, 15, 20]
    for step, path in paths.items():
        assert verify(path) is None
        assert set(manifest.files_of(path)) == ({WEIGHTS, STATE} if step == 20 else {WEIGHTS})
        assert (path / TRAINING).exists() == (step == 20)
        assert (path / WEIGHTS).read_bytes().startswith(f"s{step}".encode())
    assert store.candidates() == [paths[20]] and store.unusable() == [paths[10], paths[15]]
    # A resume passes over them, and does not call them damaged.
    flip_a_bit(paths[20])
    found = newest(store)
    assert found.path is None and len(found.passed_over) == 1 and store.unusable() == [paths[10], paths[15]]


def test_a_crash_while_a_training_state_is_dropped_leaves_good_weights(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=3, keep_training_states=1)
    save(store, 5, writer("s5"))
    path = store.folder / "step_00000005"

    def crash(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "rmdir"):  # before the new manifest is there, and after
        with monkeypatch.context() as patch:
            patch.setattr(os, name, crash)
            with pytest.raises(KeyboardInterrupt):
                store._drop_training_state(path)
        assert verify(path) is None and (path / WEIGHTS).exists()
    save(store, 10, writer("s10"))
    assert verify(path) is None and not (path / TRAINING).exists()


def test_a_damaged_old_checkpoint_is_not_counted(tmp_path):
    store = store_with(tmp_path, 5, 10, keep=2)
    os.truncate(store.folder / "step_00000010" / WEIGHTS, 10)
    save(store, 15, writer("s15"))
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"last", "damaged_step_00000010", "step_00000005", "step_00000015"}


class Crash(BaseException):
    """Like a SIGKILL: nothing after it is done, not even cleaning up."""


def crashes(patch: pytest.MonkeyPatch, moment: int, action: Callable[[], object]) -> bool:
    """Whether an action still had something to do on the disk when, after ``moment`` such calls, the process ended."""
    left = moment

    def counted(*args, original, **kwargs):
        nonlocal left
        if left <= 0:
            raise Crash
        left -= 1
        return original(*args, **kwargs)

    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        patch.setattr(os, name, partial(counted, original=getattr(os, name)))
    try:
        action()
    except Crash:
        return True
    return False


def test_a_crash_while_a_checkpoint_is_replaced_loses_neither(tmp_path, monkeypatch):
    for moment in range(100):
        run_dir = tmp_path / str(moment)
        store = store_with(run_dir, 5)
        with monkeypatch.context() as patch:
            crashed = crashes(patch, moment, partial(save, store, 5, writer("again")))
        store.recover()
        found = newest(store)
        assert found.step == 5 and found.path is not None and not found.passed_over, moment
        assert (found.path / WEIGHTS).read_bytes()[:2] in (b"s5", b"ag"), moment
        assert verify(store.folder / "last") is None
        if not crashed:
            break
    assert moment > 8 and sorted(path.name for path in store.folder.iterdir()) == ["last", "step_00000005"]


def test_a_crash_at_any_moment_of_a_save_leaves_a_usable_checkpoint(tmp_path, monkeypatch):
    outcomes = []
    for moment in range(1000):
        run_dir = tmp_path / str(moment)
        store = store_with(run_dir, 5, 10, keep=2)
        with monkeypatch.context() as patch:
            crashed = crashes(patch, moment, partial(save, store, 15, writer("s15")))
        found = newest(CheckpointStore(run_dir, keep=2))
        assert found.path is not None and verify(found.path) is None and found.step in (10, 15), moment
        last = run_dir / "checkpoints/last"
        assert verify(last) is None, moment
        CheckpointStore(run_dir, keep=2).relink()  # as the next start does
        assert os.readlink(last) == found.path.name, moment
        outcomes.append(found.step)
        if not crashed:
            break
        save(store, 20, writer("s20"))
        left_over = sorted(p.name for p in store.folder.iterdir())
        assert left_over == ["last", f"step_{found.step:08d}", "step_00000020"], moment
    assert outcomes == sorted(outcomes) and set(outcomes) == {10, 15} and len(outcomes) > 10


def test_everything_is_on_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    store = store_with(tmp_path, 5)
    events: list[tuple[str, str]] = []
    fsync, rename, replace, write_text = os.fsync, os.rename, os.replace, Path.write_text
    temporary, final = ".step_00000010.tmp", "step_00000010"

    def name_of(path) -> str:
        return str(Path(path).relative_to(store.folder))

    def record_fsync(handle):
        events.append(("sync", name_of(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def record_rename(source, target, **kwargs):
        events.append(("rename", f"{name_of(source)} → {name_of(target)}"))
        rename(source, target, **kwargs)

    def record_replace(source, target, **kwargs):
        events.append(("rename", f"{name_of(source)} → {name_of(target)}"))
        replace(source, target, **kwargs)

    def record_write(path, *args, **kwargs):
        if path.name == MANIFEST:
            events.append(("write", name_of(path)))
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(Path, "write_text", record_write)
    save(store, 10, writer("s10"))

    manifest = events.index(("write", f"{temporary}/{MANIFEST}"))
    named = events.index(("rename", f"{temporary} → {final}"))
    linked = events.index(("rename", ".last.tmp → last"))
    synced = {name for kind, name in events[:manifest] if kind == "sync"}
    assert {f"{temporary}/{name}" for name in (WEIGHTS, STATE, PRETRAINED, TRAINING)} <= synced
    after = [event for event in events[manifest:named] if event[0] == "sync"]
    assert after == [("sync", f"{temporary}/{MANIFEST}"), ("sync", temporary)]
    assert ("sync", ".") in events[named:linked] and ("sync", ".") in events[linked:]


def test_the_folders_of_the_first_checkpoint_are_on_the_disk_too(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    store = store_with(tmp_path / "run", 5)
    assert {str(tmp_path), str(tmp_path / "run"), str(store.folder)} <= set(synced)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folders_is_no_reason_not_to_save(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    if number == errno.EIO:  # a disk that fails is another matter
        with pytest.raises(OSError, match="Input/output error"):
            store_with(tmp_path, 5)
        return
    store = store_with(tmp_path, 5, 10, keep=1)
    assert newest(store).step == 10 and verify(store.folder / "last") is None


def test_a_full_disk_costs_the_new_checkpoint_and_not_the_old_one(small_disk):
    store = CheckpointStore(small_disk / "run", keep=1)
    save(store, 5, writer("s5", 1_000_000))
    before = contents(store.folder)
    with pytest.raises(OSError) as caught:
        save(store, 10, writer("s10", 2_500_000))
    assert caught.value.errno == errno.ENOSPC
    assert contents(store.folder) == before
    found = newest(store)
    assert found.step == 5 and found.path is not None and verify(found.path) is None and not found.passed_over
    # What the failed save had filled is free again.
    save(store, 15, writer("s15", 1_500_000))
    assert newest(store).step == 15
