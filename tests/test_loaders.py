"""From options to batches, on a few coloured pictures: what a batch holds; and (seed, epoch) decide it."""

import hashlib
import json
import random
import traceback
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from datasets import build_dataloader
from datasets.sampler import RandomOrder, mixed
from datasets.tokenizer import EOT, MASK, SimpleTokenizer, tokenize
from datasets.transforms import MEAN, STD
from tests.recipe import arguments
from utils.errors import InputError
from utils.options import get_args

KEYS = {"pids", "image_ids", "images", "caption_ids", "mlm_ids", "mlm_labels"}
SPLITS = {"train": range(1, 7), "val": range(7, 9), "test": range(9, 12)}  # ids, CUHK-PEDES counts from 1
COLOURS = "red green blue black white grey yellow".split()


def caption_of(pid, image, number):
    """A sentence that no other image has."""
    coat, shoes, bag = COLOURS[pid % 7], COLOURS[(pid + image) % 7], COLOURS[number]
    return f"person {pid} in a {coat} coat and {shoes} shoes, photo {image} taken with a {bag} bag."


def write_dataset(root, splits=SPLITS, dataset_name="CUHK-PEDES", file="reid_raw.json"):
    """Two images a person with two captions each; a picture is a colour of its own with a white corner."""
    records = []
    for split, pid, image in [
        (split, pid, i) for split, pids in splits.items() for pid in pids for i in (0, 1)
    ]:
        path = root / dataset_name / "imgs" / split / f"{pid}_{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 18, 3), (20 * pid, 100 * image, 50), np.uint8)
        pixels[:10, :6] = 255
        Image.fromarray(pixels).save(path)
        captions = [caption_of(pid, image, number) for number in range(2)]
        name = f"{split}/{path.name}"
        records.append({"split": split, "id": pid, "file_path": name, "captions": captions})
    (root / dataset_name / file).write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pictures are small: on a busy machine a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def options(root, **changed):
    small = dict(img_size=(48, 16), batch_size=10, test_batch_size=4, num_workers=0, device="cpu", MLM=True)
    given = {**small, "root_dir": root, **changed}
    return get_args(arguments(**{name: value for name, value in given.items() if value is not False}))


def train_batches(root, epochs=(1,), **changed):
    """All batches of these epochs, from a new loader."""
    loader, *_ = build_dataloader(options(root, **changed))
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches


def digest(batch):
    """A hash over every key and every byte of a batch."""
    parts = hashlib.sha256()
    for key in sorted(batch):
        parts.update(f"{key} {batch[key].dtype} {tuple(batch[key].shape)}".encode())
        parts.update(batch[key].contiguous().numpy().tobytes())
    return parts.hexdigest()


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


# ---- what comes back ----


def test_training_gives_three_loaders_and_the_number_of_training_persons(root):
    train_loader, img_loader, txt_loader, num_classes = build_dataloader(options(root))
    assert num_classes == 6
    assert len(train_loader.dataset) == 24 and len(img_loader.dataset) == 6 and len(txt_loader.dataset) == 12


@pytest.mark.parametrize(("split", "images", "captions"), [("test", 6, 12), ("val", 4, 8), ("train", 12, 24)])
def test_testing_gives_the_loaders_of_the_split_that_is_named_and_no_other(root, split, images, captions):
    args = options(root)
    args.training, args.split = False, split
    img_loader, txt_loader, num_classes = build_dataloader(args)
    pids = torch.cat([pids for pids, _ in img_loader]).tolist()
    first = 1 if split == "train" else 0  # training ids are those of the classifier: 0 … K - 1
    assert pids == [pid - first for pid in SPLITS[split] for _ in range(2)] and len(pids) == images
    assert len(txt_loader.dataset) == captions and num_classes == 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_dataset_names_what_is_evaluated_during_training(root, split):
    _, img_loader, txt_loader, _ = build_dataloader(options(root, val_dataset=split))
    assert {int(pid) for pids, _ in img_loader for pid in pids} == set(SPLITS[split])
    assert {int(pid) for pids, _ in txt_loader for pid in pids} == set(SPLITS[split])


def test_batches_hold_the_published_keys_in_these_shapes_and_types(root):
    first, *_, last = train_batches(root)
    assert set(first) == KEYS
    for batch, size in ((first, 10), (last, 4)):
        shapes = {key: tuple(value.shape) for key, value in batch.items()}
        assert shapes == {
            "pids": (size,),
            "image_ids": (size,),
            "images": (size, 3, 48, 16),
            "caption_ids": (size, 77),
            "mlm_ids": (size, 77),
            "mlm_labels": (size, 77),
        }
        assert batch["images"].dtype == torch.float32
        assert all(value.dtype == torch.int64 for key, value in batch.items() if key != "images")


