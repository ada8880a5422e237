"""Annotation files of the three data sets: what is read from them, and what is said about broken ones."""

import copy
import json
import logging
import tracemalloc
from pathlib import Path

import pytest

from datasets.annotations import SOURCES, log_statistics, read_splits
from utils.errors import InputError

REFERENCE = Path(__file__).parent / "reference" / "datasets"
EXPECTED = json.loads((REFERENCE / "expected.json").read_text(encoding="utf-8"))
NAMES = ["CUHK-PEDES", "ICFG-PEDES", "RSTPReid"]
KEY = {"CUHK-PEDES": "file_path", "ICFG-PEDES": "file_path", "RSTPReid": "img_path"}
FIRST = {"CUHK-PEDES": 1, "ICFG-PEDES": 0, "RSTPReid": 0}


def records_of(name):
    return json.loads((REFERENCE / name / EXPECTED[name]["file"]).read_text(encoding="utf-8"))


def lay_out(root, name, records=None, text=None, file=None, images=True):
    """A data set below root: records (the reference's own by default) or raw text, and empty image files."""
    folder = root / name
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    for record in records_of(name) if images else ():
        path = folder / "imgs" / record[KEY[name]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    text = json.dumps(records_of(name) if records is None else records) if text is None else text
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    (folder / (file or EXPECTED[name]["file"])).write_bytes(data)
    return root


def complaint(name, root):
    """The one sentence that reading ends in."""
    with pytest.raises(InputError) as error:
        read_splits(name, root)
    text = str(error.value)
    assert "\n" not in text and text
    return text


# ---- what the published loaders read ----


def as_published(split, root):
    return {
        "image_pids": split.image_pids,
        "img_paths": [str(Path(path).relative_to(root)) for path in split.image_paths],
        "caption_pids": split.caption_pids,
        "captions": split.captions,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_are_those_of_the_published_loader(tmp_path, name):
    splits, expected = read_splits(name, lay_out(tmp_path, name)), EXPECTED[name]
    train = [
        [s.pid, s.image_id, str(Path(s.image_path).relative_to(tmp_path)), s.caption] for s in splits.train
    ]
    assert train == expected["train"]
    assert as_published(splits.test, tmp_path) == expected["test"]
    assert as_published(splits.val, tmp_path) == expected["val"]
    assert splits.num_classes == expected["num_classes"]
    assert {name: split.counts[0] for name, split in splits.by_name.items()} == expected["ids"]
    assert {name: split.counts[1] for name, split in splits.by_name.items()} == expected["annos"]


@pytest.mark.parametrize("name", NAMES)
def test_the_training_split_as_a_gallery_holds_the_training_samples(tmp_path, name):
    train = EXPECTED[name]["train"]
    split = as_published(read_splits(name, lay_out(tmp_path, name)).train_split, tmp_path)
    queries = zip(split["caption_pids"], split["captions"], strict=True)
    gallery = zip(split["image_pids"], split["img_paths"], strict=True)
    assert list(queries) == [(pid, caption) for pid, _, _, caption in train]
    images = dict.fromkeys((image_id, pid, path) for pid, image_id, path, _ in train)
    assert list(gallery) == [(pid, path) for _, pid, path in images]


@pytest.mark.parametrize("name", NAMES)
def test_the_log_says_what_the_published_loader_logs(tmp_path, name, caplog):
    with caplog.at_level(logging.INFO, "IRRA.dataset"):
        log_statistics(read_splits(name, lay_out(tmp_path, name)))
    assert caplog.messages == EXPECTED[name]["log_messages"]


def test_the_icfg_file_may_bear_either_of_its_two_names(tmp_path):
    hyphen = read_splits("ICFG-PEDES", lay_out(tmp_path / "a", "ICFG-PEDES", file="ICFG-PEDES.json"))
    underscore = read_splits("ICFG-PEDES", lay_out(tmp_path / "b", "ICFG-PEDES", file="ICFG_PEDES.json"))
    assert [s.caption for s in hyphen.train] == [s.caption for s in underscore.train]
    assert hyphen.test.captions == underscore.test.captions


@pytest.mark.parametrize("name", NAMES)
def test_ids_written_as_strings_are_read_as_numbers(tmp_path, name):
    records = [{**record, "id": str(record["id"])} for record in records_of(name)]
    splits = read_splits(name, lay_out(tmp_path, name, records))
    assert [s.pid for s in splits.train] == [row[0] for row in EXPECTED[name]["train"]]
    assert splits.test.image_pids == EXPECTED[name]["test"]["image_pids"]
    expected = EXPECTED[name]["faults"]["ids as strings"]
    assert sorted({s.pid for s in splits.train}) == expected["train_ids"]
    assert len(splits.val.image_pids) == expected["val_images"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_captions_still_counts_as_an_image(tmp_path, name):
    records = records_of(name)
    first = next(record for record in records if record["split"] == "train")
    dropped, first["captions"] = len(first["captions"]), []
    splits = read_splits(name, lay_out(tmp_path, name, records))
    assert len(splits.train) == len(EXPECTED[name]["train"]) - dropped
    assert [s.image_id for s in splits.train] == [row[1] for row in EXPECTED[name]["train"][dropped:]]
    expected = EXPECTED[name]["faults"]["empty caption list in one train record"]
    assert sorted(set(splits.train_split.image_pids)) == expected["train_ids"]


@pytest.mark.parametrize("word", ["val", "validation", "query", ""])
def test_a_split_that_is_neither_train_nor_test_counts_as_val(tmp_path, word):
    records = records_of("RSTPReid")
    for record in records:
        record["split"] = word if record["split"] == "val" else record["split"]
    splits = read_splits("RSTPReid", lay_out(tmp_path, "RSTPReid", records))
    assert as_published(splits.val, tmp_path) == EXPECTED["RSTPReid"]["val"]


# ---- training ids ----


WRONG_IDS = {  # how far each training id moves, what is said of which id, counted from the first
    "a gap": (lambda pid, first: int(pid > first), "e.g. {} (", 1),
    "a start too high": (lambda pid, first: 1, "e.g. {} (", 0),
    "a start too low": (lambda pid, first: -1, "{} occurs (", -1),
}


@pytest.mark.parametrize("kind", WRONG_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_training_ids_with_a_gap_or_another_start_are_named_with_an_example(tmp_path, name, kind):
    moves, said, example = WRONG_IDS[kind]
    first, last = FIRST[name], FIRST[name] + EXPECTED[name]["num_classes"] - 1
    records = records_of(name)
    for record in records:
        if record["split"] == "train":
            record["id"] += moves(record["id"], first)
    text = complaint(name, lay_out(tmp_path, name, records))
    assert f"{name}: training ids must be {first}..{last + moves(last, first)} without a gap" in text
    assert said.format(first + example) in text
    assert EXPECTED[name]["file"] in text


def test_one_mistyped_id_costs_no_memory(tmp_path):
    records = records_of("RSTPReid")
    next(record for record in records if record["split"] == "train")["id"] = 1_000_000
    lay_out(tmp_path, "RSTPReid", records)
    tracemalloc.start()
    text = complaint("RSTPReid", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "data_captions.json" in text
    assert peak < 10 * 2**20  # 10 MiB: not a set of a million numbers


# ---- files and folders ----


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_imgs_folder_is_named(tmp_path, name):
    lay_out(tmp_path, name, images=False)
    (tmp_path / name / "imgs").rmdir()
    text = complaint(name, tmp_path)
    assert f"{name}: no folder {tmp_path / name / 'imgs'}" in text


@pytest.mark.parametrize("name", NAMES)
def test_without_an_annotation_file_every_place_looked_at_is_named(tmp_path, name):
    text = complaint(name, tmp_path)
    for file in SOURCES[name].files:
        assert str(tmp_path / name / file) in text
    assert "--root_dir" in text and "http" in text


def test_a_root_dir_that_does_not_exist_is_named(tmp_path):
    text = complaint("RSTPReid", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} does not exist" in text


def test_the_raw_file_of_cuhk_is_recognised_and_the_right_one_named(tmp_path):
    lay_out(tmp_path, "CUHK-PEDES", file="caption_all.json")
    text = complaint("CUHK-PEDES", tmp_path)
    assert "caption_all.json" in text and "reid_raw.json" in text


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    lay_out(tmp_path, "CUHK-PEDES")
    images = tmp_path / "CUHK-PEDES" / "imgs"
    gone = sorted(path for path in images.glob("*/*") if path.parent.name in ("cam_a", "Market"))
    for path in gone:
        path.unlink()
    (images / "Market").rmdir()
    text = complaint("CUHK-PEDES", tmp_path)
    assert f"CUHK-PEDES: {len(gone)} images are missing" in text and len(gone) > 3
    assert str(gone[0]) in text  # the first of the alphabet
    assert "Market" in text and "cam_a" in text and "CUHK01" not in text


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_an_image_missing_from_any_split_is_noticed(tmp_path, split):
    lay_out(tmp_path, "RSTPReid")
    record = next(record for record in records_of("RSTPReid") if record["split"] == split)
    (tmp_path / "RSTPReid" / "imgs" / record["img_path"]).unlink()
    assert record["img_path"] in complaint("RSTPReid", tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 5000 + "/y.jpg", "\ud800.jpg", "\ud800/x.jpg"])
def test_an_image_path_that_no_file_can_have_is_a_missing_image(tmp_path, path):
    records = records_of("RSTPReid")
    records[0]["img_path"] = path
    assert "1 image is missing" in complaint("RSTPReid", lay_out(tmp_path, "RSTPReid", records))


# ---- the text of the file ----

WHOLE = (REFERENCE / "RSTPReid" / "data_captions.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON at all",
        WHOLE[: len(WHOLE) // 2],
        WHOLE.rstrip()[:-1],
        WHOLE + "]",
        b"\x89PNG\r\n\x1a\n\x00\xff",
        "[" * 100_000,
    ],
    ids=["empty", "prose", "half", "all but the end", "too much", "binary", "nested without end"],
)
def test_a_file_that_is_not_json_is_named(tmp_path, text):
    assert "data_captions.json" in complaint("RSTPReid", lay_out(tmp_path, "RSTPReid", text=text))


@pytest.mark.parametrize("text", ["{}", '{"a": [1]}', "[]", "7", '"words"', "null"])
def test_json_that_is_not_a_list_of_records_is_named(tmp_path, text):
    text = complaint("RSTPReid", lay_out(tmp_path, "RSTPReid", text=text))
    assert "data_captions.json" in text and "list of records" in text


# ---- single records ----


def spoilt(name, number, **changes):
    """The reference records with some keys of one changed; a value of ... takes the key out."""
    records = copy.deepcopy(records_of(name))
    records[number].update(changes)
    records[number] = {key: value for key, value in records[number].items() if value is not ...}
    return records


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["split", "id", "captions", "path"])
def test_a_record_without_a_key_is_named_with_the_key(tmp_path, name, key):
    key = KEY[name] if key == "path" else key
    text = complaint(name, lay_out(tmp_path, name, spoilt(name, 3, **{key: ...})))
    assert f"{EXPECTED[name]['file']}, record 3 " in text and f'"{key}"' in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", 1.5),
        ("id", "one"),
        ("id", ""),
        ("id", True),
        ("id", [1]),
        ("id", "9" * 5000),
        ("split", 3),
        ("split", ["train"]),
        ("img_path", ""),
        ("img_path", 7),
        ("img_path", ["0000_c1_0000.jpg"]),
        ("captions", "a man in red"),
        ("captions", [["a man in red"]]),
        ("captions", ["a man in red", 7]),
        ("captions", {"a": "man in red"}),
        *((key, None) for key in ("split", "id", "img_path", "captions")),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_record_and_key(tmp_path, key, value):
    records = spoilt("RSTPReid", 2, **{key: value})
    text = complaint("RSTPReid", lay_out(tmp_path, "RSTPReid", records))
    assert "data_captions.json, record 2" in text and key in text


@pytest.mark.parametrize("record", ["words", 7, None, ["train", 1]])
def test_an_entry_that_is_no_record_is_named(tmp_path, record):
    records = records_of("RSTPReid")
    records[1] = record
    text = complaint("RSTPReid", lay_out(tmp_path, "RSTPReid", records))
    assert "data_captions.json, record 1 " in text and "img_path" in text


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "..", "/etc/hostname", "//x.jpg", "a\0.jpg"])
def test_an_image_path_that_leaves_the_image_folder_is_refused(tmp_path, path):
    lay_out(tmp_path, "RSTPReid", spoilt("RSTPReid", 4, img_path=path))
    (tmp_path / "RSTPReid" / "x.jpg").touch()
    text = complaint("RSTPReid", tmp_path)
    assert "data_captions.json, record 4" in text and "img_path" in text and "leaves" in text
