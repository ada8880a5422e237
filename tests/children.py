"""Trainings in processes of their own, to be signalled and killed; quick, since PyTorch is loaded once."""

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the optimisers load it at their first step
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (here to be loaded once, as what follows)

import datasets.build  # noqa: F401
import model  # noqa: F401
import processor.training  # noqa: F401
import train
from datasets.synthetic import make_dataset
from tests.conftest import PATIENCE
from utils.data_sets import DATA_SETS

START_METHOD = multiprocessing.get_start_method()  # of the loading processes, as in a program of its own
ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
ARCHITECTURE = (
    "embed_dim=64 vision_width=64 vision_layers=1 vision_patch_size=16 transformer_width=64 "
    "transformer_layers=1"
).split()


def draw(folder, train_ids=12, size=(64, 32)):
    """A drawn data set, small enough for an epoch of a few steps; returns the folder for --root_dir."""
    make_dataset(folder / "data", train_ids=train_ids, val_ids=4, test_ids=4, images_per_id=2, size=size)
    return folder / "data"


def rewritten(root_dir, name="CUHK-PEDES"):
    """A drawn data set whose training records have what --second_caption reads: of the first caption two
    groups of two sentences, of the others a text."""
    path = root_dir / name / DATA_SETS[name].files[0]
    records = json.loads(path.read_text())
    for record in records:
        if record["split"] == "train":
            first, *others = record["captions"]
            groups = [[first, f"Seen here: {first}"], ["It is a street.", "The ground is grey."]]
            record["diversity_captions"] = [groups, *(f"Once more, {caption}" for caption in others)]
    path.write_text(json.dumps(records))
    return root_dir


def words(root_dir, output_dir, *more, epochs=3, loss_names="sdm+id"):
    """The command line of a training of a second: 6 batches of 8 captions an epoch, 3 million weights."""
    return [
        *("--root_dir", str(root_dir), "--output_dir", str(output_dir), "--device", "cpu"),
        *("--pretrain_choice", "random", "--clip_architecture", *ARCHITECTURE),
        *("--img_size", "64", "32", "--text_length", "48", "--cmt_depth", "1", "--img_aug", "--MLM"),
        *("--loss_names", loss_names, "--lr", "1e-3", "--batch_size", "8", "--warmup_epochs", "1"),
        *("--num_epoch", str(epochs), "--log_period", "2", "--num_workers", "0", *more),
    ]


class Cue(logging.Handler):
    """Signals this process and its loading processes when a line is logged, as a terminal or a batch system
    would: the sender is a process of its own, since loading processes tell their parent's signals apart."""

    def __init__(self, text, number):
        super().__init__()
        self.text, self.number = text, number

    def emit(self, record):
        if self.text in record.getMessage():
            sender = os.fork()
            if not sender:
                signal.signal(self.number, signal.SIG_IGN)
                os.killpg(os.getpgrp(), self.number)
                os._exit(0)
            os.waitpid(sender, 0)


def train_in_child(argv, output, *cues):
    """What start runs in the process that it starts."""
    os.setsid()
    multiprocessing.set_start_method(START_METHOD, force=True)  # a child of a forkserver has its method
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    torch.set_num_threads(1)
    for cue in cues:
        handler = Cue(*cue)
        for name in ("IRRA.train", "IRRA.eval"):
            logging.getLogger(name).addHandler(handler)
    sys.exit(train.main(argv))


def start(argv, output, *cues, way=train_in_child):
    """Start `train.py argv`; what it prints is appended to the file output.

    cues: (text, signal number), to have the whole group signalled as soon as a log line holds the text.
    way: what the process runs, a function of the tests' own that does something to train_in_child.
    """
    process = CONTEXT.Process(target=way, args=(list(map(str, argv)), str(output), *cues))
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)  # for the server's first start
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return process


def end(process, seconds=PATIENCE):
    """Exit status, or minus the signal's number."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the training did not end within {seconds} s")
    return process.exitcode


def run(argv, output, *cues, seconds=PATIENCE, way=train_in_child):
    return end(start(argv, output, *cues, way=way), seconds)


def only_run(output_dir):
    (folder,) = Path(output_dir).glob("*/*_*")
    return folder


def differences(one, other, where=""):
    """Where two checkpoints differ in type, keys or a single bit, as a list of places."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__}, {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(one.contiguous().view(-1).view(torch.uint8), _bytes(other))
        return [] if same else [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: keys {list(one)}, {list(other)}"]
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} entries, {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one}, {other}"]


def _bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def differ(one, other):
    """The same of two files."""
    return differences(torch.load(one, weights_only=True), torch.load(other, weights_only=True))


def progress_lines(folder):
    """What the log says of training and evaluation, without times, speeds and the folder's name."""
    text = re.sub(r"Saving checkpoint to .*/", "Saving to ", (folder / "train_log.txt").read_text())
    text = re.sub(r" Time per batch: .*", "", text)
    said = [re.sub(r"^\S+ \S+ IRRA\S* \w+: ", "", line) for line in text.splitlines()]
    return [line for line in said if re.match(r"Epoch|Validation|Saving|best R1|\| *t2i", line)]


def wait_for(condition, process, seconds=PATIENCE):
    """Poll until the condition holds; False when the process ended before."""
    limit = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        if time.monotonic() > limit:
            process.kill()
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.0005)
    return True


def kill(process):
    """SIGKILL; returns whether it came before the process had ended by itself."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL
