"""What search.py and demo.py do first: a gallery's index is found, brought up to date and kept."""

import contextlib
import os
import zlib
from pathlib import Path

from retrieval.encoders import shown
from retrieval.index import GalleryIndex
from retrieval.index_file import TABLE, has_moved, in_common, read_table
from retrieval.pictures import NOT_READ, Stamp, scan, stamps_of
from retrieval.update import Update
from utils.data_sets import ignored_name
from utils.errors import InputError
from utils.files import cannot_write, lock, lock_file, make_folder
from utils.progress import progress_bar

__all__ = ["GalleryIndex", "Stamp", "open_gallery"]  # a gallery for other programs, from one room


@contextlib.contextmanager
def locked(folder, say):
    """Only one program at a time changes an index. A folder that cannot be written needs no lock."""
    if cannot_write(folder):
        yield
        return
    with lock_file(Path(folder) / ".lock") as file:
        if not lock(file):
            say(f"waiting for another program that updates the index in {folder}")
            lock(file, wait=True)
        yield


def default_folder(run_dir, gallery, split=None, annotations=None):
    """RUN/search/<name>-<where>: each gallery of a run has its own."""
    where = os.path.abspath(gallery)
    what = f"{where}\n{split or ''}" + (f"\n{os.path.abspath(annotations)}" if split and annotations else "")
    tag = zlib.crc32(what.encode("utf-8", "surrogateescape"))
    return Path(run_dir) / "search" / f"{split or Path(where).name or 'root'}-{tag:08x}"


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
                with locked(other, say), contextlib.suppress(OSError):
                    return other.rename(folder)
                return other  # which cannot be renamed
    return folder


def open_gallery(encoders, args, say, progress=True):
    """The up-to-date index of the gallery that the options name. say: takes a line about what was done.
    progress: whether a bar shows how far it is."""
    gallery, found, away = gallery_pictures(args, say) if args.split is None else split_pictures(args, say)
    folder = kept_folder(encoders, args, gallery, found, say)
    unwritable = None
    try:
        make_folder(folder, "--index")
    except InputError as error:  # known before an hour of encoding, not after it
        unwritable = error
    with locked(folder, say):
        known = (folder, gallery, encoders.fingerprint, encoders.width)
        index = GalleryIndex(*known) if args.rebuild else GalleryIndex.load(*known, None if away else found)
        update = Update(index, found, away)
        if unwritable:
            index.folder = None
            if update.new:
                say(f"{unwritable}; the index stays in memory")
        blocks = encode_new(encoders, update, args, progress)
        update.run(blocks, args.index_type or index.kind, say)
    for reason in update.failed.values():
        say(f"passed over: {reason}")
    where = f"the index {folder}" if index.folder else "memory"
    say(f"{plural(len(index), 'picture')} in {where}: {update.summary()}")
    if not len(index):
        raise InputError(f"none of the {len(found)} files in {gallery} is a picture that can be read")
    return index


def gallery_pictures(args, say):
    """(folder, {relative path: Stamp} of its pictures, {place below it: why it cannot be read})."""
    gallery = Path(args.gallery)
    found, others, away, dead = scan(gallery)
    for path, why in away.items():
        say(f"the folder {shown(gallery / path)} cannot be read ({why}): what is known of it stays")
    if not found and not away:
        raise InputError(
            f"there is no picture in {gallery} or below it"
            + (f" ({others.total()} files, none with a picture's suffix)" if others else "")
            + (f" ({links_to_nothing(dead)})" if dead else "")
            + unread_hint(others)
        )
    if dead:
        say(f"{links_to_nothing(dead)} What is known of it stays")
    if others:
        say(f"{plural(others.total(), 'file')} without a picture's suffix passed over{unread_hint(others)}")
    return gallery, found, away | dict.fromkeys(dead, "a link to nothing")


def links_to_nothing(dead):
    return f"{plural(len(dead), 'link')} to nothing, e.g. {shown(dead[0])}: is their disk there?"


def split_pictures(args, say):
    """The same of a data set's split."""
    from datasets.annotations import read_splits, source_of

    if ignored := ignored_name(args):
        say(ignored)
    source = source_of(args, args.split)
    paths = read_splits(source).by_name[args.split].image_paths
    if not paths:
        raise InputError(f"{source.path} has no images in the {args.split} split: choose another one")
    return source.images, stamps_of(source.images, paths), {}


def unread_hint(others):
    """What to do where files of a phone's or a camera's format were passed over."""
    *found, last = sorted(NOT_READ & others.keys()) or [""]
    names = " and ".join(filter(None, [", ".join(found), last]))
    return f"; {names} are not read here: export them as JPEG first" if names else ""


def plural(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


def encode_new(encoders, update, args, progress):
    """Encoders.encode_files of what an Update does not know by content, with a progress bar."""
    with progress_bar(len(update.new), "pictures", progress, unit="img") as bar:
        unknown = update.unknown(args.num_workers, bar.update)
        options = args.encode_batch, args.num_workers, update.index.gallery
        for paths, features, unreadable in encoders.encode_files(unknown, *options):
            yield paths, features, unreadable
            bar.update(len(paths) + len(unreadable))
