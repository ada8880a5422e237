"""One reader for pictures: training, testing, the check, searching and drawing see the same pixels, whatever
the file's mode, depth or shape; what is turned by a tag is turned where pictures are searched and shown."""

import errno
import io
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from datasets.image_cache import DecodedImages, open_images
from datasets.image_text import Images
from datasets.transforms import read_image, resize, resized
from retrieval.contact_sheet import BORDER, CELL, GREY, draw_framed, fitted
from retrieval.encoders import open_picture
from retrieval.relevance import heat
from tests.children import ROOT
from tests.conftest import PATIENCE
from utils.device import out_of_memory
from utils.errors import InputError

STEPS = np.arange(48 * 20).reshape(48, 20) / (48 * 20 - 1)  # 0 to 1
COLOURED = Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 20, 3), dtype=np.uint8))


def encoded(picture, format="PNG", **options):
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


def tiff(values, bits, kind, **more):
    """A TIFF file by hand. kind: 1 unsigned, 2 signed, 3 floats; more: tags by number."""
    height, width = values.shape
    data = packed(values) if bits == 12 else values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags |= {339: kind} | {int(tag): value for tag, value in more.items()}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + rows + bytes(4)


def packed(values):
    """Two numbers of twelve bits in three bytes."""
    first, second = values.reshape(-1, 2).T.astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def to(top, dtype):
    return np.round(STEPS * top).astype(dtype)


DEEP = {  # file: the grey that is meant
    "PNG of 16 bits": (encoded(Image.fromarray(to(65535, "u2"))), STEPS * 255),
    "PNG of 16 bits that holds 8": (encoded(Image.fromarray(to(255, "u2"))), STEPS * 255),
    "TIFF of 16 bits": (tiff(to(65535, "<u2"), 16, 1), STEPS * 255),
    "TIFF of 16 bits, big end first": (
        encoded(Image.frombytes("I;16B", (20, 48), to(65535, ">u2").tobytes()), "TIFF"),
        STEPS * 255,
    ),
    "TIFF of 12 bits": (tiff(to(4095, "u2"), 12, 1), STEPS * 255),
    "PGM of 16 bits": (b"P5\n20 48\n65535\n" + to(65535, ">u2").tobytes(), STEPS * 255),
    "32 bits that hold 8": (tiff(to(255, "<i4"), 32, 2), STEPS * 255),
    "32 bits that hold 16": (tiff(to(65535, "<i4"), 32, 2), STEPS * 255),
    "32 bits, unsigned": (tiff(to(2**32 - 1, "<u4"), 32, 1), STEPS * 255),
    "32 bits, signed, to below 0": (tiff(to(60000, "<i4") - 30000, 32, 2), STEPS * 255),
    "16 bits, signed, to below 0": (tiff((to(60000, "<i4") - 30000).astype("<i2"), 16, 2), STEPS * 255),
    "floats to 1": (encoded(Image.fromarray(STEPS.astype(np.float32)), "TIFF"), STEPS * 255),
    "floats to 255": (encoded(Image.fromarray(to(255, "f4")), "TIFF"), STEPS * 255),
    "floats to 65535": (encoded(Image.fromarray(to(65535, "f4")), "TIFF"), STEPS * 255),
    "floats around 0": (tiff((STEPS - 0.5).astype("<f4"), 32, 3), STEPS * 255),
    "floats without end": (tiff((STEPS * 1e30).astype("<f4"), 32, 3), STEPS * 255),
    "floats of one value": (tiff(np.full((48, 20), -7, "<f4"), 32, 3), STEPS * 0),
    "floats that are no numbers": (
        tiff(np.where(STEPS > 0.5, np.nan, STEPS).astype("<f4"), 32, 3),
        np.where(STEPS > 0.5, 0, STEPS) * 255,
    ),
    "nothing but no numbers": (tiff(np.full((48, 20), np.inf, "<f4"), 32, 3), STEPS * 0),
}
MODES = {
    "RGB": encoded(COLOURED),
    "JPEG": encoded(COLOURED, "JPEG"),
    "grey": encoded(COLOURED.convert("L")),
    "one bit": encoded(COLOURED.convert("1")),
    "palette": encoded(COLOURED.quantize(200)),
    "palette, a colour of it transparent": encoded(COLOURED.quantize(200), transparency=3),
    "palette, each colour more or less so": encoded(COLOURED.quantize(200), transparency=bytes(range(200))),
    "palette of a GIF": encoded(COLOURED, "GIF", transparency=0),
    "palette with alpha": encoded(COLOURED.convert("RGBA").quantize(200), "TIFF"),
    "alpha": encoded(Image.merge("RGBA", (*COLOURED.split(), COLOURED.getchannel(0)))),
    "grey with alpha": encoded(Image.merge("LA", COLOURED.split()[:2])),
    "TIFF": encoded(COLOURED, "TIFF"),
    "CMYK": encoded(COLOURED.convert("CMYK"), "JPEG"),
    "Lab": encoded(COLOURED.convert("LAB"), "TIFF"),
}


