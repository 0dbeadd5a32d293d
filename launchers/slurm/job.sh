# shellcheck shell=bash
# What the batch scripts of this folder share. It sets `job`, `root`, `python`, `container`, `pyxis` and `scratch`, and gives
# functions to run ranks, to pass signals on to them, and to have SLURM start the job once more.

: "${warned:=0}"
# The job as SLURM's commands take it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# sbatch hands on the whole environment of the shell that called it. What torchrun, deepspeed, accelerate, MPI or a step of
# salloc have left there would make other ranks of ours.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE NODE_RANK GROUP_RANK GROUP_WORLD_SIZE CROSS_RANK CROSS_SIZE \
    MASTER_ADDR MASTER_PORT "${!ROLE_@}" "${!TORCHELASTIC_@}" "${!ACCELERATE_@}" "${!OMPI_COMM_WORLD_@}" \
    "${!MV2_COMM_WORLD_@}" "${!PMI_@}" PMIX_RANK PMIX_NAMESPACE MPI_LOCALRANKID MPI_LOCALNRANKS "${!SLURM_STEP_@}" \
    "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}"

# The repository; empty where `adept-ds submit` has written the script for a package that is installed.
root=${ADEPT_DS_ROOT-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
if [[ -n ${ADEPT_DS_PYTHON:-} ]]; then
    python=$ADEPT_DS_PYTHON
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
# A container is a command in front of the interpreter, or what srun does with the plugin pyxis. The latter cannot be had
# outside of a step, so that what this shell runs itself has an interpreter of its own.
read -ra container <<<"${ADEPT_DS_CONTAINER:-}"
pyxis=()
[[ -z ${ADEPT_DS_CONTAINER_IMAGE:-} ]] || pyxis=(
    --container-image="$ADEPT_DS_CONTAINER_IMAGE" --container-mounts="${ADEPT_DS_CONTAINER_MOUNTS:-}"
    --container-workdir="$PWD"
)
scratch=${ADEPT_DS_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}/adept_ds.$(id -un)}}

export ADEPT_DS_SCRATCH=$scratch
[[ -z $root ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
# srun does not inherit it from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# On network file systems the locks in these folders can hang. Without a hub, data sets are where they were prepared.
[[ ${HF_HUB_OFFLINE:-0} == 1 ]] || export HF_DATASETS_CACHE=${HF_DATASETS_CACHE:-$scratch/datasets}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$scratch/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
# A progress bar in a log is a line every so many seconds.
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30}

# Python's -P below: modules come from the repository or the installed package, never from the folder the job runs in.

# When a rank has ended well, the others have a minute to do so.
srun_options=(--wait=60)

# tool MODULE ARGUMENT..: a module of adept_ds.slurm, on this node.
tool() { "${container[@]}" "${ADEPT_DS_TOOL_PYTHON:-$python}" -P -m "adept_ds.slurm.$1" "${@:2}"; }

# What a task runs: `rank LOG COMMAND..` keeps LOG-RANK.log beside the labelled stream, and in LOG-RANK.exit when, how and
# where the rank ended, for the job's last words. The interpreter starts with USR1 ignored, since a warning may come
# while it imports, and decides on its own what it does at TERM.
rank() {
    local log=$1-$SLURM_PROCID status
    shift
    export ADEPT_DS_ERROR_FILE=$log.error
    trap '' USR1
    trap : TERM
    (trap - TERM && exec "$@") 2>&1 | (trap '' TERM INT && exec tee -a "$log.log")
    status=${PIPESTATUS[0]}
    ((status == 0)) || echo "$(date +%s.%N) $status ${SLURMD_NODENAME:-}" >"$log.exit"
    return "$status"
}

# run_ranks LOG ARGUMENT..: the interpreter with ARGUMENT.. as every task of the job, or as the tasks that the array
# `srun_options` says. Sets `status`. A warning that comes meanwhile is passed on by `forward`.
run_ranks() {
    local log=$1 interrupted
    shift
    # srun itself starts with USR1 ignored, too: it takes the signal up once it can pass it on.
    (
        trap '' USR1
        exec srun --label --kill-on-bad-exit=1 "${srun_options[@]}" "${pyxis[@]}" \
            bash -c "$(declare -f rank); rank \"\$@\"" rank "$log" "${container[@]}" "$python" -P "$@"
    ) &
    step=$!
    ((!warned)) || forward
    while :; do
        interrupted=0
        status=0
        wait "$step" || status=$?
        # A wait that a signal has interrupted tells nothing of the step.
        ((interrupted)) || break
    done
    step=
}

# Has SLURM start this job once more, which ends this script. Where SLURM refuses it returns, with SLURM's words in `refusal`.
requeue() {
    local attempt
    trap - TERM
    for attempt in 1 2 3; do
        if refusal=$(scontrol requeue "$job" 2>&1); then
            sleep 60
            exit 75
        fi
        ((attempt == 3)) || sleep 3
    done
}

# run_to_the_end ARGUMENT..: run_ranks, with a log for each rank in a folder beside the job's own, to the end of the job.
# Nothing passes signals on: these jobs start anew.
run_to_the_end() {
    local log logs
    log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    logs=${log%.log}.ranks${SLURM_RESTART_COUNT:+-$SLURM_RESTART_COUNT}
    mkdir -p "$logs"
    run_ranks "$logs/rank" "$@"
    if ((status)) && tool tries failure "$logs" "${SLURM_NTASKS:-1}"; (($? == 75)); then
        requeue
        echo "adept_ds: SLURM refused to requeue the job: $refusal" >&2
    fi
    exit "$status"
}

# Nodes of the job on which no process can be started within half a minute.
silent_nodes() {
    local answers
    answers=$(timeout 30 srun --overlap --quiet --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        printenv SLURMD_NODENAME 2>/dev/null)
    # This node does answer; if it seems not to, the question was wrong.
    grep -qxF "$SLURMD_NODENAME" <<<"$answers" || return
    scontrol show hostnames | grep -vxF -e "$answers" | xargs
}
