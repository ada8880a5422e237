"""search.py: its ranking is test.py's, its index keeps up with the folder, and bad input is one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.gallery import GalleryIndex, Stamp
from tests.conftest import PATIENCE, ROOT, load_script
from tests.tiny_run import make_run, missing
from utils import errors
from utils.errors import InputError
from utils.option_types import number_list
from utils.tool_options import search_args

needs_faiss = missing("faiss", "faiss-cpu")
QUERY = "a woman in a red coat"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_run(folder)
    return folder


@pytest.fixture
def gallery(home, tmp_path):
    """A copy of a few pictures, one in a sub-folder, that a test may change."""
    images = sorted((home / "data" / "CUHK-PEDES" / "imgs").rglob("*.jpg"))[:6]
    (tmp_path / "gallery" / "below").mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, tmp_path / "gallery" / ("below" if number == 5 else ".") / f"{number}.jpg")
    return tmp_path / "gallery"


@pytest.fixture
def search(home, tmp_path, capsys):
    """Calls search.py on the tiny run with an index of the test's own; gives status, stdout, stderr."""
    script = load_script("search")

    def call(*words, index=tmp_path / "index"):
        status = script.main(
            ["--config_file", str(home / "run"), "--device", "cpu", "--index", str(index), *map(str, words)]
        )
        out, err = capsys.readouterr()
        return status, out, err

    return call


def answers(out):
    return [[hit["file"] for hit in record["results"]] for record in json.loads(out)]


# ---- what is found ----


@needs_faiss
def test_ranking_of_a_split_is_that_of_test_py(home, search, tmp_path):
    from datasets import build_dataloader
    from model.build import build_trained_model
    from processor.evaluator import encode, evaluate
    from utils.options import get_test_args

    args = get_test_args(["--config_file", str(home / "run"), "--device", "cpu"])
    img_loader, txt_loader, _ = build_dataloader(args)
    model = build_trained_model(args, torch.load(home / "run" / "best.pth")["model"], "best.pth")
    _, ranking = evaluate(encode(model, img_loader, txt_loader, torch.device("cpu")))
    expected = [[img_loader.dataset.image_paths[i] for i in row] for row in ranking.indices.tolist()]

    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(txt_loader.dataset.captions))
    status, out, _ = search("--split", "test", "--query_file", sentences, "--json", "--duplicates")
    assert status == 0
    assert answers(out) == expected


@needs_faiss
def test_a_picture_of_the_gallery_finds_itself_first(search, gallery):
    _, out, _ = search("--gallery", gallery, "--image", gallery / "3.jpg", "--json", "--top_k", 2)
    (record,) = json.loads(out)
    assert record["results"][0]["file"] == str(gallery / "3.jpg")
    assert record["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)


@needs_faiss
def test_equal_pictures_come_in_the_order_of_their_names(search, gallery):
    for name in ("9.jpg", "7.jpg", "8.jpg"):
        shutil.copy(gallery / "0.jpg", gallery / name)
    words = ("--gallery", gallery, "--image", gallery / "0.jpg", "--json", "--top_k", 4, "--duplicates")
    _, out, _ = search(*words)
    assert [os.path.basename(path) for path in answers(out)[0]] == ["0.jpg", "7.jpg", "8.jpg", "9.jpg"]


@needs_faiss
def test_table_picture_and_json_show_the_same(search, gallery, tmp_path):
    _, out, _ = search("--gallery", gallery, "--query", QUERY, "--json", "--top_k", 3)
    (paths,) = answers(out)
    status, out, _ = search(
        "--gallery", gallery, "--query", QUERY, "--top_k", 3, "--save", tmp_path / "r.png"
    )
    lines = [line for line in out.splitlines() if ".jpg" in line]
    assert status == 0 and [line.split("|")[3].strip() for line in lines] == paths
    assert Image.open(tmp_path / "r.png").size[0] > 300


@needs_faiss
def test_a_turned_picture_with_an_exif_tag_equals_the_upright_one(search, gallery):
    with Image.open(gallery / "1.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
        image.convert("RGB").rotate(90, expand=True).save(gallery / "turned.png", exif=exif)
    words = ("--gallery", gallery, "--image", gallery / "turned.png", "--json", "--top_k", 2)
    _, out, _ = search(*words, "--duplicates")
    assert {os.path.basename(path) for path in answers(out)[0]} == {"1.jpg", "turned.png"}


@needs_faiss
@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("RGBA", "webp"), ("P", "gif"), ("CMYK", "tiff"), ("1", "bmp")]
)
def test_pictures_of_any_kind_are_read(search, gallery, mode, suffix):
    Image.open(gallery / "0.jpg").convert(mode).save(gallery / f"other.{suffix}")
    _, out, _ = search("--gallery", gallery, "--query", QUERY, "--json", "--duplicates")
    assert str(gallery / f"other.{suffix}") in answers(out)[0]


# ---- the index keeps up ----


@needs_faiss
def test_only_new_and_changed_pictures_are_encoded_and_removed_ones_leave(search, gallery):
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "6 pictures" in err and "6 encoded, 0 removed" in err
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "0 encoded, 0 removed" in err

    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "new.jpg")
    (gallery / "1.jpg").unlink()
    Image.open(gallery / "3.jpg").convert("L").save(gallery / "2.jpg")
    _, out, err = search("--gallery", gallery, "--image", gallery / "2.jpg", "--json", "--top_k", 99)
    assert "6 pictures" in err and "2 encoded, 1 removed" in err
    (found,) = answers(out)
    assert found[0] == str(gallery / "2.jpg") and str(gallery / "1.jpg") not in found and len(found) == 6


@needs_faiss
def test_a_second_start_reads_no_picture(search, gallery, monkeypatch):
    from retrieval.encoders import Encoders

    search("--gallery", gallery, "--query", QUERY)
    monkeypatch.setattr(Encoders, "pixels", lambda self, path: pytest.fail(f"{path} is read again"))
    status, out, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 6


