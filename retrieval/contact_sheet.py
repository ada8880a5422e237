"""A picture of what was found: a sentence and its best images, framed green (the right person) or red."""

import bisect
import functools
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets.transforms import as_rgb, open_image, resized
from utils.errors import InputError, printable
from utils.files import cannot_write, write_whole

GREEN, RED, GREY, INK, PAPER = (34, 160, 70), (205, 50, 45), (190, 190, 190), (30, 30, 30), (255, 255, 255)
BEST = 10  # images shown of what a query finds
CELL = (96, 256)  # width, height of an image
BORDER, GAP, MARGIN, TEXT, FOOT = 5, 10, 18, 46, 20
LINE_HEIGHT = 22  # of text
MOST_PIXELS = 1 << 28  # of a sheet: 1 GiB of memory
BETWEEN = 16  # more space between two queries than between two lines of one
ACROSS = 12  # images side by side; more go below
STEP, LINE = CELL[0] + 2 * BORDER + GAP, CELL[1] + 2 * BORDER + FOOT + GAP  # from one image to the next


class Found(NamedTuple):
    image_path: str
    similarity: float
    right: bool | None  # None: nobody knows, as in a folder of one's own; the frame is grey
    copies: int = 0  # of equal features, not drawn


def draw_contact_sheet(rows, path):
    """Write a contact_sheet to a file; the path's suffix names the format."""
    save_picture(contact_sheet(rows), path)


def picture_format(path):
    """Pillow's name of the format that the path's suffix asks for; InputError where it cannot be written."""
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        why = "give it a name that ends in .png or .jpg"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    else:
        why = "that is a folder" if path.is_dir() else cannot_write(path.parent)
    if why:
        raise InputError(f"cannot write the picture {path}: {why}")
    return kind


def save_picture(picture, path):
    """The path's suffix names the format; the file is whole or absent."""
    kind = picture_format(path)
    data = io.BytesIO()
    try:
        picture.save(data, kind)
    except (OSError, ValueError) as error:  # e.g. larger than the format allows
        raise InputError(f"cannot write the picture {path}: {error}") from None
    write_whole(path, data.getvalue())


def contact_sheet(rows):
    """A PIL picture of rows [(sentence, [Found, …] best first), …], of which there is one at least."""
    width = width_of(max(min(len(found), ACROSS) for _, found in rows))
    heights = [TEXT + max(1, math.ceil(len(found) / ACROSS)) * LINE + BETWEEN for _, found in rows]
    size = width, 2 * MARGIN + sum(heights) - GAP - BETWEEN
    if math.prod(size) > MOST_PIXELS:
        raise InputError(
            f"{len(rows)} queries are too many for one picture of {size[0]}x{size[1]}: draw fewer"
        )
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(16)
    y = MARGIN
    for (sentence, found), height in zip(rows, heights, strict=True):
        write(sheet, (MARGIN, y), (width - 2 * MARGIN, TEXT), sentence, font)
        for place, hit in enumerate(found):
            corner = MARGIN + place % ACROSS * STEP, y + TEXT + place // ACROSS * LINE
            draw_found(sheet, draw, corner, place + 1, hit)
        y += height
    return sheet


def width_of(images):
    """Of a sheet with so many images side by side."""
    return max(2 * MARGIN + images * STEP - GAP, 480)


def draw_found(sheet, draw, corner, rank, hit):
    """A Found in its frame, rank and similarity below."""
    frame = {True: GREEN, False: RED, None: GREY}[hit.right]
    draw_framed(sheet, draw, corner, hit.image_path, frame, whole=hit.right is None)
    label = f"{rank}   {hit.similarity:.3f}" + (f"   +{hit.copies}" if hit.copies else "")
    draw.text((corner[0], corner[1] + CELL[1] + 2 * BORDER + 4), label, INK, font_of(12))


@functools.cache
def font_of(size):
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)  # it knows Greek and Cyrillic too
    except OSError:
        return ImageFont.load_default(size)


