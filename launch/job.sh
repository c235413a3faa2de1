#!/usr/bin/env bash
# What a job does inside its allocation: `launch/job.sh OVERRIDES...` checks the nodes, starts one rank
# per task with `pretrain train OVERRIDES...`, and when they have ended decides whether the job
# queues itself again. Batch scripts end in `exec launch/job.sh ...`, in the project's root.
#
# PRETRAIN_PREFLIGHT      1: check every node first and leave out those that fail; 0: do not
# PRETRAIN_CHECK_MINUTES  how long that, and the probe, may take before they count as failed (30)
# PRETRAIN_PROBE          1: then let all ranks together measure their links and compare the engine's
#                         setting with a plain process (doctor.scope=job); 0: do not (smoke.sbatch does)
# PRETRAIN_MAX_RESUBMITS  how often a job leaves nodes out before it gives up (3)
# PRETRAIN_MAX_REQUEUES   how often it queues itself again before it gives up (100)
# PRETRAIN_TASKS_PER_NODE ranks on a node, if sbatch was given no --ntasks-per-node (its GPUs)
# PRETRAIN_CONTAINER      a bash file that sets the array `container`: srun's container options, or a
#                         command with its arguments, to put before launch/node.sh; empty: none
set -euo pipefail

job=$SLURM_JOB_ID
restart=${SLURM_RESTART_COUNT:-0}
nodes=${SLURM_JOB_NUM_NODES:-1}
tasks=${SLURM_NTASKS_PER_NODE:-${PRETRAIN_TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
max_resubmits=${PRETRAIN_MAX_RESUBMITS:-3}
max_requeues=${PRETRAIN_MAX_REQUEUES:-100}
check_minutes=${PRETRAIN_CHECK_MINUTES:-30}
# Lives in a row whose last checkpoint is that of the life before; so many end the job.
max_idle=2
container=()
# Whole, because a container may begin in a folder of its own.
process=$PWD/launch/node.sh

say() { echo "$(date +%FT%T) job $job, restart $restart: $*"; }

fail() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

# A number in a record that a rank has left.
number() { sed -nE "s/.*\"$2\": *\"?([0-9]+)\"?.*/\1/p" "$1" 2>/dev/null || true; }

check_allocation() {
    [[ -x $process ]] ||
        fail 64 "there is no launch/node.sh in $PWD; submit from the project's root."
    [[ $tasks =~ ^[1-9][0-9]*$ ]] ||
        fail 64 "how many ranks has a node? Give sbatch --ntasks-per-node, one task per GPU, or" \
            "set PRETRAIN_TASKS_PER_NODE (it is '${PRETRAIN_TASKS_PER_NODE:-}')."
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]] && ((SLURM_GPUS_ON_NODE != tasks)); then
        fail 64 "$SLURM_GPUS_ON_NODE GPUs but $tasks tasks per node; give sbatch" \
            "--ntasks-per-node=$SLURM_GPUS_ON_NODE."
    fi
    local name
    for name in max_resubmits max_requeues check_minutes; do
        [[ ${!name} =~ ^[0-9]+$ ]] ||
            fail 64 "PRETRAIN_${name^^} is '${!name}'; it must be a number."
    done
    if [[ -n ${PRETRAIN_CONTAINER:-} ]]; then
        [[ -r $PRETRAIN_CONTAINER ]] ||
            fail 64 "PRETRAIN_CONTAINER=$PRETRAIN_CONTAINER cannot be read; it is a bash file that" \
                "sets the array \`container\`."
        # shellcheck source=/dev/null
        source "$PRETRAIN_CONTAINER"
    fi
}

# The job keeps its id. While this script lives the job cannot start again, so what is changed
# between here and the script's end holds for the next start.
requeue() {
    trap '' TERM
    scontrol requeue "$job" ||
        fail 1 "SLURM does not queue the job again (see above); submit it with --requeue"
}

# What the controller says about this job: `shown ExcNodeList`.
shown() {
    scontrol show job "$job" | sed -nE "s/.*\\b$1=([^ ]*).*/\1/p" | head -n 1 | sed 's/^(null)$//'
}

# A job that was submitted from inside another one inherits what SLURM told that one: SLURM counts no
# restarts in a first life, and srun obeys how the shell was bound.
forget_other_job() {
    local counted
    counted=$(shown Restarts || true)
    [[ ! $counted =~ ^[0-9]+$ ]] || restart=$counted
    export SLURM_RESTART_COUNT=$restart
    # a batch script is in no step
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        unset "${!SLURM_STEP_@}" "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}"
    fi
}

