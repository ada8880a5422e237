# shellcheck shell=bash
# Sourced by run_irra.sh and run_tests.sh in the repository's folder. Written for bash 3.2 too, which macOS still ships.

die() { # EXIT_CODE MESSAGE
    printf '%s\n' "$2" >&2
    exit "$1"
}

help_if_asked() { # ARGUMENT...
    local argument
    for argument in "$@"; do
        case $argument in -h | --help) show_help && exit ;; esac
    done
}

# Sets $python to the first interpreter that is new enough.
find_python() {
    local candidate found="" own
    # Our .venv, activated and perhaps half installed, must not pass as the active Python: environment.py judges it.
    if [ "${VIRTUAL_ENV:-}" -ef .venv ]; then
        own=":$VIRTUAL_ENV/bin:"
        PATH=":$PATH:"
        PATH=${PATH//"$own"/:}
        PATH=${PATH#:}
        PATH=${PATH%:}
    fi
    set -- python3 python python3.13 python3.12 python3.11 python3.10
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die 1 "PYTHON=$PYTHON is not a program that can be run."
        set -- "$PYTHON"
    fi
    for candidate in "$@"; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python=$candidate
            return
        fi
        # a pyenv shim without its Python fails here too
        found="$found${found:+, }$candidate ($({ "$candidate" --version 2>&1 || true; } | head -n 1))"
    done
    die 1 "IRRA needs Python 3.10 or newer, found ${found:-none}: install one, or name one with PYTHON=/path/to/python3."
}

# Sets $python to one that has what the file asks for, and what the files ask for that it names.
use_environment() { # REQUIREMENTS_FILE
    python=$("$python" scripts/environment.py "$1" "$python")
}
