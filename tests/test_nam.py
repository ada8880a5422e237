"""NAM's pretraining (arXiv 2405.04940): masking by how little an image shows a word, held against figures of
the published code (tests/reference/methods; github.com/WentaoTan/MLLM4Text-ReID at 8f19e67)."""

import random
import signal
import weakref

import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import MASK, START_SIMILARITY, mask_tokens, similarity_mask
from model import build_model
from processor.similarity import WordSimilarities
from tests import processes
from tests.children import differ, draw, only_run, run, words
from tests.processes import together
from tests.recipe import (
    arguments,
    arrays,
    caption_ids,
    clip_weights,
    figures,
    off,
    pixels,
    refused_in_one_sentence,
)
from tests.test_methods import assert_summary
from utils.losses import total_loss
from utils.options import get_args

CPU = torch.device("cpu")
FIGURES, NAM = figures("methods/nam"), arrays("methods/nam")
MODEL = FIGURES["model"]
OPTIONS = ("--mask_by_similarity", "--learn_temperature")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


# ---- the model ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes, path = dict(MODEL["sizes"]), tmp_path_factory.mktemp("clip") / "clip.pt"
    names = ("embed_dim", "grid", "patch", "vision_width", "vision_layers", "text_width", "text_layers")
    torch.save(clip_weights(**{name: sizes[name] for name in names}), path)
    tiny = dict(pretrain_choice=path, img_size=(96, 32), device="cpu", temperature=sizes["temperature"])
    return build_model(get_args(arguments(**tiny, loss_names="sdm", mask_by_similarity=True)), 37)


def inputs():
    return pixels(MODEL["image_seed"], (12, 3, 96, 32)), caption_ids(MODEL["caption_seed"], 12)


def test_words_resemble_their_images_as_in_the_published_code(model):
    images, ids = inputs()
    found = model.word_similarities(images, ids)
    assert off(found, NAM["word_similarity"]) < 1e-5
    assert_summary(found, MODEL["word_similarity"])
    assert_summary(model.base_model.encode_image(images, skip=2), MODEL["early_image"])
    assert_summary(model.base_model.encode_text(ids, skip=2), MODEL["early_text"])
    assert not found.requires_grad


def test_sdm_of_the_masked_captions_and_its_gradients_are_the_published_ones(model):
    images, ids = inputs()
    assert torch.equal(ids, NAM["model_ids"])
    report = model(
        {"pids": torch.tensor(MODEL["pids"]), "images": images, "caption_ids": NAM["model_masked"]}
    )
    assert report["sdm_loss"].item() == pytest.approx(MODEL["sdm_loss"], rel=1e-5)
    assert_summary(model.encode_image(images), MODEL["image_class"])
    assert_summary(model.encode_text(NAM["model_masked"]), MODEL["text_eot"])
    model.zero_grad()
    total_loss(report).backward()
    parameters = dict(model.named_parameters())
    for name, l2 in MODEL["grads"].items():
        assert float(parameters[name].grad.double().norm()) == pytest.approx(l2, rel=1e-5), name


# ---- masks ----


def test_words_are_masked_by_similarity_as_published():
    assert FIGURES["mask"]["start"].endswith(f"every word has similarity {START_SIMILARITY}")
    ids, out, labels = (NAM[f"mask_{name}"] for name in ("ids_in", "out", "labels"))
    similarity = (pixels(162, (8, 77)) + 2) / 4
    for seed, *expected in zip(FIGURES["mask"]["seeds"], out, labels, strict=True):
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


# ---- what is kept from epoch to epoch ----


def trained(data, epochs, *more, loss_names="sdm"):
    """(model, loader, WordSimilarities) after epochs of looking, without a step."""
    args = get_args(words(data, data, *OPTIONS, *more, loss_names=loss_names))
    loader, *_, num_classes = build_dataloader(args)
    torch.manual_seed(args.seed)
    model = build_model(args, num_classes)
    kept = WordSimilarities(model, loader, CPU, args.micro_batch)
    for epoch in range(1, epochs + 1):
        kept.begin_epoch()
        loader.set_epoch(epoch)
        for _ in kept:
            pass
    return model, loader, kept


def in_order(loader, epoch):
    """{field: (N, …)} of an epoch's batches, in the order of the samples."""
    loader.set_epoch(epoch)
    batches = list(loader)
    at = torch.cat([batch["indices"] for batch in batches]).argsort()
    fields = ("images", "caption_ids", "mlm_ids", "mlm_labels")
    return {key: torch.cat([batch[key] for batch in batches])[at] for key in fields}


def test_an_epoch_finds_of_each_caption_what_the_model_says_and_masks_by_what_the_last_one_found(data):
    model, loader, kept = trained(data, 0)
    assert len(kept) == len(loader) == 6
    first = in_order(loader, 1)
    kept.begin_epoch()
    loader.set_epoch(1)
    seen = list(kept)
    assert (loader.similarities == START_SIMILARITY).all()
    ids = loader.dataset.caption_ids
    expected = model.word_similarities(first["images"], ids)
    assert off(kept.found, expected) < 1e-5
    assert torch.equal(torch.cat([batch["caption_ids"] for batch in seen]).sum(), first["caption_ids"].sum())
    kept.begin_epoch()
    assert torch.equal(loader.similarities, kept.found)
    second = in_order(loader, 2)
    assert (ids == torch.where(second["mlm_labels"] != 0, second["mlm_labels"], second["mlm_ids"])).all()
    assert torch.equal(second["caption_ids"], second["mlm_ids"])
    loader.similarities = torch.full_like(loader.similarities, START_SIMILARITY)
    assert not torch.equal(in_order(loader, 2)["mlm_ids"], second["mlm_ids"])