@needs_faiss
def test_an_updated_index_answers_as_a_new_one_of_each_type(search, gallery, tmp_path):
    for kind in ("flat", "ivf", "hnsw"):
        held = gallery / "4.jpg"
        aside = held.rename(tmp_path / "4.jpg")
        search("--gallery", gallery, "--index_type", kind, index=tmp_path / kind)
        shutil.move(aside, held)
        (gallery / "extra.png").unlink(missing_ok=True)
        Image.open(gallery / "0.jpg").rotate(180).save(gallery / "extra.png")
        _, updated, err = search("--gallery", gallery, "--query", QUERY, "--json", index=tmp_path / kind)
        assert "encoded, 0 removed" in err
        _, new, _ = search("--gallery", gallery, "--query", QUERY, "--json", index=tmp_path / f"{kind}2")
        assert answers(updated) == answers(new)


@needs_faiss
def test_the_type_can_change_without_encoding(search, gallery):
    _, flat, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    for kind in ("hnsw", "ivf", "flat"):
        _, out, err = search("--gallery", gallery, "--query", QUERY, "--json", "--index_type", kind)
        assert "0 encoded" in err and answers(out) == answers(flat)


@needs_faiss
def test_an_interrupted_start_keeps_what_was_encoded(search, gallery, monkeypatch):
    from retrieval.encoders import Encoders

    encode, calls = Encoders.image_features, []

    def stopped(self, pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, pictures)

    monkeypatch.setattr(Encoders, "image_features", stopped)
    status, *_ = search("--gallery", gallery, "--query", QUERY, "--encode_batch", 2)
    assert status == 130
    monkeypatch.setattr(Encoders, "image_features", encode)
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "2 encoded" in err


@needs_faiss
def test_without_index_it_is_kept_in_the_run_and_the_run_moves_with_it(home, gallery, tmp_path, capsys):
    run = shutil.copytree(home / "run", tmp_path / "run")
    script = load_script("search")
    words = ["--device", "cpu", "--gallery", str(gallery), "--query", QUERY]
    assert script.main(["--config_file", str(run), *words]) == 0
    assert list((run / "search").glob("gallery-*/table.json"))
    run = run.rename(tmp_path / "moved")
    capsys.readouterr()
    assert script.main(["--config_file", str(run / "configs.yaml"), *words]) == 0
    assert "0 encoded" in capsys.readouterr().err


@needs_faiss
def test_a_moved_gallery_keeps_its_index(search, gallery):
    search("--gallery", gallery, "--query", QUERY)
    moved = gallery.rename(gallery.parent / "elsewhere")
    _, out, err = search("--gallery", moved, "--query", QUERY, "--json")
    assert "0 encoded" in err and answers(out)[0][0].startswith(str(moved))


@needs_faiss
def test_approximate_indices_find_nearly_what_the_exact_one_finds():
    from retrieval.vectors import new_faiss

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 32))
    vectors = centres[rng.integers(50, size=4000)] + 0.5 * rng.normal(size=(4000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    exact = (vectors[:100] @ vectors.T).argsort(axis=1)[:, ::-1][:, :10]
    for kind, least in (("flat", 1), ("ivf", 0.95), ("hnsw", 0.95)):
        _, rows = new_faiss(kind, vectors).search(vectors[:100], 10)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)])
        assert recall >= least, kind


# ---- bad input: one sentence, nothing lost ----


def one_sentence(result, *words):
    status, out, err = result
    last = err.strip().splitlines()[-1]
    assert status == 2 and not out and last.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert str(word) in last
    return True


@needs_faiss
def test_an_unreadable_picture_is_a_line_and_the_search_goes_on(search, gallery):
    (gallery / "broken.jpg").write_bytes((gallery / "0.jpg").read_bytes()[:900])
    (gallery / "text.png").write_text("not a picture")
    (gallery / "notes.txt").write_text("nor meant as one")
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 6
    assert sum("passed over" in line and "broken.jpg" in line for line in err.splitlines()) == 1
    assert sum("passed over" in line and "text.png" in line for line in err.splitlines()) == 1
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "0 encoded" in err and "2 unreadable as before" in err

    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "broken.jpg")  # mended
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "1 encoded" in err and "1 unreadable as before" in err


@needs_faiss
@pytest.mark.parametrize("query", ["", "   ", "\n", "&nbsp;", "\x01\x02"])
def test_an_empty_query_is_refused(search, gallery, query):
    assert one_sentence(search("--gallery", gallery, "--query", query), "query 1 is empty")


