"""Samples per second at full size, one contender a process; a profiler's table of each in the log."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
import train_step

from agent.models.pi.accounting import flop_per_sample
from gpu_steps.place import Place

# As a card of 24 GB has it.
_SMALL = ("--compile", "--batch", "4", "--low_memory", "--activation_checkpointing", "full")
# Label, cameras with an image, padding, further options of train_step.py. LeRobot always computes three cameras.
ROWS: dict[str, tuple[tuple[str, int, str, tuple[str, ...]], ...]] = {
    "compiled": (
        ("ours, compiled, 3 of 3", 3, "none", ("--compile",)),
        ("ours, compiled, 3 of 3, padded", 3, "language", ("--compile",)),
        ("ours, compiled, 3 of 3, mixed", 3, "mixed", ("--compile",)),
        ("ours, compiled, 1 of 3", 1, "none", ("--compile",)),
        ("ours, compiled, 2 of 3", 2, "none", ("--compile",)),
        ("ours, compiled, 3 of 3, fp8", 3, "none", ("--compile", "--fp8", "mlp")),
    ),
    "small": (
        ("ours, low-memory, batch 4, 2 of 3", 2, "none", _SMALL),
        ("ours, low-memory, batch 4, 2 of 3, graph", 2, "none", (*_SMALL, "--cuda_graph", "auto")),
    ),
    "eager": (("ours, eager, 3 of 3", 3, "none", ()),),
    "lerobot": (("LeRobot, eager, 3 of 3", 3, "none", ()),),
}


def run(place: Place, who: str) -> None:
    """Numbers alone. A row is told as soon as it is measured."""
    for label, present, padding, further in ROWS[who][: None if place.gpu else 3]:
        options = train_step.read_options([
            "--size", place.size("full"), "--batch", "32" if place.gpu else "2", "--present", str(present),
            "--padding", padding, "--device", place.device.type, "--precision", "bfloat16", "--rounds", "2" if place.gpu else "1",
            *(option for option in further if place.gpu or option != "--compile"),
        ])  # fmt: skip
        name = "LeRobot bfloat16" if who == "lerobot" else "agent bfloat16"
        _row(place, label, options, name)
        gc.collect()
        if place.gpu:
            torch.cuda.empty_cache()


def _row(place: Place, label: str, options: Any, name: str) -> None:
    found = train_step.compete(options, [name], after=lambda contender: _profile(place, contender))
    seconds = statistics.median(found["times"][name])
    rate = statistics.median(found["rates"][torch.bfloat16])
    present = 3 if name.startswith("LeRobot") else options.present
    flop = flop_per_sample(train_step.model_config(options.size, options.cameras), present, options.language)
    place.tell(label, None, contender=found["called"][name], batch=options.batch, padding=options.padding, seconds=seconds,
               samples_per_s=options.batch / seconds, loss=found["losses"][name], matrix_flops=rate,
               fraction=options.batch / seconds * flop / rate, peak_bytes=found["peaks"][name])  # fmt: skip


def _profile(place: Place, contender: train_step.Contender) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * place.gpu
    with torch.profiler.profile(activities=activities) as profile:
        contender.step()
        place.wait()
    key = "self_cuda_time_total" if place.gpu else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60), flush=True)
