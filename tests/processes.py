"""Functions that run in several processes which form a group, as those that torchrun starts do; quick, since
they come from the forkserver of tests/children.py, which has loaded PyTorch."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train
from datasets import build_dataloader
from model import build_model, objectives
from processor.division import divide
from processor.evaluator import encode, evaluate
from processor.similarity import WordSimilarities
from processor.trainer import Steps, train_one_epoch
from solver import build_lr_scheduler, build_optimizer
from tests.children import CONTEXT, ROOT
from tests.conftest import PATIENCE, load_script
from utils.dist import gather, process_sum, replicate
from utils.losses import LOSSES, Loss
from utils.options import get_args
from utils.process_group import process_group

CPU = torch.device("cpu")
CONTEXT.set_forkserver_preload(["tests.children", __name__])


class Group:
    """Processes that run function(*arguments). One has no group, unless grouped says so.

    The store at which they meet lives here, as torchrun's does in its agent; a Group may inherit another's,
    as after a restart. environment: {name: value} for all.
    """

    def __init__(self, number, function, *arguments, grouped=False, environment=None, store=None):
        # it goes with the group: tests of whole models leave gigabytes
        self.kept = tempfile.TemporaryDirectory(prefix="processes_", ignore_cleanup_errors=True)
        self.folder = Path(self.kept.name)
        variables = {name: str(value) for name, value in (environment or {}).items()}
        if number > 1 or grouped:
            self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            variables.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(self.store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                WORLD_SIZE=str(number),
                LOCAL_WORLD_SIZE=str(number),
            )
        self.processes = []
        path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)  # for the server's start
        try:
            for rank in range(number):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in variables else {}
                work = (str(self.folder / str(rank)), {**variables, **own}, function, arguments)
                self.processes.append(CONTEXT.Process(target=_work, args=work))
                self.processes[-1].start()
        finally:
            os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)

    def end(self, seconds=PATIENCE):
        """Exit status of each; minus the signal's number where one ended a process."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(limit - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        if late:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"processes {late} did not end within {seconds} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def said(self, rank=None):
        """What process `rank`, or all, have printed."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join(path.read_text() for i in ranks if (path := self.folder / f"{i}.txt").exists())

    def results(self):
        """What the function returned in each process."""
        statuses = self.end()
        assert not any(statuses), f"{statuses}\n{self.said()}"
        return [
            torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(self.processes))
        ]


def together(number, function, *arguments, **options):
    return Group(number, function, *arguments, **options).results()


def _work(target, variables, function, arguments):
    os.environ.update(variables)
    output = os.open(f"{target}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    torch.save(function(*arguments), f"{target}.pt")


# ---- what the tests let them do ----


def gradients(sizes, values):
    """Process i has sizes[i] rows of values. Gradients of a loss of all rows for this process's rows, and for
    a weight that is the same in all, averaged as DistributedDataParallel does."""
    with process_group(CPU):
        start = sum(sizes[: rank_of_this()])
        rows = values[start : start + sizes[rank_of_this()]].clone().requires_grad_()
        weight = torch.ones(values.shape[1], dtype=values.dtype, requires_grad=True)
        loss = loss_of_all(gather(rows * weight), gather(rows), process_sum((rows * weight).sum()))
        loss.backward()
        if dist.is_initialized():
            dist.all_reduce(weight.grad)
        return loss.detach(), rows.grad / len(sizes), weight.grad / len(sizes)


def loss_of_all(x, y, z):
    """x and y: gathered; each gets its gradient from a sum of both, so that they share it. z: a total."""
    return ((x + y) @ (x + y).t()).tanh().sum() + z.sin()


def rank_of_this():
    return dist.get_rank() if dist.is_initialized() else 0


def train_some(argv, epochs):
    """Train as train.py does, without its files: what each step reported, the weights before and after, and
    how many samples of each batch this process had, and what --mask_by_similarity keeps."""
    args = get_args(argv)
    with process_group(CPU):
        return _train_some(args, epochs)


def train_with_loss(name, function, argv):
    """train_some for one epoch, with a loss of one's own in the table."""
    LOSSES[name] = Loss()
    setattr(objectives, f"compute_{name}", function)
    return train_some(argv, 1)


