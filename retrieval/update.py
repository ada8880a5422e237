"""Bringing a gallery's index up to date: what is new is known by its bytes, or encoded."""

import time
from collections import Counter

import numpy as np

from retrieval.encoders import NotAPicture, shown
from retrieval.pictures import Picture, agree, below, digests_of, settled
from retrieval.vectors import feature_keys, new_faiss
from utils.errors import InputError

SAVE_PAUSE = 60  # seconds between two savings of what has been encoded


class Update:
    """One update of an index, and what is known while it lasts.

    found: {relative path: Stamp} of what the gallery holds now.
    away: {place below the gallery: why it cannot be read}; its pictures are not gone, they stay.
    """

    def __init__(self, index, found, away=()):
        self.index, self.began, self.old = index, time.time_ns(), dict(index.pictures)
        stamps = {path: picture.stamp for path, picture in self.old.items()}
        stamps |= {path: stamp for path, (stamp, _) in index.unreadable.items()}
        out_of_reach = {p: stamp for p, stamp in stamps.items() if p not in found and below(p, away)}
        self.found, index.out_of_reach = {**found, **out_of_reach}, set(out_of_reach)
        found = self.found
        self.kept = {p for p, picture in self.old.items() if p in found and agree(picture.stamp, found[p])}
        index.unreadable = {
            p: entry for p, entry in index.unreadable.items() if p in found and agree(entry[0], found[p])
        }
        index.groups = None
        self.as_before = len(index.unreadable)
        self.new = [p for p in found if p not in self.kept and p not in index.unreadable]
        self.encoded, self.joined, self.failed = set(), set(), {}  # what becomes of them
        self.digests = {}  # {relative path: digest} of those read so far
        self.waiting = []  # those whose first copy is being encoded
        self.row_of_digest = {picture.digest: picture.row for picture in self.old.values() if picture.digest}
        self.row_of_key = None  # {one of feature_keys: row}, made when it is asked for

    def unknown(self, workers, skipped):
        """Yields the new files to be encoded, one of each content, read as the next is asked for; skipped is
        called for each of the others."""
        begun = set()
        for path, digest in digests_of(self.index.gallery, self.new, workers):
            if digest is None:  # reading it as a picture says why
                yield path
                continue
            self.digests[path] = digest
            if digest in self.row_of_digest:
                self.join(path)
                skipped()
            elif digest in begun:
                self.waiting.append(path)
                skipped()
            else:
                begun.add(digest)
                yield path

    def run(self, blocks, kind, say=None):
        """blocks: yields (relative paths, features [n, D], {relative path: reason}) of new files. What has
        come is kept each minute, and when it is interrupted. kind: of index from now on.

        say: takes the reason why the index cannot be kept, which then stays in memory; else an InputError.
        """
        saved, pause = time.monotonic(), SAVE_PAUSE
        try:
            for paths, features, reasons in blocks if self.new else ():
                self.take_up(paths, features, reasons)
                if time.monotonic() - saved > pause:
                    began = time.monotonic()
                    self.keep(say)
                    saved = time.monotonic()
                    pause = max(SAVE_PAUSE, 20 * (saved - began))  # of a large index that takes long
            self.answer_waiting()
            self.leave_out(kind)
        finally:
            self.keep(say)

    def take_up(self, paths, features, reasons):
        for path, row in zip(paths, self.rows_of(features), strict=True):
            self.remember(path, row)
            self.encoded.add(path)
            if path in self.digests:
                self.row_of_digest[self.digests[path]] = row
        for path, why in reasons.items():
            self.fail(path, why)

    def answer_waiting(self):
        failed = {self.digests[path]: path for path in self.failed if path in self.digests}
        for path in self.waiting:
            if self.digests[path] in self.row_of_digest:
                self.join(path)
            else:
                first = failed[self.digests[path]]
                why = f"{shown(path)} holds the same as {shown(first)}, which could not be read"
                self.fail(path, type(self.failed[first])(why))

    def remember(self, path, row):
        stamp = settled(self.found[path], self.began)
        self.index.pictures[path] = Picture(row, stamp, self.digests.get(path, ""))

    def join(self, path):
        """A new file gets the features of one that holds the same."""
        self.remember(path, self.row_of_digest[self.digests[path]])
        self.joined.add(path)

    def fail(self, path, why):
        """One that could not be read, for lack of a permission, is tried again next time."""
        self.failed[path] = why
        if isinstance(why, NotAPicture):
            self.index.unreadable[path] = (self.found[path], str(why))

    def rows_of(self, features):
        """Rows of the FAISS index for features [n, D]; those that it does not hold yet are added to it."""
        features = np.ascontiguousarray(features, np.float32)
        if self.row_of_key is None:
            self.row_of_key = {key: row for row, key in enumerate(self.index.feature_keys())}
        total, keys, fresh = self.index.faiss.ntotal, feature_keys(features), {}
        for place, key in enumerate(keys):
            if key not in self.row_of_key:
                fresh.setdefault(key, place)
        if fresh:
            self.index.add(features[list(fresh.values())])
            self.row_of_key.update({key: total + number for number, key in enumerate(fresh)})
        return [self.row_of_key[key] for key in keys]

    def leave_out(self, kind):
        """Forget pictures that are gone or have changed, and vectors that are no longer any picture's."""
        index, found = self.index, self.found
        for path, why in list(self.failed.items()):
            same = path in self.old and self.old[path].stamp[:2] == found[path][:2]
            if same and not isinstance(why, NotAPicture):  # nobody can tell now whether it has changed
                self.kept.add(path)
                del self.failed[path]
        there = self.kept | self.encoded | self.joined
        pictures = {path: index.pictures[path] for path in found if path in there}
        used, faiss = sorted({picture.row for picture in pictures.values()}), index.faiss
        if len(used) < faiss.ntotal or kind != index.kind:
            faiss, index.file = new_faiss(kind, index.vectors()[used]), None
            place = {row: number for number, row in enumerate(used)}
            pictures = {path: p._replace(row=place[p.row]) for path, p in pictures.items()}
        index.pictures, index.faiss, index.kind = pictures, faiss, kind  # at once: it may be interrupted

    def keep(self, say):
        try:
            self.index.save()
        except InputError as error:
            if say is None:
                raise
            say(f"{error}; the answer comes from memory")
            self.index.folder = None

    def summary(self):
        """What it did, as the last line says it."""
        touched = sum(p in self.old and self.old[p].digest == self.digests[p] for p in self.joined)
        gone = Counter(picture.digest for path, picture in self.old.items() if path not in self.found)
        renamed = gone & Counter(self.digests[path] for path in self.joined if path not in self.old)
        recognised = len(self.joined) - touched  # under another name, or beside a copy
        return (
            f"{len(self.encoded)} encoded, {(gone - renamed).total()} removed, "
            f"{len(self.kept) + touched} kept"
            + (f", {recognised} known by content" if recognised else "")
            + (f"; {self.as_before} unreadable as before" if self.as_before else "")
        )
