import json
import re
from itertools import combinations, permutations
from random import Random

import numpy as np
import pytest
from PIL import Image

from datasets import pedestrians
from datasets.pedestrians import draw, make_identities
from datasets.synthetic import main, make_dataset
from utils.data_sets import DATA_SETS
from utils.errors import InputError

SMALL = {"train_ids": 3, "val_ids": 2, "test_ids": 2, "images_per_id": 2, "size": (64, 28)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(folder):
    return json.loads((folder / DATA_SETS[folder.name].files[0]).read_text())


def all_identities(count):
    return [identity for split in pedestrians.SPLITS for identity in make_identities(0, split, count)]


def plain_words(text):
    """The sentence in the words of the tables: one word for each thing and colour."""
    synonyms = pedestrians.SYNONYMS.items()
    key_of = {synonym: key for key, words in synonyms for synonym in words if synonym}
    longest_first = "|".join(sorted(map(re.escape, key_of), key=len, reverse=True))
    text = re.sub(rf"\b({longest_first})\b", lambda found: key_of[found[0]], text.lower())
    return text.replace("plain ", "")


def phrases_said(identity, text):
    """Which of a person's five phrases occur in a sentence of plain words."""
    (style, shade), (kind, pattern, colour) = identity.head, identity.top
    looks = {pattern, colour} - {"plain"}
    said = {"top": any(" ".join(order) + " " + kind in text for order in permutations(looks))}
    head = {"bald": "bald head", "ponytail": f"{shade} {style}"}.get(style, f"{style} {shade} hair")
    said["head"] = (f"{shade} {style}" if style in ("cap", "beanie") else head) in text
    for part in ("bottom", "shoes", "bag"):
        kind, colour = getattr(identity, part)
        said[part] = f" {colour} {kind}".replace("  ", " ") in text
    return {part for part, occurs in said.items() if occurs}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first, second = (contents(make_dataset(tmp_path / name, **SMALL)) for name in "ab")
    assert first == second and len(first) == 7 * 2 + 2


def test_another_seed_gives_other_persons_and_other_sentences(tmp_path):
    first, second = (make_dataset(tmp_path / str(seed), seed=seed, **SMALL) for seed in (0, 1))
    assert make_identities(0, "train", 3) != make_identities(1, "train", 3)
    assert contents(first).keys() == contents(second).keys()
    pairs = zip(records_of(first), records_of(second), strict=True)
    assert all(one["captions"] != other["captions"] for one, other in pairs)


@pytest.mark.parametrize(
    "format, path_key, ids, captions",
    [
        ("CUHK-PEDES", "file_path", {"train": [1, 2, 3], "val": [4, 5], "test": [6, 7]}, 2),
        ("ICFG-PEDES", "file_path", {"train": [0, 1, 2], "test": [3, 4]}, 1),
        ("RSTPReid", "img_path", {"train": [0, 1, 2], "val": [3, 4], "test": [5, 6]}, 2),
    ],
)
def test_each_format_has_its_keys_ids_and_captions(tmp_path, format, path_key, ids, captions):
    folder = make_dataset(tmp_path, format, **SMALL)
    assert folder == tmp_path / format
    found = {}
    for record in records_of(folder):
        assert record.keys() == {"split", "captions", path_key, "id"}
        assert len(record["captions"]) == captions
        with Image.open(folder / "imgs" / record[path_key]) as image:
            assert image.size == (28, 64) and image.format == "JPEG"
        found.setdefault(record["split"], []).append(record["id"])
    assert found == {split: sorted(2 * persons) for split, persons in ids.items()}
    assert len({record[path_key] for record in records_of(folder)}) == len(records_of(folder))


def test_any_two_persons_differ_in_two_phrases_across_all_splits():
    for one, other in combinations(all_identities(150), 2):
        assert sum(a != b for a, b in zip(one[2:], other[2:], strict=True)) >= 2


def test_every_colour_and_kind_of_top_occurs():
    tops = [identity.top for identity in make_identities(0, "train", 400)]
    assert {kind for kind, _, _ in tops} == {"t-shirt", "shirt", "jacket", "coat", "hoodie"}
    assert {colour for _, _, colour in tops} == set(pedestrians.COLOURS)


def test_a_sentence_names_top_and_bottom_and_four_phrases_at_least_and_fits_one_person_only():
    identities, rng = all_identities(60), Random(0)
    for identity in identities:
        text = plain_words(pedestrians.describe(identity, rng.choice(pedestrians.VIEWS), rng))
        assert {"top", "bottom"} <= phrases_said(identity, text), text
        assert [other for other in identities if len(phrases_said(other, text)) >= 4] == [identity], text


def test_a_sentence_tells_the_view_truly():
    identity, rng = make_identities(0, "train", 1)[0], Random(0)
    for direction, walking in pedestrians.VIEWS:
        texts = " ".join(pedestrians.describe(identity, (direction, walking), rng) for _ in range(20))
        assert ("walking" in texts) == walking
        assert ("to the left" in texts) == (direction == "left")


def test_more_ids_leave_the_earlier_ones_as_they_are(tmp_path):
    few = make_dataset(tmp_path / "few", **SMALL)
    many = make_dataset(tmp_path / "many", **SMALL | {"train_ids": 5, "test_ids": 3})
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        earlier, later = (
            [r for r in records_of(folder) if r["split"] == split][:count] for folder in (few, many)
        )
        assert len(earlier) == count
        for one, other in zip(earlier, later, strict=True):
            assert one["captions"] == other["captions"]
            paths = few / "imgs" / one["file_path"], many / "imgs" / other["file_path"]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_picture_has_the_size_and_the_colours_of_its_person():
    shirt = pedestrians.Identity(
        "man", pedestrians.SKINS[0], ("bald", ""), ("shirt", "plain", "red"), ("trousers", "green"),
        ("boots", "black"), ("none", ""),
    )  # fmt: skip
    for seed, view in enumerate(pedestrians.VIEWS):
        image = draw(shirt, view, Random(seed), (192, 80))
        assert image.size == (80, 192)
        red, green, blue = np.asarray(image, int).transpose(2, 0, 1)
        rows = np.arange(192)[:, None]
        is_red, is_green = (red > green + 50) & (red > blue + 50), (green > red + 30) & (green > blue + 30)
        assert (is_red & (rows < 110)).sum() > 400 and (is_green & (rows > 90)).sum() > 300


def test_a_finished_folder_is_left_and_an_older_drawing_replaced(tmp_path):
    folder = make_dataset(tmp_path, **SMALL)
    image = next((folder / "imgs").rglob("*.jpg"))
    image.write_bytes(b"mark")
    make_dataset(tmp_path, **SMALL)
    assert image.read_bytes() == b"mark"
    make_dataset(tmp_path, **SMALL | {"train_ids": 1})
    assert contents(folder) == contents(make_dataset(tmp_path / "new", **SMALL | {"train_ids": 1}))


def test_an_unfinished_folder_is_drawn_to_the_end(tmp_path):
    folder = make_dataset(tmp_path, **SMALL)
    whole = contents(folder)
    (folder / "reid_raw.json").unlink()
    next((folder / "imgs").rglob("*.jpg")).unlink()
    assert contents(make_dataset(tmp_path, **SMALL)) == whole


def test_a_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "CUHK-PEDES").mkdir()
    (tmp_path / "CUHK-PEDES" / "reid_raw.json").write_text("[]")
    with pytest.raises(InputError, match="not drawn here"):
        make_dataset(tmp_path, **SMALL)
    assert contents(tmp_path) == {"CUHK-PEDES/reid_raw.json": b"[]"}


def test_the_command_line_says_what_it_wrote(tmp_path, capsys):
    flags = "--format RSTPReid --ids 2 --val_ids 0 --test_ids 1 --images_per_id 1 --size 64 28 --root"
    assert main([*flags.split(), str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/RSTPReid holds 3 persons in 3 images with 6 sentences.\n"


@pytest.mark.parametrize(
    "flags",
    [
        "--ids 0",
        "--ids many",
        "--test_ids 99999999",
        "--images_per_id 0",
        "--size 9 9",
        "--format MARS",
        "--root {}",
    ],
)
def test_bad_input_ends_in_one_sentence_and_code_2(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(flags.format(tmp_path / "file").split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert contents(tmp_path) == {"file": b""}
