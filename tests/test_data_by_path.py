"""A data set by path: every form of the file says what the named sets' JSON says, and what is wrong with it
is one sentence. And the table of the named sets."""

import csv
import gzip
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from datasets import check
from datasets.annotations import Source, read_splits, source_of
from datasets.synthetic import make_dataset
from tests.children import only_run, progress_lines, words
from tests.conftest import load_script
from tests.tiny_run import make_run, missing
from utils.data_sets import DATA_SETS
from utils.errors import InputError
from utils.options import get_args, get_test_args

ROOT = Path(__file__).parent.parent
COLUMNS = ("image", "caption", "person", "split")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with one small drawn set of each name."""
    root = tmp_path_factory.mktemp("drawn")
    for name in DATA_SETS:
        make_dataset(root, name, 6, 2, 3, 2, size=(64, 32))
    return root


def records_of(root, name):
    row = DATA_SETS[name]
    own = {"image": row.path_key, "captions": "captions", "person": "id", "split": "split"}
    records = json.loads((root / name / row.files[0]).read_text())
    return [{key: record[name] for key, name in own.items()} for record in records]


def renamed(records, **names):
    return [{names.get(key, key): value for key, value in record.items()} for record in records]


def rows_of(records):
    """One row a caption."""
    return [
        {**record, "caption": caption} | {"note": "x,y", "id": number}
        for number, record in enumerate(records)
        for caption in record["captions"]
    ]


def write_table(path, rows, columns=COLUMNS, encoding="utf-8", **style):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", **style)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path, images=None, split=None, images_must_exist=True):
    given = SimpleNamespace(annotations=str(path), images=images and str(images), dataset_name="CUHK-PEDES")
    return read_splits(source_of(given, split), images_must_exist=images_must_exist)


def contents(splits):
    """What training and evaluation see."""
    return splits.train, splits.num_classes, *splits.by_name.values()


def single(records):
    return [{key: row[key] for key in COLUMNS} for row in rows_of(records)]


FORMS = {  # writes records to a folder, returns the file
    "JSON": lambda folder, records: write(folder / "my_set.json", json.dumps(records)),
    "JSON with file_path and id": lambda folder, records: write(
        folder / "my_set.json",
        json.dumps(
            renamed([{**r, "person": str(r["person"])} for r in records], image="file_path", person="id")
        ),
    ),
    "JSON with a byte order mark": lambda folder, records: write(
        folder / "my_set.json", b"\xef\xbb\xbf" + json.dumps(records).encode()
    ),
    "JSON lines": lambda folder, records: write(folder / "my_set.jsonl", lines(records)),
    "JSON lines, one a caption, CRLF, img_path and pid": lambda folder, records: write(
        folder / "my_set.jsonl",
        lines(renamed(single(records), image="img_path", person="pid")).replace("\n", "\r\n\r\n"),
    ),
    "CSV": lambda folder, records: write_table(folder / "my_set.csv", rows_of(records)),
    "CSV with line feeds and everything quoted": lambda folder, records: write_table(
        folder / "my_set.csv", rows_of(records), lineterminator="\n", quoting=csv.QUOTE_ALL
    ),
    "CSV with a byte order mark, other columns and another order": lambda folder, records: write_table(
        folder / "my_set.CSV",
        rows_of(records),
        ("id", "split", "note", "person", "caption", "image"),
        encoding="utf-8-sig",
    ),
    "TSV": lambda folder, records: write_table(folder / "my_set.tsv", rows_of(records), delimiter="\t"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", DATA_SETS)
def test_each_form_says_what_the_named_set_says(name, form, drawn, tmp_path):
    path = form(tmp_path, records_of(drawn, name))
    splits = read(path, drawn / name / "imgs")
    assert contents(splits) == contents(read_splits(name, drawn))
    assert splits.name == "my_set" and len(splits.train) >= 12


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_file_of_a_named_set_can_be_given_by_path(name, drawn):
    path = drawn / name / DATA_SETS[name].files[0]
    assert contents(read(path, drawn / name / "imgs")) == contents(read_splits(name, drawn))


# ---- what a file may say ----


def entry(image="a.jpg", caption="a man in red", person=1, split="train"):
    return {"image": image, "caption": caption, "person": person, "split": split}


def read_rows(tmp_path, rows, split=None, columns=COLUMNS):
    path = write_table(tmp_path / "set.csv", rows, columns)
    return read(path, split=split, images_must_exist=False)


def test_a_caption_may_hold_commas_quotes_and_line_ends(tmp_path):
    captions = ['a man, in red, with a "bag"', "two\nlines", "two\r\nlines", "人 é 🧍", "  spaces "]
    splits = read_rows(tmp_path, [entry(caption=caption) for caption in captions])
    assert [sample.caption for sample in splits.train] == captions
    assert splits.train_split.image_paths == [str(tmp_path / "a.jpg")]


def test_rows_of_one_image_need_not_stand_together(tmp_path):
    splits = read_rows(tmp_path, [entry(), entry("b.jpg", "no bag", 2), entry(caption="a bag")])
    assert [(s.pid, s.image_id, s.caption) for s in splits.train] == [
        (0, 0, "a man in red"),
        (0, 0, "a bag"),
        (1, 1, "no bag"),
    ]


def test_an_image_without_a_caption_is_in_the_gallery(tmp_path):
    splits = read_rows(tmp_path, [entry(split="test"), entry("b.jpg", " ", 2, "test")])
    assert splits.test.image_pids == [1, 2] and splits.test.caption_pids == [1]


def test_persons_are_numbered_in_order_numbers_before_texts(tmp_path):
    people = ["anna", "10", "9", "007", "Zoe", "1e3", "10"]
    splits = read_rows(tmp_path, [entry(f"{i}.jpg", person=person) for i, person in enumerate(people)])
    order = ["7", "9", "10", "1e3", "Zoe", "anna"]
    assert splits.train_split.image_pids == [order.index(str(int(p)) if p.isdigit() else p) for p in people]
    assert splits.num_classes == 6
    assert splits.person("train", 5) == "anna" and splits.person("train", 0) == 7


def test_persons_of_other_splits_keep_whole_numbers_and_texts_are_numbered(tmp_path):
    kept = read_rows(tmp_path, [entry(person=p, split="test") for p in (40, 7, -3)])
    assert kept.test.image_pids == [40, 7, -3]
    people = [("x", "test"), ("12", "val"), ("y", "val"), ("x", "val"), ("x", "train")]
    splits = read_rows(tmp_path, [entry(f"{i}.jpg", person=p, split=s) for i, (p, s) in enumerate(people)])
    assert splits.test.image_pids == [1] and splits.val.image_pids == [0, 2, 1]
    assert splits.train_split.image_pids == [0] and splits.person("val", 2) == "y"


@pytest.mark.parametrize("person", [10**30, 1.5, "9" * 400])
def test_a_number_that_is_no_id_for_pytorch_is_a_text(person, tmp_path):
    path = write(tmp_path / "set.json", json.dumps([entry(person=person, split="test"), entry(person=3)]))
    splits = read(path, images_must_exist=False)
    assert splits.test.image_pids == [0] and splits.person("test", 0) == str(person)


def test_the_log_says_how_many_persons_and_which_splits_count_as_val(tmp_path, caplog):
    rows = [entry(), entry("b.jpg", person="x", split="Query"), entry("c.jpg", person="y", split=" TEST ")]
    with caplog.at_level(logging.INFO, "IRRA.dataset"):
        splits = read_rows(tmp_path, rows)
    assert len(splits.test.image_pids) == len(splits.val.image_pids) == 1
    assert (
        "1 training persons are numbered 0..0, 2 persons of the other splits are numbered 0..1" in caplog.text
    )
    assert 'the split "query" (1 images) counts as val' in caplog.text


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_a_file_without_a_split_is_all_of_the_split_that_is_told(split, tmp_path):
    rows = [entry(person="x"), entry("b.jpg", person="y")]
    splits = read_rows(tmp_path, rows, split, ("person", "image", "caption"))
    assert {name: len(s.captions) for name, s in splits.by_name.items()} == {
        **dict.fromkeys(("train", "test", "val"), 0),
        split: 2,
    }


# ---- what is wrong is one sentence ----

HEADER = "image,caption,person,split\n"
TABLES = {  # rows below the header, what the sentence says
    "an unquoted comma": ("a.jpg,x,1,train\nb.jpg,x, y,1,train\n", "line 3 has 5 fields and"),
    "a quote left open": ('a.jpg,"x\ny,1,train\n', "line 2 cannot be read as a row"),
    "quotes in a field": ('a.jpg,"red" shoes,1,train\n', "line 2 cannot be read as a row"),
    "the line where a row begins": ('a.jpg,"x\ny",1,train\n/b.jpg,x,1,train\n', "line 4: image"),
    "no row": ("\n,,,\n", "holds no record"),
    "an empty image": (",x,1,train\n", "line 2: image must be the path of an image"),
    "an empty person": ("a.jpg,x, ,train\n", "line 2: person must be a number or a text"),
    "an empty split": ("a.jpg,x,1,\n", "line 2: split is empty: write train, val or test"),
    "an absolute path": ("/etc/passwd,x,1,train\n", "line 2: image '/etc/passwd' leaves"),
    "a path upwards": ("x/../../a.jpg,x,1,train\n", "leaves the image folder"),
    "UTF-16": ((HEADER + "a.jpg,x,1,train\n").encode("utf-16"), "it is text in UTF-16"),
    "Latin-1": ((HEADER + "a.jpg,é,1,train\n").encode("latin-1"), "it is not text in UTF-8"),
    "a workbook": (b"PK\3\4" + bytes(99), "it is an Excel workbook or a zip: save"),
    "no line": (b"", "is empty: its first line names the columns image, caption, person, split"),
    "no person": (b"image,caption,split\n", 'no column "person" (it has image, caption,'),
    "semicolons": (b"image;caption;person;split\n", "with commas between them"),
    "a column twice": (b"image,caption,Caption,person\n", 'line 1 names the column "caption" twice'),
    "no split": (b"image,caption,person\na.jpg,x,1\n", 'no column "split" (it has image, caption, person)'),
}
RECORD = {"image": "a.jpg", "captions": ["x"], "id": 1, "split": "test"}
RECORDS = {  # what is changed of that, ... to take a key out; what the sentence says
    "no split": ({"split": ...}, 'no key "split" (it has image'),
    "no image": (
        {"image": ..., "picture": "a.jpg"},
        'record 0 has no key "image" or "file_path" or "img_path" (it has captions, id, split, picture)',
    ),
    "captions as a sentence": ({"captions": "x"}, "0: captions must be a list of sentences, not 'x'"),
    "a number among captions": ({"captions": ["x", 7]}, "captions must be a list of sentences, and holds 7"),
    "a caption as a list": ({"captions": ..., "caption": ["x"]}, "caption must be a sentence, not ['x']"),
    "a person that is true": ({"person": True}, "record 0: person must be a number or a text, not True"),
    "a person that is no number": ({"id": math.nan}, "record 0: id must be a number or a text, not nan"),
    "a person that is null": ({"id": ..., "pid": None}, "0: pid must be a number or a text, not None"),
}
BAD = {  # file name, contents, what the sentence says
    "too few fields": ("a.tsv", "image\tcaption\tperson\na.jpg\tx\n", "line 2 has 2 fields and the header 3"),
    "a split for some": (
        "a.jsonl",
        lines([RECORD, {"image": "b", "caption": "x", "id": 1}]),
        'line 2 has no key "split" (it has image, caption, id), but other records have',
    ),
    "gzip": ("a.json", gzip.compress(b"[]"), "it is packed by gzip: unpack it first"),
    "a pointer": ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html>", "it is a web page saved under this name"),
    "another suffix": ("a.txt", HEADER, "the suffix says how to read it, and must be one of .json, .jsonl,"),
    "JSON lines called JSON": ("a.json", '{"a": 1}\n{"a": 2}\n', "JSON lines are named .jsonl"),
    "half a line": ("a.jsonl", '{"image": "a"', "line 1 is not JSON"),
    "a line that is no record": ("a.jsonl", "[1]\n", "line 1 is a list, not a record with the keys image,"),
    "an empty file of lines": ("a.jsonl", "\n \n", "holds no record"),
}
for kind, (rows, says) in TABLES.items():
    BAD[f"table, {kind}"] = ("a.csv", rows if isinstance(rows, bytes) else HEADER + rows, says)
for kind, (change, says) in RECORDS.items():
    record = {key: value for key, value in {**RECORD, **change}.items() if value is not ...}
    BAD[f"record, {kind}"] = ("a.json", json.dumps([record]), says)


def complaint_of(main, argv, capsys):
    """The one sentence that a program ends in."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("name, text, says", BAD.values(), ids=BAD)
