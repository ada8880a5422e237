"""The index of a gallery on disk: a FAISS file, and the table of pictures that names it."""

import contextlib
import json
import os
import uuid
from collections import Counter
from pathlib import Path

from retrieval.pictures import Picture, Stamp
from utils.errors import InputError
from utils.extras import extra
from utils.files import remove, remove_leftovers, whole_file, write_whole

TABLE, LAYOUT = "table.json", 2  # 1 held a vector for each picture, copies too, and no digests
MEND = "start again with --rebuild, or give another --index"


def read_table(folder):
    """The table of the index in a folder, with `pictures` and `unreadable` as a GalleryIndex has them."""
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        if table["layout"] != LAYOUT:
            raise InputError(f"the index in {folder} is of another version of search.py: {MEND}")
        stamps = map(Stamp, *(table[name] for name in ("sizes", "mtimes_ns", "ctimes_ns")))
        pictures = map(Picture, map(int, table["rows"]), stamps, table["digests"])
        table["pictures"] = dict(zip(table["paths"], pictures, strict=True))
        table["unreadable"] = {path: (Stamp(*stamp), why) for path, *stamp, why in table["unreadable"]}
        os.path.join(table["gallery"], table["vectors"], table["kind"], table["fingerprint"])  # they are text
    except OSError as error:
        raise InputError(f"the index in {folder} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"the index in {folder} is damaged ({TABLE}): {MEND}") from None
    return table


def check_table(table, folder, gallery, fingerprint, found=None):
    """InputError where it is of another model or gallery. found: {relative path: Stamp} of the gallery, by
    which one that was moved is told from another one."""
    home, fault = table["gallery"], None
    if table["fingerprint"] != fingerprint:
        fault = "was made with another model or image size, so its features cannot be compared"
    elif home != os.path.abspath(gallery):
        if not has_moved(table, gallery):
            fault = f"is of the pictures in {home}, not of {gallery}"
        elif found is not None and 2 * in_common(table, found) < len(table["pictures"]):
            fault = f"is of pictures in {home}, which are not there now, and most are not in {gallery} either"
    if fault:
        raise InputError(f"the index in {folder} {fault}: {MEND}")


def has_moved(table, gallery):
    """Whether the gallery of an index is no longer where it was: its pictures are not (what is left may be an
    empty folder, where a disk was mounted), or that place is another name of `gallery`."""
    home = table["gallery"]
    if home == os.path.abspath(gallery):
        return False  # another choice of its pictures has an index of its own
    with contextlib.suppress(OSError):
        if os.path.samefile(home, gallery):
            return True
    return not any(os.path.lexists(os.path.join(home, path)) for path in table["paths"])


def in_common(table, found):
    """How many pictures of an index a gallery seems to hold, by name and size."""
    known = Counter((os.path.basename(path), p.stamp.size) for path, p in table["pictures"].items())
    return (known & Counter((os.path.basename(path), stamp.size) for path, stamp in found.items())).total()


def read_vectors(folder, table, width):
    """The FAISS index that a table names."""
    faiss, name = extra("faiss"), Path(table["vectors"]).name
    try:
        with open(folder / name, "rb") as file:
            vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    except (FileNotFoundError, RuntimeError):
        raise InputError(f"the index in {folder} is damaged ({name}): {MEND}") from None
    except OSError as error:
        raise InputError(f"the index in {folder} cannot be read ({name}): {error.strerror}") from None
    rows = {picture.row for picture in table["pictures"].values()}
    if not rows <= set(range(vectors.ntotal)) or vectors.d != width:
        raise InputError(f"the index in {folder} is damaged ({name} does not fit {TABLE}): {MEND}")
    return vectors


def write_index(index):
    """Write a GalleryIndex so that the table, replaced last and in one step, names a whole vector file.
    Returns that file's name."""
    faiss, folder, pictures = extra("faiss"), index.folder, index.pictures.values()
    name = index.file or f"vectors-{uuid.uuid4().hex[:12]}.faiss"
    table = {
        "layout": LAYOUT,
        "fingerprint": index.fingerprint,
        "gallery": os.path.abspath(index.gallery),
        "kind": index.kind,
        "vectors": name,
        "paths": index.paths,
        "rows": [picture.row for picture in pictures],
        "sizes": [picture.stamp.size for picture in pictures],
        "mtimes_ns": [picture.stamp.mtime_ns for picture in pictures],
        "ctimes_ns": [picture.stamp.ctime_ns for picture in pictures],
        "digests": [picture.digest for picture in pictures],
        "unreadable": [[path, *stamp, reason] for path, (stamp, reason) in index.unreadable.items()],
    }
    try:
        if not index.file:
            with whole_file(folder / name) as file:  # by Python: FAISS takes no name that is not UTF-8
                faiss.write_index(index.faiss, faiss.PyCallbackIOWriter(file.write))
        write_whole(folder / TABLE, json.dumps(table))
    except InputError:
        if not index.file:
            remove(folder / name)
        raise
    for old in folder.glob("vectors-*.faiss"):
        if old.name != name:
            remove(old)
    remove_leftovers(folder)
    return name
