"""A run's folder: what is written there, the log, and the signals that end a run in good order."""

import argparse
import errno
import json
import logging
import os
import signal
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from utils.checkpoint import save_checkpoint
from utils.dist import from_main, launched, process_index, remember, world_size
from utils.errors import STOPS, InputError, fall_silent, may_ask_for_signals, printable
from utils.files import link_or_copy, lock, remove_leftovers, write_whole
from utils.run_folders import free_folder, new_run_folder

NOT_SAVED = ("config_file", "debug")


class RunFiles:
    """The folder of a run and what is written there: a new one, or `resumed`, that of the run which goes on.
    Of several processes the main one writes."""

    log = logging.getLogger("IRRA.train")

    def __init__(self, args, resumed=None):
        self.is_new = not resumed
        self.folder = Path(resumed) if resumed else from_main(new_run_folder(args))
        self.writes, self.events = process_index() == 0, None
        self.num_epoch = args.num_epoch
        # of the weights: what configs.yaml says for `auto`, and what each checkpoint says besides
        self._lock, self.found, self.kept = None, {}, {}
        if resumed and self.writes:
            self._take()

    def options(self, args):
        """{name: value} as published: output_dir is the run's own folder."""
        return {**vars(args), "output_dir": str(self.folder), "distributed": world_size() > 1}

    def described(self, args):
        """The options as the published log shows them."""
        return str(argparse.Namespace(**self.options(args))).replace(",", "\n")

    def open(self, args, logger, first_epoch=1):
        """Make the folder, start its log, its events and configs.yaml: now that data and model have proved
        good. Events of first_epoch and later, which an interrupted run has left, are taken back."""
        if not self.writes:
            return
        if self.is_new:
            self._make(args)
        remove_leftovers(self.folder)
        keep_log(logger, self.folder / "train_log.txt")
        self.save_configs(args)
        from torch.utils.tensorboard import SummaryWriter  # takes a second to load

        self.events = SummaryWriter(self.folder, purge_step=None if self.is_new else first_epoch)

    def _make(self, args):
        """Make the folder; under the next free name where a run begun in the same second has this one."""
        try:
            while True:
                try:
                    self.folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    if not self.folder.exists():  # it is a parent of it that is no folder
                        raise
                    self.folder = free_folder(self.folder.parent, args.name)
        except OSError as error:
            raise InputError(
                f"cannot make the run folder {self.folder}: {error.strerror} (see --output_dir)"
            ) from None
        self._take()

    def _take(self):
        """No two programs train one run: the second would write over what the first has saved."""
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError:
            return
        if not lock(self._lock):
            raise InputError(
                f"another program is training the run in {self.folder}: wait until it has ended, or stop it"
            )

    def board(self, epoch, **values):
        """Put named numbers on the TensorBoard."""
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, epoch)

    def picture(self, epoch, pixels):
        """Put a picture, uint8 [H, W, 3], on the TensorBoard."""
        if self.events:
            self.events.add_image("retrieval", pixels, epoch, dataformats="HWC")

    def save(self, name, parts, **values):
        """Write a checkpoint, whole or not at all; see utils.checkpoint."""
        if self.writes:
            save_checkpoint(self.folder / name, parts, num_epoch=self.num_epoch, **self.kept, **values)
            self.events.flush()
            if name == "last.pth":
                remember("run", str(self.folder.absolute()))  # should torchrun have to start it anew

    def close(self):
        if self.events:
            self.events.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save_configs(self, args):
        """configs.yaml as the published test.py reads it: every option, plain lists, no Python tags."""
        import yaml

        options = {key: value for key, value in self.options(args).items() if key not in NOT_SAVED}
        # the file can be a new run's --config_file
        options.update(self.found, resume=False, resume_ckpt_file="")
        write_whole(self.folder / "configs.yaml", yaml.safe_dump(options))

    def keep_numbered(self, epoch, keep):
        """Keep last.pth of the newest `keep` epochs as epoch_NNN.pth."""
        if not keep or not self.writes:
            return
        link_or_copy(self.folder / "last.pth", self.folder / f"epoch_{epoch:03d}.pth")
        for path in sorted(self.folder.glob("epoch_[0-9]*.pth"))[:-keep]:
            path.unlink(missing_ok=True)

    def keep_evidence(self, evidence):
        """Write what is needed to look at a batch that failed; returns the file."""
        path = self.folder / "bad_batch.json"
        if self.writes:
            write_whole(path, json.dumps(evidence, indent=1) + "\n")
        return path