def test_a_bad_file_is_one_sentence_that_names_file_and_place(name, text, says, tmp_path, capsys):
    path = write(tmp_path / name, text)
    line = complaint_of(check.main, ["--annotations", path], capsys)
    assert says in line and str(path) in line


def test_a_file_or_folder_that_is_not_there_is_named_with_its_neighbours(tmp_path, capsys):
    write(tmp_path / "right.csv", HEADER)
    line = complaint_of(check.main, ["--annotations", tmp_path / "wrong.csv"], capsys)
    assert (
        f"no annotation file at --annotations {tmp_path / 'wrong.csv'} (that folder holds right.csv)" in line
    )
    line = complaint_of(check.main, ["--annotations", tmp_path / "no" / "wrong.csv"], capsys)
    assert f"there is no folder {tmp_path / 'no'}" in line
    line = complaint_of(check.main, ["--annotations", tmp_path], capsys)
    assert "that is a folder" in line
    argv = ["--annotations", tmp_path / "right.csv", "--images", tmp_path / "no"]
    assert f"no folder --images {tmp_path / 'no'}" in complaint_of(check.main, argv, capsys)


def test_missing_images_ask_for_the_folder(tmp_path):
    path = write_table(tmp_path / "set.csv", [entry(), entry("x/b.jpg")])
    with pytest.raises(
        InputError, match="2 images are missing, the first is .*is --images .* where the paths"
    ):
        read(path)


