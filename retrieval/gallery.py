"""The pictures of a folder, and the index of their features on disk: a FAISS file and a table."""

import contextlib
import json
import os
import stat
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from retrieval.encoders import NotAPicture, shown
from utils.data_sets import ignored_name
from utils.errors import InputError
from utils.extras import extra
from utils.files import lock, write_whole

TABLE, LAYOUT = "table.json", 1
SAVE_PAUSE = 60  # seconds between two savings of what has been encoded


# ---- what lies in a folder ----


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    size: int
    mtime_ns: int


def scan(folder):
    """({relative path: Stamp} of the pictures in a folder and below, in order; {suffix: other files};
    {folder: why it cannot be read}).

    A picture is a file that bears one of the suffixes that Pillow opens: no pipe, which nobody may ever fill.
    Hidden files and folders are passed over; links are followed, each folder is looked into once.
    """
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found, others, visited, away = {}, Counter(), set(), {}

    def cannot_look(error):
        away[os.path.relpath(error.filename, folder)] = error.strerror

    for directory, folders, files in os.walk(folder, onerror=cannot_look, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in suffixes:
                others[suffix] += 1
                continue
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):  # it went away, or is a link to nothing
                state = os.stat(path)
                if stat.S_ISREG(state.st_mode):
                    found[os.path.relpath(path, folder)] = Stamp(state.st_size, state.st_mtime_ns)
    return dict(sorted(found.items())), others, away


def below(path, folders):
    """Whether a relative path lies in one of the folders, or below."""
    return any(folder == os.curdir or path.startswith(folder + os.sep) for folder in folders)


def stamps_of(folder, paths):
    """The same for a list of files below a folder, in the list's order."""
    states = [(os.path.relpath(path, folder), os.stat(path)) for path in paths]
    return {path: Stamp(state.st_size, state.st_mtime_ns) for path, state in states}


# ---- the index ----


class Change(NamedTuple):
    """What an update did."""

    encoded: int
    removed: int
    unreadable: dict  # relative path: reason, of the files tried this time


