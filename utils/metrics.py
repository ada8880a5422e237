"""Ranking a gallery for each query, in chunks of queries and without sorting it."""

from typing import NamedTuple

import torch

from utils.errors import InputError

CHUNK = 1 << 21  # similarities held at once


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

    Without get_mAP: cmc, indices. cmc[k-1] is the share of queries with a match among the first k; AP the
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
    """Ranking by inner product of features [Q, D] with [G, D]; the matrix [Q, G] is never held whole."""
    return rank_by(lambda rows: query[rows] @ gallery.t(), q_pids, g_pids, max_rank)


def rank_by(similarity_of, q_pids, g_pids, max_rank=10):
    """Ranking where similarity_of(slice of queries) gives their rows [q, G]."""
    q_pids, g_pids = torch.as_tensor(q_pids), torch.as_tensor(g_pids)
    Q, G = len(q_pids), len(g_pids)
    if not Q or not G:
        raise InputError(f"nothing to rank: {Q} queries, {G} gallery images")
    by_pid = torch.argsort(g_pids, stable=True)
    sorted_pids = g_pids[by_pid]
    first_ranks, precisions, inps, indices, tied = [], [], [], [], 0
    rows_at_once = max(1, CHUNK // G)
    for start in range(0, Q, rows_at_once):
        rows = slice(start, min(start + rows_at_once, Q))
        similarity = similarity_of(rows)
        pids, order, sorted_g = (x.to(similarity.device) for x in (q_pids[rows], by_pid, sorted_pids))
        begin = torch.searchsorted(sorted_g, pids)
        number = torch.searchsorted(sorted_g, pids, right=True) - begin  # (q,) matches of each query
        slots = torch.arange(max(int(number.max()), 1), device=pids.device)
        present = slots < number[:, None]  # (q, M)
        matches = order[(begin[:, None] + slots).clamp(max=G - 1)]  # gallery indices, where present
        ranks, best, ties = ranks_of(similarity, matches, present, min(max_rank, G))
        share = torch.where(present, (slots + 1) / ranks.double(), 0)
        last = ranks.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0]
        precisions.append(share.sum(1) / number.clamp(min=1))
        inps.append(torch.where(number > 0, number / last.double(), 0))
        first_ranks.append(torch.where(number > 0, ranks[:, 0], G + max_rank + 1))
        indices.append(best)
        tied += int(ties)
    first_rank = torch.cat(first_ranks)
    reached = first_rank[:, None] <= torch.arange(1, max_rank + 1, device=first_rank.device)
    return Ranking(
        cmc=100 * reached.double().mean(0),
        mAP=100 * torch.cat(precisions).mean(),
        mINP=100 * torch.cat(inps).mean(),
        indices=torch.cat(indices),
        unmatched=int((first_rank > G).sum()),
        tied=tied,
    )


def ranks_of(similarity, matches, present, k):
    """Ranks, ascending, of each query's matches among its gallery, without sorting it.

    similarity: [q, G]. matches, present: [q, M] gallery indices and which of them count. The rank of a match
    is 1 + the number of images that score above it; rows with ties are sorted, stably. Absent slots are last.
    Returns ranks [q, M], the k best indices [q, k], number of tied rows.
    """
    q, G = similarity.shape
    if similarity.isnan().any():
        raise InputError(
            "the similarities hold NaN: the features of this model are not numbers, so nothing can be ranked"
        )
    scores = similarity.gather(1, matches).masked_fill(~present, -torch.inf)
    scores, _ = scores.sort(dim=1, descending=True)  # (q, M): the best match first
    # one threshold counts what is above a score, one just below it also counts what equals it
    below = torch.nextafter(scores, torch.full_like(scores, -torch.inf))
    thresholds = torch.stack([scores, below], dim=2).flatten(1).flip(1).contiguous()  # ascending
    bucket = torch.searchsorted(
        thresholds, similarity.contiguous(), out_int32=True
    )  # thresholds below each value
    width = thresholds.shape[1] + 1
    bucket += torch.arange(0, q * width, width, dtype=torch.int32, device=bucket.device)[:, None]
    histogram = torch.bincount(bucket.flatten(), minlength=q * width).view(q, width)
    above = histogram.flip(1).cumsum(1)[:, :-1].view(q, -1, 2)  # (q, M, 2): strictly above, at or above
    ranks = 1 + above[:, :, 0]
    equal = above[:, :, 1] - above[:, :, 0]

    values, best = similarity.topk(min(k + 1, G), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    tied |= (
        (equal != 1) & (torch.arange(scores.shape[1], device=scores.device) < present.sum(1, keepdim=True))
    ).any(1)
    best = best[:, :k]
    for row in tied.nonzero()[:, 0].tolist():
        order = similarity[row].argsort(descending=True, stable=True)
        best[row] = order[:k]
        position = torch.empty_like(order)
        position[order] = torch.arange(1, G + 1, device=order.device)
        found, _ = position[matches[row][present[row]]].sort()
        ranks[row, : len(found)] = found
    return ranks, best, tied.sum()
