"""Single queries of a split: which are found best and worst, and a picture of each."""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

from retrieval.contact_sheet import (
    FOOT,
    GAP,
    GREY,
    INK,
    LINE,
    LINE_HEIGHT,
    MARGIN,
    PAPER,
    STEP,
    draw_found,
    draw_framed,
    font_of,
    shortened,
    width_of,
    wrapped,
    write,
)

ROWS_AT_ONCE = 1 << 21  # similarities held at once


class Outcome(NamedTuple):
    first_rank: torch.Tensor  # (Q,) rank of the first right image; G + 1 where the gallery has none
    margin: torch.Tensor  # (Q,) similarity of the best right image above that of the best wrong one


def outcomes(features):
    """How each query of a split fared. features: processor.evaluator.Features."""
    text, text_pids, image, image_pids = features
    ranks, margins = [], []
    for rows in torch.arange(len(text)).split(max(1, ROWS_AT_ONCE // len(image))):
        similarity = text[rows] @ image.t()
        right = (text_pids[rows, None] == image_pids[None]).to(similarity.device)
        best_right = similarity.masked_fill(~right, -2).amax(dim=1)
        best_wrong = similarity.masked_fill(right, -2).amax(dim=1)
        ranks.append(1 + (similarity > best_right[:, None]).sum(dim=1).masked_fill(~right.any(1), len(image)))
        margins.append(best_right - best_wrong)
    return Outcome(torch.cat(ranks).cpu(), torch.cat(margins).cpu())


def choose(outcome, best=0, worst=0, random=0, seed=1):
    """Numbers of the `best`, `worst` and `random` queries, each once.

    The worst are those whose first right image comes last; among equals the margin decides.
    """
    by_fortune = sorted(
        range(len(outcome.margin)), key=lambda q: (int(outcome.first_rank[q]), -float(outcome.margin[q]), q)
    )
    drawn = torch.randperm(len(by_fortune), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [*by_fortune[:best], *reversed(by_fortune[-worst:] if worst else []), *drawn[:random]]
    return list(dict.fromkeys(chosen))


def draw_query(sentence, right_paths, found, note=""):
    """The sentence, the true images, and below them what was found, best first. Returns a PIL picture.

    right_paths: images of the person who is meant. found: contact_sheet.Found, in order.
    """
    right_paths, more = right_paths[: len(found)], len(right_paths) - len(found)
    width = width_of(max(len(found), len(right_paths)))
    font, small = font_of(16), font_of(12)
    text = wrapped(sentence, width - 2 * MARGIN, font, lines=4)
    head = MARGIN + LINE_HEIGHT * (1 + text.count("\n")) + GAP
    label = FOOT + 4
    sheet = Image.new("RGB", (width, head + 2 * (label + LINE) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(sheet, (MARGIN, MARGIN), (width - 2 * MARGIN, head - MARGIN), sentence, font)
    title = "the person meant" + (f" (and {more} more images)" if more > 0 else "")
    draw.text(
        (MARGIN, head), title if right_paths else "no image of the person is in the gallery", INK, small
    )
    for place, path in enumerate(right_paths):
        draw_framed(sheet, draw, (MARGIN + place * STEP, head + label), path, GREY)
    y = head + label + LINE
    note = shortened(f"found{', ' if note else ''}{note}", width - 2 * MARGIN, small)
    draw.text((MARGIN, y), note, INK, small)
    for place, hit in enumerate(found):
        draw_found(sheet, draw, (MARGIN + place * STEP, y + label), place + 1, hit)
    return sheet
