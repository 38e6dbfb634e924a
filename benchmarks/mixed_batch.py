"""What a batch of different robots costs: half of its samples have one camera of three, instructions have 8 to 48 tokens.

    OMP_NUM_THREADS=1 uv run python benchmarks/mixed_batch.py --against <revision>

The step of this tree and that of another revision of the repository, each in a process of its own, in turn, on the same batch
and weights, in float32 and in bfloat16. Compared are the fastest of each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

KINDS = {"float32": False, "bfloat16": True}


def serve(size: int) -> None:
    """Answers lines of standard input: the loss of a kind, or the seconds of a step of it. Runs in either tree."""
    import contenders
    import numpy as np
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = contenders.model_config("reduced", 3)
    batch = contenders.make_batch(config, 3, size, config.tokenizer_max_length)
    batch = mixed(batch, np.linspace(8, 48, size).astype(int))
    device, sides = torch.device("cpu"), {}
    for kind, on in KINDS.items():
        train = contenders.train_config(config, size, use_bf16=on, use_torch_compile=False)
        # Trees from before the packing hand the weights over; the others draw the same.
        older = hasattr(contenders.Contender, "wake")
        weights = [contenders.make_weights(config, device)] if older else []
        sides[kind] = contenders.Ours(train, batch, *weights, device)
    losses = {kind: side.loss() for kind, side in sides.items()}
    for side in sides.values():
        side.arm()
        side.step()
    print(json.dumps(losses), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        sides[line.strip()].step()
        print(json.dumps(time.perf_counter() - begin), flush=True)


def mixed(batch: Any, lengths: Any) -> Any:
    """The batch with every second sample's other cameras taken away and its instructions cut, as the collate would make it."""
    import torch

    observation = batch.observation
    half = torch.arange(len(batch)) % 2 == 0
    kept = torch.arange(observation.tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
    first = next(iter(observation.images))
    masks = {name: mask if name == first else mask & half for name, mask in observation.image_masks.items()}
    changes: dict[str, Any] = {"image_masks": masks, "token_mask": kept}
    # Trees from before the packing say with one number whether anything is masked; this one reads the masks again.
    changes |= {"padded": True} if hasattr(observation, "padded") else {"real": None}
    images = {
        name: torch.where(masks[name][:, None, None, None], image, 0) for name, image in observation.images.items()
    }
    return replace(batch, observation=replace(observation, images=images, **changes))


def start(tree: Path, size: int) -> subprocess.Popen[str]:
    """A process that serves steps of this tree."""
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", "--batch", str(size)],
        env={**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree / 'benchmarks'}", "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(side: subprocess.Popen[str], line: str | None = None) -> Any:
    """The next answer, to a line or to none."""
    assert side.stdin is not None and side.stdout is not None
    if line is not None:
        side.stdin.write(f"{line}\n")
        side.stdin.flush()
    return json.loads(side.stdout.readline())


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", help="the other revision")
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind and side")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.batch)
    from revisions import REPOSITORY, unpacked  # only here: the other revision may not have it

    with unpacked(options.against) as tree:
        ours, before = start(REPOSITORY, options.batch), start(tree, options.batch)
        losses = ask(ours), ask(before)
        times: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in KINDS}
        for _ in range(options.rounds):
            for kind, (own, other) in times.items():
                own.append(ask(ours, kind))
                other.append(ask(before, kind))
        for side in (ours, before):
            side.communicate()
    medians = {kind: tuple(statistics.median(some) for some in pair) for kind, pair in times.items()}
    for kind, (own, other) in medians.items():
        difference = abs(losses[0][kind] / losses[1][kind] - 1)
        print(f"{kind}: {own:.3f} s against {other:.3f} s, {other / own:.2f} times; losses differ by {difference:.1e}")
    fastest = [min(median[side] for median in medians.values()) for side in (0, 1)]
    print(json.dumps({"ratio": fastest[1] / fastest[0], "seconds": medians, "losses": losses}))


if __name__ == "__main__":
    main()
