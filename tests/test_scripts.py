"""run_irra.sh, run_tests.sh and scripts/: the Python they find or make, and what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from scripts import demo, environment
from tests.conftest import PATIENCE, SLOW

ROOT = Path(__file__).parent.parent


def run(*words, cwd=ROOT, **variables):
    """Exit status, stdout and stderr."""
    variables = {**os.environ, "PYTHON": sys.executable, **variables}
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


# ---- the shells ----


@pytest.mark.parametrize("script", ["run_irra.sh", "run_tests.sh"])
def test_help_asks_nothing_of_the_machine(script):
    status, out, err = run(f"./{script}", "--name", "x", "--help", PYTHON="nowhere")
    assert (status, err) == (0, "") and out.startswith(f"Usage: ./{script}")


def test_a_word_that_is_no_command_is_named():
    status, out, err = run("./run_irra.sh", "dmeo")
    assert (status, out, err.count("\n")) == (2, "", 1) and "There is no 'dmeo'" in err


@pytest.mark.parametrize("words", [["./run_irra.sh", "demo"], ["./run_irra.sh"], ["./run_tests.sh"]], ids=str)
def test_a_python_that_is_missing_or_too_old_is_one_sentence(words, tmp_path):
    assert run(*words, PYTHON="nowhere") == (1, "", "PYTHON=nowhere is not a program that can be run.\n")
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    status, _, err = run(*words, PYTHON=str(old))
    assert (status, err.count("\n")) == (1, 1) and f"found {old} (Python 3.9.1)" in err


PYTHON = """\
#!/bin/sh
case $1 in
-c) exit 0 ;;
scripts/environment.py) echo "$3" && exit ;;
esac
echo "$*" >> asked
[ "$1" = train.py ] || exit 0
[ ! -e fails ] || exit 3
for word; do
    case $before in --output_dir) logs=$word ;; --config_file) name=$(basename "$word" .yaml) ;; esac
    before=$word
done
run=$logs/CUHK-PEDES/20261125_120000_$name
mkdir -p "$run" && touch "$run/configs.yaml" "$run/last.pth"
"""


@pytest.fixture
def writes_down(tmp_path):
    """A Python that only writes down what it is asked for, in the current folder's file `asked`."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return str(python)


def test_the_demo_trains_its_small_clip_once_and_says_what_it_did(tmp_path, writes_down, monkeypatch, capfd):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", writes_down)
    for name in demo.SURROUNDINGS:
        monkeypatch.setenv(name, "1")
    asked = tmp_path / "asked"

    def run_demo(*words):
        """Exit status, stdout and stderr, and the commands up to their first flag."""
        asked.write_text("")
        status = 0
        try:
            demo.main(words)
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr(), [line.split(" --")[0] for line in asked.read_text().splitlines()]

    status, _, err, did = run_demo("--num_epohc", "2")
    assert (status, did) == (2, []) and "did you mean --num_epoch?" in err
    (tmp_path / "fails").touch()
    status, _, err, _ = run_demo()
    assert status == 3 and "stopped at this step, exit code 3" in err
    (tmp_path / "fails").unlink()
    draws, trains = "-m datasets.synthetic", "train.py"
    status, out, err, did = run_demo("--num_epoch", "2")
    assert (status, err, did) == (0, "", [draws, draws, trains, trains, "test.py"])
    assert "The run:     demo/logs/CUHK-PEDES/20261125_120000_demo\n" in out
    assert re.search(r"The time: .*small CLIP on them \d+ s, 3/4", out)
    assert asked.read_text().splitlines()[3].endswith("--output_dir demo/logs --num_epoch 2")
    assert (tmp_path / "demo/small_clip.pth").exists()
    status, out, err, did = run_demo("--output_dir", "my runs")
    assert (status, did) == (0, [draws, trains, "test.py"])
    assert "from an earlier demo" in out and "--config_file 'my runs/CUHK-PEDES/20261125_120000_demo'" in out
    os.utime(tmp_path / "configs/small_clip.yaml")
    assert run_demo()[3] == [draws, draws, trains, trains, "test.py"]


def test_run_irra_hands_its_flags_to_the_demo_or_to_the_training(tmp_path, writes_down):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "run_irra.sh", tmp_path)

    def asked(*words, **variables):
        (tmp_path / "asked").write_text("")
        assert run("./run_irra.sh", *words, cwd=tmp_path, PYTHON=writes_down, **variables) == (0, "", "")
        return (tmp_path / "asked").read_text().splitlines()

    assert asked("demo", "--name", "my demo") == ["-m scripts.demo --name my demo"]
    flags = "--dataset_name RSTPReid --root_dir /sets"
    looks, trains = asked("--output_dir", "logs", DATASET_NAME="RSTPReid", ROOT_DIR="/sets")
    assert looks == f"-m utils.data_sets {flags} --output_dir logs"
    assert trains.startswith("train.py --name irra ")
    assert trains.endswith(f"{flags} --num_epoch 60 --output_dir logs")