def results_of(run, checkpoint):
    """results, test.py's file of a run's best.pth; other checkpoints have files of their own."""
    run, checkpoint = Path(run), Path(checkpoint or Path(run) / "best.pth")
    return "results" if checkpoint.resolve() == (run / "best.pth").resolve() else f"results_{checkpoint.stem}"


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved."""


class StopSignals:
    """While it lasts, the signals of STOPS, SIGHUP when a terminal goes, only set `asked`; a second one
    interrupts at once. One that is ignored, as SIGHUP under nohup, stays so.

    Not under torchrun: a batch system signals it and its processes, and it passes the signal on to them. It
    kills those that are not done in time.
    """

    def __init__(self, logger):
        self.asked, self.again, self.logger = False, False, logger

    def __enter__(self):
        heeded = [n for n in STOPS if may_ask_for_signals() and signal.getsignal(n) != signal.SIG_IGN]
        self.earlier = {number: signal.signal(number, self.ask) for number in heeded}
        return self

    def ask(self, number, frame):
        if self.asked:
            if launched():
                return
            self.again = True
            raise KeyboardInterrupt
        self.asked = True
        again = "" if launched() else " (again: stop at once, unsaved)"
        self.logger.info(f"{signal.Signals(number).name}: finishing the batch, then saving{again}")

    def __exit__(self, kind, error, trace):
        has_to_speak = launched() and isinstance(error, Exception) and not isinstance(error, Stopped)
        for number, handler in self.earlier.items():
            # torchrun sends SIGTERM to all when one has ended: each must still be able to say why it ends
            signal.signal(number, signal.SIG_IGN if has_to_speak and number == signal.SIGTERM else handler)


GRACE = 60  # seconds that a loading process goes on after a SIGTERM


def leave_signals_to_parent(worker):
    """A loading process's start: it gets a terminal's Ctrl-C and a batch system's SIGTERM too, and must go on
    loading while its parent finishes the batch. It ends when its parent does, or some time after a SIGTERM:
    that is also how Python ends, and waits for, the children that are left when a program is over."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def end_later(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(GRACE)  # nobody handles SIGALRM: it ends the process


class PlainFormatter(logging.Formatter):
    """Names and values of files may hold a terminal's control sequences: they are shown, not obeyed."""

    def format(self, record):
        return printable(super().format(record), keep="\n\t")


class BarHandler(logging.StreamHandler):
    """Log lines on a terminal, written above the progress bar instead of through it. Where nobody reads any
    more, as after `| head`, the program goes on without them."""

    def emit(self, record):
        bar = sys.modules.get("tqdm")
        try:
            if bar is None:
                self.stream.write(self.format(record) + self.terminator)
            else:
                bar.tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            fall_silent(self.stream)


class LogFile(logging.FileHandler):
    """A full disk ends the run with the sentence of utils.errors, not with a traceback for each line."""

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def setup_logger(name):
    """The logger `name`, to the terminal; what it says is also held back for keep_log. Of several processes
    the main one tells the story, the others speak of trouble only."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO if process_index() == 0 else logging.WARNING)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(BarHandler(sys.stdout))
    logger.addHandler(MemoryHandler(1 << 20, flushOnClose=False))
    for handler in logger.handlers:
        handler.setFormatter(PlainFormatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    return logger


def keep_log(logger, path):
    """From here on the log also goes to a file, appended, with what was said before."""
    terminal, held = logger.handlers
    try:
        file = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:  # a published run may lie in a read-only place: the terminal still has the table
        logger.warning(f"no log is kept at {path}: {error.strerror}")
        return
    file.setFormatter(terminal.formatter)
    held.setTarget(file)
    held.flush()
    logger.removeHandler(held)
    logger.addHandler(file)
