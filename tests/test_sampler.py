"""The order of the training samples: published indices, and what an order must be."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.sampler import IdentityOrder, RandomOrder, identity_order, mixed

CASES = json.loads((Path(__file__).parent / "reference" / "identity_sampler.json").read_text())


# ---- identity ----


@pytest.mark.parametrize("case", CASES, ids=[f"seed {case['seed']}" for case in CASES])
def test_the_identity_order_is_the_published_one_under_the_same_draws(case):
    rng, np_rng = random.Random(case["seed"]), np.random.RandomState(case["seed"])
    order = identity_order(case["pids"], case["batch_size"], case["num_instance"], rng, np_rng)
    assert order == case["indices"]
    assert len(order) == case["yielded"]


def some_pids():
    """Twelve persons with one to nine samples each, in disorder."""
    pids = [pid for pid in range(12) for _ in range(1 + pid * 5 % 9)]
    random.Random(3).shuffle(pids)
    return pids


@pytest.mark.parametrize(("batch_size", "num_instance"), [(8, 4), (12, 3), (6, 2), (16, 4), (5, 1)])
def test_a_batch_holds_num_instance_samples_of_each_of_its_persons(batch_size, num_instance):
    pids = some_pids()
    sampler = IdentityOrder(pids, batch_size, num_instance, seed=7)
    order = [index for _, index in sampler]
    assert order and len(order) % batch_size == 0
    for start in range(0, len(order), batch_size):
        counts = Counter(pids[index] for index in order[start : start + batch_size])
        assert list(counts.values()) == [num_instance] * (batch_size // num_instance)


def test_only_persons_with_too_few_samples_give_one_twice():
    pids = some_pids()
    have = Counter(pids)
    drawn = Counter(index for _, index in IdentityOrder(pids, 8, 4, seed=7))
    assert {index for index, times in drawn.items() if times > 1} <= {
        index for index, pid in enumerate(pids) if have[pid] < 4
    }


def test_the_identity_order_ends_only_when_fewer_persons_remain_than_a_batch_needs():
    pids = some_pids()
    used = Counter(pids[index] for _, index in IdentityOrder(pids, 8, 4, seed=7))
    left = [pid for pid, have in Counter(pids).items() if used[pid] < max(have // 4, 1) * 4]
    assert len(left) < 2


@pytest.mark.parametrize("case", CASES, ids=[f"seed {case['seed']}" for case in CASES])
def test_the_length_of_the_identity_order_is_what_it_yields(case):
    sampler = IdentityOrder(case["pids"], case["batch_size"], case["num_instance"], seed=1)
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
    assert len(IdentityOrder([0, 0, 1, 1], batch_size=12, num_instance=4, seed=0)) == 0  # too few persons


# ---- random ----


@pytest.mark.parametrize("size", [0, 1, 2, 97])
def test_the_random_order_holds_every_sample_once(size):
    sampler = RandomOrder(size, seed=5)
    assert sorted(index for _, index in sampler) == list(range(size))
    assert len(sampler) == size


def test_every_sample_is_as_likely_in_every_place():
    size, orders = 5, 4000
    counts = np.zeros((size, size))
    sampler = RandomOrder(size, seed=0)
    for epoch in range(1, orders + 1):
        sampler.set_epoch(epoch)
        counts[range(size), [index for _, index in sampler]] += 1
    spread = (orders / size * (1 - 1 / size)) ** 0.5
    assert np.abs(counts - orders / size).max() < 5 * spread


# ---- both: a function of (seed, epoch) ----


def new_sampler(kind, seed):
    return RandomOrder(97, seed) if kind == "random" else IdentityOrder(some_pids(), 8, 4, seed)


def order_in(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_the_order_is_a_function_of_seed_and_epoch(kind):
    kept = new_sampler(kind, seed=2)
    first = [order_in(kept, epoch) for epoch in (1, 2, 3)]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = [order_in(new_sampler(kind, seed=2), epoch) for epoch in (3, 2, 1)][::-1]
    assert first == again  # whatever ran before, and whatever the global generators hold
    assert order_in(kept, 2) == first[1] == list(kept)


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_epochs_and_seeds_each_give_another_order(kind):
    orders = [
        tuple(index for _, index in order_in(new_sampler(kind, seed), epoch))
        for seed in range(4)
        for epoch in range(1, 5)
    ]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_drawing_an_order_leaves_the_global_generators_alone(kind):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    order_in(new_sampler(kind, seed=2), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_each_item_carries_the_epoch(kind):
    assert {epoch for epoch, _ in new_sampler(kind, seed=2)} == {1}
    assert {epoch for epoch, _ in order_in(new_sampler(kind, seed=2), 4)} == {4}


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_an_interrupted_epoch_goes_on_where_it_was(kind):
    sampler = new_sampler(kind, seed=2)
    whole = order_in(sampler, 3)
    for start in (0, 1, 8, len(whole), len(whole) + 1):
        sampler.set_epoch(3, start)
        assert list(sampler) == whole[start:] and len(sampler) == len(whole[start:])
    assert order_in(sampler, 3) == whole


def test_seeds_mixed_of_neighbouring_numbers_are_all_different_and_fit_63_bits():
    seeds = [mixed(a, b, c, d) for a in range(4) for b in range(12) for c in range(40) for d in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed(1, 2) != mixed(2, 1)
