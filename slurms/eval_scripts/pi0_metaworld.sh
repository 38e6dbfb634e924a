#!/bin/bash

#SBATCH --job-name=pi0_metaworld_eval
#SBATCH --output=log/slurm/eval/%x_%j.out
#SBATCH --error=log/slurm/eval/%x_%j.err
#SBATCH --time=04:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
##SBATCH --account=your_account

# Evaluates checkpoints of a run in simulation, as the eval_cfg of its config says:
#     sbatch slurms/eval_scripts/pi0_metaworld.sh [RUN_FOLDER] [ARGUMENTS of agent.evaluate_sim]
# While the run trains it waits for more of them. Stopped, it continues when the same command is given again. It needs
# no GPU. The simulator lives in an environment of its own, so that nothing changes under a training that runs.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh` is another shell in places

# Under sbatch this file is a copy in SLURM's spool folder; the repository is then where sbatch was called.
for root in "$(dirname "${BASH_SOURCE[0]}")/../.." "${SLURM_SUBMIT_DIR:-.}" "$PWD"; do
    [[ ! -f "$root/slurms/common.sh" ]] || break
done
# shellcheck source=../common.sh
source "$root/slurms/common.sh" || {
    echo "no repository here: cd REPOSITORY && sbatch slurms/eval_scripts/pi0_metaworld.sh" >&2
    exit 2
}

run_folder=${1:-$VLA_LOG_DIR/pi0_metaworld}
shift $(($# > 0))
choose_launcher
# A job that asked for no GPU uses none: on a node that does not hide them they are others', and a job that a training
# submits has even the variable of the training.
[[ -z "${SLURM_JOB_ID:-}" ]] || asked_for_gpus || export CUDA_VISIBLE_DEVICES=""
export MUJOCO_GL="${MUJOCO_GL:-egl}"
export UV_PROJECT_ENVIRONMENT="${VLA_SIM_ENVIRONMENT:-$repository/.venv-sim}"
say "job ${SLURM_JOB_ID:-none} on $HOSTNAME evaluates $run_folder"
exec "${launcher[@]}" uv run --extra sim python -m agent.evaluate_sim --run "$run_folder" "$@"
