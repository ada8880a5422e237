"""Images to tensors: the resizing and the published augmentation, split into what is done to bytes and what
to floats, so that bytes can be kept and floats made where they are needed."""

import errno
import math
import os
import time
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from PIL import EpsImagePlugin, ExifTags, Image, TiffImagePlugin

from utils.errors import NO_ANSWER, InputError, first_line

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
PAD = 10
ERASE_PROBABILITY, ERASE_SCALE, ERASE_RATIO = 0.5, (0.02, 0.4), (0.3, 3.3)
FLOAT, INTEGER = torch.empty(1), torch.empty(1, dtype=torch.int64)  # room for a number: quicker than anew
LOG_RATIO = torch.tensor(ERASE_RATIO).log().tolist()  # in fp32, as torchvision takes it


# EPS is a program, and PIL would have Ghostscript run it, also inside a file of another format (IPTC)
EpsImagePlugin.gs_binary = False
# of a damaged tag, of a large picture: PIL does not say of which file, and reads it all the same
warnings.filterwarnings("ignore", module=r"PIL\.")
TURNS = {  # EXIF's word for how a picture lies, and what sets it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AT_ONCE = 1 << 20  # deep pixels that are brought to eight bits at a time
PATIENCE = (1, 5, 15)  # seconds before a disk is asked again
WIDEST = 1 << 26  # pixels that resizing may hold on its way


def open_image(path):
    """PIL's picture of a file, not decoded yet. EPS is refused."""
    image = Image.open(path)
    if image.format == "EPS":
        image.close()
        raise OSError("EPS is a program, not a picture")
    return image


def as_rgb(image, upright=False):
    """The picture decoded, in RGB, as every program here sees it. upright: turned as its EXIF tag asks."""
    image.load()
    turn = turn_of(image) if upright else None
    rgb = eight_bits(image) if is_deep(image) else image
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def is_deep(image):
    """Whether it is grey with more than eight bits, whole numbers or floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def turn_of(image):
    """What sets a decoded picture upright, or None. TIFF needs nothing: Pillow turns it while decoding."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever PIL trips over in a damaged tag: it asks for nothing
        return None


def eight_bits(image):
    """A deep grey picture as mode L; convert() would cut at 255, which leaves white.

    Its white is the smallest of 1 (of floats), 255, 4095 and the like where a TIFF says its bits, and 65535
    that no value is above. Where there is none, or values are negative, the picture's own range counts.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(TiffImagePlugin.SAMPLEFORMAT) == (1,):
        values = values.view(np.uint32)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    black, white = float(values.min()), float(values.max())
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    scales = {1: 255.0} if image.mode == "F" else {}
    scales.update({2**n - 1: 2.0 ** (8 - n) for n in (8, bits, 16) if 8 <= n <= 16})
    scale = next((scale for top, scale in scales.items() if 0 <= black and white <= top), None)
    if scale is None:
        scale = 255 / (white - black) if white > black else 0
    else:
        black = 0
    flat, grey = values.ravel(), np.empty(values.size, np.uint8)
    for start in range(0, values.size, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        grey[part] = (flat[part].astype(np.float64) - black) * scale  # rounded down, as convert() does
    return Image.fromarray(grey.reshape(values.shape))


@contextmanager
def opened(path):
    """PIL's picture of a file, while it is looked at. One that cannot be decoded is an error that names it;
    it is not tried again."""
    try:
        with open_image(path) as image:
            yield image
    except FileNotFoundError:
        there = os.path.isdir(os.path.dirname(path) or ".")
        where = "" if there else ", nor its folder: see that its disk is there"
        raise unreadable(f"no image at {path}{where}", of_disk=not there) from None
    except MemoryError:
        sentence = f"there is not enough memory to read the image {path}: free some, or make it smaller"
        raise unreadable(sentence, of_disk=True) from None
    except Exception as error:  # each of PIL's decoders raises its own kinds; the file is no picture
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):  # this is no fault of the picture's
            raise
        mend = "see that its disk is there" if number in NO_ANSWER else "replace it or take its record out"
        sentence = f"the image {path} cannot be read ({first_line(error)}): {mend}"
        of_disk = number in NO_ANSWER and number != errno.EIO  # a disk has single bad places, too
        raise unreadable(sentence, of_disk) from None


def unreadable(sentence, of_disk):
    """The InputError of a picture. of_disk: it would be so of others too, so that none is to be left out."""
    error = InputError(sentence)
    error.of_disk = of_disk
    return error


def read_image(path):
    """RGB picture of a file, as it lies there: not turned by its EXIF tag. InputError: see `opened`. A disk
    that does not answer, as those of a network for a moment, is asked again."""
    for seconds in (*PATIENCE, None):
        try:
            with opened(path) as image:
                return as_rgb(image)
        except InputError as error:
            if seconds is None or getattr(error.__context__, "errno", None) not in NO_ANSWER:
                raise
        time.sleep(seconds)


def resized(image, size, resample=Image.Resampling.BILINEAR):
    """PIL's resize, size: (width, height), in bounded memory whatever the picture's shape: Pillow before 12
    makes it as wide as asked for at its whole height first, and a line of 10^8 pixels fills any memory."""
    if size[0] * image.height > max(WIDEST, image.width * image.height):
        image = image.resize((image.width, size[1]), resample)
    return image if image.size == tuple(size) else image.resize(size, resample)


def resize(image, size):
    """A PIL picture to uint8 [3, H, W]; bilinear as PIL does it. size: (H, W)."""
    image = resized(image, (size[1], size[0]))
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def normalise(pixels):
    """uint8 [..., 3, H, W] to floats: to [0, 1], then CLIP's mean and standard deviation."""
    mean, std = triple(MEAN, pixels.device), triple(STD, pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def triple(numbers, device):
    """Three numbers as (3, 1, 1) on the device. Filled there: for a tensor made on the host one would have to
    wait, and with it for all that the device has yet to do."""
    return torch.stack([torch.full((1, 1), number, device=device) for number in numbers])


def draw_augmentation(H, W, generator, img_aug):
    """What becomes of one sample: (flip, top, left of the crop, box to erase).

    Draws from the generator in torchvision's order (RandomHorizontalFlip, RandomCrop, RandomErasing), so that
    one seed gives what the published chain of transforms gives.
    """
    flip = uniform(generator) < 0.5
    if not img_aug:
        return flip, 0, 0, (0, 0, 0, 0)
    top, left = below(2 * PAD + 1, generator) - PAD, below(2 * PAD + 1, generator) - PAD
    return flip, top, left, erase_box(H, W, generator)


def uniform(generator, low=0.0, high=1.0):
    """The number that torch.empty(1).uniform_(low, high) draws; torch.rand(1) is that of 0 and 1."""
    return FLOAT.uniform_(low, high, generator=generator).item()


def below(limit, generator):
    """The number that torch.randint(0, limit, (1,)) draws."""
    return INTEGER.random_(0, limit, generator=generator).item()


def crop_padded(pixels, top, left, out):
    """The window of the pixels' own size at (top, left), black outside, into out: pad and crop in one copy.
    Arrays, [3, H, W]."""
    H, W = pixels.shape[1:]
    y0, y1, x0, x1 = max(top, 0), min(top, 0) + H, max(left, 0), min(left, 0) + W
    out[:, y0 - top : y1 - top, x0 - left : x1 - left] = pixels[:, y0:y1, x0:x1]
    out[:, : y0 - top] = out[:, y1 - top :] = out[:, :, : x0 - left] = out[:, :, x1 - left :] = 0


def erase_box(H, W, generator):
    """Rectangle of RandomErasing (arXiv 1708.04896) as torchvision draws it."""
    nothing = (0, 0, 0, 0)
    if uniform(generator) >= ERASE_PROBABILITY:
        return nothing
    for _ in range(10):
        area = H * W * uniform(generator, *ERASE_SCALE)
        # in fp32, as torchvision takes it
        ratio = FLOAT.uniform_(*LOG_RATIO, generator=generator).exp_().item()
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < H and w < W:
            return below(H - h + 1, generator), below(W - w + 1, generator), h, w
    return nothing


def erase(images, boxes):
    """Fill each picture's box with CLIP's mean triple, in normalised space as published. In place.

    images: floats [B, 3, H, W]. boxes: [B, 4] of (top, left, h, w), on the same device.
    """
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    top, left, h, w = boxes.t()[:, :, None]  # (B, 1) each
    inside_rows = (rows >= top) & (rows < top + h)  # (B, H)
    inside_columns = (columns >= left) & (columns < left + w)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(inside, triple(MEAN, images.device), images, out=images)
