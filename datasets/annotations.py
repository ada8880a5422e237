"""Annotation files, read by one parser into splits: a named data set's, or any file by path."""

import logging
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from datasets.records import SUFFIXES, read_records, read_records_by_path
from utils.data_sets import DATA_SETS, DataSet, check_data_options, find_data_set, name_of
from utils.errors import InputError
from utils.files import neighbours

logger = logging.getLogger("IRRA.dataset")
SOURCES = DATA_SETS  # the name that forks import


class Source(NamedTuple):
    """Where a data set lies."""

    name: str
    path: Path  # the annotation file
    images: Path  # the folder that its image paths start from
    row: DataSet | None = None  # of utils.data_sets; None: given by path
    split: str | None = None  # given by path: the split of a file that names none


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

    @property
    def counts(self):
        """(persons, images, captions)"""
        return len(set(self.image_pids)), len(self.image_pids), len(self.captions)


class Splits(NamedTuple):
    train: list  # of TrainSample
    num_classes: int  # training persons K
    train_split: EvalSplit  # the training images as gallery and queries, for --split train
    test: EvalSplit
    val: EvalSplit
    source: Source
    persons: dict  # {(whether of train, pid): the person as in the file}, where that is not the pid
    words: dict  # {word for a split, as in the file: images}
    beside: dict  # {key of records.BESIDE: an entry for each training sample}, of those asked for

    @property
    def name(self):
        return self.source.name

    @property
    def by_name(self):
        return {"train": self.train_split, "test": self.test, "val": self.val}

    def person(self, split, pid):
        """A person of the split named so, as in the file."""
        return self.persons.get((split == "train", pid), pid)


# ---- where a data set lies ----


def source_of(args, split=None):
    """The Source that the options name. split: that of a file by path which names none itself."""
    check_data_options(args)
    if not args.annotations:
        return named_source(args.dataset_name, args.root_dir)
    path = Path(args.annotations)
    images = Path(args.images) if args.images else path.parent
    if not path.is_file():
        raise InputError(f"no annotation file at --annotations {path}{neighbours(path, SUFFIXES)}")
    if not images.is_dir():
        raise InputError(f"no folder --images {images}: the image paths in {path} start there")
    return Source(name_of(args), path, images, split=split)


def named_source(dataset_name, root_dir):
    return Source(dataset_name, *find_data_set(dataset_name, root_dir), DATA_SETS[dataset_name])


# ---- splits ----


def read_splits(source, root_dir=None, images_must_exist=True, keys=()):
    """All splits of a data set. Every image is looked up, none is decoded.

    source: a Source, or the name of a data set below root_dir. keys: of records.BESIDE, what the training
    records are to hold besides.
    Every split other than train and test counts as val, as in the published code.
    """
    if isinstance(source, str):
        source = named_source(source, root_dir)
    if source.row:
        records = read_records(source.path, source.row.path_key, keys)
        pids = {(r.split == "train", r.person): r.person for r in records}
        pids.update({key: pid - source.row.first_pid for key, pid in pids.items() if key[0]})
    else:
        records = read_records_by_path(source.path, source.split, keys)
        pids = numbered(records, source)
    train, beside, image_id = [], {key: [] for key in keys}, 0
    eval_splits = {name: EvalSplit([], [], [], []) for name in ("train", "test", "val")}
    for record in records:
        pid = pids[record.split == "train", record.person]
        image_path = os.path.join(source.images, record.image)
        if record.split == "train":
            train += [TrainSample(pid, image_id, image_path, caption) for caption in record.captions]
            for key, of_captions in record.beside.items():
                beside[key] += of_captions
            image_id += 1
        into = eval_splits[record.split if record.split in ("train", "test") else "val"]
        into.image_pids.append(pid)
        into.image_paths.append(image_path)
        into.caption_pids.extend([pid] * len(record.captions))
        into.captions.extend(record.captions)
    train_pids = set(eval_splits["train"].image_pids)
    if source.row and train_pids:
        check_training_ids(source, train_pids)
    if images_must_exist and (missing := missing_images(eval_splits)):
        raise InputError(f"{source.name}: {told_missing(source, missing)}")
    logger.info(f"=> {source.name} Images and Captions are loaded")
    return Splits(
        train=train,
        num_classes=len(train_pids),
        train_split=eval_splits["train"],
        test=eval_splits["test"],
        val=eval_splits["val"],
        source=source,
        persons={(trains, pid): person for (trains, person), pid in pids.items() if person != pid},
        words=Counter(record.split for record in records),
        beside=beside,
    )


