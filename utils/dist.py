"""Where the work runs: the device, and the other processes of the run. The only place that names the
accelerator.

Several processes are started by torchrun. One process that was started alone is a group of one, and every
function here then does nothing.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from utils.errors import InputError


def launched():
    """Whether torchrun, or another launcher that speaks its language, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted():
    """Whether torchrun starts this process anew after one that ended badly."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch_time():
    """When torchrun, this process's parent, was started, in seconds as time.time() counts; 0 where the system
    does not say."""
    try:
        with open(f"/proc/{os.getppid()}/stat") as stat, open("/proc/stat") as system:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            boot = next(int(line.split()[1]) for line in system if line.startswith("btime"))
    except OSError:
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK") - 1  # the boot time is in whole seconds


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name="auto"):
    """torch.device for --device auto|cpu|cuda[:n]; under torchrun `cuda` is the process's own GPU."""
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if str(name).startswith("cuda"):
        if not available:
            raise InputError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
        index = torch.device(name).index
        if index is None and launched():
            index = int(os.environ.get("LOCAL_RANK", 0))
        index = index or 0
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--device {name}: GPU {index} is asked for, but there are {torch.cuda.device_count()}, from "
                f"cuda:0"
            )
        if launched():
            torch.cuda.set_device(index)
            name = f"cuda:{index}"
    return torch.device(name)


def pick_precision(name, device):
    """--precision, or the device's own: fp16 on CUDA as published, fp32 on a CPU."""
    return name or ("fp16" if device.type == "cuda" else "fp32")


def number_of_gpus(device):
    return world_size() if device.type == "cuda" else 0


@contextmanager
def process_group(device):
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs; leave at the end."""
    if not launched() or dist.is_initialized():
        yield
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot find one another ({_first_line(error)}): see torchrun's --rdzv_*"
        ) from None
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection", "TCPStore", "onnection")):
            raise
        raise InputError(
            f"process {rank()} lost the others: one of {world_size()} has ended, see its message above "
            f"({_first_line(error)})"
        ) from None
    finally:
        dist.destroy_process_group()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


# ---- between processes ----


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes, in order of rank. Backward: the sum over processes of the gradients
    that each computed for the rows of this one."""

    @staticmethod
    def forward(ctx, rows):
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        sizes = torch.cat(sizes).tolist()
        ctx.start, ctx.size = sum(sizes[: rank()]), len(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size]


class _Total(torch.autograd.Function):
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


def gather(rows):
    """Rows of all processes [ΣB, …], in order of rank, with gradients; shares may differ in size.

    A loss of gathered rows is the same number in each process, and DistributedDataParallel, which averages
    over
    processes, then gives the parameters the gradient that one process with the whole batch would give them.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


def total(x):
    """Sum over processes, with gradients; see `gather`."""
    return x if world_size() == 1 else _Total.apply(x)


def share(size, parts=None, part=None):
    """The slice of `size` things that is this process's: contiguous, nothing twice, nothing left out."""
    parts, part = parts or world_size(), rank() if part is None else part
    return slice(size * part // parts, size * (part + 1) // parts)


def from_main(value):
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_process(flag, device):
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    box = torch.tensor(float(flag), device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)


def barrier():
    if world_size() > 1:
        dist.barrier()


def replicate(model, device, in_parts=False):
    """The model as the processes train it together. Its state dict is that of `unwrapped(model)`.

    in_parts: it is trained in micro-batches, whose gradients `average_gradients` brings together.
    """
    if not dist.is_initialized() or in_parts:
        return model
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def average_gradients(model):
    """What DistributedDataParallel does at the end of a backward pass, where the model is not wrapped in
    it."""
    if world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def unwrapped(model):
    return getattr(model, "module", model)


@contextmanager
def out_of_memory(device, batch_size):
    """Turn running out of memory into a sentence that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(_memory_message(device, batch_size)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU allocator says
            raise
        raise InputError(_memory_message(device, batch_size)) from error


def _memory_message(device, batch_size):
    peak = ""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = f" (peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {total / 2**30:.1f} GiB)"
    return (
        f"out of memory on {device} at --batch_size {batch_size}{peak}: lower --batch_size or --img_size, or "
        f"in "
        "evaluation --test_batch_size"
    )
