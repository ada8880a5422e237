"""The processes that load data: what they need of the system, how they are started, and how they end."""

import os
import signal
import tempfile

import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.errors import STOPS, InputError

SOCKET = "/pymp-12345678/listener-12345678"  # what multiprocessing adds to the folder for temporary files
LONGEST = 103  # bytes of a socket's path, where they are fewest
GRACE = 60  # seconds that a loading process goes on after a SIGTERM
LACKING = {  # words in what PyTorch says when its loading processes lack something: what to do
    **dict.fromkeys(
        ("Too many open files", "items of ancdata"),  # before the next: it may name shared memory too
        "too many open files: raise the limit (ulimit -n 4096), or lower --num_workers",
    ),
    "shared memory": "the loading processes find no room in /dev/shm: give it more (docker run "
    "--shm-size=8g, or --ipc=host), or lower --num_workers, to 0 if need be",
    "DataLoader worker (pid": "a loading process ended, killed by the system or for want of memory or of "
    "room in /dev/shm: lower --num_workers, or give more of either (docker run --shm-size=8g)",
}


def room_for_sockets():
    """Loading processes hand batches over through sockets, whose paths are short; where TMPDIR is a long one
    they fail, and their parent would wait for ever. So theirs then are in another folder."""
    if len(os.fsencode(tempfile.gettempdir() + SOCKET)) <= LONGEST:
        return
    for folder in ("/tmp", "/var/tmp"):
        if os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            return
    raise InputError(
        f"TMPDIR {tempfile.gettempdir()} is too long for the loading processes: set it to a shorter one, or "
        "give --num_workers 0"
    )


def batches_of(loader):
    """DataLoader's iterator, which starts its processes. What keeps them from that is an InputError: the
    system tells it by a number alone, without a file's name, as if it were of a disk."""
    try:
        return torch.utils.data.DataLoader.__iter__(loader)
    except OSError as error:
        _give_up_half_made(error)
        raise InputError(
            f"the loading processes cannot be started ({error.strerror or error}): they need room in "
            "/dev/shm (docker run --shm-size=8g), open files (ulimit -n 4096), processes (ulimit -u): "
            "give more, or lower --num_workers, to 0 if need be"
        ) from error


def _give_up_half_made(error):
    """PyTorch cannot end an iterator that is half made: it prints a traceback, and the processes that it has
    are waited for at the program's end."""
    trace = error.__traceback__
    while trace:
        one = trace.tb_frame.f_locals.get("self")
        if isinstance(one, _MultiProcessingDataLoaderIter):
            for worker in getattr(one, "_workers", ()):
                worker.kill()
            one._shutdown = True
        trace = trace.tb_next


def leave_signals_to_parent(worker):
    """A loading process's start: it gets a terminal's Ctrl-C and a batch system's SIGTERM too, and must go on
    loading while its parent finishes the batch. It ends when its parent does, or some time after a SIGTERM:
    that is also how Python ends, and waits for, the children that are left when a program is over."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def end_later(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(GRACE)  # nobody handles SIGALRM: it ends the process
