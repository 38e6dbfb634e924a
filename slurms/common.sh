#!/bin/bash
# What all scripts in slurms/train_scripts/ share. They source this file and call `train CONFIG "$@"`.
#
# It works the same under sbatch and under plain bash. `train` looks at what the job was given, starts torchrun once
# in the background, hands every wish to stop to the run as a file, and waits until all is gone. Then it decides from
# the outcome that the run wrote down whether the job is done, has failed for good, goes back into the queue, or is
# held. What it needs from the site (paths, container) comes from set_path.sh. docs/reliability.md explains it all.

unset CDPATH # with it, cd may print where it went
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# set_path.sh is the user's, and may do what a shell can. Where it makes this script impossible it is named.
refuse_paths() {
    trap - EXIT
    echo "set_path.sh ${*//$'\n'/; }; not requeued" >&2
    exit 2
}
problem=$(bash -O extglob -n ./set_path.sh 2>&1) || refuse_paths "cannot be read: $problem"
! grep -q $'\r$' ./set_path.sh || refuse_paths "has the line ends of Windows; write: sed -i 's/\r\$//' set_path.sh"
at_hand=("$@") at_home=$PWD at_first=$(set +o; shopt -p)
trap 'refuse_paths "ended the script (exit code $?), with an exit or with the error above"' EXIT
# shellcheck source=../set_path.sh
source ./set_path.sh || echo "set_path.sh: its last command left with exit code $?; going on" >&2
# Back as it was: the options of the shell (`set -e` would end this script at the first failure, whose answer it is),
# traps, folder and arguments.
eval "$at_first" 2>/dev/null
trap - EXIT ERR DEBUG RETURN
IFS=$' \t\n'
set +e -u -- ${at_hand[@]+"${at_hand[@]}"}
repository=$at_home
cd "$repository" || exit 2

# A variable that is set but not exported is meant for the run all the same. Left empty, as in a template, it would be
# taken for a path or refused; unset, each program has a default of its own.
for name in VLA_DATA_DIR VLA_LOG_DIR HF_HOME TRANSFORMERS_CACHE UV_CACHE_DIR UV_PYTHON_INSTALL_DIR TORCHINDUCTOR_CACHE_DIR; do
    if [[ -n "${!name:-}" ]]; then export "${name?}"; else unset "$name"; fi
done
export VLA_LOG_DIR="${VLA_LOG_DIR:-$repository/runs}" VLA_WANDB_ENTITY="${VLA_WANDB_ENTITY:-}"

say() { echo "[$(date '+%F %T')] $*"; }

# What SLURM knows of this job, one KEY=VALUE a line; nothing without SLURM. The number of an array's last task is the
# whole array's too, so that SLURM tells of all of its tasks.
job_record() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || return 1
    scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID " | tr ' ' '\n'
}

# The name by which SLURM takes orders about this job and no other task of its array. Nothing where there is no going
# back into a queue: without SLURM, and in an allocation in which somebody works (salloc, srun --pty bash).
name_in_queue() {
    local record array task
    [[ -n "${SLURM_JOB_ID:-}" ]] || return 0
    record=$(job_record)
    ! grep -q '^BatchFlag=0$' <<<"$record" || return 0
    array=$(sed -n 's/^ArrayJobId=//p' <<<"$record")
    task=$(sed -n 's/^ArrayTaskId=//p' <<<"$record")
    [[ -n "$array" && -n "$task" ]] && echo "${array}_$task" || echo "$SLURM_JOB_ID"
}

# Whether this SLURM job asked for GPUs.
asked_for_gpus() { job_record | grep -qE '^Tres[A-Za-z]+=.*gpu'; }

# How many GPUs this job may use. CUDA_VISIBLE_DEVICES says it best, empty meaning none; like CUDA we count up to the
# first entry that names no device. nvidia-smi shows the whole machine, under SLURM often the GPUs of other people's
# jobs too, so there it is asked only for a job that wants GPUs and was not told which (select/linear does that).
count_gpus() {
    local devices device listed count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        IFS=',' read -r -a devices <<<"${CUDA_VISIBLE_DEVICES//[[:space:]]/}" # "0, 1" are two, for CUDA as well
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
    if [[ -z "${SINGULARITY_IMAGE:-}" ]]; then
        [[ -z "${OVERLAY_EXT3:-}" ]] || say "no container: OVERLAY_EXT3 is set, SINGULARITY_IMAGE is not (set_path.sh)"
        return 0
    fi
    launcher=(singularity exec --nv)
    [[ -z "${OVERLAY_EXT3:-}" ]] || launcher+=(--overlay "$OVERLAY_EXT3:ro")
    # The image brings its own PATH; an overlay usually carries uv in /ext3/uv.
    # shellcheck disable=SC2016  # expanded inside the container
    launcher+=("$SINGULARITY_IMAGE" /bin/bash -c 'PATH="/ext3/uv:$PATH" exec "$@"' bash)
}

