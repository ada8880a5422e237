"""From options to loaders."""

import functools
import logging
from multiprocessing import get_all_start_methods

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.annotations import log_statistics, read_splits, source_of
from datasets.image_cache import open_images
from datasets.image_text import (
    CaptionChanges,
    CaptionDataset,
    ImageDataset,
    Images,
    PairDataset,
    Views,
    finish,
)
from datasets.records import keys_beside
from datasets.sampler import BatchShares, IdentityOrder, RandomOrder, mixed
from datasets.tokenizer import PUNCTUATION, START_SIMILARITY
from utils.batch import Batch
from utils.data_sets import ignored_name
from utils.dist import process_sum, share, world_size
from utils.errors import InputError
from utils.loading import batches_of, room_for_sockets
from utils.losses import LOSSES, names_of
from utils.settings import resolve

logger = logging.getLogger("IRRA.dataset")
# what a training set gives of its images, and the boxes that are to be erased there
BOXES = {"images": "boxes", "second_images": "second_boxes", "strong_images": None}


class TrainLoader(DataLoader):
    """Gives utils.batch.Batch, its images on the device, its ids on the host. Under torchrun each is this
    process's share, and its batch_size says how many samples all have together."""

    def __init__(self, *args, device, numbered=False, moved=0.0, **kwargs):
        """numbered: batches say which samples they hold, for processor.division and processor.similarity.
        moved: the fraction of captions that are another sample's on purpose."""
        super().__init__(*args, **kwargs)
        self._device, self.left_out, self._numbered = device, {}, numbered
        self.moved = moved
        self.weights = None  # [N] of the training samples, for the losses
        # [N, L] of each word of their captions, where they are masked by that
        by_similarity, ids = self.dataset.changes.by_similarity, self.dataset.caption_ids
        self.similarities = torch.full(ids.shape, START_SIMILARITY) if by_similarity else None

    def __iter__(self):
        for size, batch in zip(self.batch_sampler.sizes(), batches_of(self), strict=True):
            left_out = batch.pop("left_out")
            for path, reason in left_out.items():
                if path not in self.left_out:
                    logger.warning(f"left out: {reason}")
                self.left_out[path] = reason
            if world_size() > 1:
                if self.dataset.images.skip_bad:  # any of them may have left some out
                    size = int(process_sum(torch.tensor(len(batch["pids"]), device=self._device)))
                batch["batch_size"] = size
            if self.weights is not None:
                batch["label_hat"] = self.weights[batch["indices"]]
            if self.similarities is not None:
                known = (batch["caption_ids"], batch["indices"], self.batch_sampler.order.epoch)
                batch.update(self.dataset.masked_by(self.similarities, *known))
            if not self._numbered:
                del batch["indices"]
            images = {
                name: finish(batch.pop(name), self._device, batch.pop(boxes, None))
                for name, boxes in BOXES.items()
                if name in batch
            }
            yield Batch.of({**images, **batch})
            del images  # not kept here while the next batch is made, nor in `batch`, which zip keeps

    def close(self):
        """End the loading processes now. After an error that nobody foresaw Python would send them a SIGTERM
        and wait a minute, for so long they go on, for the sake of a batch that is to be finished."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and self.num_workers:
            iterator._shutdown_workers()

    def set_epoch(self, epoch, start=0, samples=None):
        """start: batches of the epoch that an interrupted run has had; or samples, if of another size."""
        self.batch_sampler.set_epoch(epoch, start, samples)

    def samples_of_epoch(self):
        """Of all processes, with those that an interrupted run has had."""
        return len(self.batch_sampler.order.order())


class ImageLoader(DataLoader):
    """(pids [B], normalised images [B, 3, H, W] on the device). person: a pid's name in the file."""

    def __init__(self, *args, device, person, **kwargs):
        super().__init__(*args, **kwargs)
        self._device, self.left_out, self.person = device, {}, person

    def __iter__(self):
        for pids, images, left_out in batches_of(self):
            for row, reason in left_out.items():
                if row not in self.left_out:
                    logger.warning(f"left out: {reason}")
                self.left_out[row] = reason
            if len(pids):
                yield pids, finish(images, self._device)


def build_dataloader(args):
    """train_loader, img_loader, txt_loader, num_classes; for testing (args.training False) without the first.

    img_loader gives (pids, images) of the gallery, txt_loader (pids, caption_ids) of the queries, of the
    split that --val_dataset (training) or --split (testing) names. num_classes counts the training persons.
    """
    evaluated = args.val_dataset if args.training else getattr(args, "split", "test")  # test.py's own option
    if ignored := ignored_name(args):
        logger.info(ignored)
    source = source_of(args, None if args.training else evaluated)
    splits = read_splits(source, keys=keys_beside(args) if args.training else ())
    log_statistics(splits)
    if args.plain_captions:
        logger.info(f"captions are read without {' '.join(PUNCTUATION)}")
    device = resolve(args).device
    paths = splits.by_name[evaluated].image_paths + (splits.train_split.image_paths if args.training else [])
    pixels = open_images(args.image_cache, paths, args.img_size, splits.name, args.num_workers)
    images = Images(pixels, tuple(args.img_size), args.on_bad_image == "skip")
    loaders = eval_loaders(args, splits, evaluated, device, images)
    if args.training:
        return train_loader(args, splits, device, images), *loaders, splits.num_classes
    return *loaders, splits.num_classes


