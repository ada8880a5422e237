"""The picture of queries and what was found for them."""

import numpy as np
import pytest
import torch
from PIL import Image

from processor.evaluator import Features
from retrieval.contact_sheet import Found, contact_sheet, draw_contact_sheet, query_rows
from tests.full_disk import limited
from utils.errors import InputError

COLOURS = [(0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]  # of the pictures, and of nothing else
SIZES = [(30, 80), (80, 30), (5, 5), (96, 256)]  # the last one is that of a cell


@pytest.fixture
def images(tmp_path):
    """Paths of four pictures of one colour each, of different shapes."""
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path, colour, size in zip(paths, COLOURS, SIZES, strict=True):
        Image.new("RGB", size, colour).save(path)
    return paths


def drawn(*rows):
    return np.asarray(contact_sheet(rows)).astype(int)


def place_of(sheet, colour):
    """(top, bottom, left, right) of the rectangle that is filled with a colour, and that it is filled."""
    rows, columns = np.nonzero((sheet == colour).all(2))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    assert len(rows) == (bottom - top + 1) * (right - left + 1)
    return top, bottom, left, right


def around(sheet, place):
    """The colours one and three pixels outside a rectangle, in the middle of each of its sides."""
    top, bottom, left, right = place
    y, x = (top + bottom) // 2, (left + right) // 2
    beside = [(y, column) for side in (1, 3) for column in (left - side, right + side)]
    beside += [(row, x) for side in (1, 3) for row in (top - side, bottom + side)]
    return {tuple(sheet[at]) for at in beside}


def test_ten_are_shown_of_a_longer_ranking():
    ids, paths = torch.arange(12), [str(number) for number in range(12)]
    features = Features(torch.ones(1, 1), ids[:1], torch.ones(12, 1), ids)
    ((_, found),) = query_rows(features, ids.flip(0)[None], paths, ["a man"], [0])
    assert [one.image_path for one in found] == paths[:1:-1]


def test_the_right_person_has_a_green_border_and_another_a_red_one(images):
    verdicts = [True, False, False, True]
    found = [Found(path, 0.5, right) for path, right in zip(images, verdicts, strict=True)]
    sheet = drawn(("a man in red", found[:2]), ("a woman in blue", found[2:]))
    for colour, right in zip(COLOURS, verdicts, strict=True):
        ((red, green, blue),) = around(sheet, place_of(sheet, colour))
        if right:
            assert green > 1.5 * red and green > 1.5 * blue
        else:
            assert red > 1.5 * green and red > 1.5 * blue


def test_where_nobody_knows_who_is_right_the_border_is_grey(images):
    sheet = drawn(("a man in red", [Found(images[3], 0.5, None)]))
    ((red, green, blue),) = around(sheet, place_of(sheet, COLOURS[3]))
    assert red == green == blue and 128 < red < 224


def test_more_images_than_stand_side_by_side_go_on_below(tmp_path):
    paths = []
    for number in range(15):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (96, 256), (250, 10 * number, 1)).save(paths[-1])
    sheet = drawn(("", [Found(path, 0.5, False) for path in paths]))
    corners = [place_of(sheet, (250, 10 * n, 1))[::2] for n in range(15)]  # (top, left)
    assert corners == sorted(corners) and len(set(corners)) == 15
    lines = sorted({top for top, _ in corners})
    assert len(lines) == 2 and corners[[top for top, _ in corners].index(lines[1])][1] == corners[0][1]


@pytest.mark.parametrize(
    "data", [None, b"", b"no picture", b"P6\n9 9\n"], ids=["gone", "empty", "text", "cut off"]
)
def test_an_image_that_was_lost_since_it_was_found_leaves_its_frame_empty(images, tmp_path, data):
    lost, white = tmp_path / "0.png", tmp_path / "white.png"
    lost.unlink()
    if data is not None:
        lost.write_bytes(data)
    Image.new("RGB", (96, 256), "white").save(white)
    other = Found(images[1], 0.5, False)
    found, blank = (drawn(("", [Found(str(path), 0.5, True), other])) for path in (lost, white))
    assert np.array_equal(found, blank)


def test_images_stand_side_by_side_in_order_and_queries_below_one_another(images):
    found = [Found(path, 0.5, True) for path in images]
    sheet = drawn(("one", found[:3]), ("two", found[3:]))
    first, second, third, below = (place_of(sheet, colour) for colour in COLOURS)
    assert first[3] < second[2] and second[3] < third[2]  # left to right
    assert first[:2] == second[:2] == third[:2] and below[0] > first[1]
    assert below[2:] == first[2:]
    sizes = {(bottom - top, right - left) for top, bottom, left, right in (first, second, third, below)}
    assert len(sizes) == 1  # whatever the pictures' own shapes


def test_the_sentence_stands_above_its_images_and_each_rank_below_its_image(images):
    with_text = drawn(("a man in red", [Found(images[0], 0.5, True)]))
    without = drawn(("", [Found(images[0], 0.5, True)]))
    top, bottom, _, _ = place_of(with_text, COLOURS[0])
    rows = np.nonzero((with_text != without).any((1, 2)))[0]
    assert len(rows) and rows.max() < top
    other = drawn(("", [Found(images[0], 0.123, True)]))
    rows = np.nonzero((other != without).any((1, 2)))[0]
    assert len(rows) and rows.min() > bottom


@pytest.mark.parametrize("sentence", ["word " * 300, "x" * 2000, "漢字 и кириллица", ""])
def test_a_sentence_of_any_length_or_alphabet_stays_above_the_images(images, sentence):
    sheet, without = (drawn((text, [Found(images[0], -0.5, False)])) for text in (sentence, ""))
    top, *_ = place_of(without, COLOURS[0])
    assert np.array_equal(sheet[top:], without[top:])


@pytest.mark.parametrize("target", ["nowhere/sheet.png", "sheet.xyz", "sheet", "folder.png"])
def test_a_path_that_cannot_be_written_is_an_error_that_names_it(images, tmp_path, target):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError) as error:
        draw_contact_sheet([("a man in red", [Found(images[0], 0.5, True)])], str(tmp_path / target))
    assert str(tmp_path / target) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_that_does_not_fit_leaves_the_earlier_one(images, tmp_path):
    path, rows = tmp_path / "sheet.png", [("a man in red", [Found(images[0], 0.5, True)])]
    draw_contact_sheet(rows, path)
    before = path.read_bytes()
    assert np.array_equal(np.asarray(Image.open(path)), drawn(*rows))
    with limited(500), pytest.raises(InputError, match="cannot write .*sheet.png .*File too large"):
        draw_contact_sheet([("another sentence", rows[0][1])], path)
    assert path.read_bytes() == before and not list(tmp_path.glob(".sheet*"))


def test_a_frame_is_equally_thick_on_all_sides(images):
    sheet = drawn(("", [Found(images[3], 0.5, True)]))
    top, bottom, left, right = place_of(sheet, COLOURS[3])
    y, x = (top + bottom) // 2, (left + right) // 2
    white = (sheet == 255).all(2)
    sides = (white[y, left::-1], white[y, right:], white[top::-1, x], white[bottom:, x])
    assert {int(side.argmax()) for side in sides} == {6}  # 5 pixels of frame, then the first white one


def test_more_queries_than_a_picture_can_hold_are_one_sentence(images):
    rows = [("a man", [Found(images[0], 0.5, None)])] * 3000
    with pytest.raises(InputError, match="3000 queries are too many for one picture of 480x"):
        contact_sheet(rows)
