"""Files are whole or absent: a full disk, a read-only place or a kill leaves what was there before."""

import errno
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from tests import children
from tests.full_disk import limited
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import InputError
from utils.files import (
    link_or_copy,
    lock,
    lock_file,
    make_folder,
    remove_leftovers,
    whole_file,
    write_whole,
)
from utils.log import keep_log, setup_logger

MIB = 1 << 20


class Part:
    """Something with a state_dict."""

    def __init__(self, fill, size=MIB):
        self.weights = torch.full((size // 4,), float(fill))

    def state_dict(self):
        return {"weights": self.weights}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("room", [0, 1, 1000, MIB - 1, MIB + 100])
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(room, tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"model": Part(1)}, epoch=1)
    with limited(room), pytest.raises(InputError) as raised:
        save_checkpoint(path, {"model": Part(2), "optimizer": Part(3)}, epoch=2)
    assert str(raised.value) == (
        f"cannot write {path} (2.0 MiB are needed): File too large; what was there before is untouched"
    )
    assert load_checkpoint(path)["model"]["weights"].unique().tolist() == [1]
    assert names(tmp_path) == ["last.pth"]


def test_text_that_does_not_fit_leaves_the_earlier_text(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, "earlier")
    with (
        limited(100),
        pytest.raises(InputError, match=r"results.json \(3.0 MiB are needed\): File too large"),
    ):
        write_whole(path, "x" * (3 * MIB))
    assert path.read_text() == "earlier" and names(tmp_path) == ["results.json"]


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "名" * 83 + ".png"])
def test_a_name_as_long_as_can_be_is_written(name, tmp_path):
    write_whole(tmp_path / name, "first")
    write_whole(tmp_path / name, "second")
    assert (tmp_path / name).read_text() == "second" and names(tmp_path) == [name]


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="a folder that takes no file, not even root's: /proc"
)
def test_a_folder_that_takes_no_file_is_told_when_it_is_asked_for():
    with pytest.raises(InputError, match=r"cannot write in the folder /proc: .* \(see --output\)"):
        make_folder("/proc", "--output")