def test_images_without_annotations_are_refused_everywhere(tmp_path, capsys, train_script, test_script):
    says = f"--images {tmp_path} goes with --annotations FILE"
    assert says in complaint_of(check.main, ["--images", tmp_path], capsys)
    assert says in complaint_of(train_script.main, ["--images", tmp_path], capsys)
    write(tmp_path / "configs.yaml", "loss_names: sdm\ndataset_name: RSTPReid\n")
    argv = ["--config_file", tmp_path, "--images", tmp_path]
    assert says in complaint_of(test_script.main, argv, capsys)
    assert says in complaint_of(load_script("search").main, [*argv, "--split", "test"], capsys)


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([entry()], ("image", "caption", "person"), 'has no column "split" (it has image, caption, person)'),
        ([entry()], COLUMNS, "has no images in the test split: choose another one with --val_dataset"),
        ([entry(split="test")], COLUMNS, "has no captions in the train split: there is nothing to train on"),
        ([entry(), entry(caption="", split="test")], COLUMNS, "has no captions in the test split"),
    ],
)
def test_a_training_says_what_is_missing(rows, columns, says, tmp_path, capsys, train_script):
    path = write_table(tmp_path / "set.csv", rows, columns)
    write(tmp_path / "a.jpg", b"")
    argv = words(tmp_path, tmp_path / "logs", "--annotations", path, epochs=1)
    line = complaint_of(train_script.main, argv, capsys)
    assert says in line and str(path) in line and not (tmp_path / "logs").exists()


