# What the scripts share; to be sourced. Leaves the caller in the root of the checkout, in $root.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

# pip is told neither what to fetch from nor what else to install: the locks say what, the user's own configuration from where.
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# What cannot be checked here is told, and passes; in CI it fails.
skip() {
    if [[ "${CI:-}" == true ]]; then
        die "$* (CI=true does not skip)"
    fi
    say "skipped: $*"
}

# Prints the command of a Python that is new enough: $PYTHON if set, else the first of the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ "$candidate" == "${PYTHON:-}" ]]; then
            die "PYTHON=$PYTHON is no Python 3.11 or later with the venv module"
        fi
    done
    die "no Python 3.11 or later with the venv module found on PATH; install one, or name it: PYTHON=/path/to/python $0"
}

# fingerprint FILE...: one hash over the place of the checkout and the files' contents.
fingerprint() { { printf '%s\n' "$root" "$@"; cat -- "$@"; } | git hash-object --stdin; }

# stamped DIR FILE...: whether DIR was completed by `stamp` from the very same files.
stamped() {
    local venv="$1"
    shift
    [[ -x "$venv/bin/python" && -f "$venv/.stamp" && "$(<"$venv/.stamp")" == "$(fingerprint "$@")" ]]
}

stamp() {
    local venv="$1"
    shift
    fingerprint "$@" >"$venv/.stamp"
}

# new_venv DIR LOCK: an environment with exactly what the lock lists.
new_venv() {
    local python
    python="$(find_python)"
    say "making $1 with $("$python" --version)"
    "$python" -m venv --clear "$1"
    "$1/bin/python" -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r "$2"
}
