"""What a checkpoint costs: how long training waits, how long the disk works, how long a load takes.

    uv run python benchmarks/checkpoint.py --gb 3 --processes 2

Real processes in a gloo group hold a synthetic model and its AdamW state, and save and load it as a run does. The disk
is measured in the same run, alternating: the same bytes in one file by write and fsync, one after the other, from
memory that is there. The stall is what training waits for: the call that begins a save, and at the optimizer's step, which
changes what is copied, the rest of the copy. With ``--passes 1`` products of matrices take a second in between, as the
passes of an update do, beside which the copy is taken. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from agent.checkpoints import tensor_reader, weights
from agent.checkpoints.finding import find_weights
from agent.checkpoints.manifest import Verification, verify
from agent.checkpoints.store import PRETRAINED, TRAINING, CheckpointStore
from agent.checkpoints.tensor_reader import Checksums
from agent.checkpoints.writer import CheckpointWriter
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes

WEIGHTS = f"{PRETRAINED}/model.safetensors"
OPTIMIZER = f"{TRAINING}/optimizer"


def make_state(gigabytes: float, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Weights and two moments in the proportions of π0: one large embedding, many matrices, many small tensors."""
    numbers = int(gigabytes * 1e9 / 4 / 3)
    shapes = {"embedding": (numbers // 6 // 1024, 1024)}
    layers = 40
    for layer in range(layers):
        shapes |= {f"layers.{layer}.matrix.{i}": (numbers * 5 // 6 // layers // 8 // 1024, 1024) for i in range(8)}
        shapes |= {f"layers.{layer}.norm.{i}": (1024,) for i in range(8)}
    model = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    optimizer = {
        f"{kind}/{name}": torch.rand_like(t) for kind in ("exp_avg", "exp_avg_sq") for name, t in model.items()
    }
    optimizer |= {f"step/{name}": torch.tensor(100.0) for name in model}
    return {WEIGHTS: model, f"{OPTIMIZER}.safetensors": optimizer}


def plain_write(folder: Path, size: int) -> float:
    """Seconds to write and sync ``size`` bytes."""
    block = memoryview(torch.randint(0, 256, (1 << 24,), dtype=torch.uint8).numpy())
    begin = time.perf_counter()
    handle = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for position in range(0, size, len(block)):
        os.write(handle, block[: size - position])
    os.fsync(handle)
    os.close(handle)
    seconds = time.perf_counter() - begin
    (folder / "plain").unlink()
    return seconds


class _Everything:
    """Matches the names of the file one to one."""

    title, fresh = "benchmark", ()

    def theirs(self, name: str) -> str:
        return name


class _Match:
    def __init__(self, names: list[str]) -> None:
        self.layout, self.sources, self.waived, self.extra = _Everything(), {name: name for name in names}, {}, []


def fresh(tensor: Tensor) -> Tensor:
    """Room for as much, as a new process has it: from the system, not from what an earlier load gave back."""
    if tensor.is_cuda:
        return torch.empty_like(tensor)
    pages = mmap.mmap(-1, max(tensor.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)[: tensor.nbytes]
    return memory.view(tensor.dtype).view(tensor.shape)


def load(path: Path, state: dict[str, dict[str, Tensor]], checksums: Checksums | None) -> None:
    """As a resume does it: model and optimizer get memory that nothing was in before."""
    files = find_weights(str(path / PRETRAINED), "benchmark")
    model = {name: fresh(tensor) for name, tensor in state[WEIGHTS].items()}
    weights.load_into(model, files, _Match, lambda *_: None, checksums)  # type: ignore[arg-type]
    optimizer = state[f"{OPTIMIZER}.safetensors"]
    for part in tensor_reader.parts(path, OPTIMIZER):
        targets = {entry.name: fresh(optimizer[entry.name]) for entry in tensor_reader.entries(part)}
        tensor_reader.stream(part, targets, checksums(part) if checksums is not None else None)


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def checked_load(path: Path, state: dict[str, dict[str, Tensor]], processes: Processes) -> None:
    """Rank 0 verifies what it loads, and its verdict counts for all."""
    verification = Verification(path) if processes.is_main else None
    load(path, state, verification.checksum if verification is not None else None)
    assert processes.main_decides(verification.result if verification is not None else lambda: None) is None


def plain_load(path: Path, state: dict[str, dict[str, Tensor]], processes: Processes) -> None:
    """All load."""
    load(path, state, None)
    processes.main_decides(lambda: None)


def settled_plain_write(processes: Processes, folder: Path, size: int) -> float:
    """Seconds of a plain write on a disk that has nothing else to do."""
    processes.on_main(os.sync)
    return processes.main_decides(lambda: plain_write(folder, size))


class Passes:
    """In place of an update's forward and backward passes: products of matrices, always the same number of them."""

    def __init__(self, seconds: float, device: torch.device, processes: Processes) -> None:
        self._matrix = torch.randn(1024, 1024, device=device) / 32
        self._device, self._count = device, 1
        self()
        each = min(timed(self) for _ in range(10))
        self._count = int(processes.main_decides(lambda: seconds / each))

    def __call__(self) -> None:
        product = self._matrix
        for _ in range(self._count):
            product = product @ self._matrix
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def stalled(save: Callable[[], object], writer: CheckpointWriter, passes: Passes) -> tuple[float, float]:
    """Seconds that training waits for a save, and seconds that it adds to the passes after it, for want of processors."""
    alone = timed(passes)
    save_s, passes_s, settle_s = timed(save), timed(passes), timed(writer.settle)
    return save_s + settle_s, passes_s - alone


def work(rank: int, world: int, port: int, options: argparse.Namespace, folder: Path) -> None:
    """One process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank) if options.cuda else torch.device("cpu")
    processes = Processes(Launch(rank, rank, world, world, under_torchrun=world > 1), device)
    state = make_state(options.gb, device)
    size = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    writer = CheckpointWriter(CheckpointStore(folder, keep=1), processes)
    allocate_s = timed(lambda: writer.prepare(state, {f"{OPTIMIZER}.safetensors"}))
    passes = Passes(options.passes, device, processes)
    stalls, slower, backgrounds, plains, checked, unchecked = [], [], [], [], [], []
    for turn in range(options.runs + 1):
        # What one measurement left to write would be paid by the next; and each goes first in every other turn.
        plain_s = settled_plain_write(processes, folder, size) if turn % 2 else 0.0
        processes.on_main(os.sync)
        save = partial(writer.save, turn, state, {f"{OPTIMIZER}.safetensors"}, lambda _: None)
        stall_s, slower_s = map(max, zip(*processes.gather(stalled(save, writer, passes)), strict=True))
        while (outcome := writer.poll()) is None:
            time.sleep(0.02)  # an update
        assert outcome.path is not None, outcome.error
        path = outcome.path
        plain_s = plain_s or settled_plain_write(processes, folder, size)
        processes.on_main(lambda path=path: (os.sync(), verify(path)))  # both loads find the files in memory
        # Each kind of load goes first in every other turn.
        loads = [(checked_load, checked), (plain_load, unchecked)][:: 1 if turn % 2 else -1]
        times = [(timed(partial(action, path, state, processes)), into) for action, into in loads]
        if turn == 0:  # warms up
            continue
        for seconds, into in times:
            into.append(max(processes.gather(seconds)))
        plains.append(plain_s)
        stalls.append(stall_s)
        slower.append(slower_s)
        backgrounds.append(outcome.background_s)
    if rank == 0:
        report(options, size, allocate_s, stalls, slower, backgrounds, plains, checked, unchecked)
    writer.close()
    processes.close()


def report(
    options: argparse.Namespace, size: int, allocate_s: float, stalls: list[float], slower: list[float],
    backgrounds: list[float], plains: list[float], checked: list[float], unchecked: list[float],
) -> None:  # fmt: skip
    """A table for people and a line for programs."""
    columns = {"plain": plains, "stall": stalls, "background": backgrounds, "load": unchecked, "checked load": checked}
    middle = {name: statistics.median(values) for name, values in columns.items()}
    print(f"{size / 1e9:.2f} GB, {options.processes} processes, {options.runs} runs, median (smallest to largest)")
    for name, values in columns.items():
        print(
            f"  {name:<14} {middle[name]:7.3f} s  ({min(values):.3f} to {max(values):.3f})  "
            f"{size / 1e9 / middle[name]:6.2f} GB/s"
        )
    slower_s = statistics.median(slower)
    print(f"  memory for the snapshot, once: {allocate_s:.3f} s")
    print(f"  passes of {options.passes} s beside the copy and the write are slower by {slower_s:.3f} s")
    ratios = {
        # Of the pairs: the machine's speed drifts from turn to turn.
        "stall_of_plain": statistics.median(a / b for a, b in zip(stalls, plains, strict=True)),
        "background_of_plain": statistics.median(a / b for a, b in zip(backgrounds, plains, strict=True)),
        "checked_of_unchecked_load": statistics.median(a / b for a, b in zip(checked, unchecked, strict=True)),
    }
    targets = {"stall_of_plain": 0.1, "background_of_plain": 1.3, "checked_of_unchecked_load": 1.3}
    for name, ratio in ratios.items():
        print(f"  {name:<26} {ratio:.3f}  (at most {targets[name]}{'' if ratio <= targets[name] else ', MISSED'})")
    seconds = {f"{name.replace(' ', '_')}_s": round(value, 4) for name, value in middle.items()}
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    print(
        json.dumps(
            {
                "bytes": size,
                "processes": options.processes,
                "runs": options.runs,
                **seconds,
                **rounded,
                "passes_slower_s": round(slower_s, 4),
            }
        )
    )


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=3.0, help="weights and optimizer state together")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--passes", type=float, default=0.0, help="seconds that the passes of an update take")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--cuda", action="store_true", help="tensors on GPUs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=options.folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        arguments = (options.processes, port, options, folder)
        torch.multiprocessing.spawn(work, arguments, nprocs=options.processes)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
