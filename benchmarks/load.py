"""What loading weights costs: time against a plain read of the file, and memory against the tensors' bytes.

    uv run python benchmarks/load.py --processes 2

A π0 with `gemma_300m` twice, 1.3 G parameters, is written once in LeRobot's own format. Then, in fresh processes and in
turn: a plain read of the whole file into newly allocated memory, this project's way (model on the meta device, then each
tensor read to where it belongs) and LeRobot's `PI0Policy.from_pretrained` (with its projector's width patched to this
model's). The file is in the page cache for all of them. Memory is what all processes together hold at most beyond the
imports, without mapped files, in multiples of the bytes of the model's tensors. On a CPU the model itself is in it, once
per process; on a GPU it would not be. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def model_config():  # noqa: ANN201
    """A standard variant that two models of which fit into 24 GB."""
    from agent.models.lerobot_config import FeatureSpec
    from agent.models.pi.configuration import PI0Config

    return PI0Config(
        paligemma_variant="gemma_300m",
        action_expert_variant="gemma_300m",
        tokenizer_path=str(ROOT / "demo" / "tokenizer"),
        device="cpu",
        input_features={
            "observation.images.a": FeatureSpec("VISUAL", [3, 224, 224]),
            "observation.state": FeatureSpec("STATE", [7]),
        },
        output_features={"action": FeatureSpec("ACTION", [7])},
    )


def write(folder: Path) -> None:
    """The checkpoint, of numbers that cost little to make."""
    import numpy as np
    import torch

    from agent.checkpoints import tensor_file
    from agent.models.pi.model import PI0
    from agent.models.pi.saved import PI0Saved

    config = model_config()
    with torch.device("meta"):
        policy = PI0(config)
    policy.to_empty(device="cpu")
    for tensor in policy.state_dict().values():
        tensor.fill_(NUMBER)
    statistic = {name: np.ones(7, np.float32) for name in ("mean", "std", "min", "max", "q01", "q99")}
    statistics = {"observation.state": statistic, "action": statistic}
    files, write_small = PI0Saved().pretrained_contents(config, policy.state_dict(), statistics, last_update=1)
    for name, tensors in files.items():
        tensor_file.write(folder / name, tensors)
    write_small(folder)


@contextmanager
def peak() -> Iterator[list[int]]:
    """Bytes of memory of its own that this process holds at most, beyond what it held before."""
    import psutil

    def own() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared  # without the page cache of mapped files

    process, ended, result = psutil.Process(), threading.Event(), [0]
    before = own()

    def watch() -> None:
        while not ended.wait(0.005):
            result[0] = max(result[0], own() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield result
    result[0] = max(result[0], own() - before)
    ended.set()
    thread.join()


def plain(folder: Path) -> None:
    """The bytes of the file, into new memory."""
    import torch

    path = folder / "model.safetensors"
    yield_to_start()
    memory = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
    done = 0
    with io.FileIO(path) as file:
        while done < len(memory):
            done += file.readinto(memory[done : done + (1 << 22)]) or 0


def ours(folder: Path) -> None:
    """As a run loads `load_from_checkpoint`."""
    import torch

    from agent.checkpoints import weights
    from agent.checkpoints.finding import find_weights
    from agent.models.pi import adapter
    from agent.models.pi.model import PI0

    config = model_config()
    yield_to_start()
    with torch.device("meta"):
        policy = PI0(config)
    policy.to_empty(device="cpu")
    files = find_weights(str(folder), "benchmark")
    weights.load_into(policy.state_dict(), files, partial(adapter.from_policy, config=config), adapter.fit)
    assert all(tensor.flatten()[0] == NUMBER for tensor in policy.state_dict().values())
    KEEP.append(policy)


def lerobot(folder: Path) -> None:
    """As its users do."""
    import lerobot.policies.pi0.modeling_pi0 as modeling

    base = modeling.PaliGemmaForConditionalGenerationWithPiGemma

    class Vlm(base):
        def __init__(self, config) -> None:  # noqa: ANN001
            config.vision_config.projection_dim = config.text_config.hidden_size
            super().__init__(config)

    modeling.PaliGemmaForConditionalGenerationWithPiGemma = Vlm
    yield_to_start()
    policy = modeling.PI0Policy.from_pretrained(folder)
    # It only warns of what it could not load.
    heads = ("gemma_expert.lm_head.weight",)
    assert all(p.flatten()[0] == NUMBER for name, p in policy.named_parameters() if not name.endswith(heads))
    KEEP.append(policy)


NUMBER = 0.0078125
KEEP: list[object] = []
STARTED: list[float] = []


def yield_to_start() -> None:
    """Everything before this is not measured: imports, and the memory of the plain read."""
    print("ready", flush=True)
    sys.stdin.readline()
    STARTED.append(time.perf_counter())


def child(kind: str, folder: Path) -> None:
    """One measurement in a process of its own; what it imports is imported before."""
    import torch  # noqa: F401

    with peak() as most:
        {"plain": plain, "ours": ours, "lerobot": lerobot}[kind](folder)
        seconds = time.perf_counter() - STARTED[0]
        print(json.dumps({"seconds": seconds}), flush=True)
        sys.stdin.readline()  # until all have loaded: the memory of a node counts, not that of one after the other
    print(json.dumps({"bytes": most[0]}), flush=True)


def measure(kind: str, folder: Path, processes: int) -> tuple[float, int]:
    """Seconds until the last process has loaded, and bytes of all together."""
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(processes)
    ]

    def told(process: subprocess.Popen, key: str) -> float:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{") and key in (values := json.loads(line)):
                return values[key]
        raise RuntimeError(f"a process that loads {kind} ended with {process.wait()}")

    def go() -> None:
        for process in children:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    for process in children:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            if process.poll() is not None:
                raise RuntimeError(f"a process that loads {kind} ended with {process.wait()}")
    go()
    seconds = max(told(process, "seconds") for process in children)
    go()
    size = sum(int(told(process, "bytes")) for process in children)
    for process in children:
        process.wait()
    return seconds, size


def main() -> None:
    """Writes the file, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to use")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return
    folder = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=options.folder))
    try:
        subprocess.run([sys.executable, "-c", f"import load, pathlib; load.write(pathlib.Path({str(folder)!r}))"],
                       check=True, cwd=Path(__file__).parent)  # fmt: skip
        report(options, folder)
    finally:
        shutil.rmtree(folder)


