"""Hard drawn sets: who is like whom, what the sentences say, and what is recorded of both."""

import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from datasets.pedestrians import SPLITS
from datasets.synthetic import main
from datasets.synthetic_hard import (
    HARD,
    PHRASES,
    VIEWS,
    WORDS,
    describe,
    make_groups,
    make_hard_dataset,
    obstruct,
)
from tests.test_synthetic import contents, records_of
from utils.data_sets import DATA_SETS

ROOT = Path(__file__).parent.parent
SMALL = {"train_ids": 14, "val_ids": 4, "test_ids": 9, "images_per_id": 2, "size": (48, 20)}


def members(**counts):
    """{split: its members}, in the order in which a data set draws them."""
    taken = set()
    return {split: make_groups(0, split, counts[split], taken) for split in ("test", "val", "train")}


def attributes_of(identity):
    """{attribute: value}, of those that are there."""
    found = {(part, n): word for part in PHRASES for n, word in enumerate(getattr(identity, part)) if word}
    return found | {("person", None): identity.person}


def unlike(one, other):
    """How many attributes of two persons differ."""
    one, other = attributes_of(one), attributes_of(other)
    return sum(one.get(attribute) != other.get(attribute) for attribute in one | other)


# ---- persons ----


@pytest.mark.parametrize("count", [2, 3, 5, 60])
def test_everybody_has_somebody_in_the_split_who_differs_in_the_one_attribute_of_their_group(count):
    for group in members(train=count, val=count, test=count).values():
        assert len(group) == count
        for member in group:
            near = [other for other in group if unlike(member.identity, other.identity) == 1]
            assert any(other.apart == member.apart for other in near)


def test_no_two_persons_of_a_data_set_have_all_attributes_in_common():
    groups = members(train=300, val=50, test=100).values()
    assert len({member.identity[2:] for group in groups for member in group}) == 450


def test_more_training_persons_leave_the_other_splits_as_they_are():
    few, many = members(train=10, val=10, test=20), members(train=200, val=10, test=20)
    assert few["test"] == many["test"] and few["val"] == many["val"]


# ---- sentences, read back ----


