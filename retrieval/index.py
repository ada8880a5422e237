"""The index of a gallery's features: which pictures it has, and which of them are like a query's."""

import os
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval.index_file import TABLE, check_table, read_table, read_vectors, write_index
from retrieval.pictures import agree, digest_of, stamp_of
from retrieval.update import Update
from retrieval.vectors import cells_for, feature_keys, new_faiss, set_effort
from utils.errors import InputError

LOOKED_AT = 10_000  # most pictures that a search asks for where some are no longer there


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
        self.out_of_reach = set()  # relative paths of pictures that nobody can look at now
        self.faiss = new_faiss(kind, np.zeros((0, width), np.float32))
        self.file = None  # name of the file that holds just these vectors
        self.on_disk = (None, {}, {})  # file, pictures and unreadable of what the folder holds
        self.groups = None  # {row: relative paths}, made when it is asked for

    @classmethod
    def load(cls, folder, gallery, fingerprint, width, found=None):
        """The index kept in a folder, or an empty one. Refuses one of another model or gallery; found: see
        index_file.check_table."""
        index = cls(folder, gallery, fingerprint, width)
        if not (index.folder / TABLE).exists():
            return index
        table = read_table(index.folder)
        check_table(table, folder, gallery, fingerprint, found)
        try:
            index.faiss = read_vectors(index.folder, table, width)
        except InputError:
            if read_table(index.folder)["vectors"] == table["vectors"]:
                raise
            return cls.load(folder, gallery, fingerprint, width, found)  # it has just been saved anew
        index.kind, index.file = table["kind"], Path(table["vectors"]).name
        index.pictures, index.unreadable = table["pictures"], table["unreadable"]
        set_effort(index.faiss, index.kind)
        if table["gallery"] == os.path.abspath(gallery):
            index.on_disk = index.file, dict(index.pictures), dict(index.unreadable)
        return index

    def save(self):
        """Keep it in its folder, where it is not as it is there."""
        if self.folder and self.on_disk != (self.file, self.pictures, self.unreadable):
            self.file = write_index(self)
            self.on_disk = self.file, dict(self.pictures), dict(self.unreadable)

    def __len__(self):
        return len(self.pictures)

    @property
    def paths(self):
        return list(self.pictures)

    def update(self, found, encode):
        """Bring it up to date with `found` ({relative path: Stamp}); what is new or changed goes through
        encode(relative paths), which yields blocks as Update.run takes them."""
        update = Update(self, found)
        update.run(encode(update.new), self.kind)

    # ---- vectors ----

    def add(self, vectors):
        """Give vectors [n, D] the next rows."""
        self.file = None
        cells = cells_for(self.faiss.ntotal + len(vectors))
        if self.kind == "ivf" and cells > 2 * getattr(self.faiss, "nlist", 0):  # learned from too few
            self.faiss = new_faiss(self.kind, np.concatenate([self.vectors(), vectors]))
        else:
            self.faiss.add(vectors)

    def vectors(self, start=0, stop=None):
        """[n, D], the rows that Picture.row names."""
        stop = min(stop or self.faiss.ntotal, self.faiss.ntotal)
        if hasattr(self.faiss, "make_direct_map"):  # ivf
            self.faiss.make_direct_map()
        return self.faiss.reconstruct_n(start, stop - start)

    def feature_keys(self):
        """feature_keys of all vectors, which may be too many to hold a second time."""
        for start in range(0, self.faiss.ntotal, 4096):
            yield from feature_keys(self.vectors(start, start + 4096))

    # ---- answers ----

    def search(self, features, k, duplicates=False, there=None):
        """For each row of features [q, D] its best pictures: a list of (similarity, relative path).

        Of copies only the first is listed, unless duplicates. Of equal similarities the picture listed first
        comes first, as in utils.metrics. there(relative path): whether a picture can be shown; the next best
        takes the place of one that cannot.
        """
        if self.groups is None:
            self._group()
        total, there = self.faiss.ntotal, there or (lambda path: True)
        wanted = min(2 * k + 10, total)  # some more, so that equals at the border are seen
        if not wanted:
            return [[] for _ in features]

        def best(scores, rows):
            return list(islice(self._listed(scores, rows, duplicates, there), k))

        features = np.ascontiguousarray(features, np.float32)
        answers = []
        for feature, scores, rows in zip(features, *self.faiss.search(features, wanted), strict=True):
            answer, asked = best(scores, rows), wanted
            while len(answer) < k and asked < min(total, LOOKED_AT) and min(rows) >= 0:
                asked = min(4 * asked, total, LOOKED_AT)
                (scores,), (rows,) = self.faiss.search(feature[None], asked)
                answer = best(scores, rows)
            answers.append(answer)
        return answers

    def _group(self):
        self.groups = {}  # {row: relative paths}
        for path, picture in self.pictures.items():
            self.groups.setdefault(picture.row, []).append(path)
        self.place = {row: place for place, row in enumerate(self.groups)}

    def _listed(self, scores, rows, duplicates, there):
        """Yields (similarity, relative path) of rows that were found, best first."""
        found = zip(scores.tolist(), rows.tolist(), strict=True)
        hits = [(-score, self.place[row], row) for score, row in found if row in self.place]
        for score, _, row in sorted(hits):
            paths = filter(there, self.groups[row])
            for path in paths if duplicates else islice(paths, 1):
                yield -score, path

    def find(self, features, k, duplicates=False):
        """search() among what lies in the gallery now: (for each row of features a list of Hit, how many
        pictures that would have been found are no longer there, or hold something else by now)."""
        seen = {}

        def there(path):
            if path not in seen:
                seen[path] = self.is_there(path)
            return seen[path]

        answers = self.search(features, k, duplicates, there)
        lost = sum(not found for path, found in seen.items() if path not in self.out_of_reach)

        def hit(similarity, path):
            return Hit(similarity, path, 0 if duplicates else sum(map(there, self.copies(path))))

        return [[hit(*found) for found in answer] for answer in answers], lost

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
        return stamp[:2] == picture.stamp[:2]
