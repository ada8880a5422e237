"""Ranking a gallery for each query, in chunks of queries and without sorting it."""

from typing import NamedTuple

import numpy as np
import torch

from utils.dist import gather, share
from utils.errors import InputError

CHUNK = 1 << 20  # similarities held at once
MANY = 256  # from so many matches on a sort of the row is quicker than a comparison for each


class Ranking(NamedTuple):
    """cmc: [max_rank] in %, mAP and mINP in %, float64. indices: [Q, min(max_rank, G)], best first.

    unmatched: queries without a match in the gallery (misses, with AP and INP 0).
    tied: queries in which a match or one of the best shares its similarity with another image; the lower
    gallery index then comes first.
    """

    cmc: torch.Tensor
    mAP: torch.Tensor
    mINP: torch.Tensor
    indices: torch.Tensor
    unmatched: int
    tied: int


def rank(similarity, q_pids, g_pids, max_rank=10, get_mAP=True):
    """Figures of a similarity matrix [Q, G]: cmc [max_rank] in %, mAP in %, mINP in %, indices [Q, max_rank].

    Without get_mAP: cmc, indices. cmc[k-1] is the fraction of queries with a match among the first k; AP the
    mean over matches of (matches so far / rank); INP (number of matches / rank of the last one).

    One query for person 1, whose images come second and third:

    >>> cmc, mAP, mINP, indices = rank(torch.tensor([[0.9, 0.5, 0.7]]), [1], [2, 1, 1], max_rank=2)
    >>> cmc.tolist(), round(mAP.item(), 2), round(mINP.item(), 2), indices.tolist()
    ([0.0, 100.0], 58.33, 66.67, [[0, 2]])
    """
    result = rank_by(lambda rows: similarity[rows], q_pids, g_pids, max_rank)
    if not get_mAP:
        return result.cmc, result.indices
    return result.cmc, result.mAP, result.mINP, result.indices


def rank_features(query, gallery, q_pids, g_pids, max_rank=10):
    """The Ranking by inner product of features [Q, D] with [G, D]; the matrix [Q, G] is never held whole.

    Several processes rank a share of the queries each, and all get the Ranking of all.
    """
    own = share(len(query))
    number = own.stop - own.start
    if not number:  # fewer queries than processes: this one ranks one too, and it does not count
        own = slice(0, 1)
    query, q_pids = query[own], q_pids[own]
    return rank_by(
        lambda rows: query[rows] @ gallery.t(),
        q_pids,
        g_pids,
        max_rank,
        gathered=lambda values: gather(values[:number]),
    )


def rank_by(similarity_of, q_pids, g_pids, max_rank=10, gathered=lambda values: values):
    """The Ranking where similarity_of(slice of queries) gives their rows [q, G].

    gathered: takes what was found of each query, [Q, …], to the same of all that the figures are of.
    """
    q_pids, g_pids = torch.as_tensor(q_pids), torch.as_tensor(g_pids)
    Q, G = len(q_pids), len(g_pids)
    if not Q or not G:
        raise InputError(f"nothing to rank: {Q} queries, {G} gallery images")
    by_pid = torch.argsort(g_pids, stable=True)
    sorted_pids = g_pids[by_pid]
    chunks, rows_at_once = [], max(1, CHUNK // G)
    for start in range(0, Q, rows_at_once):
        rows = slice(start, min(start + rows_at_once, Q))
        similarity = similarity_of(rows).detach()
        if similarity.dtype not in (torch.float32, torch.float64):
            similarity = similarity.float()
        pids, order, sorted_g = (x.to(similarity.device) for x in (q_pids[rows], by_pid, sorted_pids))
        begin = torch.searchsorted(sorted_g, pids)
        number = torch.searchsorted(sorted_g, pids, right=True) - begin  # (q,) matches of each query
        slots = torch.arange(max(int(number.max()), 1), device=pids.device)
        matches = order[(begin[:, None] + slots).clamp(max=G - 1)]  # of each row the first `number` count
        ranks, best, tied = match_ranks(similarity, matches, number, min(max_rank, G))
        reached = ranks[:, :1] <= torch.arange(1, max_rank + 1, device=pids.device)  # (q, max_rank)
        precision = torch.where(slots < number[:, None], (slots + 1) / ranks.double(), 0)
        AP = precision.sum(1) / number.clamp(min=1)
        last = ranks.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0]
        INP = torch.where(number > 0, number / last.double(), 0)
        chunks.append((reached & (number > 0)[:, None], AP, INP, best, tied))
    reached, AP, INP, indices, tied = (gathered(torch.cat(parts)) for parts in zip(*chunks, strict=True))
    return Ranking(
        cmc=100 * reached.double().mean(0),
        mAP=100 * AP.mean(),
        mINP=100 * INP.mean(),
        indices=indices,
        unmatched=int((INP == 0).sum()),
        tied=int(tied.sum()),
    )


