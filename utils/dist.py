"""Where the work runs. The only place that names the accelerator."""

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
