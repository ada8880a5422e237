"""Ranking figures against published ones and against a plain sort of every row."""

import doctest

import numpy as np
import pytest
import torch

from tests.recipe import arrays, figures, pixels
from utils import metrics
from utils.errors import InputError
from utils.metrics import rank, rank_features

CASES = figures("metrics")["cases"]
DIRECTIONS = [
    pytest.param(case, direction, id=f"{case['index']}-{case['structure']}-{direction}")
    for case in CASES
    for direction in ("t2i", "i2t")
    if isinstance(case[direction], dict)
]
FIGURES = ("cmc", "mAP", "mINP")


def problem(case, direction):
    """(similarity, q_pids, g_pids) of a published case: pixels, more where persons agree, some rounded."""
    stored = arrays("metrics")
    q_pids, g_pids = stored[f"{case['index']}_q_pids"], stored[f"{case['index']}_g_pids"]
    match = (q_pids[:, None] == g_pids[None, :]).numpy()
    similarity = pixels(case["seed"], case["shape"]).numpy() + np.float32(case["bonus"]) * match
    if case["round_to"]:
        similarity = np.round(similarity * case["round_to"]) / case["round_to"]
    similarity = torch.from_numpy(similarity.astype(np.float32))
    assert similarity.sum(dtype=torch.float64).item() == pytest.approx(case["checksum"][0], rel=1e-9)
    assert similarity.norm(dtype=torch.float64).item() == pytest.approx(case["checksum"][1], rel=1e-9)
    return (similarity, q_pids, g_pids) if direction == "t2i" else (similarity.t(), g_pids, q_pids)


def by_sorting(similarity, q_pids, g_pids, max_rank=10):
    """The definition: each row sorted, ties in the gallery's order; every figure in float64."""
    similarity, q_pids, g_pids = (np.asarray(x) for x in (similarity, q_pids, g_pids))
    cmc, APs, INPs, orders = np.zeros(max_rank), [], [], []
    for row, pid in zip(similarity, q_pids, strict=True):
        order = np.argsort(-row.astype(np.float64), kind="stable")
        orders.append(order[:max_rank])
        ranks = np.flatnonzero(g_pids[order] == pid) + 1
        cmc += [bool((ranks <= k).any()) for k in range(1, max_rank + 1)]
        APs.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0.0)
        INPs.append(len(ranks) / ranks[-1] if len(ranks) else 0.0)
    return 100 * cmc / len(q_pids), 100 * np.mean(APs), 100 * np.mean(INPs), np.stack(orders)


def check(found, expected):
    cmc, mAP, mINP, indices = found
    assert cmc.tolist() == pytest.approx(expected[0].tolist(), abs=1e-9)
    assert (float(mAP), float(mINP)) == pytest.approx(expected[1:3], abs=1e-9)
    assert indices.tolist() == expected[3].tolist()


# ---- published cases ----


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_figures_are_the_published_ones(case, direction):
    published, exact = case[direction], case[direction]["float64_stable"]
    cmc, mAP, mINP, _ = rank(*problem(case, direction))
    found = {"cmc": cmc.tolist(), "mAP": float(mAP), "mINP": float(mINP)}
    for name in FIGURES:
        assert found[name] == pytest.approx(exact[name], abs=1e-9), name
        if not case["round_to"]:
            assert found[name] == pytest.approx(published[name], abs=1e-4), name
            continue
        # the published order of ties is an unstable sort's, so only its bounds hold
        for value, worst, best in zip(
            *(
                np.atleast_1d(x)
                for x in (found[name], published["ties_worst"][name], published["ties_best"][name])
            ),
            strict=True,
        ):
            assert worst <= value + 1e-9 and value <= best + 1e-9, name


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_the_ten_best_are_the_published_ones(case, direction):
    similarity, q_pids, g_pids = problem(case, direction)
    order = arrays("metrics")[f"{case['index']}_{direction}_order_first10"]
    indices = rank(similarity, q_pids, g_pids)[3]
    if not case["round_to"]:
        assert indices.tolist() == order.tolist()
    else:  # the same similarities in the same places, whatever the order of ties
        assert torch.equal(similarity.gather(1, indices), similarity.gather(1, order))


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_without_mAP_it_gives_cmc_and_indices_alone(case, direction):
    with_mAP = rank(*problem(case, direction))
    cmc, indices = rank(*problem(case, direction), get_mAP=False)
    assert torch.equal(cmc, with_mAP[0]) and torch.equal(indices, with_mAP[3])
    if not case["round_to"] and "cmc_topk_path" in case[direction]:
        assert cmc.tolist() == pytest.approx(case[direction]["cmc_topk_path"], abs=1e-4)


# ---- against a plain sort ----


@pytest.mark.parametrize("seed", range(20))
def test_rank_equals_a_stable_sort_however_many_ties_there_are(seed):
    random = np.random.default_rng(seed)
    Q, G, persons, levels = (
        int(random.integers(low, high)) for low, high in ((1, 40), (1, 60), (1, 12), (1, 9))
    )
    similarity = random.integers(-levels, levels + 1, (Q, G)).astype(np.float32) / 4
    if seed % 2:  # hardly any
        similarity += random.random((Q, G), np.float32)
    q_pids, g_pids = random.integers(0, persons, Q), random.integers(0, persons, G)
    found = rank(torch.from_numpy(similarity), torch.from_numpy(q_pids), torch.from_numpy(g_pids))
    expected = by_sorting(similarity, q_pids, g_pids)
    check(found, expected)


