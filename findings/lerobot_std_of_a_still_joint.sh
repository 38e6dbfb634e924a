#!/usr/bin/env bash
# LeRobot 0.6.1's standard deviation of a dimension that is far from zero and moves little is noise, or zero.
#
# Guess: numpy's or Welford's deviation, good to six digits for float32 columns. Found: `RunningQuantileStats` takes
# mean(x**2) - mean(x)**2 in float32. A joint at 180 degrees that moves by 0.3 is given between 0.13 and 0.46, one in raw
# motor ticks (2,048 of 4,096) between 1 and 3, and MEAN_STD divides by that. So it is for every column that `save_episode`
# and the converters describe, without a warning.
#
# Seen (lerobot 0.6.1, numpy 2.2.6, Python 3.12), six joints that move by 0.3:
#   around 0: stats.json says [0.3017 0.2913 0.3038 0.3033 0.2959 0.2951], it is [0.3017 0.2913 0.3038 0.3033 0.2959 0.2951]
#   around 180: stats.json says [0.125  0.25   0.4593 0.2795 0.3156 0.3125], it is the same as above
#   around 2048: stats.json says [1.4142 3.1623 1.     2.3452 1.8028 1.8708], it is the same as above
#
# Needs uv and a Python 3.12. Fails if LeRobot's behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME=$work/hf
uv run --quiet --isolated --no-project --python 3.12 --with 'lerobot[dataset]==0.6.1' --with 'torch==2.11.0' --with 'numpy==2.2.6' python - <<'PY'
import numpy as np
from lerobot.datasets.compute_stats import get_feature_stats

worst = {}
for mean in (0, 180, 2048):
    random = np.random.default_rng(0)
    columns = (mean + 0.3 * random.normal(size=(1000, 6))).astype(np.float32)
    said = get_feature_stats(columns, axis=0, keepdims=False)["std"]
    true = columns.astype(np.float64).std(axis=0)
    worst[mean] = np.abs(said / true - 1).max()
    print(f"around {mean}: stats.json says {said.round(4)}, it is {true.round(4)}")
assert worst[0] < 1e-4, "the deviation around zero was right"
assert worst[180] > 0.05 and worst[2048] > 0.9, "LeRobot's deviation is no longer taken in float32 from the mean of squares"
PY
