"""Where runs are kept: OUTPUT_DIR/DATASET/TIME_NAME. Decided here, and here read again."""

import re
import time
from pathlib import Path

from utils.data_sets import name_of
from utils.errors import InputError, printable

NAMED = re.compile(r"\d{8}_\d{6}_(.*)")


def new_run_folder(args):
    """Not made yet: that waits until data and model have proved good."""
    if not args.name or Path(args.name).name != args.name or printable(args.name) != args.name:
        raise InputError(
            f'--name "{args.name}" becomes part of a folder name: it may not be empty or hold a /, a '
            "control character or what is not UTF-8"
        )
    folder = free_folder(Path(args.output_dir) / name_of(args), args.name)
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder.absolute())):
        raise InputError(
            f"--output_dir {folder.parent.absolute()}: TensorBoard cannot write where a name is not UTF-8"
        )
    return folder


def free_folder(root, name):
    while (folder := root / f"{time.strftime('%Y%m%d_%H%M%S')}_{name}").exists():
        time.sleep(0.1)
    return folder


def name_in(folder):
    """NAME of a run's folder; None where the folder is called in another way."""
    found = NAMED.fullmatch(Path(folder).name)
    return found and found[1]


def output_dir_in(folder):
    """The OUTPUT_DIR of a run's own folder, which its configs.yaml names; another folder as it is."""
    return str(Path(folder).parent.parent) if name_in(folder) is not None else folder


def newest_run(args):
    """last.pth of the newest run of this name."""
    folder = Path(args.output_dir) / name_of(args)
    runs = [path for path in sorted(folder.glob("*/last.pth")) if name_in(path.parent) == args.name]
    if not runs:
        raise InputError(
            f"nothing to resume: no run named {args.name} with a last.pth in {folder} (see "
            "--resume_ckpt_file)"
        )
    return runs[-1]


def results_of(run, checkpoint):
    """results, test.py's file of a run's best.pth; other checkpoints have files of their own."""
    run, checkpoint = Path(run), Path(checkpoint or Path(run) / "best.pth")
    return "results" if checkpoint.resolve() == (run / "best.pth").resolve() else f"results_{checkpoint.stem}"