@pytest.mark.parametrize("levels", [1, 1000, 10**9], ids=["two values", "many ties", "few ties"])
@pytest.mark.parametrize("G", [255, 256, 2040, 2041, 2049, 9001])
def test_rank_equals_a_stable_sort_in_large_galleries(G, levels):
    """Queries with 1, 3, 40, hundreds of matches and none; counts beyond what a byte holds."""
    random = np.random.default_rng(G)
    similarity = (random.integers(0, levels + 1, (5, G)) / levels).astype(np.float32)
    g_pids = np.full(G, 9)
    g_pids[random.permutation(G)[:44]] = [1] + [2] * 3 + [3] * 40
    q_pids = np.array([3, 1, 9, 7, 2])
    found = rank(torch.from_numpy(similarity), torch.from_numpy(q_pids), torch.from_numpy(g_pids))
    check(found, by_sorting(similarity, q_pids, g_pids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_similarities_of_any_precision_are_ranked(dtype):
    similarity = pixels(12, (9, 30)).to(dtype).requires_grad_()
    q_pids, g_pids = torch.arange(9) % 4, torch.arange(30) % 5
    check(rank(similarity, q_pids, g_pids), by_sorting(similarity.detach().double(), q_pids, g_pids))


def test_neighbours_in_fp32_are_no_ties():
    a, b = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    similarity = torch.tensor([[a, b, a, b], [0.0, -1e-45, 1e-45, 0.0], [-a, -b, -b, -a]])
    check(
        rank(similarity, torch.tensor([1, 2, 2]), torch.tensor([1, 2, 2, 1])),
        by_sorting(similarity, [1, 2, 2], [1, 2, 2, 1]),
    )


def test_zero_and_minus_zero_are_tied():
    similarity = torch.tensor([[-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]])
    check(
        rank(similarity, torch.tensor([1, 2]), torch.tensor([2, 1, 1])),
        by_sorting(similarity, [1, 2], [2, 1, 1]),
    )


@pytest.mark.parametrize("chunk", [1, 700, 1 << 40])
@pytest.mark.parametrize("index", [4, 8], ids=["uneven", "ties"])
def test_the_chunk_size_changes_nothing(chunk, index, monkeypatch):
    whole = rank(*problem(CASES[index], "t2i"))
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    for found, expected in zip(rank(*problem(CASES[index], "t2i")), whole, strict=True):
        assert torch.equal(found, expected)


def test_ranking_features_equals_ranking_their_products():
    query, gallery = pixels(3, (31, 8)), pixels(4, (47, 8))
    q_pids, g_pids = torch.arange(31) % 9, torch.arange(47) % 11
    ranking = rank_features(query, gallery, q_pids, g_pids)
    for found, expected in zip(ranking[:4], rank(query @ gallery.t(), q_pids, g_pids), strict=True):
        assert torch.equal(found, expected)
    assert (ranking.unmatched, ranking.tied) == (0, 0)


# ---- edges ----


def test_a_query_without_a_match_is_a_miss_with_an_AP_of_0():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    q_pids, g_pids = torch.tensor([1, 7, 2]), torch.tensor([1, 2, 2])
    cmc, mAP, mINP, _ = rank(similarity, q_pids, g_pids, max_rank=4)
    assert cmc.tolist() == pytest.approx([200 / 3] * 4)  # never found, not even beyond the gallery's end
    assert float(mAP) == pytest.approx(200 / 3) and float(mINP) == pytest.approx(200 / 3)
    ranking = rank_features(similarity, torch.eye(3), q_pids, g_pids)
    assert ranking.unmatched == 1


def test_no_query_with_a_match_gives_figures_of_0():
    cmc, mAP, mINP, indices = rank(torch.rand(2, 3), torch.tensor([8, 9]), torch.tensor([1, 2, 2]))
    assert cmc.tolist() == [0] * 10 and float(mAP) == float(mINP) == 0
    assert indices.shape == (2, 3)


def test_a_gallery_of_one_image():
    cmc, mAP, mINP, indices = rank(torch.tensor([[0.3]]), torch.tensor([4]), torch.tensor([4]))
    assert cmc.tolist() == [100] * 10  # the published code gives one entry, and none without mAP
    assert float(mAP) == float(mINP) == 100
    assert indices.tolist() == [[0]]


@pytest.mark.parametrize("get_mAP", [True, False])
def test_a_gallery_smaller_than_max_rank_fills_the_table(get_mAP):
    similarity, q_pids, g_pids = (
        pixels(9, (5, 6)),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    found = rank(similarity, q_pids, g_pids, get_mAP=get_mAP)
    cmc, indices = found[0], found[-1]
    expected = by_sorting(similarity, q_pids, g_pids)
    assert cmc.shape == (10,) and cmc.tolist() == pytest.approx(expected[0].tolist())
    assert cmc[5:].tolist() == [100] * 5
    assert indices.tolist() == expected[3].tolist() and indices.shape == (5, 6)


@pytest.mark.parametrize("max_rank", [1, 3, 17])
def test_max_rank_sets_how_far_the_table_goes(max_rank):
    similarity, q_pids, g_pids = problem(CASES[4], "t2i")
    check(rank(similarity, q_pids, g_pids, max_rank), by_sorting(similarity, q_pids, g_pids, max_rank))


def test_similarities_that_are_not_numbers_are_refused():
    similarity = torch.rand(4, 5)
    similarity[2, 3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        rank(similarity, torch.arange(4), torch.arange(5))


@pytest.mark.parametrize(("Q", "G"), [(0, 3), (3, 0)])
def test_nothing_to_rank_is_refused(Q, G):
    with pytest.raises(InputError, match=f"nothing to rank: {Q} queries, {G} gallery images"):
        rank(torch.rand(Q, G), torch.arange(Q), torch.arange(G))


def test_the_example_in_ranks_docstring_is_true():
    examples = doctest.DocTestFinder().find(rank, "rank", globs={"rank": rank, "torch": torch})
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.tries >= 2 and runner.failures == 0