def workers(args, device):
    """DataLoader's arguments for --num_workers loading processes."""
    pinned = {"pin_memory": device.type == "cuda"}
    if not args.num_workers:
        return pinned
    room_for_sockets()
    # images in memory are for all processes to share, which only those that are forked do
    fork = args.image_cache == "ram" and "fork" in get_all_start_methods()
    context = "fork" if fork else None
    return pinned | dict(num_workers=args.num_workers, prefetch_factor=4, multiprocessing_context=context)


def train_loader(args, splits, device, images):
    if not splits.train:
        raise InputError(
            f"{splits.source.path} has no captions in the train split: there is nothing to train on"
        )
    if args.batch_size > len(splits.train):
        raise InputError(
            f"--batch_size {args.batch_size} is larger than the training set ({len(splits.train)} captions)"
        )
    samples, beside, moved = exchanged(splits, args.noisy_rate, args.noisy_file, args.seed)
    masking = (args.masked_token_rate, args.masked_token_unchanged_rate) if args.MLM else None
    changes = CaptionChanges(
        masking,
        by_similarity=args.mask_by_similarity,
        clean=args.clean_captions,
        augment=args.text_aug,
        drop=args.text_drop,
        back_translation=args.back_translation,
        plain=args.plain_captions,
    )
    strong = any(LOSSES[name].of == "strong" for name in names_of(args))
    views = Views(args.second_view, strong, args.two_of_six)
    dataset = PairDataset(samples, images, args.text_length, args.seed, args.img_aug, changes, beside, views)
    logger.info(f"using {args.sampler} sampler")
    if masking:
        who = "mlm alone sees" if args.clean_captions else "every loss sees, as published,"
        predicted = "" if "mlm" in names_of(args) else "; no loss predicts the masked words"
        logger.info(f"training captions are masked; {who} the masked caption{predicted}")
    if args.sampler == "identity":
        pids = [sample.pid for sample in splits.train]
        sampler = IdentityOrder(pids, args.batch_size, args.num_instance, args.seed)
        if not len(sampler):
            raise InputError(
                f"--sampler identity draws {args.batch_size // args.num_instance} persons a batch, but there "
                f"are {splits.num_classes}: lower --batch_size or raise --num_instance"
            )
    else:
        sampler = RandomOrder(len(dataset), args.seed)
    return TrainLoader(
        dataset,
        batch_sampler=BatchShares(sampler, args.batch_size),
        collate_fn=as_it_is,
        device=device,
        numbered=args.division or args.mask_by_similarity,
        moved=moved,
        persistent_workers=args.num_workers > 0,  # the epoch comes with each key: workers need not start anew
        **workers(args, device),
    )


def exchanged(splits, rate, file, seed):
    """(The training samples with captions of others, for tables of noise: a drawn fraction of them permuted,
    or sample i with the caption of sample file[i], as the published files have it; what the file holds beside
    their captions, which goes with them; the fraction that has moved)."""
    N = len(splits.train)
    origins = read_origins(file, N) if file else np.arange(N)
    if rate and not file:
        rng = np.random.RandomState(mixed(seed, 3) % 2**32)
        chosen = rng.permutation(N)[: round(rate * N)]
        origins[np.sort(chosen)] = chosen
    moved = int((origins != np.arange(N)).sum())
    if moved:
        logger.info(f"{moved} of {N} training captions are another sample's")
    captions = [splits.train[origin].caption for origin in origins]
    samples = [one._replace(caption=c) for one, c in zip(splits.train, captions, strict=True)]
    beside = {key: [one[origin] for origin in origins] for key, one in splits.beside.items()}
    return samples, beside, moved / N


def read_origins(file, N):
    """Of an .npy file: [N] whole numbers below N."""
    try:
        origins = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--noisy_file {file} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise InputError(f"--noisy_file {file} is not an .npy file of whole numbers") from None
    held = "several arrays"
    if isinstance(origins, np.ndarray):
        held = f"an array {list(origins.shape)} of {origins.dtype}"
        if origins.shape == (N,) and origins.dtype.kind in "iu":
            if origins.min() >= 0 and origins.max() < N:
                return origins
            held = f"numbers from {origins.min()} to {origins.max()}"
    raise InputError(
        f"--noisy_file {file} holds {held}, and must hold {N} whole numbers from 0 to {N - 1}, one a "
        "training caption"
    )


def as_it_is(batch):
    return batch


def own_rows(all_rows):
    """This process's rows of a split, in order; together the processes have each row once."""
    return range(len(all_rows))[share(len(all_rows))]


def eval_loaders(args, splits, name, device, images):
    split = splits.by_name[name]
    if not split.image_pids or not split.captions:
        others = [n for n, other in splits.by_name.items() if other.image_pids and other.captions]
        raise InputError(
            f"{splits.source.path} has no {'captions' if split.image_pids else 'images'} in the {name} "
            f"split: choose another one with --val_dataset or --split (it has {', '.join(others) or 'none'})"
        )
    images = ImageLoader(
        ImageDataset(split.image_pids, split.image_paths, images),
        batch_size=args.test_batch_size,
        sampler=own_rows(split.image_pids),
        collate_fn=as_it_is,
        device=device,
        person=functools.partial(splits.person, name),
        **workers(args, device),
    )
    captions = DataLoader(
        CaptionDataset(split.caption_pids, split.captions, args.text_length, args.plain_captions),
        batch_size=args.test_batch_size,
        sampler=own_rows(split.captions),
        pin_memory=device.type == "cuda",
    )
    return images, captions