def match_ranks(similarity, matches, number, k):
    """Ranks, ascending, of each query's matches among its gallery, without sorting it.

    similarity: [q, G]. matches: [q, M] gallery indices, of which the first number[q] count. The rank of a
    match is the number of images that score at least as much; rows with ties are sorted, stably.
    Returns ranks [q, M], 1 where there is no match; the k best indices [q, k]; which rows are tied [q].
    """
    if similarity.sum().isnan() and similarity.isnan().any():  # a sum is quick; of inf and -inf it is NaN too
        raise InputError(
            "the similarities hold NaN: the features of this model are not numbers, so nothing can be ranked "
            "(--precision fp32 helps where its weights are numbers and fp16 overflows)"
        )
    q, G = similarity.shape
    slots = torch.arange(matches.shape[1], device=matches.device)
    scores = similarity.gather(1, matches).masked_fill(slots >= number[:, None], -torch.inf)
    scores, _ = scores.sort(dim=1, descending=True)  # (q, M): the best match first
    values, best = similarity.topk(min(k + 1, G), dim=1)
    best, tied = best[:, :k].clone(), (values[:, 1:] == values[:, :-1]).any(1)
    ranks, many = torch.ones_like(matches), number > MANY
    for slot in range(min(int(number.max()), MANY)):
        rows = ((number > slot) & ~many).nonzero()[:, 0]
        part = similarity if len(rows) == q else similarity[rows]
        at_least, above = count_reaching(part, scores[rows, slot, None])
        ranks[rows, slot] = at_least
        tied[rows] |= at_least != above + 1
    for row in (tied | many).nonzero()[:, 0].tolist():
        order = similarity[row].argsort(descending=True, stable=True)
        best[row] = order[:k]
        position = torch.empty_like(order)
        position[order] = torch.arange(1, G + 1, device=order.device)
        ranks[row, : number[row]], _ = position[matches[row, : number[row]]].sort()
    return ranks, best, tied


def count_reaching(values, threshold):
    """How many of each row of values [q, G] are at least, and how many above, the row's threshold [q, 1].

    On a CPU by NumPy, whose comparisons are six times faster, and the truth values, bytes of 0 and 1, are
    added eight at a time, as words: at most 255 of them, so that no byte runs over.
    """
    if values.device.type != "cpu":
        return (values >= threshold).sum(1), (values > threshold).sum(1)
    values, threshold = values.numpy(), threshold.numpy()
    q, G = values.shape
    flags = np.zeros((q, -(-G // 8) * 8), dtype=bool)
    words = flags.view(np.int64)
    counts = []
    for compare in (np.greater_equal, np.greater):
        compare(values, threshold, out=flags[:, :G])
        sums = [words[:, i : i + 255].sum(1) for i in range(0, words.shape[1], 255)]
        counts.append(np.stack(sums, axis=1).view(np.uint8).sum(1, dtype=np.int64))
    return tuple(map(torch.from_numpy, counts))
