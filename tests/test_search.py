"""search.py: what it finds and prints, and that bad input is one sentence."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.encoders import Encoders, cut_notice
from tests.conftest import ROOT, load_script
from tests.tiny_run import QUERY, needs_faiss
from utils.errors import InputError
from utils.option_types import number_list
from utils.tool_options import search_args

pytest_plugins = "tests.galleries"
pytestmark = needs_faiss


def answers(out):
    """[paths, best first] of each query in what `search.py --json` prints."""
    return [[hit["file"] for hit in record["results"]] for record in json.loads(out)]


# ---- what is found ----


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


def test_table_picture_and_json_show_the_same(search, gallery, tmp_path):
    _, out, _ = search("--gallery", gallery, "--query", QUERY, "--json", "--top_k", 3)
    (paths,) = answers(out)
    status, out, _ = search(
        "--gallery", gallery, "--query", QUERY, "--top_k", 3, "--save", tmp_path / "r.png"
    )
    lines = [line for line in out.splitlines() if ".jpg" in line]
    assert status == 0 and [line.split("|")[3].strip() for line in lines] == paths
    assert Image.open(tmp_path / "r.png").size[0] > 300


def test_a_picture_finds_itself_first_and_copies_are_one_line_with_their_number(search, gallery, tmp_path):
    for name in ("b.jpg", "a.jpg"):
        shutil.copy(gallery / "3.jpg", gallery / "below" / name)
    words = ("--gallery", gallery, "--image", gallery / "3.jpg", "--top_k", 3)
    _, out, err = search(*words, "--json")
    assert "8 pictures" in err and "6 encoded, 0 removed, 0 kept, 2 known by content" in err
    (record,) = json.loads(out)
    assert [hit["copies"] for hit in record["results"]] == [2, 0, 0]  # three different pictures
    assert record["results"][0]["file"] == str(gallery / "3.jpg")
    assert record["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    _, out, _ = search(*words, "--save", tmp_path / "one.png")
    assert out.count(".jpg") == 4 and out.count("and 2 copies") == 1  # the query's own name is one
    _, out, _ = search(*words, "--json", "--duplicates")
    (record,) = json.loads(out)
    names = [os.path.basename(hit["file"]) for hit in record["results"]]
    assert names == ["3.jpg", "a.jpg", "b.jpg"]  # of equals the first by name
    assert [hit["copies"] for hit in record["results"]] == [0, 0, 0]
    shutil.rmtree(gallery / "below")
    search(*words, "--save", tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_a_turned_picture_with_an_exif_tag_equals_the_upright_one(search, gallery):
    with Image.open(gallery / "1.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
        image.convert("RGB").rotate(90, expand=True).save(gallery / "turned.png", exif=exif)
    words = ("--gallery", gallery, "--image", gallery / "turned.png", "--json", "--top_k", 2)
    _, out, _ = search(*words, "--duplicates")
    assert {os.path.basename(path) for path in answers(out)[0]} == {"1.jpg", "turned.png"}


def test_pictures_of_any_kind_are_found(search, gallery):
    names = {"L": "a.png", "RGBA": "b.webp", "P": "c.gif", "CMYK": "d.tiff", "1": "e.bmp"}
    for mode, name in names.items():
        Image.open(gallery / "0.jpg").convert(mode).save(gallery / name)
    _, out, _ = search("--gallery", gallery, "--query", QUERY, "--json", "--duplicates", "--top_k", 99)
    assert {str(gallery / name) for name in names.values()} <= set(answers(out)[0])
    assert len(answers(out)[0]) == 11


def test_search_leaves_out_a_picture_that_goes_while_the_gallery_is_encoded(search, gallery, monkeypatch):
    encode = Encoders.text_features

    def meanwhile(self, sentences):
        (gallery / "1.jpg").unlink()
        return encode(self, sentences)

    monkeypatch.setattr(Encoders, "text_features", meanwhile)
    status, out, err = search("--gallery", gallery, "--query", QUERY, "--json")
    assert status == 0 and str(gallery / "1.jpg") not in answers(out)[0] and len(answers(out)[0]) == 5
    assert "1 picture gone or changed since just now: left out" in err


# ---- bad input: one sentence, nothing lost ----


def one_sentence(result, *words):
    status, out, err = result
    last = err.strip().splitlines()[-1]
    assert status == 2 and not out and last.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert str(word) in last
    return True


@pytest.mark.parametrize("query", ["", "   ", "\n", "&nbsp;", "\x01\x02"])
def test_an_empty_query_is_refused(search, gallery, query):
    assert one_sentence(search("--gallery", gallery, "--query", query), "query 1 is empty")


def test_a_line_of_the_query_file_is_one_query_whatever_it_holds(search, gallery, tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffa man\u2028in red\r\n\r\na \x0cwoman\x85 in blue\n".encode())
    words = ("--gallery", gallery, "--query_file", tmp_path / "lines.txt", "--json", "--top_k", 1)
    records = json.loads(search(*words)[1])
    assert [record["query"] for record in records] == ["a man\u2028in red", "a \x0cwoman\x85 in blue"]


def test_a_very_long_sentence_is_cut_and_said_so(search, encoders, gallery):
    long, shorter = "a woman in a red coat " * 500, "a woman in a red coat " * 20
    status, _, err = search("--gallery", gallery, "--query", long)  # 11 000 characters
    assert status == 0 and "has 3002 tokens, and the model reads 77: the rest is cut off" in err
    assert np.array_equal(encoders.text_features([long]), encoders.text_features([shorter]))
    assert cut_notice(encoders, QUERY) is None


def test_a_model_whose_features_are_no_numbers_is_one_sentence_and_never_nan(home, search, gallery, tmp_path):
    state = torch.load(home / "run" / "best.pth")
    state["model"]["base_model.text_projection"] *= float("nan")
    torch.save(state, tmp_path / "nan.pth")
    words = ("--gallery", gallery, "--query", QUERY, "--json", "--checkpoint", tmp_path / "nan.pth")
    assert one_sentence(search(*words), "features of this model are not numbers")


def test_a_sentence_in_letters_that_english_does_not_use_is_told_to_mean_little(encoders):
    for sentence in ("一个穿红色外套的女人", "Мужчина в синей рубашке"):
        assert cut_notice(encoders, sentence).startswith(
            f'"{sentence}" is not in English letters: only a run'
        )
    for sentence in ("une femme élégante, naïve", "a 7 🙂", "a man (男)", "12"):
        assert cut_notice(encoders, sentence) is None
    both = cut_notice(encoders, "红" * 90)
    assert both.startswith(f'"{"红" * 40}…" is not in') and "; it has " in both and "is cut off" in both


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


def test_options_are_checked_before_anything_is_loaded(home, search, gallery, tmp_path):
    assert one_sentence(search("--query", QUERY), "--gallery FOLDER", "--split")
    for folder in (tmp_path / "none", ""):
        assert one_sentence(search("--gallery", folder, "--query", QUERY), "no such folder")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "blank").write_text("\n \n")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "binary"), "UTF-8")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "blank"), "no sentence")
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "none"), "cannot be read")
    with pytest.raises(SystemExit):
        search_args(["--config_file", str(home / "run"), "--gallery", str(gallery), "--top_k", "0"])
    with pytest.raises(InputError, match="no config file"):
        search_args(["--config_file", str(tmp_path), "--gallery", str(gallery)])


@pytest.mark.parametrize("letter", [os.fsdecode(b"\xe9"), "\ud83d"], ids=["Latin-1", "half an emoji"])
def test_a_sentence_that_is_no_text_is_refused_as_in_a_file(letter, search, gallery, tmp_path):
    result = search("--gallery", gallery, "--query", QUERY, f"a caf{letter}")
    assert one_sentence(result, "query 2 is not text in UTF-8")
    (tmp_path / "queries").write_bytes("a café".encode("latin-1"))
    assert one_sentence(search("--gallery", gallery, "--query_file", tmp_path / "queries"), "UTF-8")


def test_a_missing_package_is_a_sentence_with_the_command(search, gallery, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    result = search("--gallery", gallery, "--query", QUERY)
    assert one_sentence(result, "faiss-cpu", "python -m pip install -r requirements-search.txt")


def test_lists_of_numbers():
    assert number_list("0,17") == [0, 17] and number_list("0-3, 9") == [0, 1, 2, 3, 9]
    for text in ("", "a", "1,,2", "3-1", "-1"):
        with pytest.raises(Exception, match="not a list of numbers"):
            number_list(text)


@pytest.mark.parametrize("target", ["none/r.png", "r.docx", "folder.png", "/proc/r.png"])
def test_a_result_that_cannot_be_drawn_is_told_before_anything_is_encoded(target, search, gallery, tmp_path):
    (tmp_path / "folder.png").mkdir()
    status, _, err = search("--gallery", gallery, "--query", QUERY, "--save", tmp_path / target)
    assert status == 2 and "cannot write the picture" in err and "encoded" not in err
    assert not (tmp_path / "index").exists()


def test_a_broken_query_picture_is_one_sentence(search, gallery, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path / "broken.jpg"), "broken.jpg")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path / "none.jpg"), "no picture at")
    assert one_sentence(search("--gallery", gallery, "--image", tmp_path), "is a folder")


BEGINNINGS = {  # of a file named a.jpg, and what is said of it
    b"": "it is empty",
    b"\0\0\0\x18ftypheic" + bytes(99): "it is HEIC",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "it is a Git LFS pointer",
    b"\r\n<!DOCTYPE html>": "it is a web page",
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


def test_what_pillow_remarks_about_a_file_it_reads_is_not_shown(tmp_path):
    """In a program of its own: pytest has its own way with warnings."""
    transparent = bytes(range(256))
    Image.new("P", (9, 9)).save(tmp_path / "a.png", transparency=transparent)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40))
    code = "import sys; from retrieval.encoders import open_picture; [*map(open_picture, sys.argv[1:])]"
    words = [sys.executable, "-c", code, tmp_path / "a.png", tmp_path / "b.jpg"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_pictures_of_a_page_that_was_killed_go_at_the_next_start(tmp_path, monkeypatch):
    demo = load_script("demo")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"irra-page-{ended.pid}-x", f"irra-page-{os.getpid()}-y", "irra-page-other"):
        (tmp_path / name).mkdir()
    demo.remove_pictures_of_dead_pages()
    assert {path.name for path in tmp_path.iterdir()} == {f"irra-page-{os.getpid()}-y", "irra-page-other"}
