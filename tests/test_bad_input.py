"""Damaged inputs through the real entry points: each trains correctly or ends in one sentence that names the
file, exit status 2; no traceback, nothing over 10 s, and no code of a file ever runs."""

import argparse
import io
import json
import os
import pickle
import random
import re
import time
import zipfile
import zlib
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import save as safetensors_bytes

from datasets import check
from datasets.synthetic import make_dataset
from datasets.transforms import read_image
from retrieval.encoders import open_picture
from tests.children import ARCHITECTURE, words
from utils.checkpoint import load_checkpoint
from utils.errors import InputError

GENERATED = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture
def tried(capfd):
    """tried(main, argv, *named): run a main and hold it to what this file promises.

    named: what the sentence must hold when there is one, the file above all. Gives status, err and out.
    """

    def run(main, argv, *named):
        capfd.readouterr()
        began = time.process_time()
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:  # options are read by argparse
            status = end.code
        assert time.process_time() - began < 10
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err, err
        assert status in (0, 1 if main is check.main else 0, 2), (status, err)
        lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
        assert len(lines) == (status == 2), err
        if status == 2:
            assert re.match(r"error: \S.{15,}", lines[0]) and len(lines[0]) < 1000, err
            for text in named:
                assert str(text) in lines[0], lines[0]
        return SimpleNamespace(status=status, err=err, out=out)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    make_dataset(root, train_ids=2, val_ids=1, test_ids=2, images_per_id=2, size=(64, 32))
    return root


def one_step(root, logs, *more):
    """Words of a training of one batch, with an evaluation."""
    return words(root, logs, "--batch_size", "4", *more, epochs=1)


def one_step_from(weights, root, logs):
    """The same, from a file of weights, which says its architecture itself."""
    argv = one_step(root, logs, "--pretrain_choice", weights)
    first = argv.index("--clip_architecture")
    return argv[:first] + argv[first + 1 + len(ARCHITECTURE) :]


@pytest.fixture(scope="module")
def finished(data, train_script, tmp_path_factory):
    """A run folder, to resume and to damage."""
    logs = tmp_path_factory.mktemp("logs")
    assert train_script.main(one_step(data, logs)) == 0
    (folder,) = logs.glob("*/*")
    return folder


@pytest.fixture
def resumed(finished, tmp_path):
    """resumed(contents): words that go on with a run like `finished` whose last.pth, in tmp_path, is this."""

    def words_of(contents):
        (tmp_path / "configs.yaml").write_bytes((finished / "configs.yaml").read_bytes())
        (tmp_path / "last.pth").write_bytes(contents)
        return ["--resume", "--resume_ckpt_file", tmp_path / "last.pth", "--num_epoch", "2"]

    return words_of


# ---- annotations ----


def write_set(folder, records):
    """A CUHK-PEDES folder whose images are one picture; records: an object or the file's text or bytes."""
    images = folder / "CUHK-PEDES" / "imgs"
    images.mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        if not (images / name).exists():
            Image.effect_noise((32, 64), 50).convert("RGB").save(images / name)
    path = images.parent / "reid_raw.json"
    if not isinstance(records, (str, bytes)):
        records = json.dumps(records)
    path.write_bytes(records if isinstance(records, bytes) else records.encode("utf-8"))
    return path


def record(**changes):
    return {"split": "train", "id": 1, "file_path": "a.jpg", "captions": ["a man in red"], **changes}


