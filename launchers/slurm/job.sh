# shellcheck shell=bash
# What the batch scripts of this folder share. It sets `root`, `python`, `container` and `scratch`, and gives functions to
# run ranks and to pass signals on to them.

: "${warned:=0}"
# The repository; empty where `adept-ds submit` has written the script for a package that is installed.
root=${ADEPT_DS_ROOT-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
if [[ -n ${ADEPT_DS_PYTHON:-} ]]; then
    python=$ADEPT_DS_PYTHON
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
read -ra container <<<"${ADEPT_DS_CONTAINER:-}"
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
tool() { "${container[@]}" "$python" -P -m "adept_ds.slurm.$1" "${@:2}"; }

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
        exec srun --label --kill-on-bad-exit=1 "${srun_options[@]}" \
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

# run_evaluation ARGUMENT..: run_ranks, with a log for each rank in a folder beside the job's own, to the end of the job.
run_evaluation() {
    local log logs
    log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    logs=${log%.log}.ranks
    mkdir -p "$logs"
    run_ranks "$logs/rank" "$@"
    ((status == 0)) || tool tries failure "$logs"
    exit "$status"
}

# run_here ARGUMENT..: the interpreter with ARGUMENT.. as one task. Nothing passes signals on: these jobs start anew.
run_here() { srun --ntasks=1 --label "${container[@]}" "$python" -P "$@"; }

# Nodes of the job on which no process can be started within half a minute.
silent_nodes() {
    local answers
    answers=$(timeout 30 srun --overlap --quiet --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        printenv SLURMD_NODENAME 2>/dev/null)
    # This node does answer; if it seems not to, the question was wrong.
    grep -qxF "$SLURMD_NODENAME" <<<"$answers" || return
    scontrol show hostnames | grep -vxF -e "$answers" | xargs
}