def drawn(path, whole=False):
    """A picture as it lies on a contact sheet."""
    sheet = Image.new("RGB", (CELL[0] + 2 * BORDER, CELL[1] + 2 * BORDER))
    draw_framed(sheet, ImageDraw.Draw(sheet), (0, 0), path, GREY, whole)
    return np.asarray(sheet.crop((BORDER, BORDER, BORDER + CELL[0], BORDER + CELL[1])))


def as_read(data, tmp_path):
    """The pixels that training, a kept image and a search have of a file, once they have been compared."""
    (tmp_path / "one.png").write_bytes(data)  # the suffix says nothing
    path = str(tmp_path / "one.png")
    trained, searched = np.asarray(read_image(path)), np.asarray(open_picture(path))
    kept = open_images(str(tmp_path / "cache"), [path], trained.shape[:2], "SET")[path]
    assert (trained == searched).all() and (kept.permute(1, 2, 0).numpy() == trained).all()
    as_png = tmp_path / "plain.png"
    Image.fromarray(trained).save(as_png)
    assert (drawn(path) == drawn(as_png)).all() and (drawn(path, True) == drawn(as_png, True)).all()
    return trained


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_grey_is_what_it_shows_in_every_program(name, tmp_path):
    data, meant = DEEP[name]
    found = as_read(data, tmp_path).astype(float)
    assert np.abs(found - meant[..., None]).max() <= 1
    assert found.max() == (0 if not meant.any() else pytest.approx(meant.max(), abs=1))