# The first use of uv, and the only one that brings the environment up to date: to look through its files takes seconds, on
# a network's file system more. Where that fails no repetition helps, so it comes before the run, whose failures are
# answered with a requeue.
find_free_port() {
    "${launcher[@]}" uv run python -c '
import socket
import agent
with socket.socket() as probe:
    probe.bind(("", 0))
    print(probe.getsockname()[1])'
}

# The run writes its outcome to a file with this attempt's name, and stops when it sees another: one attempt is one
# start of one job. An attempt that SLURM killed with its script has left its files behind.
name_attempt() {
    local job="${SLURM_JOB_ID:-$HOSTNAME-$$}" folder="$VLA_LOG_DIR/.attempts"
    mkdir -p "$folder" || {
        say "VLA_LOG_DIR=$VLA_LOG_DIR, the place of the run folders, cannot be used: see set_path.sh" >&2
        exit 2
    }
    rm -f "$folder/$job"-*.json "$folder/$job"-*.stop
    ((${SLURM_RESTART_COUNT:-0})) || rm -f "$folder/$job.crashes" # of a job that had this number long ago
    VLA_ATTEMPT="$job-${SLURM_RESTART_COUNT:-0}-$(date +%s)"
    export VLA_ATTEMPT VLA_STATUS_FILE="$folder/$VLA_ATTEMPT.json" VLA_STOP_FILE="$folder/$VLA_ATTEMPT.stop"
}

# Asks the run to save at its next update and to end. A file, because no signal gets through uv and torchrun to the
# training processes alive: SIGUSR1 kills torchrun and orphans them, and after any other it kills them in 30 seconds.
ask_to_stop() {
    interrupted=1
    [[ ! -e "$VLA_STOP_FILE" ]] || return 0 # asking twice changes nothing
    say "$1: the run saves at its next update and ends; waiting for it"
    echo "$1" >"$VLA_STOP_FILE.part"
    mv -f "$VLA_STOP_FILE.part" "$VLA_STOP_FILE"
}

# Only a person presses Ctrl-C, and a person who does so again does not want to wait for the update.
on_interrupt() {
    if [[ -e "$VLA_STOP_FILE" && -n "$child" ]]; then
        interrupted=1
        say "Ctrl-C again: what has not saved within 30 seconds is killed"
        kill -TERM "$child" 2>/dev/null # uv hands it to torchrun, and torchrun to the training processes
        return 0
    fi
    ask_to_stop "Ctrl-C"
}

# From here to the run's end no signal ends this script.
catch_signals() {
    child="" listener=""
    trap 'ask_to_stop "SIGUSR1 (the time limit is near, or scancel --signal=USR1)"' USR1
    trap 'ask_to_stop "SIGTERM (scancel, scontrol requeue or preemption; kill, without SLURM)"' TERM
    trap 'ask_to_stop "SIGHUP (the terminal was closed)"' HUP
    trap on_interrupt INT
    trap '[[ -z "$listener" ]] || kill "$listener" 2>/dev/null' EXIT
}

# `scancel --signal=USR1 JOB` and the SIGTERM at the start of a preemption's grace time go to job steps only, not to
# a batch script. So there is a step that takes nothing of the job and hands what it gets to this script.
listen_as_step() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || return 0
    # shellcheck disable=SC2016  # expanded by the step
    setsid --wait srun --overlap --nodes=1 --nodelist="${SLURMD_NODENAME:-$HOSTNAME}" --ntasks=1 --cpus-per-task=1 \
        --mem=0 --gres=none --mpi=none --input=none --quiet --job-name=listener \
        bash -c '
            trap "kill -USR1 $0; kill \$!" USR1
            trap "kill -TERM $0; kill \$!; exit" TERM
            while :; do sleep 1000 & wait $!; done' $$ </dev/null >/dev/null 2>&1 &
    listener=$!
    disown "$listener"
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
        if [[ -e "$VLA_STOP_FILE" ]]; then # the signal came for uv, too
            conclude 143
        fi
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
}

