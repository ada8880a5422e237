"""RDA's second, rewritten caption (ICL, CVPR 2025): losses held against figures of the published code
(github.com/QinYang79/ICL at 55d7da6), what is drawn, and what is said about files that cannot serve."""

import itertools
import json
import math
import signal
from collections import Counter
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import EOT, MASK, SOT, SimpleTokenizer, tokenize
from tests import processes
from tests.children import differ, draw, only_run, rewritten, run, words
from tests.processes import together
from tests.recipe import caption_ids, figures
from tests.test_methods import RDE, batch_of, rde
from tests.tiny_run import missing
from utils.batch import Batch
from utils.errors import InputError
from utils.losses import second_factor, total_loss
from utils.options import get_args

ICL = figures("methods/icl")
SECOND = ("--second_caption", "--token_selection")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return rewritten(draw(tmp_path_factory.mktemp("drawn")))


def loader_of(data, *more):
    return build_dataloader(get_args(words(data, data, *map(str, more), loss_names="tal")))[0]


# ---- losses ----


def batch_with_second(epoch=1):
    ids = caption_ids(ICL["caption_seed"], len(ICL["pids"]))
    assert torch.equal(ids, RDE["model_caption_ids"])
    batch = batch_of(ICL, ids=ids)
    batch["second_caption_ids"] = caption_ids(ICL["second_caption_seed"], len(ids))
    batch["second_factor"] = torch.full((len(ids),), second_factor(epoch))
    return {**batch, "label_hat": torch.tensor(ICL["label_hat"])}


