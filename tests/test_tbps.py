"""TBPS-CLIP (arXiv 2308.10045) and NAM's masking (arXiv 2405.04940), held against figures of their published
code (tests/reference/methods; github.com/Flame-Chasers/TBPS-CLIP at ba090bc, WentaoTan/MLLM4Text-ReID at
8f19e67)."""

import functools
import inspect
import math
import random

import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import MASK, drop_words, mask_tokens, similarity_mask
from model import build_model, objectives
from tests.children import draw, words
from tests.conftest import load_script
from tests.recipe import arrays, figures, pixels, tiny_args
from tests.tiny_run import missing
from utils.options import get_args

TBPS, TEXT, SCHEDULE = (figures(f"methods/tbps_{name}") for name in ("losses", "text", "schedule"))
NAM = arrays("methods/nam")
PIDS = torch.tensor(TBPS["pids"])
CASES = {case["case"]: case for case in TBPS["cases"]}
SCALE = math.exp(TBPS["logit_scale_parameter"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


# ---- losses ----


def features():
    image = pixels(111, (12, 512))
    return image.requires_grad_(), (0.15 * image + pixels(112, (12, 512))).detach().requires_grad_()


def test_the_mean_of_nitc_over_two_views_is_the_published_one():
    """A second view is not built; this is a third share of soft labels."""
    image, text = features()
    second = image + 0.3 * pixels(113, (12, 512))
    views = [objectives.compute_nitc(view, text, PIDS, SCALE, 0.3, 9) for view in (image, second)]
    expected = CASES["nitc with two views"]["returned"]["nitc_loss"]
    assert sum(views).item() / 2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", SCHEDULE["cases"], ids=lambda case: case["iterations_per_epoch"])
def test_in_the_first_epoch_labels_become_soft_step_by_step_as_published(case):
    image, text = features()
    steps = case["iterations_per_epoch"]
    shares = [*case["alpha_first_epoch"], *2 * [case["alpha_later"]]]
    for step, share in enumerate(shares):
        of_step = objectives.compute_nitc(image, text, PIDS, SCALE, 0.5, step / steps)
        assert of_step.item() == objectives.compute_nitc(image, text, PIDS, SCALE, share, math.inf).item()


def test_nitc_equals_plain_loops():
    image, text = pixels(21, (5, 6)).double(), pixels(22, (5, 6)).double()
    pids, expected = [4, 4, 9, 2, 4], 0.0
    for queries, gallery in ((image, text), (text, image)):
        for i in range(5):
            logits = [7 * float(torch.cosine_similarity(queries[i], gallery[j], dim=0)) for j in range(5)]
            p = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
            same = [pids[i] == pids[j] for j in range(5)]
            q = [0.4 * p[j] + 0.6 * same[j] / sum(same) for j in range(5)]
            expected -= sum(q[j] * math.log(p[j]) for j in range(5)) / 10
    found = objectives.compute_nitc(image, text, torch.tensor(pids), 7.0, 0.4, 1)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["nitc", "ritc"])
def test_samples_that_weigh_nothing_are_as_if_their_rows_were_not_there(name):
    image, text = features()
    given = {"image_features": image, "text_features": text, "pids": PIDS, "logit_scale": SCALE}
    given.update(soft_label=0.5, epochs_done=9)
    each = objectives.compute(name, given, kind="each")
    assert objectives.compute(name, given).item() == pytest.approx(each.mean().item(), rel=1e-6)
    weights = (torch.arange(12) % 3 > 0).float()
    found = objectives.compute(name, {**given, "weights": weights})
    assert found.item() == pytest.approx(each[weights > 0].mean().item(), rel=1e-6)


def test_a_weight_counts_for_the_second_embedding_too():
    model = build_model(tiny_args("citc", token_selection=True, citc_loss_weight=0.25), 37)
    found = dict(zip(("image_features", "text_features"), features(), strict=True))
    found.update(image_selected=pixels(5, (12, 8)), text_selected=pixels(6, (12, 8)))
    expected = 0.25 * objectives.compute_citc(pixels(5, (12, 8)), pixels(6, (12, 8)))
    assert model.compare(found, PIDS)["tse_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


# ---- a training ----


def trained(argv):
    """Train; returns the epochs_done that nitc was given each time."""
    seen, nitc = [], objectives.each_nitc

    @functools.wraps(nitc)
    def noted(*args, **given):
        seen.append(inspect.signature(nitc).bind(*args, **given).arguments["epochs_done"])
        return nitc(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "each_nitc", noted)
        assert load_script("train").main(argv) == 0
    return seen


@missing("sklearn", "scikit-learn", "requirements-methods.txt")
def test_a_division_is_told_which_epoch_begins_so_that_a_resumed_one_is_the_same(data, tmp_path):
    seen = trained(words(data, tmp_path, "--division", loss_names="nitc", epochs=2))
    divided = [*6 * [0.0], *6 * [1.0]]
    assert seen[:6] + seen[12:18] == divided
    assert seen[6:12] + seen[18:] == pytest.approx([step / 6 for step in range(12)])


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