# On a node that was lost this script may go on after its job has begun another life elsewhere. A
# controller that does not answer may be restarting.
is_current() {
    local state='' tries
    for ((tries = 0; tries < 12; tries++)); do
        state=$(shown JobState)
        [[ -z $state ]] || break
        sleep 10
    done
    [[ $state == RUNNING && $(shown Restarts) == "$restart" ]]
}

# Every node checks itself and leaves a file; who leaves none hangs, or cannot start a process. Then
# one process compares the files, and marks who is slower than the others, or has other versions.
preflight() {
    export PRETRAIN_PREFLIGHT_DIR=$PWD/$logs/preflight-$restart
    mkdir -p "$PRETRAIN_PREFLIGHT_DIR"
    local code=0 node bad
    # a time of its own, because where every node hangs there is nobody left to wait for
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=120 \
        --time="$check_minutes" --output="$logs/preflight-$restart/task-%t.log" \
        "${container[@]+"${container[@]}"}" "$process" doctor doctor.scope=node "$@" || code=$?
    mapfile -t bad < <(unfit_nodes)
    if ((${#bad[@]} == nodes)); then
        obey
        blame_the_job "$((code ? code : 70))"
    fi
    if ((nodes > 1)); then
        srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --time="$check_minutes" \
            --output="$logs/preflight-$restart/compare.log" \
            "${container[@]+"${container[@]}"}" "$process" doctor doctor.scope=compare "$@" ||
            say "the comparison of the nodes finds something, see $logs/preflight-$restart"
        mapfile -t bad < <(unfit_nodes)
    fi
    ((${#bad[@]} > 0)) || return 0
    obey
    for node in "${bad[@]}"; do
        if [[ -s $PRETRAIN_PREFLIGHT_DIR/$node.json ]]; then
            say "$node fails the preflight, see $PRETRAIN_PREFLIGHT_DIR/$node.json"
        else
            say "$node left no result of the preflight"
        fi
    done
    exclude "${bad[@]}"
}

# Nodes of the job whose file does not say that all is well, or is not there.
unfit_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        grep -Eqs '"ok": *true' "$PRETRAIN_PREFLIGHT_DIR/$node.json" || echo "$node"
    done
}

# What all nodes lack, other nodes would lack too: shards, a package, a configuration that is right.
blame_the_job() {
    local code=$1 found
    found=$(findings "$PRETRAIN_PREFLIGHT_DIR"/*.json || true)
    [[ -n $found ]] ||
        fail "$code" "no node left a result in $PRETRAIN_PREFLIGHT_DIR: the preflight itself" \
            "failed (code $code), not the nodes; see its logs there, or set PRETRAIN_PREFLIGHT=0."
    fail "$code" "every node fails the preflight, so the fault is the job's and none is left out:"$'\n'"$found"
}

# What keeps nodes from training, each thing once: lines `subject: detail` of their files.
findings() {
    sed -nE '/"status": "missing"/ {
        n; s/.*"subject": "(.*)",/\1/; h
        n; s/.*"detail": "(.*)",/\1/; H
        x; s/^/    /; s/\n/: /; p
    }' "$@" 2>/dev/null | sort -u
}

# Cancelled, preempted, requeued by somebody, or the node was lost: SLURM has decided already.
obey() {
    if [[ -n $is_told_to_end ]] || ! is_current; then
        fail 143 "SLURM has ended this life"
    fi
}

exclude() {
    local names done_before
    names=$(IFS=,; echo "$*")
    done_before=$(wc -l 2>/dev/null < "$logs/excluded" || echo 0)
    ((done_before < max_resubmits)) ||
        fail 1 "$names would have to be left out, but $done_before times is enough" \
            "(PRETRAIN_MAX_RESUBMITS=$max_resubmits)."
    local old
    old=$(shown ExcNodeList)
    say "queues again without $names${old:+ and $old}"
    echo "$names" >> "$logs/excluded"
    requeue
    scontrol update "JobId=$job" "ExcNodeList=${old:+$old,}$names"
    exit 0
}

# What only all ranks together can find: a slow or broken link, an engine that trains wrong here.
probe() {
    local code=0
    say "probes its $((nodes * tasks)) ranks together, see $logs/probe-$restart-0.log"
    srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --kill-on-bad-exit=1 --wait=60 --time="$check_minutes" --output="$logs/probe-$restart-%t.log" \
        "${container[@]+"${container[@]}"}" "$process" doctor doctor.scope=job "$@" || code=$?
    ((code == 0)) || {
        obey
        fail "$code" "the ranks fail their probe, see $logs/probe-$restart-0.log"
    }
}

start_ranks() {
    export PRETRAIN_REQUEUE_RECORD=$PWD/$logs/requeue.json
    export PRETRAIN_RUN_RECORD=$PWD/$logs/run
    export PRETRAIN_EXIT_FOLDER=$PWD/$logs/ended-$restart
    rm -f "$PRETRAIN_REQUEUE_RECORD"
    mkdir -p "$PRETRAIN_EXIT_FOLDER"
    say "starts $((nodes * tasks)) ranks on $SLURM_JOB_NODELIST; their output is in" \
        "$logs"
    srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" --kill-on-bad-exit=1 --wait=60 \
        --output="$logs/rank-%t.log" --open-mode=append \
        "${container[@]+"${container[@]}"}" "$process" train "$@"
}

# What the ranks have left decides, not srun's code: it ends the rest as soon as one has left, and
# then says 143 or 137.
is_asked_to_go_on() {
    [[ $(number "$PRETRAIN_REQUEUE_RECORD" job_id) == "$job" ]] &&
        [[ $(number "$PRETRAIN_REQUEUE_RECORD" restart_count) == "$restart" ]]
}

ended_with() { grep -lsE "\"code\": $1[,}]" "$PRETRAIN_EXIT_FOLDER"/*.json | head -n 1; }

newest_step() {
    if is_asked_to_go_on; then
        number "$PRETRAIN_REQUEUE_RECORD" step
    elif [[ -s $PRETRAIN_RUN_RECORD ]]; then
        sed -nE 's/^step-0*([0-9]+)$/\1/p' \
            "$(< "$PRETRAIN_RUN_RECORD")/checkpoints/latest" 2>/dev/null || true
    fi
}

# Ends the job after too many lives without progress; else queues it again.
go_on() {
    local code=$1 why=$2 step before='' idle=0
    step=$(newest_step)
    [[ ! -s $logs/progress ]] || read -r idle before < "$logs/progress" || true
    if [[ -n $step && $step != "$before" ]]; then idle=0; else idle=$((idle + 1)); fi
    echo "$idle $step" > "$logs/progress"
    if ((idle >= max_idle)); then
        fail "$code" "$why; no progress in $idle lives in a row, the last checkpoint is step" \
            "${step:-none}, so the job ends here. If the lives are too short, give more time" \
            "(--time) or less notice (--signal=USR1@SECONDS), or save more often" \
            "(checkpoint.every_steps); else see $logs/rank-*.log."
    fi
    ((restart < max_requeues)) ||
        fail "$code" "$why; restarted $restart times, which is enough" \
            "(PRETRAIN_MAX_REQUEUES=$max_requeues)."
    say "$why; queues again at step ${step:-0}"
    requeue
}

decide() {
    local code=$1 file
    ((code != 0)) || fail 0 "finished"
    obey
    if file=$(grep -ls '"is_final": true' "$PRETRAIN_EXIT_FOLDER"/*.json | head -n 1) &&
        [[ -n $file ]]; then
        fail "$(number "$file" code)" "rank $(basename "$file" .json) ended with" \
            "$(sed -nE 's/.*"error": "([^"]*)".*/\1/p' "$file"), which another life would repeat;" \
            "see $logs/rank-$(basename "$file" .json).log"
    elif is_asked_to_go_on; then
        go_on 75 "saved step $(newest_step) on a signal"
    elif [[ -n $(ended_with 75) ]]; then
        fail 75 "was asked to stop (control/stop in the run folder)"
    elif [[ -n $(ended_with 76) ]]; then
        go_on 76 "a rank stood still, see stalls.jsonl in the run folder"
    else
        go_on "$code" "the ranks crashed (srun says $code)"
    fi
}

logs=slurm/logs/${SLURM_JOB_NAME:-pretrain}-$job
forget_other_job
check_allocation "$@"
mkdir -p "$logs"
# srun does not inherit it since SLURM 22.05.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
is_told_to_end=
trap 'is_told_to_end=1' TERM
if [[ ${PRETRAIN_PREFLIGHT:-1} != 0 ]]; then
    preflight "$@"
    [[ -z $is_told_to_end ]] || obey
fi
[[ ${PRETRAIN_PROBE:-0} == 0 ]] || probe "$@"
code=0
start_ranks "$@" || code=$?
decide "$code"
