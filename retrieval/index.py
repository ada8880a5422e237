"""The index of a gallery's features, in memory and on disk: a FAISS file and a table of pictures."""

import contextlib
import json
import os
import time
import uuid
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval.encoders import NotAPicture, shown
from retrieval.pictures import UNSURE, Stamp, agree, below, digest_of, digests_of, settled, stamp_of
from retrieval.vectors import feature_keys, new_faiss, set_effort
from utils.errors import InputError
from utils.extras import extra
from utils.files import write_whole

TABLE, LAYOUT = "table.json", 2
SAVE_PAUSE = 60  # seconds between two savings of what has been encoded
LOOKED_AT = 10_000  # most pictures that a search asks for where some are no longer there


class Change(NamedTuple):
    """What an update did."""

    encoded: int
    removed: int
    unreadable: dict  # relative path: reason, of the files tried this time
    kept: int = 0
    recognised: int = 0  # under another name, or beside a copy: they took over the features of equal bytes


class Picture(NamedTuple):
    """A file that the index knows."""

    row: int  # of its features; equal features are there once
    stamp: Stamp
    digest: str  # digest_of its bytes, "" where that is not known


class Hit(NamedTuple):
    """A picture found."""

    similarity: float
    path: str  # below the gallery
    copies: int  # how many more have the same features


