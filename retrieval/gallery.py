"""What search.py and demo.py do first: a gallery's index is found, brought up to date and kept."""

import contextlib
import os
from pathlib import Path

from retrieval.encoders import shown
from retrieval.index import TABLE, GalleryIndex, has_moved, in_common, read_table
from retrieval.pictures import NOT_READ, Stamp, scan, stamps_of
from utils.data_sets import ignored_name
from utils.errors import InputError
from utils.files import cannot_write, lock
from utils.progress import progress_bar

__all__ = ["GalleryIndex", "Stamp", "open_gallery"]  # a gallery for other programs, from one room


@contextlib.contextmanager
def locked(folder, say):
    """Only one program at a time changes an index. A folder that cannot be written needs no lock."""
    try:
        file = open(Path(folder) / ".lock", "w")
    except OSError:
        yield
        return
    with file:
        if not lock(file):
            say(f"waiting for another program that updates the index in {folder}")
            lock(file, wait=True)
        yield


def default_folder(run_dir, gallery, split=None, annotations=None):
    """RUN/search/<name>-<where>: each gallery of a run has its own."""
    import zlib

    where = os.path.abspath(gallery)
    name = Path(where).name or "root"
    what = f"{where}\n{split or ''}" + (f"\n{os.path.abspath(annotations)}" if split and annotations else "")
    tag = zlib.crc32(what.encode("utf-8", "surrogateescape"))
    return Path(run_dir) / "search" / f"{split or name}-{tag:08x}"


def kept_folder(encoders, args, gallery, found, say):
    """The folder of a gallery's index: --index, or the default one. An index of this run whose gallery was
    moved comes along: it gets the new name."""
    if args.index:
        return Path(args.index)
    folder = default_folder(args.run_dir, gallery, args.split, args.annotations)
    if (folder / TABLE).exists():
        return folder
    for other in sorted(path.parent for path in folder.parent.glob(f"*/{TABLE}")):
        with contextlib.suppress(InputError):
            table = read_table(other)
            number = len(table["paths"])
            if (
                table["fingerprint"] == encoders.fingerprint
                and 2 * (same := in_common(table, found)) >= max(number, len(found), 1)
                and has_moved(table, gallery)
            ):
                say(
                    f"the index of {shown(table['gallery'])} is gone on with: {same} of its "
                    f"{plural(number, 'picture')} lie in {shown(gallery)} now"
                )
                return renamed(other, folder, say)
    return folder


def renamed(old, folder, say):
    """The folder of an index under its new name; or where it was, if it cannot be renamed."""
    with locked(old, say), contextlib.suppress(OSError):
        return old.rename(folder)
    return old


def open_gallery(encoders, args, say, progress=True):
    """The up-to-date index of the gallery that the options name. say: takes a line about what was done.
    progress: whether a bar shows how far it is."""
    away = {}
    if args.split is None:
        gallery, (found, others, away) = Path(args.gallery), scan(args.gallery)
        for path, why in away.items():
            say(f"the folder {shown(gallery / path)} cannot be read ({why}): what is known of it stays")
        if not found and not away:
            raise InputError(
                f"there is no picture in {args.gallery} or below it"
                + (f" ({others.total()} files, none with a picture's suffix)" if others else "")
                + unread_hint(others)
            )
        if others:
            number = plural(others.total(), "file")
            say(f"{number} without a picture's suffix passed over{unread_hint(others)}")
    else:
        if ignored := ignored_name(args):
            say(ignored)
        gallery, found = split_pictures(args)
    folder = kept_folder(encoders, args, gallery, found, say)
    unwritable = cannot_be_kept(folder)  # known before an hour of encoding, not after it
    with locked(folder, say):
        known = (folder, gallery, encoders.fingerprint, encoders.width)
        index = GalleryIndex(*known) if args.rebuild else GalleryIndex.load(*known, None if away else found)
        if unwritable:
            if index.stale(found):
                say(f"the index cannot be kept in {folder}: {unwritable} (see --index); it stays in memory")
            index.folder = None
        change = index.update(
            found,
            lambda paths: encode_below(encoders, index, paths, args, progress),
            args.index_type,
            say,
            away,
        )
    for path, reason in change.unreadable.items():
        say(f"passed over: {reason}" if shown(path) in reason else f"passed over: {shown(path)}: {reason}")
    earlier = len(index.unreadable) - len(change.unreadable)
    where = f"the index {folder}" if index.folder else "memory"
    say(
        f"{plural(len(index), 'picture')} in {where}: {change.encoded} encoded, {change.removed} removed, "
        f"{change.kept} kept"
        + (f", {change.recognised} known by content" if change.recognised else "")
        + (f"; {earlier} unreadable as before" if earlier else "")
    )
    if not len(index):
        raise InputError(f"none of the {len(found)} files in {gallery} is a picture that can be read")
    return index


def cannot_be_kept(folder):
    """Why nothing can be written in a folder, which is made if it is not there; or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return cannot_write(folder)


def unread_hint(others):
    """What to do where files of a phone's or a camera's format were passed over."""
    *found, last = sorted(NOT_READ & others.keys()) or [""]
    names = " and ".join(filter(None, [", ".join(found), last]))
    return f"; {names} are not read here: export them as JPEG first" if names else ""


def plural(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


def split_pictures(args):
    from datasets.annotations import read_splits, source_of

    source = source_of(args, args.split)
    paths = read_splits(source).by_name[args.split].image_paths
    if not paths:
        raise InputError(f"{source.path} has no images in the {args.split} split: choose another one")
    return source.images, stamps_of(source.images, paths)


def encode_below(encoders, index, paths, args, progress):
    """Encoders.encode_files with paths relative to the index's gallery, what it does not know yet by content,
    and a progress bar."""
    full = {os.path.join(index.gallery, path): path for path in paths}
    with progress_bar(len(paths), "pictures", progress, unit="img") as bar:
        unknown = (
            os.path.join(index.gallery, path) for path in index.unknown(paths, args.num_workers, bar.update)
        )
        for good, features, bad in encoders.encode_files(unknown, args.encode_batch, args.num_workers):
            yield [full[path] for path in good], features, {full[path]: why for path, why in bad.items()}
            bar.update(len(good) + len(bad))
