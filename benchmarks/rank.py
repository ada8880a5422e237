"""Ranking: time and extra memory against the published full sort.

python -m benchmarks.rank                    CUHK-PEDES' size, 6156 x 3074
python -m benchmarks.rank --large            ICFG-PEDES' size, 19848 x 19848, and a part of 2000 queries
"""

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import published
from benchmarks.harness import interleaved, peak_memory, record
from utils.metrics import rank, rank_features


def features(queries, gallery, persons, width=512, seed=0):
    """Drawn so that about half of the queries find their person first. (text, image, q_pids, g_pids)"""
    generator = torch.Generator().manual_seed(seed)
    q_pids, g_pids = torch.arange(queries) % persons, torch.arange(gallery) % persons
    centre = torch.randn(persons, width, generator=generator)
    text = centre[q_pids].add_(torch.randn(queries, width, generator=generator), alpha=3.0)
    image = centre[g_pids].add_(torch.randn(gallery, width, generator=generator), alpha=3.0)
    return F.normalize(text, dim=1), F.normalize(image, dim=1), q_pids, g_pids


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, default=6156)
    parser.add_argument("--gallery", type=int, default=3074)
    parser.add_argument("--persons", type=int, default=1000)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.large:
        return large(args)
    text, image, q_pids, g_pids = features(args.queries, args.gallery, args.persons)
    compare(text, image, q_pids, g_pids, args.repeats, f"{len(text)}x{len(image)}")


def compare(text, image, q_pids, g_pids, repeats, size):
    similarity = text @ image.t()
    arms = {
        "published": partial(published.rank, similarity, q_pids, g_pids),
        "ours": partial(rank, similarity, q_pids, g_pids),
    }
    ours, theirs = arms["ours"](), arms["published"]()
    for found, expected in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-4)
    del ours, theirs
    measure(
        f"ranking {size}",
        arms,
        repeats,
        "from a similarity matrix",
        "beyond the matrix, which ours need not have",
    )
    arms = {
        "published": lambda: published.rank(text @ image.t(), q_pids, g_pids),
        "ours": lambda: rank_features(text, image, q_pids, g_pids),
    }
    del similarity
    note = "the product of features included, the same in both"
    measure(f"features to figures {size}", arms, repeats, note, "beyond the features")


def measure(what, arms, repeats, note, memory_note):
    seconds, cpu_seconds = interleaved(arms, repeats, warm_up=0)
    record(f"{what}, time", seconds, "s", note=note)
    record(f"{what}, CPU time", cpu_seconds, "s", note=note)
    extra = {name: peak_memory(run)[1] for name, run in arms.items()}
    if all(value is not None for value in extra.values()):
        record(
            f"{what}, extra memory", {name: e / 2**20 for name, e in extra.items()}, "MiB", note=memory_note
        )


def large(args):
    text, image, q_pids, g_pids = features(19848, 19848, args.persons)
    compare(text[:2000], image, q_pids[:2000], g_pids, args.repeats, "2000x19848")
    start = time.perf_counter()
    cpu = time.process_time()
    _, extra = peak_memory(lambda: rank_features(text, image, q_pids, g_pids))
    record("features to figures 19848x19848, time", {"ours": time.perf_counter() - start}, "s")
    record("features to figures 19848x19848, CPU time", {"ours": time.process_time() - cpu}, "s")
    if extra is not None:
        record("features to figures 19848x19848, extra memory", {"ours": extra / 2**20}, "MiB")


if __name__ == "__main__":
    main()