# ---- the programs ----


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory, train_script):
    """Two trainings of an epoch, of the named set and of the same by path; the CSV lies elsewhere."""
    home = tmp_path_factory.mktemp("trained")
    write_table(home / "persons.csv", rows_of(records_of(drawn, "RSTPReid")))
    by_path = ["--annotations", home / "persons.csv", "--images", drawn / "RSTPReid" / "imgs"]
    named = words(drawn, home / "named", "--dataset_name", "RSTPReid", epochs=1)
    assert train_script.main(named) == 0
    argv = words("nowhere", home / "logs", *map(str, by_path), "--dataset_name", "ICFG-PEDES", epochs=1)
    assert train_script.main(argv) == 0
    return home


def figures(run, name="results.json"):
    results = json.loads((run / name).read_text())
    return results.pop("dataset_name"), {key: results[key] for key in ("t2i", "queries", "gallery")}


def test_a_training_by_path_is_that_of_the_named_set(trained):
    named, run = only_run(trained / "named"), only_run(trained / "logs")
    assert run.parent.name == "persons" and progress_lines(run) == progress_lines(named) != []
    log = (run / "train_log.txt").read_text()
    assert "6 training persons are numbered 0..5, 5 persons of the other splits keep their ids" in log
    assert "--dataset_name ICFG-PEDES is ignored: the data set is --annotations" in log
    assert "is ignored" not in (named / "train_log.txt").read_text()