def test_the_images_of_a_batch_are_gone_when_the_next_is_made(root):
    loader, *_ = build_dataloader(options(root))
    source, made, there = loader.dataset.images.source, [], []

    class Watched:
        def __getitem__(self, path):
            there.extend(images for images in (of_batch() for of_batch in made) if images is not None)
            return source[path]

    loader.dataset.images = loader.dataset.images._replace(source=Watched())
    for batch in loader:
        made.append(weakref.ref(batch.images))
        del batch
    assert len(made) == 3 and not there


def test_the_last_smaller_batch_is_kept_and_every_sample_comes_once_an_epoch(root):
    loader, *_ = build_dataloader(options(root))
    batches = list(loader)
    assert [len(batch["pids"]) for batch in batches] == [10, 10, 4] and len(loader) == 3
    assert Counter(joined(batches, "pids").tolist()) == dict.fromkeys(range(6), 4)
    assert Counter(joined(batches, "image_ids").tolist()) == dict.fromkeys(range(12), 2)


def test_id_image_and_caption_of_a_sample_belong_together(root):
    tokenizer = SimpleTokenizer()
    known = {
        tuple(tokenize(caption_of(pid, image, n), tokenizer).tolist()): (pid - 1, 2 * (pid - 1) + image)
        for pid in SPLITS["train"]
        for image in range(2)
        for n in range(2)
    }
    seen = set()
    for batch in train_batches(root, MLM=False, loss_names="sdm+id"):
        colours = batch["images"][:, :2, -1, -1] * torch.tensor(STD[:2]) + torch.tensor(MEAN[:2])
        colours = (colours * 255).round().long().tolist()
        captions = map(tuple, batch["caption_ids"].tolist())
        of_batch = batch["pids"].tolist(), batch["image_ids"].tolist()
        for ids, pid, image_id, colour in zip(captions, *of_batch, colours, strict=True):
            assert known[ids] == (pid, image_id)
            assert colour == [20 * (pid + 1), 100 * (image_id % 2)]
            seen.add(ids)
    assert seen == set(known)


def test_evaluation_gives_ids_with_images_and_captions_in_the_order_of_the_file(root):
    tokenizer = SimpleTokenizer()
    _, img_loader, txt_loader, _ = build_dataloader(options(root))
    assert torch.cat([pids for pids, _ in img_loader]).tolist() == [9, 9, 10, 10, 11, 11]
    images = torch.cat([images for _, images in img_loader])
    assert images.shape == (6, 3, 48, 16) and images.dtype == torch.float32
    red = (images[:, 0, -1, -1] * 0.26862954 + 0.48145466) * 255
    assert red.round().tolist() == [180, 180, 200, 200, 220, 220]
    ids = torch.cat([ids for _, ids in txt_loader])
    expected = [caption_of(pid, image, n) for pid in SPLITS["test"] for image in range(2) for n in range(2)]
    assert ids.tolist() == [tokenize(caption, tokenizer).tolist() for caption in expected]
    assert torch.cat([pids for pids, _ in txt_loader]).tolist() == [p for p in (9, 10, 11) for _ in range(4)]


def test_test_batch_size_holds_in_training_too(root):
    _, img_loader, txt_loader, _ = build_dataloader(options(root, test_batch_size=4))
    assert [len(pids) for pids, _ in img_loader] == [4, 2]
    assert [len(pids) for pids, _ in txt_loader] == [4, 4, 4]


def test_text_length_and_img_size_hold_everywhere(root):
    loaders = build_dataloader(options(root, text_length=12, img_size=(32, 32)))
    train_loader, img_loader, txt_loader, _ = loaders
    batch = next(iter(train_loader))
    assert batch["caption_ids"].shape == batch["mlm_ids"].shape == batch["mlm_labels"].shape == (10, 12)
    assert batch["images"].shape == (10, 3, 32, 32) and next(iter(img_loader))[1].shape == (4, 3, 32, 32)
    captions = next(iter(txt_loader))[1]
    assert captions.shape == (4, 12) and (captions[:, -1] == EOT).all()


# ---- a function of (seed, epoch) ----


@pytest.fixture(scope="module")
def one_process(root):
    return [digest(batch) for batch in train_batches(root, epochs=(1, 2), img_aug=True)]


# more processes than a small machine has cores
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_loading_processes(root, one_process, workers):
    batches = train_batches(root, epochs=(1, 2), img_aug=True, num_workers=workers)
    assert [digest(batch) for batch in batches] == one_process


