"""Which training pairs are taken for wrong: consensus division, CCD of RDE (arXiv 2308.09911).

Before each epoch the loss of every sample is computed; a mixture of two Gaussians calls those near its lower
mean clean. Global features and selected tokens vote; where they disagree a coin decides.
"""

import warnings

import numpy as np
import torch

from datasets.sampler import mixed
from utils.data_sets import name_of
from utils.dist import from_main
from utils.errors import InputError
from utils.extras import extra

FEWEST = 4  # samples that two Gaussians can be told of
CAREFUL = {"max_iter": 100, "tol": 1e-4, "reg_covar": 1e-6}
USUAL = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


def careful(args, moved):
    """Whether the mixture goes by the published settings for RSTPReid and for much noise. moved: the fraction
    of captions that are another sample's on purpose."""
    return name_of(args) == "RSTPReid" or moved > 0.4


def check_samples(number, which=""):
    if number < FEWEST:
        raise InputError(
            f"--division needs at least {FEWEST} training samples, and there are {number}{which}: leave it "
            "out"
        )


def gaussian_mixture(samples):
    """scikit-learn's. Raises InputError where it is not installed, or there are too few samples for two."""
    check_samples(samples)
    return extra("sklearn.mixture", "requirements-methods.txt").GaussianMixture


def divide(model, loader, device, seed, careful, after_batch=None):
    """(weights [N] of the training samples, 0 or 1; how many both, one and none of the votes call clean).

    The main process's, in every process; a function of the weights, the loader's epoch and the seed. A sample
    that is not seen, as the identity sampler leaves some out, counts as clean. after_batch: called after each
    batch; may raise.
    """
    mixture = gaussian_mixture(len(loader.dataset))  # before a pass over all
    kinds = sample_losses(model, loader, device, after_batch)
    votes = [clean(losses, mixed(seed, n) % 2**32, careful, mixture) for n, losses in enumerate(kinds)]
    agreed = torch.from_numpy(sum(vote.astype(np.int64) for vote in votes))
    coin = torch.randint(0, 2, agreed.shape, generator=torch.Generator().manual_seed(mixed(seed, 2)))
    weights = torch.where(agreed == len(votes), 1, torch.where(agreed == 0, 0, coin))
    counts = [int((agreed == n).sum()) for n in range(len(votes) + 1)]
    return from_main((weights, (counts[-1], sum(counts[1:-1]), counts[0])))


@torch.no_grad()
def sample_losses(model, loader, device, after_batch=None):
    """[N] losses of the training samples in batches as in training, of the global features and, with token
    selection, of the second embedding; NaN where a sample is not seen."""
    was_training = model.training
    model.eval()
    found = torch.full((1 + model.selects, len(loader.dataset)), torch.nan, device=device)
    for batch in loader:
        indices, losses = model.losses_of_samples(batch.planned().to(device))
        found[:, indices] = losses
        if after_batch:
            after_batch()
    model.train(was_training)
    return list(found.double().cpu().numpy())


def clean(losses, seed, careful, mixture):
    """[N] truth values: whether a sample is taken for right. seed: of the mixture's start, below 2^32."""
    seen = np.isfinite(losses)
    known = losses[seen]
    check_samples(len(known), " whose loss is a number")
    low, high = known.min(), known.max()
    found = np.ones(len(losses), bool)
    if high > low:
        scaled = ((known - low) / (high - low))[:, None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it ends before it has converged is part of the recipe
            fitted = mixture(2, random_state=seed, **(CAREFUL if careful else USUAL)).fit(scaled)
        found[seen] = split(fitted.predict_proba(scaled)[:, fitted.means_.argmin()])
    return found


def split(probability):
    """Which are clean by their probability [N] of being so. Where all are, one in a hundred is not."""
    threshold = 0.5
    if probability.min() > threshold:
        threshold = np.sort(probability)[len(probability) // 100]
    return probability > threshold
