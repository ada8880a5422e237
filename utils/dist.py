"""Where the work runs. The only place that names the accelerator."""

from contextlib import contextmanager

import torch

from utils.errors import InputError


def pick_device(name="auto"):
    """torch.device for --device auto|cpu|cuda[:n]."""
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if str(name).startswith("cuda"):
        if not available:
            raise InputError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
        index = torch.device(name).index or 0
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
    return torch.device(name)


def pick_precision(name, device):
    """--precision, or the device's own: fp16 on CUDA as published, fp32 on a CPU."""
    return name or ("fp16" if device.type == "cuda" else "fp32")


def number_of_gpus(device):
    return 1 if device.type == "cuda" else 0


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
