#!/bin/bash
# Where this project keeps its files. Source it (bash) from the repository's root: `source set_path.sh`.
#
# A variable that already has a value keeps it, so there are two ways to change a path: export it before, or edit
# its default here, on the right of `:-`. On a cluster all of them usually belong on the large scratch file system,
# for home directories are small; put `export` lines for your site between the two rules below.
#
# ----------------------------------------------------------------------------------------------------------------
# export HF_HOME="/scratch/$USER/huggingface"
# export HF_HUB_OFFLINE=1
# ----------------------------------------------------------------------------------------------------------------

# The Hugging Face cache: models, tokenizers and data sets that come from the hub.
# Where compute nodes have no internet, `python -m agent.prepare` fills it on the login node and prints what to export.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
export TRANSFORMERS_CACHE="${TRANSFORMERS_CACHE:-$HF_HOME/hub}"

# Data sets in the LeRobot format, one folder each; LeRobot downloads to the same place by itself.
export VLA_DATA_DIR="${VLA_DATA_DIR:-$HF_HOME/lerobot}"

# Run folders: configuration, metrics, checkpoints. Needs room for several checkpoints of some 20 GB each.
export VLA_LOG_DIR="${VLA_LOG_DIR:-$PWD/runs}"

# The wandb user or team that runs are logged to; empty means the default of your wandb account.
export VLA_WANDB_ENTITY="${VLA_WANDB_ENTITY:-}"

# uv's downloaded packages and Python interpreters. Same file system as the repository: uv then links, not copies.
export UV_CACHE_DIR="${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}"
export UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"

# What use_torch_compile has compiled: a restart finds it there and compiles nothing anew.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torchinductor}"

# Singularity (Apptainer): the image file, and an overlay that is mounted read-only. No image means no Singularity.
export SINGULARITY_IMAGE="${SINGULARITY_IMAGE:-}"
export OVERLAY_EXT3="${OVERLAY_EXT3:-}"
