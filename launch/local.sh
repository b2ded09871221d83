#!/usr/bin/env bash
# Run a verb on N processes of this machine, through torchrun:
#
#   bash launch/local.sh N train --config configs/digits.yaml [--section.key value ...]
#   bash launch/local.sh N evaluate RUN --manifest MANIFEST
#
# Exit codes are those of jmvae-dist: 0 done, 1 failure, 2 configuration, 75 stopped with a checkpoint written.
# TERM, INT and USR1 ask the run to write a checkpoint and stop.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]] || ! [[ $2 =~ ^(train|evaluate)$ ]]; then
    printf 'usage: bash launch/local.sh N VERB [options]   (N processes; VERB is train or evaluate)\n' >&2
    exit 2
fi
num_processes=$1
verb=$2
shift 2

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
# An exit code that all ranks share is left here, and they exit with 0: torchrun would turn it into 1, behind a
# page about failed processes.
JMVAE_DIST_EXIT_CODE_FILE=$(mktemp)
export JMVAE_DIST_EXIT_CODE_FILE
trap 'rm -f "$JMVAE_DIST_EXIT_CODE_FILE"' EXIT

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$num_processes" \
    -m jmvae_dist "$verb" "$@" &
torchrun=$!
# To the ranks themselves: torchrun would kill them 30 s after passing a signal on, perhaps within a checkpoint.
forward() {
    local ranks
    ranks=$(cat "/proc/$torchrun/task/"*/children 2>/dev/null)
    # shellcheck disable=SC2086  # several process ids
    kill -s "$1" ${ranks:-$torchrun} 2>/dev/null
}
for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # expand now: each trap has its own signal
    trap "forward $name" "$name"
done
# A trap that fires ends `wait` early: go on until torchrun is gone.
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun"
    code=$?
done
requested=$(cat "$JMVAE_DIST_EXIT_CODE_FILE")
exit "${requested:-$code}"
