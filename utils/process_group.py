"""How a process meets the others that torchrun started, and how it leaves them; one alone does neither."""

import atexit
import gc
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.dist import from_main, process_index, world_size
from utils.errors import InputError, first_line, may_ask_for_signals, say_once

_store = None  # torchrun's, which outlives the processes; see process_group
PATIENCE = 20  # seconds that a process waits for the others before it says so
# how NCCL's names begin for faults of this machine, not of another process that has ended
NCCL_FAULTS = ("ncclUnhandled", "ncclSystem", "ncclInternal", "ncclInvalid")


def launched():
    """Whether torchrun, or another launcher that speaks its language, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(device):
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs; leave at the end.

    When one of them ends, the others do. What several have to say in the same words is said once.
    """
    global _store
    if not launched():
        warn_of_copies()
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    fresh = _join(backend)
    try:
        yield
    except InputError as error:
        _leave_if_said(str(error), fresh)
        raise
    except RuntimeError as error:
        if any(kind in str(error) for kind in NCCL_FAULTS):
            cause = first_line(str(error).strip().splitlines()[-1])
            why = f"NCCL, by which the GPUs exchange, failed: {cause} (NCCL_DEBUG=INFO says more)"
            raise InputError(why) from error
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "onnection", "TCPStore")):
            raise
        message = (
            f"one of the {world_size()} processes has ended, so the others do too: what it said stands "
            "above, and torchrun reports below how it ended (a training goes on from its last checkpoint)"
        )
        _leave_if_said(message, fresh)
        raise InputError(message) from error
    finally:
        if backend == "nccl" and (error := sys.exc_info()[1]):
            atexit.register(_end_at_once, 2 if isinstance(error, (InputError, SystemExit)) else 1)
        else:
            _let_go_of_replicas()
            dist.destroy_process_group()
        _store = None


def warn_of_copies():
    """Another launcher started this program several times, without what makes them meet."""
    copies = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    if copies not in (None, "1"):
        say_once(
            f"warning: srun or mpirun has started {copies} of this program, and each works by itself, on "
            "the first GPU that it sees: torchrun makes them share the work (docs/many_gpus.md)"
        )


def _join(backend):
    """Meet the other processes; gives the store of this start. Where RANK and WORLD_SIZE are left over, or
    another launcher's, and nobody else comes, only a long wait shows it: so that is told while it lasts."""
    global _store
    waiting = (
        "warning: RANK and WORLD_SIZE are set: this process waits for the others of "
        f"{os.environ['WORLD_SIZE']} at {os.environ.get('MASTER_ADDR')}; where it is to be alone, unset both"
    )
    speaker = threading.Timer(PATIENCE, say_once, [waiting])
    speaker.daemon = True
    speaker.start()
    # PyTorch waits in C++, where nobody asks Python whether Ctrl-C has come
    can_interrupt = may_ask_for_signals() and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if can_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _store, number, size = next(rendezvous("env://"))
        fresh = dist.PrefixStore(_name_of_this_start(_store, number, size), _store)
        dist.init_process_group(backend, store=fresh, rank=number, world_size=size)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot find one another ({first_line(error)}): see torchrun's --rdzv_*, or "
            "unset RANK and WORLD_SIZE where this is the only one"
        ) from None
    finally:
        speaker.cancel()
        if can_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return fresh


def _end_at_once(status):
    """The end of a process whose error has been said, while the others may wait for it in an exchange on
    their GPUs. NCCL takes leave of all together only: this one would wait for the others, and torchrun, which
    ends them, for this one (https://github.com/NVIDIA/nccl/issues/1777)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _let_go_of_replicas():
    """Free what replicate made, or what holds it in the frames of an error on its way out.

    A DistributedDataParallel that outlives the group ends it when it is freed itself, holding Python's lock:
    where a thread of gloo needs that lock and is waited for, that is a deadlock (seen with PyTorch 2.6).
    """
    errors, seen = [sys.exc_info()[1]], set()
    if errors == [None]:
        gc.collect()  # not after an error: torchrun may end this process before it has said its sentence
    while errors:
        error = errors.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            errors += [error.__cause__, error.__context__]  # `from None` only hides the context


def _name_of_this_start(store, number, size):
    """A name that the processes of this start share, and none of an earlier one.

    After a restart torchrun's store still holds what the earlier processes wrote, such as their addresses,
    and the restart count is not the same on all machines (https://github.com/pytorch/pytorch/issues/135712).
    So the main process makes up a name, and tells it to those who answer.
    """
    name, others = uuid.uuid4().hex, range(1, size)
    if number:
        store.set(f"hello {number}", name)
        name = store.get(f"welcome {name}").decode()  # waits for it
        store.set(f"{name} {number}", "")
        return name
    limit = time.monotonic() + store.timeout.total_seconds()
    while not all(store.check([f"{name} {other}"]) for other in others):
        for other in others:
            if store.check([f"hello {other}"]):  # this start's, or an earlier one's that nobody will read
                store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        if time.monotonic() > limit:
            raise RuntimeError(f"not all {size} processes came")
        time.sleep(0.01)
    return name


def _leave_if_said(message, store):
    """End this process without a word when another one has this message."""
    try:
        number = store.add(f"said {message}", 1)
    except RuntimeError:  # the store ended with the main process
        return
    if number > 1:
        raise SystemExit(2) from None


def remember(key, value):
    """Leave a word for the processes that torchrun starts in this one's place, should it end badly."""
    if dist.is_initialized() and process_index() == 0:
        _store.set(key, value)


def recall(key):
    """What the main process of an earlier start of this torchrun remembered, in every process; or None."""
    if not dist.is_initialized():
        return None
    return from_main(_store.get(key).decode() if process_index() == 0 and _store.check([key]) else None)
