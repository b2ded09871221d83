#!/usr/bin/env bash
# Set up and run the tests: bash tests/run.sh [pytest options]
#   bash tests/run.sh                 everything but the slow tests, after the linter and the type checker
#   bash tests/run.sh -m slow         the slow tests only
#   bash tests/run.sh tests/unit -x   with options, pytest alone
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=../launch/environment.sh
source launch/environment.sh
prepare_environment "[test]"
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    # Three files at a time: many tests wait, for a scheduler or for a limit. In their order: the slow files come
    # before those with many tests, and no worker is left with a slow one at the end.
    set -- -n 3 --dist loadfile --no-loadscope-reorder
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "$@"
