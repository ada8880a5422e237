"""Find a Python that has everything in a requirements file, or make one: the active Python, else .venv.

    python scripts/environment.py FILE NAME    prints .venv/bin/python, or NAME for this Python
    python scripts/environment.py FILE         prints what this Python lacks, on one line

run_irra.sh and run_tests.sh start it in the repository's folder before anything is installed, so it needs
nothing but Python. All that is said on the way goes to stderr, pip's words too.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VENV = Path(".venv")
VENV_PYTHON = str(VENV / "bin" / "python")
# Holds a copy of each requirements file whose installation ran to its end: an interrupted one leaves none,
# and a file that has changed since then no longer equals its copy.
INSTALLED = VENV / "installed"
LINUX = sys.platform == "linux"


def main(file, name=None):
    lacking = missing_packages(file)
    if name is None or not lacking:
        print(lacking if name is None else name)
        return
    if not venv_is_complete(file):
        fill_venv(file, name, lacking)
    print(VENV_PYTHON)


def read_requirements(file):
    """The requirements in a file and the files that it names with -r, and the list of all these files."""
    requirements, files = [], [Path(file)]
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            more = read_requirements(Path(file).parent / line[2:].strip())
            requirements += more[0]
            files += more[1]
        elif line:
            requirements.append(line)
    return requirements, files


def missing_packages(file):
    """What this Python lacks, "" for nothing; reads metadata only, since importing torch takes seconds."""
    missing = []
    for requirement in read_requirements(file)[0]:
        name, bounds = re.match(r"([\w.-]+)(.*)", requirement).groups()
        try:
            found = version(name) or "0"
        except (PackageNotFoundError, KeyError):  # KeyError: metadata cut short
            missing.append(requirement)
            continue
        if not all(satisfies(found, bound) for bound in bounds.split(",") if bound.strip()):
            missing.append(f"{requirement} (has {found})")
    return ", ".join(missing)


def satisfies(found, bound):
    operator, wanted = re.fullmatch(r"\s*(>=|<|==)\s*([\d.]+?)(?:\.\*)?\s*", bound).groups()
    found, wanted = numbers(found), numbers(wanted)
    found += [0] * (len(wanted) - len(found))
    return {">=": found >= wanted, "<": found < wanted, "==": found[: len(wanted)] == wanted}[operator]


def numbers(text):
    digits = re.match(r"\d+(?:\.\d+)*", text)[0]  # 2.7.0 of 2.7.0a0+cu128
    return [int(number) for number in digits.split(".")]


def venv_is_complete(file):
    for each in read_requirements(file)[1]:
        copy = INSTALLED / each
        if not copy.is_file() or copy.read_bytes() != each.read_bytes():
            return False
    return venv_runs() and answer(VENV_PYTHON, __file__, file) == ""


def venv_runs():
    """Whether .venv's Python runs and is its own: a half made .venv's is the system's, to be left alone."""
    prefix = answer(VENV_PYTHON, "-c", "import sys; print(sys.prefix)")
    return prefix is not None and os.path.samefile(prefix, VENV)


def answer(*command):
    """What a command prints, None when it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:  # no such program, or one that is no longer whole
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fill_venv(file, name, lacking):
    by_hand = f"-m pip install -r {file}"
    runs = venv_runs()
    if runs and INSTALLED.is_dir():
        say(f"Bringing .venv up to date with {file}")
    else:
        announce(name, lacking, by_hand)
        check_disk(by_hand)
    copies = {each: INSTALLED / each for each in read_requirements(file)[1]}
    for copy in copies.values():
        copy.unlink(missing_ok=True)

    if not runs or answer(VENV_PYTHON, "-m", "pip", "--version") is None:
        clear = [] if runs else ["--clear"]  # nothing in it can be kept
        if not succeeds(sys.executable, "-m", "venv", *clear, str(VENV)):
            sys.exit(f"""
{name} could not make .venv (its own message is above). On Debian and Ubuntu a package may be missing:
  sudo apt install python3-venv
Or make an environment your own way (conda, uv, ...), activate it, run in it
  python {by_hand}
and start again: an active Python that has everything is used as it is.""")
    if not succeeds(VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-r", file):
        sys.exit(f"""
pip did not finish (its own message is above). Start again: finished downloads are kept. Or by hand:
  {VENV_PYTHON} {by_hand}
No network: pip reads HTTPS_PROXY, and PIP_INDEX_URL for a mirror.
'No space left on device' though this disk has room: set TMPDIR and PIP_CACHE_DIR to folders on it.""")
    say("Checking that PyTorch loads ...")
    if not succeeds(VENV_PYTHON, "-c", "import torch, torchvision"):
        sys.exit("""
PyTorch is installed in .venv but does not load (its own message is above).
Delete the folder .venv and start again, or activate an environment where it loads.""")

    INSTALLED.mkdir(exist_ok=True)
    for each, copy in copies.items():
        shutil.copyfile(each, copy)


def succeeds(*command):
    """Runs a command that says on stderr what it does."""
    return subprocess.run(command, stdout=sys.stderr).returncode == 0


def say(text):
    print(text, file=sys.stderr, flush=True)


def announce(name, lacking, by_hand):
    size = "about 1 GB on disk; 2 to 5 minutes"
    if LINUX:
        size = "5.5 to 6 GB on disk, nearly all of it PyTorch with CUDA; 5 to 15 minutes"
    say(f"""\
The active Python ({shutil.which(name)}, Python {sys.version.split()[0]}) lacks {lacking}.
So, this first time, .venv is made here and the requirements are installed in it: {size}.
To use an environment of your own instead: Ctrl-C, activate it, python {by_hand}
""")


def check_disk(by_hand):
    need = 8 if LINUX else 2  # GB
    free = shutil.disk_usage(".").free
    # by an installation that was interrupted
    taken = sum(path.lstat().st_blocks * 512 for path in VENV.rglob("*"))
    if free + taken < need * 1e9:
        sys.exit(f"""\
The disk is too full: {free // 10**6} MB free in {os.getcwd()}, and the installation needs about {need} GB.
Make room, move this folder to a larger disk, or activate an environment that has PyTorch and run in it
  python {by_hand}
Without a GPU, PyTorch's CPU build is enough (under 1 GB): PyTorch's 'Get Started' page has the command.""")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
