"""The link ``best``: which checkpoint it leads to, and that this one is never pruned. The baseline of the start too.

Run: uv run pytest tests/training/test_best.py      (stores in a moment; forked runs of a tiny model, fifteen seconds)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.forked import ForkServer
from support.launching import Workplace
from support.stores import save

from agent.checkpoints.store import PRETRAINED, TRAINING, CheckpointStore

# ── the store ───────────────────────────────────────────────────────────────────────────────────────────────────


class Errors(dict):
    """Update → validation error; chooses as a run does."""

    def best(self, steps) -> int | None:
        return min((step for step in steps if step in self), key=lambda step: (self[step], step), default=None)


def store_in(run_dir: Path, errors: Errors, keep: int = 2, **more) -> CheckpointStore:
    return CheckpointStore(run_dir, keep, choose_best=errors.best, **more)


def save_all(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        save(store, step, lambda folder: [(folder / name / "x").write_bytes(b"abc") for name in (PRETRAINED, TRAINING)])


def there(store: CheckpointStore) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(store.folder.glob("step_*"))]


def link(store: CheckpointStore, name: str = "best") -> int | None:
    path = store.folder / name
    return int(os.readlink(path).removeprefix("step_")) if os.path.lexists(path) else None


def test_the_best_outlives_the_newest(tmp_path: Path) -> None:
    errors = Errors({10: 0.5, 20: 0.2, 30: 0.4, 50: 0.3, 60: 0.1})
    store = store_in(tmp_path, errors)
    seen = []
    for step in range(10, 80, 10):
        save_all(store, step)
        seen.append((link(store), there(store)))
    assert seen == [
        (10, [10]),
        (20, [10, 20]),
        (20, [20, 30]),
        (20, [20, 30, 40]),  # not validated: no candidate
        (20, [20, 40, 50]),
        (60, [50, 60]),  # a better one, and the former goes
        (60, [60, 70]),
    ]
    assert link(store, "last") == 70


def test_where_nothing_was_validated_there_is_no_best(tmp_path: Path) -> None:
    store = store_in(tmp_path, Errors())
    save_all(store, 10, 20, 30)
    assert (link(store), there(store)) == (None, [20, 30])


def test_the_best_may_lose_its_training_state_but_not_its_weights(tmp_path: Path) -> None:
    store = store_in(tmp_path, Errors({10: 0.1, 20: 0.2}), keep_training_states=1)
    save_all(store, 10, 20, 30, 40)
    assert there(store) == [10, 30, 40] and link(store) == 10
    assert [(store.folder / f"step_{step:08d}" / TRAINING).exists() for step in (10, 30, 40)] == [False, False, True]
    assert [path.name for path in store.candidates()] == ["step_00000040"]


def test_a_damaged_best_is_set_aside_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    store = store_in(tmp_path, Errors({10: 0.3, 20: 0.1, 30: 0.2}), keep=3)
    save_all(store, 10, 20, 30)
    store.set_aside(store.folder / "step_00000020", "a flipped bit")
    assert (link(store), link(store, "last")) == (30, 30)
    store.set_aside(store.folder / "step_00000030", "a flipped bit")
    store.set_aside(store.folder / "step_00000010", "a flipped bit")
    assert (link(store), link(store, "last")) == (None, None)


def test_a_truncated_best_is_found_by_the_next_save(tmp_path: Path) -> None:
    store = store_in(tmp_path, Errors({10: 0.1, 20: 0.2, 30: 0.3}))
    save_all(store, 10, 20)
    (store.folder / "step_00000010" / PRETRAINED / "x").write_bytes(b"a")
    save_all(store, 30)
    assert (link(store), there(store)) == (20, [20, 30])
    assert (store.folder / "damaged_step_00000010").is_dir()


def test_a_kill_before_the_link_was_set_is_made_good(tmp_path: Path) -> None:
    store = store_in(tmp_path, Errors({10: 0.2, 20: 0.1}))
    save_all(store, 10, 20)
    (store.folder / "best").unlink()
    (store.folder / "best").symlink_to("step_00000010")
    later = store_in(tmp_path, Errors({10: 0.2, 20: 0.1}))
    assert later.link_best() == later.folder / "step_00000020" and link(later) == 20


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Updates too small to change a number: all validations agree, so that the earliest is the best.
NOWHERE = ("--model_cfg.optimizer_lr", "1.0e-30", "--model_cfg.scheduler_decay_lr", "1.0e-30")
STEADY = ("--n_updates", "16", "--keep_checkpoints", "1", *NOWHERE)
OFTEN = ("--save_model_freq", "4", "--eval_freq", "4")


@pytest.fixture(scope="module")
def through(place: Workplace, server: ForkServer) -> str:
    output = server.start(place, "through", *STEADY, *OFTEN).wait()
    assert place.status("through")["state"] == "finished", output
    return "through"


def checkpoints(place: Workplace, name: str) -> dict[str, str | None]:
    """Entry of ``checkpoints`` → where it leads, for a link."""
    folder = place.folder / "runs" / name / "checkpoints"
    return {path.name: os.readlink(path) if path.is_symlink() else None for path in sorted(folder.iterdir())}


def errors(place: Workplace, name: str) -> dict[int, float]:
    lines = place.metrics(name)
    return {line["step"]: line["val/action_l1"] for line in lines if "val/action_l1" in line}


def expected(place: Workplace, name: str, saved: Iterable[int]) -> dict[str, str | None]:
    """What a run that saved at these updates and keeps one checkpoint shall have."""
    found = errors(place, name)
    best, last = min((step for step in saved if step in found), key=lambda s: (found[s], s)), max(saved)
    links: dict[str, str | None] = {"best": f"step_{best:08d}", "last": f"step_{last:08d}"}
    return links | {f"step_{step:08d}": None for step in sorted({best, last})}


def test_a_run_keeps_its_best_beside_its_newest(place: Workplace, through: str) -> None:
    found = errors(place, through)
    assert set(found) == {4, 8, 12, 16} and len(set(found.values())) == 1
    assert checkpoints(place, through) == expected(place, through, range(4, 17, 4))


def test_killed_and_continued_it_has_the_same_best_and_the_same_records(
    place: Workplace, server: ForkServer, through: str
) -> None:
    for kill_at in (6, 10):
        run = server.start(place, "killed", *STEADY, *OFTEN)
        run.wait_for_step(kill_at)
        run.kill_all()
    output = server.start(place, "killed", *STEADY, *OFTEN).wait()
    assert place.status("killed")["restarts"] == 2, output
    assert checkpoints(place, "killed") == checkpoints(place, through)
    ours, theirs = (place.folder / "runs" / name / "validation" for name in ("killed", through))
    names = sorted(path.name for path in theirs.iterdir())
    assert names == [f"step_{step:08d}.{kind}" for step in range(0, 17, 4) for kind in ("json", "png")]
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }


def test_with_other_frequencies_the_best_is_among_those_saved_and_validated(
    place: Workplace, server: ForkServer
) -> None:
    output = server.start(place, "apart", *STEADY, "--save_model_freq", "6", "--eval_freq", "4").wait()
    assert set(errors(place, "apart")) == {4, 8, 12, 16}
    assert checkpoints(place, "apart") == expected(place, "apart", [6, 12, 16])
    assert "every 12 updates" in output
    run = place.folder / "runs" / "again"
    shutil.copytree(run.parent / "apart", run, symlinks=True)
    best = run / "checkpoints" / "best"
    (best.parent / "pretend").symlink_to(os.readlink(best))
    best.unlink()
    # As a kill between the last save and its link leaves it; this run will save no more.
    last = best.with_name("last")
    last.unlink()
    last.symlink_to(os.readlink(best.parent / "pretend"))
    output = server.start(place, "again", *STEADY, "--save_model_freq", "6", "--eval_freq", "4").wait()
    assert os.readlink(best) == os.readlink(best.parent / "pretend"), output
    assert os.readlink(last) == "step_00000016" != os.readlink(best), output


def test_a_damaged_checkpoint_at_the_start_and_the_best_goes_with_it(
    place: Workplace, server: ForkServer, through: str
) -> None:
    run = place.folder / "runs" / "damaged"
    shutil.copytree(place.folder / "runs" / through, run, symlinks=True)
    best = os.readlink(run / "checkpoints" / "best")
    # The newest is damaged, so that the run goes back to its best and continues from there.
    path = run / "checkpoints" / "last" / "training_state" / "state.json"
    path.write_bytes(b"\0" * len(path.read_bytes()))
    output = server.start(place, "damaged", *STEADY, *OFTEN).wait()
    assert place.status("damaged")["attempts"][-1]["first_step"] == int(best.removeprefix("step_")), output
    found = checkpoints(place, "damaged")
    assert found.pop("damaged_step_00000016", "absent") is None and found == checkpoints(place, through)


def test_the_start_is_the_baseline_of_every_validation(place: Workplace, server: ForkServer, through: str) -> None:
    folder = place.folder / "runs" / through / "validation"
    records = {step: json.loads((folder / f"step_{step:08d}.json").read_text()) for step in (0, 4, 16)}
    start = records[0]
    assert start["baselines"]["start"] is None and start["ema"] is None and start["samples"] == 6
    for step in (4, 16):
        baseline = records[step]["baselines"]["start"]
        assert baseline == {key: start[key] for key in ("action_l1", "per_dimension_l1", "per_step_l1", "acc")}
    assert all(
        line["val/baseline_start_l1"] == start["action_l1"]
        for line in place.metrics(through)
        if "val/action_l1" in line
    )
    # On two ranks the same numbers, and without it everything but the baseline.
    server.start(place, "two", *STEADY, *OFTEN, "--n_updates", "1", ranks=2).wait()
    assert json.loads((folder.parent.parent / "two" / "validation" / "step_00000000.json").read_text()) == start
    output = server.start(place, "none", *STEADY, *OFTEN, "--n_updates", "1", "--eval_start", "false").wait()
    records_none = sorted(path.name for path in (folder.parent.parent / "none" / "validation").iterdir())
    assert records_none == ["step_00000001.json", "step_00000001.png"], output
    assert "val/baseline_start_l1" not in place.metrics("none")[-1]


def test_a_start_whose_error_is_not_finite_stops_no_later_validation(
    place: Workplace, server: ForkServer, through: str, tmp_path: Path
) -> None:
    weights = shutil.copytree(place.checkpoint(through) / PRETRAINED, tmp_path / "weights") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.action_out_proj.bias"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    options = ("--load_from_checkpoint", str(weights.parent), "--skip_nonfinite", "2", "--n_updates", "1")
    output = server.start(place, "nan", *STEADY, *OFTEN, *options).wait()
    assert place.status("nan")["state"] == "finished", output
    (line,) = place.metrics("nan")
    assert line["val/action_l1"] is line["val/baseline_start_l1"] is None and line["val/baseline_mean_l1"] > 0
    assert not os.path.lexists(place.folder / "runs" / "nan" / "checkpoints" / "best")
