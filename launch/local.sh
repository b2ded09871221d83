#!/usr/bin/env bash
# Run a verb on N processes of this machine, through torchrun:
#
#   bash launch/local.sh N [--restarts R] train --config configs/digits.yaml [--section.key value ...]
#   bash launch/local.sh N evaluate RUN --manifest MANIFEST
#   bash launch/local.sh N bench step --config configs/digits.yaml [--section.key value ...]
#   bash launch/local.sh N doctor [--config configs/digits.yaml] [--section.key value ...]
#
# --restarts R   after a crash start again from the last checkpoint, at most R times in a row without a new one
#
# Exit codes are those of jmvae-dist: 0 done, 1 failure, 2 configuration, 75 stopped with a checkpoint written.
# TERM, INT and USR1 ask the run to write a checkpoint and stop. If this script itself is killed, so does the run.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
    printf 'usage: bash launch/local.sh N [--restarts R] VERB [options]   %s\n' \
        '(N processes; R restarts after crashes; VERB is train, evaluate, doctor or "bench step")' >&2
    exit 2
}
num_processes=${1:-}
[[ $num_processes =~ ^[1-9][0-9]*$ ]] || usage
shift
restarts=0
if [ "${1:-}" = --restarts ]; then
    restarts=${2:-}
    [[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || usage
    shift 2
fi
verb=${1:-}
[[ $verb =~ ^(train|evaluate|bench|doctor)$ ]] || usage
shift
# Kernels are measured by one process.
[ "$verb" != bench ] || [ "${1:-}" = step ] || usage

# An active environment wins over the repository's own; PYTHON wins over both.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    own=${JMVAE_DIST_VENV:-$root/.venv}/bin/python
    [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$own" ] || PYTHON=$own
fi

# Mistakes are one line from one process, after half a second.
if [ "$verb" = train ]; then
    for argument in "$@"; do
        case $argument in
        --print_config* | --help | -h) exec "$PYTHON" -m jmvae_dist train "$@" ;;
        esac
    done
    WORLD_SIZE=$num_processes RANK=0 LOCAL_RANK=0 "$PYTHON" -m jmvae_dist train --check "$@" || exit
    for argument in "$@"; do
        [ "$argument" != --check ] || exit 0
    done
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / num_processes))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
# An exit code that all ranks share is left in a file here, and they exit with 0: torchrun would turn it into 1, and
# take it for the failure of one rank.
exit_codes=$(mktemp -d)
trap 'rm -rf "$exit_codes"' EXIT

say() {
    printf 'launch/local.sh: %s\n' "$1" >&2
}

# The torchrun that runs at the moment, and whether it is to be the last.
child=
stop_requested=
# To the ranks themselves: torchrun would kill them 30 s after passing a signal on, perhaps within a checkpoint.
forward() {
    local ranks
    stop_requested=yes
    [ -n "$child" ] || return
    ranks=$(cat "/proc/$child/task/"*/children 2>/dev/null)
    # shellcheck disable=SC2086  # several process ids
    kill -s "$1" ${ranks:-$child} 2>/dev/null
}
for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # expand now: each trap has its own signal
    trap "forward $name" "$name"
done

# Without this, torchrun and its ranks would train on after a SIGKILL to this script.
end_with_parent=()
if setpriv --pdeathsig TERM true 2>/dev/null; then
    end_with_parent=(setpriv --pdeathsig TERM)
fi

# One attempt: a torchrun of its own, because the rendezvous of torchrun's --max-restarts rarely survives a killed
# rank. Sets `code`, and `shared` to the same where all ranks have ended with it.
run_once() {
    # A file of its own: a rank of the former attempt that outlived its torchrun for a moment may write late.
    JMVAE_DIST_EXIT_CODE_FILE=$(mktemp "$exit_codes/XXXXXX")
    export JMVAE_DIST_EXIT_CODE_FILE
    "${end_with_parent[@]}" "$PYTHON" -m jmvae_dist.distributed.torchrun --standalone \
        --nproc_per_node "$num_processes" -m jmvae_dist "$verb" "$@" &
    child=$!
    [ -z "$stop_requested" ] || forward TERM # the signal came when there was no child yet
    # A trap that fires ends `wait` early: go on until torchrun is gone.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    child=
    shared=$(cat "$JMVAE_DIST_EXIT_CODE_FILE")
    code=${shared:-$code}
}

# Rewinds and global step of the newest checkpoint: after a rewind new checkpoints begin at a lower step.
measure_progress() {
    [ -z "$checkpoints" ] || "$PYTHON" -c 'import pathlib, sys; from jmvae_dist.checkpoint.layout import measure_progress
rewinds, step = measure_progress(pathlib.Path(sys.argv[1]))
print(rewinds, max(0, step))' "$checkpoints" 2>/dev/null
}

find_checkpoints() {
    checkpoints=$("$PYTHON" -c 'import pathlib, sys; from jmvae_dist.config_io import parse_run_config
print(pathlib.Path(parse_run_config(sys.argv[1:]).output_dir).expanduser() / "checkpoints")' "$@")
}

# The last word on a crash. Not on what all ranks have refused together, which would only be refused again.
say_how_to_go_on() {
    local step
    [ "$verb" = train ] && [ -z "$shared" ] && find_checkpoints "$@" && read -r _ step < <(measure_progress) || return
    if [ "$step" -gt 0 ]; then
        say "exit code $code; the same command continues from the checkpoint at step $step"
    else
        say "exit code $code; the same command begins anew: there is no checkpoint yet"
    fi
}

checkpoints=
if [ "$verb" = train ] && [ "$restarts" -gt 0 ]; then
    find_checkpoints "$@" || exit
fi
read -r best_rewinds best_step < <(measure_progress) || best_rewinds=0 best_step=0
num_failures=0 # since the last new checkpoint
code=1
while [ -z "$stop_requested" ]; do
    run_once "$@"
    case $code in 0 | 2 | 75) exit "$code" ;; esac
    # Ctrl-C ends the measurement as well, and so may a lack of memory: then nothing is known to be new.
    read -r rewinds step < <(measure_progress) || rewinds=$best_rewinds step=$best_step
    [ -z "$stop_requested" ] || break
    if [ "$rewinds" -gt "$best_rewinds" ] || { [ "$rewinds" -eq "$best_rewinds" ] && [ "$step" -gt "$best_step" ]; }; then
        best_rewinds=$rewinds
        best_step=$step
        num_failures=0
    fi
    num_failures=$((num_failures + 1))
    if [ "$num_failures" -gt "$restarts" ]; then
        if [ "$restarts" -gt 0 ]; then
            say "exit code $code again, no new checkpoint in $restarts restarts: giving up"
        else
            say_how_to_go_on "$@"
        fi
        exit "$code"
    fi
    pause_s=$((num_failures < 5 ? 2 ** (num_failures - 1) : 16))
    say "exit code $code; restart $num_failures of $restarts from step $step in $pause_s s"
    # In fifths of a second, each to its end: a child that is killed to end a pause may not yet have become `sleep`,
    # and would lose the signal in a trap of this script.
    for ((fifth = 0; fifth < 5 * pause_s; fifth++)); do
        [ -z "$stop_requested" ] || break
        sleep 0.2
    done
done
say "stopped on request; exit code $code is that of the last attempt"
exit "$code"
