"""A run's folder: what is written there, and the log."""

import logging
import os
import sys
import time
from pathlib import Path

from utils.errors import InputError

NOT_SAVED = ("config_file", "notes", "debug", "run_dir")


def new_run_folder(args):
    """OUTPUT_DIR/DATASET/TIME_NAME, made; a second run within the same second waits for the next one."""
    if not args.name or Path(args.name).name != args.name:
        raise InputError(
            f'--name "{args.name}" becomes part of a folder name: it may not be empty or hold a /'
        )
    root = Path(args.output_dir) / args.dataset_name
    while True:
        folder = root / f"{time.strftime('%Y%m%d_%H%M%S')}_{args.name}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not root.is_dir():
                raise InputError(f"{root} is not a folder: runs are kept in --output_dir") from None
            time.sleep(0.1)
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


def setup_logger(name, folder, training=True):
    """The logger `name` writes to the terminal and to train_log.txt or test_log.txt in the folder, appending."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers = [BarHandler(sys.stdout)]
    try:
        handlers.append(logging.FileHandler(Path(folder) / ("train_log.txt" if training else "test_log.txt")))
    except (
        OSError
    ) as error:  # a published run may lie in a read-only place: the table still goes to the terminal
        print(f"note: no log is kept in {folder}: {error.strerror}", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    return logger
