"""The three data sets' annotation files, read by one parser into records."""

import json
import logging
import os
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from utils.data_sets import DATA_SETS
from utils.errors import InputError

logger = logging.getLogger("IRRA.dataset")
SOURCES = DATA_SETS  # the name that forks import


class TrainSample(NamedTuple):
    """One caption of one training image."""

    pid: int  # 0 … K - 1
    image_id: int  # counts the training images
    image_path: str
    caption: str


class EvalSplit(NamedTuple):
    """Gallery: image_paths with image_pids. Queries: captions with caption_pids. Ids as in the file."""

    image_pids: list
    image_paths: list
    caption_pids: list
    captions: list


class Splits(NamedTuple):
    name: str
    train: list  # of TrainSample
    num_classes: int  # training persons K
    train_split: EvalSplit  # the training images as gallery and queries, for --split train
    test: EvalSplit
    val: EvalSplit


def annotation_file(dataset_name, root_dir):
    """The data set's annotation file; says where it looked when there is none."""
    source, folder = SOURCES[dataset_name], Path(root_dir) / dataset_name
    for name in source.files:
        if (folder / name).is_file():
            return folder / name
    looked = " or ".join(str(folder / name) for name in source.files)
    hint = ""
    if not Path(root_dir).is_dir():
        hint = f" ({root_dir} does not exist)"
    elif source.raw_file and (folder / source.raw_file).is_file():
        hint = (
            f" ({source.raw_file} is the raw file; {source.files[0]}, with the splits, comes in the same "
            "archive)"
        )
    raise InputError(
        f"{dataset_name}: no annotation file at {looked}{hint}. Is --root_dir right? The authors offer it "
        f"at {source.offer}; ./run_irra.sh demo needs none"
    )


def read_records(path):
    """The JSON list that an annotation file holds."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): is the download complete?") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{path} must hold a list of records, but holds {_kind(records)}")
    return records


def _kind(value):
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_record(record, number, path, path_key):
    """(split, pid, relative image path, captions) of one record, or an error that names record and key."""
    where = f"{path}, record {number}"
    if not isinstance(record, dict):
        raise InputError(
            f"{where} is {_kind(record)}, not a record with the keys split, id, {path_key}, captions"
        )
    for key in ("split", "id", path_key, "captions"):
        if key not in record:
            raise InputError(f'{where} has no key "{key}" (it has {", ".join(map(str, list(record)[:6]))})')
    split, pid, image, captions = record["split"], record["id"], record[path_key], record["captions"]
    try:
        pid = int(pid) if isinstance(pid, (int, str)) and not isinstance(pid, bool) else None
    except ValueError:
        pid = None
    if pid is None or abs(pid) >= 2**62:  # PyTorch's whole numbers
        raise InputError(
            f"{where}: id must be a whole number of at most 18 digits, not {_short(record['id'])}"
        )
    if not isinstance(split, str):
        raise InputError(f"{where}: split must be a word such as train, not {_short(split)}")
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: {path_key} must be the path of an image, not {_short(image)}")
    if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts or "\0" in image:
        raise InputError(f"{where}: {path_key} {_short(image)} leaves the image folder")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{where}: captions must be a list of sentences")
    return split, pid, image, captions


def read_splits(dataset_name, root_dir, images_must_exist=True):
    """All splits of a data set below root_dir. Every image is looked up, none is decoded.

    Every split other than train and test counts as val, as in the published code.
    """
    source = SOURCES[dataset_name]
    path = annotation_file(dataset_name, root_dir)
    images = path.parent / "imgs"
    if not images.is_dir():
        raise InputError(
            f"{dataset_name}: no folder {images}: its images belong there, as the data set comes"
        )
    train, image_id = [], 0
    eval_splits = {name: EvalSplit([], [], [], []) for name in ("train", "test", "val")}
    for number, record in enumerate(read_records(path)):
        split, pid, image, captions = check_record(record, number, path, source.path_key)
        image_path = os.path.join(images, image)
        if split == "train":
            pid -= source.first_pid
            train += [TrainSample(pid, image_id, image_path, caption) for caption in captions]
            image_id += 1
        into = eval_splits[split if split in ("train", "test") else "val"]
        into.image_pids.append(pid)
        into.image_paths.append(image_path)
        into.caption_pids.extend([pid] * len(captions))
        into.captions.extend(captions)
    pids = set(eval_splits["train"].image_pids)
    check_training_ids(dataset_name, pids, source.first_pid, path)
    if images_must_exist:
        check_images(dataset_name, (p for s in eval_splits.values() for p in s.image_paths), images)
    logger.info(f"=> {dataset_name} Images and Captions are loaded")
    return Splits(
        dataset_name, train, len(pids), eval_splits["train"], eval_splits["test"], eval_splits["val"]
    )


def check_training_ids(dataset_name, pids, first, path):
    """Training pids must be 0 … K - 1: they index the classifier's rows."""
    if not pids:
        return
    last = max(pids) + first
    missing = max(pids) + 1 - sum(pid >= 0 for pid in pids)  # counted, not listed: a mistyped id may be huge
    if missing or min(pids) < 0:
        found = f"{min(pids) + first} occurs"
        if missing:
            example = next(n for n in range(len(pids) + 1) if n not in pids)
            found = f"{missing} are missing, e.g. {example + first}"
        raise InputError(
            f"{dataset_name}: training ids must be {first}..{last} without a gap, but {found} ({path.name})"
        )


def missing_images(image_paths):
    """Those that are not there; each folder is listed once."""
    by_folder = defaultdict(list)
    for path in image_paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for directory, paths in by_folder.items():
        try:
            present = set(os.listdir(directory))
        except (OSError, ValueError):  # ValueError: a name that no file can have
            present = set()
        missing += [path for path in paths if os.path.basename(path) not in present]
    return missing


def number_missing(paths):
    return "1 image is missing" if len(paths) == 1 else f"{len(paths)} images are missing"


def check_images(dataset_name, image_paths, folder):
    """Every image must be there: all missing ones are counted, the first is named."""
    missing = missing_images(image_paths)
    if missing:
        below = sorted({os.path.relpath(os.path.dirname(path), folder) for path in missing})
        raise InputError(
            f"{dataset_name}: {number_missing(missing)}, the first is {min(missing)[:300]}; unpack "
            f"into {folder} (below: {', '.join(below[:7])[:300]}{', …' if len(below) > 7 else ''})"
        )


def statistics_table(splits):
    """The published log's table: ids, images and captions of each subset."""
    from prettytable import PrettyTable

    table = PrettyTable(["subset", "ids", "images", "captions"])
    for subset, split in (("train", splits.train_split), ("test", splits.test), ("val", splits.val)):
        table.add_row([subset, len(set(split.image_pids)), len(split.image_pids), len(split.captions)])
    return table


def log_statistics(splits):
    logger.info(f"{splits.name.replace('-', '')} Dataset statistics:")
    logger.info(f"\n{statistics_table(splits)}")
