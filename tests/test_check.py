"""python -m datasets.check: each fault is found, with its likely cause."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets.annotations import read_splits
from datasets.check import check_counts, main
from datasets.synthetic import make_dataset
from datasets.transforms import read_image
from retrieval.encoders import open_picture
from utils.data_sets import DATA_SETS


class Drawn:
    """A small drawn data set whose records can be edited and checked."""

    def __init__(self, root, name="CUHK-PEDES"):
        self.root, self.name = root, name
        self.folder = make_dataset(root, name, 3, 1, 2, 2, size=(64, 28))
        self.path_key = DATA_SETS[name].path_key
        self.annotation = self.folder / DATA_SETS[name].files[0]
        self.records = json.loads(self.annotation.read_text())

    def image(self, number):
        return self.folder / "imgs" / self.records[number][self.path_key]

    def of(self, split):
        return [record for record in self.records if record["split"] == split]

    def check(self, capsys, *options):
        """Exit status and what was printed: (FAULTs, notes, all the text)."""
        self.annotation.write_text(json.dumps(self.records))
        status = main(["--dataset_name", self.name, "--root_dir", str(self.root), *options])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        lines = said.out.splitlines()
        faults = [line[6:] for line in lines if line.startswith("FAULT ")]
        notes = [line[6:] for line in lines if line.startswith("note  ")]
        if status != 2:
            assert lines[-1].startswith(f"{len(faults)} faults, {len(notes)} notes; ")
        return status, faults, notes, said.out + said.err

    def fault(self, capsys, *options):
        """The only fault that is found."""
        status, (fault,), _, _ = self.check(capsys, *options)
        assert status == 1
        return fault


@pytest.fixture
def drawn(tmp_path):
    return Drawn(tmp_path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_clean_set_has_no_fault(name, tmp_path, capsys):
    drawn = Drawn(tmp_path, name)
    status, faults, notes, text = drawn.check(capsys, "--decode")
    assert status == 0 and faults == []
    assert "every image decoded" in text
    assert re.search(r"\| +train +\| +3 +\| +6 +\| +(6|12) +\|", text)  # ids, images, captions
    assert len(notes) == 1 and notes[0].startswith(
        "ids, images, captions are not the published ones: train (3, 6, "
    )


def test_missing_images_are_counted_and_their_folder_named(drawn, capsys):
    drawn.image(0).unlink()
    fault = drawn.fault(capsys)
    assert fault == (
        f"1 image is missing, the first is {drawn.image(0)}; 1 in imgs/{drawn.image(0).parent.name}: "
        f"is the archive unpacked whole into {drawn.folder}/imgs?"
    )


def test_a_missing_folder_is_named_as_such(drawn, capsys):
    """A mailed archive that lacks a part."""
    folder = drawn.image(0).parent
    number, first = len(list(folder.iterdir())), min(folder.iterdir())
    shutil.rmtree(folder)
    fault = drawn.fault(capsys, "--decode")
    assert fault.startswith(
        f"{number} images are missing, the first is {first}; {number} in imgs/{folder.name}, "
        "a folder that does not exist: is the archive"
    )


def test_an_image_in_two_splits(drawn, capsys):
    shared = drawn.of("train")[0]["file_path"]
    drawn.of("test")[0]["file_path"] = shared
    fault = drawn.fault(capsys)
    assert fault == f"1 images stand in more than one split, the first is {drawn.folder}/imgs/{shared}"


def test_an_image_of_two_persons(drawn, capsys):
    persons = {record["id"]: record for record in drawn.of("train")}
    first, second = list(persons.values())[:2]
    second["file_path"] = first["file_path"]
    fault = drawn.fault(capsys)
    assert fault == f"1 images show two persons, the first is {drawn.folder}/imgs/{first['file_path']}"


def test_the_same_picture_under_two_names_across_splits(drawn, capsys):
    train, test = drawn.of("train")[0]["file_path"], drawn.of("test")[0]["file_path"]
    (drawn.folder / "imgs" / test).write_bytes((drawn.folder / "imgs" / train).read_bytes())
    assert drawn.check(capsys)[0] == 0  # only decoding reads the files
    fault = drawn.fault(capsys, "--decode")
    assert fault.startswith("1 pictures stand in two splits, e.g. ")
    assert train in fault and test in fault


@pytest.mark.parametrize("number", [1, 11])
def test_unreadable_images_are_named_up_to_ten(number, tmp_path, capsys):
    drawn = Drawn(tmp_path)
    broken = [drawn.image(i) for i in range(number)]
    for i, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[: 100 + i])
    assert drawn.check(capsys)[0] == 0
    drawn.records[11]["file_path"] = "gone.jpg"  # whatever is missing, the others are decoded
    status, (missing, *faults), _, _ = drawn.check(capsys, "--decode")
    assert status == 1 and missing.startswith("1 image is missing")
    named = [path for path in broken if any(f"the image {path} cannot be read" in fault for fault in faults)]
    assert len(named) == min(number, 10)
    assert number <= 10 or faults[-1] == f"{number - 10} more images cannot be read"


def test_empty_captions(drawn, capsys):
    record = drawn.of("train")[0]
    record["captions"][0] = " \t&nbsp;\n"
    fault = drawn.fault(capsys)
    assert fault == f"1 captions are empty, the first of person {record['id']} of train"  # as in the file


def test_captions_without_a_word(drawn, capsys):
    drawn.of("test")[0]["captions"][0] = "12 !?"
    fault = drawn.fault(capsys)
    assert fault.startswith('1 captions hold no word, the first is "12 !?" (person ')


def test_captions_that_are_cut(drawn, capsys):
    drawn.of("test")[0]["captions"][0] = "red " * 75  # 75 tokens and two marks: just fits
    drawn.of("test")[1]["captions"][0] = "blue " * 76
    status, faults, notes, _ = drawn.check(capsys)
    assert status == 0 and faults == []
    (note,) = [note for note in notes if "cut" in note]
    assert note.startswith('1 captions are cut at 77 tokens, the first is "blue blue ')
    note = "\n".join(drawn.check(capsys, "--text_length", "20")[2])
    assert "captions are cut at 20 tokens" in note


def test_captions_are_read_without_punctuation_as_the_training_will_read_them(drawn, capsys):
    drawn.of("test")[0]["captions"][0] = "red. " * 50
    drawn.of("test")[1]["captions"][0] = "..."
    _, (fault,), notes, _ = drawn.check(capsys)
    assert "hold no word" in fault and len([note for note in notes if "cut at 77" in note]) == 1
    _, (fault,), notes, _ = drawn.check(capsys, "--plain_captions")
    assert "captions are empty" in fault and not [note for note in notes if "cut at" in note]


@pytest.mark.parametrize(
    ("key", "option"),
    [("diversity_captions", ["--second_caption"]), ("captions_bt", ["--back_translation", "0.1"])],
)
def test_what_the_training_reads_beside_captions_must_be_there(key, option, drawn, capsys):
    status, _, _, text = drawn.check(capsys, *option)
    assert status == 2 and f'record 0 has no key "{key}"' in text and option[0] in text
    for record in drawn.of("train"):
        record[key] = record["captions"]
    assert drawn.check(capsys, *option)[0] == 0


@pytest.mark.parametrize("name", ["CUHK-PEDES", "RSTPReid"])
def test_captions_shared_by_persons(name, tmp_path, capsys):
    drawn = Drawn(tmp_path, name)
    persons = list({record["id"]: record for record in drawn.of("train")}.values())
    persons[1]["captions"][0] = persons[0]["captions"][0].upper() + "  "
    status, faults, notes, _ = drawn.check(capsys)
    assert status == 0 and faults == []
    (note,) = [note for note in notes if "belong to several persons" in note]
    assert note.startswith("1 captions belong to several persons")
    assert ("known of RSTPReid" in note) == (name == "RSTPReid")


def count_findings(ids, images, tmp_path):
    """Of an RSTPReid of so many persons of train, val and test, of each so many images with two captions."""
    (tmp_path / "RSTPReid" / "imgs").mkdir(parents=True)
    splits = [
        split for split, number in zip(("train", "val", "test"), ids, strict=True) for _ in range(number)
    ]
    records = [
        {"id": pid, "img_path": f"{pid}_{i}.jpg", "captions": ["a person", "somebody"], "split": split}
        for pid, split in enumerate(splits)
        for i in range(images)
    ]
    (tmp_path / "RSTPReid" / "data_captions.json").write_text(json.dumps(records))
    return [
        finding.what for finding in check_counts(read_splits("RSTPReid", tmp_path, images_must_exist=False))
    ]


def test_the_old_split_of_RSTPReid_is_recognised(tmp_path):
    (what,) = count_findings((3901, 100, 100), 1, tmp_path)
    assert "train (3901, 3901, 7802), published (3701, 18505, 37010)" in what
    assert "this is the old file, split 3901/100/100; ask its authors for the present one" in what


def test_the_published_counts_are_no_finding(tmp_path):
    assert count_findings((3701, 200, 200), 5, tmp_path) == []


UNREADABLE = {  # what is done to the set, what the sentence says
    "no annotation": (
        lambda drawn: drawn.annotation.unlink(),
        r"no annotation file at .*reid_raw.json.*Is --root_dir right\?",
    ),
    "no images": (
        lambda drawn: (drawn.folder / "imgs").rename(drawn.folder / "images"),
        r"no folder .*imgs: its images belong there",
    ),
    "half a file": (
        lambda drawn: drawn.annotation.write_text(drawn.annotation.read_text()[:500]),
        r"reid_raw.json is not JSON .*is the download complete\?",
    ),
    "the raw file alone": (
        lambda drawn: drawn.annotation.rename(drawn.folder / "caption_all.json"),
        "caption_all.json is the raw file; reid_raw.json, with the splits",
    ),
    "a key is missing": (
        lambda drawn: drawn.annotation.write_text('[{"split": "train", "id": 1}]'),
        'record 0 has no key "file_path"',
    ),
}


@pytest.mark.parametrize("damage, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_at_all_is_status_2(damage, message, drawn, capsys):
    damage(drawn)
    assert main(["--dataset_name", "CUHK-PEDES", "--root_dir", str(drawn.root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_mistyped_option_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--root", "data"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "unknown option --root; did you mean --root_dir?" in line


def test_several_findings_come_faults_first(drawn, capsys):
    drawn.of("train")[0]["captions"] = [""]
    drawn.of("test")[0]["captions"] = ["red " * 90]
    drawn.image(0).unlink()
    status, faults, notes, text = drawn.check(capsys)
    assert status == 1 and len(faults) == 2 and len(notes) == 2
    assert text.index("FAULT") < text.index("note ")


# ---- what makes figures wrong without a word ----


@pytest.mark.parametrize("of_folder", [False, True], ids=["an image", "a folder"])
def test_a_link_to_nothing_is_a_missing_image(of_folder, drawn, capsys):
    """git-annex, DVC, a disk that is away: the folder lists it, and training would end in the middle."""
    if of_folder:
        drawn.records[0][drawn.path_key] = "away/below/1.jpg"
        (drawn.folder / "imgs" / "away").symlink_to("/nowhere/at/all")
    else:
        drawn.image(0).unlink()
        drawn.image(0).symlink_to("/nowhere/at/all.jpg")
    fault = drawn.fault(capsys)
    assert f"the first is {drawn.image(0)} (it is a link to nothing" in fault


def test_a_link_to_a_picture_is_an_image(drawn, tmp_path, capsys):
    drawn.image(0).rename(tmp_path / "elsewhere.jpg")
    drawn.image(0).symlink_to(tmp_path / "elsewhere.jpg")
    assert drawn.check(capsys)[0] == 0


SPELLINGS = {  # the name in the file and on the disk; what is said
    "another case": ("a.JPG", "a.jpg", "upper and lower case"),
    "two characters for a letter": ("cafe\u0301 1.jpg", "caf\u00e9 1.jpg", "spelled otherwise"),
    "an address": ("a%20b.jpg", "a b.jpg", "spelled otherwise"),
    "another kind": ("a.png", "a.jpg", "spelled otherwise"),
    "a folder in another case": ("CAM_x/below/1.jpg", "cam_X", "upper and lower case"),
    "a folder as an address": ("cam%5Fx/below/1.jpg", "cam_x", "spelled otherwise"),
}


@pytest.mark.parametrize(("written", "there", "said"), SPELLINGS.values(), ids=SPELLINGS)
def test_another_spelling_of_a_file_or_a_folder_is_named(written, there, said, drawn, capsys):
    images = drawn.folder / "imgs"
    drawn.image(0).rename(images / there) if "." in there else (images / there).mkdir()
    drawn.records[0][drawn.path_key] = written
    assert f"({said}: there is {there})" in drawn.fault(capsys)


def test_a_folder_that_may_not_be_read_says_so(drawn, monkeypatch, capsys):
    """Root may read everything, so the system's refusal is played."""

    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    status, (fault, *_), _, _ = drawn.check(capsys)
    assert status == 1 and "(its folder cannot be read: Permission denied)" in fault


