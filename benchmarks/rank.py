"""Ranking: time and extra memory against the published full sort.

python -m benchmarks.rank                    CUHK-PEDES' size, 6156 x 3074
python -m benchmarks.rank --large            ICFG-PEDES' size, 19848 x 19848, and a part of 2000 queries
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import published
from benchmarks.harness import new_parser, peak_memory, record, record_times
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
    parser = new_parser(__doc__, ["repeats", "threads"])
    parser.add_argument("--queries", type=int, default=6156)
    parser.add_argument("--gallery", type=int, default=3074)
    parser.add_argument("--persons", type=int, default=1000)
    parser.add_argument("--large", action="store_true")
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
    beyond = "beyond the matrix, which ours need not have"
    measure(f"ranking {size}", arms, repeats, "from a similarity matrix", beyond)
    arms = {
        "published": lambda: published.rank(text @ image.t(), q_pids, g_pids),
        "ours": lambda: rank_features(text, image, q_pids, g_pids),
    }
    del similarity
    note = "the product of features included, the same in both"
    measure(f"features to figures {size}", arms, repeats, note, "beyond the features")


def measure(what, arms, repeats, note, memory_note):
    record_times(what, arms, repeats, warm_up=0, note=note)
    extra = {name: peak_memory(run)[1] for name, run in arms.items()}
    if None not in extra.values():
        mebibytes = {name: bytes / 2**20 for name, bytes in extra.items()}
        record(f"{what}, extra memory", mebibytes, "MiB", note=memory_note)


def large(args):
    text, image, q_pids, g_pids = features(19848, 19848, args.persons)
    compare(text[:2000], image, q_pids[:2000], g_pids, args.repeats, "2000x19848")
    arms = {"ours": lambda: rank_features(text, image, q_pids, g_pids)}
    note = "the product of features included"
    measure("features to figures 19848x19848", arms, 1, note, "beyond the features")


if __name__ == "__main__":
    main()