SOUND = [
    record(),
    record(id=2, file_path="b.jpg"),
    record(id=7, split="test", file_path="c.jpg"),
    record(split="val"),
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("split", "id", "file_path", "captions")


def damaged(changes):
    """Sound records but for one, which is replaced or loses and changes keys."""
    place, how, dropped, value, key = changes
    records = [dict(one) for one in SOUND]
    if how == "replace":
        records[place] = value
    elif how == "drop":
        records[place].pop(dropped)
    else:
        records[place][key] = value
    return records


changed = st.tuples(
    st.integers(0, 3),
    st.sampled_from(("replace", "drop", "change", "change", "change")),
    st.sampled_from(KEYS),
    anything,
    st.sampled_from(KEYS),
)


@GENERATED
@hypothesis.given(changes=changed)
def test_generated_records(changes, tried, train_script, tmp_path_factory):
    """Through the check, which reads as training does; what it finds sound is of the right types."""
    root = tmp_path_factory.getbasetemp() / "generated"
    records = damaged(changes)
    path = write_set(root, records)
    argv = ["--dataset_name", "CUHK-PEDES", "--root_dir", root]
    outcome = tried(check.main, argv, "reid_raw.json")
    if outcome.status != 2:
        assert all(isinstance(one, dict) and set(KEYS) <= set(one) for one in records)
        assert all(isinstance(text, str) for one in records for text in one["captions"])
    elif " record " in outcome.err:
        assert f"{path}, record {changes[0]}" in outcome.err


@GENERATED
@hypothesis.given(value=anything, key=st.sampled_from(KEYS), place=st.integers(0, 3))
def test_generated_values_never_reach_training(value, key, place, tried, train_script, tmp_path_factory):
    """Through train.py; a value of the key's own type belongs to the next test, which trains."""
    kinds = {"split": str, "id": (int, str), "file_path": str, "captions": list}
    hypothesis.assume(not isinstance(value, kinds[key]) or isinstance(value, bool))
    base = tmp_path_factory.getbasetemp()
    records = [dict(one) for one in SOUND]
    records[place][key] = value
    path = write_set(base / "generated", records)
    argv = one_step(base / "generated", base / "never")
    outcome = tried(train_script.main, argv, f"{path}, record {place}")
    assert outcome.status == 2 and not (base / "never").exists()


ODD_RECORDS = {  # file contents, and what the sentence says, or None where it trains
    "a sound set": (SOUND, None),
    "the id as a word": ([record(id="1"), *SOUND[1:]], None),
    "odd letters": ([record(captions=["人 \u202e \x00 ﷽ 🧍‍♀️ é\ud800"]), *SOUND[1:]], None),
    "special words": ([record(captions=["<|endoftext|> <|mask|> <|startoftext|>"]), *SOUND[1:]], None),
    "an empty caption": ([record(captions=[""]), *SOUND[1:]], None),
    "a caption of a megabyte": ([record(captions=["red shoes " * 100_000]), *SOUND[1:]], None),
    "one word of 20000 letters": ([record(captions=["x" * 20_000]), *SOUND[1:]], None),
    "no captions for one image": ([*SOUND, record(captions=[], file_path="c.jpg")], None),
    "unknown keys": ([record(processed_tokens=[["a"]], extra=None), *SOUND[1:]], None),
    "other splits are val": ([*SOUND, record(split="😀", id=99)], None),
    "a gap in the ids": (
        [*SOUND, record(id=5)],
        "training ids must be 1..5 without a gap, but 2 are missing",
    ),
    "an id of a billion": ([*SOUND, record(id=10**9)], "training ids must be 1..1000000000 without a gap"),
    "an id of 30 digits": ([*SOUND, record(id=10**30)], "record 4: id must be a whole number of at most 18"),
    "an id of 5000 digits": ('[{"split":"train","id":' + "9" * 5000 + "}]", "reid_raw.json"),
    "a word of 5000 digits": ([*SOUND, record(id="9" * 5000)], "record 4: id must be a whole number"),
    "a negative id": ([record(id=-5), *SOUND[1:]], "training ids must be"),
    "an id of 0": ([record(id=0), *SOUND[1:]], "training ids must be"),
    "a test id of 30 digits": ([*SOUND, record(id=10**30, split="test")], "record 4"),
    "id true": (
        [record(id=True), *SOUND[1:]],
        "record 0: id must be a whole number of at most 18 digits, not True",
    ),
    "id 1.0": (
        [record(id=1.0), *SOUND[1:]],
        "record 0: id must be a whole number of at most 18 digits, not 1.0",
    ),
    "id NaN": ('[{"split":"train","id":NaN,"file_path":"a.jpg","captions":[]}]', "record 0: id must be"),
    "captions as one sentence": ([record(captions="a man"), *SOUND[1:]], "record 0: captions must be a list"),
    "captions of words": ([record(captions=[["a", "man"]]), *SOUND[1:]], "record 0: captions must be a list"),
    "a path upwards": ([record(file_path="../a.jpg"), *SOUND[1:]], "record 0: file_path '../a.jpg' leaves"),
    "a path upwards within": ([record(file_path="x/../../a.jpg"), *SOUND[1:]], "leaves the image folder"),
    "an absolute path": ([record(file_path="/etc/passwd"), *SOUND[1:]], "leaves the image folder"),
    "a zero in the path": ([record(file_path="a\0.jpg"), *SOUND[1:]], "leaves the image folder"),
    "a lone surrogate in the path": ([record(file_path="\ud800.jpg"), *SOUND[1:]], "1 image is missing"),
    "a line end in a key": ([{"a\r\nb": 1}, *SOUND[1:]], 'record 0 has no key "split" (it has a\\r\\nb)'),
    "a terminal's control sequence in a path": (
        [record(file_path="\x1b[2J.jpg"), *SOUND[1:]],
        "\\x1b[2J.jpg; 1 in imgs",
    ),
    "a path of 5000 letters": ([record(file_path="a" * 5000), *SOUND[1:]], "1 image is missing"),
    "a path of 5000 folders": ([record(file_path="a/" * 5000 + "a.jpg"), *SOUND[1:]], "1 image is missing"),
    "the folder itself": ([record(file_path="."), *SOUND[1:]], "1 image is missing"),
    "no train split": ([record(split="test"), record(split="val")], "has no captions in the train split"),
    "no test split": ([record(), record(id=2)], "has no images in the test split"),
    "no query": ([*SOUND[:2], record(split="test", captions=[])], "has no captions in the test split"),
    "nothing": ("", "is not JSON"),
    "blanks": (" \n", "is not JSON"),
    "an empty list": ("[]", "must hold a list of records, but holds an empty list"),
    "a mapping": ('{"train": []}', "must hold a list of records, but holds a dict of train: put all"),
    "null": ("null", "must hold a list of records"),
    "a list of lists": ("[[1, 2]]", "record 0 is a list, not a record"),
    "half": (json.dumps(SOUND)[:-20], "is not JSON"),
    "two lists": ("[][]", "is not JSON"),
    "a million brackets": ("[" * 1_000_000, "reid_raw.json"),
    "UTF-16": (json.dumps(SOUND).encode("utf-16"), "it is text in UTF-16"),
    "Latin-1": ('[{"split": "é"}]'.encode("latin-1"), "it is not text"),
    "random bytes": (random.Random(0).randbytes(1000), "reid_raw.json"),
}


@pytest.mark.parametrize("contents, says", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_odd_annotations(contents, says, tried, train_script, tmp_path):
    write_set(tmp_path, contents)
    argv = words(tmp_path, tmp_path / "logs", "--batch_size", "2", epochs=1)
    outcome = tried(train_script.main, argv, says or "")
    assert outcome.status == (2 if says else 0)
    assert bool(list(tmp_path.glob("logs/*/*/best.pth"))) == (not says)


# ---- images ----


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ramp(dtype, top):
    return (np.linspace(0, 1, 64 * 32).reshape(64, 32) * top).astype(dtype)


PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 4, 3), dtype=np.uint8)).resize(
    (32, 64)
)
FRAMES = [PICTURE.rotate(90 * turn) for turn in range(3)]