@pytest.mark.parametrize(
    "written",
    [lambda path: "./" + path.replace("/", "//"), lambda path: path.replace("/", "\\")],
    ids=["in another way", "on Windows"],
)
def test_one_image_written_in_two_ways_is_one_image(written, drawn, capsys):
    before = read_splits(drawn.name, drawn.root)
    for record in drawn.records[::2]:
        record[drawn.path_key] = written(record[drawn.path_key])
    assert drawn.check(capsys)[0] == 0
    assert read_splits(drawn.name, drawn.root).train == before.train


def test_a_backslash_does_not_lead_out_of_the_image_folder(drawn, capsys):
    drawn.records[0][drawn.path_key] = "..\\..\\secret.jpg"
    status, _, _, text = drawn.check(capsys)
    assert status == 2 and "leaves the image folder" in text


def test_a_byte_order_mark_is_no_part_of_the_annotation(drawn, capsys):
    before = read_splits(drawn.name, drawn.root)
    drawn.annotation.write_text(json.dumps(drawn.records), encoding="utf-8-sig")
    assert read_splits(drawn.name, drawn.root).train == before.train


@pytest.mark.parametrize(
    ("word", "fault"), [("Train", True), ("test ", True), ("restval", False), ("", False)]
)
def test_unknown_words_for_a_split_are_named(word, fault, drawn, capsys):
    """They count as val, as in the published code."""
    drawn.of("val")[0]["split"] = word
    status, faults, notes, _ = drawn.check(capsys)
    (found,) = [text for text in faults + notes if f'1 images have the split "{word}"' in text]
    assert status == int(fault) and (found in faults) == fault and "counts as val" in found


