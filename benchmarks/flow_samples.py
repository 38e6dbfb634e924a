"""What several flow-matching draws per observation are worth: the demo at equal updates with K = 1, 4 and 8.

    uv run python benchmarks/flow_samples.py --updates 1000 --seeds 3 --k 1 4 8

Real runs of ``config/train/pi0_demo.yaml``, one after the other. Runs of one seed have the same weights to begin with,
the same samples in the same order, the same first draw of each, and the same validation samples, noise and times. The
differences are to the first K of the same seed, and so is their spread over the seeds, which says what they would be by
chance. Further arguments override the config. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
METRICS = ("val/loss", "val/action_l1")


def train(folder: Path, k: int, seed: int, updates: int, overrides: list[str]) -> dict[str, float]:
    """One run: the numbers of its last validation, and the median seconds of an update."""
    name = f"{k}-{seed}"
    arguments = ["--config_path", "config/train/pi0_demo.yaml", "--name", name, "--seed", str(seed)]
    arguments += ["--n_updates", str(updates), "--eval_freq", str(updates), "--save_model_freq", str(updates)]
    arguments += ["--use_wandb", "false", "--log_freq", "5", "--flow_samples_per_observation", str(k), *overrides]
    done = subprocess.run(
        [sys.executable, "src/agent/run.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "VLA_LOG_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"K = {k}, seed {seed}:\n{done.stdout[-4000:]}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {name: lines[-1][name] for name in METRICS} | {"step_s": statistics.median(x["step_s"] for x in lines)}


def compare(runs: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Per K: means, and relative differences to the first K with their standard deviation over the seeds."""
    first = next(iter(runs.values()))
    rows = []
    for k, mine in runs.items():
        row: dict[str, float] = {"k": k, "step_s": statistics.fmean(run["step_s"] for run in mine)}
        for name in METRICS:
            changes = [run[name] / base[name] - 1 for run, base in zip(mine, first, strict=True)]
            row[name] = statistics.fmean(run[name] for run in mine)
            row[f"{name} change"] = statistics.fmean(changes)
            row[f"{name} spread"] = statistics.stdev(changes) if len(changes) > 1 else 0.0
        rows.append(row)
    return rows


def main() -> None:
    """Trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000, help="optimizer updates of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs with each K")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 8], help="draws per observation")
    options, overrides = parser.parse_known_args()
    runs: dict[int, list[dict[str, float]]] = {k: [] for k in options.k}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            for k in options.k:
                runs[k].append(train(Path(folder), k, seed, options.updates, overrides))
                print(f"seed {seed}, K = {k}: {runs[k][-1]}", flush=True)
    rows = compare(runs)
    print(f"\n{options.updates} updates, {options.seeds} seeds; changes are to K = {options.k[0]}, ± over the seeds")
    print("| K | validation loss | change | action error | change | s per update |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[m]:.4f} | {row[f'{m} change']:+.1%} ± {row[f'{m} spread']:.1%}" for m in METRICS]
        print(f"| {row['k']} | {' | '.join(cells)} | {row['step_s']:.3f} |")
    print(json.dumps({"updates": options.updates, "seeds": options.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
