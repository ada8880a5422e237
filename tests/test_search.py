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

from retrieval.gallery import Stamp
from tests.conftest import ROOT, load_script
from tests.tiny_run import make_run, missing
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
    status, out, _ = search("--split", "test", "--query_file", sentences, "--json")
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
    _, out, _ = search("--gallery", gallery, "--image", gallery / "0.jpg", "--json", "--top_k", 4)
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
    _, out, _ = search("--gallery", gallery, "--image", gallery / "turned.png", "--json", "--top_k", 2)
    assert {os.path.basename(path) for path in answers(out)[0]} == {"1.jpg", "turned.png"}


@needs_faiss
@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("RGBA", "webp"), ("P", "gif"), ("CMYK", "tiff"), ("1", "bmp")]
)
def test_pictures_of_any_kind_are_read(search, gallery, mode, suffix):
    Image.open(gallery / "0.jpg").convert(mode).save(gallery / f"other.{suffix}")
    _, out, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    assert str(gallery / f"other.{suffix}") in answers(out)[0]


# ---- the index keeps up ----


@needs_faiss
def test_only_new_and_changed_pictures_are_encoded_and_removed_ones_leave(search, gallery):
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "6 pictures" in err and "6 encoded, 0 removed" in err
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "0 encoded, 0 removed" in err

    shutil.copy(gallery / "0.jpg", gallery / "new.jpg")
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
    from retrieval.gallery import new_faiss

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

    shutil.copy(gallery / "0.jpg", gallery / "broken.jpg")  # mended
    *_, err = search("--gallery", gallery, "--query", QUERY)
    assert "1 encoded" in err and "1 unreadable as before" in err


@needs_faiss
@pytest.mark.parametrize("query", ["", "   ", "\n"])
def test_an_empty_query_is_refused(search, gallery, query):
    assert one_sentence(search("--gallery", gallery, "--query", query), "query 1 is empty")


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

    order = []

    def second():
        with locked(tmp_path, lambda line: order.append("waits")):
            order.append("second")

    with locked(tmp_path, order.append):
        thread = threading.Thread(target=second)
        thread.start()
        for _ in range(100):
            if order:
                break
            time.sleep(0.01)
        order.append("first")
    thread.join(5)
    assert order == ["waits", "first", "second"]


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
    shutil.copy(gallery / "0.jpg", tmp_path / "elsewhere" / "linked.jpg")
    (gallery / "more").symlink_to(tmp_path / "elsewhere")
    (gallery / "again").symlink_to(tmp_path / "elsewhere")
    (gallery / "loop").symlink_to(gallery)
    status, out, _ = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and len(answers(out)[0]) == 7


def test_a_phones_format_is_named(search, tmp_path):
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"0")
    status, _, err = search("--gallery", tmp_path / "phone", "--query", QUERY)
    assert status == 2 and ".heic are not read here: export them as JPEG first" in err


@needs_faiss
@pytest.mark.parametrize("target", ["none/r.png", "r.docx"])
def test_a_result_that_cannot_be_drawn_is_told_before_anything_is_encoded(target, search, gallery, tmp_path):
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
    assert err.count("cannot be kept in") == 1 and "6 pictures in memory: 6 encoded" in err
    assert err.index("cannot be kept in") < err.index("encoded")


@needs_faiss
def test_an_index_is_kept_in_a_folder_whose_name_is_not_utf8(gallery, tmp_path):
    """As unpacked from an archive of another system: Python opens such a name, FAISS does not."""
    from retrieval.gallery import GalleryIndex

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
    from retrieval.gallery import GalleryIndex

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
    assert "5 pictures" in err and err.count("passed over") == 2
    monkeypatch.undo()
    _, _, err = search("--gallery", gallery)
    assert "6 pictures" in err and "1 encoded" in err and "1 unreadable as before" in err


@needs_faiss
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_keeps_what_has_been_encoded(number, home, gallery, tmp_path):
    """Batches of one picture; the signal comes from the program itself, after the third."""
    code = f"""
import signal, sys
from retrieval import encoders
real, count = encoders.Encoders.image_features, []
def image_features(self, pictures):
    count.append(1)
    if len(count) == 4:
        signal.raise_signal({int(number)})  # to this thread: at once, however busy the others are
    return real(self, pictures)
encoders.Encoders.image_features = image_features
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
    from retrieval import gallery as module

    monkeypatch.setattr(module, "SAVE_PAUSE", -1)
    index = module.GalleryIndex(tmp_path, gallery, "mine", 2)
    sizes = []

    def encode(paths):
        for path in paths:
            table = tmp_path / "table.json"
            sizes.append(len(json.loads(table.read_text())["paths"]) if table.exists() else 0)
            yield [path], np.ones((1, 2), np.float32), {}

    found, *_ = module.scan(gallery)
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
