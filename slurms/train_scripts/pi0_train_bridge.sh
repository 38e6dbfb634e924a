#!/bin/bash

#SBATCH --job-name=pi0_train_bridge
#SBATCH --output=log/slurm/train/%x.out
#SBATCH --error=log/slurm/train/%x.err
#SBATCH --open-mode=append
#SBATCH --time=44:00:00
#SBATCH --nodes=1
#SBATCH --gres=gpu:4
#SBATCH --constraint="a100|h100"
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=54
#SBATCH --mem=440G
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
##SBATCH --account=your_account

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh` is another shell in places

# Under sbatch this file is a copy in SLURM's spool folder; the repository is then where sbatch was called.
for root in "$(dirname "${BASH_SOURCE[0]}")/../.." "${SLURM_SUBMIT_DIR:-.}" "$PWD"; do
    [[ ! -f "$root/slurms/common.sh" ]] || break
done
# shellcheck source=../common.sh
source "$root/slurms/common.sh" || {
    echo "no repository here: cd REPOSITORY && sbatch slurms/train_scripts/pi0_train_bridge.sh" >&2
    exit 2
}

train config/train/pi0_train_bridge.yaml "$@"