def test_an_error_in_the_block_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"earlier")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        file.write(b"x" * (1 // 0))
    assert path.read_bytes() == b"earlier" and names(tmp_path) == ["file"]


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "logs").write_text("a file")
    for path in (tmp_path / "logs" / "last.pth", tmp_path / "absent" / "last.pth"):
        with pytest.raises(InputError, match=rf"cannot write {path} .*: (Not a directory|No such file)"):
            save_checkpoint(path, {"model": Part(1)})
    with pytest.raises(InputError, match="Not a directory"):
        link_or_copy(tmp_path / "logs", tmp_path / "logs" / "copy")


def test_a_read_only_folder_is_one_sentence(tmp_path):
    write_whole(tmp_path / "file", "earlier")
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("needs a user other than root, whom permissions do not bind")
        with pytest.raises(
            InputError, match="file .*: Permission denied; what was there before is untouched"
        ):
            write_whole(tmp_path / "file", "later")
        assert (tmp_path / "file").read_text() == "earlier"
    finally:
        tmp_path.chmod(0o700)


def test_a_kill_before_the_rename_leaves_the_earlier_file(tmp_path):
    """The writer kills itself after each part; only a complete file ever has the name."""
    code = (
        "import os, sys; from utils.files import whole_file\n"
        "path, parts = sys.argv[1], int(sys.argv[2])\n"
        "with whole_file(path) as file:\n"
        "    for _ in range(parts): file.write(b'later' * 1000)\n"
        "    file.flush()\n"
        "    if parts < 5: os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "last.pth"
    write_whole(path, "earlier")
    for parts in range(6):
        ended = subprocess.run([sys.executable, "-c", code, path, str(parts)], cwd=children.ROOT)
        if parts < 5:
            assert ended.returncode == -9 and path.read_text() == "earlier"
    assert ended.returncode == 0 and path.read_bytes() == b"later" * 5000
    assert len(names(tmp_path)) == 6  # what the five killed ones left
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["last.pth"]


def test_leftovers_of_living_processes_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        kept = [f".last.pth.{living.pid}", f".best.pth.{os.getpid()}", ".hidden", ".a.1b", "epoch_001.pth"]
        for name in [*kept, f".last.pth.{ended.pid}", f".configs.yaml.{ended.pid}"]:
            (tmp_path / name).write_text("half")
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted(kept)
    finally:
        living.communicate(b"\n")


def test_numbered_checkpoints_are_copied_where_there_are_no_links(tmp_path):
    """/dev/shm is another file system than the folder of temporary files, so that a link fails."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    write_whole(tmp_path / "last.pth", "weights")
    target = tmp_path.__class__(f"/dev/shm/epoch_001.pth.test.{os.getpid()}")
    try:
        link_or_copy(tmp_path / "last.pth", target)
        assert target.read_text() == "weights" and target.stat().st_nlink == 1
    finally:
        target.unlink(missing_ok=True)


def test_a_log_without_room_is_an_error_and_no_traceback_for_each_line(tmp_path, capsys):
    logger = setup_logger("IRRA")
    keep_log(logger, tmp_path / "train_log.txt")
    with limited(5), pytest.raises(OSError, match="File too large"):
        logger.info("more than five letters")
    assert "Traceback" not in capsys.readouterr().err
    logging.raiseExceptions = True


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_flush_a_file_holds_it_all_the_same(number, tmp_path, monkeypatch):
    """FUSE without fsync; another error of it is one."""

    def refuse(handle, number=number):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "file", "all of it")
    assert (tmp_path / "file").read_text() == "all of it"
    monkeypatch.setattr(os, "fsync", lambda handle: refuse(handle, errno.EIO))
    with pytest.raises(InputError, match="Input/output error; what was there before is untouched"):
        write_whole(tmp_path / "file", "more")
    assert (tmp_path / "file").read_text() == "all of it" and names(tmp_path) == ["file"]


# ---- a whole training ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return children.draw(tmp_path_factory.mktemp("drawn"))


def error_of(output):
    """The sentence that a training ended with."""
    text = output.read_text()
    assert "Traceback" not in text and text.count("error: ") == 1
    return text.splitlines()[-1]


def limited_training(argv, output):
    """The first checkpoint, without the moments of the optimiser, is smaller: the second does not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, 20 * MIB))
    children.train_in_child(argv, output)


