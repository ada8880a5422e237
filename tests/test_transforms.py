"""From files to tensors: published pixels, torchvision's own chain under the same seed, published rates."""

import io
import math
import random

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, features
from torchvision import transforms as T

from datasets.image_text import finish
from datasets.transforms import (
    MEAN,
    STD,
    crop_padded,
    draw_augmentation,
    erase,
    erase_box,
    normalise,
    read_image,
    resize,
)
from tests.recipe import bytes8, figures
from utils.errors import InputError

PUBLISHED = figures("transforms")
CPU = torch.device("cpu")
# another Pillow may round a resized pixel to the next grey level
ABSOLUTE = 1e-6 if PIL.__version__ == PUBLISHED["pillow"] else 0.0151
PICTURES = PUBLISHED["test_transform"]


def shifted(pixels, top, left):
    out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    crop_padded(pixels.numpy(), top, left, out.numpy())
    return out


def augment(pixels, generator, img_aug):
    """What PairDataset does to one sample: the pixels, and the box that is yet to be erased."""
    flip, top, left, box = draw_augmentation(*pixels.shape[1:], generator, img_aug)
    return shifted(pixels.flip(-1) if flip else pixels, top, left), box


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pictures are small: on a busy machine a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(kind, seed, in_hw):
    """The reference's pictures, rebuilt; noise alone, or blocks of 16 x 16 with some noise over them."""
    h, w = in_hw
    if kind == "rgb_noise":
        return Image.fromarray(bytes8(seed, (h, w, 3)))
    if kind == "palette":
        image = Image.fromarray(bytes8(seed, (h, w)) % 16)
        image.putpalette(bytes8(seed + 500000, (48,)).tolist() + [0] * (768 - 48))
        return image
    channels = {"rgb": 3, "grey": 1, "rgba": 4}[kind]
    coarse = bytes8(seed, (math.ceil(h / 16), math.ceil(w / 16), channels))
    coarse = coarse.repeat(16, axis=0).repeat(16, axis=1)[:h, :w].astype(int)
    pixel = (3 * coarse + bytes8(seed + 500000, (h, w, channels))) // 4
    return Image.fromarray(pixel.astype(np.uint8)[..., 0] if channels == 1 else pixel.astype(np.uint8))


@pytest.fixture(scope="module", params=range(len(PICTURES)), ids=lambda i: f"{i} {PICTURES[i]['kind']}")
def saved(request, tmp_path_factory):
    """(figures, path) of one of the reference's pictures, as a PNG file."""
    case = PICTURES[request.param]
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture(case["kind"], case["seed"], case["in_hw"]).save(path)
    return case, path


def sum_and_l2(images):
    return images.double().sum().item(), images.double().norm().item()


def random_picture(h, w, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (h, w, 3), dtype=np.uint8))


# ---- test transform ----


def test_every_kind_of_file_becomes_the_published_rgb_bytes(saved):
    case, path = saved
    pixels, published = np.asarray(read_image(path)), case["after_convert_rgb"]
    assert list(pixels.shape) == published["shape"]
    assert pixels.sum() == published["sum"]
    assert pixels.mean((0, 1)).tolist() == pytest.approx(published["mean_per_channel"], rel=1e-12)


def test_the_test_transform_gives_the_published_values(saved):
    case, path = saved
    image = finish(resize(read_image(path), case["out_hw"])[None], CPU)[0]
    assert image.dtype == torch.float32 and list(image.shape) == case["shape"]
    values = image.flatten()[case["index"]].tolist()
    assert values == pytest.approx(case["value"], abs=ABSOLUTE)
    assert image.min().item() == pytest.approx(case["min"], abs=ABSOLUTE)
    assert image.max().item() == pytest.approx(case["max"], abs=ABSOLUTE)
    total, l2 = sum_and_l2(image)
    # rounding goes either way, so a sum moves by far less than all its values together could
    assert total == pytest.approx(case["sum"], abs=ABSOLUTE * image.numel() / 20)
    assert l2 == pytest.approx(case["l2"], rel=ABSOLUTE)


@pytest.mark.parametrize("size", [(96, 32), (384, 128), (50, 70)])
def test_the_test_transform_is_torchvisions_bit_for_bit(size):
    image = random_picture(111, 47)
    chain = T.Compose([T.Resize(size), T.ToTensor(), T.Normalize(MEAN, STD)])
    assert torch.equal(finish(resize(image, size)[None], CPU)[0], chain(image))


# ---- training transform ----


def published_chain(size, img_aug):
    """The published training transform out of torchvision's parts; they draw from the global generator."""
    parts = [T.Resize(size), T.RandomHorizontalFlip(0.5)]
    parts += [T.Pad(10), T.RandomCrop(size)] if img_aug else []
    parts += [T.ToTensor(), T.Normalize(MEAN, STD)]
    parts += [T.RandomErasing(scale=(0.02, 0.4), value=MEAN)] if img_aug else []
    return T.Compose(parts)


def ours(image, size, seed, img_aug):
    pixels, box = augment(resize(image, size), torch.Generator().manual_seed(seed), img_aug)
    return finish(pixels[None], CPU, torch.tensor([box]))[0]


