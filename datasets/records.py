"""Annotation files as records: those of the named data sets, and JSON, JSON lines, CSV and TSV by path."""

import csv
import io
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError
from utils.option_types import nearest

DELIMITERS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES, *DELIMITERS)
COLUMNS = ("image", "caption", "person", "split")
KEYS = {  # of a JSON record; the first that it has
    "image": ("image", "file_path", "img_path"),
    "captions": ("captions", "caption"),
    "person": ("person", "id", "pid"),
}
TABLE_KEYS = {  # other columns of a table are no concern of ours: `id` is often the row's number
    "image": ("image",),
    "captions": ("caption",),
    "person": ("person",),
}
OTHERWISE = (  # how a file begins that is no text in UTF-8, and what it is
    (b"PK\3\4", "an Excel workbook or a zip: save its sheet as CSV UTF-8, or unpack it first"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"\xff\xfe", "text in UTF-16, as Excel's Unicode text: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer to the file: `git lfs pull` gets it"),
    (b"<", "a web page saved under this name: download the file itself"),
)
WHOLE = re.compile(r"-?[0-9]{1,18}")  # 18 digits fit into PyTorch's whole numbers


class Beside(NamedTuple):
    """What a training record may hold for each of its captions besides, under a key of its own."""

    option: str  # that reads it
    form: str  # of an entry, in words
    fits: Callable  # whether an entry has it


def is_groups(value):
    if not isinstance(value, list) or not value:
        return False
    lists = all(isinstance(group, list) and group for group in value)
    return lists and all(isinstance(text, str) for group in value for text in group)


BESIDE = {  # by key of a JSON record
    "diversity_captions": Beside(
        "second_caption",
        "a text, or a list of groups that are lists of texts, none of them empty",
        lambda value: isinstance(value, str) or is_groups(value),
    ),
    "captions_bt": Beside("back_translation", "a text", lambda value: isinstance(value, str)),
}


class Record(NamedTuple):
    """What an annotation file says of one image."""

    split: str  # None while the file names none
    person: int | str
    image: str  # relative to the images' folder
    captions: list
    beside: dict  # {key of BESIDE: an entry for each caption}, of those that were asked for


# ---- a named data set's file ----


def read_records(path, path_key, keys=()):
    """The records of a JSON list with the keys split, id, path_key and captions. keys: of BESIDE, which are
    read of training records too."""
    return [check_record(entry, number, path, path_key, keys) for number, entry in enumerate(read_list(path))]


def check_record(entry, number, path, path_key, keys=()):
    """The Record of one entry, or an error that names record and key."""
    where = f"{path}, record {number}"
    if not isinstance(entry, dict):
        raise InputError(
            f"{where} is {_kind(entry)}, not a record with the keys split, id, {path_key}, captions"
        )
    for key in ("split", "id", path_key, "captions"):
        if key not in entry:
            raise InputError(f'{where} has no key "{key}" (it has {_names(entry)})')
    pid = entry["id"]
    try:
        pid = int(pid) if isinstance(pid, (int, str)) and not isinstance(pid, bool) else None
    except ValueError:
        pid = None
    if pid is None or abs(pid) >= 2**62:  # PyTorch's whole numbers
        raise InputError(
            f"{where}: id must be a whole number of at most 18 digits, not {_short(entry['id'])}"
        )
    split = check_split(entry["split"], where)
    image = check_image(entry[path_key], path_key, where)
    captions = check_captions(entry["captions"], where)
    return Record(split, pid, image, captions, captions_beside(entry, captions, split, keys, where))


def check_split(split, where):
    if not isinstance(split, str):
        raise InputError(f"{where}: split must be a word such as train, not {_short(split)}")
    return split


def check_image(image, key, where):
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: {key} must be the path of an image, not {_short(image)}")
    image = image.replace("\\", "/")  # a file made on Windows
    if image.startswith("/") or ".." in image.split("/") or "\0" in image:
        raise InputError(
            f"{where}: {key} {_short(image)} leaves the image folder: paths start there, as in cam_a/1.jpg"
        )
    return posixpath.normpath(image)  # ./a.jpg is the same image as a.jpg


def check_captions(captions, where):
    listed = isinstance(captions, list)
    wrong = [one for one in captions if not isinstance(one, str)] if listed else [captions]
    if wrong:
        what = f"and holds {_short(wrong[0])}" if listed else f"not {_short(captions)}"
        raise InputError(f"{where}: captions must be a list of sentences, {what}")
    return captions


def captions_beside(entry, captions, split, keys, where):
    """{key: an entry for each caption}. keys: of BESIDE."""
    found = {}
    for key in keys if split == "train" and captions else ():
        option, form, fits = BESIDE[key]
        if key not in entry:
            raise InputError(
                f'{where} has no key "{key}" (it has {_names(entry)}), which --{option} reads of each '
                "training record: add an entry for each of its captions, or leave the option out"
            )
        found[key] = listed = entry[key]
        needed = len(captions)
        if not isinstance(listed, list) or len(listed) != needed:
            what = len(listed) if isinstance(listed, list) else _kind(listed)
            raise InputError(
                f"{where}: {key} must be a list with an entry for each caption, so {needed}, not {what}"
            )
        for one in listed:
            if not fits(one):
                raise InputError(f"{where}: an entry of {key} must be {form}, not {_short(one)}")
    return found


# ---- a file by path ----


