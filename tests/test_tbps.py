"""TBPS-CLIP (arXiv 2308.10045), held against figures of its published code (tests/reference/methods;
github.com/Flame-Chasers/TBPS-CLIP at ba090bc), and the temperature that is learnt."""

import functools
import inspect
import itertools
import json
import math
import random
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import augmentations, build_dataloader
from datasets.augmentations import six_transforms, strong_view, two_of_six
from datasets.image_text import finish
from datasets.sampler import mixed
from datasets.tokenizer import SimpleTokenizer, drop_words, plain_caption, tokenize
from datasets.transforms import STD, normalise, resize
from model import build_model, objectives
from model.build import build_trained_model
from retrieval.encoders import open_run
from retrieval.page import Page
from retrieval.relevance import words_of
from solver import build_lr_scheduler, build_optimizer
from tests import processes
from tests.children import differ, draw, only_run, rewritten, words
from tests.children import run as run_of
from tests.conftest import ROOT, load_script
from tests.processes import together
from tests.recipe import bytes8, figures, fill, off, pixels, refused_in_one_sentence, tiny_args
from tests.test_exactness import batch_of
from tests.test_methods import assert_gradient
from tests.tiny_run import missing
from utils.batch import Batch
from utils.errors import InputError
from utils.losses import LOSSES, is_loss, total_loss
from utils.options import get_args, get_test_args, parser_of, tool_args
from utils.tool_options import export_args

TBPS, TEXT, SCHEDULE = (figures(f"methods/tbps_{name}") for name in ("losses", "text", "schedule"))
AUGMENT, CPU = figures("methods/tbps_augment"), torch.device("cpu")
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


OURS = {"image": "image_features", "text": "text_features", "aug1": "view_features"}


def with_heads(model):
    """With the figures' weights in its heads."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("simclr_mlp", "classifier")):
                parameter.copy_(fill(name, parameter.shape))
    return model


def wide(names):
    """The options of a tiny model whose features have the figures' width, where heads need it."""
    sizes = "embed_dim=512 vision_width=64 vision_layers=1 transformer_width=64 transformer_layers=1".split()
    heads = "simclr" in names or "id" in names
    return {"pretrain_choice": "random", "clip_architecture": sizes} if heads else {}


def learnt(loss_names, **options):
    return build_model(tiny_args(loss_names, learn_temperature=True, **options), 37)


@pytest.mark.parametrize(
    ("names", "case"),
    [
        ("nitc", "nitc only"),
        ("nitc", "nitc only, half soft"),
        ("nitc+ritc", "simplified: nitc + ritc"),
        ("nitc", "nitc with two views"),
        ("nitc+citc", "nitc + citc"),
        ("nitc+simclr", "nitc + ss"),
        ("nitc+id", "nitc + id"),
        ("nitc+ritc+citc+simclr", "all as published (nitc, two views, ritc, citc, ss)"),
    ],
)
def test_losses_and_their_gradients_are_the_published_ones(names, case):
    """Weighted as published without a word, and with the gradient of the temperature's parameter."""
    case = CASES[case]
    model = with_heads(learnt(names, soft_label=case["alpha"], temperature=1 / SCALE, **wide(names)))
    image, text = features()
    found = {"image": image, "text": text}
    if case["experiment"]["mvs_image"]:
        found["aug1"] = (image + 0.3 * pixels(113, (12, 512))).detach().requires_grad_()
    if case["experiment"]["ss"]:
        for n in (1, 2):
            view = image + 0.5 * pixels(113 + n, (12, 512))
            found[f"aug_ss_{n}"] = view.detach().requires_grad_()
    given = {OURS[name]: value for name, value in found.items() if name in OURS}
    if case["experiment"]["ss"]:
        strong = torch.stack([found["aug_ss_1"], found["aug_ss_2"]], dim=1)
        given["strong_views"] = model.simclr_mlp(strong)
    report = model.compare(given, {"pids": PIDS})
    returned = {name.replace("ss_loss", "simclr_loss"): value for name, value in case["returned"].items()}
    assert returned.keys() == {name for name in report if is_loss(name)}
    for name, value in returned.items():
        assert report[name].item() == pytest.approx(value, rel=1e-5), name
    assert report["temperature"].item() == pytest.approx(1 / SCALE, rel=1e-6)
    total = total_loss(report)
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    assert model.logit_scale_log.grad.item() == pytest.approx(case["logit_scale_grad"], rel=1e-5)
    for name, expected in case["grad"].items():
        assert_gradient(found[name].grad, expected, 3e-5, 3e-5)
    parameters = dict(model.named_parameters())
    for name, expected in case["head_grad"].items():
        assert_gradient(parameters[name].grad, expected, 3e-5, 3e-5)


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
    assert model.compare(found, {"pids": PIDS})["tse_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


# ---- the temperature that is learnt ----


def test_losses_that_are_said_to_have_a_temperature_are_those_that_ask_for_it():
    scaled = {name for name, row in LOSSES.items() if row.scaled}
    functions = {name: getattr(objectives, f"compute_{name}") for name in LOSSES}
    assert scaled == {name for name, f in functions.items() if "logit_scale" in objectives.needs(f)[0]}


def test_without_the_switch_there_is_a_number_and_no_parameter():
    model = build_model(tiny_args("sdm"), 37)
    assert model.logit_scale == 1 / 0.02 and not [n for n in model.state_dict() if "scale" in n]


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.scaled])
def test_a_learnt_temperature_gives_the_losses_of_the_same_fixed_one(name):
    report = learnt(name)(batch_of(0))
    expected = build_model(tiny_args(name), 37)(batch_of(0))
    for key, value in expected.items():
        assert report[key].item() == pytest.approx(value.item(), rel=1e-5), key


