# shellcheck shell=bash
# Sourced by run_irra.sh and run_tests.sh in the repository's folder: finds a Python that has what they need, or makes
# .venv. Written for bash 3.2 too, which macOS still ships.

die() { # EXIT_CODE MESSAGE
    printf '%s\n' "$2" >&2
    exit "$1"
}

# use_environment REQUIREMENTS_FILE...: sets $python.
# The active Python is used as it is when it has everything; else .venv, which is made or completed when need be.
use_environment() {
    local missing
    find_python
    if missing=$(missing_packages "$python" "$@"); then
        return
    fi
    if ! venv_is_complete "$@"; then
        fill_venv "$missing" "$@"
    fi
    python=.venv/bin/python
}

# Sets $python to the first interpreter that is new enough.
find_python() {
    local candidate found="" own
    # Our .venv is judged by venv_is_complete: activated, and perhaps half installed, it must not pass as the active Python.
    if [ -n "${VIRTUAL_ENV:-}" ] && [ "${VIRTUAL_ENV:-}" -ef .venv ]; then
        own=":$VIRTUAL_ENV/bin:"
        PATH=":$PATH:"
        PATH=${PATH//"$own"/:}
        PATH=${PATH#:}
        PATH=${PATH%:}
    fi
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die 1 "PYTHON=$PYTHON is not a program that can be run."
        set -- "$PYTHON"
    else
        set -- python3 python python3.13 python3.12 python3.11 python3.10
    fi
    for candidate in "$@"; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python=$candidate
            return
        fi
        found="$found${found:+, }$candidate ($("$candidate" --version 2>&1 | head -n 1))"
    done
    die 1 "IRRA needs Python 3.10 or newer, found ${found:-none}: install one, or name one with PYTHON=/path/to/python3."
}

# missing_packages PYTHON REQUIREMENTS_FILE...: prints what PYTHON lacks, on one line; fails when it lacks anything.
# Reads the installed packages' metadata only: importing torch takes seconds, this takes a fraction of one.
missing_packages() {
    "$1" - "${@:2}" <<'CODE'
import re, sys
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(number) for number in re.match(r"\d+(?:\.\d+)*", text)[0].split(".")]  # 2.7.0a0+cu128 -> 2 7 0

def satisfies(found, bound):
    operator, wanted = re.fullmatch(r"\s*(>=|<|==)\s*([\d.]+?)(?:\.\*)?\s*", bound).groups()
    found, wanted = numbers(found), numbers(wanted)
    found += [0] * (len(wanted) - len(found))
    return {">=": found >= wanted, "<": found < wanted, "==": found[: len(wanted)] == wanted}[operator]

missing = []
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        requirement = line.split("#")[0].strip()
        if not requirement or requirement.startswith("-r"):
            continue
        name, bounds = re.match(r"([\w.-]+)(.*)", requirement).groups()
        try:
            found = version(name) or "0"
        except (PackageNotFoundError, KeyError):  # KeyError: metadata cut short
            missing.append(requirement)
            continue
        if not all(satisfies(found, bound) for bound in bounds.split(",") if bound.strip()):
            missing.append(f"{requirement} (has {found})")
print(", ".join(missing))
sys.exit(bool(missing))
CODE
}

# .venv/installed holds a copy of each requirements file whose installation ran to its end: an interrupted one leaves
# none, and a file that has changed since no longer equals its copy.
venv_is_complete() { # REQUIREMENTS_FILE...
    local file
    for file in "$@"; do
        cmp -s "$file" ".venv/installed/$file" || return 1
    done
    venv_runs && missing_packages .venv/bin/python "$@" >/dev/null
}

# Whether .venv's Python runs and is its own: in a half made .venv it is the system's, where nothing must be installed.
venv_runs() {
    .venv/bin/python - 2>/dev/null <<'CODE'
import os, sys
sys.exit(not os.path.samefile(sys.prefix, ".venv"))
CODE
}

fill_venv() { # MISSING_IN_ACTIVE_PYTHON REQUIREMENTS_FILE...
    local missing=$1 file clear=""
    local arguments=()
    shift
    for file in "$@"; do
        arguments+=(-r "$file")
    done
    if [ -d .venv/installed ] && venv_runs; then
        echo "Bringing .venv up to date with $*"
    else
        announce_install "$missing" "${arguments[*]}"
        check_disk "${arguments[*]}"
    fi
    for file in "$@"; do
        rm -f ".venv/installed/$file"
    done

    venv_runs || clear=--clear # nothing in it can be kept
    if [ -n "$clear" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$python" -m venv ${clear:+"$clear"} .venv || die 1 "
$python could not make .venv (its own message is above). On Debian and Ubuntu a package may be missing:
  sudo apt install python3-venv
Or make an environment your own way (conda, uv, ...), activate it, run in it
  python -m pip install ${arguments[*]}
and start again: an active Python that has everything is used as it is."
    fi
    .venv/bin/python -m pip install --disable-pip-version-check "${arguments[@]}" || die 1 "
pip did not finish (its own message is above). Start again: finished downloads are kept. Or by hand:
  .venv/bin/python -m pip install ${arguments[*]}
No network: pip reads HTTPS_PROXY, and PIP_INDEX_URL for a mirror.
'No space left on device' though this disk has room: set TMPDIR and PIP_CACHE_DIR to folders on it."
    echo "Checking that PyTorch loads ..."
    .venv/bin/python -c 'import torch, torchvision' || die 1 "
PyTorch is installed in .venv but does not load (its own message is above).
Delete the folder .venv and start again, or activate an environment where it loads."

    mkdir -p .venv/installed
    for file in "$@"; do
        cp "$file" ".venv/installed/$file"
    done
}

announce_install() { # MISSING PIP_ARGUMENTS
    local size="about 1 GB on disk; 2 to 5 minutes"
    if [ "$(uname -s)" = Linux ]; then
        size="5.5 to 6 GB on disk, nearly all of it PyTorch with CUDA; 5 to 15 minutes"
    fi
    cat <<TEXT
The active Python ($(command -v "$python"), $("$python" --version 2>&1)) lacks $1.
So, this first time, .venv is made here and the requirements are installed in it: $size.
To use an environment of your own instead: Ctrl-C, activate it, python -m pip install $2

TEXT
}

check_disk() { # PIP_ARGUMENTS
    local need=2 free taken=0
    if [ "$(uname -s)" = Linux ]; then
        need=8
    fi
    # the number before the percentage: the names of devices and folders may contain spaces
    free=$(df -Pk . | awk 'NR == 2 { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+%$/) { print $(i - 1); exit } }') || free=""
    [ -n "$free" ] || return 0
    if [ -d .venv ]; then
        taken=$(du -sk .venv | cut -f 1) # by an installation that was interrupted
    fi
    if [ $((free + taken)) -lt $((need * 1000 * 1000)) ]; then
        die 1 "The disk is too full: $((free / 1000)) MB free in $PWD, and the installation needs about $need GB.
Make room, move this folder to a larger disk, or activate an environment that has PyTorch already and run in it
  python -m pip install $1
Without a GPU, PyTorch's CPU build is enough (under 1 GB): PyTorch's 'Get Started' page has the command."
    fi
}