def test_batches_do_not_depend_on_what_the_global_generators_hold(root, one_process):
    torch.manual_seed(77)
    random.seed(77)
    np.random.seed(77)
    assert [digest(batch) for batch in train_batches(root, epochs=(1, 2), img_aug=True)] == one_process


def test_an_epoch_is_the_same_whether_or_not_earlier_ones_were_drawn(root, one_process):
    assert [digest(batch) for batch in train_batches(root, epochs=(2,), img_aug=True)] == one_process[3:]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_interrupted_epoch_goes_on_with_the_batches_that_remain(root, one_process, start):
    loader, *_ = build_dataloader(options(root, img_aug=True))
    loader.set_epoch(2, start)
    assert [digest(batch) for batch in loader] == one_process[3 + start :] and len(loader) == 3 - start
    loader.set_epoch(1)
    assert [digest(batch) for batch in loader] == one_process[:3]


@pytest.mark.parametrize("img_aug", [False, True])
def test_a_sample_is_what_torchvisions_transforms_give_under_the_seed_of_its_epoch_and_number(root, img_aug):
    size = (48, 16)
    crop = [T.Pad(10), T.RandomCrop(size)] if img_aug else []
    erasing = [T.RandomErasing(scale=(0.02, 0.4), value=MEAN)] if img_aug else []
    chain = T.Compose(
        [T.Resize(size), T.RandomHorizontalFlip(0.5), *crop, T.ToTensor(), T.Normalize(MEAN, STD), *erasing]
    )
    loader, *_ = build_dataloader(options(root, img_aug=img_aug, seed=5))
    loader.set_epoch(3)
    images = iter(joined(list(loader), "images"))
    order = RandomOrder(24, seed=5)
    order.set_epoch(3)
    with torch.random.fork_rng(devices=[]):
        for epoch, index in order:
            torch.manual_seed(mixed(5, epoch, index, 0))
            with Image.open(loader.dataset.samples[index].image_path) as picture:
                assert torch.equal(next(images), chain(picture)), index


def test_another_seed_gives_other_batches(root, one_process):
    other = [digest(batch) for batch in train_batches(root, epochs=(1, 2), img_aug=True, seed=2)]
    assert not set(other) & set(one_process)


def by_sample(batches, key):
    """{(image_id, pid): values of the samples, whatever their order}."""
    values = {}
    for batch in batches:
        for image_id, value in zip(batch["image_ids"].tolist(), batch[key], strict=True):
            values.setdefault(image_id, []).append(tuple(value.flatten().tolist()))
    return {image_id: sorted(v) for image_id, v in values.items()}


@pytest.mark.parametrize("key", ["images", "mlm_ids"])
def test_every_epoch_draws_its_own_augmentation_and_masks(root, key):
    first, second = (by_sample(train_batches(root, (epoch,), img_aug=True), key) for epoch in (1, 2))
    differing = sum(first[image_id] != second[image_id] for image_id in first)
    assert differing == len(first)


def test_the_two_captions_of_an_image_do_not_share_their_augmentation(root):
    pairs = by_sample(train_batches(root, img_aug=True), "images").values()
    assert sum(a != b for a, b in pairs) >= 11  # of 12: the same flip, crop and erasing twice is rare


# ---- masked and clean captions ----


def unmasked(batch):
    return torch.where(batch["mlm_labels"] != 0, batch["mlm_labels"], batch["mlm_ids"])


def test_by_default_every_loss_sees_the_masked_caption_as_published(root):
    for batch in train_batches(root):
        assert torch.equal(batch["caption_ids"], batch["mlm_ids"])
        assert (batch["mlm_ids"] == MASK).any() and (batch["mlm_labels"] != 0).any(1).all()


def test_clean_captions_are_the_unmasked_ids_and_the_masks_stay_the_same(root):
    published, clean = train_batches(root), train_batches(root, clean_captions=True)
    for a, b in zip(published, clean, strict=True):
        assert torch.equal(a["mlm_ids"], b["mlm_ids"]) and torch.equal(a["mlm_labels"], b["mlm_labels"])
        assert torch.equal(b["caption_ids"], unmasked(b))
        assert not (b["caption_ids"] == MASK).any()
        assert torch.equal(a["images"], b["images"])


def test_without_masking_captions_are_clean_and_there_are_no_masked_ids(root):
    plain = train_batches(root, MLM=False, loss_names="sdm+id")
    clean = train_batches(root, clean_captions=True)
    assert {*plain[0]} == {"pids", "image_ids", "images", "caption_ids"}
    assert all(torch.equal(a["caption_ids"], b["caption_ids"]) for a, b in zip(plain, clean, strict=True))


