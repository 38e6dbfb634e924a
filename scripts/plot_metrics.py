"""Draws the curves of a run: loss, and validation error beside its baselines.

uv run --with matplotlib python scripts/plot_metrics.py runs/pi0_demo docs/demo_curves.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from agent.lifecycle.records import read_metrics  # noqa: E402


def main(run: Path, target: Path) -> None:
    """Reads ``metrics.jsonl`` of a run folder and writes a picture."""
    lines = [line for line in read_metrics(run / "metrics.jsonl").records if "loss" in line]
    validations = [line for line in lines if "val/loss" in line]
    left, right = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")[1]
    left.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="#9bb7d4", label="training")
    steps = [line["step"] for line in validations]
    left.plot(steps, [line["val/loss"] for line in validations], "o-", color="#1f4e79", label="held-out episodes")
    left.set(title="flow-matching loss", xlabel="update", ylim=(0, None))
    right.plot(steps, [line["val/action_l1"] for line in validations], "o-", color="#1f4e79", label="policy")
    for key, label, style in (("mean", "baseline: mean action", "--"), ("last", "baseline: last action repeated", ":")):
        right.axhline(validations[-1][f"val/baseline_{key}_l1"], color="#b04a3a", linestyle=style, label=label)
    right.set(title="error of sampled actions (L1)", xlabel="update")
    right.set(xlim=left.get_xlim(), ylim=(0, 1.35 * right.get_ylim()[1]))  # the legend lies over no baseline
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