def numbered(records, source):
    """{(whether of train, person): pid}: training persons are 0 … K - 1 in order, numbers before texts.
    Those of the other splits keep their ids, unless one of them is a text: then they are numbered too."""
    said, pids = [], {}
    for trains, who in ((True, "training persons"), (False, "persons of the other splits")):
        people = {record.person for record in records if (record.split == "train") == trains}
        people = sorted(people, key=lambda person: (isinstance(person, str), person))
        if trains or any(isinstance(person, str) for person in people):
            pids |= {(trains, person): pid for pid, person in enumerate(people)}
            done = f"are numbered 0..{len(people) - 1}"
        else:
            pids |= {(trains, person): person for person in people}
            done = "keep their ids"
        if people:
            said.append(f"{len(people)} {who} {done}")
    logger.info(f"{source.path}: {', '.join(said)}")
    words = Counter(record.split for record in records if record.split not in ("train", "test", "val"))
    if words:
        shown = ", ".join(f'"{word}" ({images} images)' for word, images in words.most_common(10))
        logger.warning(f"{source.path}: the split {shown} counts as val")
    return pids


def check_training_ids(source, pids):
    """Training pids must be 0 … K - 1: they index the classifier's rows."""
    first = source.row.first_pid
    last = max(pids) + first
    missing = max(pids) + 1 - sum(pid >= 0 for pid in pids)  # counted, not listed: a mistyped id may be huge
    if missing or min(pids) < 0:
        found = f"{min(pids) + first} occurs"
        if missing:
            example = next(n for n in range(len(pids) + 1) if n not in pids)
            found = f"{missing} are missing, e.g. {example + first}"
        raise InputError(
            f"{source.name}: training ids must be {first}..{last} without a gap, but {found} "
            f"({source.path.name})"
        )


def missing_images(splits):
    """The paths of those that are not there; each folder is listed once. splits: {name: EvalSplit}."""
    by_folder = defaultdict(set)
    for split in splits.values():
        for path in split.image_paths:
            by_folder[os.path.dirname(path)].add(path)
    missing = []
    for directory, paths in by_folder.items():
        try:
            with os.scandir(directory) as entries:  # of links only those that lead somewhere
                present = {e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)}
        except (OSError, ValueError):  # ValueError: a name that no file can have
            present = set()
        missing += [path for path in paths if os.path.basename(path) not in present]
    return missing


def told_missing(source, missing):
    """How many images are missing, which is the first and why, which folders lack some, and what to do."""
    number, first = len(missing), min(missing)
    counted = "1 image is missing" if number == 1 else f"{number} images are missing"
    lacking = Counter(os.path.dirname(path) for path in missing).most_common(7)
    folders = [
        f"{number} in {os.path.relpath(folder, source.images.parent)}"
        + ("" if os.path.isdir(folder) else ", a folder that does not exist")
        for folder, number in lacking
    ]
    mend = f"is the archive unpacked whole into {source.images}?"
    if source.row is None:
        mend = f"is --images {source.images} where the paths in {source.path} start?"
    return f"{counted}, the first is {first[:300]}{why_missing(first)}; {', '.join(folders)[:300]}: {mend}"


def why_missing(path):
    """What explains that an image is not there, as far as the folders on its way tell; or nothing."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        return f" (file names here are {encoding}, which has no such letters: set PYTHONUTF8=1)"
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):  # it is the first folder not there that may be explained
        folder, name = os.path.split(folder)
    try:
        present = os.listdir(folder or ".")
    except OSError as error:
        return f" (its folder cannot be read: {error.strerror})"
    if os.path.islink(os.path.join(folder, name)):
        return " (it is a link to nothing: is its disk there?)"
    alike = next((other for other in present if spelled(other) == spelled(name)), None)
    if alike in (None, name):
        return ""
    case = alike.lower() == name.lower()
    return f" ({'upper and lower case' if case else 'spelled otherwise'}: there is {alike})"


def spelled(name):
    """A file's name whatever a computer or a program made of its letters: their case, é as one or as two
    characters (macOS), a space as %20 (an address), the kind of picture."""
    return os.path.splitext(unicodedata.normalize("NFC", unquote(name)).lower())[0]


def statistics_table(splits):
    """The published log's table: ids, images and captions of each subset."""
    from prettytable import PrettyTable

    table = PrettyTable(["subset", "ids", "images", "captions"])
    for subset, split in splits.by_name.items():
        table.add_row([subset, *split.counts])
    return table


def log_statistics(splits):
    logger.info(f"{splits.name.replace('-', '')} Dataset statistics:")
    logger.info(f"\n{statistics_table(splits)}")