def test_one_record_a_caption_is_noted_since_the_gallery_grows_by_it(drawn, capsys):
    images = len(drawn.of("test"))
    drawn.records = [
        {**record, "captions": [caption]} for record in drawn.records for caption in record["captions"]
    ]
    status, faults, notes, _ = drawn.check(capsys)
    (note,) = [text for text in notes if "of test are listed more than once" in text]
    assert status == 0 and f"a gallery holds {2 * images} instead of {images}" in note


def test_turned_and_deep_pictures_are_counted_when_they_are_decoded(drawn, capsys):
    tag = Image.Exif()
    tag[0x0112] = 6  # turn it to the right
    with Image.open(drawn.image(0)) as picture:
        picture.rotate(90, expand=True).save(drawn.image(0), exif=tag)
    deep = Image.fromarray((np.arange(96 * 40, dtype=np.uint16) * 17).reshape(96, 40))
    deep.save(drawn.image(1), format="PNG")
    status, faults, notes, _ = drawn.check(capsys, "--decode")
    assert status == 0 and not faults
    assert any(note.startswith("1 pictures are turned by an EXIF tag") for note in notes)
    assert any(note.startswith("1 pictures are grey with more than eight bits") for note in notes)


def test_a_tiff_that_pillow_turns_itself_is_not_counted(drawn, capsys):
    """It stands upright in every program, so there is nothing to know."""
    tag = Image.Exif()
    tag[0x0112] = 6
    with Image.open(drawn.image(0)) as picture:
        picture.rotate(90, expand=True).save(drawn.image(0), format="TIFF", exif=tag)
    assert read_image(drawn.image(0)).size == open_picture(drawn.image(0)).size == picture.size
    status, faults, notes, _ = drawn.check(capsys, "--decode")
    assert status == 0 and not any("turned" in note or "bits" in note for note in notes)


