"""The order of the training samples: a function of (seed, epoch). Each item is (epoch, index), which is all
that a sample needs to draw its own augmentation and mask."""

import random
from collections import defaultdict

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.dist import share

_GOLDEN, _MASK64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mixed(*numbers):
    """One well-mixed 63-bit seed out of several whole numbers (splitmix64 after each)."""
    z = 0
    for number in numbers:
        z = (z + number + 1) * _GOLDEN & _MASK64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
        z ^= z >> 31
    return z >> 1


class EpochSampler(Sampler):
    """Yields (epoch, index) in the order of the epoch that set_epoch names; epochs count from 1."""

    def __init__(self, seed):
        self.seed, self.epoch, self.start, self._known = seed, 1, 0, None

    def set_epoch(self, epoch, start=0):
        """start: how many samples of the epoch to leave out, since an interrupted run has had them."""
        self.epoch, self.start = epoch, start

    def order(self):
        if self._known is None or self._known[0] != self.epoch:
            self._known = (self.epoch, self.draw(self.epoch))
        return self._known[1]

    def __iter__(self):
        return ((self.epoch, index) for index in self.order()[self.start :])

    def __len__(self):
        return max(len(self.order()) - self.start, 0)


class BatchShares(Sampler):
    """Of each batch of an order, this process's share: together the processes see the batches that one would.

    The last batch may leave a process without a sample; it gets an empty list, so that all take each step.
    """

    def __init__(self, order, batch_size):
        self.order, self.batch_size = order, batch_size

    def set_epoch(self, epoch, start=0, samples=None):
        """start: batches of the epoch that an interrupted run has had; or samples, of all processes."""
        self.order.set_epoch(epoch, start * self.batch_size if samples is None else samples)

    def sizes(self):
        """Samples of each batch, in all processes together."""
        left = len(self.order)
        return [min(self.batch_size, left - start) for start in range(0, left, self.batch_size)]

    def __iter__(self):
        keys = iter(self.order)
        for size in self.sizes():
            batch = [next(keys) for _ in range(size)]
            yield batch[share(size)]

    def __len__(self):
        return len(self.sizes())


class RandomOrder(EpochSampler):
    """Every sample once, shuffled."""

    def __init__(self, size, seed):
        super().__init__(seed)
        self.size = size

    def draw(self, epoch):
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.size, generator=generator).tolist()


class IdentityOrder(EpochSampler):
    """batch_size / num_instance persons a batch, num_instance samples of each; see `identity_order`."""

    def __init__(self, pids, batch_size, num_instance, seed):
        super().__init__(seed)
        self.pids, self.batch_size, self.num_instance = pids, batch_size, num_instance

    def draw(self, epoch):
        key = mixed(self.seed, epoch) % 2**32
        rng, np_rng = random.Random(key), np.random.RandomState(key)
        return identity_order(self.pids, self.batch_size, self.num_instance, rng, np_rng)


def identity_order(pids, batch_size, num_instance, rng, np_rng):
    """Sample indices in the published RandomIdentitySampler's order (https://github.com/damo-cv/TransReID).

    A person's samples are shuffled and cut into groups of num_instance, the rest dropped; one with fewer
    gives a single group with repetitions. Batches draw persons that have a group left, until too few remain.
    rng: random.Random. np_rng: np.random.RandomState; it draws the repetitions.
    """
    samples = defaultdict(list)
    for index, pid in enumerate(pids):
        samples[pid].append(index)
    groups = {}
    for pid, indices in samples.items():
        if len(indices) < num_instance:
            indices = np_rng.choice(indices, size=num_instance, replace=True).tolist()
        else:
            indices = list(indices)
        rng.shuffle(indices)
        full = len(indices) // num_instance * num_instance
        groups[pid] = [indices[i : i + num_instance] for i in range(0, full, num_instance)]
    order, available, persons = [], list(samples), batch_size // num_instance
    while len(available) >= persons:
        for pid in rng.sample(available, persons):
            order.extend(groups[pid].pop(0))
            if not groups[pid]:
                available.remove(pid)
    return order
