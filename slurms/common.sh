#!/bin/bash
# What all scripts in slurms/train_scripts/ share. They source this file and call `train CONFIG "$@"`.
#
# It works the same under sbatch and under plain bash. `train` looks at what the job was given, starts torchrun once,
# and then decides from the outcome that the run wrote down whether the job is done, has failed for good, or goes
# back into the queue. What it needs from the site (paths, container) comes from set_path.sh.

set -u

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$repository" || exit 2
# shellcheck source=../set_path.sh
source ./set_path.sh || exit 2

say() { echo "[$(date '+%F %T')] $*"; }

# Whether this SLURM job asked for GPUs.
asked_for_gpus() {
    [[ -n "${SLURM_JOB_ID:-}" ]] &&
        scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep -qE 'Tres[A-Za-z]+=[^ ]*gpu'
}

# How many GPUs this job may use. CUDA_VISIBLE_DEVICES says it best, empty meaning none; like CUDA we count up to the
# first entry that names no device. nvidia-smi shows the whole machine, under SLURM often the GPUs of other people's
# jobs too, so there it is asked only for a job that wants GPUs and was not told which (select/linear does that).
count_gpus() {
    local devices device listed count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        IFS=',' read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
        for device in ${devices[@]+"${devices[@]}"}; do
            [[ "$device" =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
            count=$((count + 1))
        done
    elif [[ "${SLURM_GPUS_ON_NODE:-}" =~ ^[0-9]+$ ]]; then
        count=$SLURM_GPUS_ON_NODE
    elif [[ -z "${SLURM_JOB_ID:-}" ]] || asked_for_gpus; then
        listed=$(nvidia-smi --list-gpus 2>/dev/null) && count=$(grep -c '^GPU ' <<<"$listed")
    fi
    echo "$count"
}

# Cores this job may use. nproc respects affinity and cgroup sets, but would also obey the variable we are about to
# set; where SLURM does not confine its jobs nproc shows the whole node, so what the job was given is a bound.
count_cores() {
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    if [[ "${SLURM_CPUS_ON_NODE:-}" =~ ^[0-9]+$ ]] && ((SLURM_CPUS_ON_NODE < cores)); then
        cores=$SLURM_CPUS_ON_NODE
    fi
    echo "$cores"
}

# Fills `launcher`, which stands before every command that belongs to the run: the container, or nothing (`env`).
choose_launcher() {
    launcher=(env)
    [[ -n "$SINGULARITY_IMAGE" ]] || return 0
    launcher=(singularity exec --nv)
    [[ -z "$OVERLAY_EXT3" ]] || launcher+=(--overlay "$OVERLAY_EXT3:ro")
    # The image brings its own PATH; an overlay usually carries uv in /ext3/uv.
    # shellcheck disable=SC2016  # expanded inside the container
    launcher+=("$SINGULARITY_IMAGE" /bin/bash -c 'PATH="/ext3/uv:$PATH" exec "$@"' bash)
}

# The first use of uv, which sets the environment up where that has not been done. Where it fails no repetition
# helps, so this comes before the run, whose failures are answered with a requeue.
find_free_port() {
    "${launcher[@]}" uv run python -c '
import socket
import agent
with socket.socket() as probe:
    probe.bind(("", 0))
    print(probe.getsockname()[1])'
}

# Looks at what the job was given and exports what the run needs to know.
prepare() {
    local cores
    processes=$(count_gpus)
    cores=$(count_cores)
    say "job ${SLURM_JOB_ID:-none} on $HOSTNAME, restart count ${SLURM_RESTART_COUNT:-0}"
    say "GPUs $processes (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-unset}), cores $cores"
    if ((processes == 0)); then
        if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && asked_for_gpus; then
            say "the job asked for GPUs, but this node shows none; not requeued" >&2
            exit 1
        fi
        processes=1
        export CUDA_VISIBLE_DEVICES="" # a GPU that the job was not given is not used either
        say "no GPU was given: one process on the CPU"
    fi
    export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
    export PYTHONUNBUFFERED=1 # a killed job keeps the last lines of its log

    choose_launcher
    if ! MASTER_PORT=$(find_free_port); then
        say "the environment does not work: try '${launcher[*]} uv run python -c \"import agent\"' (pip install uv)" >&2
        say "not requeued" >&2
        exit 1
    fi
    MASTER_ADDR=localhost
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    export MASTER_ADDR MASTER_PORT
    say "processes $processes, OMP_NUM_THREADS=$OMP_NUM_THREADS, MASTER_ADDR=$MASTER_ADDR, MASTER_PORT=$MASTER_PORT"

    # The run writes its outcome to this file, with this attempt's name: one attempt is one start of one job. An
    # attempt that SLURM killed with its script has left its file behind.
    local job="${SLURM_JOB_ID:-$HOSTNAME-$$}" folder="$VLA_LOG_DIR/.attempts"
    mkdir -p "$folder" || exit 2
    rm -f "$folder/$job"-*.json
    VLA_ATTEMPT="$job-${SLURM_RESTART_COUNT:-0}-$(date +%s)"
    export VLA_ATTEMPT VLA_STATUS_FILE="$folder/$VLA_ATTEMPT.json"
}

# One node: --standalone makes torchrun choose its own meeting point. The endpoint counts once you take that out.
run_training() {
    "${launcher[@]}" uv run torchrun \
        --standalone \
        --nnodes=1 \
        --nproc_per_node="$processes" \
        --rdzv_backend=c10d \
        --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --max-restarts=0 \
        src/agent/run.py \
        --config_path "$@"
}

# Reads the outcome and leaves the script. torchrun's exit code is 1 for whatever went wrong, so it does not decide.
conclude() {
    local run_exit_code=$1 decision exit_code
    decision=$("${launcher[@]}" uv run --no-sync python -m agent.requeue \
        "$VLA_STATUS_FILE" "$VLA_ATTEMPT" "$run_exit_code")
    exit_code=$?
    rm -f "$VLA_STATUS_FILE"
    say "torchrun left with exit code $run_exit_code; ${decision:-fail: the outcome could not be read}"
    case "${decision%%:*}" in
        done | fail)
            exit "$exit_code"
            ;;
        requeue)
            requeue
            ;;
        *)
            say "not requeued" >&2
            exit 1
            ;;
    esac
}

# Puts the job back into the queue; it starts again with the same arguments and continues its run. The last thing
# the script does, since SLURM ends the job as soon as it has accepted. Leaves with 1 where there is no such queue.
requeue() {
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        say "to continue, run the same command again: ${same_command}" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID is back in the queue"
    else
        say "SLURM did not take job $SLURM_JOB_ID back; to continue, submit the same command again" >&2
    fi
    exit 1
}

# train CONFIG [ARGUMENTS…]: the arguments are handed to run.py, whose values they override.
train() {
    same_command="bash $(printf '%q ' "$0" "${@:2}")"
    prepare
    run_training "$@"
    conclude $?
}
