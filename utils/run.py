"""A run's folder: what is written there, and the log."""

import logging
import os
import sys
import time
from logging.handlers import MemoryHandler
from pathlib import Path

from utils.errors import InputError

NOT_SAVED = ("config_file", "notes", "debug", "run_dir")


def new_run_folder(args):
    """OUTPUT_DIR/DATASET/TIME_NAME, not made yet: that waits until data and model have proved good."""
    if not args.name or Path(args.name).name != args.name:
        raise InputError(
            f'--name "{args.name}" becomes part of a folder name: it may not be empty or hold a /'
        )
    root = Path(args.output_dir) / args.dataset_name
    while (folder := root / f"{time.strftime('%Y%m%d_%H%M%S')}_{args.name}").exists():
        time.sleep(0.1)
    return folder


def make_folder(folder):
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{folder} has just been made by another run: start this one again") from None
    except OSError as error:
        raise InputError(
            f"cannot make the run folder {folder}: {error.strerror} (see --output_dir)"
        ) from None


def write_whole(path, data):
    """Write text or bytes so that `path` holds either all of it or what it held before."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched"
        ) from None


def save_configs(args, folder):
    """configs.yaml as the published test.py reads it: every option, plain lists, no Python tags."""
    import yaml

    options = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    write_whole(Path(folder) / "configs.yaml", yaml.safe_dump(options))


class BarHandler(logging.StreamHandler):
    """Log lines on a terminal, written above the progress bar instead of through it."""

    def emit(self, record):
        bar = sys.modules.get("tqdm")
        if bar is None:
            return super().emit(record)
        bar.tqdm.write(self.format(record), file=self.stream)


def setup_logger(name):
    """The logger `name`, to the terminal; what it says is also held back for keep_log."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(BarHandler(sys.stdout))
    logger.addHandler(MemoryHandler(1 << 20, flushOnClose=False))
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    return logger


def keep_log(logger, path):
    """From here on the log also goes to a file, appended, with what was said before."""
    terminal, held = logger.handlers
    try:
        file = logging.FileHandler(path, encoding="utf-8")
    except (
        OSError
    ) as error:  # a published run may lie in a read-only place: the table still reaches the terminal
        logger.warning(f"no log is kept at {path}: {error.strerror}")
        return
    file.setFormatter(terminal.formatter)
    held.setTarget(file)
    held.flush()
    logger.removeHandler(held)
    logger.addHandler(file)
