"""Annotation files as records: those of the named data sets, and JSON, JSON lines, CSV and TSV by path."""

import csv
import io
import json
import math
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError
from utils.file_kinds import BEGINNING, kind_of
from utils.option_types import nearest


class Form(NamedTuple):
    """What the keys of a record may be called: of each name the first that is there counts."""

    image: tuple
    captions: tuple
    person: tuple
    named: bool = False  # of a named data set: split is there, and as written; person is a whole number


DELIMITERS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES, *DELIMITERS)
COLUMNS = ("image", "caption", "person", "split")
# other columns of a table are no concern of ours: `id` is often the row's number
TABLE = Form(("image",), ("caption",), ("person",))
JSON = Form(("image", "file_path", "img_path"), ("captions", "caption"), ("person", "id", "pid"))
WHOLE = re.compile(r"-?[0-9]{1,18}")  # 18 digits fit into PyTorch's whole numbers


class Beside(NamedTuple):
    """What a training record may hold for each of its captions besides, under a key of its own."""

    option: str  # that reads it
    form: str  # of an entry, in words
    fits: Callable  # whether an entry has it


def is_text(value):
    return isinstance(value, str)


def is_list_of(fits, value):
    return isinstance(value, list) and value != [] and all(map(fits, value))


def is_text_or_groups(value):
    return is_text(value) or is_list_of(lambda group: is_list_of(is_text, group), value)


BESIDE = {  # by key of a JSON record
    "diversity_captions": Beside(
        "second_caption",
        "a text, or a list of groups that are lists of texts, none of them empty",
        is_text_or_groups,
    ),
    "captions_bt": Beside("back_translation", "a text", is_text),
}


def keys_beside(args):
    """The keys of BESIDE that these options read."""
    return [key for key, row in BESIDE.items() if getattr(args, row.option)]


class Record(NamedTuple):
    """What an annotation file says of one image."""

    split: str  # None while the file names none
    person: int | str
    image: str  # relative to the images' folder
    captions: list
    beside: dict  # {key of BESIDE: an entry for each caption}, of those that were asked for


# ---- files to records ----


def read_records(path, path_key, keys):
    """The records of a named data set's file: a JSON list with the keys split, id, path_key and captions.
    keys: of BESIDE, which are read of training records too."""
    form = Form((path_key,), ("captions",), ("id",), named=True)
    return [record_of(entry, where, form, keys)[0] for where, entry in entries(path)]


def read_records_by_path(path, split, keys):
    """The records of any JSON, JSON lines, CSV or TSV file. split: that of a file that names none, or None.
    keys: see read_records.

    Entries with a single caption belong together where image, person and split are the same.
    """
    form = TABLE if path.suffix.lower() in DELIMITERS else JSON
    if form is TABLE and keys:
        raise InputError(
            f'{path} cannot hold "{keys[0]}", which --{BESIDE[keys[0]].option} reads: a table has no lists; '
            "JSON and JSON lines have"
        )
    records, by_image, unsplit = [], {}, None
    for where, entry in entries(path):
        record, single = record_of(entry, where, form, keys)
        if record.split is None:
            unsplit = unsplit or (where, entry)
        first = by_image.setdefault(record[:3], record) if single else record
        if first is record:
            records.append(record)
            continue
        first.captions.extend(record.captions)
        for key, of_caption in record.beside.items():
            first.beside.setdefault(key, []).extend(of_caption)
    if not records:
        raise InputError(f"{path} holds no record")
    if not unsplit:
        return records
    where, entry = unsplit
    lacks = f'has no {"column" if form is TABLE else "key"} "split" (it has {_names(entry)})'
    if any(record.split for record in records):
        raise InputError(f"{where} {lacks}, but other records have")
    if split is None:
        raise InputError(
            f"{path} {lacks}: add one that says train, val or test; only a program that is given --split can "
            "do without"
        )
    return [record._replace(split=split) for record in records]


# ---- an entry to a record ----


def record_of(entry, where, form, keys):
    """(Record, whether its caption is a single one), or an error that names record and key."""
    if not isinstance(entry, dict):
        names = (form.image[0], form.captions[0], form.person[0], "split")
        raise InputError(f"{where} is {_kind(entry)}, not a record with the keys {', '.join(names)}")
    split = split_of(entry, where, form.named)
    image_key, captions_key, person_key = (_key(entry, names, where) for names in form[:3])
    image = image_of(entry[image_key], image_key, where)
    person = person_of(entry[person_key], person_key, where, form.named)
    captions = captions_of(entry[captions_key], captions_key, where)
    beside = captions_beside(entry, captions, split, keys, where)
    return Record(split, person, image, captions, beside), captions_key == "caption"