def wrapped(sentence, width, font, lines=2):
    """A sentence on at most so many lines of `width` pixels; "…" ends it where it is cut. What would act on a
    line, such as a turn to the left, is shown escaped; letters that the font lacks are boxes."""
    sentence = " ".join(sentence.split())
    rest, found = printable(sentence[: width * lines]), []  # more letters than pixels: enough is enough
    while rest and len(found) < lines:
        end = max(1, fitting(rest, width, font))
        if end < len(rest):  # after a whole word, if the line holds one
            end = rest.rfind(" ", 0, end + 1) if " " in rest[: end + 1] else end
        found.append(rest[:end])
        rest = rest[end:].lstrip(" ")
    if rest or len(sentence) > width * lines:
        found[-1] = shortened(found[-1] + "…", width, font)
    return "\n".join(found)


def fitting(text, width, font):
    """How many of its letters fit in a line."""
    return bisect.bisect(range(1, len(text) + 1), width, key=lambda end: font.getlength(text[:end]))


def shortened(text, width, font):
    """The text in `width` pixels: its end gives way to "…"."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    return text[: fitting(text, width - font.getlength("…"), font)].rstrip() + "…"


def write(sheet, corner, size, text, font):
    """Text in its box, wrapped to it; marks that pile up over a letter end with the box too."""
    box = Image.new("RGB", size, PAPER)
    lines = max(1, size[1] // LINE_HEIGHT)
    ImageDraw.Draw(box).multiline_text((0, 0), wrapped(text, size[0], font, lines), INK, font)
    sheet.paste(box, corner)


def draw_framed(sheet, draw, corner, image_path, frame, whole=False):
    """An image in its frame, filling it or whole; one lost or damaged since it was found leaves it empty."""
    x, y = corner
    draw.rectangle((x, y, x + CELL[0] + 2 * BORDER - 1, y + CELL[1] + 2 * BORDER - 1), fill=frame)
    try:
        with open_image(image_path) as image:
            picture = as_rgb(image, upright=True)
        picture = fitted(picture) if whole else ImageOps.fit(picture, CELL)
    except Exception:  # gone, or whatever a decoder trips over in half a file
        picture = Image.new("RGB", CELL, PAPER)
    sheet.paste(picture, (x + BORDER, y + BORDER))


def fitted(picture):
    """The whole picture in a cell, on paper."""
    return ImageOps.pad(inside(picture, CELL), CELL, color=PAPER)


def inside(picture, box, least=1):
    """The picture as large as a box (width, height) takes it, neither side shorter than `least` pixels."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = [max(least, round(side * scale)) for side in picture.size]
    return resized(picture, size, Image.Resampling.BICUBIC)


# ---- queries of a data set's split ----


def gallery_paths(images, left_out):
    """Paths of the images that have features, in their order. images: a datasets.image_text.ImageDataset.
    left_out: what each process's loader left out of it, {row: why}."""
    absent = {row for part in left_out for row in part}
    return [path for row, path in enumerate(images.image_paths) if row not in absent]


def query_rows(features, indices, image_paths, captions, queries):
    """Rows for contact_sheet: of each query number its sentence and what was found, best first.

    features: processor.evaluator.Features. indices: [Q, k], a Ranking's, of which BEST are taken.
    image_paths: see gallery_paths. captions: sentences by query number.
    """
    rows = []
    for query in queries:
        best = indices[query, :BEST].tolist()
        similarity = (features.image[best] @ features.text[query]).tolist()
        right = (features.image_pids[best] == features.text_pids[query]).tolist()
        found = [Found(image_paths[i], s, r) for i, s, r in zip(best, similarity, right, strict=True)]
        rows.append((captions[query], found))
    return rows


def spread(total, number):
    """`number` query numbers spread evenly over a split: the same ones at each evaluation."""
    number = min(number, total)
    return [step * total // number for step in range(number)]


def retrieval_picture(features, indices, image_paths, captions, number=4):
    """What a few fixed queries find, for TensorBoard: uint8 [H, W, 3]. Arguments as in query_rows."""
    rows = query_rows(features, indices, image_paths, captions, spread(len(captions), number))
    return np.asarray(contact_sheet(rows))
