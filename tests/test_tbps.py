"""TBPS-CLIP (arXiv 2308.10045), held against figures of its published code (tests/reference/methods;
github.com/Flame-Chasers/TBPS-CLIP at ba090bc)."""

import random

import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import drop_words
from tests.children import draw, words
from tests.recipe import figures
from utils.options import get_args

TEXT = figures("methods/tbps_text")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


# ---- captions ----


@pytest.mark.parametrize("case", TEXT["deletion"], ids=lambda case: f"{case['seed']}-{case['p']}")
def test_words_are_left_out_as_published(case):
    texts = [row["text"] for row in TEXT["pre_caption"]]
    rng = random.Random(case["seed"])
    found = [drop_words(texts[place], case["p"], rng) for place in (5, 6, 7, 3)]
    assert found == case["out"]


@pytest.mark.parametrize("caption", ["woman", "", "  "])
def test_a_caption_of_one_word_or_none_stays(caption):
    """Published: the one comes back as a list, the other raises TypeError."""
    assert drop_words(caption, 1.0, random.Random(0)) == caption


def epoch_of(data, number, *more):
    """(caption ids, clean captions) of an epoch in the order of the samples."""
    typed = words(data, data, "--clean_captions", "--division", *more, loss_names="sdm")
    loader, *_ = build_dataloader(get_args(typed))
    loader.set_epoch(number)
    batches = list(loader)
    ids, at = (torch.cat([batch[key] for batch in batches]) for key in ("caption_ids", "indices"))
    return ids[at.argsort()]


def test_what_is_left_out_is_a_function_of_seed_epoch_and_sample(data):
    plain, first = epoch_of(data, 1), epoch_of(data, 1, "--text_drop", "0.3")
    assert torch.equal(first, epoch_of(data, 1, "--text_drop", "0.3", "--batch_size", "5"))
    assert not torch.equal(first, epoch_of(data, 2, "--text_drop", "0.3"))
    lengths, before = ((ids != 0).sum(1) for ids in (first, plain))
    assert (lengths <= before).all() and 0.5 < (lengths.sum() / before.sum()) < 0.9
    for ids, whole in zip(first.tolist(), plain.tolist(), strict=True):
        rest = iter(whole)
        assert all(token in rest for token in ids if token)  # what is left, in its order
