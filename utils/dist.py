"""The other processes of the run.

Several processes are started by torchrun. One process that was started alone is a group of one, and every
function here then does nothing.
"""

import atexit
import gc
import os
import sys
import threading
import time
import traceback
import uuid
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.errors import InputError, first_line, say_once

_store = None  # torchrun's, which outlives the processes; see process_group
PATIENCE = 20  # seconds that a process waits for the others before it says so
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


def number_of_gpus(device):
    return world_size() if device.type == "cuda" else 0


@contextmanager
def process_group(device):
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs; leave at the end.

    When one of them ends, the others do. What several have to say in the same words is said once.
    """
    global _store
    if not launched() or dist.is_initialized():
        copies = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
        if copies not in (None, "1") and not launched():
            say_once(
                f"warning: srun or mpirun has started {copies} of this program, and each works by itself, on "
                "the first GPU that it sees: torchrun makes them share the work (docs/many_gpus.md)"
            )
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
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
    try:
        _store, number, size = next(rendezvous("env://"))
        fresh = dist.PrefixStore(_name_of_this_start(_store, number, size), _store)
        dist.init_process_group(backend, store=fresh, rank=number, world_size=size)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot find one another ({first_line(error, 160)}): see torchrun's --rdzv_*, or "
            "unset RANK and WORLD_SIZE where this is the only one"
        ) from None
    finally:
        speaker.cancel()
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