def plain(text):
    key_of = {word: key for key, words in WORDS.items() for word in words}
    longest_first = "|".join(sorted(map(re.escape, key_of), key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({longest_first})(?![\w-])", lambda found: key_of[found[0]], text.lower())


def heard(text):
    """{attribute: value} of what a sentence says, by its words alone."""
    text, said = plain(text), {}
    if person := re.search(r"\b(man|woman|boy|girl)\b", text):
        said["person", None] = person[0]
    nouns = {
        "top": "t-shirt|shirt|jacket|coat|hoodie|top",
        "bottom": "trousers|shorts|skirt|bottoms",
        "shoes": "sneakers|boots|shoes",
        "bag": "backpack|handbag|shoulder bag|bag|none",
        "head": "hair|ponytail|cap|beanie|bald",
    }
    for part, kinds in nouns.items():
        found = re.search(rf"(?:([\w-]+) )?(?:([\w-]+) )?(?<![\w-])({kinds})(?![\w-])", text)
        if not found:
            continue
        *before, kind = found.groups()
        for number, values in enumerate(zip(*PHRASES[part], strict=True)):
            for word in (*before, kind):
                if word and word in values:
                    said[part, number] = word
    return said


def fitting(said, group):
    return [
        number
        for number, member in enumerate(group)
        if said.items() <= attributes_of(member.identity).items()
    ]


def test_a_sentence_says_the_attributes_that_it_is_to_say_and_no_others():
    rng = Random(0)
    for identity, _ in members(train=150, val=2, test=2)["train"]:
        values = attributes_of(identity)
        said = {attribute for attribute in sorted(values, key=str) if rng.random() < 0.6}
        said |= {("head", 0)} if ("head", 1) in said else set()
        text = describe(identity, said, rng.choice(VIEWS), rng)
        assert heard(text) == {attribute: values[attribute] for attribute in said}, text


@pytest.mark.parametrize("format", DATA_SETS)
def test_recorded_is_whom_a_caption_describes_and_how_many_it_fits(tmp_path, format):
    folder = make_hard_dataset(tmp_path, format, **SMALL, noise=0.3)
    groups = members(train=14, val=0 if format == "ICFG-PEDES" else 4, test=9)
    first = DATA_SETS[format].first_pid
    persons = [(split, member) for split in SPLITS for member in groups[split]]
    for record in records_of(folder):
        split = record["split"]
        offset = first + next(number for number, (of, _) in enumerate(persons) if of == split)
        for text, described, fits in zip(
            record["captions"], record["described"], record["fits"], strict=True
        ):
            found = fitting(heard(text), groups[split])
            assert described - offset in found and len(found) == fits, text
            assert described == record["id"] or record["id"] - offset not in found
            if split != "train":
                assert (described, fits) == (record["id"], 1)


# ---- wrong captions ----


@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0])
def test_that_share_of_the_training_captions_is_wrong_and_all_else_is_as_without(tmp_path, noise):
    clean, noisy = (make_hard_dataset(tmp_path / str(share), **SMALL, noise=share) for share in (0.0, noise))
    wrong = 0
    for one, other in zip(records_of(clean), records_of(noisy), strict=True):
        assert one["described"] == [one["id"]] * 2 and other["id"] == one["id"]
        for number, described in enumerate(other["described"]):
            if described != other["id"]:
                wrong += 1
                assert other["split"] == "train"
            else:
                assert other["captions"][number] == one["captions"][number]
    assert wrong == round(noise * 14 * 2 * 2)
    pictures = [
        {name: data for name, data in contents(folder).items() if name.endswith("jpg")}
        for folder in (clean, noisy)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 27 * 2


# ---- rewritten captions ----


def test_rewritten_captions_say_piece_by_piece_all_of_whom_the_caption_describes(tmp_path):
    folder = make_hard_dataset(tmp_path, **SMALL, noise=0.3, rewritten=True)
    groups = members(train=14, val=4, test=9)
    for record in records_of(folder):
        assert ("diversity_captions" in record) == (record["split"] == "train")
        entries = record.get("diversity_captions", [])
        for described, groups_of_wordings in zip(record["described"], entries, strict=bool(entries)):
            identity = groups["train"][described - 1].identity
            for wordings in zip(*groups_of_wordings, strict=True):
                said = {attribute: word for text in wordings for attribute, word in heard(text).items()}
                assert said == attributes_of(identity), wordings


def test_rewritten_captions_come_beside_all_that_there_is_without_them(tmp_path):
    bare, rewritten = (
        make_hard_dataset(tmp_path / name, **SMALL, noise=0.3, rewritten=more)
        for name, more in (("a", False), ("b", True))
    )
    records = [
        {key: value for key, value in record.items() if key != "diversity_captions"}
        for record in records_of(rewritten)
    ]
    assert records == records_of(bare) and records != records_of(rewritten)


# ---- files ----


def test_the_same_arguments_give_the_same_bytes_in_any_process(tmp_path):
    words = "--hard small --noise 0.2 --ids 14 --val_ids 4 --test_ids 9 --images_per_id 2 --size 48 20 --root"
    for seed in "12":
        command = [sys.executable, "-m", "datasets.synthetic", *words.split(), str(tmp_path / seed)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    here = make_hard_dataset(tmp_path / "here", **SMALL, noise=0.2)
    found = [contents(folder) for folder in (tmp_path / "1/CUHK-PEDES", tmp_path / "2/CUHK-PEDES", here)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 27 * 2 + 2
    other = make_hard_dataset(tmp_path / "other", **SMALL, noise=0.2, seed=1)
    assert contents(other) != found[0]


def test_a_size_says_what_is_not_typed_and_the_command_tells_of_the_sentences(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(HARD["small"], "ids", 6)
    words = ["--hard", "small", "--val_ids", "2", "--test_ids", "4", "--noise", "0.25"]
    assert main([*words, "--root", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/CUHK-PEDES holds 12 persons in 36 images with 72 sentences."
    assert second.startswith("Of the 36 training sentences 9 describe another person than their image shows")
    with Image.open(next((tmp_path / "CUHK-PEDES").rglob("*.jpg"))) as image:
        assert image.size == (48, 128)


def test_half_of_the_pictures_have_something_in_front_that_leaves_more_than_half_to_be_seen():
    covered = []
    for seed in range(400):
        image = Image.new("RGB", (80, 192), (1, 2, 3))
        obstruct(image, Random(seed))
        covered.append((np.asarray(image) != (1, 2, 3)).any(axis=2).mean())
    there = [share for share in covered if share]
    assert 160 < len(there) < 240 and 0.05 < min(there) and max(there) < 0.45


@pytest.mark.parametrize(
    "words",
    [
        "--noise 0.2",
        "--rewritten",
        "--hard tiny",
        "--hard small --noise 2",
        "--hard small --noise nan",
        "--hard small --test_ids 1",
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(words, tmp_path, capsys):
    assert main([*words.split(), "--root", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "none").exists()
