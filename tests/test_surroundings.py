"""Programs inside others, and on machines that lack something: in a thread, in a notebook, without a
compiler, with a long or no folder for temporary files, without a home."""

import errno
import gc
import getpass
import importlib
import io
import multiprocessing
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from model.fetch import download
from tests.children import ROOT, draw, words
from utils.errors import InputError, reports_errors
from utils.extras import extra
from utils.loading import SOCKET, batches_of, room_for_sockets
from utils.options import get_args


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"), train_ids=4)


def test_a_training_and_a_test_run_in_a_thread_and_leave_signals_alone(
    data, train_script, test_script, tmp_path
):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    found = []

    def both():
        found.append(train_script.main(words(data, tmp_path, epochs=1)))
        (run,) = tmp_path.glob("*/*")
        found.append(test_script.main(["--config_file", str(run)]))

    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    assert found == [0, 0]
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]


def test_a_notebook_trains(data, train_script, tmp_path, monkeypatch):
    """Its output is no file, and its own words are not the program's."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert get_args([]).num_epoch == 60
    assert train_script.main(words(data, tmp_path, epochs=1)) == 0
    assert "best R1" in sys.stdout.getvalue() and not sys.stderr.getvalue()


def test_a_machine_without_a_compiler_is_told_so_before_a_training():
    code = "import torch; from model.build import check_compiler; check_compiler(torch.device('cpu'))"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    environment["PATH"] = "/nonexistent"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    last = next(line for line in done.stderr.splitlines() if line.startswith("utils.errors.InputError: "))
    assert "--compile cannot be used here (" in last and "a C++ compiler (g++) on cpu" in last
    assert last.endswith("install what is missing, or train without --compile")


def bound(folder):
    """Whether a socket of multiprocessing's can be made in the folder."""
    path = folder + SOCKET
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.bind(path)
        except OSError as error:
            assert "too long" in str(error)
            return False
    os.unlink(path)
    os.rmdir(os.path.dirname(path))
    return True


@pytest.mark.parametrize("length", [40, 71, 72, 120])
def test_loading_processes_have_sockets_however_long_tmpdir_is(length, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        folder = f"{short}/".ljust(length, "x")
        os.mkdir(folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        room_for_sockets()
        assert bound(tempfile.gettempdir())
        assert tempfile.gettempdir() == (folder if length <= 71 else "/tmp")
        assert bound(folder) or length > 71


def test_where_nothing_is_for_temporary_files_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    assert reports_errors(lambda argv: tempfile.gettempdir())([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: nothing can be written to TMPDIR")


def test_a_user_without_a_home_is_told_where_weights_would_go(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])  # as of a container's user
    with pytest.raises(InputError, match="no home folder: set HOME, or fetch https://.*--pretrain_choice"):
        download("ViT-B/16")


def test_a_user_without_a_name_has_one_for_pytorch(monkeypatch):
    """As in a container that is run with --user N: PyTorch 2.8 ends in a KeyError there."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[f"getpwuid(): uid not found: {number}"])
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert reports_errors(lambda argv: getpass.getuser() != f"uid{os.getuid()}")([]) == 0


def test_what_keeps_loading_processes_from_starting_is_one_sentence(capsys):
    """Without an open file to spare; PyTorch would add a traceback when the half-made iterator is deleted."""
    loader = torch.utils.data.DataLoader(list(range(9)), num_workers=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.close(spare)
    for more in (0, 1, 3, 5):  # before the first queue, and with a process that has started
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + more, hard))
        try:
            with pytest.raises(InputError) as raised:
                batches_of(loader)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert str(raised.value).startswith("the loading processes cannot be started (Too many open files)")
        del raised
    gc.collect()
    assert "Traceback" not in capsys.readouterr().err
    assert not multiprocessing.active_children()
    assert [batch.item() for batch in batches_of(loader)] == list(range(9))


DISKS = {  # what an OSError ends in
    errno.ESTALE: "see that its disk is there, and start again (a training goes on",
    errno.ENOTCONN: "see that its disk is there",
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EMFILE: "raise the limit (ulimit -n 4096)",
    errno.ENAMETOOLONG: "File name too long",
    errno.EDQUOT: "make room there and start again",
}


@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
def test_what_a_disk_or_its_rights_refuse_is_one_sentence(number, capsys):
    def main(argv):
        raise OSError(number, os.strerror(number), "/mnt/runs/events")

    assert reports_errors(main)([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "/mnt/runs/events" in line and DISKS[number] in line


def test_an_error_of_the_program_keeps_its_traceback():
    for error in (OSError("broken"), FileNotFoundError(errno.ENOENT, "No such file", "x"), ImportError("x")):
        with pytest.raises(type(error)):
            reports_errors(lambda argv, error=error: (_ for _ in ()).throw(error))([])


def test_a_package_that_is_missing_is_one_sentence(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import train; sys.exit(train.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: the package torch is not installed for {sys.executable}: ")


@pytest.mark.parametrize(
    "module, package, older, newer, requirements",
    [
        ("gradio", "gradio", "5.49.1", "6.20.0", "requirements-demo.txt"),
        ("faiss", "faiss-cpu", "1.8.0.post1", "1.10.0", "requirements-search.txt"),
        ("sklearn.mixture", "scikit-learn", "1.2", "10", "requirements-methods.txt"),
    ],
)
def test_a_package_older_than_its_file_asks_for_is_one_sentence_and_a_newer_one_none(
    module, package, older, newer, requirements, tmp_path, monkeypatch
):
    """Its functions are others: what is said must not be a traceback that names one of them."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, module, sys)
    for number in (older, newer):
        about = tmp_path / f"{package.replace('-', '_')}-{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
        if number == newer:
            assert extra(module, requirements) is sys
            continue
        with pytest.raises(
            InputError, match=f"package {package} from .*{older} is installed: .*{requirements}"
        ):
            extra(module, requirements)
        shutil.rmtree(about)
        importlib.invalidate_caches()