def bomb(side):
    """A PNG of a kilobyte whose header promises side x side pixels."""
    data = bytearray(encoded(PICTURE, "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


SOUND_IMAGES = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "PNG": encoded(PICTURE, "PNG"),
    "CMYK JPEG": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "grey": encoded(PICTURE.convert("L"), "JPEG"),
    "one bit": encoded(PICTURE.convert("1"), "PNG"),
    "palette": encoded(PICTURE.convert("P"), "PNG"),
    "palette with a transparent colour": encoded(PICTURE.convert("P"), "PNG", transparency=bytes([0, 128])),
    "with alpha": encoded(PICTURE.convert("RGBA"), "PNG"),
    "grey with alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "16 bit": encoded(Image.fromarray(ramp(np.uint16, 65535)), "PNG"),
    "32 bit": encoded(Image.fromarray(ramp(np.int32, 65535)), "TIFF"),
    "floats": encoded(Image.fromarray(ramp(np.float32, 255)), "TIFF"),
    "CMYK TIFF": encoded(PICTURE.convert("CMYK"), "TIFF"),
    "Lab": encoded(PICTURE.convert("LAB"), "TIFF"),
    "animated GIF": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated PNG": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "animated WebP": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "one pixel": encoded(PICTURE.resize((1, 1)), "PNG"),
    "one column": encoded(PICTURE.resize((1, 500)), "JPEG"),
    "large": encoded(PICTURE.resize((3000, 4000)), "JPEG"),
    "more than PIL's warning": encoded(Image.new("1", (10_000, 10_000)), "PNG"),
    "turned by EXIF": encoded(PICTURE, "JPEG", exif=Image.Exif()),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "bytes after the end": encoded(PICTURE, "JPEG") + b"more" * 100,
}
BROKEN_IMAGES = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"This is not a picture.\n",
    "a page of a server": b"<!DOCTYPE html><html><body>404</body></html>",
    "random": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "an archive": b"PK\x03\x04" + bytes(100),
    "a git pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "a bomb of 10^9 pixels": bomb(31_623),
    "a bomb of 10^18 pixels": bomb(10**9),
    "a header of 0 x 0": bomb(0),
}
for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
    whole = encoded(PICTURE, name)
    for share in (0.02, 0.1, 0.5, 0.9):
        BROKEN_IMAGES[f"{name}, {share:.0%} of it"] = whole[: int(len(whole) * share)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A set whose every image is one of SOUND_IMAGES."""
    root = tmp_path_factory.mktemp("pictures")
    images = root / "CUHK-PEDES" / "imgs"
    images.mkdir(parents=True)
    records = []
    for number, data in enumerate(SOUND_IMAGES.values()):
        (images / f"{number}.jpg").write_bytes(data)  # the suffix says nothing
        records.append(record(id=number + 1, file_path=f"{number}.jpg"))
        records.append(record(id=number + 1, file_path=f"{number}.jpg", split="test"))
    (root / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(records))
    return root


def test_odd_images_train(pictures, tried, train_script, tmp_path):
    """All in one training, and each decodes to the picture that it shows."""
    argv = words(pictures, tmp_path, "--batch_size", "8", epochs=1)
    assert tried(train_script.main, argv).status == 0
    shown = {
        name: np.asarray(
            read_image(pictures / "CUHK-PEDES" / "imgs" / f"{number}.jpg").resize((32, 64)), float
        )
        for number, name in enumerate(SOUND_IMAGES)
    }
    expected = np.asarray(PICTURE, float)
    for name in ("PNG", "with alpha", "animated PNG"):
        assert (shown[name] == expected).all(), name
    for name in ("JPEG", "CMYK JPEG", "CMYK TIFF", "progressive", "bytes after the end"):
        assert np.corrcoef(shown[name].ravel(), expected.ravel())[0, 1] > 0.9, name


def test_sixteen_bits_become_eight(pictures):
    number = list(SOUND_IMAGES).index("16 bit")
    shown = np.asarray(read_image(pictures / "CUHK-PEDES" / "imgs" / f"{number}.jpg"), float)
    assert np.abs(shown[:, :, 0] - ramp(float, 255)).max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["empty", "JPEG, 50% of it"])
def test_a_broken_image_ends_a_training(name, workers, data, tried, train_script, tmp_path):
    """With loading processes too, whose errors PyTorch wraps in a traceback."""
    write_set(tmp_path, SOUND)
    image = tmp_path / "CUHK-PEDES" / "imgs" / "a.jpg"
    image.write_bytes(BROKEN_IMAGES[name])
    argv = words(tmp_path, tmp_path / "logs", "--batch_size", "2", "--num_workers", workers, epochs=1)
    outcome = tried(train_script.main, argv, f"the image {image} cannot be read (")
    assert outcome.status == 2 and "replace it or take its record out" in outcome.err
    (last,) = tmp_path.glob("logs/*/*/last.pth")
    assert load_checkpoint(last)["epoch"] == 0


def test_a_broken_image_of_a_loading_process_has_its_traceback_with_debug(train_script, tmp_path, capfd):
    write_set(tmp_path, SOUND)
    (tmp_path / "CUHK-PEDES" / "imgs" / "a.jpg").write_bytes(b"")
    argv = words(tmp_path, tmp_path / "logs", "--batch_size", "2", "--num_workers", "1", "--debug", epochs=1)
    assert train_script.main([*argv]) == 2
    err = capfd.readouterr().err
    assert "in read_image" in err and err.splitlines()[-1].startswith("error: the image ")


def test_broken_images_are_found_by_the_check(tried, tmp_path):
    """Each decoded; those that hold no whole picture are named, none of them hangs or fills the memory."""
    path = write_set(tmp_path, SOUND)
    images = path.parent / "imgs"
    for number, contents in enumerate(BROKEN_IMAGES.values()):
        (images / f"{number}.jpg").write_bytes(contents)
    for first in range(0, len(BROKEN_IMAGES), 10):  # ten are named at a time
        numbers = range(first, min(first + 10, len(BROKEN_IMAGES)))
        path.write_text(json.dumps(SOUND + [record(split="val", file_path=f"{n}.jpg") for n in numbers]))
        argv = ["--dataset_name", "CUHK-PEDES", "--root_dir", tmp_path, "--decode"]
        outcome = tried(check.main, argv)
        assert outcome.status == 1
        for number in numbers:
            name = list(BROKEN_IMAGES)[number]
            assert f"the image {images}/{number}.jpg cannot be read (" in outcome.out, name


# ---- checkpoints ----


class Payload:
    """Unpickled by a careless reader, it makes the file of its name."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), contents)
    return buffer.getvalue()


SMALL = {"model": {"weight": torch.arange(4.0)}, "optimizer": {"state": {}, "param_groups": []}, "epoch": 1}
WHOLE, OLD = torch_bytes(SMALL), torch_bytes(SMALL, _use_new_zipfile_serialization=False)
FOREIGN = {  # none of them is a checkpoint of a run
    "empty": b"",
    "text": b"hello\n",
    "random": random.Random(1).randbytes(4096),
    "a page of a server": b"<html>404</html>",
    "a git pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "an empty zip": zipped(),
    "a zip of a text": zipped(readme="hello"),
    "a zip without tensors": zipped(archive__data_pkl=pickle.dumps({"model": {}}, protocol=2)),
    "a zip with a broken pickle": zipped(archive__data_pkl=b"\x80\x02}q", archive__version="3"),
    "a pickled list": pickle.dumps([1, 2]),
    "a pickled function": pickle.dumps(os.path.join),
    "a tensor": torch_bytes(torch.zeros(3)),
    "a list": torch_bytes([torch.zeros(3)]),
    "a bare state dict": torch_bytes(SMALL["model"]),
    "a model that is a tensor": torch_bytes({"model": torch.zeros(3)}),
    "no model": torch_bytes({"optimizer": {}}),
    "a model of None": torch_bytes({"model": None}),
    "safetensors": safetensors_bytes({"weight": torch.zeros(3)}),
    "a picture": SOUND_IMAGES["PNG"],
    "NumPy": b"\x93NUMPY\x01\x00",
    "another run's": WHOLE,
    "a number for an optimiser": torch_bytes({"model": {}, "optimizer": 3}),
    "groups that are a number": torch_bytes({"model": {}, "optimizer": {"param_groups": 3}}),
    "groups without parameters": torch_bytes({"model": {}, "optimizer": {"param_groups": [{}]}}),
    "a model of numbers": torch_bytes({"model": {1: 2}, "optimizer": {"param_groups": []}}),
    **{f"{share:.0%} of a zip": WHOLE[: int(len(WHOLE) * share)] for share in np.arange(0.02, 1, 0.03)},
    **{f"{share:.0%} of an old file": OLD[: int(len(OLD) * share)] for share in np.arange(0.02, 1, 0.07)},
}


@pytest.mark.parametrize("contents", FOREIGN.values(), ids=FOREIGN)
def test_foreign_and_truncated_checkpoints(contents, finished, resumed, tried, train_script, tmp_path):
    before, path = (finished / "last.pth").stat(), tmp_path / "last.pth"
    assert tried(train_script.main, resumed(contents), path).status == 2
    assert path.read_bytes() == contents and (finished / "last.pth").stat() == before


@pytest.mark.parametrize("contents", [b"", bytes(5000), WHOLE[:400], b"text that is no checkpoint"])
def test_of_a_damaged_checkpoint_is_told_what_lies_beside_it(contents, tmp_path):
    for name in ("best.pth", "epoch_003.pth", "last.pth"):
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError) as raised:
        load_checkpoint(tmp_path / "last.pth")
    assert str(raised.value).endswith(" (that folder holds best.pth, epoch_003.pth)")


