"""Samples and batches. A training sample's randomness is a function of (seed, epoch, sample)."""

import math
import random
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from datasets.augmentations import strong_view, two_of_six
from datasets.sampler import mixed
from datasets.tokenizer import (
    SimpleTokenizer,
    augment_tokens,
    drop_words,
    mask_tokens,
    plain_caption,
    similarity_mask,
    tokenize,
    tokenize_all,
)
from datasets.transforms import crop_padded, draw_augmentation, erase, normalise
from utils.device import to_device
from utils.errors import InputError
from utils.losses import second_factor

# what a training sample draws, each from mixed(seed, epoch, sample, one of these): what shares one is drawn
# alike, so that another change of captions or images takes the next number
IMAGE, MASKS, AUGMENT, DROP, SECOND_CAPTION, SIMILARITY, SECOND_VIEW = range(7)
STRONG_VIEWS, BACK_TRANSLATION = (7, 8), 9


class Images(NamedTuple):
    """Where a data set has its pixels from."""

    source: object  # source[path] is uint8 [3, H, W]; see datasets.image_cache.open_images
    img_size: tuple  # (H, W)
    skip_bad: bool = False  # leave out a picture that cannot be read, and say so, instead of an error

    def read(self, paths):
        """({path: pixels}, {path: why}): what could be read and, with skip_bad, what could not."""
        pixels, left_out = {}, {}
        for path in paths:
            try:
                pixels[path] = self.source[path]
            except InputError as error:
                if not self.skip_bad or error.of_disk:
                    raise
                left_out[path] = str(error)
        return pixels, left_out

    def room(self, number):
        """For uint8 images [number, 3, H, W]; in a loading process, where the main one can read it."""
        shape = (number, 3, *self.img_size)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        # as PyTorch's default_collate makes it: the batch is handed over without another copy
        shared = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
        return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)


class CaptionChanges(NamedTuple):
    """What becomes of a training caption, but for plain each time anew. What changes words does not go with
    by_similarity: utils.settings.check_losses."""

    masking: tuple | None = None  # (mask_rate, unchanged_rate); None: there are no masked ids
    by_similarity: bool = False  # they are not drawn with the batch: see masked_by
    clean: bool = False  # caption_ids stay unmasked; else they are the masked ids, as published
    augment: bool = False  # by tokenizer.augment_tokens
    drop: float = 0.0  # tokenizer.drop_words' probability, before that
    back_translation: float = 0.0  # the probability of its back-translation instead, first of all
    plain: bool = False  # it is read by tokenizer.plain_caption, as sentences are in testing


class Views(NamedTuple):
    """How the images of a training batch are seen."""

    second: bool = False  # each is drawn a second time
    strong: bool = False  # and twice by augmentations.strong_view
    two_of_six: bool = False  # the first and the second by augmentations.two_of_six, instead of img_aug


