"""Where the work runs: the device, which is named here alone; what is said when it, or its memory, fails."""

import functools
import os
import warnings
from contextlib import contextmanager

import torch

from utils.errors import InputError, first_line, say_once
from utils.loading import LACKING
from utils.process_group import launched


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


FOR_CPUS_ONLY = "this PyTorch is one for CPUs only: pytorch.org says how to install another one"


@functools.cache
def gpus():
    """How many GPUs PyTorch can use, and what it complains of where it finds a driver that it cannot use; it
    does so once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaints = [str(warning.message) for warning in said if not number]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    hidden = visible.strip() in ("", "-1")
    if not (number or complaints or hidden) and any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd"))):
        why = f"PyTorch finds none, with CUDA_VISIBLE_DEVICES {visible}"
        complaints = [FOR_CPUS_ONLY if for_cpus_only() else why]
    return number, first_line(complaints[0]).removeprefix("CUDA initialization: ") if complaints else ""


def for_cpus_only():
    return not (torch.version.cuda or torch.version.hip)


def why_no_gpu():
    """In brackets, or nothing where it is not known."""
    _, why = gpus()
    if for_cpus_only():
        why = FOR_CPUS_ONLY
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


NO_MEMORY = (  # words in what allocators say, PyTorch's own on a CPU and those of CUDA's libraries
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",
    "cublasCreate",  # CUBLAS_STATUS_NOT_INITIALIZED: no room is left for it
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
        for sign, message in LACKING.items():
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