def report(options: argparse.Namespace, folder: Path) -> None:
    """A table for people and a line for programs."""
    from agent.models.pi import adapter

    size = (folder / "model.safetensors").stat().st_size
    tensors = 4 * sum(math.prod(shape) for shape in adapter.shapes(model_config()).values())
    os.sync()
    measure("plain", folder, 1)  # brings the file to the page cache
    kinds = ("plain", "ours", "lerobot")
    turns = [{kind: measure(kind, folder, options.processes) for kind in kinds} for _ in range(options.runs)]
    seconds = {kind: statistics.median(turn[kind][0] for turn in turns) for kind in kinds}
    memory = {kind: statistics.median(turn[kind][1] for turn in turns) / tensors for kind in kinds}
    sizes = f"{size / 1e9:.2f} GB, of which {tensors / 1e9:.2f} are the model's tensors"
    print(f"{sizes}; {options.processes} processes, {options.runs} runs, medians")
    for kind in kinds:
        times = [turn[kind][0] for turn in turns]
        print(
            f"  {kind:<8} {seconds[kind]:7.2f} s ({min(times):.2f} to {max(times):.2f})   {memory[kind]:5.2f} × the tensors"
        )
    to_plain = statistics.median(turn["ours"][0] / turn["plain"][0] for turn in turns)
    to_peer = statistics.median(turn["lerobot"][0] / turn["ours"][0] for turn in turns)
    print(f"  {to_plain:.2f} times a plain read, {to_peer:.1f} times as fast as LeRobot")
    print(json.dumps({
        "bytes": size, "tensor_bytes": tensors, "processes": options.processes, "of_plain_read": round(to_plain, 3),
        "lerobot_over_ours": round(to_peer, 2), **{f"{kind}_s": round(seconds[kind], 3) for kind in kinds},
        **{f"{kind}_memory": round(memory[kind], 3) for kind in kinds},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