@pytest.mark.parametrize("img_aug", [False, True], ids=["flip alone", "img_aug"])
@pytest.mark.parametrize("size", [(384, 128), (96, 32), (32, 16), (12, 60)])
def test_training_images_are_torchvisions_bit_for_bit_under_the_same_seed(size, img_aug):
    image, chain = random_picture(60, 25), published_chain(size, img_aug)
    with torch.random.fork_rng(devices=[]):
        for seed in range(50):
            torch.manual_seed(seed)
            assert torch.equal(ours(image, size, seed, img_aug), chain(image)), seed


@pytest.mark.parametrize(
    "case", PUBLISHED["train_transform_seeded"], ids=lambda c: f"{c['torch_seed']} {c['img_aug']}"
)
def test_training_images_have_the_published_sums_under_the_same_seed(case):
    stored = PICTURES[case["image"]]
    image = picture(stored["kind"], stored["seed"], stored["in_hw"])
    total, l2 = sum_and_l2(ours(image, stored["out_hw"], case["torch_seed"], case["img_aug"]))
    assert total == pytest.approx(case["sum"], abs=ABSOLUTE * 3 * math.prod(stored["out_hw"]) / 20)
    assert l2 == pytest.approx(case["l2"], rel=ABSOLUTE)


def test_augmenting_leaves_its_input_and_the_global_generator_alone():
    pixels = resize(random_picture(96, 32), (96, 32))
    before, state = pixels.clone(), torch.get_rng_state()
    for seed in range(8):
        augment(pixels, torch.Generator().manual_seed(seed), img_aug=True)
    assert torch.equal(pixels, before) and torch.equal(torch.get_rng_state(), state)


def test_an_image_that_no_box_fits_into_is_not_erased():
    generator = torch.Generator().manual_seed(0)
    assert {erase_box(1, 400, generator) for _ in range(20)} == {(0, 0, 0, 0)}


# ---- what is painted ----


def test_erasing_fills_the_box_with_the_mean_triple_in_normalised_space():
    images = torch.randn(3, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = images.clone()
    boxes = [(2, 1, 5, 4), (0, 0, 0, 0), (7, 6, 5, 2)]
    for image, (top, left, h, w) in zip(expected, boxes, strict=True):
        for channel in range(3):
            image[channel, top : top + h, left : left + w] = (0.48145466, 0.4578275, 0.40821073)[channel]
    assert torch.equal(erase(images, torch.tensor(boxes)), expected)
    assert torch.equal(images, expected)  # in place
    published = PUBLISHED["augmentation_statistics"]["erased_value_per_channel"]
    assert images[0, :, 3, 2].tolist() == pytest.approx(published, rel=1e-7)


def test_what_the_crop_adds_is_black_before_it_is_normalised():
    pixels = torch.full((3, 30, 20), 255, dtype=torch.uint8)
    image = normalise(shifted(pixels, -10, 4))
    published = PUBLISHED["augmentation_statistics"]["padding_value_per_channel"]
    added = torch.ones(30, 20, dtype=torch.bool)
    added[10:, :16] = False
    for channel, value in enumerate(published):
        assert image[channel][added].tolist() == pytest.approx([value] * int(added.sum()), abs=1e-6)
        assert (image[channel][~added] > 1.8).all()


def test_normalising_turns_bytes_into_clips_range():
    image = normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2))
    clips = zip((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True)
    for channel, (mean, std) in enumerate(clips):
        assert image[channel, 0].tolist() == pytest.approx([-mean / std, (1 - mean) / std], rel=1e-6)


# ---- files that are no pictures ----


def refused(path, reason=None):
    with pytest.raises(InputError, match=reason) as error:
        read_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def encoded(format):
    data = io.BytesIO()
    random_picture(48, 20).save(data, format)
    return data.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\0" * 1000, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"P6\n9 9\n"]
)
def test_a_file_that_is_no_picture_is_an_error_that_names_it(tmp_path, data):
    path = tmp_path / "person.jpg"
    path.write_bytes(data)
    refused(path)


def test_a_missing_file_and_a_folder_are_errors_that_name_them(tmp_path):
    refused(tmp_path / "nobody.png", "no image at ")
    refused(tmp_path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_a_truncated_picture_is_an_error_that_names_it(tmp_path, format):
    path, whole = tmp_path / "person.png", encoded(format)
    path.write_bytes(whole)
    assert read_image(path).size == (20, 48)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path)


def test_a_picture_that_claims_a_monstrous_size_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "person.ppm"
    path.write_bytes(b"P6\n60000 60000\n255\n" + b"\0" * 300)
    refused(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_damaged_picture_is_either_read_or_an_error_that_names_it(tmp_path, format):
    if format == "AVIF" and not (features.check_module("avif") if "avif" in features.modules else False):
        pytest.skip("this Pillow reads no AVIF")
    path, whole, rng = tmp_path / "person.png", encoded(format), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert read_image(path).mode == "RGB"
        except InputError as error:
            assert str(path) in str(error)