class PairDataset(Dataset):
    """Training pairs. Asked for a list of (epoch, index), it gives a batch; `finish` does the rest.

    samples: list of annotations.TrainSample. images: an Images. changes: a CaptionChanges. beside: {key: what
    the file holds of each sample under that key of datasets.records.BESIDE}. views: a Views.
    """

    def __init__(
        self, samples, images, text_length, seed, img_aug=False, changes=None, beside=None, views=None
    ):
        self.samples, self.images, self.seed, self.img_aug = samples, images, seed, img_aug
        self.changes, self.views, beside = changes or CaptionChanges(), views or Views(), beside or {}
        self.second_captions = beside.get("diversity_captions", ())
        self.back_translations = beside.get("captions_bt", ())
        self.tokenizer = SimpleTokenizer(plain=self.changes.plain)
        captions = [sample.caption for sample in samples]
        self.caption_ids = tokenize_all(captions, text_length, self.changes.plain)

    def __len__(self):
        return len(self.samples)

    def __getitems__(self, keys):
        """Batch of host tensors: uint8 images [B, 3, H, W], the boxes [B, 4] that are yet to be erased, and
        `left_out`, {path: why} of images that could not be read."""
        paths = [self.samples[index].image_path for _, index in keys]
        found, left_out = self.images.read(paths)
        keys = [key for key, path in zip(keys, paths, strict=True) if path in found]
        samples = [self.samples[index] for _, index in keys]
        pixels = [found[sample.image_path] for sample in samples]
        images, boxes = self.drawn_images(keys, pixels, IMAGE)
        caption_ids = self.drawn_captions(keys)
        batch = {
            "pids": torch.tensor([sample.pid for sample in samples], dtype=torch.long),
            "image_ids": torch.tensor([sample.image_id for sample in samples], dtype=torch.long),
            "images": images,
            "caption_ids": caption_ids,
            "indices": torch.tensor([index for _, index in keys], dtype=torch.long),
            "boxes": boxes,
            "left_out": left_out,
        }
        if self.changes.masking and not self.changes.by_similarity:
            noise, generator = torch.empty(len(keys), 2, caption_ids.shape[1]), torch.Generator()
            for row, key in zip(noise, keys, strict=True):
                row.uniform_(generator=generator.manual_seed(mixed(self.seed, *key, MASKS)))
            batch.update(self.masked(caption_ids, *mask_tokens(caption_ids, noise, *self.changes.masking)))
        if self.second_captions:
            batch.update(self.drawn_second(keys))
        if self.views.second:
            batch["second_images"], batch["second_boxes"] = self.drawn_images(keys, pixels, SECOND_VIEW)
        if self.views.strong:
            batch["strong_images"] = self.strong_images(keys, pixels)
        return batch

    def rng(self, epoch, index, stream):
        return random.Random(mixed(self.seed, epoch, index, stream))

    # ---- images ----

    def drawn_images(self, keys, pixels, stream):
        """(uint8 [B, 3, H, W], boxes [B, 4] that are yet to be erased) of images, drawn anew."""
        images = self.images.room(len(keys))
        seeds = [mixed(self.seed, *key, stream) for key in keys]
        boxes = [self.augmented(*drawn) for drawn in zip(pixels, seeds, images, strict=True)]
        return images, torch.tensor(boxes, dtype=torch.long).reshape(-1, 4)

    def augmented(self, pixels, seed, out):
        """Put an image, drawn anew, into out, uint8 [3, H, W]; returns the box that is yet to be erased."""
        if self.views.two_of_six:
            out.copy_((two_of_six(pixels, seed) * 255).round())
            return 0, 0, 0, 0
        generator = torch.Generator().manual_seed(seed)
        flip, top, left, box = draw_augmentation(*self.images.img_size, generator, self.img_aug)
        crop_padded(pixels.flip(-1).numpy() if flip else pixels.numpy(), top, left, out.numpy())
        return box

    def strong_images(self, keys, pixels):
        """uint8 [B, 2, 3, H, W]: two strong views of each image."""
        size = self.images.img_size
        images = self.images.room(2 * len(keys)).view(len(keys), 2, 3, *size)
        for key, image, views in zip(keys, pixels, images, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            for stream, view in zip(STRONG_VIEWS, views, strict=True):
                view.copy_(strong_view(picture, size, mixed(self.seed, *key, stream)))
        return images

    # ---- captions ----

    def drawn_captions(self, keys):
        """(B, L) of captions with what changes them but masks."""
        caption_ids = self.caption_ids[[index for _, index in keys]]
        for row, key in enumerate(keys):
            if self.changes.drop or self.changes.back_translation:
                caption = self.drawn_caption(*key)
                caption_ids[row] = tokenize(caption, self.tokenizer, caption_ids.shape[1])
            if self.changes.augment:
                caption_ids[row] = augment_tokens(caption_ids[row], self.rng(*key, AUGMENT))
        return caption_ids

    def drawn_caption(self, epoch, index):
        """The caption or its back-translation, without words that were drawn to be left out (TBPS-CLIP)."""
        caption, drop = self.samples[index].caption, self.changes.drop
        if self.changes.back_translation:
            exchange = self.rng(epoch, index, BACK_TRANSLATION).random() < self.changes.back_translation
            caption = self.back_translations[index] if exchange else caption
        if drop and self.changes.plain:  # as published a word is drawn for after the cleaning
            caption = plain_caption(self.tokenizer.clean(caption), most=self.caption_ids.shape[1])
        if drop:
            caption = drop_words(caption, drop, self.rng(epoch, index, DROP))
        return caption

    def masked(self, ids, mlm_ids, mlm_labels):
        """{name: (B, L)} of what a batch has of masked captions. ids: (B, L) the captions as they were."""
        caption_ids = ids if self.changes.clean else mlm_ids.clone()  # the published masking works in place
        return {"caption_ids": caption_ids, "mlm_ids": mlm_ids, "mlm_labels": mlm_labels}

    def masked_by(self, similarities, ids, indices, epoch):
        """`masked`, of captions whose words tokenizer.similarity_mask masks. similarities: (N, L) of all the
        training captions. ids: (B, L), captions. indices: (B,) which they are."""
        mlm_ids, mlm_labels = torch.empty_like(ids), torch.empty_like(ids)
        for row, index in enumerate(indices.tolist()):
            drawn = similarities[index], self.rng(epoch, index, SIMILARITY), *self.changes.masking
            mlm_ids[row], mlm_labels[row] = similarity_mask(ids[row], *drawn)
        return self.masked(ids, mlm_ids, mlm_labels)

    def drawn_second(self, keys):
        """{name: (B, …)} of what a batch has of second captions, drawn from a stream of their own as in RDA
        (ICL, CVPR 2025): the groups shuffled, of each a sentence at random, joined, tokenised, augmented."""
        ids = self.caption_ids.new_zeros(len(keys), self.caption_ids.shape[1])
        for row, (epoch, index) in enumerate(keys):
            rng, entry = self.rng(epoch, index, SECOND_CAPTION), self.second_captions[index]
            groups = [[entry]] if isinstance(entry, str) else list(entry)
            rng.shuffle(groups)
            text = " ".join(rng.choice(group) for group in groups)
            ids[row] = tokenize(text, self.tokenizer, ids.shape[1])
            if self.changes.augment:
                ids[row] = augment_tokens(ids[row], rng)
        return {
            "second_caption_ids": ids,
            "second_factor": torch.tensor([second_factor(epoch) for epoch, _ in keys]),
        }


class ImageDataset(Dataset):
    """Gallery. Asked for a list of rows, it gives pids [B], uint8 images [B, 3, H, W] and {row: why} of those
    left out. images: an Images."""

    def __init__(self, pids, image_paths, images):
        self.pids, self.image_paths, self.images = pids, image_paths, images

    def __len__(self):
        return len(self.pids)

    def __getitems__(self, rows):
        paths = [self.image_paths[row] for row in rows]
        found, bad = self.images.read(paths)
        good = [(row, path) for row, path in zip(rows, paths, strict=True) if path in found]
        images = self.images.room(len(good))
        for image, (_, path) in zip(images, good, strict=True):
            image.copy_(found[path])
        left_out = {row: bad[path] for row, path in zip(rows, paths, strict=True) if path in bad}
        return torch.tensor([self.pids[row] for row, _ in good], dtype=torch.long), images, left_out


class CaptionDataset(Dataset):
    """Queries: (pid, caption ids [L]). plain: see tokenizer.SimpleTokenizer."""

    def __init__(self, pids, captions, text_length, plain=False):
        self.pids, self.captions = pids, captions
        self.caption_ids = tokenize_all(captions, text_length, plain)

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
