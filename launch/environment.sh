# Sourced by quickstart.sh and tests/run.sh: a virtual environment with this package installed.
#
#   prepare_environment EXTRA    create or reuse the environment, install the package with EXTRA ("" or "[test]")
#
# JMVAE_DIST_VENV   where the environment lives (default: .venv in the repository)
# PYTHON            interpreter that creates it (default: python3)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JMVAE_DIST_VENV:-$root/.venv}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

create_venv() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "$python is not installed; install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON to one"
    # Never into a directory that holds something else, so that a failure may be cleaned up.
    if [ -e "$venv" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        fail "$venv exists but is not a virtual environment; move it away, or set JMVAE_DIST_VENV"
    fi
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        rm -rf "$venv"
        fail "'$python -m venv' does not work here; on Debian and Ubuntu: apt-get install python3-venv"
    fi
}

pip_install() {
    local quiet=--quiet
    [ ! -t 1 ] || quiet= # on a terminal pip shows what it does
    "$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$@" ||
        fail "pip could not install $*; is the package index reachable? (PIP_INDEX_URL and HTTPS_PROXY are honoured)"
}

# Not there when the creation of the environment was interrupted, or when another tool made it.
add_missing_pip() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 ||
        fail "$venv has no pip; remove it and run this again, or set JMVAE_DIST_VENV to another place"
}

prepare_environment() {
    local extra=$1 stamp
    [ -x "$venv/bin/python" ] || create_venv
    stamp=$(cat "$root/setup.cfg" "$root/pyproject.toml" "$root/constraints.txt" | sha256sum | cut -d ' ' -f 1)
    if [ "$(cat "$venv/.installed$extra" 2>/dev/null)" != "$stamp$root" ]; then
        printf 'Installing packages into %s (a few minutes the first time) ...\n' "$venv"
        add_missing_pip
        # torch first and alone: as a dependency of another package it could resolve to a different build.
        pip_install "$(grep '^torch==' "$root/constraints.txt")"
        pip_install --editable "$root$extra"
        printf '%s' "$stamp$root" >"$venv/.installed$extra"
    fi
}