def test_a_run_is_tested_from_another_folder(trained, drawn, tmp_path, monkeypatch, test_script):
    named, run = only_run(trained / "named"), only_run(trained / "logs")
    monkeypatch.chdir(tmp_path)
    argv = ["--device", "cpu", "--num_workers", "0"]
    assert test_script.main(["--config_file", str(named), *argv]) == 0
    assert test_script.main(["--config_file", str(run), *argv]) == 0
    assert figures(run) == ("persons", figures(named)[1])

    argv += ["--config_file", str(run), "--dataset_name", "RSTPReid", "--root_dir", str(drawn)]
    assert test_script.main(argv) == 0
    assert figures(run, "results_RSTPReid_test.json") == figures(named)


def test_a_named_run_is_tested_on_a_file_without_a_split(trained, drawn, tmp_path, test_script):
    run = only_run(trained / "named")
    of_val = [record for record in records_of(drawn, "RSTPReid") if record["split"] == "val"]
    path = write_table(drawn / "RSTPReid" / "imgs" / "street.csv", rows_of(of_val), COLUMNS[:3])
    argv = ["--config_file", str(run), "--device", "cpu", "--num_workers", "0"]
    assert test_script.main([*argv, "--split", "val"]) == 0
    assert test_script.main([*argv, "--annotations", str(path)]) == 0
    by_path = figures(run, "results_street_test.json")
    assert by_path == ("street", figures(run, "results_RSTPReid_val.json")[1])


def test_a_run_by_path_is_resumed_by_the_name_of_its_file(trained, capfd, monkeypatch, train_script):
    run = only_run(trained / "logs")
    monkeypatch.chdir(trained)
    argv = ["--resume", "--output_dir", "logs", "--annotations", "persons.csv"]
    assert train_script.main(argv) == 0
    out = capfd.readouterr().out
    assert f"logs/persons/{run.name}/last.pth has all 1 epochs: nothing is left to do" in out
    assert " before and is " not in out


def test_the_run_keeps_its_data_set_whole_and_absolute(tmp_path, monkeypatch, trained):
    stored = yaml.safe_load((only_run(trained / "logs") / "configs.yaml").read_text())
    assert stored["annotations"] == str(trained / "persons.csv") and Path(stored["images"]).is_absolute()
    monkeypatch.chdir(tmp_path)
    configs = str(write(tmp_path / "configs.yaml", yaml.safe_dump(stored)))

    def chosen(get, *typed):
        args = get(["--config_file", configs, *typed])
        return args.annotations, args.images, args.dataset_name

    for get in (get_args, get_test_args):
        assert chosen(get) == (stored["annotations"], stored["images"], "ICFG-PEDES")
        assert chosen(get, "--dataset_name", "CUHK-PEDES") == (None, None, "CUHK-PEDES")
        assert chosen(get, "--annotations", "b.csv")[:2] == (str(tmp_path / "b.csv"), None)
        assert chosen(get, "--annotations", stored["annotations"])[1] == stored["images"]
        assert chosen(get, "--images", "c")[:2] == (stored["annotations"], str(tmp_path / "c"))


def test_a_path_in_a_config_file_that_is_no_text_is_no_traceback(tmp_path, capsys, train_script):
    config = write(tmp_path / "config.yaml", "annotations: 7")
    line = complaint_of(train_script.main, ["--config_file", config], capsys)
    assert f"no annotation file at --annotations {Path.cwd() / '7'}" in line


