"""Where the work runs: the device, which is named here alone, and the other processes of the run.

Several processes are started by torchrun. One process that was started alone is a group of one, and every
function here then does nothing.
"""

import atexit
import functools
import gc
import os
import sys
import time
import traceback
import uuid
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.errors import InputError, first_line, last_line, say_once

_store = None  # torchrun's, which outlives the processes; see process_group
NCCL_FAULTS = (  # of this machine, not of another process that has ended
    "ncclUnhandledCudaError",
    "ncclSystemError",
    "ncclInternalError",
    "ncclInvalidArgument",
    "ncclInvalidUsage",
)


def launched():
    """Whether torchrun, or another launcher that speaks its language, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_index():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name="auto"):
    """torch.device for --device auto|cpu|cuda[:n]; under torchrun `cuda` is the process's own GPU."""
    kind, _, index = str(name).partition(":")
    if kind == "auto":
        number, complaint = gpus()
        if complaint:
            say_once(f"warning: the CPU is used, since no GPU can be: {complaint}")
        name = kind = "cuda" if number else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1
    if index and processes > 1:
        raise InputError(
            f"--device {name} is one GPU for the {processes} processes here: with --device cuda each takes "
            "its own"
        )
    if kind == "cuda":
        own = int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0
        take(name, int(index or own), processes)
        name = f"cuda:{int(index or own)}" if launched() else name
    return torch.device(name)


@functools.cache
def gpus():
    """How many GPUs PyTorch can use, and what it complains of where it finds a driver that it cannot use; it
    does so once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaints = [str(warning.message) for warning in said if not number]
    return number, first_line(complaints[0]).removeprefix("CUDA initialization: ") if complaints else ""


def why_no_gpu():
    """In brackets, or nothing where it is not known."""
    _, why = gpus()
    if not (torch.version.cuda or torch.version.hip):
        why = "it is one for CPUs only: pytorch.org says how to install another one"
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        why = "CUDA_VISIBLE_DEVICES hides them all"
    return f" ({why})" if why else ""


def take(name, index, processes):
    """Make the GPU this process's current one: what names none, as page-locked memory and NCCL's objects do,
    then takes no memory of GPU 0."""
    number, _ = gpus()
    if not number:
        raise InputError(f"--device {name}: PyTorch sees no CUDA device here{why_no_gpu()}; use --device cpu")
    if index >= number:
        several = f" for the {processes} processes here (torchrun's --nproc_per_node)" * (processes > 1)
        raise InputError(
            f"--device {name}: GPU {index} is asked for, but there are {number}, from cuda:0{several}"
        )
    try:
        torch.cuda.set_device(index)
    except RuntimeError as error:
        raise InputError(
            f"--device {name}: GPU {index} cannot be used ({first_line(error)}): nvidia-smi shows who uses "
            "it; wait, or choose another one with --device cuda:N"
        ) from error


def to_device(value, device):
    """A tensor on the device, anything else as it is. It leaves from page-locked memory: from any other the
    host would have to wait for the copy, and with it for all that the device has yet to do."""
    if not isinstance(value, torch.Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def number_of_gpus(device):
    return world_size() if device.type == "cuda" else 0


@contextmanager
def process_group(device):
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs; leave at the end.

    When one of them ends, the others do. What several have to say in the same words is said once.
    """
    global _store
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        _store, number, size = next(rendezvous("env://"))
        fresh = dist.PrefixStore(_name_of_this_start(_store, number, size), _store)
        dist.init_process_group(backend, store=fresh, rank=number, world_size=size)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot find one another ({first_line(error, 160)}): see torchrun's --rdzv_*"
        ) from None
    try:
        yield
    except InputError as error:
        _leave_if_said(str(error), fresh)
        raise
    except RuntimeError as error:
        if any(kind in str(error) for kind in NCCL_FAULTS):
            raise InputError(
                f"NCCL, by which the GPUs exchange, failed: {last_line(error)} (NCCL_DEBUG=INFO says more)"
            ) from error
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "onnection", "TCPStore")):
            raise
        message = (
            f"one of the {size} processes has ended, so the others do too: what it said stands above, and "
            "torchrun reports below how it ended (a training goes on from its last checkpoint)"
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


# ---- between processes ----


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes, in their order. Backward: the sum over processes of the gradients
    that each computed for the rows of this one."""

    @staticmethod
    def forward(ctx, rows, sizes):
        ctx.start, ctx.size = sum(sizes[: process_index()]), len(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # another branch may hold it too
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None


class _ProcessSum(torch.autograd.Function):
    """Forward: the sum over processes. Backward: likewise, since each of them went on with that sum."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def share_sizes(number, device):
    """How many rows each process has, in the processes' order. On an accelerator the host waits for that."""
    if world_size() == 1:
        return [number]
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.full((1,), number, device=device))
    return torch.cat(sizes).tolist()


