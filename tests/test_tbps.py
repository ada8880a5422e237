"""TBPS-CLIP (arXiv 2308.10045) and NAM's masking (arXiv 2405.04940), held against figures of their published
code (tests/reference/methods; github.com/Flame-Chasers/TBPS-CLIP at ba090bc, WentaoTan/MLLM4Text-ReID at
8f19e67)."""

import random

import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import MASK, drop_words, mask_tokens, similarity_mask
from tests.children import draw, words
from tests.recipe import arrays, figures, pixels
from utils.options import get_args

TEXT, NAM = figures("methods/tbps_text"), arrays("methods/nam")


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


def test_words_are_masked_by_similarity_as_published():
    ids, out, labels = (NAM[f"mask_{name}"] for name in ("ids_in", "out", "labels"))
    similarity = (pixels(162, (8, 77)) + 2) / 4
    for seed, *expected in zip(figures("methods/nam")["mask"]["seeds"], out, labels, strict=True):
        rng = random.Random(seed)
        found = [similarity_mask(row, near, rng) for row, near in zip(ids, similarity, strict=True)]
        for ours, published in zip(zip(*found, strict=True), expected, strict=True):
            assert torch.equal(torch.stack(ours), published)


def test_of_words_alike_as_many_are_masked_as_by_the_published_rate():
    ids = torch.arange(1, 78).repeat(200, 1)
    ids[:, 76] = 0
    rng, near = random.Random(3), torch.full((77,), 0.85)
    chosen = [float((similarity_mask(row, near, rng)[1] != 0).float().mean()) for row in ids]
    _, labels = mask_tokens(ids, torch.rand(200, 2, 77, generator=torch.Generator().manual_seed(3)))
    assert sum(chosen) / 200 == pytest.approx(float((labels != 0).float().mean()), abs=0.01)


def test_a_caption_without_words_is_masked_at_its_first_place():
    ids = torch.tensor([49406, 49407, 0, 0])
    masked, labels = similarity_mask(ids, torch.full((4,), 0.85), random.Random(0))
    assert masked.tolist() == [49406, MASK, 0, 0] and labels.tolist() == [0, 49407, 0, 0]
