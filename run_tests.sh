#!/usr/bin/env bash
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/environment.sh

show_help() {
    cat <<'TEXT'
Usage: ./run_tests.sh [--fast] [ARGUMENTS FOR PYTEST]

Checks formatting and code with ruff, then runs the tests with pytest, which gets the arguments.
All three run even when one fails; the exit code is 0 only when all passed.

  ./run_tests.sh                             everything: about a quarter of an hour on two CPU cores
  ./run_tests.sh --fast                      all but the slow tests: two to three minutes; names the five slowest
  ./run_tests.sh -x -k sampler               stop at the first failure; only tests with that in their name
  ./run_tests.sh tests/test_objectives.py    one file, in one process, as python -m pytest runs it

Unless files are named there is a process for each core, of up to four, with three GB of memory each; -n 0 asks for one.
What ruff finds, it mostly repairs too: python -m ruff format . && python -m ruff check --fix .

Environment: PYTHON   the Python to use, 3.10 or newer (default: the active one, else python3.13 ... python3.10)

The active Python is used as it is when it has everything in requirements-dev.txt and the files that it names. Otherwise
the first run makes .venv here and installs it there: on Linux about 6 GB on disk (PyTorch with CUDA), 5 to 15 minutes.
To use that in your shell: source .venv/bin/activate
The page of demo.py is tested in Chromium where that and its driver are installed (apt-get install chromium chromium-driver).
TEXT
}

help_if_asked "$@"
find_python
use_environment requirements-dev.txt
status=0
"$python" -m ruff format --check . || status=$?
"$python" -m ruff check . || status=$?
# each process has a file at a time; what is typed comes last and wins
case " $* " in *.py* | *" tests"*) ;; *) set -- -n auto --maxprocesses 4 --dist loadfile "$@" ;; esac
"$python" -m pytest "$@" || status=$?
exit "$status"