def parts_of(finished):
    return torch.load(finished / "last.pth", weights_only=True)


ALTERED = {  # a run's own checkpoint with something wrong in it
    "a weight is missing": lambda state: state["model"].pop("base_model.token_embedding.weight"),
    "a weight too many": lambda state: state["model"].update(extra=torch.zeros(3)),
    "a weight of another shape": lambda state: state["model"].update(
        {"classifier.weight": torch.zeros(5, 64)}
    ),
    "a weight that is a word": lambda state: state["model"].update({"classifier.weight": "zeros"}),
    "no optimiser": lambda state: state.pop("optimizer"),
    "an optimiser of one group": lambda state: state["optimizer"]["param_groups"].__delitem__(slice(1, None)),
    "no schedule": lambda state: state.pop("scheduler"),
    "a schedule without its epoch": lambda state: state["scheduler"].clear(),
    "an epoch that is a word": lambda state: state.update(epoch="one"),
    "a moment of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "meters that are a number": lambda state: state.update(meters=3),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_checkpoints(alter, finished, resumed, tried, train_script, tmp_path):
    state = parts_of(finished)
    alter(state)
    assert tried(train_script.main, resumed(torch_bytes(state)), tmp_path / "last.pth").status == 2


# PyTorch's to its users
ADVICE = ("weights_only", "safe_globals", "arbitrary code", "\\x1b", "file an issue")
CARRYING = {  # what forks and other programs leave beside the weights
    "a function": argparse.ArgumentParser,
    "an array of objects": np.array([{}], dtype=object),
    "a NumPy word": np.str_("x"),
    "a module": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", CARRYING)
def test_no_program_passes_on_the_advice_to_run_the_code_of_a_file(
    name, protocol, finished, resumed, data, tried, train_script, test_script, tmp_path
):
    path = tmp_path / "last.pth"
    contents = torch_bytes({"model": {}, "extra": CARRYING[name]}, pickle_protocol=protocol)
    start = one_step_from(path, data, tmp_path / "logs")
    for script, argv in (
        (train_script, resumed(contents)),
        (test_script, ["--config_file", finished, "--checkpoint", path]),
        (train_script, start),
    ):
        outcome = tried(script.main, argv, path, "it is damaged or holds more than weights (")
        assert outcome.status == 2 and not any(word in outcome.err for word in ADVICE), outcome.err


def test_a_torchscript_archive_as_a_checkpoint_is_called_by_its_name(finished, tried, test_script, tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "clip.pt")
    argv = ["--config_file", finished, "--checkpoint", tmp_path / "clip.pt"]
    outcome = tried(test_script.main, argv, "clip.pt is refused: it is a TorchScript archive")
    assert outcome.status == 2 and not any(word in outcome.err for word in ADVICE), outcome.err


NUMBERS = [np.float64(1.5), np.float32(0.25), np.int64(7), np.uint8(9), np.bool_(True), np.arange(6.0)]
NUMBERS += [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(2, 3)), np.array(2.5)]


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_numpy_number_in_a_checkpoint_is_a_number(core, zipped, tmp_path):
    """By the names that NumPy 1 gives its functions, and by those of NumPy 2; arrays are lists."""
    torch.save(
        {"model": {}, "extra": NUMBERS},
        path := tmp_path / "a.pth",
        _use_new_zipfile_serialization=zipped,
    )
    own = b"cnumpy._core.multiarray" if np.__version__[0] > "1" else b"cnumpy.core.multiarray"
    data = path.read_bytes()
    if zipped:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(own, f"cnumpy.{core}.multiarray".encode()))
    else:
        (tmp_path / "b.pth").write_bytes(data.replace(own, f"cnumpy.{core}.multiarray".encode()))
    found = load_checkpoint(tmp_path / "b.pth")["extra"]
    assert found == [np.atleast_1d(n).tolist() if isinstance(n, np.ndarray) else n.item() for n in NUMBERS]
    assert {type(value) for value in found[:5]} == {float, int, bool}


