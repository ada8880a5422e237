"""The data sets, a row each, and which of them the options name.

run_irra.sh asks here whether one is there, before anything is installed: `python3 -m utils.data_sets FLAGS`,
those of train.py, is silent, or says what is missing and ends with status 2. So nothing but the standard
library.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError, reports_errors


class DataSet(NamedTuple):
    files: tuple  # names that the annotation file goes by, the usual one first
    path_key: str  # key of the image path in a record
    offer: str  # where its authors offer it
    captions_per_image: int  # usually, and in a drawn set
    first_pid: int = 0  # training ids start here
    published: dict | None = None  # split: (ids, images, captions) as the papers give them
    raw_file: str = ""  # comes in the same archive and is taken for the annotation file
    old_ids: tuple = ()  # persons of train, val, test in a file that its authors have replaced
    shares_captions: bool = False  # some captions belong to several persons, as is known


DATA_SETS = {
    "CUHK-PEDES": DataSet(
        files=("reid_raw.json",),
        path_key="file_path",
        offer="https://github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
        captions_per_image=2,
        first_pid=1,
        published={"train": (11003, 34054, 68126), "test": (1000, 3074, 6156), "val": (1000, 3078, 6158)},
        raw_file="caption_all.json",
    ),
    "ICFG-PEDES": DataSet(
        files=("ICFG-PEDES.json", "ICFG_PEDES.json"),
        path_key="file_path",
        offer="https://github.com/zifyloo/SSAN",
        captions_per_image=1,
        published={"train": (3102, 34674, 34674), "test": (1000, 19848, 19848), "val": (0, 0, 0)},
    ),
    "RSTPReid": DataSet(
        files=("data_captions.json",),
        path_key="img_path",
        offer="https://github.com/NjtechCVLab/RSTPReid-Dataset",
        captions_per_image=2,
        published={"train": (3701, 18505, 37010), "test": (200, 1000, 2000), "val": (200, 1000, 2000)},
        old_ids=(3901, 100, 100),
        shares_captions=True,
    ),
}
DEFAULT = "CUHK-PEDES"


# ---- which one the options name ----


def name_of(args):
    """The data set's name for folders and tables: --annotations without its suffix, or --dataset_name."""
    return Path(args.annotations).stem if args.annotations else args.dataset_name


def absolute(path):
    """The type of --annotations and --images: a run's configs.yaml is read from other folders too."""
    return os.path.abspath(os.path.expanduser(str(path)))


def options_over(before, typed):
    """Options {name: value} with those of a command line over them.

    What names the data set goes together: another --annotations comes without the --images of the earlier
    one, and --dataset_name takes both away.
    """
    another = "dataset_name" in typed and "annotations" not in typed
    if another or typed.get("annotations", before["annotations"]) != before["annotations"]:
        before = {**before, "annotations": None, "images": None}
    return {**before, **typed}


def check_data_options(args):
    if args.images and not args.annotations:
        raise InputError(
            f"--images {args.images} goes with --annotations FILE, whose image paths start there; a named "
            "data set has its own images (see --root_dir)"
        )


def ignored_name(args):
    """What the log says of a --dataset_name beside --annotations, or None."""
    if args.annotations and args.dataset_name != DEFAULT:
        return (
            f"--dataset_name {args.dataset_name} is ignored: the data set is --annotations {args.annotations}"
        )
    return None


# ---- is it there? ----


def find_data_set(name, root_dir):
    """(annotation file, folder of images) of a data set below root_dir; InputError where one is not there."""
    row, folder = DATA_SETS[name], Path(root_dir) / name
    files, images = [folder / file for file in row.files], folder / "imgs"
    file = next((file for file in files if file.is_file()), None)
    if file and images.is_dir():
        return file, images
    missing = [] if file else [f"no annotation file at {' or '.join(map(str, files))}"]
    if not images.is_dir():
        missing.append(f"no folder {images}: its images belong there")
    hint = ""
    if not os.path.isdir(root_dir):
        hint = f" ({root_dir} does not exist, seen from {os.getcwd()})"
    elif not file and (folder / row.raw_file).is_file():
        hint = (
            f" ({row.raw_file} is the raw file; {files[0].name}, with the splits, comes in the same archive)"
        )
    else:
        with contextlib.suppress(OSError):  # there is no such folder, or it may not be read
            there = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
            hint = f" ({folder} holds {', '.join(there[:8]) or 'nothing'})"
    raise InputError(
        f"{name}: {', and '.join(missing)}{hint}. Is --root_dir right? It is the folder that holds {name}/, "
        f"which its authors offer at {row.offer}; ./run_irra.sh demo needs none"
    )


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--dataset_name", "--root_dir", "--annotations"):
        parser.add_argument(flag)
    args, _ = parser.parse_known_args(argv)  # other flags and names without a row are for train.py to judge
    if args.dataset_name in DATA_SETS and not args.annotations:
        find_data_set(args.dataset_name, args.root_dir)


if __name__ == "__main__":
    sys.exit(main())
