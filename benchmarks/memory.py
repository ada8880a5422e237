"""Peak memory and time of a step: whole batch, --grad_checkpointing, --micro_batch of a quarter, and both.

python -m benchmarks.memory                                         CPU, fp32, ViT-B/16, 384x128, batch 32
python -m benchmarks.memory --device cuda --batch_size 64           a GPU, fp16 as published

Each arm runs in a process of its own, since memory that a process has once used shows in all that follows;
the arms take turns. On Linux's CPUs what is freed goes back at once, so that what counts is memory in use
and not how an allocator's heap falls to pieces; that costs each arm a little time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.harness import new_parser, peak_memory, record, timed
from model import build_model
from processor.trainer import backward
from solver import build_optimizer
from utils.batch import Batch
from utils.device import pick_device

NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc
ARMS = {  # whether activations are computed twice, how many parts a batch is cut into
    "whole batch": (False, 1),
    "--grad_checkpointing": (True, 1),
    "--micro_batch, a quarter": (False, 4),
    "both": (True, 4),
}
WHOLE = "whole process: weights, gradients, Adam's two moments, libraries"
ABOVE = "above weights, Adam's two moments and libraries"
FIGURES = {  # of what `measure` found: its key, factor to the unit, unit, note
    "peak memory": ("peak", 2**-20, "MiB", WHOLE),
    "peak memory of activations and gradients": ("beyond", 2**-20, "MiB", ABOVE),
    "time": ("seconds", 1000, "ms", ""),
    "CPU time": ("cpu_seconds", 1000, "ms", "of all threads"),
}
ROOT = Path(__file__).parent.parent


def measure(name, args):
    """{peak, beyond: bytes, seconds, cpu_seconds} of a step."""
    torch.set_num_threads(args.threads)
    chosen, device = step.options(args.device, args.precision, args.tiny), pick_device(args.device)
    chosen.grad_checkpointing, pieces = ARMS[name]
    torch.manual_seed(0)
    model = build_model(chosen, step.PERSONS).train()
    optimizer = build_optimizer(chosen, model)
    whole = Batch.of(step.batch_of(args.batch_size, chosen.img_size))

    def one_step(batch):
        optimizer.zero_grad(set_to_none=True)
        backward(model, batch, device, -(-args.batch_size // pieces) if pieces > 1 else None)
        optimizer.step()

    one_step(whole.parts(2)[0])  # Adam's moments come into being
    optimizer.zero_grad(set_to_none=True)
    found, (seconds, cpu_seconds) = timed(peak_memory, lambda: one_step(whole), device, device=device)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": found[0], "beyond": found[1]}


def main(argv=None):
    parser = new_parser(__doc__, batch_size=32, repeats=1)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return
    found = {name: [] for name in ARMS}
    for _ in range(args.repeats):
        for name in ARMS:
            command = [sys.executable, "-m", "benchmarks.memory", *words, f"--arm={name}"]
            how = {"stdout": subprocess.PIPE, "text": True, "check": True, "cwd": ROOT}
            said = subprocess.run(command, env={**os.environ, **NO_HEAP}, **how).stdout
            found[name].append(json.loads(said.splitlines()[-1]))
    device = torch.device(args.device)
    what = step.named(args, step.options(args.device, args.precision, args.tiny))
    for figure, (key, factor, unit, note) in FIGURES.items():
        if found["whole batch"][0][key] is None or (figure == "CPU time" and device.type != "cpu"):
            continue
        arms = {name: factor * statistics.median(one[key] for one in all_) for name, all_ in found.items()}
        record(f"{what}, parts: {figure}", arms, unit, "whole batch", device=device, note=note)


if __name__ == "__main__":
    main()