def read_records_by_path(path, split=None, keys=()):
    """The records of any JSON, JSON lines, CSV or TSV file. split: that of a file that names none. keys: of
    BESIDE, which are read of training records too.

    Entries with a single caption belong together where image, person and split are the same.
    """
    table = path.suffix.lower() in DELIMITERS
    if table and keys:
        raise InputError(
            f'{path} cannot hold "{keys[0]}", which --{BESIDE[keys[0]].option} reads: a table has no lists; '
            "JSON and JSON lines have"
        )
    records, by_image, unsplit, some_have = [], {}, None, False
    for where, entry in entries(path):
        record, single = record_of(entry, where, TABLE_KEYS if table else KEYS, keys)
        if record.split is None:
            unsplit = unsplit or (where, entry)
        else:
            some_have = True
        known = by_image.get(record[:3]) if single else None
        if known:
            known.captions.extend(record.captions)
            for key, entries_of_one in record.beside.items():
                known.beside.setdefault(key, []).extend(entries_of_one)
            continue
        records.append(record)
        if single:
            by_image[record[:3]] = record
    if not records:
        raise InputError(f"{path} holds no record")
    if not unsplit:
        return records
    where, entry = unsplit
    thing = "column" if table else "key"
    if some_have:
        raise InputError(f'{where} has no {thing} "split" (it has {_names(entry)}), but other records have')
    if split is None:
        raise InputError(
            f'{path} has no {thing} "split" (it has {_names(entry)}): add one that says train, val or test; '
            "only a program that is given --split can do without"
        )
    return [record._replace(split=split) for record in records]


def record_of(entry, where, names_of_keys, keys=()):
    """(Record, whether its key is the single `caption`). keys: see read_records_by_path."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {_kind(entry)}, not a record with the keys {', '.join(COLUMNS)}")
    own = {}
    for name, names in names_of_keys.items():
        own[name] = next((key for key in names if key in entry), None)
        if own[name] is None:
            wanted = " or ".join(f'"{key}"' for key in names)
            raise InputError(f"{where} has no key {wanted} (it has {_names(entry)})")
    split = check_split(entry["split"], where).strip().lower() if "split" in entry else None
    if split == "":
        raise InputError(f"{where}: split is empty: write train, val or test")
    image = entry[own["image"]]
    image = check_image(image.strip() if isinstance(image, str) else image, own["image"], where)
    captions, single = entry[own["captions"]], own["captions"] == "caption"
    if single:
        if not isinstance(captions, str):
            raise InputError(f"{where}: caption must be a sentence, not {_short(captions)}")
        captions = [captions] if captions.strip() else []  # an image that no caption describes
    person = person_of(entry[own["person"]], own["person"], where)
    captions = check_captions(captions, where)
    beside = captions_beside(entry, captions, split, keys, where)
    return Record(split, person, image, captions, beside), single


def person_of(value, key, where):
    """A whole number, also one in quotes, is a number (so "007" is 7); anything else is text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    sound = isinstance(value, (int, str)) and not isinstance(value, bool) and text
    if not sound and not (isinstance(value, float) and abs(value) < float("inf")):
        raise InputError(f"{where}: {key} must be a number or a text, not {_short(value)}")
    return int(text) if WHOLE.fullmatch(text) else text


def entries(path):
    """Yields (place, entry) of each entry of the file."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        found = read_list(path, ": is it whole? JSON lines are named .jsonl")
        for number, entry in enumerate(found):
            yield f"{path}, record {number}", entry
    elif suffix in LINES:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse_json(line, where, ": each line holds one record")
    elif suffix in DELIMITERS:
        yield from rows(path, *DELIMITERS[suffix])
    else:
        raise InputError(f"{path}: the suffix says how to read it, and must be one of {', '.join(SUFFIXES)}")


def rows(path, delimiter, delimiters):
    """The rows of a table below its header, each as {column: text}. A row may go over several lines."""
    text = io.StringIO(read_text(path), newline="")
    reader, header = csv.reader(text, delimiter=delimiter, strict=True), None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{where} cannot be read as a row ({error}): a field with quotes in it is put in quotes, and "
                "they are doubled"
            ) from None
        if row is None:
            break
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = check_header(row, where, delimiters)
        elif len(row) != len(header):
            raise InputError(
                f"{where} has {len(row)} fields and the header {len(header)}: a caption with {delimiters} in "
                "it is put in quotes"
            )
        else:
            yield where, dict(zip(header, row, strict=True))
    if header is None:
        raise InputError(f"{path} is empty: its first line names the columns {', '.join(COLUMNS)}")


def check_header(row, where, delimiters):
    header = [name.strip().lower() for name in row]
    for name in COLUMNS:
        if header.count(name) > 1:
            raise InputError(f'{where} names the column "{name}" twice')
        if name not in header and name != "split":
            close = nearest(name, [other for other in header if other not in COLUMNS])
            meant = close.replace("did you mean", "is that") or f", with {delimiters} between them"
            raise InputError(
                f'{where} has no column "{name}" (it has {_names(header)}): the first line names the columns '
                f"{', '.join(COLUMNS)}{meant}"
            )
    return header


# ---- files and values ----


def read_text(path):
    """Text in UTF-8; a byte order mark, as Windows' editors put it first, is no part of it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for begin, what in OTHERWISE:
        if data.startswith(begin):
            raise InputError(f"{path} cannot be read: it is {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} cannot be read: it is not text in UTF-8, as it must be") from None


def parse_json(text, where, hint=""):
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}){hint}") from None


def read_list(path, hint=": is the download complete?"):
    """The list, not empty, that a JSON file holds."""
    found = parse_json(read_text(path), path, hint)
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} must hold a list of records, but holds {_kind(found)}")
    return found


def _kind(value):
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _names(keys):
    return ", ".join(map(str, list(keys)[:6]))[:200] or "none"