# One node: --standalone makes torchrun choose its own meeting point. The endpoint counts once you take that out.
#
# In the background, because bash runs a trap only between commands, and `wait` is one that a signal ends. In a
# session of its own, so that a signal to this script's process group (Ctrl-C, scancel --full) stays with the script.
run_training() {
    local exit_code=0 again
    [[ ! -e "$VLA_STOP_FILE" ]] || return 143
    setsid --wait "${launcher[@]}" uv run --no-sync torchrun \
        --standalone \
        --nnodes=1 \
        --nproc_per_node="$processes" \
        --rdzv_backend=c10d \
        --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --max-restarts=0 \
        src/agent/run.py \
        --config_path "$@" </dev/null &
    child=$!
    while :; do
        interrupted=""
        wait "$child"
        again=$?
        ((again == 127)) || exit_code=$again # 127: an earlier wait has already collected it
        [[ -n "$interrupted" ]] || break
    done
    child=""
    return "$exit_code"
}

# Reads the outcome and leaves the script. torchrun's exit code is 1 for whatever went wrong, so it does not decide.
conclude() {
    local run_exit_code=$1 decision exit_code job
    trap '' USR1 TERM HUP INT # there is nothing left to stop
    job=$(name_in_queue)
    decision=$("${launcher[@]}" uv run --no-sync python -m agent.requeue \
        "$VLA_STATUS_FILE" "$VLA_ATTEMPT" "$run_exit_code" "${job:+$SLURM_JOB_ID}")
    exit_code=$?
    rm -f "$VLA_STATUS_FILE" "$VLA_STOP_FILE"
    say "torchrun left with exit code $run_exit_code; ${decision:-fail: the outcome could not be read}"
    case "${decision%%:*}" in
        done | fail)
            exit "$exit_code"
            ;;
        stop) # by a person, for whom it waits
            [[ -z "$job" ]] || same_command="sbatch, with the same script and arguments"
            say "to continue, run the same command again: ${same_command}" >&2
            exit "$exit_code"
            ;;
        requeue | hold)
            put_back "${decision%%:*}" "$job"
            ;;
        *)
            say "not requeued" >&2
            exit 1
            ;;
    esac
}

# Whether SLURM is ending this job already, because somebody cancelled it or requeued it. SLURM would take even a
# cancelled job back. A job past its time limit or being preempted is as good as ours to requeue.
is_being_ended() {
    local record
    record=$(job_record)
    grep -qE '^JobState=(COMPLETING|CANCELLED|PENDING)$' <<<"$record" &&
        ! grep -qE '^(Reason=TimeLimit|PreemptTime=[0-9].*)$' <<<"$record"
}

# put_back requeue|hold JOB: puts the job back into the queue, where it starts again with the same arguments and continues
# its run, or stays until somebody releases it. The last thing the script does, since SLURM ends the job as soon as it
# has accepted. Leaves with 1 where there is no such queue.
put_back() {
    local order=requeue job=$2 tries
    if [[ -z "$job" ]]; then
        say "to continue, run the same command again: ${same_command}" >&2
        exit 1
    elif is_being_ended; then
        say "job $job was cancelled or requeued from outside, and is left to SLURM;" \
            "to continue a cancelled one, submit the same command again" >&2
        exit 1
    elif [[ "$1" == hold ]]; then
        order=requeuehold
        say "job $job goes on hold: correct the cause, then 'scontrol release $job' continues it;" \
            "'scancel $job' gives it up" >&2
    else
        say "job $job goes back into the queue"
    fi
    for ((tries = 0; tries < 3; tries++)); do
        ((tries == 0)) || sleep "${VLA_REQUEUE_PAUSE:-10}" # a controller that is just restarting
        ! scontrol "$order" "$job" || exit 1
    done
    say "SLURM did not take job $job back; to continue, submit the same command again" >&2
    exit 1
}

# train CONFIG [ARGUMENTS…]: the arguments are handed to run.py, whose values they override.
train() {
    same_command="bash $(printf '%q ' "$0" "${@:2}")"
    name_attempt
    catch_signals
    listen_as_step
    prepare
    run_training "$@"
    conclude $?
}