@needs_faiss
def test_a_line_of_the_query_file_is_one_query_whatever_it_holds(search, gallery, tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffa man\u2028in red\r\n\r\na \x0cwoman\x85 in blue\n".encode())
    words = ("--gallery", gallery, "--query_file", tmp_path / "lines.txt", "--json", "--top_k", 1)
    records = json.loads(search(*words)[1])
    assert [record["query"] for record in records] == ["a man\u2028in red", "a \x0cwoman\x85 in blue"]


@needs_faiss
def test_a_model_whose_features_are_no_numbers_is_one_sentence_and_never_nan(home, search, gallery, tmp_path):
    state = torch.load(home / "run" / "best.pth")
    state["model"]["base_model.text_projection"] *= float("nan")
    torch.save(state, tmp_path / "nan.pth")
    words = ("--gallery", gallery, "--query", QUERY, "--json", "--checkpoint", tmp_path / "nan.pth")
    assert one_sentence(search(*words), "features of this model are not numbers")


def test_no_gallery_named_at_all_is_one_sentence(search):
    assert one_sentence(search("--gallery", "", "--query", QUERY), "no such folder")


@needs_faiss
def test_an_empty_folder_is_refused(search, gallery, tmp_path):
    (tmp_path / "empty").mkdir()
    assert one_sentence(search("--gallery", tmp_path / "empty", "--query", QUERY), "no picture")
    (tmp_path / "empty" / "notes.txt").write_text("text")
    assert one_sentence(search("--gallery", tmp_path / "empty", "--query", QUERY), "no picture", "1 files")
    (tmp_path / "empty" / "a.jpg").write_text("text")
    assert one_sentence(search("--gallery", tmp_path / "empty", "--query", QUERY), "none of the 1 files")


@needs_faiss
def test_a_very_long_sentence_is_cut_and_said_so(search, gallery):
    long = "a woman in a red coat " * 500  # 11 000 characters
    status, out, err = search("--gallery", gallery, "--query", long, "--json")
    assert status == 0 and "77" in err and "cut off" in err
    _, short, err = search("--gallery", gallery, "--query", "a woman in a red coat " * 20, "--json")
    assert answers(out) == answers(short)
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "cut off" not in err


@needs_faiss
def test_an_index_of_another_model_is_refused_and_stays(home, search, gallery, tmp_path):
    search("--gallery", gallery, "--query", QUERY)
    state = torch.load(home / "run" / "best.pth")
    state["model"]["base_model.text_projection"][0, 0] += 0.1
    torch.save(state, tmp_path / "other.pth")
    before = {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    result = search("--gallery", gallery, "--query", QUERY, "--checkpoint", tmp_path / "other.pth")
    assert one_sentence(result, "another model", "--rebuild")
    assert before == {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    words = ("--gallery", gallery, "--query", QUERY, "--checkpoint", tmp_path / "other.pth", "--rebuild")
    assert search(*words)[0] == 0


@needs_faiss
def test_an_index_of_another_gallery_is_refused(search, gallery, tmp_path):
    search("--gallery", gallery, "--query", QUERY)
    shutil.copytree(gallery, tmp_path / "other")
    assert one_sentence(search("--gallery", tmp_path / "other", "--query", QUERY), "of the pictures in")


@needs_faiss
@pytest.mark.parametrize("damage", ["table", "vectors", "missing", "swapped"])
def test_a_damaged_index_is_one_sentence(search, gallery, tmp_path, damage):
    search("--gallery", gallery, "--query", QUERY)
    (vectors,) = (tmp_path / "index").glob("vectors-*")
    table = tmp_path / "index" / "table.json"
    if damage == "table":
        table.write_text(table.read_text()[:100])
    elif damage == "vectors":
        vectors.write_bytes(vectors.read_bytes()[:300])
    elif damage == "missing":
        vectors.unlink()
    else:
        table.write_text(json.dumps({**json.loads(table.read_text()), "paths": ["a.jpg"]}))
    assert one_sentence(search("--gallery", gallery, "--query", QUERY), "damaged", "--rebuild")
    assert search("--gallery", gallery, "--query", QUERY, "--rebuild")[0] == 0


@needs_faiss
def test_a_broken_query_picture_is_one_sentence(search, gallery, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path / "broken.jpg"), "broken.jpg")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path / "none.jpg"), "no picture at")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path), "is a folder")


def test_options_are_checked_before_anything_is_loaded(home, search, gallery, tmp_path):
    assert one_sentence(search("--query", QUERY), "--gallery FOLDER", "--split")
    assert one_sentence(search("--gallery", tmp_path / "none", "--query", QUERY), "no such folder")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "blank").write_text("\n \n")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "binary"), "UTF-8")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "blank"), "no sentence")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "none"), "cannot be read")
    with pytest.raises(SystemExit):
        search_args(["--config_file", str(home / "run"), "--gallery", str(gallery), "--top_k", "0"])
    with pytest.raises(InputError, match="no config file"):
        search_args(["--config_file", str(tmp_path), "--gallery", str(gallery)])


