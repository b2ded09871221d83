# Sourced by the batch scripts, after they have found the repository ($root): settings of the site, and how ranks start.
# shellcheck shell=bash

fail() {
    printf 'slurm: %s\n' "$1" >&2
    exit 2
}

# What slurm/site.env may set, with defaults; its meaning is explained in site.example.env.
PYTHON=
CONTAINER=
RANKS_PER_NODE=
INTERFACE=
SRUN_OPTIONS=
CPU_BIND=cores
MAX_ATTEMPTS_WITHOUT_PROGRESS=3
REQUEUE_FAILED=no
EXCLUDE_FAILED_NODES=no
SITE_SETTINGS='PYTHON|CONTAINER|RANKS_PER_NODE|INTERFACE|SRUN_OPTIONS|CPU_BIND|MAX_ATTEMPTS_WITHOUT_PROGRESS'
SITE_SETTINGS+='|REQUEUE_FAILED|EXCLUDE_FAILED_NODES'
num_ranks= # until load_site
site_read= # until read_site: for the preflight, see start_ranks

# Scheduler commands name a task of an array like this; its plain number can be that of the whole array.
this_job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Read slurm/site.env, and derive the layout: num_ranks, ranks_per_node, and the threads of each.
load_site() {
    read_site
    find_python
    plan_ranks
}

read_site() {
    local site=${JMVAE_DIST_SITE:-$root/slurm/site.env}
    if [ -e "$site" ]; then
        bash -n "$site" || fail "$site is not sound (see above); compare it with slurm/site.example.env"
        # A misspelled setting would go unnoticed; what is exported is for other programs.
        local unknown
        unknown=$(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$site" | grep -vxE "$SITE_SETTINGS" | tr '\n' ' ')
        [ -z "$unknown" ] || fail "$site: unknown setting $unknown(known: ${SITE_SETTINGS//|/, }); export what is not ours"
        # Outside of a job nobody asks.
        [ -z "${SLURM_JOB_ID:-}" ] || site_read="$SLURM_JOB_ID $(sha256sum <"$site" | cut -d ' ' -f 1) $site"
        # Modules and the like do not expect unset variables to be errors.
        set +u -e
        trap 'printf "slurm: %s failed at: %s\n" "$site" "$BASH_COMMAND" >&2' ERR
        # shellcheck disable=SC1090
        source "$site"
        trap - ERR
        set -u +e
    elif [ -n "${JMVAE_DIST_SITE:-}" ]; then
        fail "JMVAE_DIST_SITE: there is no $site"
    fi
    [[ $MAX_ATTEMPTS_WITHOUT_PROGRESS =~ ^[1-9][0-9]*$ ]] ||
        fail "$site: MAX_ATTEMPTS_WITHOUT_PROGRESS='$MAX_ATTEMPTS_WITHOUT_PROGRESS' must be a positive number"
    local name
    for name in REQUEUE_FAILED EXCLUDE_FAILED_NODES; do
        [[ ${!name} =~ ^(yes|no)$ ]] || fail "$site: $name='${!name}' must be yes or no"
    done
}

# For `jmvae-dist slurm render`, outside of a job: the settings, and what is exported for sbatch, each with a NUL at
# its end. Modules may print what they like.
print_site() {
    local name
    read_site >&2
    for name in ${SITE_SETTINGS//|/ } $(compgen -e SBATCH_); do
        printf '%s=%s\0' "$name" "${!name}"
    done
}

find_python() {
    local own=${JMVAE_DIST_VENV:-$root/.venv}/bin/python
    if [ -z "$PYTHON" ]; then
        PYTHON=python3
        [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$own" ] || PYTHON=$own
    fi
    # The package that was submitted, also where another version is installed.
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    # shellcheck disable=SC2086  # a command prefix of several words
    $CONTAINER "$PYTHON" -c 'import jmvae_dist' ||
        fail "$CONTAINER $PYTHON cannot import jmvae_dist on $(hostname); set PYTHON (and CONTAINER) in slurm/site.env"
}

# One rank per GPU; without GPUs one per node, or what was asked for with --ntasks-per-node.
plan_ranks() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} cpus=$SLURM_CPUS_ON_NODE
    ranks_per_node=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}
    [[ $ranks_per_node =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE='$ranks_per_node' must be a positive number"
    [ "$ranks_per_node" -le "$cpus" ] ||
        fail "$ranks_per_node ranks per node on $cpus CPU(s); lower RANKS_PER_NODE, or ask for more CPUs"
    num_ranks=$((ranks_per_node * SLURM_JOB_NUM_NODES))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / ranks_per_node))}
    if [ -n "$INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    fi
}

# One process of the program, here on the first node; it is not one of the ranks.
program() {
    # shellcheck disable=SC2086
    env -u SLURM_NTASKS $CONTAINER "$PYTHON" -m jmvae_dist "$@"
}

# One task of srun per rank. When one fails, srun ends the others.
start_ranks() {
    # In the background traps are gone, and USR1 would end what comes before srun. srun waits for signals itself.
    trap '' USR1
    export PYTHON CONTAINER
    [ -z "${run_dir:-}" ] || export run_dir
    # When the scheduler will ask for a stop, for the program's comparison with the time a checkpoint takes.
    JMVAE_DIST_STOP_LEAD_S=${JMVAE_DIST_STOP_LEAD_S:-$(scontrol write batch_script "$this_job" - 2>/dev/null |
        sed -n 's/^#SBATCH --signal=B:USR1@\([0-9]*\).*/\1/p' | head -n 1)}
    # When the job was submitted, or requeued: the run's ledger tells waiting from working.
    JMVAE_DIST_SUBMITTED_S=$(scontrol show job "$this_job" 2>/dev/null |
        sed -n 's/.*SubmitTime=\([0-9][^ ]*\).*/\1/p' | head -n 1 | date -f - +%s)
    export JMVAE_DIST_STOP_LEAD_S JMVAE_DIST_SUBMITTED_S
    [ -n "$JMVAE_DIST_SUBMITTED_S" ] || unset JMVAE_DIST_SUBMITTED_S
    # Only here: ranks that srun alone starts, from the same script too, would hand a false word to the preflight.
    export JMVAE_DIST_SITE_READ=$site_read
    # shellcheck disable=SC2086
    exec srun --ntasks="$num_ranks" --ntasks-per-node="$ranks_per_node" \
        --cpus-per-task="$((SLURM_CPUS_ON_NODE / ranks_per_node))" --cpu-bind="$CPU_BIND" \
        --kill-on-bad-exit=1 --wait=0 $SRUN_OPTIONS "$root/launch/node.sh" "$@"
}

is_preempted() {
    scontrol show job "$this_job" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

# Pass USR1 on to the ranks, through srun, again and again: ranks that still start do not heed it yet.
repeat_usr1() {
    local step=$1
    kill -USR1 "$step" 2>/dev/null
    while sleep 5 && kill -USR1 "$step"; do :; done 2>/dev/null &
}

# A signal ends `wait` early: go on until the process is gone. Its exit code may then still wait to be collected.
wait_for() {
    local code=127 collected
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    wait "$1" 2>/dev/null
    collected=$?
    [ "$collected" = 127 ] || code=$collected
    return "$code"
}
