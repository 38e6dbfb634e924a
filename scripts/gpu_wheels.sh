#!/bin/bash
# Gathers in .gpu/ what the acceptance needs on a machine that has a GPU, torch and little else, and no internet:
#
#     scripts/gpu_wheels.sh [--with_lerobot]
#     python3 benchmarks/gpu.py                  # there, with the repository and .gpu/ in it
#
# .gpu/wheels          packages that a training imports and such a machine lacks, in this environment's versions
# .gpu/wheels_lerobot  with --with_lerobot: LeRobot, and the transformers and tokenizers that it is pinned to. Its weights
#                      have other names in newer ones; ours takes any. Only what compares with LeRobot imports these.
# .gpu/frames          the pictures of the demo, decoded here (python -m agent.data.prepare), because no decoder travels.
#                      Of JPEG quality 80, which halves them; benchmarks/gpu_steps/demo.py asks for the same.
#
# Wheels are not unpacked here: packed they are a fifth as large, and benchmarks/gpu.py unpacks them. PYTHON and PIP may
# name other commands than uv's. Exit code 1 if the wheels are above LIMIT_MB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT_MB=20
OURS="draccus mergedeep toml typing-inspect mypy-extensions simplejpeg websockets"
THEIRS="lerobot gymnasium farama-notifications termcolor transformers tokenizers"

read -r -a python <<<"${PYTHON:-uv run --quiet python}"
read -r -a pip <<<"${PIP:-uv tool run --quiet pip}"
lerobot=false
case "${1:-}" in
    --with_lerobot) lerobot=true ;;
    "") ;;
    *)
        echo "usage: scripts/gpu_wheels.sh [--with_lerobot]" >&2
        exit 2
        ;;
esac

# Prints NAME==VERSION of each package as it is installed here.
pinned() {
    "${python[@]}" -c 'import sys; from importlib.metadata import version; print(*(f"{n}=={version(n)}" for n in sys.argv[1:]))' "$@"
}

# download FOLDER PACKAGES: their wheels for Linux on x86-64 and Python 3.12, without what they depend on.
download() {
    local folder=$1 packages requirements
    read -r -a packages <<<"$2"
    read -r -a requirements <<<"$(pinned "${packages[@]}")"
    rm -rf "$folder"
    "${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$folder" "${requirements[@]}"
}

download .gpu/wheels "$OURS"
rm -rf .gpu/wheels_lerobot
if $lerobot; then
    download .gpu/wheels_lerobot "$THEIRS"
fi
"${python[@]}" -m agent.data.prepare --config_path config/train/pi0_demo.yaml --use_wandb false \
    --data.train.datasets.0.frames .gpu/frames --data.train.frame_store jpeg --data.train.frame_quality 80

bytes=$(find .gpu -name '*.whl' -printf '%s\n' | awk '{sum += $1} END {print sum + 0}')
awk -v bytes="$bytes" -v limit="$LIMIT_MB" 'BEGIN {
    printf "wheels: %.1f MiB (%.1f MB; at most %d MB)\n", bytes / 1048576, bytes / 1e6, limit
    exit bytes > limit * 1e6
}' || {
    echo "error: the wheels are too large to travel; leave --with_lerobot out, or a package" >&2
    exit 1
}
du -sh .gpu/frames