def test_mlm_among_the_losses_masks_without_MLM_and_MLM_masks_without_mlm(root):
    with_both = train_batches(root, loss_names="sdm+mlm+id")
    for options_ in (dict(loss_names="sdm+mlm+id", MLM=False), dict(loss_names="sdm+id", MLM=True)):
        others = train_batches(root, **options_)
        assert [digest(batch) for batch in others] == [digest(batch) for batch in with_both]


def test_img_aug_does_not_change_order_or_masks(root):
    plain, augmented = train_batches(root), train_batches(root, img_aug=True)
    for a, b in zip(plain, augmented, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in KEYS - {"images"})
    assert not torch.equal(joined(plain, "images"), joined(augmented, "images"))


def test_the_masking_rates_are_honoured(root):
    for rates, start in (((0.0, 1.0), 2), ((1.0, 0.0), 0)):  # position 1 may be forced to be masked
        batches = train_batches(root, masked_token_rate=rates[0], masked_token_unchanged_rate=rates[1])
        ids, labels = (joined(batches, key)[:, start:] for key in ("mlm_ids", "mlm_labels"))
        chosen = labels != 0
        assert chosen.sum() > 40 and (ids[chosen] == (MASK if rates[0] else labels[chosen])).all()


# ---- the identity sampler ----


def test_the_identity_sampler_fills_batches_with_equally_many_samples_of_a_person(root):
    loader, *_ = build_dataloader(options(root, sampler="identity", batch_size=8, num_instance=4))
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        assert all(list(Counter(b["pids"].tolist()).values()) == [4, 4] for b in batches)


def test_batches_of_the_identity_sampler_follow_from_seed_and_epoch_too(root):
    wanted = dict(sampler="identity", batch_size=6, num_instance=2, epochs=(1, 2))
    one = [digest(batch) for batch in train_batches(root, **wanted)]
    assert [digest(batch) for batch in train_batches(root, num_workers=2, **wanted)] == one
    assert len(set(one)) == len(one)
    assert not set(one) & {digest(batch) for batch in train_batches(root, seed=3, **wanted)}


# ---- what cannot be loaded ----


def complaint(args):
    with pytest.raises(InputError) as error:
        build_dataloader(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_batch_larger_than_the_training_set_is_an_error_with_both_numbers(root):
    assert len(train_batches(root, batch_size=24)) == 1
    text = complaint(options(root, batch_size=25))
    assert "--batch_size 25" in text and "24" in text


def test_an_empty_split_is_an_error_that_names_file_and_split(tmp_path):
    splits = {"train": range(3), "test": range(2)}
    write_dataset(tmp_path, splits, "ICFG-PEDES", "ICFG-PEDES.json")
    text = complaint(options(tmp_path, dataset_name="ICFG-PEDES", val_dataset="val", batch_size=2))
    assert "ICFG-PEDES.json" in text and "val split" in text and "--val_dataset" in text
    args = options(tmp_path, dataset_name="ICFG-PEDES", batch_size=2)
    args.training, args.split = False, "val"
    assert "--split" in complaint(args)


def test_no_training_captions_are_an_error_that_names_the_file(tmp_path):
    write_dataset(tmp_path, {"test": range(1, 3)})
    text = complaint(options(tmp_path))
    assert "reid_raw.json" in text and "train" in text


def test_too_few_persons_for_the_identity_sampler_are_an_error_with_both_numbers(root):
    text = complaint(options(root, sampler="identity", batch_size=24, num_instance=3))
    assert "--sampler identity" in text and "8 persons" in text and "6" in text


def test_masking_captions_of_a_single_token_is_an_input_error(root):
    with pytest.raises((InputError, SystemExit)):  # at the door or at loading
        train_batches(root, text_length=1)


@pytest.fixture
def damaged(tmp_path):
    """A data set with one training image and one gallery image cut off."""
    write_dataset(tmp_path)
    for name in ("train/3_1.png", "test/10_0.png"):
        path = tmp_path / "CUHK-PEDES" / "imgs" / name
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path


def reading_ends_in(loader):
    """The InputError's text. Its frames and the workers form a cycle; left to Python's collector, that makes
    some later test wait five seconds for each worker."""
    try:
        list(loader)
    except InputError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_in_one_sentence_that_names_it(damaged, workers):
    train_loader, img_loader, *_ = build_dataloader(options(damaged, num_workers=workers))
    for loader, name in ((train_loader, "3_1.png"), (img_loader, "10_0.png")):
        text = reading_ends_in(loader)
        assert name in text and "\n" not in text
