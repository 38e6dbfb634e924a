"""Reads what runs leave: their metrics, the samples that hooks recorded, and wandb's offline files."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil

from support.launching import Workplace

TIMES = ("step_s", "samples_per_s", "data_wait", "data_wait_max", "memory_gb", "eta_s")


def what_was_computed(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def recorded(place: Workplace, name: str) -> dict[str, str]:
    return {"RECORD": str(place.folder / f"record-{name}")}


def records(place: Workplace, name: str, rank: int) -> list[dict]:
    path = place.folder / f"record-{name}.{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples_of_updates(place: Workplace, name: str, ranks: int) -> dict[int, list]:
    """Update → its samples in the order of their numbers, over all ranks; later attempts overwrite earlier ones."""
    updates: dict[int, dict[int, list]] = {}
    for rank in range(ranks):
        for record in records(place, name, rank):
            updates.setdefault(record["step"], {}).update({sample[0]: sample for sample in record["samples"]})
    return {step: [found[k] for k in sorted(found)] for step, found in updates.items()}


def record(step: int, attempt: int = 1, **more: float) -> dict[str, float]:
    """One logged update; ``attempt`` tells a repeated update from the first one."""
    fixed = {"lr": 1e-4, "grad_norm": 0.5, "step_s": 2.0, "samples_per_s": 8.0, "data_wait": 0.125, "memory_gb": 1.0}
    return {"step": step, "loss": 1 / step, **fixed, "attempt": attempt, "eta_s": 3725.0, **more}


def wandb_processes(run_dir: Path) -> list[psutil.Process]:
    """wandb's own process for a run, and its parent."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parent = process.parent() if process.name() == "wandb-core" else None
            if parent is not None and str(run_dir) in parent.cmdline():
                return [process, parent]
    return []


def wandb_process(run_dir: Path) -> psutil.Process:
    """wandb's own process for a run, once there is one and it has the run."""
    for _ in range(2400):
        found = wandb_processes(run_dir)
        if found and list(run_dir.glob("wandb/offline-run-*/*.wandb")):
            return found[0]
        time.sleep(0.05)
    raise AssertionError("wandb has no process")


def offline_records(folder: Path) -> tuple[str, list[dict]]:
    """Run id and history of an offline folder, by wandb's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("*.wandb")
    store, ids, history = DataStore(), [], []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        if entry.WhichOneof("record_type") == "run":
            ids.append(entry.run.run_id)
        elif entry.WhichOneof("record_type") == "history":
            items = entry.history.item
            history.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    assert len(set(ids)) == 1
    return ids[0], history
