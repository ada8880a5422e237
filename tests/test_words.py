"""benchmarks.words: the parts that it takes for true are those that are drawn, its words what names them."""

import json
from random import Random

import numpy as np
import pytest

from benchmarks import harness, words
from datasets.pedestrians import SKINS, VIEWS, Identity, describe, make_identities
from tests.tiny_run import make_run

PERSON = Identity(
    "man", SKINS[0], ("cap", "blue"), ("shirt", "plain", "red"), ("trousers", "green"), ("boots", "yellow"),
    ("none", ""),
)  # fmt: skip


def is_colour(picture, *channels):
    """(H, W) bool: where these channels, of red, green and blue, lie far above the others."""
    pixels = np.asarray(picture, int)
    others = [channel for channel in range(3) if channel not in channels]
    return pixels[..., channels].min(axis=2) > pixels[..., others].max(axis=2) + 45


def test_a_part_is_where_its_colour_is():
    for number, view in enumerate(VIEWS):
        picture, regions = words.draw_with_truth(PERSON, view, f"a seed/{number}")
        assert regions.keys() == {"head", "top", "bottom", "shoes"}  # no bag
        for part, channels in (("head", (2,)), ("top", (0,)), ("bottom", (1,)), ("shoes", (0, 1))):
            found, expected = regions[part], is_colour(picture, *channels)
            assert (found & expected).sum() > 0.7 * expected.sum(), (view, part)
            # shade and hems are not as bright
            assert (found & expected).sum() > 0.6 * found.sum(), (view, part)


def test_parts_lie_below_one_another_and_apart_whatever_the_person():
    for number, identity in enumerate(make_identities(1, "test", 12)):
        _, regions = words.draw_with_truth(identity, VIEWS[number % 8], f"seed/{number}")
        heights = {part: np.nonzero(region)[0].mean() for part, region in regions.items()}
        order = [heights[part] for part in ("head", "top", "bottom", "shoes") if part in heights]
        assert order == sorted(order)
        parts = sum(region.astype(int) for region in regions.values())
        assert (parts > 1).sum() < 0.2 * (parts > 0).sum()  # blurred edges


def test_the_words_that_name_a_part_are_found_in_a_sentence():
    identity = Identity(
        "boy", SKINS[1], ("short", "black"), ("t-shirt", "plain", "white"), ("trousers", "black"),
        ("sneakers", "grey"), ("shoulder bag", "purple"),
    )  # fmt: skip
    sentence = (
        "wearing a white short-sleeved t-shirt, jeans and a pair of gray sports shoes, a boy with short "
        "black hair carries a violet messenger bag. he has black pants"
    ).split()
    found = words.words_that_name(identity, sentence)
    named = {part: [sentence[place] for place in found if found[place] == part] for part in words.PARTS}
    assert named == {
        "head": ["short", "black", "hair"],
        "top": ["white", "short-sleeved", "t-shirt,"],
        "bottom": ["black", "pants"],  # "jeans" alone could be another's
        "shoes": ["gray", "sports", "shoes,"],
        "bag": ["violet", "messenger", "bag."],
    }


def test_every_sentence_has_words_for_the_top_and_for_four_parts_at_least():
    for number, identity in enumerate(make_identities(2, "train", 200)):
        rng = Random(number)
        sentence = describe(identity, rng.choice(VIEWS), rng).lower().split()
        parts = set(words.words_that_name(identity, sentence).values())
        worn = 4 + (identity.bag[0] != "none")
        assert {"top", "bottom"} <= parts and len(parts) >= worn - 1, sentence


def test_a_patchs_weight_counts_by_what_the_part_covers_of_it():
    region = np.zeros((40, 20), bool)
    region[:10, :5] = True  # half of the upper left one of 2 x 2 patches, across, and half of that
    weights = np.array([[6, 1], [2, 1]])
    assert words.on(region, weights) == pytest.approx(0.6 / 4)
    assert words.on(region, np.full((2, 2), 0.25)) == pytest.approx(region.mean())


@pytest.mark.parametrize("losses", ["sdm+mlm", "sdm"])
def test_each_kind_of_word_has_a_line_with_an_even_spread_beside(tmp_path, monkeypatch, capsys, losses):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    run = make_run(tmp_path, losses)
    assert words.main(["--config_file", str(run), "--device", "cpu", "--persons", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(words.PARTS) + 2
    ways = {"even spread", "relevance", *(["attention"] if "mlm" in losses else [])}
    for line in lines:
        arms = line["arms"]
        assert arms.keys() == ways and all(0 < share < 50 for share in arms.values())
        assert line["ratio"]["relevance"] == pytest.approx(arms["relevance"] / arms["even spread"], rel=0.01)
