"""Files that are whole or absent: written beside, flushed, renamed."""

import errno
import os
import shutil
import signal
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import InputError, may_ask_for_signals


@contextmanager
def uninterrupted():
    """Signals that come meanwhile are answered afterwards. In the middle of PyTorch's writer, which is C++,
    an exception of their handlers ended the program in an abort, or was taken for a full disk."""
    come, earlier = [], {}
    if may_ask_for_signals():
        handled = [n for n in signal.valid_signals() if callable(signal.getsignal(n))]
        earlier = {n: signal.signal(n, lambda number, frame: come.append(number)) for n in handled}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        for number in come:
            signal.raise_signal(number)


LONGEST_NAME = 255  # bytes of a file's


def name_beside(path):
    """Of what becomes `path` once it is whole; remove_leftovers finds it, but for names as long as can be."""
    name = f".{path.name}.{os.getpid()}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}"
    return path.with_name(name)


@contextmanager
def whole_file(path, needed=None):
    """Open a binary file that becomes `path` at the end of the block, or leaves what was there untouched.

    A full disk or a read-only folder is an InputError; needed: how many bytes it will take, for that message.
    """
    path = Path(path)
    beside = name_beside(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # FUSE without it
                    raise
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        room = f" ({max(needed / 2**20, 0.1):.1f} MiB are needed)" if needed else ""
        raise InputError(
            f"cannot write {path}{room}: {error.strerror or error}; what was there before is untouched"
        ) from None
    finally:
        remove(beside)


def neighbours(path, suffixes):
    """' (that folder holds a.yaml, b.yaml)': what may be meant instead of a file."""
    if path.is_dir():
        return " (that is a folder)"
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    others = [file.name for file in path.parent.glob("*") if file.suffix.lower() in suffixes]
    others = [name for name in sorted(others) if name != path.name]
    return f" (that folder holds {', '.join(others[:20])})" if others else ""


def make_folder(path, option):
    """Make a folder, and those above it, where it is not there; option: the flag that names it. InputError
    too where nothing can be written in it, so that this is known before the work."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror} (see {option})") from None
    if why := cannot_write(path):
        raise InputError(f"cannot write in the folder {path}: {why} (see {option})")


def cannot_write(folder):
    """Why no file can be made in a folder, or None."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def remove(path):
    """Delete a file if it is there and can be deleted: an error on the way is not the one to tell of."""
    with suppress(OSError):  # not there; or in a read-only place, or below a file where a folder should be
        path.unlink()


def sync_folder(folder):
    """Make a rename in the folder outlast a power cut; where its file system refuses, as some of networks
    do, the rename itself is done."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path, data):
    """Write text or bytes so that `path` holds either all of it or what it held before."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    with whole_file(path, len(data)) as file:
        file.write(data)


def link_or_copy(source, target):
    """Give a file a second name; where the file system has no hard links, a whole copy."""
    beside = name_beside(target)
    try:
        os.link(source, beside)
        os.replace(beside, target)
    except OSError:
        with open(source, "rb") as original, whole_file(target, os.path.getsize(source)) as file:
            shutil.copyfileobj(original, file, 1 << 22)
    finally:
        remove(beside)


def remove_leftovers(folder, name="*"):
    """Delete what a killed process left half-written in the folder, of the files of that name."""
    for path in Path(folder).glob(f".{name}.[0-9]*"):
        pid = path.name.rsplit(".", 1)[1]
        if pid.isdigit() and not lives(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else remove(path)


def lock_file(path):
    """The open file for lock(). Another user's, in a folder that both write in, can be opened for reading."""
    try:
        return open(path, "a")
    except PermissionError:
        return open(path)


def lock(file, wait=False):
    """Whether this program has the open file for itself now, until it is closed. Yes too where there are no
    locks, as on some clusters' disks (ENOLCK): that is not another program. wait: until it can be had."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def lives(pid):
    """Whether this machine has such a process; yes where that cannot be told."""
    if os.name != "posix":  # Windows would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
