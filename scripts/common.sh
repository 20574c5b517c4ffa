# What the scripts share; to be sourced. Leaves the caller in the root of the checkout, in $root.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# skip WHAT-AND-WHY: what cannot be done on this machine is told and passes; in CI it fails.
skip() {
    if [[ "${CI:-}" == true ]]; then
        die "$*; with CI=true that is a failure"
    fi
    say "skipped: $*"
}

# Prints the command of a Python that is new enough: $PYTHON if set, else the first of the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ "$candidate" == "${PYTHON:-}" ]]; then
            die "PYTHON=$PYTHON is not a Python 3.11 or later with the venv module"
        fi
    done
    die "found no Python 3.11 or later with the venv module; install one, or name it with PYTHON=/path/to/python3"
}

# fingerprint DIR FILE...: a hash over where DIR really is (its scripts hold that path) and what the files contain.
fingerprint() {
    local place
    place="$(cd "$1" && pwd -P)"
    shift
    { printf '%s\n' "$place"; cat -- "$@"; } | git hash-object --stdin
}

# stamped NAME DIR FILE...: whether DIR was last stamped NAME with these very files.
stamped() {
    local stamp="$2/.$1.stamp"
    shift
    [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint "$@")" ]]
}

stamp() {
    local stamp="$2/.$1.stamp"
    shift
    fingerprint "$@" >"$stamp"
}

# venv DIR LOCK: makes DIR an environment of exactly what LOCK lists, unless it is one already.
venv() {
    local python
    if [[ -x "$1/bin/python" ]] && stamped lock "$1" "$2"; then
        return
    fi
    python="$(find_python)"
    say "making $1 with $("$python" --version)"
    # One chain, so that it also stops where a caller goes on after a failure.
    "$python" -m venv --clear "$1" \
        && "$1/bin/python" -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r "$2" \
        && stamp lock "$1" "$2"
}

# editable DIR: installs both distributions into DIR from this tree, unless that was done.
editable() {
    local broken
    if stamped editable "$1" pyproject.toml clients/python/pyproject.toml; then
        return
    fi
    "$1/bin/python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e clients/python -e .
    broken="$("$1/bin/python" -m pip check)" || die "$broken"
    stamp editable "$1" pyproject.toml clients/python/pyproject.toml
}