def test_above_100_the_scale_stays_and_its_gradient_passes():
    model = learnt("sdm")
    for log in (4.0, 4.7, 5.5):
        with torch.no_grad():
            model.logit_scale_log.fill_(log)
        model.logit_scale_log.grad = None
        model.logit_scale.backward()
        assert model.logit_scale.item() == pytest.approx(min(math.exp(log), 100), rel=1e-6)
        assert model.logit_scale_log.grad.item() == pytest.approx(math.exp(log), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_it_has_the_base_rate_without_decay(optimizer):
    args = tiny_args("sdm", learn_temperature=True, optimizer=optimizer)
    model = build_model(args, 37)
    (group,) = [
        group
        for group in build_optimizer(args, model).param_groups
        if any(p is model.logit_scale_log for p in group["params"])
    ]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (args.lr, 0, 1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_it_is_learnt_in_fp32(precision):
    args = tiny_args("sdm", learn_temperature=True, precision=precision, lr=1e-2)
    model = build_model(args, 37)
    optimizer, before = build_optimizer(args, model), model.logit_scale_log.item()
    assert model.logit_scale_log.dtype == torch.float32
    total_loss(model(batch_of(0))).backward()
    optimizer.step()
    assert 0 < abs(model.logit_scale_log.item() - before) < 0.02


def test_two_processes_learn_what_one_does_in_parts_too(data):
    options = ("--learn_temperature", "--second_view", "--batch_size", "10")
    argv = words(data, data, *options, loss_names="nitc+ritc+citc+simclr")
    (alone,), two = (together(n, processes.train_some, argv, 2) for n in (1, 2))
    in_parts = together(2, processes.train_some, [*argv, "--micro_batch", "3"], 2)
    assert abs(alone["weights"]["logit_scale_log"] - alone["start"]["logit_scale_log"]) > 1e-3
    for found in (*two, *in_parts):
        for name, value in alone["weights"].items():
            assert (found["weights"][name] - value).abs().max() < 1e-5, name
        for report, expected in zip(found["reports"], alone["reports"], strict=True):
            assert report["temperature"] == pytest.approx(expected["temperature"], rel=1e-5)


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


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(folder of a training of two epochs, what nitc was told of them)."""
    logs = tmp_path_factory.mktemp("logs")
    argv = words(data, logs, "--learn_temperature", "--text_drop", "0.1", loss_names="nitc+ritc", epochs=2)
    seen = trained(argv)
    return only_run(logs), seen


def test_a_loss_is_told_how_far_the_training_is(run):
    assert run[1] == pytest.approx([step / 6 for step in range(12)])


@missing("sklearn", "scikit-learn", "requirements-methods.txt")
def test_a_division_is_told_which_epoch_begins_so_that_a_resumed_one_is_the_same(data, tmp_path):
    seen = trained(words(data, tmp_path, "--division", loss_names="nitc", epochs=2))
    divided = [*6 * [0.0], *6 * [1.0]]
    assert seen[:6] + seen[12:18] == divided
    assert seen[6:12] + seen[18:] == pytest.approx([step / 6 for step in range(12)])


def test_a_run_is_tested_and_exported_with_the_temperature_that_it_learnt(run, tmp_path, test_script):
    import export

    folder, _ = run
    state = torch.load(folder / "best.pth", weights_only=True)["model"]
    scale = float(state["logit_scale_log"].exp())
    assert abs(scale - 50) > 0.01
    assert test_script.main(["--config_file", str(folder), "--device", "cpu"]) == 0
    args = get_test_args(["--config_file", str(folder), "--device", "cpu"])
    trained = build_trained_model(args, state, "best.pth")
    assert trained.logit_scale.item() == pytest.approx(scale, rel=1e-6)
    assert export.main([str(folder), "--format", "safetensors", "--output", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "irra.json").read_text())
    assert settings["temperature"] == pytest.approx(1 / scale, rel=1e-6)
    assert f"temperature {1 / scale:.4g}." in (tmp_path / "out" / "README.md").read_text()
    assert export_args([str(folder), "--format", "safetensors"]).temperature == 0.02  # where it began


@pytest.mark.parametrize("more", [["--learn_temperature"], []])
def test_a_run_does_not_go_on_with_another_kind_of_temperature(more, data, tmp_path, capsys):
    begin = [] if more else ["--learn_temperature"]
    assert load_script("train").main(words(data, tmp_path, *begin, loss_names="sdm", epochs=1)) == 0
    there = words(data, tmp_path, *more, loss_names="sdm", epochs=2)
    options = ROOT / "configs" / "irra.yaml"  # a run's own would say what it was
    resume = ["--config_file", str(options), "--resume", "--resume_ckpt_file", str(only_run(tmp_path))]
    assert load_script("train").main([*resume, *there]) == 2
    err = capsys.readouterr().err
    assert f"in which logit_scale_log is {'missing' if more else 'there'}" in err and err.count("error:") == 1


# ---- views of images ----


@functools.cache
def picture():
    """The figures' picture, 96x64."""
    coarse = np.kron(bytes8(190, (6, 4, 3)), np.ones((16, 16, 1), np.uint8)).astype(int)
    return Image.fromarray(((3 * coarse + bytes8(500190, (96, 64, 3))) // 4).astype(np.uint8))


def assert_published_pixels(pixels, expected):
    """pixels: [3, H, W], in [0, 1]. The published code normalises by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = ((pixels - mean) / std).double()
    assert list(found.shape) == expected["shape"]
    assert float(found.sum()) == pytest.approx(expected["sum"], abs=1e-5 * float(found.abs().sum()))
    assert float(found.norm()) == pytest.approx(expected["l2"], rel=1e-5)
    assert off(found.flatten()[:4], expected["first4"]) < 1e-5


@pytest.mark.parametrize("row", AUGMENT["rows"], ids=lambda row: row["seed"])
def test_a_strong_view_is_the_published_one(row):
    before = torch.get_rng_state()
    found = strong_view(picture(), AUGMENT["size"], row["seed"])
    assert_published_pixels(found / 255, row["self_supervised"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("row", AUGMENT["rows"], ids=lambda row: row["seed"])
def test_two_of_six_augmentations_are_the_published_ones(row, monkeypatch):
    pixels, before = resize(picture(), AUGMENT["size"]), torch.get_rng_state()
    assert_published_pixels(two_of_six(pixels, row["seed"]), row["choose"])
    assert torch.equal(torch.get_rng_state(), before)
    assert names_of_drawn(monkeypatch, [row["seed"]]) == row["picked"]


def names_of_drawn(monkeypatch, seeds):
    drawn, names = [], [type(one).__name__ for one in six_transforms((8, 8))]
    six = [lambda pixels, name=name: drawn.append(name) or pixels for name in names]
    monkeypatch.setattr(augmentations, "six_transforms", lambda size: six)
    for seed in seeds:
        two_of_six(torch.zeros(3, 8, 8, dtype=torch.uint8), seed)
    return drawn


def test_two_are_drawn_with_replacement_as_often_as_published(monkeypatch):
    published = AUGMENT["two_of_six_with_replacement"]
    assert published["draws"] == 4000
    drawn = names_of_drawn(monkeypatch, [mixed(1, 1, number, 0) for number in range(4000)])
    twice = sum(one == other for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert abs(twice - published["same_twice"]) < 5 * math.sqrt(4000 * 5 / 36 + 1)
    for counts in (Counter(drawn), published["picked"]):
        assert counts.keys() == published["picked"].keys()
        assert all(abs(counts[name] - 4000 / 3) < 5 * math.sqrt(4000 / 3) for name in counts)


def test_images_of_a_batch_are_two_of_six_to_the_byte(data):
    typed = words(data, data, "--division", "--two_of_six", "--second_view", loss_names="nitc")
    typed.remove("--img_aug")
    loader, *_ = build_dataloader(get_args(typed))
    loader.set_epoch(2)
    batch, dataset = next(iter(loader)), loader.dataset
    for row, index in enumerate(batch["indices"].tolist()):
        pixels = dataset.images.source[dataset.samples[index].image_path]
        for name, stream in (("images", 0), ("second_images", 6)):
            expected = normalise(two_of_six(pixels, mixed(dataset.seed, 2, index, stream)) * 255)
            assert (batch[name][row] - expected).abs().max() < 0.51 / 255 / min(STD)


def epoch_of(data, number, *more, loss_names="sdm"):
    """({name: (N, …)} of what an epoch draws, in the order of the samples, and the data set)."""
    loader, *_ = build_dataloader(get_args(words(data, data, "--division", *more, loss_names=loss_names)))
    loader.set_epoch(number)
    batches = list(loader)
    loader.close()
    at = torch.cat([batch["indices"] for batch in batches]).argsort()
    names = {"images", "caption_ids", "second_images", "strong_images"} & batches[0].keys()
    return {name: torch.cat([batch[name] for batch in batches])[at] for name in names}, loader.dataset


def views_of(data, number, *more):
    return epoch_of(data, number, "--second_view", *more, loss_names="nitc+simclr")


def test_views_are_a_function_of_seed_epoch_and_sample(data):
    first, _ = views_of(data, 1)
    for more in (("--batch_size", "5"), ("--num_workers", "2")):
        found, _ = views_of(data, 1, *more)
        assert all(torch.equal(found[name], first[name]) for name in first)
    other, _ = views_of(data, 2)
    assert not any(torch.equal(other[name], first[name]) for name in first)


def test_a_second_view_is_of_the_same_images_drawn_anew_and_the_rest_of_the_batch_stays(data):
    plain, _ = epoch_of(data, 1, loss_names="nitc")
    both, dataset = epoch_of(data, 1, "--second_view", loss_names="nitc")
    assert both.keys() - plain.keys() == {"second_images"}
    assert all(torch.equal(both[name], plain[name]) for name in plain)
    differ = (both["images"] != both["second_images"]).flatten(1).any(1)
    assert differ.float().mean() > 0.9
    image, seed = dataset.images.source[dataset.samples[7].image_path], mixed(dataset.seed, 1, 7, 6)
    box = dataset.augmented(image, seed, out := torch.empty_like(image))
    assert torch.equal(both["second_images"][7], finish(out[None], CPU, torch.tensor([box]))[0])


def test_strong_views_are_two_of_each_image(data):
    found, dataset = views_of(data, 3)
    pixels = dataset.images.source[dataset.samples[5].image_path].permute(1, 2, 0).numpy()
    seeds = [mixed(dataset.seed, 3, 5, stream) for stream in (7, 8)]
    expected = torch.stack([strong_view(Image.fromarray(pixels), (64, 32), seed) for seed in seeds])
    assert found["strong_images"].shape == (48, 2, 3, 64, 32)
    assert torch.equal(found["strong_images"][5], finish(expected, CPU))


def test_nt_xent_equals_plain_loops():
    views, expected = pixels(31, (4, 2, 6)).double(), 0.0
    for i, a in itertools.product(range(4), range(2)):
        near = {
            (j, b): math.exp(float(torch.cosine_similarity(views[i, a], views[j, b], dim=0)) / 0.1)
            for j, b in itertools.product(range(4), range(2))
            if (j, b) != (i, a)
        }
        expected -= math.log(near[i, 1 - a] / sum(near.values())) / 8
    assert float(objectives.compute_simclr(views)) == pytest.approx(expected, rel=1e-6)


def test_second_embeddings_and_the_division_have_no_second_view():
    """Else the loss of selected tokens would be half that of the global feature of the view."""
    model = build_model(tiny_args("nitc", token_selection=True), 37).eval()
    batch = {**batch_of(0), "indices": torch.arange(4)}
    seen = {**batch, "second_images": batch["images"].flip(3)}
    with torch.no_grad():
        plain, both = model(batch), model(seen)
        assert both["nitc_loss"] != plain["nitc_loss"] and both["tse_loss"] == plain["tse_loss"]
        each = [model.losses_of_samples(Batch.of(b).planned())[1] for b in (batch, seen)]
    assert torch.equal(*each)


# ---- captions ----


@pytest.mark.parametrize("most", [77, 5])
@pytest.mark.parametrize("row", TEXT["pre_caption"], ids=lambda row: row["text"][:12].strip())
def test_captions_are_cleaned_as_published(row, most):
    assert plain_caption(row["text"], most) == row[f"out{most}"]
    assert plain_caption(row[f"out{most}"]) == row[f"out{most}"]


@pytest.mark.parametrize("caption", ["", "...", "\n", '."!()*#:;~'])
def test_a_caption_of_nothing_else_is_empty_and_has_the_ids_of_an_empty_one(caption):
    """Published: the next step raises TypeError."""
    assert plain_caption(caption) == drop_words(plain_caption(caption), 1.0, random.Random(0)) == ""
    assert SimpleTokenizer(plain=True).encode(caption) == []


MARKED = 'The "tall" (young) man: {}; 50% grey-blue coat!! * # ~ And the lady\'s bag, too...'


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A drawn data set whose captions, of every kind, are full of punctuation."""
    root = rewritten(draw(tmp_path_factory.mktemp("marked")))
    path = root / "CUHK-PEDES" / "reid_raw.json"
    records = json.loads(path.read_text())
    for record in records:
        captions = [MARKED.format(caption) for caption in record["captions"]]
        record.update(captions=captions, captions_bt=[f"(Again.) {caption}" for caption in captions])
        if record["split"] == "train":
            record["diversity_captions"] = [f"Once more: {caption}" for caption in captions]
    path.write_text(json.dumps(records))
    return root


def by_hand(caption):
    """The published rule, mark by mark."""
    for mark in '. ! " ( ) * # : ; ~'.split():
        caption = caption.replace(mark, " ")
    return " ".join(caption.lower().split())


def test_every_caption_of_a_run_is_read_without_punctuation(marked):
    options = words(marked, marked, "--plain_captions", "--second_caption", loss_names="sdm")
    loader, _, captions, _ = build_dataloader(get_args(options))
    dataset, tokenizer = loader.dataset, SimpleTokenizer()

    def expected(sentences):
        return torch.stack([tokenize(by_hand(sentence), tokenizer, 48) for sentence in sentences])

    assert torch.equal(dataset.caption_ids, expected([sample.caption for sample in dataset.samples]))
    assert torch.equal(captions.dataset.caption_ids, expected(captions.dataset.captions))
    seconds = dataset.drawn_second([(1, index) for index in range(48)])["second_caption_ids"]
    assert torch.equal(seconds, expected(dataset.second_captions))


def test_punctuation_goes_before_words_are_left_out_and_from_back_translations_too(marked):
    options = ("--plain_captions", "--back_translation", "1", "--text_drop", "0.3")
    dataset = build_dataloader(get_args(words(marked, marked, *options)))[0].dataset
    for index, translation in enumerate(dataset.back_translations):
        whole = " ".join(by_hand(translation).split()[:48])  # of which text_length would cut the rest
        rng = random.Random(mixed(dataset.seed, 2, index, 3))
        assert dataset.drawn_caption(2, index) == drop_words(whole, 0.3, rng)
        assert whole.startswith("again the tall young man")


def test_without_the_switch_captions_are_read_as_they_are(marked):
    dataset = build_dataloader(get_args(words(marked, marked)))[0].dataset
    tokenizer = SimpleTokenizer()
    for ids, sample in zip(dataset.caption_ids, dataset.samples, strict=True):
        assert torch.equal(ids, tokenize(sample.caption, tokenizer, 48))
        assert not torch.equal(ids, tokenize(by_hand(sample.caption), tokenizer, 48))


@pytest.fixture(scope="module")
def reading(marked, tmp_path_factory):
    """(folder of a run that reads captions without punctuation, folder of pictures)."""
    logs = tmp_path_factory.mktemp("logs")
    argv = words(marked, logs, "--plain_captions", loss_names="sdm", epochs=1)
    assert load_script("train").main(argv) == 0
    return only_run(logs), marked / "CUHK-PEDES" / "imgs"


def test_a_run_is_tested_as_it_was_trained_and_says_so(reading, test_script):
    folder, _ = reading
    line = 'captions are read without . ! " ( ) * # : ; ~'
    assert test_script.main(["--config_file", str(folder), "--device", "cpu"]) == 0
    logs = [(folder / f"{name}_log.txt").read_text() for name in ("train", "test")]
    assert all(line in log for log in logs)
    args = get_test_args(["--config_file", str(folder), "--device", "cpu"])
    _, captions, _ = build_dataloader(args)
    tokenizer = SimpleTokenizer()
    for ids, caption in zip(captions.dataset.caption_ids, captions.dataset.captions, strict=True):
        assert torch.equal(ids, tokenize(by_hand(caption), tokenizer, 48))


def test_a_run_whose_options_do_not_say_how_it_reads_is_not_tested(reading, tmp_path, test_script, capsys):
    folder, _ = reading
    text = (folder / "configs.yaml").read_text()
    assert "plain_captions: true" in text
    (tmp_path / "configs.yaml").write_text(text.replace("plain_captions: true", "plain_captions: maybe"))
    assert test_script.main(["--config_file", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert 'plain_captions: "maybe"' in error and error.count("\n") == 1


def test_sentences_that_are_typed_are_read_as_the_run_was_trained(reading):
    encoders = open_run(tool_args(parser_of("search"), ["--config_file", str(reading[0]), "--device", "cpu"]))
    typed, read = MARKED.format("a red coat."), by_hand(MARKED.format("a red coat."))
    assert np.array_equal(*(encoders.text_features([sentence]) for sentence in (typed, read)))
    assert encoders.tokenizer.encode(typed) == SimpleTokenizer().encode(read)
    shown = words_of(typed, encoders.tokenizer, encoders.text_length)
    assert shown == words_of(read, SimpleTokenizer(), encoders.text_length)
    assert [word for word, _ in shown][:5] == ["the", "tall", "young", "man", "a"]


@pytest.mark.parametrize("program", ["search", "visualize", "page"])
def test_a_sentence_of_punctuation_alone_is_one_sentence(program, reading, capsys):
    folder, pictures = reading
    run = ["--config_file", str(folder), "--device", "cpu"]
    if program == "page":
        encoders = open_run(tool_args(parser_of("demo"), run))
        with pytest.raises(InputError, match="the sentence is empty but for punctuation"):
            Page(encoders, None, 3, 3).search("...!", None)
        return
    asked = {
        "search": ["--gallery", str(pictures), "--query", "...!"],
        "visualize": ["--words", "(*)", "--image", str(next(pictures.rglob("*.jpg")))],
    }
    assert load_script(program).main([*run, *asked[program]]) == 2
    error = capsys.readouterr().err
    assert "is empty but for punctuation, which this run does not read" in error and error.count("\n") == 1
    assert not (folder / "search").exists()


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


def captions_of(data, number, *more):
    """An epoch's caption ids in the order of the samples, as they are before masking."""
    return epoch_of(data, number, "--clean_captions", *more)[0]["caption_ids"]


def test_what_is_left_out_is_a_function_of_seed_epoch_and_sample(data):
    plain, first = captions_of(data, 1), captions_of(data, 1, "--text_drop", "0.3")
    assert torch.equal(first, captions_of(data, 1, "--text_drop", "0.3", "--batch_size", "5"))
    assert not torch.equal(first, captions_of(data, 2, "--text_drop", "0.3"))
    lengths, before = ((ids != 0).sum(1) for ids in (first, plain))
    assert (lengths <= before).all() and 0.5 < (lengths.sum() / before.sum()) < 0.9
    for ids, whole in zip(first.tolist(), plain.tolist(), strict=True):
        rest = iter(whole)
        assert all(token in rest for token in ids if token)  # what is left, in its order


# ---- back-translation ----


@pytest.fixture(scope="module")
def translated(tmp_path_factory):
    """A drawn data set whose training records have captions_bt."""
    root = draw(tmp_path_factory.mktemp("translated"))
    path = root / "CUHK-PEDES" / "reid_raw.json"
    records = json.loads(path.read_text())
    for record in records:
        if record["split"] == "train":
            record["captions_bt"] = [f"Back again: {caption}" for caption in record["captions"]]
    path.write_text(json.dumps(records))
    return root


def test_captions_are_exchanged_for_their_back_translations_as_often_as_asked(translated):
    loader, *_ = build_dataloader(get_args(words(translated, translated, "--back_translation", "0.1")))
    dataset, drawn = loader.dataset, Counter()
    for epoch, index in itertools.product(range(1, 101), range(48)):
        caption = dataset.samples[index].caption
        drawn[dataset.drawn_caption(epoch, index).removeprefix("Back again: ") == caption, index] += 1
        drawn[dataset.drawn_caption(epoch, index) != caption] += 1
    assert all(same for same, *_ in (key for key in drawn if isinstance(key, tuple)))
    assert abs(drawn[True] - 480) < 5 * math.sqrt(480)


def test_a_batch_has_what_was_drawn_a_function_of_seed_epoch_and_sample(translated):
    options = ("--back_translation", "0.5", "--text_drop", "0.2")
    first = captions_of(translated, 1, *options)
    assert torch.equal(first, captions_of(translated, 1, *options, "--batch_size", "5", "--num_workers", "2"))
    assert not torch.equal(first, captions_of(translated, 2, *options))
    dataset = build_dataloader(get_args(words(translated, translated, *options)))[0].dataset
    tokenizer = SimpleTokenizer()
    expected = [tokenize(dataset.drawn_caption(1, index), tokenizer, 48) for index in range(48)]
    assert torch.equal(first, torch.stack(expected))
    alone = captions_of(translated, 1, "--text_drop", "0.2")
    same = (first == alone).all(1).float().mean()
    assert 0.2 < same < 0.8


WRONG = {
    "no key": (lambda record: record.pop("captions_bt"), 'has no key "captions_bt"'),
    "too few": (lambda record: record["captions_bt"].pop(), "so 2, not 1"),
    "no list": (lambda record: record.update(captions_bt="a man"), "not a str"),
    "no text": (lambda record: record.update(captions_bt=["a man", None]), "must be a text, not None"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_record_without_its_back_translation_is_one_sentence_with_its_place(kind, translated, tmp_path):
    change, said = WRONG[kind]
    folder = translated / "CUHK-PEDES"
    records = json.loads((folder / "reid_raw.json").read_text())
    number = next(n for n, record in enumerate(records) if record["split"] == "train")
    change(records[number])
    (tmp_path / "set.json").write_text(json.dumps(records))
    typed = words(
        translated, tmp_path, "--annotations", str(tmp_path / "set.json"), "--images", str(folder / "imgs")
    )
    build_dataloader(get_args(typed))  # nobody asks for it
    with pytest.raises(InputError) as error:
        build_dataloader(get_args([*typed, "--back_translation", "0.1"]))
    text = str(error.value)
    assert f"set.json, record {number}" in text and said in text and "\n" not in text


def test_a_caption_that_is_exchanged_takes_its_back_translation_along(translated):
    options = ("--back_translation", "1", "--noisy_rate", "0.5")
    dataset = build_dataloader(get_args(words(translated, translated, *options)))[0].dataset
    for sample, other in zip(dataset.samples, dataset.back_translations, strict=True):
        assert other == f"Back again: {sample.caption}"


# ---- the recipe ----


@pytest.mark.parametrize("case", SCHEDULE["cases"], ids=lambda case: case["iterations_per_epoch"])
def test_rates_of_the_steps_are_the_published_ones(case):
    """The published warm-up ends with its last step, ours a step later, before the first one after it."""
    warm, steps = case["warmup_epochs"], case["iterations_per_epoch"]
    args = get_args(["--config_file", str(ROOT / "configs" / "tbps_clip.yaml")])
    asked = {"lr": args.lr, "lr_start": args.lr * args.warmup_factor, "lr_end": args.target_lr}
    assert asked == pytest.approx(SCHEDULE["settings"])
    vars(args).update(num_epoch=case["epochs"], warmup_epochs=warm)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule = build_lr_scheduler(args, optimizer)
    optimizer.step()  # else PyTorch warns
    for step, expected in enumerate(case["lr"]):
        epoch, place = divmod(step, steps)
        if epoch and not place:
            schedule.step()
        schedule.within_epoch(place / steps)
        lr = optimizer.param_groups[0]["lr"]
        if step >= warm * steps:
            assert lr == pytest.approx(expected, rel=1e-6), step
        else:
            assert -1e-15 <= expected - lr <= 1e-4 / (warm * steps), step


def test_the_recipe_trains(translated, tmp_path):
    """From random weights of a tiny model; the published ones are not here."""
    recipe = ["--config_file", str(ROOT / "configs" / "tbps_clip.yaml"), "--back_translation", "0.1"]
    losses = "nitc+ritc+citc+simclr"
    tiny = words(translated, tmp_path, "--batch_size", "24", "--lr", "1e-4", loss_names=losses, epochs=1)
    tiny.remove("--img_aug")
    args = get_args([*recipe, *tiny])
    assert (
        args.plain_captions
        and args.learn_temperature
        and (args.soft_label, args.text_drop, args.lr_per) == (0.5, 0.05, "step")
    )
    assert get_args(recipe).loss_names == losses and args.second_view and args.two_of_six
    assert load_script("train").main([*recipe, *tiny]) == 0
    state = torch.load(only_run(tmp_path) / "last.pth", weights_only=True)
    assert state["epoch"] == 1 and off(state["model"]["logit_scale_log"], math.log(100)) < 0.01
    assert {"simclr_mlp.0.weight", "simclr_mlp.2.bias"} <= state["model"].keys()
    line = next(
        text for text in (only_run(tmp_path) / "train_log.txt").read_text().splitlines() if "[2/2]" in text
    )
    assert all(f"{name}_loss: " in line for name in ("nitc", "ritc", "citc", "simclr"))


def test_a_run_with_views_goes_on_within_an_epoch_bit_for_bit(translated, tmp_path):
    options = ("--second_view", "--two_of_six", "--back_translation", "0.2", "--log_period", "1")
    argv = words(translated, tmp_path / "a", *options, loss_names="nitc+simclr", epochs=2)
    argv.remove("--img_aug")
    assert run_of(argv, tmp_path / "output") == 0
    argv[argv.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    assert run_of(argv, tmp_path / "output", ("Epoch[2] Iteration[2/6]", signal.SIGTERM)) == 3
    stopped = only_run(tmp_path / "b")
    assert run_of(["--resume", "--resume_ckpt_file", stopped], tmp_path / "more") == 0
    assert differ(stopped / "last.pth", only_run(tmp_path / "a") / "last.pth") == []


# ---- bad input ----


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--loss_names tal+id --learn_temperature", "add one of sdm, itc, asdm, nitc, ritc"),
        ("--loss_names sdm --learn_temperature --temperature 0.005", "--temperature 0.005"),
        ("--loss_names nitc --soft_label 1.5", "--soft_label"),
        ("--loss_names citc --citc_loss_weight -1", "--citc_loss_weight"),
        ("--text_drop 1.1", "--text_drop"),
        ("--two_of_six --img_aug", "choose one"),
        ("--back_translation 2", "--back_translation"),
        ("--second_view --loss_names sdm+simclr", "--second_view gives a second view"),
        ("--loss_names simclr", "trains no text"),
        ("--loss_names nitc+simclr --simclr_loss_weight -1", "--simclr_loss_weight"),
        ("--loss_names citc --division", "--division"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(typed, named, capsys):
    refused_in_one_sentence(typed, named, capsys)
