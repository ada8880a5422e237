"""TBPS-CLIP's augmentations (arXiv 2308.10045), made of torchvision's. What is drawn follows from a seed:
PyTorch's, NumPy's and Python's numbers, their generators seeded alike, in the published order."""

import functools
import random
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ImageFilter

from datasets.transforms import resize


@contextmanager
def seeded(seed):
    """PyTorch's generator of the CPU, from which torchvision draws, for a while; no other is touched."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@functools.cache
def strong_transforms(size):
    """Of a strong view: what comes before the blur, and the flip after it. size: (H, W)."""
    from torchvision import transforms as T  # half a second to load, and few trainings need it

    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    before = T.Compose([T.RandomResizedCrop(size, (0.2, 1.0)), jitter, T.RandomGrayscale(0.2)])
    return before, T.RandomHorizontalFlip()


def strong_view(picture, size, seed):
    """A picture of PIL's as SimCLR (arXiv 2002.05709) crops, colours and blurs it: uint8 [3, H, W]."""
    before, flip = strong_transforms(tuple(size))
    with seeded(seed):
        picture = before(picture)
        if torch.rand(1) < 0.5:
            radius = random.Random(seed).uniform(0.1, 2.0)
            picture = picture.filter(ImageFilter.GaussianBlur(radius))
        return resize(flip(picture), size)


@functools.cache
def six_transforms(size):
    """Of which two_of_six draws. size: (H, W)."""
    from torchvision import transforms as T

    return (
        T.ColorJitter(0.1, 0.1, 0.1, 0),
        T.RandomRotation(15),
        T.RandomResizedCrop(size, (0.9, 1.0)),
        T.RandomGrayscale(0.1),
        T.RandomHorizontalFlip(0.5),
        T.RandomErasing(0.5, scale=(0.10, 0.20), value=0),
    )


def two_of_six(pixels, seed):
    """uint8 [3, H, W] to floats in [0, 1], through two of the six, drawn with replacement."""
    six, pixels = six_transforms(tuple(pixels.shape[1:])), pixels.float() / 255
    with seeded(seed):
        for place in np.random.RandomState(seed % 2**32).randint(0, len(six), 2):
            pixels = six[place](pixels)
    return pixels
