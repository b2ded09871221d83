#!/usr/bin/env bash
# One rank: what every task of srun runs (slurm/common.sh). Usage: launch/node.sh VERB [options]
#
# PYTHON, CONTAINER   interpreter, and a command to put before it
# run_dir             the run directory, in which the rank's log is kept; unset: no log of its own
set -uo pipefail

# Until the program heeds USR1 it must not kill the rank; the batch script repeats it.
trap '' USR1

if [ -n "${run_dir:-}" ]; then
    mkdir -p "$run_dir/logs"
    # rank-00000.log belongs to the training, evaluate-rank-00000.log to another verb.
    name=$1-rank
    log=$(printf '%s/logs/%s-%05d.log' "$run_dir" "${name#train-}" "$SLURM_PROCID")
    # To the job's log and to the rank's own. `tee` sees the end of the output, whatever signals come before.
    exec > >(trap '' HUP INT TERM USR1 && exec tee -a "$log") 2>&1
    printf '==== %s job %s restart %s rank %s of %s on %s ====\n' "$(date -Is)" "$SLURM_JOB_ID" \
        "${SLURM_RESTART_COUNT:-0}" "$SLURM_PROCID" "$SLURM_STEP_NUM_TASKS" "$(hostname)" >>"$log"
fi

export PYTHONUNBUFFERED=1
# shellcheck disable=SC2086  # a command prefix of several words
exec ${CONTAINER:-} "$PYTHON" -m jmvae_dist "$@"
