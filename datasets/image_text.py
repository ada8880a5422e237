"""Samples and batches. A training sample's randomness is a function of (seed, epoch, sample)."""

import math
import random

import torch
from torch.utils.data import Dataset, get_worker_info

from datasets.image_cache import DecodedImages
from datasets.sampler import mixed
from datasets.tokenizer import (
    SimpleTokenizer,
    augment_tokens,
    drop_words,
    mask_tokens,
    tokenize,
    tokenize_all,
)
from datasets.transforms import crop_padded, draw_augmentation, erase, normalise
from utils.dist import to_device
from utils.errors import InputError
from utils.losses import second_factor


class PairDataset(Dataset):
    """Training pairs. Asked for a list of (epoch, index), it gives a batch; `finish` does the rest.

    samples: list of annotations.TrainSample. masking: (mask_rate, unchanged_rate), or None for no masked ids.
    clean_captions: keep caption_ids unmasked; else they are the masked ids, as published.
    images: where pixels come from, if not from decoding the file: see datasets.image_cache.
    text_aug: augment captions by tokenizer.augment_tokens. text_drop: its probability for drop_words there.
    second_captions: what a second caption of each sample is drawn of, as datasets.records has it; or empty.
    skip_bad: leave out a sample whose image cannot be read, and name it in `left_out`, instead of an error.
    """

    def __init__(
        self,
        samples,
        img_size,
        text_length,
        seed,
        img_aug=False,
        masking=None,
        clean_captions=False,
        images=None,
        skip_bad=False,
        text_aug=False,
        text_drop=0.0,
        second_captions=(),
    ):
        self.skip_bad, self.text_aug, self.text_drop = skip_bad, text_aug, text_drop
        self.second_captions = second_captions
        self.tokenizer = SimpleTokenizer() if text_drop or second_captions else None
        self.samples, self.img_size, self.seed, self.img_aug = samples, tuple(img_size), seed, img_aug
        self.masking, self.clean_captions = masking, clean_captions
        self.images = DecodedImages(img_size) if images is None else images
        self.caption_ids = tokenize_all([sample.caption for sample in samples], text_length)

    def __len__(self):
        return len(self.samples)

    def __getitems__(self, keys):
        """Batch of host tensors: uint8 images [B, 3, H, W], the boxes [B, 4] that are yet to be erased, and
        `left_out`, {path: why} of images that could not be read."""
        generator = torch.Generator()
        paths = [self.samples[index].image_path for _, index in keys]
        found, left_out = pixels_of(self.images, paths, self.skip_bad)
        keys = [key for key, path in zip(keys, paths, strict=True) if path in found]
        samples = [self.samples[index] for _, index in keys]
        images = empty_images(len(keys), self.img_size)
        caption_ids = self.caption_ids[[index for _, index in keys]]
        boxes, noise = [], torch.empty(len(keys), 2, caption_ids.shape[1])
        for row, ((epoch, index), sample) in enumerate(zip(keys, samples, strict=True)):
            # image and mask draw from two streams: --img_aug does not change the masks
            generator.manual_seed(mixed(self.seed, epoch, index, 0))
            flip, top, left, box = draw_augmentation(*self.img_size, generator, self.img_aug)
            pixels = found[sample.image_path]
            crop_padded(pixels.flip(-1).numpy() if flip else pixels.numpy(), top, left, images[row].numpy())
            boxes.append(box)
            if self.masking:
                generator.manual_seed(mixed(self.seed, epoch, index, 1))
                noise[row].uniform_(generator=generator)
            if self.text_drop:
                rng = random.Random(mixed(self.seed, epoch, index, 3))
                caption = drop_words(sample.caption, self.text_drop, rng)
                caption_ids[row] = tokenize(caption, self.tokenizer, caption_ids.shape[1])
            if self.text_aug:
                rng = random.Random(mixed(self.seed, epoch, index, 2))
                caption_ids[row] = augment_tokens(caption_ids[row], rng)
        batch = {
            "pids": torch.tensor([sample.pid for sample in samples], dtype=torch.long),
            "image_ids": torch.tensor([sample.image_id for sample in samples], dtype=torch.long),
            "images": images,
            "caption_ids": caption_ids,
            "indices": torch.tensor([index for _, index in keys], dtype=torch.long),
            "boxes": torch.tensor(boxes, dtype=torch.long).reshape(-1, 4),
            "left_out": left_out,
        }
        if self.masking:
            batch["mlm_ids"], batch["mlm_labels"] = mask_tokens(batch["caption_ids"], noise, *self.masking)
            if not self.clean_captions:
                batch["caption_ids"] = batch["mlm_ids"].clone()  # the published masking works in place
        if self.second_captions:
            batch.update(self.drawn_second(keys))
        return batch

    def drawn_second(self, keys):
        """{name: (B, …)} of what a batch has of second captions, drawn from a stream of their own as in RDA
        (ICL, CVPR 2025): the groups shuffled, of each a sentence at random, joined, tokenised, augmented."""
        ids = self.caption_ids.new_zeros(len(keys), self.caption_ids.shape[1])
        for row, (epoch, index) in enumerate(keys):
            rng = random.Random(mixed(self.seed, epoch, index, 4))
            groups = list(self.second_captions[index])
            rng.shuffle(groups)
            text = " ".join(rng.choice(group) for group in groups)
            ids[row] = tokenize(text, self.tokenizer, ids.shape[1])
            if self.text_aug:
                ids[row] = augment_tokens(ids[row], rng)
        return {
            "second_caption_ids": ids,
            "second_factor": torch.tensor([second_factor(epoch) for epoch, _ in keys]),
        }