def test_a_batch_is_gone_before_the_next_one_is_made(data):
    _, loader, kept = trained(data, 0)
    loader.set_epoch(1)
    gone = []

    def watched():
        for batch in loader:
            alive = weakref.ref(batch)
            yield batch
            del batch
            gone.append(alive() is None)

    kept.loader = watched()
    for batch in kept:
        del batch
    assert gone == [True] * 6


def test_what_the_image_shows_is_kept_and_what_it_does_not_show_is_masked(data):
    _, loader, _ = trained(data, 0)
    shown = torch.rand(loader.similarities.shape, generator=torch.Generator().manual_seed(0)) < 0.85
    loader.similarities = shown.float()
    masked = torch.zeros(2)
    for epoch in range(1, 9):
        labels = in_order(loader, epoch)["mlm_labels"]
        of_words = (loader.dataset.caption_ids > 0) & (loader.dataset.caption_ids < MASK)
        masked += torch.stack([(labels[of_words & which] != 0).float().mean() for which in (shown, ~shown)])
    assert masked[1] > 20 * masked[0]


@pytest.mark.parametrize("more", [("--batch_size", "5"), ("--num_workers", "2"), ("--micro_batch", "3")])
def test_masks_are_a_function_of_seed_epoch_sample_and_what_was_found(more, data):
    _, loader, kept = trained(data, 1)
    _, other, of_other = trained(data, 1, *more)
    assert off(of_other.found, kept.found) < 1e-5
    for one in (loader, other):
        one.similarities = kept.found.clone()
    found, expected = in_order(other, 2), in_order(loader, 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other.close()
    assert not torch.equal(in_order(loader, 3)["mlm_ids"], expected["mlm_ids"])


def test_shares_of_masks_are_those_asked_for(data):
    never = ("--masked_token_rate", "0", "--masked_token_unchanged_rate", "1", "--clean_captions")
    _, loader, _ = trained(data, 0, *never, loss_names="sdm+mlm")
    batch = in_order(loader, 1)
    ids = loader.dataset.caption_ids
    assert torch.equal(batch["caption_ids"], ids)
    assert (batch["mlm_ids"] != ids).sum() <= 3  # a caption without a masked word has its first one masked


def test_without_it_a_batch_is_what_it_was_and_nothing_is_kept(data):
    loader, *_ = build_dataloader(get_args(words(data, data)))
    assert loader.similarities is None and "indices" not in next(iter(loader))


# ---- a run ----


def test_a_run_goes_on_within_an_epoch_bit_for_bit_and_evaluation_knows_nothing_of_it(
    data, tmp_path, test_script
):
    """Also from after its last batch, when none of the epoch is left."""
    argv = [*words(data, tmp_path / "a", *OPTIONS, epochs=3), "--log_period", "1"]
    assert run(argv, tmp_path / "output") == 0
    whole = only_run(tmp_path / "a")
    state = torch.load(whole / "last.pth", weights_only=True)
    before, found = state["word_similarities"]
    assert not torch.equal(before, found) and (before != START_SIMILARITY).all()
    assert "word_similarities" not in torch.load(whole / "best.pth", weights_only=True)
    argv += ["--output_dir", tmp_path / "b"]
    assert run(argv, tmp_path / "output", ("Epoch[2] Iteration[2/6]", signal.SIGTERM)) == 3
    stopped = only_run(tmp_path / "b")
    resume = ["--resume", "--resume_ckpt_file", stopped]
    assert run(resume, tmp_path / "more", ("Epoch[2] Iteration[6/6]", signal.SIGTERM)) == 3
    assert torch.load(stopped / "last.pth", weights_only=True)["samples"] == 48
    assert run(resume, tmp_path / "more") == 0
    assert differ(stopped / "last.pth", whole / "last.pth") == []
    assert test_script.main(["--config_file", str(whole), "--device", "cpu"]) == 0


def test_a_run_can_begin_it_within_an_epoch(data, tmp_path):
    argv = [*words(data, tmp_path, epochs=2), "--log_period", "1"]
    assert run(argv, tmp_path / "output", ("Epoch[1] Iteration[3/6]", signal.SIGTERM)) == 3
    resume = ["--resume", "--resume_ckpt_file", only_run(tmp_path)]
    assert run([*resume, "--mask_by_similarity"], tmp_path / "more") == 0
    before, found = torch.load(only_run(tmp_path) / "last.pth", weights_only=True)["word_similarities"]
    unknown = (before == START_SIMILARITY).all(dim=1)
    assert unknown.sum() == 24 and (found != START_SIMILARITY).all()


def test_two_processes_find_and_train_what_one_does_in_parts_too(data):
    argv = words(data, data, *OPTIONS, "--batch_size", "10", epochs=2)  # 10, …, 8
    (alone,), two = (together(n, processes.train_some, argv, 2) for n in (1, 2))
    in_parts = together(2, processes.train_some, [*argv, "--micro_batch", "3"], 2)
    assert (alone["similarities"] != START_SIMILARITY).all()
    for found in (*two, *in_parts):
        assert off(found["similarities"], alone["similarities"]) < 1e-4
        for name, value in alone["weights"].items():
            assert (found["weights"][name] - value).abs().max() < 1e-5, name


# ---- bad input ----


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (
            "--mask_by_similarity --pretrain_choice RN50 --loss_names sdm",
            "--mask_by_similarity needs image tokens",
        ),
        ("--mask_by_similarity --text_aug", "--text_aug changes the words"),
        ("--mask_by_similarity --text_drop 0.1", "--text_drop changes the words"),
        ("--mask_by_similarity --back_translation 0.1", "--back_translation changes the words"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(typed, named, capsys):
    refused_in_one_sentence(typed, named, capsys)