class GalleryIndex:
    """Features of a gallery's pictures, searched by inner product.

    gallery: the folder that relative paths start from. fingerprint: Encoders.fingerprint of the model.
    paths, stamps: of the pictures, in the order of the vectors. unreadable: {relative path: (Stamp, reason)}.
    folder: where it is kept, None for nowhere. kind: one of utils.options.INDEX_TYPES.
    """

    def __init__(self, folder, gallery, fingerprint, width, kind="flat"):
        self.folder, self.gallery = folder and Path(folder), str(gallery)
        self.fingerprint, self.width, self.kind = fingerprint, width, kind
        self.paths, self.stamps, self.unreadable = [], [], {}
        self.faiss = new_faiss(kind, np.zeros((0, width), np.float32))
        self.changed = False

    def __len__(self):
        return len(self.paths)

    # ---- keeping up with the folder ----

    def stale(self, found):
        """Whether `found` holds pictures, or states of them, that the index does not."""
        known = dict(zip(self.paths, self.stamps, strict=True))
        known.update({path: stamp for path, (stamp, _) in self.unreadable.items()})
        return found.items() - known.items() != set()

    def update(self, found, encode, kind=None, say=None, away=()):
        """Bring it up to date with `found` ({relative path: Stamp}); what is new or changed goes through
        encode(relative paths), which yields (relative paths, features, {relative path: reason}).

        What has been encoded is kept each minute, and when encode is interrupted. Returns a Change.
        away: {folder below the gallery: why it cannot be read}; its pictures are not gone, they stay.
        say: takes the reason why the index cannot be kept, which then stays in memory; without say that is an
        InputError.
        """
        known = [*zip(self.paths, self.stamps, strict=True), *((p, e[0]) for p, e in self.unreadable.items())]
        out_of_reach = {path: stamp for path, stamp in known if path not in found and below(path, away)}
        found = {**found, **out_of_reach}
        kept = [row for row, (p, s) in enumerate(known[: len(self)]) if found.get(p) == s]
        gone = sum(path not in found for path in self.paths)
        self.unreadable = {p: entry for p, entry in self.unreadable.items() if found.get(p) == entry[0]}
        if len(kept) < len(self) or (kind or self.kind) != self.kind:
            vectors, self.kind = self.vectors()[kept], kind or self.kind
            self.paths, self.stamps = [self.paths[row] for row in kept], [self.stamps[row] for row in kept]
            self.faiss = new_faiss(self.kind, vectors)
            self.changed = True
        known = {*self.paths, *self.unreadable}
        new = [path for path in found if path not in known]
        tried, blocks, saved, pause = {}, [], time.monotonic(), SAVE_PAUSE
        try:
            for paths, features, reasons in encode(new) if new else ():
                blocks.append((paths, features))
                tried.update(reasons)
                if time.monotonic() - saved > pause:
                    began, blocks = time.monotonic(), self._add(found, blocks, tried)
                    self._keep(say)
                    saved = time.monotonic()
                    pause = max(SAVE_PAUSE, 20 * (saved - began))  # of a large index that takes long
        finally:
            self._add(found, blocks, tried)
            self._keep(say)
        return Change(len(new) - len(tried), gone, {path: str(reason) for path, reason in tried.items()})

    def _add(self, found, blocks, reasons):
        """Take up what has been encoded, and which files are no pictures; one that could not be read, for
        lack of a permission, is tried again. Returns the blocks that are left: none."""
        no_pictures = {path: why for path, why in reasons.items() if isinstance(why, NotAPicture)}
        self.unreadable.update({path: (found[path], str(why)) for path, why in no_pictures.items()})
        self.changed = self.changed or bool(blocks)
        blocks = [(paths, features) for paths, features in blocks if len(paths)]
        if not blocks:
            return []
        paths = [path for some, _ in blocks for path in some]
        self.paths += paths
        self.stamps += [found[path] for path in paths]
        features = np.concatenate([features for _, features in blocks])
        if self.kind == "ivf" and len(self) > 2 * self.faiss.ntotal:  # its cells were learned from too few
            self.faiss = new_faiss(self.kind, np.concatenate([self.vectors(), features]))
        else:
            self.faiss.add(features)
        return []

    def vectors(self):
        """[n, D], in the order of `paths`."""
        if not self.faiss.ntotal:
            return np.zeros((0, self.width), np.float32)
        if self.kind == "ivf":
            self.faiss.make_direct_map()
        return self.faiss.reconstruct_n(0, self.faiss.ntotal)

    def search(self, features, k):
        """For each row of features [q, D] its best pictures: a list of (similarity, relative path).

        Of equal similarities the picture listed first comes first, as in utils.metrics.
        """
        wanted = min(2 * k + 10, len(self))  # some more, so that equals at the border are seen
        if not wanted:
            return [[] for _ in features]
        similarity, rows = self.faiss.search(np.ascontiguousarray(features, np.float32), wanted)
        answers = []
        for scores, row in zip(similarity.tolist(), rows.tolist(), strict=True):
            hits = sorted(((-s, r) for s, r in zip(scores, row, strict=True) if r >= 0))[:k]
            answers.append([(-s, self.paths[r]) for s, r in hits])
        return answers

    # ---- on disk ----

    def _keep(self, say):
        try:
            self.save()
        except InputError as error:
            if say is None:
                raise
            say(f"{error}; the answer comes from memory")
            self.folder = None

    def save(self):
        """Write it so that the table, replaced last and in one step, names a whole vector file."""
        if self.folder is None or not self.changed:
            return
        faiss = extra("faiss")
        vectors = self.folder / f"vectors-{uuid.uuid4().hex[:12]}.faiss"
        table = {
            "layout": LAYOUT,
            "fingerprint": self.fingerprint,
            "gallery": os.path.abspath(self.gallery),
            "kind": self.kind,
            "vectors": vectors.name,
            "paths": self.paths,
            "sizes": [stamp.size for stamp in self.stamps],
            "mtimes_ns": [stamp.mtime_ns for stamp in self.stamps],
            "unreadable": [[path, *stamp, reason] for path, (stamp, reason) in self.unreadable.items()],
        }
        try:
            with open(vectors, "wb") as file:  # by Python: FAISS takes no name that is not UTF-8
                faiss.write_index(self.faiss, faiss.PyCallbackIOWriter(file.write))
                file.flush()
                os.fsync(file.fileno())
            write_whole(self.folder / TABLE, json.dumps(table))
        except (OSError, RuntimeError) as error:
            vectors.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
            raise InputError(
                f"cannot write the index in {self.folder}: {reason}; what was there is untouched"
            ) from None
        except InputError:
            vectors.unlink(missing_ok=True)
            raise
        for old in self.folder.glob("vectors-*.faiss"):
            if old.name != vectors.name:
                old.unlink(missing_ok=True)
        self.changed = False

    @classmethod
    def load(cls, folder, gallery, fingerprint, width):
        """The index kept in a folder, or an empty one. Refuses one of another model or gallery."""
        index, folder = cls(folder, gallery, fingerprint, width), Path(folder)
        file = folder / TABLE
        if not file.exists():
            return index
        mend = "start again with --rebuild, or give another --index"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            layout, own = table["layout"], table["fingerprint"] == fingerprint
            home, name, kind = Path(table["gallery"]), Path(table["vectors"]).name, table["kind"]
            paths, stamps = table["paths"], list(map(Stamp, table["sizes"], table["mtimes_ns"]))
            unreadable = {p: (Stamp(size, mtime), why) for p, size, mtime, why in table["unreadable"]}
        except OSError as error:
            raise InputError(f"the index in {folder} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"the index in {folder} is damaged ({TABLE}): {mend}") from None
        if layout != LAYOUT:
            raise InputError(f"the index in {folder} is of another version of search.py: {mend}")
        if not own:
            raise InputError(
                f"the index in {folder} was made with another model or image size, so its features cannot be "
                f"compared: {mend}"
            )
        if home != Path(os.path.abspath(gallery)) and home.exists():  # a gallery that was moved is welcome
            raise InputError(f"the index in {folder} is of the pictures in {home}, not of {gallery}: {mend}")
        faiss = extra("faiss")
        try:
            with open(folder / name, "rb") as file:
                vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except (FileNotFoundError, RuntimeError):
            raise InputError(f"the index in {folder} is damaged ({name}): {mend}") from None
        except OSError as error:
            raise InputError(f"the index in {folder} cannot be read ({name}): {error.strerror}") from None
        if not vectors.ntotal == len(paths) == len(stamps) or vectors.d != width:
            raise InputError(f"the index in {folder} is damaged ({name} does not fit {TABLE}): {mend}")
        index.faiss, index.kind = vectors, kind
        index.paths, index.stamps, index.unreadable = paths, stamps, unreadable
        set_effort(index.faiss, kind)
        return index


def new_faiss(kind, vectors):
    """A FAISS index of L2-normalised vectors [n, D] by inner product: flat is exact, ivf and hnsw are not.

    ivf: 4·√n cells of like vectors, of which a query visits a sixteenth, 64 at least.
    hnsw: a graph, 32 links a vector.
    """
    faiss = extra("faiss")
    n, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 64
    elif kind == "ivf" and n:
        cells = max(1, min(int(4 * n**0.5), n // 39))  # FAISS wants 39 vectors to learn a cell
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
        index.train(vectors)
    else:
        index = faiss.IndexFlatIP(width)
    set_effort(index, kind)
    if n:
        index.add(vectors)
    return index


def set_effort(index, kind):
    """How much a query may look at: recall against time (benchmarks/search.py measures both)."""
    if kind == "ivf" and hasattr(index, "nprobe"):
        index.nprobe = max(64, index.nlist // 16)
    elif kind == "hnsw":
        index.hnsw.efSearch = 128


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


# ---- what search.py and demo.py do first ----


def default_folder(run_dir, gallery, split=None, annotations=None):
    """RUN/search/<name>-<where>: each gallery of a run has its own."""
    import zlib

    where = os.path.abspath(gallery)
    name = Path(where).name or "root"
    what = f"{where}\n{split or ''}" + (f"\n{os.path.abspath(annotations)}" if split and annotations else "")
    tag = zlib.crc32(what.encode("utf-8", "surrogateescape"))
    return Path(run_dir) / "search" / f"{split or name}-{tag:08x}"


def open_gallery(encoders, args, say, progress=True):
    """The up-to-date index of the gallery that the options name. say: takes a line about what was done."""
    away = {}
    if args.split is None:
        gallery, (found, others, away) = Path(args.gallery), scan(args.gallery)
        for path, why in away.items():
            say(f"the folder {shown(gallery / path)} cannot be read ({why}): what is known of it stays")
        if not found and not away:
            raise InputError(
                f"there is no picture in {args.gallery} or below it"
                + (f" ({others.total()} files, none with a picture's suffix)" if others else "")
                + heic_hint(others)
            )
        if others:
            say(f"{plural(others.total(), 'file')} without a picture's suffix passed over{heic_hint(others)}")
    else:
        if ignored := ignored_name(args):
            say(ignored)
        gallery, found = split_pictures(args)
    folder = Path(args.index or default_folder(args.run_dir, gallery, args.split, args.annotations))
    unwritable = cannot_write(folder)  # known before an hour of encoding, not after it
    with locked(folder, say):
        make = GalleryIndex if args.rebuild else GalleryIndex.load
        index = make(folder, gallery, encoders.fingerprint, encoders.width)
        if unwritable:
            if index.stale(found):
                say(f"the index cannot be kept in {folder}: {unwritable} (see --index); it stays in memory")
            index.folder = None
        change = index.update(
            found,
            lambda paths: encode_below(encoders, gallery, paths, args, progress),
            args.index_type,
            say,
            away,
        )
    for path, reason in change.unreadable.items():
        say(f"passed over: {reason}" if shown(path) in reason else f"passed over: {shown(path)}: {reason}")
    earlier = len(index.unreadable) - len(change.unreadable)
    where = f"the index {folder}" if index.folder else "memory"
    say(
        f"{plural(len(index), 'picture')} in {where}: {change.encoded} encoded, "
        f"{change.removed} removed" + (f"; {earlier} unreadable as before" if earlier else "")
    )
    if not len(index):
        raise InputError(f"none of the {len(found)} files in {gallery} is a picture that can be read")
    return index


def cannot_write(folder):
    """Why nothing can be written in a folder, which is made if it is not there; or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def heic_hint(others):
    """What to do where files of a phone's format were passed over."""
    found = [suffix for suffix in (".heic", ".heif") if others[suffix]]
    return f"; {' and '.join(found)} are not read here: export them as JPEG first" if found else ""


def plural(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


def split_pictures(args):
    from datasets.annotations import read_splits, source_of

    source = source_of(args, args.split)
    paths = read_splits(source).by_name[args.split].image_paths
    if not paths:
        raise InputError(f"{source.path} has no images in the {args.split} split: choose another one")
    return source.images, stamps_of(source.images, paths)


def encode_below(encoders, gallery, paths, args, progress):
    """Encoders.encode_files with relative paths and a progress bar."""
    from tqdm import tqdm

    full = {os.path.join(gallery, path): path for path in paths}
    with tqdm(
        total=len(paths), desc="pictures", unit="img", leave=False, disable=None if progress else True
    ) as bar:
        for good, features, bad in encoders.encode_files(list(full), args.encode_batch, args.num_workers):
            yield [full[path] for path in good], features, {full[path]: why for path, why in bad.items()}
            bar.update(len(good) + len(bad))