def test_a_run_whose_figures_are_numpys_tests_starts_and_goes_on(
    finished, resumed, data, tried, train_script, test_script, tmp_path
):
    state = parts_of(finished)
    state.update(epoch=np.int64(state["epoch"]), best_R1=np.float64(state["best_R1"]), curve=np.arange(3.0))
    state["scheduler"]["last_epoch"] = np.int64(state["scheduler"]["last_epoch"])
    go_on = resumed(torch_bytes(state))
    torch.save(state, tmp_path / "best.pth")
    assert tried(test_script.main, ["--config_file", tmp_path]).status == 0
    assert json.loads((tmp_path / "results.json").read_text())["epoch"] == 1
    assert tried(train_script.main, go_on).status == 0
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 2
    weights = {k.removeprefix("base_model."): v for k, v in state["model"].items() if "base_model." in k}
    torch.save({**weights, "logit_scale": np.float32(4.6)}, tmp_path / "clip.pt")
    argv = one_step_from(tmp_path / "clip.pt", data, tmp_path / "logs")
    assert tried(train_script.main, argv).status == 0


PRETRAINED = [*list(FOREIGN)[:26:2], "22% of a zip", "80% of a zip", "50% of an old file"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", [name for name in PRETRAINED if name in FOREIGN])
def test_foreign_pretrained_weights(name, suffix, data, tried, train_script, tmp_path):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(FOREIGN[name])
    argv = [*("--root_dir", data, "--output_dir", tmp_path, "--batch_size", "4"), "--pretrain_choice", path]
    assert tried(train_script.main, argv, path).status == 2


# ---- YAML ----


def laughs(depth=8, key="name"):
    """A small file whose last alias stands for 9^depth words."""
    names = "abcdefghij"[: depth + 1]
    lines = [f" - &{names[0]} [x, x, x, x, x, x, x, x, x]"]
    lines += [f" - &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip(names, names[1:], strict=False)]
    return f"{key}:\n" + "\n".join(lines)


YAMLS = {
    "empty": "",
    "a number": "7",
    "a list": "- name\n- lr",
    "text": "once upon a time",
    "a page of a server": "<html>\n<body>404</body>",
    "an open bracket": "milestones: [1, 2",
    "a tab": "name:\n\t- x",
    "two documents": "lr: 1\n---\nlr: 2",
    "an unknown alias": "name: *nobody",
    "an unhashable key": "? [a]\n: 1",
    "a key that is a number": "1: 2",
    "a key that is null": "~: 2",
    "control characters": "name: \x07",
    "NUL": b"name: \x00",
    "UTF-16": "name: x".encode("utf-16"),
    "random": random.Random(2).randbytes(500),
    "an unknown option": "batchsize: 8",
    "an unknown tag": "name: !thing 3",
    "python/object/apply": "name: !!python/object/apply:os.system ['true']",
    "python/object/new": "name: !!python/object/new:os.system ['true']",
    "python/name": "name: !!python/name:os.system",
    "python/module": "name: !!python/module:os",
    "a tuple of a mapping": "img_size: !!python/tuple {a: 1}",
    "a date that is none": "name: 2001-99-99",
    "a timestamp that is none": "name: !!timestamp soon",
    "int of a word": "batch_size: !!int many",
    "float of a word": "lr: !!float small",
    "bool of a word": "MLM: !!bool maybe",
    "binary of a word": "batch_size: !!binary '@'",
    "an omap of words": "name: !!omap [a]",
    "5000 digits": "batch_size: " + "9" * 5000,
    "a merge with a number": "<<: 3\nlr: 1",
    "5000 brackets": "name: " + "[" * 5000 + "]" * 5000,
    "5000 braces": "name: " + "{a: " * 5000,
    "600 levels": "\n".join(" " * level + "a:" for level in range(600)),
    "a bomb of aliases": laughs(),
    "a bomb of aliases in a list option": laughs(key="milestones"),
    "a bomb of aliases in a mapping option": laughs(key="clip_architecture"),
    "a bomb of merges": "name:\n - &a {x: 1}\n"
    + "\n".join(
        f" - &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}"
        for a, b in zip("abcdefghi", "bcdefghij", strict=False)
    ),
    "a list within itself": "name: &a [*a]",
    "a mapping within itself": "&a\nname: *a",
    "lr of null": "lr:",
    "lr of a list": "lr: [1]",
    "lr of NaN": "lr: .nan",
    "lr of infinity": "lr: .inf",
    "lr below 0": "lr: -1",
    "lr of a switch": "lr: true",
    "a batch of a half": "batch_size: 8.5",
    "a batch of 0": "batch_size: 0",
    "a batch of true": "batch_size: yes",
    "one side": "img_size: [64]",
    "a side of NaN": "img_size: [.nan, 32]",
    "milestones of null": "milestones: [1, null]",
    "a switch of a word": "MLM: 'true'",
    "a width of a list": "clip_architecture: {vision_width: [64]}",
    "a width of -1": "clip_architecture: {vision_width: -1}",
    "an unknown size": "clip_architecture: {vision_with: 64}",
    "an architecture of 7": "clip_architecture: 7",
    "an unknown loss": "loss_names: sdm+idd",
    "an unknown device": "device: tpu",
    "a seed of a word": "seed: one",
    "a name with a slash": "name: ../../elsewhere",
}


@pytest.mark.parametrize("contents", YAMLS.values(), ids=YAMLS)
def test_odd_configurations(contents, data, tried, train_script, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8"))
    argv = ["--config_file", path, "--root_dir", data, "--output_dir", tmp_path / "logs"]
    named = "--name" if "slash" in str(contents) or "elsewhere" in str(contents) else path
    assert tried(train_script.main, argv, named).status == 2
    assert not (tmp_path / "logs").exists() and not (tmp_path.parent / "elsewhere").exists()


@GENERATED
@hypothesis.given(
    options=st.dictionaries(st.sampled_from(("lr", "img_size", "MLM", "name", "seed", "x")), anything)
)
def test_generated_configurations(options, tried, train_script, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    path = base / "generated.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    argv = ["--config_file", path, "--root_dir", base / "no data", "--output_dir", base / "never"]
    assert tried(train_script.main, argv).status == 2
    assert not (base / "never").exists()


# ---- planted code ----


def planted(marker):
    """{name: (file name, contents)}: code in every kind of file that is read."""
    payload = Payload(marker)
    pickled = pickle.dumps(payload, protocol=2)
    command = f"touch '{marker}'"
    return {
        "pickle as .pth": ("last.pth", pickle.dumps({"model": payload})),
        "zip as .pth": ("last.pth", torch_bytes({"model": {"weight": payload}})),
        "old format as .pth": (
            "last.pth",
            torch_bytes({"model": payload}, _use_new_zipfile_serialization=False),
        ),
        "beside the model as .pth": ("last.pth", torch_bytes({**SMALL, "args": payload})),
        "zip as .pt": ("clip.pt", torch_bytes({"visual.proj": payload})),
        "pickle as .pt": ("clip.pt", pickled),
        "TorchScript as .pt": ("clip.pt", zipped(clip__data_pkl=pickled, clip__constants_pkl=pickled)),
        "TorchScript's state as .pt": (
            "clip.pt",
            zipped(clip__data_pkl=pickle.dumps({"state": [payload]}, 2), clip__constants_pkl=pickled),
        ),
        "pickle as .safetensors": ("clip.safetensors", pickled),
        "apply in .yaml": ("config.yaml", f"name: !!python/object/apply:os.system [\"{command}\"]".encode()),
        "new in .yaml": ("config.yaml", f"name: !!python/object/new:os.system [\"{command}\"]".encode()),
        "list items in .yaml": (
            "config.yaml",
            f"name: !!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec }}],"
            f" listitems: \"open('{marker}', 'w')\"}}".encode(),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", planted("marker"))
def test_planted_code_is_refused_and_never_runs(
    name, data, finished, tried, train_script, test_script, tmp_path
):
    marker = tmp_path / "it ran"
    file_name, contents = planted(marker)[name]
    path = tmp_path / file_name
    path.write_bytes(contents)
    data_words = ["--root_dir", data, "--output_dir", tmp_path / "logs", "--batch_size", "4"]
    if file_name == "config.yaml":
        ways = [(train_script, ["--config_file", path, *data_words])]
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "configs.yaml").write_bytes(contents)
        (folder / "last.pth").write_bytes(WHOLE)
        ways += [(train_script, ["--resume", "--resume_ckpt_file", folder])]
        ways += [(test_script, ["--config_file", folder])]
    elif file_name == "last.pth":
        ways = [
            (train_script, ["--resume", "--resume_ckpt_file", path, *data_words]),
            (test_script, ["--config_file", finished, "--checkpoint", path]),
        ]
    else:
        ways = [(train_script, ["--pretrain_choice", path, *data_words])]
    for script, argv in ways:
        assert tried(script.main, argv).status == 2
        assert not marker.exists()


def in_iptc(contents):
    """An IPTC file that holds another one, which Pillow opens in its turn."""
    fields = [
        (3, 60, b"\x01\x00"),
        (3, 20, b"\x00\x0a"),
        (3, 30, b"\x00\x0a"),
        (3, 120, b"\x05"),
        (8, 10, contents),
    ]
    return b"".join(bytes([0x1C, *tag]) + len(data).to_bytes(2, "big") + data for *tag, data in fields)


@pytest.mark.parametrize("wrap", [lambda contents: contents, in_iptc], ids=["EPS", "EPS in IPTC"])
def test_a_postscript_program_among_the_images_is_not_run(wrap, tmp_path, monkeypatch):
    """Pillow gives EPS, whatever its name, to Ghostscript where that is; here it leaves a mark."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/it ran'\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "0.jpg"
    path.write_bytes(wrap(BROKEN_IMAGES["EPS"]))
    for read in (read_image, open_picture):
        with pytest.raises(InputError, match="0.jpg cannot be read"):
            read(path)
    assert not (tmp_path / "it ran").exists()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # as Pillow has it: to be looked for
    with pytest.raises(Exception), Image.open(path) as image:  # noqa: B017
        image.load()
    assert (tmp_path / "it ran").exists()  # else the test would prove nothing


def test_the_planted_code_would_run_elsewhere(tmp_path):
    """Else the test above would prove nothing."""
    for name, (file_name, contents) in planted(tmp_path / "it ran").items():
        if name.startswith("pickle"):
            pickle.loads(contents)
        elif file_name == "last.pth":
            torch.load(io.BytesIO(contents), weights_only=False)
        elif "TorchScript" in name:
            with zipfile.ZipFile(io.BytesIO(contents)) as archive:
                pickle.loads(archive.read("clip/data.pkl"))
        elif name.endswith("yaml"):
            yaml.load(contents, yaml.UnsafeLoader)
        else:
            continue
        assert (tmp_path / "it ran").exists(), name
        (tmp_path / "it ran").unlink()
