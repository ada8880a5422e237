"""A picture of what was found: a sentence and its best images, framed green (the right person) or red."""

import textwrap
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.errors import InputError

GREEN, RED, INK, PAPER = (34, 160, 70), (205, 50, 45), (30, 30, 30), (255, 255, 255)
CELL = (96, 256)  # width, height of an image
BORDER, GAP, MARGIN, TEXT = 5, 10, 18, 46


class Found(NamedTuple):
    image_path: str
    similarity: float
    right: bool


def draw_contact_sheet(rows, path):
    """rows: [(sentence, [Found, …] best first), …]. Writes a picture to path; its suffix names the format."""
    if not rows:
        raise InputError("there is no query to draw")
    most = max(len(found) for _, found in rows)
    width = 2 * MARGIN + most * (CELL[0] + 2 * BORDER + GAP) - GAP
    row_height = TEXT + CELL[1] + 2 * BORDER + 20 + GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + len(rows) * row_height - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    for number, (sentence, found) in enumerate(rows):
        y = MARGIN + number * row_height
        lines = textwrap.wrap(sentence, width=int((width - 2 * MARGIN) / 7.6))[:2]
        draw.multiline_text((MARGIN, y), "\n".join(lines), INK, font)
        for place, hit in enumerate(found):
            x = MARGIN + place * (CELL[0] + 2 * BORDER + GAP)
            box = (x, y + TEXT, x + CELL[0] + 2 * BORDER, y + TEXT + CELL[1] + 2 * BORDER)
            draw.rectangle(box, fill=GREEN if hit.right else RED)
            with Image.open(hit.image_path) as image:
                sheet.paste(ImageOps.fit(image.convert("RGB"), CELL), (x + BORDER, y + TEXT + BORDER))
            draw.text((x, box[3] + 4), f"{place + 1}   {hit.similarity:.3f}", INK, small)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the picture {path}: {error}") from None
