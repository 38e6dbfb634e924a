#!/usr/bin/env bash
# LeRobot 0.6.1 writes quantiles of a data set into meta/stats.json that are the mean of its episodes' quantiles.
#
# Guess: q01 and q99 of stats.json enclose 98% of the frames, as their names say and as QUANTILES normalisation (the default of
# its pi05) takes them to. Found: `aggregate_feature_stats` averages the episodes' values, weighted by frames. Where episodes
# differ in where they are (a task in ten places, a mobile robot, a long task cut in pieces) the range is far too narrow, and
# nothing warns. Ten episodes side by side on [0, 100): nine frames of ten are normalised to values outside [-1, 1], up to
# 10 in size. Mean, min and max are right. `recompute_stats` (lerobot-edit-dataset) writes what is printed last: the same.
#
# Seen (lerobot 0.6.1, numpy 2.2.6, Python 3.12):
#   stats.json: q01 45.000 q99 54.801; true: q01 0.999 q99 98.901; frames outside [-1, 1] after QUANTILES: 90.1%
#   after recompute_stats: q01 45.000 q99 54.801
#
# Needs uv and a Python 3.12. Fails if LeRobot's behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME=$work/hf
uv run --quiet --isolated --no-project --python 3.12 --with 'lerobot[dataset]==0.6.1' --with 'torch==2.11.0' --with 'numpy==2.2.6' python - "$work" <<'PY'
import json
import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

feature = {"dtype": "float32", "shape": (1,), "names": ["x"]}
data = LeRobotDataset.create("some/data", fps=10, root=sys.argv[1] + "/data", features={"observation.state": feature}, use_videos=False)
for episode in range(10):
    for frame in range(100):
        data.add_frame({"observation.state": np.array([10 * episode + frame / 10], np.float32), "task": "go"})
    data.save_episode()
data.finalize()
kept = json.load(open(sys.argv[1] + "/data/meta/stats.json"))["observation.state"]
low, high = kept["q01"][0], kept["q99"][0]
values = np.arange(1000) / 10
outside = (np.abs(2 * (values - low) / (high - low) - 1) > 1).mean()
true = np.quantile(values, [0.01, 0.99])
print(f"stats.json: q01 {low:.3f} q99 {high:.3f}; true: q01 {true[0]:.3f} q99 {true[1]:.3f}; "
      f"frames outside [-1, 1] after QUANTILES: {outside:.1%}")
assert 44 < low < 46 and 54 < high < 56 and outside > 0.85, "LeRobot's quantiles are no longer means of the episodes' own"
from lerobot.datasets.dataset_tools import recompute_stats

recompute_stats(LeRobotDataset("some/data", root=sys.argv[1] + "/data"))
again = json.load(open(sys.argv[1] + "/data/meta/stats.json"))["observation.state"]
print(f"after recompute_stats: q01 {again['q01'][0]:.3f} q99 {again['q99'][0]:.3f}")
assert again["q99"][0] - again["q01"][0] < 60, "recompute_stats no longer averages"
assert abs(kept["min"][0]) < 1e-6 and abs(kept["max"][0] - 99.9) < 1e-4 and abs(kept["mean"][0] - 49.95) < 1e-2
PY