def training_killed_in_a_save(argv, output):
    """Of the second checkpoint 20 MiB are written; then the system ends the process, as a SIGKILL would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limited_training(argv, output)


def test_a_training_without_room_ends_in_one_sentence_and_goes_on_later(data, tmp_path):
    output = tmp_path / "output"
    assert children.run(children.words(data, tmp_path), output, way=limited_training) == 2
    folder = children.only_run(tmp_path)
    sentence = rf"error: cannot write {folder}/last.pth \((\d+.\d) MiB are needed\): File too large; what .*"
    needed = float(re.fullmatch(sentence, error_of(output))[1])
    assert load_checkpoint(folder / "last.pth")["epoch"] == 0
    assert not list(folder.glob(".*"))

    assert children.run(["--resume", "--output_dir", tmp_path], output) == 0
    size = (folder / "last.pth").stat().st_size / MIB
    assert size - 0.2 < needed <= size  # the zip's own entries come on top
    whole = tmp_path / "unbroken"
    assert children.run(children.words(data, whole), tmp_path / "whole") == 0
    assert children.differ(folder / "last.pth", children.only_run(whole) / "last.pth") == []


def can_mount(folder):
    """A command that has a small file system of its own at the folder, or None where none may be mounted."""
    for prefix in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        command = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        try:
            if subprocess.run(command, capture_output=True).returncode == 0:
                return prefix
        except FileNotFoundError:
            return None
    return None


@pytest.mark.parametrize("room", ["60m", "12k"])
def test_a_full_disk_ends_a_training_in_one_sentence(room, data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    prefix = can_mount(small)
    if not prefix:
        pytest.skip("needs unshare and the right to mount a tmpfs in a namespace of one's own")
    script = (
        f'mount -t tmpfs -o size={room} tmpfs "$1" && shift; status=0; "$@" || status=$?;'
        f' cp -r "{small}/." "{tmp_path}/kept"; exit $status'
    )
    command = [sys.executable, "train.py", *map(str, children.words(data, small))]
    ended = subprocess.run(
        [*prefix, "sh", "-c", script, "sh", str(small), *command],
        cwd=children.ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("cp: ")]
    assert re.search(
        r"cannot write .*/(last|best).pth \(\d+.\d MiB are needed\): No space left on device", line
    )
    folder = children.only_run(tmp_path / "kept")
    if room == "60m":
        last = load_checkpoint(folder / "last.pth")  # the first epoch's, saved before its evaluation
        assert (last["epoch"], last["to_evaluate"]) == (1, True)
    assert not list(folder.glob(".*"))
    shutil.rmtree(tmp_path / "kept")


def test_a_training_whose_folder_cannot_be_made_ends_in_one_sentence(data, train_script, tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    assert train_script.main([str(word) for word in children.words(data, tmp_path / "logs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot make the run folder {tmp_path}/logs/CUHK-PEDES/")
    assert line.endswith("Not a directory (see --output_dir)")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    train_script, tmp_path, monkeypatch, capsys
):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    argv = children.words(tmp_path / "no_data", tmp_path / "logs")
    assert train_script.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot make the run folder {tmp_path}/logs/CUHK-PEDES/")
    assert line.endswith("Read-only file system (see --output_dir)")


def test_a_resumed_run_removes_what_a_kill_left(data, tmp_path):
    output, argv = tmp_path / "output", children.words(data, tmp_path)
    assert children.run(argv, output, way=training_killed_in_a_save) == -signal.SIGXFSZ
    folder = children.only_run(tmp_path)
    (left,) = folder.glob(".*")
    assert left.name.startswith(".last.pth.") and left.stat().st_size == 20 * MIB
    assert children.run(["--resume", "--output_dir", tmp_path], output) == 0
    assert not list(folder.glob(".*")) and load_checkpoint(folder / "last.pth")["epoch"] == 3


SIGNALS = {  # what their handlers raise; SIGCHLD's is PyTorch's, when a loading process has been killed
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: KeyboardInterrupt,
    signal.SIGCHLD: RuntimeError,
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_save_is_answered_after_it(number, tmp_path, monkeypatch):
    """In PyTorch's writer its exception ended the program in an abort, or was taken for a full disk."""
    part, save, seen = torch.nn.Linear(3, 3), torch.save, []

    def interrupted(state, file):
        signal.raise_signal(number)
        seen.append("saving goes on")
        save(state, file)

    def stop(signal_number, frame):
        raise SIGNALS[number]("a signal's")

    monkeypatch.setattr(torch, "save", interrupted)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(SIGNALS[number], match="a signal's"):
            save_checkpoint(tmp_path / "last.pth", {"model": part}, epoch=1)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert seen and not list(tmp_path.glob(".*"))
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 1


def test_two_users_of_a_folder_take_turns_though_the_lock_is_the_others(tmp_path, monkeypatch):
    """As root nothing is forbidden, so the system's answer is put in its place."""
    real = open

    def refuse(path, mode="r", *more, **named):
        if mode != "r":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, *more, **named)

    with lock_file(tmp_path / ".lock") as theirs:
        monkeypatch.setattr("builtins.open", refuse)
        assert lock(theirs)
        with lock_file(tmp_path / ".lock") as ours:
            assert not lock(ours)
            theirs.close()
            assert lock(ours)