def test_a_missing_package_is_a_sentence_with_the_command(search, gallery, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    result = search("--gallery", gallery, "--query", QUERY)
    assert one_sentence(result, "faiss-cpu", "python -m pip install -r requirements-search.txt")


def test_lists_of_numbers():
    assert number_list("0,17") == [0, 17] and number_list("0-3, 9") == [0, 1, 2, 3, 9]
    for text in ("", "a", "1,,2", "3-1", "-1"):
        with pytest.raises(Exception, match="not a list of numbers"):
            number_list(text)


@needs_faiss
def test_two_programs_take_turns_at_an_index(tmp_path):
    import threading

    from retrieval.gallery import locked

    order, waits = [], threading.Event()

    def second():
        with locked(tmp_path, lambda line: waits.set()):
            order.append("second")

    with locked(tmp_path, order.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(PATIENCE)
        order.append("first")
    thread.join(PATIENCE)
    assert order == ["first", "second"]


# ---- galleries as people have them ----


@needs_faiss
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_a_pipe_is_not_opened(search, gallery):
    os.mkfifo(gallery / "pipe.jpg")
    status, out, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 6


@needs_faiss
def test_linked_folders_are_searched_each_once(search, gallery, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.open(gallery / "0.jpg").rotate(180).save(tmp_path / "elsewhere" / "linked.jpg")
    (gallery / "more").symlink_to(tmp_path / "elsewhere")
    (gallery / "again").symlink_to(tmp_path / "elsewhere")
    (gallery / "loop").symlink_to(gallery)
    status, out, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 7


@pytest.mark.parametrize(
    "names, said",
    [(["IMG_1.HEIC"], ".heic are"), (["a.CR2", "b.jxl", "c.txt"], ".cr2 and .jxl are")],
)
def test_a_format_of_phones_or_cameras_is_named(names, said, search, tmp_path):
    (tmp_path / "phone").mkdir()
    for name in names:
        (tmp_path / "phone" / name).write_bytes(b"0")
    status, _, err = search("--gallery", tmp_path / "phone", "--query", QUERY)
    assert status == 2 and f"; {said} not read here: export them as JPEG first" in err


@pytest.mark.parametrize("folder", ["@eaDir", "below/@eaDir/0.jpg", "#recycle", "$RECYCLE.BIN", ".Trash"])
def test_thumbnails_and_what_was_deleted_are_not_searched(folder, gallery):
    from retrieval.pictures import scan

    before = scan(gallery)
    (gallery / folder).mkdir(parents=True)
    shutil.copy(gallery / "0.jpg", gallery / folder / "thumbnail.jpg")
    assert scan(gallery) == before


BEGINNINGS = {  # of a file named a.jpg, and what is said of it
    b"": "it is empty",
    b"\0\0\0\x18ftypheic" + bytes(99): "it is HEIC",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "only Git LFS's note of it",
}


@pytest.mark.parametrize("content", BEGINNINGS)
def test_a_file_that_is_named_like_a_picture_and_is_none_is_told_for_what_it_is(content, search, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    status, _, err = search("--gallery", tmp_path, "--image", tmp_path / "a.jpg")
    assert status == 2 and f"a.jpg is not a picture that Pillow can read ({BEGINNINGS[content]}" in err


def test_of_a_picture_with_too_many_pixels_the_most_is_told(search, tmp_path, monkeypatch):
    Image.new("L", (90, 90)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    status, _, err = search("--gallery", tmp_path, "--image", tmp_path / "a.png")
    assert status == 2 and "a.png has too many pixels: make it smaller, at most" in err


@needs_faiss
def test_a_picture_for_which_memory_lacked_is_tried_again(search, gallery, monkeypatch):
    from retrieval import encoders

    def scarce(path):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(encoders, "open_image", scarce)
        status, _, err = search("--gallery", gallery, "--query", QUERY)
        assert status == 2 and err.count("not enough memory to read the picture") == 6
    assert "6 encoded" in search("--gallery", gallery, "--query", QUERY)[2]


def test_what_pillow_remarks_about_a_file_it_reads_is_not_shown(tmp_path):
    """In a program of its own: pytest has its own way with warnings."""
    transparent = bytes(range(256))
    Image.new("P", (9, 9)).save(tmp_path / "a.png", transparency=transparent)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40))
    code = "import sys; from retrieval.encoders import open_picture; [*map(open_picture, sys.argv[1:])]"
    words = [sys.executable, "-c", code, tmp_path / "a.png", tmp_path / "b.jpg"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@needs_faiss
@pytest.mark.parametrize("target", ["none/r.png", "r.docx", "folder.png", "/proc/r.png"])
def test_a_result_that_cannot_be_drawn_is_told_before_anything_is_encoded(target, search, gallery, tmp_path):
    (tmp_path / "folder.png").mkdir()
    status, _, err = search("--gallery", gallery, "--query", QUERY, "--save", tmp_path / target)
    assert status == 2 and "cannot write the picture" in err and "encoded" not in err
    assert not (tmp_path / "index").exists()


@needs_faiss
def test_an_index_that_cannot_be_kept_answers_from_memory(search, gallery, tmp_path):
    """Its place is a file: known before the pictures are encoded."""
    (tmp_path / "file").write_text("")
    status, out, err = search(
        "--gallery", gallery, "--query", QUERY, "--json", index=tmp_path / "file" / "index"
    )
    assert status == 0 and len(answers(out)[0]) == 6
    assert err.count("the index stays in memory") == 1 and "6 pictures in memory: 6 encoded" in err
    assert err.index("cannot make the folder") < err.index("stays in memory") < err.index("encoded")


@needs_faiss
def test_an_index_is_kept_in_a_folder_whose_name_is_not_utf8(gallery, tmp_path):
    """As unpacked from an archive of another system: Python opens such a name, FAISS does not."""
    from retrieval.index import GalleryIndex

    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    vectors = np.eye(3, 8, dtype=np.float32)
    index = GalleryIndex(folder, gallery, "f", 8)
    index.update({f"{n}.jpg": Stamp(1, n) for n in range(3)}, lambda paths: [(paths, vectors, {})])
    index.save()
    again = GalleryIndex.load(folder, gallery, "f", 8)
    assert again.paths == index.paths and np.array_equal(again.faiss.reconstruct_n(0, 3), vectors)


@needs_faiss
def test_a_disk_that_fills_up_while_the_index_is_written_costs_no_answer(search, gallery, monkeypatch):
    from retrieval.index import GalleryIndex

    def full(self):
        raise InputError("cannot write the index in x: No space left on device; what was there is untouched")

    monkeypatch.setattr(GalleryIndex, "save", full)
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 6 and "the answer comes from memory" in err


@needs_faiss
def test_a_folder_that_cannot_be_read_for_a_moment_keeps_its_features(search, gallery, monkeypatch):
    """As root nothing is forbidden, so the system's answer is put in its place."""
    assert search("--gallery", gallery)[0] == 0
    real = os.scandir

    def scandir(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 6 and "0 removed" in err
    assert "below cannot be read (Permission denied): what is known of it stays" in err
    monkeypatch.undo()
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and "0 encoded, 0 removed" in err


@needs_faiss
@pytest.mark.parametrize("number", [13, 5], ids=["permission", "input/output error"])
def test_a_file_that_could_not_be_read_is_tried_again_and_no_picture_is_not(
    number, search, gallery, monkeypatch
):
    from retrieval import encoders

    (gallery / "text.jpg").write_text("no picture")
    real = encoders.open_image

    def refuse(path):
        if str(path).endswith("0.jpg"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(encoders, "open_image", refuse)
    _, _, err = search("--gallery", gallery)
    assert "5 pictures" in err and err.count("passed over") == 2 and "unreadable as before" not in err
    monkeypatch.undo()
    _, _, err = search("--gallery", gallery)
    assert "6 pictures" in err and "1 encoded" in err and "1 unreadable as before" in err


STOPS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1]  # one of each kind


def signalled_after_three(number, image_features):
    """Encoders.image_features, which is called a fourth time only to send its own process a signal."""
    count = []

    def signalled(self, pictures):
        count.append(1)
        if len(count) == 4:
            signal.raise_signal(number)  # to this thread: at once, however busy the others are
        return image_features(self, pictures)

    return signalled


@pytest.fixture
def signals_of_a_program():
    """Signals do as in a program that begins, and afterwards what they did before."""
    earlier = {number: signal.getsignal(number) for number in errors.STOPS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@needs_faiss
@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
def test_a_signal_keeps_what_has_been_encoded(
    number, signals_of_a_program, search, gallery, tmp_path, monkeypatch
):
    """Batches of one picture; the signal comes from the program itself, after the third."""
    from retrieval.encoders import Encoders

    monkeypatch.setattr(Encoders, "image_features", signalled_after_three(number, Encoders.image_features))
    status, _, err = search("--gallery", gallery, "--encode_batch", "1")
    assert status == 130 and "Traceback" not in err
    table = json.loads((tmp_path / "index" / "table.json").read_text())
    assert len(table["paths"]) == 3


@needs_faiss
@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
def test_a_program_that_a_signal_ends_keeps_what_has_been_encoded(number, home, gallery, tmp_path):
    code = f"""
import sys
from retrieval.encoders import Encoders
from tests.test_search import signalled_after_three
Encoders.image_features = signalled_after_three({int(number)}, Encoders.image_features)
import search
sys.exit(search.main(sys.argv[1:]))
"""
    words = ["--config_file", home / "run", "--device", "cpu", "--gallery", gallery, "--encode_batch", "1"]
    words += ["--index", tmp_path / "index"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    table = json.loads((tmp_path / "index" / "table.json").read_text())
    assert len(table["paths"]) == 3


@needs_faiss
def test_an_index_is_saved_each_minute(home, gallery, tmp_path, monkeypatch):
    from retrieval import update as module
    from retrieval.pictures import scan

    monkeypatch.setattr(module, "SAVE_PAUSE", -1)
    index = GalleryIndex(tmp_path, gallery, "mine", 2)
    sizes = []

    def encode(paths):
        for path in paths:
            table = tmp_path / "table.json"
            sizes.append(len(json.loads(table.read_text())["paths"]) if table.exists() else 0)
            yield [path], np.ones((1, 2), np.float32), {}

    found, *_ = scan(gallery)
    index.update(found, encode)
    assert sizes[:2] == [0, 1] and len(index) == 6  # while the second was encoded the first was on disk


def test_pictures_of_a_page_that_was_killed_go_at_the_next_start(tmp_path, monkeypatch):
    demo = load_script("demo")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"irra-page-{ended.pid}-x", f"irra-page-{os.getpid()}-y", "irra-page-other"):
        (tmp_path / name).mkdir()
    demo.remove_pictures_of_dead_pages()
    assert {path.name for path in tmp_path.iterdir()} == {f"irra-page-{os.getpid()}-y", "irra-page-other"}


# ---- copies ----


KINDS = ("flat", "ivf", "hnsw")


@pytest.fixture(scope="module")
def encoders(home):
    from retrieval.encoders import open_run

    return open_run(
        search_args(["--config_file", str(home / "run"), "--device", "cpu", "--gallery", str(home)])
    )


@pytest.fixture
def opened(home, encoders, tmp_path):
    """Calls open_gallery as search.py does, with the index in the run; gives the index and the lines."""
    from retrieval.gallery import open_gallery

    run = shutil.copytree(home / "run", tmp_path / "run")

    def call(folder, *words):
        lines = []
        words = ["--config_file", run, "--device", "cpu", "--gallery", folder, "--encode_batch", 4, *words]
        index = open_gallery(encoders, search_args([*map(str, words)]), lines.append)
        return index, lines

    return call


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def index_of(vectors, kind, folder=None, more=()):
    """A GalleryIndex of pictures "0", "1", … that exist nowhere, and what brings it up to date. more: vectors
    of pictures that may come later."""
    index = GalleryIndex(folder, "/nowhere", "f", vectors[0].size, kind)
    all_vectors = [*vectors, *more]

    def encode(paths):
        for start in range(0, len(paths), 64):
            some = paths[start : start + 64]
            yield some, np.stack([all_vectors[int(path)] for path in some]), {}

    def update(numbers):
        return index.update({str(number): Stamp(1, 1) for number in numbers}, encode)

    update(range(len(vectors)))
    return index, update


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_copies_of_one_picture_hide_no_other(kind):
    rng = np.random.default_rng(0)
    others, one = unit(rng.normal(size=(500, 16))), unit(rng.normal(size=(1, 16)))
    vectors = np.concatenate([others[:250], np.repeat(one, 1000, axis=0), others[250:]])
    index, _ = index_of(vectors, kind)
    assert len(index) == 1500 and index.faiss.ntotal == 501
    asked = [*range(0, 250, 5), *range(1250, 1500, 5)]
    found = [
        any(path == str(n) for _, path in hits)
        for n, hits in zip(asked, index.search(vectors[asked], 5), strict=True)
    ]
    assert np.mean(found) >= (1 if kind == "flat" else 0.98)
    (((_, first), (second, other)),) = index.search(one, 2)
    assert (
        first == "250"
        and len(index.copies("250")) == 999
        and second < 0.999
        and other not in index.copies("250")
    )
    assert len(index.search(one, 1000, duplicates=True)[0]) == 1000


@needs_faiss
def test_an_ivf_index_that_grows_has_cells_for_its_size():
    vectors = unit(np.random.default_rng(0).normal(size=(3000, 8)))
    at_once, _ = index_of(vectors, "ivf")
    index, update = index_of(vectors[:100], "ivf", more=vectors[100:])
    for number in range(200, 3001, 100):
        update(range(number))
    assert at_once.faiss.nlist / 2 <= index.faiss.nlist <= at_once.faiss.nlist
    assert np.array_equal(index.vectors()[index.pictures["2999"].row], vectors[2999])


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_features_that_differ_in_the_last_bit_are_no_copies(kind):
    one = unit(np.ones((1, 8)))
    near = one.copy()
    near[0, 3] = np.nextafter(near[0, 3], np.float32(2))
    index, _ = index_of(np.concatenate([one, near, one]), kind)
    assert index.faiss.ntotal == 2
    assert sorted(path for _, path in index.search(one, 5)[0]) == ["0", "1"]
    assert index.copies("0") == ["2"] and index.copies("1") == []


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_copies_come_and_go_and_a_picture_stays_while_one_is_left(kind, tmp_path):
    """Each state, in memory and read again, answers as an index that was made of it at once."""
    from retrieval.index import GalleryIndex

    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(12, 8)))
    vectors[[4, 7, 11]] = vectors[0]
    vectors[[5, 9]] = vectors[2]
    index, update = index_of(vectors, kind, tmp_path)
    for there in ([*range(12)], [4, 7, *range(1, 4)], [*range(1, 6), 11], [11], [0, 11, 2, 9], [*range(12)]):
        update(there)
        again = GalleryIndex.load(tmp_path, "/nowhere", "f", 8)
        for one in (index, again):
            for number, hits in zip(there, one.search(vectors[there], 12, duplicates=True), strict=True):
                exact = sorted(there, key=lambda n: (-float(vectors[n] @ vectors[number]), there.index(n)))
                same = [n for n in exact if np.array_equal(vectors[n], vectors[number])]
                assert [path for _, path in hits][: len(same)] == [
                    str(n) for n in sorted(same, key=there.index)
                ]
                assert sorted(path for _, path in hits) == sorted(map(str, there))
            assert one.faiss.ntotal == len(np.unique(vectors[there], axis=0))


@needs_faiss
def test_copies_are_one_line_with_their_number_everywhere(search, gallery, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(gallery / "3.jpg", gallery / "below" / name)
    words = ("--gallery", gallery, "--image", gallery / "3.jpg", "--top_k", 3)
    _, out, err = search(*words, "--json")
    assert "8 pictures" in err and "6 encoded, 0 removed, 0 kept, 2 known by content" in err
    (record,) = json.loads(out)
    assert [hit["copies"] for hit in record["results"]] == [2, 0, 0]  # three different pictures
    assert record["results"][0]["file"] == str(gallery / "3.jpg")
    _, out, _ = search(*words, "--save", tmp_path / "one.png")
    assert out.count(".jpg") == 4 and out.count("and 2 copies") == 1  # the query's own name is one
    _, out, _ = search(*words, "--json", "--duplicates")
    (record,) = json.loads(out)
    assert [os.path.basename(hit["file"]) for hit in record["results"]] == ["3.jpg", "a.jpg", "b.jpg"]
    assert [hit["copies"] for hit in record["results"]] == [0, 0, 0]
    shutil.rmtree(gallery / "below")
    search(*words, "--save", tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


@needs_faiss
def test_the_page_says_how_many_copies_a_picture_has(opened, encoders, gallery):
    from retrieval.page import Page

    for name in ("a.jpg", "b.jpg"):
        shutil.copy(gallery / "3.jpg", gallery / name)
    index, _ = opened(gallery)
    _, tiles, _ = Page(encoders, index, 9, 9).search(QUERY, None)
    assert len(tiles) == 6 and sum(caption.endswith(" · +2") for _, caption in tiles) == 1
    _, tiles, _ = Page(encoders, index, 9, 9, duplicates=True).search(QUERY, None)
    assert len(tiles) == 8 and not any("+" in caption for _, caption in tiles)


@needs_faiss
def test_copies_of_a_file_that_is_no_picture_are_named_each_and_read_once(opened, gallery):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (gallery / name).write_text("no picture")
    index, lines = opened(gallery)
    assert len(index) == 6 and sum("passed over" in line for line in lines) == 3
    assert sum("holds the same as" in line for line in lines) == 2
    _, lines = opened(gallery)
    assert "3 unreadable as before" in lines[-1] and not any("passed over" in line for line in lines)


def keep_as_before(folder, gallery, fingerprint, paths, vectors, kind):
    """An index as it was kept before copies were one entry: a vector a picture, and no digests."""
    import faiss

    from retrieval.vectors import new_faiss

    folder.mkdir(parents=True)
    faiss.write_index(new_faiss(kind, vectors), str(folder / "vectors-0.faiss"))
    stamps = [(gallery / path).stat() for path in paths]
    table = {
        "layout": 1,
        "fingerprint": fingerprint,
        "gallery": str(gallery),
        "kind": kind,
        "vectors": "vectors-0.faiss",
        "paths": paths,
        "sizes": [state.st_size for state in stamps],
        "mtimes_ns": [state.st_mtime_ns for state in stamps],
        "unreadable": [["text.jpg", 4, 5, "no picture"]],
    }
    (folder / "table.json").write_text(json.dumps(table))


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_the_layout_before_is_gone_on_with(kind, opened, encoders, gallery, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(gallery / "3.jpg", gallery / name)
    paths = sorted(str(path.relative_to(gallery)) for path in gallery.rglob("*.jpg"))
    pixels = {path: encoders.pixels(gallery / path) for path in paths}
    vectors = np.concatenate([encoders.image_features([pixels[path]]) for path in paths])
    keep_as_before(tmp_path / "old", gallery, encoders.fingerprint, paths, vectors, kind)
    index, lines = opened(gallery, "--index", tmp_path / "old")
    assert "0 encoded, 0 removed, 8 kept" in lines[-1] and index.kind == kind
    assert index.faiss.ntotal == 6
    (hits,), lost = index.find(vectors[:1], 99)
    assert lost == 0 and sorted(hit.copies for hit in hits) == [0, 0, 0, 0, 0, 2]
    # a copy that comes later is known by its bytes, though the old index had none
    shutil.copy(gallery / "1.jpg", gallery / "c.jpg")
    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "d.jpg")
    index, lines = opened(gallery, "--index", tmp_path / "old")
    assert "1 encoded, 0 removed, 8 kept, 1 known by content" in lines[-1]
    assert len(index) == 10 and index.faiss.ntotal == 7
    assert json.loads((tmp_path / "old" / "table.json").read_text())["layout"] == 2


# ---- galleries that move and change ----


def found_in(index):
    """{relative path} of all that a search lists."""
    features = index.vectors()[:1]
    (hits,), _ = index.find(features, 999, duplicates=True)
    return {hit.path for hit in hits}


@needs_faiss
def test_a_gallery_that_moved_takes_its_index_along(opened, gallery, tmp_path, monkeypatch):
    from retrieval import pictures

    monkeypatch.setattr(pictures, "COARSE", -(10**12))  # as if all files had been there for long
    opened(gallery)
    old = gallery.rename(tmp_path / "elsewhere")
    index, lines = opened(old)
    assert "0 encoded, 0 removed, 6 kept" in lines[-1] and f"6 of its 6 pictures lie in {old} now" in lines[0]
    assert len(list((tmp_path / "run" / "search").iterdir())) == 1
    # another gallery at the old place is another gallery, and the moved one keeps what it has
    gallery.mkdir()
    Image.open(old / "0.jpg").rotate(180).save(gallery / "0.jpg")
    assert "1 encoded, 0 removed, 0 kept" in opened(gallery)[1][-1]
    assert "0 encoded, 0 removed, 6 kept" in opened(old)[1][-1]
    assert found_in(index) == {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", os.path.join("below", "5.jpg")}


@needs_faiss
@pytest.mark.parametrize("place", ["run", "index"])
def test_a_disk_that_is_mounted_elsewhere_is_recognised_though_its_old_place_is_still_there(
    place, opened, gallery, tmp_path
):
    """Copied byte by byte, with other times, and its sub-folder renamed."""
    words = ("--index", tmp_path / "index") if place == "index" else ()
    opened(gallery, *words)
    other = tmp_path / "media"
    for path in gallery.rglob("*.jpg"):
        (other / "under").mkdir(parents=True, exist_ok=True)
        (other / ("under" if path.parent != gallery else ".") / path.name).write_bytes(path.read_bytes())
        os.utime(other / ("under" if path.parent != gallery else ".") / path.name, (1, 1))
        path.unlink()
    index, lines = opened(other, *words)
    assert "0 encoded, 0 removed, 5 kept, 1 known by content" in lines[-1]
    assert os.path.join("under", "5.jpg") in found_in(index)
    assert "0 encoded, 0 removed, 6 kept" in opened(other, *words)[1][-1]


@needs_faiss
def test_a_gallery_by_the_name_of_a_link_is_the_same_gallery(opened, gallery, tmp_path):
    opened(gallery, "--index", tmp_path / "index")
    opened(gallery)
    (tmp_path / "link").symlink_to(gallery)
    for words in ((), ("--index", tmp_path / "index")):
        assert "0 encoded, 0 removed, 6 kept" in opened(tmp_path / "link", *words)[1][-1]
        assert "0 encoded, 0 removed, 6 kept" in opened(gallery, *words)[1][-1]


@needs_faiss
def test_an_index_whose_disk_is_away_is_not_given_to_another_gallery(opened, gallery, tmp_path):
    opened(gallery)
    opened(gallery, "--index", tmp_path / "index")
    other = tmp_path / "other"
    other.mkdir()
    for path in gallery.glob("*.jpg"):
        Image.open(path).rotate(180).save(other / path.name)
    away = gallery.rename(tmp_path / "unplugged")
    _, lines = opened(other)
    assert "5 encoded, 0 removed, 0 kept" in lines[-1]
    with pytest.raises(InputError, match="which are not there now, and most are not in"):
        opened(other, "--index", tmp_path / "index")
    away.rename(gallery)
    for words in ((), ("--index", tmp_path / "index")):
        assert "0 encoded, 0 removed, 6 kept" in opened(gallery, *words)[1][-1]


@needs_faiss
def test_renamed_touched_and_copied_pictures_are_known_by_their_content(opened, gallery):
    opened(gallery)
    (gallery / "below").rename(gallery / "under")
    (gallery / "0.jpg").rename(gallery / "zero.jpg")
    os.utime(gallery / "1.jpg")
    shutil.copy(gallery / "2.jpg", gallery / "two.jpg")
    (gallery / "3.jpg").unlink()
    index, lines = opened(gallery)
    assert "0 encoded, 1 removed, 3 kept, 3 known by content" in lines[-1]
    expected = {"1.jpg", "2.jpg", "4.jpg", "two.jpg", "zero.jpg", os.path.join("under", "5.jpg")}
    assert found_in(index) == expected == set(index.paths)


@needs_faiss
@pytest.mark.parametrize("pause", [0, 2.2], ids=["at once", "later"])
def test_a_picture_replaced_by_one_of_its_size_and_time_is_noticed(pause, opened, encoders, gallery):
    """As tar, rsync and cp -p leave it. At once: in the same tick of the clock, for all that is known."""
    Image.open(gallery / "1.jpg").rotate(180).save(gallery / "other.jpg")
    path, states = gallery / "0.jpg", [(gallery / name).read_bytes() for name in ("0.jpg", "other.jpg")]
    for data in states:
        path.write_bytes(data.ljust(max(map(len, states)), b"\0"))  # bytes after a JPEG's end are not read
        os.utime(path, (1e9, 1e9))
        if data is states[0]:
            size = path.stat().st_size
            time.sleep(pause)
            index, _ = opened(gallery)
    assert path.stat().st_size == size and not index.is_there("0.jpg") and index.is_there("1.jpg")
    index, lines = opened(gallery)
    assert "1 encoded, 0 removed, 6 kept" in lines[-1]
    features = encoders.image_features([encoders.pixels(gallery / "other.jpg")])
    assert {name for _, name in index.search(features, 2, duplicates=True)[0]} == {"0.jpg", "other.jpg"}


def test_a_file_that_changed_just_before_it_was_read_is_compared_next_time():
    """On a clock that ticks every two seconds, as FAT's, it can change once more without a new time."""
    from retrieval.pictures import agree, settled

    tick = 1_800_000_000 * 10**9
    early, late = Stamp(9, 5, tick - 10**10), Stamp(9, 5, tick)
    assert agree(settled(early, tick), early) and not agree(settled(late, tick + 10**9), late)
    assert agree(settled(late, tick + 3 * 10**9), late) and not agree(early, late)


@needs_faiss
def test_what_has_gone_or_changed_since_the_index_was_made_is_not_shown(opened, encoders, gallery):
    from retrieval.page import Page

    shutil.copy(gallery / "2.jpg", gallery / "copy.jpg")
    index, _ = opened(gallery)
    features = encoders.text_features([QUERY])
    best = [path for _, path in index.search(features, 6)[0] if "2" not in path]
    (gallery / best[0]).unlink()
    Image.open(gallery / best[2]).rotate(180).save(gallery / best[1])
    (gallery / "2.jpg").unlink()
    (hits,), lost = index.find(features, 4)
    assert lost == 3 and [hit.path for hit in hits if hit.path != "copy.jpg"] == best[2:5]
    assert [hit.copies for hit in hits] == [0] * 4  # of the two copies one is left
    page = Page(encoders, index, 4, 9)
    result, tiles, remark = page.search(QUERY, None)
    assert result.names == [hit.path for hit in hits] and len(tiles) == 4
    assert "3 pictures gone or changed since" in remark
    gallery.rename(gallery.parent / "unplugged")
    result, tiles, remark = page.search(QUERY, None)
    assert not tiles and not result.pictures and "none of the pictures is there as it was" in remark


@needs_faiss
def test_search_leaves_out_a_picture_that_goes_while_the_gallery_is_encoded(search, gallery, monkeypatch):
    from retrieval.encoders import Encoders

    encode = Encoders.text_features
    monkeypatch.setattr(
        Encoders, "text_features", lambda self, asked: ((gallery / "1.jpg").unlink(), encode(self, asked))[1]
    )
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and str(gallery / "1.jpg") not in answers(out)[0] and len(answers(out)[0]) == 5
    assert "1 picture gone or changed since just now: left out" in err


@needs_faiss
def test_an_update_that_is_interrupted_forgets_nothing_of_a_gallery_that_moved(
    opened, encoders, gallery, tmp_path, monkeypatch
):
    opened(gallery)
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(gallery.rglob("*.jpg"))):
        (other / f"renamed{number}.jpg").write_bytes(path.read_bytes())
    Image.open(other / "renamed0.jpg").rotate(180).save(other / "new.jpg")
    shutil.rmtree(gallery)
    other.rename(gallery)

    def interrupted(self, pictures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(encoders), "image_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(gallery)
    _, lines = opened(gallery)
    assert "1 encoded" in lines[-1] and "6 kept" in lines[-1]


@needs_faiss
def test_a_file_that_may_not_be_looked_at_is_not_gone(opened, gallery, monkeypatch):
    """A folder that may be listed and not entered: as root nothing is forbidden, so the system's answer is
    put in its place."""
    opened(gallery)
    real = os.stat

    def look(path, *words, **more):
        if os.path.join("below", "") in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", look)
        index, lines = opened(gallery)
        assert "below cannot be read (Permission denied): what is known of it stays" in lines[0]
        assert "0 encoded, 0 removed, 6 kept" in lines[-1] and os.path.join("below", "5.jpg") in found_in(
            index
        )
    assert "0 encoded, 0 removed, 6 kept" in opened(gallery)[1][-1]


@needs_faiss
def test_a_known_picture_that_cannot_be_read_for_a_moment_stays(opened, encoders, gallery, monkeypatch):
    from retrieval import encoders as module
    from retrieval import pictures

    opened(gallery)
    os.chmod(gallery / "0.jpg", 0)  # which moves the time of its change, and no other

    def forbidden(path, *words, **more):
        if str(path).endswith("0.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "open", forbidden, raising=False)
        patched.setattr(module, "open_image", forbidden)
        index, lines = opened(gallery)
        assert "0 encoded, 0 removed, 6 kept" in lines[-1] and "0.jpg" in found_in(index)
    os.chmod(gallery / "0.jpg", 0o644)
    assert "0 encoded, 0 removed, 6 kept" in opened(gallery)[1][-1]


@needs_faiss
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_happens_to_a_gallery_its_index_answers_as_a_new_one(
    kind, seed, opened, encoders, gallery, tmp_path
):
    import random

    draw = random.Random(seed)

    def happens():
        files = sorted(path for path in gallery.rglob("*.jpg"))
        path, other = draw.choice(files), draw.choice(files)
        fresh = gallery / f"{draw.randrange(10**6)}.jpg"
        what = draw.randrange(6)
        if what == 0 and len(files) > 3:
            path.unlink()
        elif what == 1:
            shutil.copy(path, fresh)
        elif what == 2:
            path.rename(fresh)
        elif what == 3:
            os.utime(path)
        elif what == 4:
            shutil.copy2(path, other) if path != other else None
        else:
            Image.open(path).rotate(draw.choice([90, 180, 270]), expand=True).save(other)

    features = encoders.text_features([QUERY, "a man"])
    for turn in range(6):
        for _ in range(draw.randrange(1, 4)):
            happens()
        index, _ = opened(gallery, "--index_type", kind, "--index", tmp_path / "kept")
        new, _ = opened(gallery, "--index_type", kind, "--index", tmp_path / f"new{turn}")
        (kept, gone), (fresh, _) = index.find(features, 99, True), new.find(features, 99, True)
        assert gone == 0 and index.paths == new.paths and index.faiss.ntotal == new.faiss.ntotal
        for a, b in zip(kept, fresh, strict=True):
            assert [hit.path for hit in a] == [hit.path for hit in b]
            assert np.allclose([hit.similarity for hit in a], [hit.similarity for hit in b], atol=1e-6)


def test_a_program_of_ones_own_opens_a_gallery_without_a_bar(home, encoders, tmp_path, monkeypatch):
    from retrieval import gallery

    shown, bar = [], gallery.progress_bar

    def watched(total, what, shown_too=True, **more):
        shown.append(shown_too)
        return bar(total, what, shown_too, **more)

    monkeypatch.setattr(gallery, "progress_bar", watched)
    for number, progress in enumerate((True, False)):
        words = ["--config_file", home / "run", "--gallery", home / "data", "--index", tmp_path / str(number)]
        args = search_args([*map(str, words), "--device", "cpu"])
        found = gallery.open_gallery(encoders, args, [].append, progress=progress)
        assert isinstance(found, gallery.GalleryIndex) and len(found)
    assert shown == [True, False]
