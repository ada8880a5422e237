"""What the benchmarks share: options, arms that take turns, their memory, a line of JSON a figure."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils.errors import ready_output

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
CLOCKS = ("time", "CPU time")  # the second counts all threads; other work hardly lengthens it
OPTIONS = {  # of several benchmarks
    "device": {"default": "cpu"},
    "precision": {},
    "batch_size": {"type": int},
    "repeats": {"type": int, "default": 5},
    "threads": {"type": int, "default": torch.get_num_threads()},
    "tiny": {"action": "store_true", "help": "a tiny model: whether the benchmark runs at all"},
}


def new_parser(description, names=OPTIONS, **defaults):
    """A benchmark's parser with those of OPTIONS that it has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def timed(run, *arguments, device=CPU):
    """(what it returns, (seconds, seconds of CPU of all threads))."""
    synchronise(device)
    start = time.perf_counter(), time.process_time()
    found = run(*arguments)
    synchronise(device)
    return found, (time.perf_counter() - start[0], time.process_time() - start[1])


def interleaved(arms, repeats=5, warm_up=1, device=CPU):
    """Functions that take turns, so that a busy machine is busy for all of them.

    Returns for each of CLOCKS {name: median seconds}.
    """
    taken = {name: [] for name in arms}
    for turn in range(warm_up + repeats):
        for name, run in arms.items():
            times = timed(run, device=device)[1]  # what it returns is not kept while the next one runs
            if turn >= warm_up:
                taken[name].append(times)
    return tuple(
        {name: statistics.median(times[clock] for times in all_times) for name, all_times in taken.items()}
        for clock in range(len(CLOCKS))
    )


def record_times(what, arms, repeats, warm_up=1, device=CPU, **details):
    """Record the seconds that the arms take by each of CLOCKS. details: of `record`."""
    for seconds, clock in zip(interleaved(arms, repeats, warm_up, device), CLOCKS, strict=True):
        record(f"{what}, {clock}", seconds, "s", device=device, **details)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run, device=CPU):
    """(peak, extra) bytes: the most that the process held while `run` ran, and how far that is above before.

    On CUDA what PyTorch allocated; else the resident memory of the whole process (Linux), libraries included.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = held(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
        return peak, peak - before
    if not os.path.exists("/proc/self/clear_refs"):
        return None, None
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier arm freed goes back first
    before = held()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run()
    peak = _status("VmHWM")
    return peak, peak - before


def held(device=CPU):
    """Bytes that PyTorch has allocated on CUDA; else the process's resident memory (Linux; elsewhere 0)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if os.path.exists("/proc/self/status") else 0


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def record(figure, arms, unit, baseline="published", better="less", device=CPU, **details):
    """Print one figure as a JSON line and add it to benchmarks/results. arms: {name: number}.

    ratio: of each arm to the baseline, above 1 where the arm is better. better: less or more of the unit.
    """
    reference = arms.get(baseline)
    ratio = {
        name: round(value / reference if better == "more" else reference / value, 3)
        for name, value in arms.items()
        if reference and value and name != baseline
    }
    arms = {name: float(f"{value:.5g}") for name, value in arms.items()}
    keep(figure, device, unit=unit, arms=arms, ratio=ratio, **details)


def left_out(figure, arm, reason, device=CPU):
    """Say in a line of its own why a figure has no such arm."""
    keep(figure, device, left_out={arm: reason})


def keep(figure, device=CPU, **line):
    """At once: what a later part does loses nothing of it."""
    program = Path(sys.argv[0]).stem
    line = {
        **{"figure": figure, "unit": "", "arms": {}, "ratio": {}, **line},
        "command": " ".join([f"python -m benchmarks.{program}", *sys.argv[1:]]),
        "machine": machine(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(line, ensure_ascii=False)
    ready_output()
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(results_file(), "a", encoding="utf-8") as file:
        file.write(text + "\n")


def results_file():
    """Where this program's lines are kept."""
    return RESULTS / f"{Path(sys.argv[0]).stem}.jsonl"


def machine(device=CPU):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


def versions():
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "Pillow", "faiss-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found
