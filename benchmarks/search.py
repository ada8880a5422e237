"""Searching: time of an answer, and the recall and time of the index types against exact search.

python -m benchmarks.search                              an answer over 10 000 pictures, ViT-B/16's size
python -m benchmarks.search --index 1000000              flat, ivf and hnsw over a million vectors
python -m benchmarks.search --index 200000 --kinds ivf   a smaller one

Vectors are drawn: persons in a space of 64 dimensions, turned into 512, ten noisy pictures each; a query is
another noisy view of a person. Evenly spread vectors would be harder for ivf and hnsw than features are.
"""

import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import CLOCKS, new_parser, record, timed
from retrieval.encoders import Encoders
from retrieval.index import GalleryIndex
from retrieval.pictures import Stamp
from retrieval.vectors import new_faiss, set_effort
from utils.extras import extra

WIDTH, LATENT, VIEWS = 512, 64, 10


def drawn(number, queries, seed=0):
    """(vectors [number, 512], queries [queries, 512]), L2-normalised fp32."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, LATENT)))[0].T.astype(np.float32)
    persons = rng.standard_normal((-(-number // VIEWS), LATENT), np.float32)

    def views(who):
        latent = persons[who] + 0.6 * rng.standard_normal((len(who), LATENT), np.float32)
        found = latent @ turn
        found += 0.02 * rng.standard_normal(found.shape, np.float32)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found

    vectors = np.empty((number, WIDTH), np.float32)
    for start in range(0, number, 100_000):
        vectors[start : start + 100_000] = views(np.arange(start, min(start + 100_000, number)) // VIEWS)
    return vectors, views(rng.integers(len(persons), size=queries))


def answers(pictures, repeats):
    """Milliseconds from a typed sentence to its ten best of `pictures`, model and index loaded."""
    from model import build_model
    from utils.options import get_args

    args = get_args(["--pretrain_choice", "random", "--loss_names", "sdm", "--device", "cpu"])
    model = build_model(args, 1)
    encoders = Encoders(model, args.img_size, args.text_length, torch.device("cpu"), "drawn")
    index = GalleryIndex(None, ".", "drawn", WIDTH)
    vectors, _ = drawn(pictures, 1)
    found = {f"{n:07d}.jpg": Stamp(0, 0) for n in range(pictures)}
    index.update(found, lambda paths: [(paths, vectors[: len(paths)], {})])
    colours = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "pink", "orange")
    sentences = [
        f"A {'wo' * (n % 2)}man with {colours[n % 10]} hair is wearing a {colours[n // 10 % 10]} coat, "
        f"{colours[n // 3 % 10]} trousers and white sneakers and carries a {colours[n // 7 % 10]} backpack."
        for n in range(repeats + 5)
    ]
    both, alone = [], []  # encoding and search, and search: seconds by each of CLOCKS
    for sentence in sentences:
        features, encoding = timed(encoders.text_features, [sentence])
        _, searching = timed(index.search, features, 10)
        both.append([sum(parts) for parts in zip(encoding, searching, strict=True)])
        alone.append(searching)
    for place, clock in enumerate(CLOCKS):
        times = sorted(1000 * taken[place] for taken in both[5:])
        arms = {"fastest": times[0], "median": statistics.median(times)}
        arms["95 %"] = times[int(0.95 * len(times))]
        record(f"answer over {pictures} pictures, ViT-B/16, {clock}", arms, "ms", None, repeats=repeats)
    arms = {"median": 1000 * statistics.median(cpu for _, cpu in alone[5:])}
    record(f"of it the search of {pictures} vectors, CPU time", arms, "ms", None, repeats=repeats)


def indices(number, kinds, queries, build_threads):
    """Of each type the time to build and to load, the file's size, a query's time, recall of the 10 best."""
    faiss = extra("faiss")
    threads = torch.get_num_threads()
    vectors, asked = drawn(number, queries)
    faiss.omp_set_num_threads(build_threads)
    _, exact = new_faiss("flat", vectors).search(asked, 10)
    figures = defaultdict(dict)  # by name and unit, then by type of index
    for kind in kinds:
        faiss.omp_set_num_threads(build_threads)
        index, built = timed(new_faiss, kind, vectors)
        figures["build, s"][kind], figures["build CPU, s"][kind] = built
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "index")
            faiss.write_index(index, path)
            del index
            figures["file, MiB"][kind] = os.path.getsize(path) / 2**20
            index, (figures["load, s"][kind], _) = timed(faiss.read_index, path)
        set_effort(index, kind)
        faiss.omp_set_num_threads(threads)
        found = [timed(index.search, query[None], 10) for query in asked]
        figures["query, ms"][kind] = 1000 * statistics.median(seconds for _, (seconds, _) in found)
        figures["query CPU, ms"][kind] = 1000 * statistics.median(cpu for _, (_, cpu) in found)
        right = [len(set(near[0]) & set(best)) for ((_, near), _), best in zip(found, exact, strict=True)]
        figures["recall at 10, %"][kind] = 10 * statistics.mean(right)
        del index
    how = {"queries": queries, "threads": {"build": build_threads, "query": threads}}
    for name, arms in figures.items():
        what, unit = name.split(", ")
        better = "more" if unit == "%" else "less"
        record(f"{what}, index of {number} vectors", arms, unit, "flat", better, **how)


def main(argv=None):
    parser = new_parser(__doc__, ["repeats", "threads"], repeats=100)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--index", type=int, metavar="VECTORS")
    parser.add_argument("--kinds", nargs="+", default=["flat", "ivf", "hnsw"])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--build_threads", type=int, help="of building; default: as --threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    extra("faiss").omp_set_num_threads(args.threads)
    if args.index:
        indices(args.index, args.kinds, args.queries, args.build_threads or args.threads)
    else:
        answers(args.pictures, args.repeats)


if __name__ == "__main__":
    main()
