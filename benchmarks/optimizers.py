"""What moments of eight bits and weights of bfloat16 cost in quality: the demo, trained with each and validated.

    uv run python benchmarks/optimizers.py --updates 1000 --seeds 3

Real runs of ``config/train/pi0_demo.yaml``, one after the other, the same data, order and noise for each kind of a
seed. The difference is that of the mean final validation loss to that of float32 AdamW; the spread over the seeds
says what it would be by chance. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
FLOAT32 = "float32, adamw"
KINDS: dict[str, list[str]] = {
    FLOAT32: ["--use_bf16", "false"],
    "bf16 autocast, adamw": ["--use_bf16", "true"],
    "bf16 autocast, adamw8bit": ["--use_bf16", "true", "--optimizer", "adamw8bit"],
    "bfloat16_stochastic, adamw": ["--use_bf16", "true", "--precision", "bfloat16_stochastic"],
    "bfloat16_stochastic, adamw8bit": [
        "--use_bf16", "true", "--precision", "bfloat16_stochastic", "--optimizer", "adamw8bit",
    ],
}  # fmt: skip
CLAIMED = "bfloat16_stochastic, adamw8bit"


def train(folder: Path, kind: str, seed: int, updates: int, overrides: list[str]) -> dict[str, float]:
    """One run; the last line of its metrics, and the bytes of the optimizer's state."""
    name = f"{list(KINDS).index(kind)}-{seed}"
    arguments = ["--config_path", "config/train/pi0_demo.yaml", "--name", name, "--seed", str(seed)]
    arguments += ["--n_updates", str(updates), "--eval_freq", str(updates), "--save_model_freq", str(updates)]
    arguments += ["--use_wandb", "false", *KINDS[kind], *overrides]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "src/agent/run.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "VLA_LOG_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{kind}, seed {seed}:\n{done.stdout[-4000:]}")
    last: dict[str, Any] = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    state = (folder / name / "checkpoints" / "last").glob("training_state/optimizer*.safetensors")
    size = sum(path.stat().st_size for path in state)
    return {
        "loss": last["val/loss"],
        "l1": last["val/action_l1"],
        "state_mb": size / 1e6,
        "seconds": time.monotonic() - begin,
    }


def main() -> None:
    """Trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000, help="optimizer updates of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--all", action="store_true", help="also each change alone; else only float32 and both")
    options, overrides = parser.parse_known_args()
    kinds = list(KINDS) if options.all else [FLOAT32, CLAIMED]
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            for kind in kinds:
                results[kind].append(train(Path(folder), kind, seed, options.updates, overrides))
                print(f"seed {seed}, {kind}: validation loss {results[kind][-1]['loss']:.5f}", flush=True)
    means = {kind: statistics.fmean(run["loss"] for run in runs) for kind, runs in results.items()}
    difference = {kind: means[kind] / means[FLOAT32] - 1 for kind in kinds}
    print(f"\n{options.updates} updates, {options.seeds} seeds")
    print(f"{'':<32}{'val/loss':>10}{'of seeds':>22}{'difference':>12}{'action_l1':>11}{'state MB':>10}")
    for kind, runs in results.items():
        losses = [run["loss"] for run in runs]
        l1, size = (statistics.fmean(run[key] for run in runs) for key in ("l1", "state_mb"))
        spread = f"{min(losses):.5f} to {max(losses):.5f}"
        print(f"{kind:<32}{means[kind]:>10.5f}{spread:>22}{difference[kind]:>+12.2%}{l1:>11.5f}{size:>10.2f}")
    line = {
        "updates": options.updates,
        "seeds": options.seeds,
        "difference": difference[CLAIMED],
        "differences": difference,
        "losses": {kind: [run["loss"] for run in runs] for kind, runs in results.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