@pytest.mark.parametrize("case", ICL["cases"], ids=lambda case: f"{case['mode']}-{case['epoch']}")
def test_losses_and_gradients_of_two_captions_are_the_published_ones(case):
    _, model = rde(norm=case["mode"], second_caption=True)
    report = model.train()(batch_with_second(case["epoch"]))
    ours = {"bge": "tal", "tse": "tse", "bge_aug": "second", "tse_aug": "tse_second"}
    losses = {name: report[f"{of}_loss"].item() for name, of in ours.items()}
    assert losses == {name: pytest.approx(case["losses"][f"{name}_loss"], rel=2e-5) for name in ours}
    total = total_loss(report)
    assert total.item() == pytest.approx(case["total"], rel=2e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        l2 = case["grads"][name]
        if l2 is None:
            assert parameter.grad is None, name
        elif l2 != "zero up to rounding":
            assert float(parameter.grad.double().norm()) == pytest.approx(l2, rel=2e-5), name


def test_the_factor_falls_by_three_hundredths_an_epoch_to_a_tenth():
    assert [second_factor(epoch) for epoch in (1, 2, 20, 29)] == pytest.approx([0.97, 0.94, 0.4, 0.13])
    assert [second_factor(epoch) for epoch in (30, 31, 60)] == pytest.approx([0.1] * 3)
    assert {case["epoch"]: case["factor"] for case in ICL["cases"]} == {
        epoch: pytest.approx(second_factor(epoch)) for epoch in (1, 20, 40)
    }


def test_every_loss_of_features_sees_the_second_caption_and_no_other_does():
    batch = batch_with_second(20)
    swapped = {**batch, "caption_ids": batch["second_caption_ids"]}
    del swapped["second_caption_ids"]
    for names, compared in (("sdm+id+itc", ("sdm", "itc")), ("trl+asdm", ("trl", "asdm"))):
        _, model = rde(names, second_caption=True)
        _, first_alone = rde(names)
        with torch.no_grad():
            report, of_second = model(batch), first_alone(swapped)
        expected = 0.4 * sum(of_second[f"{name}_loss"].item() for name in compared)
        assert report["second_loss"].item() == pytest.approx(expected, rel=1e-5)
        assert report["tse_second_loss"].item() == pytest.approx(0.4 * of_second["tse_loss"].item(), rel=1e-5)


def test_the_division_and_what_is_encoded_know_the_first_caption_alone():
    _, model = rde(second_caption=True)
    batch = Batch.of({**batch_with_second(), "indices": torch.arange(12)}).planned()
    model.eval()
    with torch.no_grad():
        _, losses = model.losses_of_samples(batch)
        _, of_first = model.losses_of_samples(replace(batch, second_caption_ids=None, second_factor=None))
    assert torch.equal(losses, of_first)
    _, plain = rde()
    assert list(model.state_dict()) == list(plain.state_dict())


# ---- what is drawn ----


def second_of(loader, epoch):
    """(ids, factors) of an epoch's second captions, in the order of the samples."""
    loader.set_epoch(epoch)
    batches = list(loader)
    at = torch.cat([batch["indices"] for batch in batches]).argsort()
    return [torch.cat([b[key] for b in batches])[at] for key in ("second_caption_ids", "second_factor")]


@pytest.mark.parametrize("by_path", [False, True])
def test_a_second_caption_is_one_sentence_of_each_group_in_any_order(data, by_path):
    folder, tokenizer = data / "CUHK-PEDES", SimpleTokenizer()
    path = ("--annotations", folder / "reid_raw.json", "--images", folder / "imgs") if by_path else ()
    ids, _ = second_of(loader_of(data, "--second_caption", "--division", *path), 1)
    records = json.loads((folder / "reid_raw.json").read_text())
    entries = [one for r in records if r["split"] == "train" for one in r["diversity_captions"]]
    orders = Counter()
    for row, entry in zip(ids, entries, strict=True):
        if isinstance(entry, str):
            possible = [entry]
        else:
            chosen = itertools.product(*entry)
            possible = [" ".join(order) for one in chosen for order in itertools.permutations(one)]
        found = [torch.equal(row, tokenize(text, tokenizer, 48)) for text in possible]
        assert any(found)
        orders[len(possible), found.index(True)] += 1
    assert len([key for key in orders if key[0] == 8]) > 4


def test_every_sentence_and_every_order_comes_as_often(data):
    dataset = loader_of(data, "--second_caption", "--text_length", "77").dataset
    drawn = dataset.drawn_second([(epoch, 0) for epoch in range(1, 1601)])["second_caption_ids"]
    counts = Counter(map(tuple, drawn.tolist())).values()
    assert len(counts) == 8 and all(abs(count - 200) < 5 * math.sqrt(200) for count in counts)


def test_second_captions_are_a_function_of_seed_epoch_and_sample(data):
    options = ("--second_caption", "--division")
    first, factors = second_of(loader_of(data, *options), 3)
    assert factors.tolist() == [pytest.approx(0.91)] * 48
    for others in (("--batch_size", 5), ("--num_workers", 2), ("--sampler", "random", "--clean_captions")):
        assert torch.equal(first, second_of(loader_of(data, *options, *others), 3)[0])
    assert not torch.equal(first, second_of(loader_of(data, *options), 4)[0])
    assert not torch.equal(first, second_of(loader_of(data, *options, "--seed", 2), 3)[0])


def test_text_augmentation_is_of_the_second_caption_too_and_leaves_its_sentences(data):
    options = ("--second_caption", "--division", "--clean_captions")
    plain, _ = second_of(loader_of(data, *options), 1)
    augmented, _ = second_of(loader_of(data, *options, "--text_aug"), 1)
    assert not (plain == MASK).any()
    eligible = int(((plain > 0) & (plain < MASK)).sum())
    assert 0.08 < int((augmented == MASK).sum()) / eligible < 0.16
    assert (augmented[:, 0] == SOT).all() and ((augmented == EOT).sum(1) == 1).all()
    kept = 0
    for before, after in zip(plain.tolist(), augmented.tolist(), strict=True):
        both = [[word for word in ids if 0 < word < MASK] for ids in (before, after)]
        kept += sum(size for *_, size in SequenceMatcher(None, *both, autojunk=False).get_matching_blocks())
    assert 0.76 < kept / eligible < 0.84


def test_what_a_batch_holds_besides_is_what_it_holds_without(data):
    for options in ((), ("--text_aug", "--noisy_rate", "0.5")):
        options = ("--division", *options)
        plain, both = (list(loader_of(data, *options, *more)) for more in ((), ("--second_caption",)))
        for batch, with_second in zip(plain, both, strict=True):
            assert set(with_second) - set(batch) == {"second_caption_ids", "second_factor"}
            assert all(torch.equal(batch[key], with_second[key]) for key in batch)


def test_a_caption_that_is_exchanged_takes_its_second_one_along(data, tmp_path):
    places = np.random.RandomState(0).permutation(48)
    np.save(tmp_path / "noise.npy", places)
    plain = loader_of(data, "--second_caption").dataset
    noisy = loader_of(data, "--second_caption", "--noisy_file", tmp_path / "noise.npy").dataset
    assert [sample.caption for sample in noisy.samples] == [plain.samples[n].caption for n in places]
    assert noisy.second_captions == [plain.second_captions[n] for n in places]
    assert {len(sample) for sample in noisy.samples} == {4}  # as published, for those who unpack them


# ---- files ----


def changed(data, folder, change):
    """The data set with its first training record changed; its file by path."""
    records = json.loads((data / "CUHK-PEDES" / "reid_raw.json").read_text())
    number = next(n for n, record in enumerate(records) if record["split"] == "train")
    change(records[number])
    root = folder / "data" / "CUHK-PEDES"
    root.mkdir(parents=True)
    (root / "imgs").symlink_to(data / "CUHK-PEDES" / "imgs")
    (root / "reid_raw.json").write_text(json.dumps(records))
    return folder / "data", number


def put(value):
    return lambda record: record.update(diversity_captions=value)


WRONG = {
    "no key": (lambda record: record.pop("diversity_captions"), 'has no key "diversity_captions"'),
    "no list": (put("a man"), "a list with an entry for each caption, so 2, not a str"),
    "too few": (put(["a man"]), "a list with an entry for each caption, so 2, not 1"),
    "too many": (put(["a", "b", "c"]), "a list with an entry for each caption, so 2, not 3"),
    "a number": (put(["a man", 7]), "must be a text, or a list of groups that are lists of texts"),
    "nothing": (put(["a man", None]), "not None"),
    "texts where groups belong": (put(["a man", ["in red", "tall"]]), "not ['in red', 'tall']"),
    "no group": (put(["a man", []]), "not []"),
    "an empty group": (put(["a man", [["in red"], []]]), "not [['in red'], []]"),
    "a number in a group": (put(["a man", [["in red", 7]]]), "not [['in red', 7]]"),
}


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_a_record_that_cannot_serve_is_one_sentence_with_its_place(kind, by_path, data, tmp_path):
    change, said = WRONG[kind]
    root, number = changed(data, tmp_path, change)
    file = root / "CUHK-PEDES" / "reid_raw.json"
    path = ("--annotations", file, "--images", file.parent / "imgs") if by_path else ()
    with pytest.raises(InputError) as error:
        loader_of(root, "--second_caption", *path)
    text = str(error.value)
    assert f"{file}, record {number}" in text and said in text and "\n" not in text
    loader_of(root, *path)  # nobody asks for it


def test_other_splits_and_images_without_captions_need_no_key(data, tmp_path):
    def without(record):
        del record["diversity_captions"]
        record["captions"] = []

    root, _ = changed(data, tmp_path, without)
    loader = loader_of(root, "--second_caption")
    assert len(loader.dataset) == 46
    records = json.loads((root / "CUHK-PEDES" / "reid_raw.json").read_text())
    assert all("diversity_captions" not in record for record in records if record["split"] != "train")


def test_json_lines_with_a_caption_each_hold_it_and_tables_say_that_they_cannot(data, tmp_path):
    folder = data / "CUHK-PEDES"
    records = json.loads((folder / "reid_raw.json").read_text())
    lines = []
    for record in records:
        seconds = record.pop("diversity_captions", record["captions"])
        for caption, one in zip(record.pop("captions"), seconds, strict=True):
            lines.append({**record, "caption": caption, "diversity_captions": [one]})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = ("--images", folder / "imgs", "--annotations")
    found = loader_of(data, "--second_caption", *path, tmp_path / "set.jsonl").dataset
    expected = loader_of(data, "--second_caption").dataset
    assert found.samples == expected.samples and found.second_captions == expected.second_captions
    for suffix in ("csv", "tsv"):
        (tmp_path / f"set.{suffix}").write_text("image,caption,person,split\n")
        with pytest.raises(InputError, match=r'set\.[ct]sv cannot hold "diversity_captions".*JSON'):
            loader_of(data, "--second_caption", *path, tmp_path / f"set.{suffix}")


@pytest.mark.parametrize(
    "typed",
    [
        "--second_caption --loss_names id",
        "--second_caption --loss_names efa+mlm",
        "--loss_names second",
        "--loss_names tal --second_caption --token_selection --tse_norm train --micro_batch 8",
    ],
)
def test_what_cannot_be_had_is_one_sentence(typed, capsys):
    with pytest.raises(SystemExit) as stop:
        get_args(typed.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert ("second caption to a loss of features" in err) == typed.startswith("--second_caption")


# ---- a run ----


@missing("sklearn", "scikit-learn", "requirements-methods.txt")
def test_a_run_goes_on_within_an_epoch_and_is_tested(data, test_script, tmp_path):
    more = (*SECOND, "--division", "--text_aug", "--log_period", "1")
    argv = words(data, tmp_path / "a", *more, loss_names="tal+id", epochs=2)
    assert run(argv, tmp_path / "output") == 0
    assert (tmp_path / "output").read_text().count("; in id all of them") == 2
    whole = only_run(tmp_path / "a")
    output = (tmp_path / "output").read_text().splitlines()
    (line,) = [line for line in output if "Epoch[2] Iteration[6/" in line]
    shown = [line.index(f"{name}_loss: ") for name in ("tal", "tse", "second", "tse_second")]
    assert shown == sorted(shown)
    argv[argv.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    assert run(argv, tmp_path / "output", ("Epoch[2] Iteration[2/6]", signal.SIGTERM)) == 3
    stopped = only_run(tmp_path / "b")
    assert run(["--resume", "--resume_ckpt_file", stopped], tmp_path / "more") == 0
    assert differ(stopped / "last.pth", whole / "last.pth") == []
    plain = draw(tmp_path)  # a test set needs no second captions
    typed = ["--config_file", str(whole), "--root_dir", str(plain), "--device", "cpu"]
    assert test_script.main(typed) == 0
    assert Path(whole / "results.json").is_file()


def test_two_processes_train_two_captions_as_one_does(data):
    argv = words(data, data, *SECOND, "--batch_size", "10", loss_names="tal")  # 10, …, 8
    (alone,), two = (together(n, processes.train_some, argv, 1) for n in (1, 2))
    for found in two:
        for report, expected in zip(found["reports"], alone["reports"], strict=True):
            for name in ("second_loss", "tse_second_loss"):
                assert report[name] == pytest.approx(expected[name], rel=1e-5) and report[name] > 0
        for name, value in alone["weights"].items():
            assert (found["weights"][name] - value).abs().max() < 1e-5, name
