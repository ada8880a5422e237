"""The picture files of a folder: which there are, and what tells that one has changed."""

import errno
import hashlib
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image

from utils.errors import InputError

COARSE = 2_000_000_000  # ns, the coarsest clock of a file system
NOT_LOOKED_INTO = {  # in lower case: thumbnails, and what was deleted, of network storage and of systems
    *("@eadir", "@recycle", "#recycle", "#snapshot"),
    *("$recycle.bin", "system volume information", "lost+found", "__macosx"),
}
NOT_READ = frozenset(  # suffixes of pictures that Pillow does not read: of phones, of cameras, of drawings
    ".heic .heif .hif .jxl .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .dng .orf .rw2 .raf .pef .srw .x3f .3fr "
    ".svg .xcf .psb .avif".split()  # AVIF: before Pillow 11.3
)


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    size: int
    mtime_ns: int
    ctime_ns: int | None = None  # moves too where another file of that size and time is put there


class Picture(NamedTuple):
    """A file that an index knows."""

    row: int  # of its features; equal features are there once
    stamp: Stamp
    digest: str  # digest_of its bytes, "" where that is not known


def stamp_of(state):
    return Stamp(state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def agree(known, found):
    """Whether two stamps are of the same state of a file."""
    return known == found or (known.ctime_ns is None and known[:2] == found[:2])


def settled(stamp, read_from):
    """The stamp of a file that was read at that time or later (ns). Changed just before, it could change once
    more in the same tick of the file system's clock: then it gets a time that no file has, so that its bytes
    are compared next time."""
    recent = stamp.ctime_ns is not None and stamp.ctime_ns > read_from - COARSE
    return stamp._replace(ctime_ns=0) if recent else stamp


def digest_of(path):
    """Of a file's bytes, 32 characters; None where they cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while some := file.read(1 << 20):
                digest.update(some)
    except OSError:
        return None
    return digest.hexdigest()


def digests_of(folder, paths, workers):
    """Yields (relative path, digest_of it) in order, a few hundred read at a time."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 256):
            some = paths[start : start + 256]
            files = [os.path.join(folder, path) for path in some]
            yield from zip(some, pool.map(digest_of, files), strict=True)


def scan(folder):
    """({relative path: Stamp} of the pictures in a folder and below, in order; {suffix: other files};
    {folder: why it, or a file in it, cannot be read}; [links to nothing, as where a disk is away]).

    A picture is a file that bears one of the suffixes that Pillow opens: no pipe, which nobody may ever fill.
    Hidden files and folders, and those NOT_LOOKED_INTO, are passed over; links are followed, each folder is
    looked into once.
    """
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found, others, visited, away, dead = {}, Counter(), set(), {}, []

    def cannot_look(error):
        away[os.path.relpath(error.filename, folder)] = error.strerror

    for directory, folders, files in os.walk(folder, onerror=cannot_look, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name.lower() not in NOT_LOOKED_INTO
        )
        for name in files:
            if name.startswith("."):
                continue
            path, suffix = os.path.join(directory, name), os.path.splitext(name)[1].lower()
            if suffix not in suffixes and (os.path.exists(path) or not os.path.islink(path)):
                others[suffix] += 1
                continue
            try:
                state = os.stat(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # gone, or a link to nothing
                    away[os.path.relpath(directory, folder)] = error.strerror
                elif os.path.islink(path):
                    dead.append(os.path.relpath(path, folder))
                continue
            if stat.S_ISREG(state.st_mode):
                found[os.path.relpath(path, folder)] = stamp_of(state)
    return dict(sorted(found.items())), others, away, dead


def below(path, places):
    """Whether a relative path is one of the places, or lies below one."""
    return path in places or any(str(folder) in places for folder in PurePath(path).parents)


def stamps_of(folder, paths):
    """{relative path: Stamp} of a list of files below a folder, in the list's order."""
    try:
        return {os.path.relpath(path, folder): stamp_of(os.stat(path)) for path in paths}
    except OSError as error:
        raise InputError(f"the picture {error.filename} cannot be read: {error.strerror}") from None
