"""Samples and batches. A training sample's randomness is a function of (seed, epoch, sample)."""

import torch
from torch.utils.data import Dataset

from datasets.sampler import mixed
from datasets.tokenizer import mask_tokens, tokenize_all
from datasets.transforms import augment, erase, normalise, read_image, resize


class PairDataset(Dataset):
    """Training pairs. Asked for a list of (epoch, index), it gives a batch; `finish` does the rest.

    samples: list of annotations.TrainSample. masking: (mask_rate, unchanged_rate), or None for no masked ids.
    clean_captions: keep caption_ids unmasked; else they are the masked ids, as published.
    """

    def __init__(
        self, samples, img_size, text_length, seed, img_aug=False, masking=None, clean_captions=False
    ):
        self.samples, self.img_size, self.seed, self.img_aug = samples, tuple(img_size), seed, img_aug
        self.masking, self.clean_captions = masking, clean_captions
        self.caption_ids = tokenize_all([sample.caption for sample in samples], text_length)

    def __len__(self):
        return len(self.samples)

    def __getitems__(self, keys):
        """Batch of host tensors: uint8 images [B, 3, H, W] and the boxes [B, 4] that are yet to be erased."""
        generator = torch.Generator()
        samples = [self.samples[index] for _, index in keys]
        images, boxes, noise = [], [], []
        for (epoch, index), sample in zip(keys, samples, strict=True):
            # image and mask draw from two streams: --img_aug does not change the masks
            generator.manual_seed(mixed(self.seed, epoch, index, 0))
            pixels, box = augment(
                resize(read_image(sample.image_path), self.img_size), generator, self.img_aug
            )
            images.append(pixels)
            boxes.append(box)
            if self.masking:
                generator.manual_seed(mixed(self.seed, epoch, index, 1))
                noise.append(torch.rand(2, self.caption_ids.shape[1], generator=generator))
        batch = {
            "pids": torch.tensor([sample.pid for sample in samples]),
            "image_ids": torch.tensor([sample.image_id for sample in samples]),
            "images": torch.stack(images),
            "caption_ids": self.caption_ids[[index for _, index in keys]],
            "boxes": torch.tensor(boxes),
        }
        if self.masking:
            batch["mlm_ids"], batch["mlm_labels"] = mask_tokens(
                batch["caption_ids"], torch.stack(noise), *self.masking
            )
            if not self.clean_captions:
                batch["caption_ids"] = batch["mlm_ids"].clone()  # the published masking works in place
        return batch


class ImageDataset(Dataset):
    """Gallery: (pid, uint8 image [3, H, W])."""

    def __init__(self, pids, image_paths, img_size):
        self.pids, self.image_paths, self.img_size = pids, image_paths, tuple(img_size)

    def __len__(self):
        return len(self.pids)

    def __getitem__(self, index):
        return self.pids[index], resize(read_image(self.image_paths[index]), self.img_size)


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
    images = normalise(images.to(device, non_blocking=True))
    if boxes is not None and bool((boxes[:, 2] > 0).any()):
        erase(images, boxes.to(device, non_blocking=True))
    return images