def split_of(entry, where, named):
    """The word for the split, in lower case but of a named set; None where a file by path has none."""
    if not named and "split" not in entry:
        return None
    split = entry[_key(entry, ("split",), where)]
    if not isinstance(split, str):
        raise InputError(f"{where}: split must be a word such as train, not {_short(split)}")
    if named:
        return split
    if not split.strip():
        raise InputError(f"{where}: split is empty: write train, val or test")
    return split.strip().lower()


def image_of(image, key, where):
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: {key} must be the path of an image, not {_short(image)}")
    image = image.strip().replace("\\", "/")  # a file made on Windows
    if image.startswith("/") or ".." in image.split("/") or "\0" in image:
        raise InputError(
            f"{where}: {key} {_short(image)} leaves the image folder: paths start there, as in cam_a/1.jpg"
        )
    return posixpath.normpath(image)  # ./a.jpg is the same image as a.jpg


def person_of(value, key, where, named):
    """A whole number, also one in quotes, is a number (so "007" is 7); anything else is text."""
    if isinstance(value, float) and value.is_integer() and not named:
        value = int(value)
    fits = type(value) in (int, str) or (isinstance(value, float) and math.isfinite(value))  # bool does not
    text = str(value).strip() if fits else ""
    if WHOLE.fullmatch(text):
        return int(text)
    if named or not text:
        wanted = "a whole number of at most 18 digits" if named else "a number or a text"
        raise InputError(f"{where}: {key} must be {wanted}, not {_short(value)}")
    return text


def captions_of(captions, key, where):
    if key == "caption":
        if not is_text(captions):
            raise InputError(f"{where}: caption must be a sentence, not {_short(captions)}")
        return [captions] if captions.strip() else []  # an image that no caption describes
    if not isinstance(captions, list):
        raise InputError(f"{where}: captions must be a list of sentences, not {_short(captions)}")
    for one in captions:
        if not is_text(one):
            raise InputError(f"{where}: captions must be a list of sentences, and holds {_short(one)}")
    return captions


def captions_beside(entry, captions, split, keys, where):
    """{key: an entry for each caption}. keys: of BESIDE."""
    if split != "train" or not captions:
        return {}
    for key in keys:
        option, form, fits = BESIDE[key]
        if key not in entry:
            raise InputError(
                f'{where} has no key "{key}" (it has {_names(entry)}), which --{option} reads of each '
                "training record: add an entry for each of its captions, or leave the option out"
            )
        listed, needed = entry[key], len(captions)
        if not isinstance(listed, list) or len(listed) != needed:
            what = len(listed) if isinstance(listed, list) else _kind(listed)
            raise InputError(
                f"{where}: {key} must be a list with an entry for each caption, so {needed}, not {what}"
            )
        for one in listed:
            if not fits(one):
                raise InputError(f"{where}: an entry of {key} must be {form}, not {_short(one)}")
    return {key: entry[key] for key in keys}


# ---- a file to entries ----


def entries(path):
    """Yields (place, entry) of each entry of the file."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        found = parse_json(read_text(path), path, ": is the download complete? JSON lines are named .jsonl")
        if not isinstance(found, list) or not found:
            mend = f" of {_names(found)}: put all records into one list" if isinstance(found, dict) else ""
            raise InputError(f"{path} must hold a list of records, but holds {_kind(found)}{mend}")
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
    text, header, where = io.StringIO(read_text(path), newline=""), None, f"{path}, line 1"
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                pass
            elif header is None:
                header = check_header(row, where, delimiters)
            elif len(row) != len(header):
                raise InputError(
                    f"{where} has {len(row)} fields and the header {len(header)}: a caption with "
                    f"{delimiters} in it is put in quotes"
                )
            else:
                yield where, dict(zip(header, row, strict=True))
            where = f"{path}, line {reader.line_num + 1}"
    except csv.Error as error:
        raise InputError(
            f"{where} cannot be read as a row ({error}): a field with quotes in it is put in quotes, and "
            "they are doubled"
        ) from None
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


def read_text(path):
    """Text in UTF-8; a byte order mark, as Windows' editors put it first, is no part of it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if what := data and kind_of(data[:BEGINNING]):  # of an empty one its reader says what it lacks
        raise InputError(f"{path} cannot be read: it is {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} cannot be read: it is not text in UTF-8, as it must be") from None


def parse_json(text, where, hint):
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}){hint}") from None


# ---- what messages show ----


def _kind(value):
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _names(keys):
    return ", ".join(map(str, list(keys)[:6]))[:200] or "none"


def _key(entry, names, where):
    """The first of the names that the entry has."""
    for name in names:
        if name in entry:
            return name
    wanted = " or ".join(f'"{name}"' for name in names)
    raise InputError(f"{where} has no key {wanted} (it has {_names(entry)})")