def gather(rows, sizes=None):
    """Rows of all processes [ΣB, …], in the processes' order, with gradients; shares may differ in size.

    sizes: what share_sizes gave, where several things of the same rows are gathered.

    A loss of gathered rows is the same number in each process, and DistributedDataParallel, which averages
    over processes, then gives the parameters the gradient that one process with the whole batch would give.
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows, sizes or share_sizes(len(rows), rows.device))


def process_sum(x):
    """Sum over processes, with gradients; see `gather`."""
    return x if world_size() == 1 else _ProcessSum.apply(x)


def share(size, parts=None, part=None):
    """The slice of `size` things that is this process's: contiguous, nothing twice, nothing left out."""
    parts, part = parts or world_size(), process_index() if part is None else part
    return slice(size * part // parts, size * (part + 1) // parts)


def from_main(value):
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value):
    """[the value of each process, in the processes' order], in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag, device):
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    box = torch.tensor(float(flag), device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)


def replicate(model, device, in_parts=False):
    """The model as the processes train it together. Its state dict is that of `unwrapped(model)`.

    in_parts: it is trained in micro-batches, whose gradients `average_gradients` brings together.
    """
    if not dist.is_initialized():
        return model
    if in_parts:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        return model
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def average_gradients(model):
    """What DistributedDataParallel does at the end of a backward pass, for a model without it."""
    if world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= world_size()  # first, as there: a sum in fp16 may be above 65504
            dist.all_reduce(parameter.grad)


def unwrapped(model):
    return getattr(model, "module", model)


LOADING = {  # words in what PyTorch says when its loading processes lack something: what to do
    "shared memory": "the loading processes find no room in /dev/shm: give it more (docker run "
    "--shm-size=8g, or --ipc=host), or lower --num_workers, to 0 if need be",
    "Too many open files": "too many open files: raise the limit (ulimit -n 4096), or lower --num_workers",
    "DataLoader worker (pid": "a loading process ended, killed by the system or for want of memory or of "
    "room in /dev/shm: lower --num_workers, or give more of either (docker run --shm-size=8g)",
}


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


NO_MEMORY = (  # words in what allocators say, PyTorch's own on a CPU and those of CUDA's libraries
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",
)
GPU_FAILS = {  # words in what CUDA says: what to do
    "no kernel image is available": "this PyTorch has no code for this GPU: install a PyTorch that has "
    "(pytorch.org says which), or use --device cpu",
    "busy or unavailable": "the GPU is taken: another program has it for itself (nvidia-smi shows it); wait, "
    "or choose another one with --device cuda:N",
    **dict.fromkeys(
        ("unspecified launch failure", "ECC error", "GPU is lost", "fallen off the bus", "unknown error"),
        "the GPU has failed: see nvidia-smi and dmesg, it may need a restart (a training goes on from its "
        "last checkpoint with --resume)",
    ),
}
LESS = {  # what else takes less memory
    "--batch_size": " or --img_size, train the same in less with --micro_batch or --grad_checkpointing, or "
    "in evaluation lower --test_batch_size",
}


@contextmanager
def out_of_memory(device, number=None, option="--batch_size"):
    """Turn running out of memory, or of what loading processes need, and a GPU that fails into a sentence
    that says what to do. number: of samples at once, as the option says; None: there is nothing to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(_memory_message(device, number, option)) from error
    except (RuntimeError, OSError) as error:
        if any(sign in str(error) for sign in NO_MEMORY):
            raise InputError(_memory_message(device, number, option)) from error
        for sign, message in LOADING.items():
            if sign in str(error):
                raise InputError(message) from error
        for sign, message in GPU_FAILS.items() if "CUDA" in str(error) else ():
            if sign in str(error):
                raise InputError(f"{message} ({first_line(error)})") from error
        raise


def _memory_message(device, number, option):
    if number in (None, 1):
        where, mend = "", "free some, or use --device cpu"
    else:
        where, mend = f" at {option} {number}", f"lower {option}{LESS.get(option, '')}"
    return f"out of memory on {device}{where}{memory_in_use(device)}: {mend}"


def memory_in_use(device):
    """In words: the most that this process had on a GPU, and what others have there."""
    if device.type != "cuda":
        return ""
    try:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    except RuntimeError:  # so little is left that it cannot be asked
        return "; nvidia-smi shows who uses it"
    others = total - free - reserved / 2**30 - 0.5  # or so, for the libraries' own
    used = f"; other programs use {others:.1f}, see nvidia-smi" if others > 1 else ""
    return f" (peak {peak / 2**30:.1f} of {total:.1f} GiB{used})"
