"""Feature vectors in FAISS: the types of index, and which vectors are equal."""

import hashlib

import numpy as np

from utils.extras import extra


def feature_keys(vectors):
    """What rows [n, D] have in common only where they are equal to the last bit: 16 bytes each."""
    return [hashlib.blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(vectors)]


def cells_for(number):
    """How many cells of like vectors an ivf index of so many has: 4·√n."""
    return max(1, min(int(4 * number**0.5), number // 39))  # FAISS wants 39 vectors to learn a cell


def new_faiss(kind, vectors):
    """A FAISS index of L2-normalised vectors [n, D] by inner product: flat is exact, ivf and hnsw are not.

    ivf: cells of like vectors, of which a query visits a sixteenth, 64 at least.
    hnsw: a graph, 32 links a vector.
    """
    faiss = extra("faiss")
    n, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 64
    elif kind == "ivf" and n:
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(quantizer, width, cells_for(n), faiss.METRIC_INNER_PRODUCT)
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
