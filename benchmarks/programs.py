"""Programs of a table, side by side: a device of its own for each, their CPU seconds, one end for all."""

import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from utils.errors import InputError

TOOK = "benchmarks.table: seconds of CPU: "  # in a run's log, before the number


class Stopping(Exception):
    """The table is being interrupted."""


class Programs:
    """gpus: what CUDA_VISIBLE_DEVICES is for each program that runs beside others; environment: what each of
    them has besides."""

    def __init__(self, gpus, **environment):
        self.environment = {"PYTHONUNBUFFERED": "1", **environment}
        self.gpus, self.running, self.stopping = SimpleQueue(), set(), False
        self.lock = threading.Lock()
        for gpu in gpus:
            self.gpus.put(gpu)

    def run(self, words, log, gpu):
        """Raises InputError with the last thing that a program said which did not end well."""
        env = {**os.environ, **self.environment}
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        with open(log, "ab") as file:
            before = file.tell()
            quiet = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            with self.lock:
                if self.stopping:
                    raise Stopping
                # a terminal's Ctrl-C does not reach it: it is told once, since twice would lose something
                process = subprocess.Popen([sys.executable, *words], env=env, start_new_session=True, **quiet)
                self.running.add(process)
        status, seconds = self.end_of(process)
        said = log.read_bytes()[before:].decode("utf-8", "replace").split("\n")
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{TOOK}{seconds:.1f}\n")
        if self.stopping:
            raise Stopping
        if status:
            last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
            ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise InputError(f"{Path(words[0]).name} {ended}: {last.removeprefix('error: ')} (see {log})")

    def end_of(self, process):
        """(status, seconds of CPU, with those of the processes that it has waited for) of a process."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self.lock:  # until it is reaped its number is nobody else's, and stop() may signal it
                self.running.discard(process)
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime
        process.wait()
        with self.lock:
            self.running.discard(process)
        return process.returncode, math.nan

    def stop(self):
        with self.lock:
            self.stopping = True
            for process in self.running:
                with suppress(ProcessLookupError):  # not terminate(), which would reap it
                    os.kill(process.pid, signal.SIGTERM)


def seconds_in(log):
    """Of CPU, all threads together, of all the programs that made a run; None where that is not known."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # made by hand, or elsewhere
        return None
    seconds = sum(float(line.removeprefix(TOOK)) for line in lines if line.startswith(TOOK))
    return round(seconds, 1) if seconds > 0 else None  # NaN is not


def gpus_for(jobs):
    """What CUDA_VISIBLE_DEVICES is to be for each job; None: as it is."""
    if jobs == 1:
        return [None]
    import torch

    number = torch.cuda.device_count()
    if 0 < number < jobs:
        raise InputError(f"--jobs {jobs}: a job has a GPU of its own, and {number} can be seen here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(number))
    return list(names)[:jobs] if number else [None] * jobs