class GalleryIndex:
    """Features of a gallery's pictures, searched by inner product.

    Pictures whose features are equal to the last bit are copies: they are one entry of the FAISS index, a
    graph of equal vectors (hnsw) would not find its way out of them. Files of the same bytes are encoded
    once, so they always are.

    gallery: the folder that relative paths start from. fingerprint: Encoders.fingerprint of the model.
    pictures: {relative path: Picture}, in order. unreadable: {relative path: (Stamp, reason)}.
    folder: where it is kept, None for nowhere. kind: one of utils.options.INDEX_TYPES.
    """

    def __init__(self, folder, gallery, fingerprint, width, kind="flat"):
        self.folder, self.gallery = folder and Path(folder), str(gallery)
        self.fingerprint, self.width, self.kind = fingerprint, width, kind
        self.pictures, self.unreadable = {}, {}
        self.faiss = new_faiss(kind, np.zeros((0, width), np.float32))
        self.file = None  # name of the file that holds just these vectors
        self.changed = False
        self.groups = None  # {row: relative paths}, made when it is asked for
        self.rows_by_feature = None  # {bytes of a hash: row}, the same
        self._begin({})

    def __len__(self):
        return len(self.pictures)

    @property
    def paths(self):
        return list(self.pictures)

    # ---- keeping up with the folder ----

    def _begin(self, pictures):
        """What is known while an update lasts."""
        self.began = time.time_ns()
        self.rows_by_digest = {p.digest: p.row for p in pictures.values() if p.digest}
        self.contents = {}  # {relative path: digest} of the new files read so far
        self.waiting, self.joined = [], []  # of them those whose features somebody else has: not yet, and now

    def stale(self, found):
        """Whether `found` holds pictures, or states of them, that the index does not."""
        known = {path: picture.stamp[:2] for path, picture in self.pictures.items()}
        known.update({path: stamp[:2] for path, (stamp, _) in self.unreadable.items()})
        return any(known.get(path) != stamp[:2] for path, stamp in found.items())

    def update(self, found, encode, kind=None, say=None, away=()):
        """Bring it up to date with `found` ({relative path: Stamp}); what is new or changed goes through
        encode(relative paths), which yields (relative paths, features, {relative path: reason}).

        What has been encoded is kept each minute, and when encode is interrupted. Returns a Change.
        away: {folder below the gallery: why it cannot be read}; its pictures are not gone, they stay.
        say: takes the reason why the index cannot be kept, which then stays in memory; else an InputError.
        """
        old, tried = dict(self.pictures), {}
        known = {path: picture.stamp for path, picture in old.items()}
        known.update({path: stamp for path, (stamp, _) in self.unreadable.items()})
        out_of_reach = {p: stamp for p, stamp in known.items() if p not in found and below(p, away)}
        found = {**found, **out_of_reach}
        kept = {p for p, picture in old.items() if p in found and agree(picture.stamp, found[p])}
        same = {p: entry for p, entry in self.unreadable.items() if p in found and agree(entry[0], found[p])}
        self.changed = self.changed or len(same) < len(self.unreadable)
        self.unreadable = same
        new = [path for path in found if path not in kept and path not in same]
        self._begin(old)
        try:
            self._take_up(found, new, encode, tried, say)
            kept |= self._unread(found, old, tried)
            self._leave_out(found, old, kept, kind or self.kind)
        finally:
            self._keep(say)
        change = self._change(found, old, kept, tried)
        self._begin({})
        return change

    def unknown(self, paths, workers, skipped):
        """Of new files those to be encoded, one of each content, read as the next is asked for: update() has
        the features of the others at hand, or will have them. skipped: called for each of those."""
        new, seen = set(paths), set(self.rows_by_digest)
        early = [path for path, picture in self.pictures.items() if not picture.digest and path not in new]
        for path, digest in digests_of(self.gallery, [*early, *paths] if self.folder else paths, workers):
            if path not in new:  # of an index that was kept before there were digests
                if digest is not None:
                    picture = self.pictures[path]._replace(digest=digest)
                    self.pictures[path], self.changed = picture, True
                    self.rows_by_digest.setdefault(digest, picture.row)
                    seen.add(digest)
                continue
            if digest is not None:  # otherwise reading it as a picture says why
                self.contents[path] = digest
                if digest in seen:
                    self.waiting.append(path)
                    skipped()
                    continue
                seen.add(digest)
            yield path

    def _take_up(self, found, new, encode, tried, say):
        """Encode new files and remember them. tried: takes {relative path: reason} of those unreadable."""
        blocks, saved, pause = [], time.monotonic(), SAVE_PAUSE
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
        bad = {self.contents[path]: path for path in tried if path in self.contents}
        for path in self.waiting:  # for one that turned out to be no picture
            first = bad[self.contents[path]]
            tried[path] = type(tried[first])(
                f"{shown(path)} holds the same as {shown(first)}, which could not be read"
            )
        self._add(found, [], tried)

    def _add(self, found, blocks, reasons):
        """Take up what has been encoded, and which files are no pictures; one that could not be read, for
        lack of a permission, is tried again. Returns the blocks that are left: none."""
        no_pictures = {path: why for path, why in reasons.items() if isinstance(why, NotAPicture)}
        self.unreadable.update({path: (found[path], str(why)) for path, why in no_pictures.items()})
        self.changed = self.changed or bool(no_pictures)
        paths = [path for some, _ in blocks for path in some]
        rows = self._rows_of([features for some, features in blocks if len(some)])
        for path, row in zip(paths, rows, strict=True):
            if path in self.contents:
                self.rows_by_digest[self.contents[path]] = row
        now = [path for path in self.waiting if self.contents[path] in self.rows_by_digest]
        rows += [self.rows_by_digest[self.contents[path]] for path in now]
        taken = {
            path: Picture(row, settled(found[path], self.began), self.contents.get(path, ""))
            for path, row in zip([*paths, *now], rows, strict=True)
        }
        self.pictures.update(taken)
        self.waiting, self.joined = [p for p in self.waiting if p not in taken], self.joined + now
        self.changed, self.groups = self.changed or bool(taken), None
        return []

    def _rows_of(self, blocks):
        """Rows of the FAISS index for features [n, D]; those that it does not hold yet are added to it."""
        if not blocks:
            return []
        features = np.ascontiguousarray(np.concatenate(blocks), np.float32)
        if self.rows_by_feature is None:
            self.rows_by_feature = {key: row for row, key in enumerate(self._feature_keys())}
        known, keys, first, total = self.rows_by_feature, feature_keys(features), {}, self.faiss.ntotal
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        fresh = {key: place for key, place in first.items() if key not in known}
        if fresh:
            added = features if len(fresh) == len(features) else features[list(fresh.values())]
            self.file = None
            if self.kind == "ivf" and total + len(fresh) > 2 * total:  # its cells were learned from too few
                self.faiss = new_faiss(self.kind, np.concatenate([self.vectors(), added]))
            else:
                self.faiss.add(added)
            known.update({key: total + number for number, key in enumerate(fresh)})
        return [known[key] for key in keys]

    def _unread(self, found, old, tried):
        """Known pictures of the same size and time that cannot be read now, so that nobody can tell whether
        they have changed: they stay, and are looked at again next time."""
        stay = {
            path
            for path, why in tried.items()
            if path in old and old[path].stamp[:2] == found[path][:2] and not isinstance(why, NotAPicture)
        }
        for path in stay:
            del tried[path]
            self.pictures[path] = old[path]._replace(stamp=old[path].stamp._replace(ctime_ns=UNSURE))
        return stay

    def _leave_out(self, found, old, kept, kind):
        """Forget pictures that are gone or have changed, and vectors that are no longer any picture's."""
        for path in kept:
            if self.pictures[path].stamp.ctime_ns is None and found[path].ctime_ns is not None:
                self.pictures[path], self.changed = self.pictures[path]._replace(stamp=found[path]), True
        there = self.pictures
        pictures = {
            path: there[path]
            for path in found
            if path in kept or (path in there and there[path] is not old.get(path))
        }
        self.changed = self.changed or len(pictures) < len(there)
        used = sorted({picture.row for picture in pictures.values()})
        faiss = self.faiss
        if len(used) < faiss.ntotal or kind != self.kind:
            faiss, self.file, self.changed = new_faiss(kind, self.vectors()[used]), None, True
            place = {row: number for number, row in enumerate(used)}
            pictures = {path: p._replace(row=place[p.row]) for path, p in pictures.items()}
        self.pictures, self.faiss, self.kind = pictures, faiss, kind
        self.groups = self.rows_by_feature = None

    def _change(self, found, old, kept, tried):
        """The Change from the pictures in `old`."""
        again = sum(path in old and old[path].digest == self.contents[path] for path in self.joined)
        gone = Counter(picture.digest for path, picture in old.items() if path not in found)
        renamed = gone & Counter(self.contents[path] for path in self.joined if path not in old)
        return Change(
            encoded=len(self) - len(kept) - len(self.joined),
            removed=gone.total() - renamed.total(),
            unreadable={path: str(reason) for path, reason in tried.items()},
            kept=len(kept) + again,
            recognised=len(self.joined) - again,
        )

    def vectors(self, start=0, stop=None):
        """[n, D], the rows that Picture.row names."""
        stop = self.faiss.ntotal if stop is None else min(stop, self.faiss.ntotal)
        if start >= stop:
            return np.zeros((0, self.width), np.float32)
        if self.kind == "ivf":
            self.faiss.make_direct_map()
        return self.faiss.reconstruct_n(start, stop - start)

    def _feature_keys(self):
        """feature_keys of all vectors, which may be too many to hold a second time."""
        for start in range(0, self.faiss.ntotal, 4096):
            yield from feature_keys(self.vectors(start, start + 4096))

    def search(self, features, k, duplicates=False, there=None):
        """For each row of features [q, D] its best pictures: a list of (similarity, relative path).

        Of copies only the first is listed, unless duplicates. Of equal similarities the picture listed first
        comes first, as in utils.metrics. there(relative path): whether a picture can be shown; the next best
        takes the place of one that cannot.
        """
        total, there = self.faiss.ntotal, there or (lambda path: True)
        if self.groups is None:
            groups = {}
            for path, picture in self.pictures.items():
                groups.setdefault(picture.row, []).append(path)
            self.place = {row: place for place, row in enumerate(groups)}
            self.groups = groups
        wanted = min(2 * k + 10, total)  # some more, so that equals at the border are seen
        if not wanted:
            return [[] for _ in features]
        features = np.ascontiguousarray(features, np.float32)
        answers = []
        for feature, scores, rows in zip(features, *self.faiss.search(features, wanted), strict=True):
            answer, asked = self._listed(scores, rows, k, duplicates, there), wanted
            while len(answer) < k and asked < min(total, LOOKED_AT) and min(rows) >= 0:
                asked = min(4 * asked, total, LOOKED_AT)
                (scores,), (rows,) = self.faiss.search(feature[None], asked)
                answer = self._listed(scores, rows, k, duplicates, there)
            answers.append(answer)
        return answers

    def _listed(self, scores, rows, k, duplicates, there):
        """The k best (similarity, relative path) of rows that were found."""
        answer = []
        found = [
            (s, row) for s, row in zip(scores.tolist(), rows.tolist(), strict=True) if row in self.groups
        ]
        for similarity, row in sorted(found, key=lambda hit: (-hit[0], self.place[hit[1]])):
            paths = (path for path in self.groups[row] if there(path))
            answer += [(similarity, path) for path in (paths if duplicates else islice(paths, 1))]
            if len(answer) >= k:
                break
        return answer[:k]

    def find(self, features, k, duplicates=False):
        """search() among what lies in the gallery now: (for each row of features a list of Hit, how many
        pictures that would have been found are no longer there, or hold something else by now)."""
        seen = {}

        def there(path):
            if path not in seen:
                seen[path] = self.is_there(path)
            return seen[path]

        answers = self.search(features, k, duplicates, there)
        lost = sum(not found for found in seen.values())
        hits = [
            [
                Hit(similarity, path, 0 if duplicates else sum(map(there, self.copies(path))))
                for similarity, path in answer
            ]
            for answer in answers
        ]
        return hits, lost

    def copies(self, path):
        """The other pictures of the same features, of a picture that was found."""
        return [other for other in self.groups[self.pictures[path].row] if other != path]

    def is_there(self, path):
        """Whether a picture's file is there and still what was encoded."""
        full, picture = os.path.join(self.gallery, path), self.pictures[path]
        try:
            stamp = stamp_of(os.stat(full))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # it cannot be looked at now, so nobody says that it has gone
            return True
        if agree(picture.stamp, stamp):
            return True
        if picture.digest and (digest := digest_of(full)):
            return digest == picture.digest
        size, mtime, _ = picture.stamp
        return stamp.size == size and mtime in (0, stamp.mtime_ns)  # 0: nobody has asked for it

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
        vectors = self.folder / (self.file or f"vectors-{uuid.uuid4().hex[:12]}.faiss")
        pictures = self.pictures.values()
        table = {
            "layout": LAYOUT,
            "fingerprint": self.fingerprint,
            "gallery": os.path.abspath(self.gallery),
            "kind": self.kind,
            "vectors": vectors.name,
            "paths": self.paths,
            "rows": [picture.row for picture in pictures],
            "sizes": [picture.stamp.size for picture in pictures],
            "mtimes_ns": [picture.stamp.mtime_ns for picture in pictures],
            "ctimes_ns": [picture.stamp.ctime_ns for picture in pictures],
            "digests": [picture.digest for picture in pictures],
            "unreadable": [[path, *stamp, reason] for path, (stamp, reason) in self.unreadable.items()],
        }
        try:
            if not self.file:
                with open(vectors, "wb") as file:  # by Python: FAISS takes no name that is not UTF-8
                    faiss.write_index(self.faiss, faiss.PyCallbackIOWriter(file.write))
                    file.flush()
                    os.fsync(file.fileno())
            write_whole(self.folder / TABLE, json.dumps(table))
        except (OSError, RuntimeError, InputError) as error:
            if not self.file:
                vectors.unlink(missing_ok=True)
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
            raise InputError(
                f"cannot write the index in {self.folder}: {reason}; what was there is untouched"
            ) from None
        for old in self.folder.glob("vectors-*.faiss"):
            if old.name != vectors.name:
                old.unlink(missing_ok=True)
        self.file, self.changed = vectors.name, False

    @classmethod
    def load(cls, folder, gallery, fingerprint, width, found=None):
        """The index kept in a folder, or an empty one. Refuses one of another model or gallery.

        found: {relative path: Stamp} of the gallery, by which one that was moved is told from another one.
        """
        index, folder = cls(folder, gallery, fingerprint, width), Path(folder)
        if not (folder / TABLE).exists():
            return index
        table = read_table(folder)
        if table["layout"] not in (1, LAYOUT):
            raise InputError(f"the index in {folder} is of another version of search.py: {MEND}")
        if table["fingerprint"] != fingerprint:
            raise InputError(
                f"the index in {folder} was made with another model or image size, so its features cannot be "
                f"compared: {MEND}"
            )
        home, name = table["gallery"], Path(table["vectors"]).name
        if home != os.path.abspath(gallery):
            if not has_moved(table, gallery):
                raise InputError(
                    f"the index in {folder} is of the pictures in {home}, not of {gallery}: {MEND}"
                )
            if found is not None and 2 * in_common(table, found) < len(table["pictures"]):
                raise InputError(
                    f"the index in {folder} is of the pictures in {home}, which are not there now, and most "
                    f"of them are not in {gallery} either: {MEND}"
                )
            index.changed = True  # where its gallery lies
        faiss = extra("faiss")
        try:
            with open(folder / name, "rb") as file:
                vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except (FileNotFoundError, RuntimeError):
            raise InputError(f"the index in {folder} is damaged ({name}): {MEND}") from None
        except OSError as error:
            raise InputError(f"the index in {folder} cannot be read ({name}): {error.strerror}") from None
        pictures = table["pictures"]
        rows = {picture.row for picture in pictures.values()}
        earlier = table["layout"] == 1  # it held a vector for each picture
        fits = rows == set(range(vectors.ntotal)) if earlier else rows <= set(range(vectors.ntotal))
        if not fits or vectors.d != width:
            raise InputError(f"the index in {folder} is damaged ({name} does not fit {TABLE}): {MEND}")
        index.faiss, index.kind, index.file = vectors, table["kind"], name
        index.pictures, index.unreadable = pictures, table["unreadable"]
        set_effort(index.faiss, index.kind)
        if earlier:
            index._merge_copies()
        return index

    def _merge_copies(self):
        """Let equal features of an index that held them as often as there are copies be one entry."""
        first, same = {}, {}
        for row, key in enumerate(self._feature_keys()):
            same[row] = first.setdefault(key, row)
        self.pictures = {path: p._replace(row=same[p.row]) for path, p in self.pictures.items()}
        self.changed = True


MEND = "start again with --rebuild, or give another --index"


def read_table(folder):
    """The table of the index in a folder, with `pictures` and `unreadable` as a GalleryIndex has them."""
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        number = len(table["paths"])
        if table["layout"] == 1:
            table |= {"rows": range(number), "ctimes_ns": [None] * number, "digests": [""] * number}
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


def has_moved(table, gallery):
    """Whether the gallery of an index is no longer where it was: its pictures are not (what is left may be an
    empty folder, where a disk was mounted), or that place is another name of `gallery`."""
    home = table["gallery"]
    if os.path.abspath(home) == os.path.abspath(gallery):
        return False  # another choice of its pictures has an index of its own
    with contextlib.suppress(OSError):
        if os.path.samefile(home, gallery):
            return True
    return not any(os.path.lexists(os.path.join(home, path)) for path in table["paths"])


def in_common(table, found):
    """How many pictures of an index a gallery seems to hold, by name and size."""
    known = Counter((os.path.basename(path), p.stamp.size) for path, p in table["pictures"].items())
    return (known & Counter((os.path.basename(path), stamp.size) for path, stamp in found.items())).total()