# ---- a file of one's own ----


def own_file(tmp_path, *rows):
    """The arguments for a CSV file with these (person, split)."""
    make_dataset(tmp_path, "CUHK-PEDES", 3, 2, 6, 2)
    images = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
    lines = ["image,caption,person,split"]
    for image, (person, split) in zip(images[: len(rows)], rows, strict=True):
        lines.append(f"{image},a man called {person},{person},{split}")
    (tmp_path / "own.csv").write_text("\n".join(lines) + "\n")
    return ["--annotations", str(tmp_path / "own.csv"), "--images", str(tmp_path)]


def test_a_mistyped_split_of_ones_own_file_is_a_fault_and_another_word_for_val_is_not(tmp_path, capsys):
    argv = own_file(tmp_path, ("anna", "train"), ("ben", "trian"), ("cleo", "test"), ("dora", "dev"))
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert 'FAULT 1 images have the split "trian", which counts as val; did you mean train?' in out
    assert 'note  1 images have the split "dev", which counts as val' in out


def test_a_person_of_train_that_is_tested_too_is_noted(tmp_path, capsys):
    assert main(own_file(tmp_path, ("anna", "train"), ("ben", "train"), ("anna", "test"))) == 0
    assert "1 persons of train stand in test too, which flatters its figures: anna" in capsys.readouterr().out


def test_a_mistyped_column_is_recognised(tmp_path, capsys):
    argv = own_file(tmp_path, ("anna", "train"))
    path = tmp_path / "own.csv"
    path.write_text(path.read_text().replace("caption,", "captoin,"))
    assert main(argv) == 2
    assert 'has no column "caption"' in (said := capsys.readouterr().err) and "is that captoin?" in said