def _train_some(args, epochs):
    torch.manual_seed(args.seed)
    loader, *_, num_classes = build_dataloader(args)
    plain = build_model(args, num_classes)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer = build_optimizer(args, plain)
    scheduler = build_lr_scheduler(args, optimizer)
    model = replicate(plain, CPU, args.micro_batch)
    words = WordSimilarities(plain, loader, CPU, args.micro_batch) if args.mask_by_similarity else None
    reports, batches = [], Counted(loader if words is None else words)
    for epoch in range(1, epochs + 1):
        if words is not None:
            words.begin_epoch()
        loader.set_epoch(epoch)
        after_step = StepReports(reports)
        train_one_epoch(
            model, batches, optimizer, CPU, epoch, Steps(after_step=after_step, micro_batch=args.micro_batch)
        )
        scheduler.step()
    found = {"reports": reports, "start": start, "weights": plain.state_dict(), "sizes": batches.sizes}
    return {**found, "similarities": None if words is None else words.state()}


class Counted:
    def __init__(self, loader):
        self.loader, self.sizes = loader, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.sizes.append(len(batch["pids"]))
            yield batch


def train_each(argvs, epochs):
    """train_some of several command lines, one after the other."""
    return [train_some(argv, epochs) for argv in argvs]


class StepReports:
    """What each step adds to the meters."""

    def __init__(self, reports):
        self.reports, self.sums, self.weights = reports, 0, 0

    def __call__(self, step, meters):
        values = (meters.sums - self.sums) / (meters.weights - self.weights)
        self.sums, self.weights = meters.sums.clone(), meters.weights.clone()
        self.reports.append(dict(zip(meters.names, values.tolist(), strict=True)))


def batches_of(argvs, epoch, start=0):
    """For each command line, this process's share of each batch of an epoch."""
    with process_group(CPU):
        loaders = [build_dataloader(get_args(argv))[0] for argv in argvs]
        for loader in loaders:
            loader.set_epoch(epoch, start)
        return [list(loader) for loader in loaders]


def evaluate_split(argv):
    """({task: figures}, ranking) of the first model that the options give, on their split."""
    args = get_args(argv)
    with process_group(CPU):
        torch.manual_seed(args.seed)
        _, img_loader, txt_loader, num_classes = build_dataloader(args)
        model = build_model(args, num_classes)
        features = encode(model, img_loader, txt_loader, CPU)
        return evaluate(features, i2t=True), features


def main_of(script, argv, stop_at=None, number=signal.SIGTERM):
    """train.py's or test.py's main. stop_at: a line of the log at which this process gets a signal."""
    if stop_at:
        At(stop_at, lambda: signal.raise_signal(number))
    status = (train if script == "train" else load_script(script)).main(list(map(str, argv)))
    if status:
        raise SystemExit(status)


class At(logging.Handler):
    """From here on a function is called whenever a line of the log holds the text."""

    def __init__(self, text, function):
        super().__init__()
        self.text, self.function = text, function
        logging.getLogger("IRRA.train").addHandler(self)

    def emit(self, record):
        if self.text in record.getMessage():
            self.function()


def torchrun(number, output, what, text, *argv, options=()):
    """The exit status of the real torchrun, of one machine, which trains; `output` is for what all print.
    what: a function of HAPPENS, which the main process calls when its log holds the text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command += [*options, "-m", "tests.processes", what, text, *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        quiet = {"stdout": file, "stderr": file, "timeout": PATIENCE}
        return subprocess.run(command, env=environment, cwd=ROOT, **quiet).returncode


def kill_the_other():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(workers_of(os.getppid())[1], signal.SIGKILL)


def stop_torchrun():
    """Go on when torchrun has passed the signal on to this process."""
    answered, launcher = [], os.getppid()
    At("finishing the batch", lambda: answered.append(True))
    os.kill(launcher, signal.SIGTERM)
    while not answered and os.getppid() == launcher:
        time.sleep(0.01)


HAPPENS = {"kill the other": kill_the_other, "stop torchrun": stop_torchrun}


def workers_of(launcher):
    """Process ids of what torchrun has started, in order of rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks = [line[5:] for line in variables if line.startswith("RANK=")]
        if ranks:
            found[int(ranks[0])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def divided(argv):
    """processor.division's weights and counts before the first epoch."""
    args = get_args(argv)
    with process_group(CPU):
        torch.manual_seed(args.seed)
        loader, *_, num_classes = build_dataloader(args)
        loader.set_epoch(1)
        return divide(build_model(args, num_classes), loader, CPU, 5, False)


if __name__ == "__main__":  # as torchrun starts it
    what, text, *argv = sys.argv[1:]
    if os.environ["RANK"] == "0":
        At(text, HAPPENS[what])
    sys.exit(train.main(argv))
