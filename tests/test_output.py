"""What leaves a program as text: it ends no program, acts on no terminal, is no mathematics in a plot, and
stays in its place on a sheet."""

import io
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from datasets import check, synthetic
from datasets.synthetic import make_dataset
from retrieval.contact_sheet import MARGIN, TEXT, Found, contact_sheet, font_of, wrapped
from retrieval.queries import draw_query
from retrieval.relevance import WordMap, draw_word_maps
from tests.children import ROOT, words
from tests.conftest import load_script
from tests.tiny_run import missing
from utils.checkpoint import load_checkpoint
from utils.log import setup_logger

ENCODINGS = ("ascii", "cp1252", "gbk")
ODD = "一个女人 🙂 é \x1b[31mred\x1b[0m \u202edeb\u202c $x_1^{2$ \\frac"
ACTING = ("\x1b", "\u202e", "\x07")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A data set whose captions and file names hold what few terminals do."""
    root = tmp_path_factory.mktemp("odd")
    make_dataset(root, train_ids=4, val_ids=1, test_ids=3, images_per_id=2, size=(64, 32))
    folder = root / "CUHK-PEDES"
    records = json.loads((folder / "reid_raw.json").read_text())
    for number, record in enumerate(records):
        (folder / "imgs" / record["file_path"]).rename(folder / "imgs" / f"图 {ODD[:22]}\a{number}.jpg")
        record.update(file_path=f"图 {ODD[:22]}\a{number}.jpg", captions=[f"{ODD} {number}"] * 2)
    (folder / "reid_raw.json").write_text(json.dumps(records))
    return root


def spoken(monkeypatch, encoding, main, argv):
    """(status, text) of a program whose output has this encoding, as PYTHONIOENCODING makes it."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
        for stream in streams.values():
            stream.flush()
    text = "".join(stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert not any(character in text for character in ACTING), text
    return status, text


@pytest.fixture(scope="module")
def run(odd, train_script, tmp_path_factory):
    """A run whose name is odd too."""
    logs, patch = tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    argv = words(odd, logs, "--name", "运行 $x_1$", "--save_period", "1", epochs=1)
    status, text = spoken(patch, "ascii", train_script.main, argv)
    assert status == 0 and "best R1" in text
    (folder,) = logs.glob("*/*")
    return folder


def test_the_log_is_utf8_whatever_the_output_is(run):
    log = (run / "train_log.txt").read_bytes().decode("utf-8")
    assert "运行 $x_1$" in log and not any(character in log for character in ACTING)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_is_printed_in_any_encoding(encoding, monkeypatch):
    for name in ("train", "test", "search", "visualize", "export", "demo"):
        status, text = spoken(monkeypatch, encoding, load_script(name).main, ["--help"])
        assert status == 0 and "Exit status: 0" in text
    status, text = spoken(monkeypatch, encoding, check.main, ["--help"])
    assert status == 0 and "--decode" in text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_check_and_the_test_print_any_caption_and_name(encoding, run, odd, test_script, monkeypatch):
    damaged = next(path for path in sorted((odd / "CUHK-PEDES" / "imgs").iterdir()) if path.suffix == ".jpg")
    whole = damaged.read_bytes()
    damaged.write_bytes(b"")
    try:
        argv = ["--root_dir", odd, "--decode", "--text_length", "12"]
        status, text = spoken(monkeypatch, encoding, check.main, argv)
    finally:
        damaged.write_bytes(whole)
    assert status == 1 and "cannot be read" in text and "\\x1b[31m" in text and "captions are cut" in text
    argv = ["--config_file", run, "--picture", run / "结.png"]
    status, text = spoken(monkeypatch, encoding, test_script.main, argv)
    assert status == 0 and "are drawn in" in text and (run / "结.png").is_file()


@missing("faiss", "faiss-cpu")
def test_a_search_prints_any_name_and_its_json_holds_it(run, odd, monkeypatch, tmp_path):
    gallery = odd / "CUHK-PEDES" / "imgs"
    argv = ["--config_file", run, "--gallery", gallery, "--query", ODD, "--top_k", "2"]
    search = load_script("search").main
    status, text = spoken(monkeypatch, "ascii", search, [*argv, "--save", tmp_path / "s.png"])
    assert status == 0 and "\\u56fe" in text and "\\x1b[31m" in text
    status, text = spoken(monkeypatch, "ascii", search, [*argv, "--json"])
    (answer,) = json.loads(text[text.index("[{") :].splitlines()[0])
    assert status == 0 and answer["query"] == ODD and os.path.isfile(answer["results"][0]["file"])


@missing("matplotlib", "matplotlib")
def test_pictures_of_any_caption_name_and_run_are_drawn(run, monkeypatch, tmp_path):
    argv = ["--config_file", run, "--cmc", "--worst", "1", "--curves", run, "--output", tmp_path / "画"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        status, text = spoken(monkeypatch, "ascii", load_script("visualize").main, argv)
    assert status == 0 and len(list((tmp_path / "画").glob("*.png"))) == 3, text
    export = [run, "--format", "safetensors", "--output", tmp_path / "出"]
    assert spoken(monkeypatch, "ascii", load_script("export").main, export)[0] == 0
    drawn = ["--root", tmp_path / "画", "--ids", "1", "--val_ids", "1", "--test_ids", "1"]
    assert spoken(monkeypatch, "ascii", synthetic.main, drawn)[0] == 0


# ---- the terminal and the log ----


def test_a_log_line_acts_on_no_terminal(capsys):
    setup_logger("IRRA").warning("left out: a\x1b[2Jb\u202ec\udcff\ttab\nnext line")
    out = capsys.readouterr().out
    assert out.endswith("left out: a\\x1b[2Jb\\u202ec\\udcff\ttab\nnext line\n")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[0m", "\udcff", "a/b", ""])
def test_a_run_name_that_is_no_folder_name_is_refused(name, odd, train_script, tmp_path, capsys):
    assert train_script.main(words(odd, tmp_path, "--name", name)) == 2
    assert "becomes part of a folder name" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_tensorboard_cannot_write_to_is_refused_before_anything_is_made(
    odd, train_script, tmp_path, capsys
):
    assert train_script.main(words(odd, tmp_path / os.fsdecode(b"n\xff"))) == 2
    assert "where a name is not UTF-8" in capsys.readouterr().err and not list(tmp_path.iterdir())


ENDS = {  # what a shell does to a program's output
    "nobody reads": '"$@" 2>&1 | head -n 1',
    "closed": '"$@" >&- 2>&- <&-',
}


@pytest.mark.parametrize("end", ENDS)
def test_a_training_that_nobody_listens_to_goes_on_to_its_end(end, odd, tmp_path):
    command = [sys.executable, "train.py", *words(odd, tmp_path, epochs=1)]
    script = f"set -o pipefail; {ENDS[end]}"
    done = subprocess.run(["bash", "-c", script, "-", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done
    (folder,) = tmp_path.glob("*/*")
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    lines = (folder / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert "best R1" in lines[-1] and sum("Epoch 1 done" in line for line in lines) == 1


def test_another_error_of_the_output_is_still_told(monkeypatch):
    """As of a full disk, on which the terminal's words are kept."""
    logger = setup_logger("IRRA")
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(logger.handlers[0], "stream", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(OSError, match="No space"):
            logger.info("a line")


# ---- sheets ----

CAPTIONS = [
    "a man",
    "a man in red " * 40,
    "W" * 400,
    "一个穿红色外套的女人" * 30,
    "z" + "\u0301\u0316" * 300,
    "three  spaces\tand\na line end",
    f"{ODD} " * 20,
    "",
    "     ",
    "word " + "x" * 100_000,
]


@pytest.mark.parametrize("lines", [1, 2, 4])
@pytest.mark.parametrize("caption", CAPTIONS, ids=range(len(CAPTIONS)))
def test_a_caption_is_wrapped_to_its_width_and_cut_with_an_ellipsis(caption, lines):
    font, width = font_of(16), 300
    found = wrapped(caption, width, font, lines).split("\n")
    assert len(found) <= lines and all(font.getlength(line) <= width for line in found)
    assert not any(character in "".join(found) for character in (*ACTING, "\t"))
    whole = wrapped(caption, 10**6, font)
    shown, wanted = ("".join(text.split()) for text in ("".join(found), whole))
    if shown != wanted:
        assert shown.endswith("…") and wanted.startswith(shown[:-1])


def test_a_caption_never_covers_a_picture(tmp_path):
    """Nor do marks piled up over a letter: below its place every sheet is the same."""
    Image.new("RGB", (96, 256), (10, 200, 10)).save(tmp_path / "a.png")
    found = [Found(str(tmp_path / "a.png"), 0.5, True)] * 2
    plain = np.asarray(contact_sheet([("a", found), ("a", found)]))
    for caption in CAPTIONS:
        sheet = np.asarray(contact_sheet([(caption, found), (caption, found)]))
        assert (
            sheet[MARGIN + TEXT : MARGIN + TEXT + 266] == plain[MARGIN + TEXT : MARGIN + TEXT + 266]
        ).all()
        query = np.asarray(draw_query(caption, [tmp_path / "a.png"], found, "person " + "9" * 400))
        assert (query == (10, 200, 10)).all(2).sum() == 3 * 96 * 256
        maps = [WordMap(word, np.ones((4, 2)) / 8) for word in (caption, "a")]
        sheet = np.asarray(draw_word_maps(Image.new("RGB", (96, 256), (10, 200, 10)), maps))
        assert (sheet == (10, 200, 10)).all(2).sum() == 96 * 256 and sheet.shape[1] < 1000


# ---- plots ----


@missing("matplotlib", "matplotlib")
def test_a_plots_words_are_words(tmp_path):
    """Unbalanced mathematics would be an error, a name with a _ before it would be left out, and letters that
    the font lacks would be warned of."""
    from retrieval.curves import draw_cmc, draw_legend, drawing

    names = ["_hidden", "$x_1^{2$", "一 🙂", "\\frac", "a\u202eb\nc", "long" * 200, "last"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drawing(tmp_path / "legend.png", 6, 4) as figure:
            axes = figure.add_subplot()
            draw_legend(figure, {name: axes.plot([1, 2])[0] for name in names}, room=60)
            drawn = [text.get_text() for text in figure.legends[0].get_texts()]
        draw_cmc({"text to image": [1.0, 2.0]}, "".join(names), tmp_path / "cmc.png")
    assert drawn[:5] == ["_hidden", "$x_1^{2$", "一 🙂", "\\frac", "a\\u202eb\\nc"]
    assert len(drawn[5]) == 60 and "…" in drawn[5] and drawn[6] == "last"
    assert Image.open(tmp_path / "legend.png").size == (720, 480)
    assert Image.open(tmp_path / "cmc.png").size == (720, 504)