@pytest.mark.parametrize("words", ["", "--fast", "-x -k sampler", "tests/test_a.py", "-x tests", "a.py::b"])
def test_each_core_runs_a_file_of_tests_unless_files_are_named(words, tmp_path, writes_down):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "run_tests.sh", tmp_path)
    assert run("./run_tests.sh", *words.split(), cwd=tmp_path, PYTHON=writes_down) == (0, "", "")
    *ruff, tests = (tmp_path / "asked").read_text().splitlines()
    assert ruff == ["-m ruff format --check .", "-m ruff check ."]
    each_core = "" if "tests" in words or ".py" in words else "-n auto --maxprocesses 4 --dist loadfile "
    assert tests == f"-m pytest {each_core}{words}".strip()


@pytest.mark.parametrize("row", [row for rows in SLOW.values() for row in rows])
def test_what_is_listed_as_slow_is_there(row):
    file, _, name = row.partition("::")
    assert f"\ndef {name or 'test_'}" in (ROOT / "tests" / file).read_text()


# ---- what a Python has ----


@pytest.mark.parametrize("found", ["2", "2.6", "2.7.1", "2.10"])
@pytest.mark.parametrize("bound", [">=2.6", "<2.10", "==2.*", ">=2.6.1", "<3", "==2.10.*"])
def test_bounds_mean_what_pip_means_by_them(found, bound):
    assert environment.satisfies(found, bound) == SpecifierSet(bound).contains(found)


def test_a_vendors_build_counts_as_the_release_it_is_made_for():
    assert environment.satisfies("2.7.0a0+cu128", ">=2.7")


def test_a_file_asks_for_what_the_files_that_it_names_ask_for():
    requirements, files = environment.read_requirements(ROOT / "requirements-dev.txt")
    assert sorted(files) == sorted(ROOT.glob("requirements*.txt"))
    assert {"torch>=2.6", "faiss-cpu>=1.9", "gradio>=6.20", "pytest>=8.0"} <= set(requirements)


# ---- the active Python or .venv ----


PIP = """\
from pathlib import Path
folder = Path(__file__).parent / "no_such_package-3.0.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text("Name: no_such_package\\nVersion: 3.0\\n")
print("pip speaks")
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone whose requirements no Python has but that of its .venv; returns where that keeps packages."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "scripts", "scripts")
    Path("requirements.txt").write_text("no_such_package>=2.1,<4  # why\n")
    Path("requirements-dev.txt").write_text("-r requirements.txt\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], check=True)
    (packages,) = tmp_path.glob(".venv/lib/python*/site-packages")
    for name, text in {"pip": PIP, "torch": "", "torchvision": ""}.items():
        (packages / f"{name}.py").write_text(text)
    subprocess.run([".venv/bin/python", "-m", "pip"], check=True)
    Path(".venv/installed").mkdir()
    for file in tmp_path.glob("*.txt"):
        shutil.copy(file, ".venv/installed")
    return packages


def find(file="requirements-dev.txt"):
    return run(sys.executable, "scripts/environment.py", file, "python3", cwd=".")


def test_an_active_python_that_has_everything_is_used_as_it_is(clone):
    Path("requirements.txt").write_text("pytest>=8.0\n")
    assert find() == (0, "python3\n", "")


def test_a_filled_venv_is_used(clone):
    assert find() == find("requirements.txt") == (0, ".venv/bin/python\n", "")


def interrupted(packages):
    Path(".venv/installed/requirements.txt").unlink()


def outdated(packages):
    Path("requirements.txt").write_text("no_such_package>=2.2\n")


def emptied(packages):
    shutil.rmtree(packages / "no_such_package-3.0.dist-info")


@pytest.mark.parametrize("happened", [interrupted, outdated, emptied])
def test_a_venv_that_lacks_something_is_completed(happened, clone):
    happened(clone)
    status, out, err = find()
    assert (status, out) == (0, ".venv/bin/python\n")
    assert err.startswith("Bringing .venv up to date with requirements-dev.txt\n") and "pip speaks" in err
    assert find() == (0, ".venv/bin/python\n", "")


@pytest.mark.parametrize("module, says", [("pip", "pip did not finish"), ("torch", "does not load")])
def test_a_failed_installation_says_what_to_do_and_is_not_taken_for_a_whole_one(module, says, clone):
    interrupted(clone)
    (clone / f"{module}.py").write_text(
        "import sys\nif '--version' not in sys.argv:\n    raise ImportError\n"
    )
    for _ in range(2):
        status, out, err = find()
        assert (status, out) == (1, "") and says in err and "ImportError" in err
        assert not list(Path(".venv/installed").iterdir())


def test_a_python_of_a_half_made_venv_is_the_systems_and_left_alone(clone):
    assert environment.venv_runs()
    Path(".venv/pyvenv.cfg").unlink()
    assert not environment.venv_runs()
    assert not environment.venv_is_complete("requirements.txt")


def test_our_venv_activated_before_it_is_filled_does_not_pass_as_the_active_python(clone):
    interrupted(clone)
    shutil.copy(ROOT / "run_tests.sh", ".")
    active = Path(".venv").absolute()
    path = f"{active / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    _, _, err = run("./run_tests.sh", cwd=".", PYTHON="", VIRTUAL_ENV=str(active), PATH=path)
    assert err.startswith("Bringing .venv up to date with requirements-dev.txt\n")
