"""Times an update of the low-memory optimizer on a CPU against another revision's, and prints the ratios.

    uv run python benchmarks/optimizer_update.py [--revision 862c78c] [--rounds 5]

100 million numbers in 60 tensors with shapes of a model's layers, `precision: bfloat16_stochastic` and
`optimizer: adamw8bit`, one thread. The other revision's `src` is unpacked beside this one. In every round each of the
three is a process of its own: the other revision, this one without a compiler, this one with. A ratio above 1 means that
this one is quicker; it is the median over the rounds of the quotient of the round's times. The last line is JSON for
programs, {"torch": ratio, "compiled": ratio, "seconds": {...}}; without a compiler the second is that of torch too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from revisions import REPOSITORY, unpacked

MATRICES = [(2048, 16384), (16384, 2048), *[(1152, 4304)] * 3, *[(1152, 1152)] * 8, *[(1024, 1024)] * 6, (588, 1152)]
VECTORS = [(4304,)] * 10 + [(1152,)] * 20 + [(2048,)] * 10
OTHER, TORCH, COMPILED = "other revision", "torch", "compiled"


def time_updates(updates: int) -> float:
    """Seconds of the quickest of so many updates with clipping, after one that makes the state."""
    import torch
    from torch import nn

    from agent.optim.optimizer import apply_update, clip_gradients, make_optimizer

    torch.set_num_threads(1)
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()

    def numbers(shape: tuple[int, ...]) -> torch.Tensor:
        return noise.repeat(math.prod(shape) // len(noise) + 1)[: math.prod(shape)].view(shape).clone()

    model = nn.ParameterList([nn.Parameter(numbers(shape)) for shape in MATRICES + VECTORS])
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, eight_bit=True, seed=0)
    for parameter in model:
        parameter.grad = numbers(tuple(parameter.shape)) * 1e-3
    times = []
    for number in range(updates + 1):
        begin = time.perf_counter()
        clip_gradients(optimizer, 1.0)
        apply_update(optimizer, 1e-4, number)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def timed(source: Path, updates: int, compiler: bool) -> float:
    """The same in a process of its own, of the build in this ``src`` folder."""
    environment = os.environ | {"PYTHONPATH": str(source)} | ({} if compiler else {"CC": "false"})
    command = [sys.executable, __file__, "--child", "--updates", str(updates)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the updates of {source} failed:\n{done.stderr}")
    return float(done.stdout)


def main() -> None:
    """Times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="862c78c", help="git revision to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--updates", type=int, default=2, help="timed updates of a turn, of which the quickest counts")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(time_updates(options.updates))
        return
    seconds: dict[str, list[float]] = {OTHER: [], TORCH: [], COMPILED: []}
    with unpacked(options.revision) as before:
        for _ in range(options.rounds):
            seconds[OTHER].append(timed(before / "src", options.updates, compiler=True))
            seconds[TORCH].append(timed(REPOSITORY / "src", options.updates, compiler=False))
            seconds[COMPILED].append(timed(REPOSITORY / "src", options.updates, compiler=True))
            print("  ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), flush=True)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[OTHER], seconds[name], strict=True))
        for name in (TORCH, COMPILED)
    }
    numbers = sum(a * b for a, b in MATRICES) + sum(a for (a,) in VECTORS)
    print(f"{len(MATRICES + VECTORS)} tensors, {numbers / 1e6:.0f} M numbers, {options.rounds} rounds")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times as quick as {options.revision}")
    print(json.dumps({**ratios, "seconds": {name: statistics.median(times) for name, times in seconds.items()}}))


if __name__ == "__main__":
    main()