@pytest.mark.parametrize("name", MODES)
def test_pictures_of_eight_bits_are_read_as_the_published_code_reads_them(name, tmp_path):
    with Image.open(io.BytesIO(MODES[name])) as image:
        published = np.asarray(image.convert("RGB"))
    assert (as_read(MODES[name], tmp_path) == published).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_turned_picture_lies_in_training_and_stands_in_a_search(turn, format, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = turn
    path = tmp_path / "turned"
    COLOURED.save(path, format, exif=tag)
    with Image.open(path) as image:
        assert (np.asarray(read_image(path)) == np.asarray(image.convert("RGB"))).all()
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert (np.asarray(open_picture(path)) == np.asarray(upright)).all()
    upright.save(tmp_path / "upright.png")
    assert (drawn(path) == drawn(tmp_path / "upright.png")).all()


def test_a_turned_picture_of_sixteen_bits_stands_in_a_search(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(to(65535, "u2")).save(tmp_path / "deep.png", exif=tag)
    found = np.asarray(open_picture(tmp_path / "deep.png"))[..., 0].astype(int)
    assert np.abs(found - np.rot90(STEPS * 255, 3)).max() <= 1


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense" * 3, b"\0"]
)
def test_a_damaged_tag_turns_nothing(exif, tmp_path):
    path = tmp_path / "damaged.jpg"
    COLOURED.save(path, "JPEG", exif=exif)
    with Image.open(path) as image:
        published = np.asarray(image.convert("RGB"))
    for read in (read_image, open_picture):
        assert (np.asarray(read(path)) == published).all()


def test_an_ordinary_pictures_resizing_is_pils(tmp_path):
    for size in ((7, 5), (20, 48), (128, 384), (1, 1)):
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            assert (
                np.asarray(resized(COLOURED, size, resample)) == np.asarray(COLOURED.resize(size, resample))
            ).all()


LINES = """
import resource
import numpy as np
from PIL import Image
from datasets.transforms import resize
from retrieval.contact_sheet import fitted
from retrieval.relevance import heat
Image.Image.resize = lambda self, size, resample=3, box=None, reducing_gap=None: self._new(
    self.im.resize(size, resample, box or (0, 0, *self.size))  # as Pillow 10 and 11 do
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
line = Image.new("RGB", SIZE, (200, 10, 10))
resize(line, (384, 128)), fitted(line), heat(line, np.ones((24, 8)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("size", [(1, 5_000_000), (5_000_000, 1)], ids=["a column", "a line"])
def test_a_pictures_shape_does_not_decide_the_memory(size):
    """Its 5 million pixels are 20 MB. As wide as the input of a model they would be 2.5 GB."""
    code = LINES.replace("SIZE", str(size))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_a_line_is_seen_wherever_it_is_drawn(size, tmp_path):
    line = Image.new("RGB", size, (200, 10, 10))
    line.save(tmp_path / "line.png")
    for whole in (False, True):
        assert (drawn(tmp_path / "line.png", whole) == (200, 10, 10)).all(axis=2).any()
    assert fitted(line).size == CELL and resize(line, (64, 32)).shape == (3, 64, 32)
    assert min(heat(line, np.ones((4, 2))).size) >= 48


# ---- a disk that does not answer ----


def failing(monkeypatch, number, times):
    """Pillow's open fails with this number so often; returns the seconds that were waited."""
    real, left, waited = Image.open, [OSError(number, os.strerror(number))] * times, []

    def opened(path):
        if left:
            raise left.pop()
        return real(path)

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_disk_that_does_not_answer_for_a_moment_is_asked_again(number, tmp_path, monkeypatch):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    waited = failing(monkeypatch, number, 3)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    assert waited == [1, 5, 15]
    failing(monkeypatch, number, 4)
    with pytest.raises(InputError, match=r"a.png cannot be read \(.*\): see that its disk is there"):
        read_image(tmp_path / "a.png")


def test_a_disk_that_is_gone_is_no_reason_to_leave_pictures_out(tmp_path, monkeypatch):
    """Else a training would go through its epochs without a picture."""
    (tmp_path / "imgs").mkdir()
    paths = [str(tmp_path / "imgs" / name) for name in ("a.png", "b.png")]
    Image.new("RGB", (3, 2), "red").save(paths[0])
    images = Images(DecodedImages((4, 2)), (4, 2), skip_bad=True)
    found, left_out = images.read(paths)
    assert list(found) == paths[:1] and left_out == {paths[1]: f"no image at {paths[1]}"}
    failing(monkeypatch, errno.EIO, 4)  # of one place
    assert not images.read(paths[:1])[0]
    failing(monkeypatch, errno.ESTALE, 4)
    with pytest.raises(InputError, match="see that its disk is there"):
        images.read(paths[:1])
    monkeypatch.undo()
    (tmp_path / "imgs").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"no image at .*a.png, nor its folder: see that its disk is there"):
        images.read(paths)


def test_want_of_memory_is_no_reason_to_leave_a_picture_out(tmp_path, monkeypatch):
    def opened(path):
        raise MemoryError

    monkeypatch.setattr(Image, "open", opened)
    images = Images(DecodedImages((4, 2)), (4, 2), skip_bad=True)
    with pytest.raises(InputError, match=r"not enough memory to read the image .*a\.png"):
        images.read([str(tmp_path / "a.png")])


def test_a_picture_that_is_none_is_not_asked_for_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no picture")
    waited = failing(monkeypatch, errno.EIO, 0)
    with pytest.raises(InputError, match="replace it or take its record out"):
        read_image(tmp_path / "a.png")
    assert not waited


def test_too_many_open_files_are_no_fault_of_a_pictures(tmp_path, monkeypatch):
    failing(monkeypatch, errno.EMFILE, 1)
    with pytest.raises(InputError, match="raise the limit"), out_of_memory(torch.device("cpu"), 8):
        read_image(tmp_path / "a.png")