@missing("faiss", "faiss-cpu")
def test_search_and_pictures_of_a_split_by_path_are_those_of_the_named_set(tmp_path, capsys):
    run = make_run(tmp_path)
    records = records_of(tmp_path / "data", "CUHK-PEDES")
    path = write_table(
        tmp_path / "set.csv", rows_of([r for r in records if r["split"] == "test"]), COLUMNS[:3]
    )
    by_path = ["--annotations", path, "--images", tmp_path / "data" / "CUHK-PEDES" / "imgs"]
    model = ["--config_file", run, "--device", "cpu"]
    answers, drawings = [], []
    for more in ([], by_path):
        argv = [*model, "--split", "test", "--json", "--query", "a red coat", *more]
        assert load_script("search").main([str(word) for word in argv]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    for more in ([], by_path):
        argv = [*model, "--queries", "0,5", *more]
        assert load_script("visualize").main([str(word) for word in argv]) == 0
        drawings.append({path.name: path.read_bytes() for path in (run / "pictures").iterdir()})
    assert drawings[0] == drawings[1] and len(drawings[0]) == 2
    assert answers[0] == answers[1] and len(answers[0][0]["results"]) == 10
    assert len(list((run / "search").glob("test-*"))) == 2


def test_the_check_takes_a_file(drawn, tmp_path, capsys):
    images = drawn / "RSTPReid" / "imgs"
    rows = rows_of([{**r, "person": f"p{r['person']}"} for r in records_of(drawn, "RSTPReid")])
    path = write_table(tmp_path / "RSTPReid.csv", rows)  # the name of a named set makes it none
    assert check.main(["--annotations", str(path), "--images", str(images), "--decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}\n") and "0 faults, 0 notes; every image decoded" in out

    rows[0]["caption"] = "12 !?"
    write_table(path, rows)
    assert check.main(["--annotations", str(path), "--images", str(images)]) == 1
    assert '"12 !?" (person p0 of train)' in capsys.readouterr().out

    write_table(path, rows[1:], COLUMNS[:3])
    argv = ["--annotations", str(path), "--images", str(images), "--dataset_name", "RSTPReid"]
    assert check.main([*argv, "--split", "val"]) == 0
    said = capsys.readouterr()
    assert "--dataset_name RSTPReid is ignored" in said.err and "| train  |  0  |" in said.out

    assert check.main(["--annotations", str(path), "--split", "test"]) == 1
    assert "a folder that does not exist" not in (out := capsys.readouterr().out)
    assert f"is --images {tmp_path} where the paths in {path} start?" in out


# ---- the table of named sets ----


def test_a_row_without_published_counts_can_be_checked(drawn):
    row = DATA_SETS["RSTPReid"]._replace(published=None)
    folder = drawn / "RSTPReid"
    source = Source("MySet", folder / row.files[0], folder / "imgs", row)
    _, findings = check.check_dataset(source)
    assert findings == []


def test_files_and_addresses_of_the_named_sets_stand_in_one_place():
    facts = [fact for row in DATA_SETS.values() for fact in (*row.files, row.offer, row.raw_file) if fact]
    for path in ROOT.rglob("*.py"):
        if {"tests", ".venv"} & {*path.relative_to(ROOT).parts} or path.name == "data_sets.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not [fact for fact in facts if fact in text], path


def is_there(name, root_dir, *more):
    """`python -m utils.data_sets …` with nothing but the standard library: (status, stderr)."""
    flags = ["--dataset_name", "CUHK-PEDES", f"--dataset_name={name}", "--root_dir", str(root_dir), *more]
    command = [sys.executable, "-S", "-m", "utils.data_sets", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_data_set_that_is_there_and_a_name_without_a_row_are_passed_in_silence(drawn, tmp_path):
    assert is_there("RSTPReid", drawn) == (0, "")
    assert is_there("Market", tmp_path) == (0, "")
    assert is_there("RSTPReid", tmp_path, "--annotations", "mine.csv", "--lr", "1") == (0, "")


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_is_missing_is_said_before_anything_is_installed(name, tmp_path):
    row, folder = DATA_SETS[name], tmp_path / name
    status, said = is_there(name, tmp_path / "no")
    assert status == 2 and f"({tmp_path / 'no'} does not exist, seen from {ROOT})" in said
    status, said = is_there(name, tmp_path)
    files = " or ".join(str(folder / file) for file in row.files)
    assert status == 2 and said == (
        f"error: {name}: no annotation file at {files}, "
        f"and no folder {folder}/imgs: its images belong there. "
        f"Is --root_dir right? It is the folder that holds {name}/, which its authors offer at {row.offer}; "
        "./run_irra.sh demo needs none\n"
    )

    folder.mkdir()
    write(folder / "README.md", "")
    write(folder / row.files[-1], "[]")
    status, said = is_there(name, tmp_path)
    there = ", ".join(sorted([row.files[-1], "README.md"]))
    assert status == 2 and "no annotation file" not in said
    assert f"no folder {folder}/imgs: its images belong there ({folder} holds {there})." in said
    (folder / "imgs").mkdir()
    assert is_there(name, tmp_path) == (0, "")