def pixels_of(images, paths, skip_bad):
    """({path: pixels}, {path: why}): what could be read and, with skip_bad, what could not."""
    pixels, left_out = {}, {}
    for path in paths:
        try:
            pixels[path] = images[path]
        except InputError as error:
            if not skip_bad:
                raise
            left_out[path] = str(error)
    return pixels, left_out


def empty_images(number, img_size):
    """Room for uint8 images [number, 3, H, W]; in a loading process, where the main one can read it."""
    shape = (number, 3, *img_size)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # as PyTorch's default_collate makes it: the batch is handed over without another copy
    shared = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)


class ImageDataset(Dataset):
    """Gallery. Asked for a list of rows, it gives pids [B], uint8 images [B, 3, H, W] and {row: why} of those
    left out. images, skip_bad: as for PairDataset."""

    def __init__(self, pids, image_paths, img_size, images=None, skip_bad=False):
        self.pids, self.image_paths, self.img_size, self.skip_bad = pids, image_paths, img_size, skip_bad
        self.images = DecodedImages(img_size) if images is None else images

    def __len__(self):
        return len(self.pids)

    def __getitems__(self, rows):
        paths = [self.image_paths[row] for row in rows]
        found, bad = pixels_of(self.images, paths, self.skip_bad)
        good = [(row, path) for row, path in zip(rows, paths, strict=True) if path in found]
        images = empty_images(len(good), self.img_size)
        for image, (_, path) in zip(images, good, strict=True):
            image.copy_(found[path])
        left_out = {row: bad[path] for row, path in zip(rows, paths, strict=True) if path in bad}
        return torch.tensor([self.pids[row] for row, _ in good], dtype=torch.long), images, left_out


class CaptionDataset(Dataset):
    """Queries: (pid, caption ids [L])."""

    def __init__(self, pids, captions, text_length):
        self.pids, self.captions = pids, captions
        self.caption_ids = tokenize_all(captions, text_length)

    def __len__(self):
        return len(self.pids)

    def __getitem__(self, index):
        return self.pids[index], self.caption_ids[index]


def finish(images, device, boxes=None):
    """uint8 [B, 3, H, W] to normalised floats on the device, the boxes erased."""
    images = normalise(to_device(images, device))
    if boxes is not None and bool((boxes[:, 2] > 0).any()):
        erase(images, to_device(boxes, device))
    return images
