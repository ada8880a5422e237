"""The house: imports go down a floor; one place names the accelerator, one sets the precision; few print."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"processor": 2, "retrieval": 2, "model": 1, "datasets": 1, "solver": 1, "utils": 0}
SCRIPTS = 3  # train.py, test.py and the others at the top, benchmarks/


def source_files():
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]):
        yield path.relative_to(ROOT)
    for room in FLOORS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT)


FILES = list(source_files())
ROOM_FILES = [path for path in FILES if path.parts[0] in FLOORS]


def nodes(path, kind):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def imported(path):
    """Top-level names of the modules that a file imports from outside its own folder, wherever it does."""
    names = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes(path, ast.ImportFrom) if node.level == 0}
    return {name.split(".")[0] for name in names}


def test_every_room_stands_and_every_folder_with_python_files_is_a_room():
    assert {path.parts[0] for path in ROOM_FILES} == set(FLOORS)
    folders = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")}
    assert folders <= {*FLOORS, "benchmarks", "scripts", "tests"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_an_import_goes_down_never_up_or_sideways(path):
    room = path.parts[0]
    scripts = {script.stem for script in ROOT.glob("*.py")} | {"benchmarks", "scripts", "tests"}
    for name in imported(path) - {room}:
        if name in FLOORS:
            assert FLOORS[name] < FLOORS.get(room, SCRIPTS), f"{path} imports {name}"
        elif room in FLOORS:
            assert name not in scripts, f"{path} imports {name}"


def is_command_line(path):
    return "__main__" in [n.value for n in nodes(path, ast.Constant)]


@pytest.mark.parametrize("path", [path for path in ROOM_FILES if not is_command_line(path)], ids=str)
def test_a_room_prints_only_what_no_log_can_hold(path):
    prints = [n for n in nodes(path, ast.Call) if isinstance(n.func, ast.Name) and n.func.id == "print"]
    if str(path) != "utils/errors.py":  # the last words
        assert not prints


def docstrings(path):
    described = nodes(path, (ast.Module, ast.FunctionDef, ast.ClassDef))
    return {id(node.body[0].value) for node in described if ast.get_docstring(node, clean=False)}


def names_cuda(path):
    """Whether a file's code (not its docstrings) says cuda: in a string, as a name or behind a dot."""
    documented = docstrings(path)
    strings = [
        n.value for n in nodes(path, ast.Constant) if isinstance(n.value, str) and id(n) not in documented
    ]
    names = [node.id for node in nodes(path, ast.Name)] + [node.attr for node in nodes(path, ast.Attribute)]
    return any("cuda" in text.lower() for text in strings + names)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parts[0] not in ("benchmarks", "scripts")], ids=str
)
def test_the_accelerator_is_named_nowhere_but_where_it_is_picked_by_its_option_and_for_pinned_memory(path):
    if str(path) not in ("utils/device.py", "utils/dist.py", "utils/options.py", "datasets/build.py"):
        assert not names_cuda(path)


def test_precision_is_decided_in_one_place():
    halving = {
        str(path)
        for path in ROOM_FILES
        for node in nodes(path, ast.Attribute)
        if node.attr in ("half", "float16", "bfloat16")
    }
    # model/weights_file.py names the types that stand in files, not one to compute in
    assert halving <= {"model/build.py", "model/weights_file.py"}
