"""The measured figures in README.md and docs/ are those of benchmarks/results."""

import json
import shutil

import pytest

from benchmarks import report

LINE = {
    "figure": report.FIGURES["step"],
    "unit": "ms",
    "arms": {"published": 7643.8, "ours": 3847.8, "--wide": 12.0},
    "ratio": {"ours": 1.987},
    "command": "python -m benchmarks.step",
    "machine": "a CPU, load 1.0",
    "versions": {"python": "3.11"},
    "date": "2026-01-02",
}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The repository's pages in a folder of their own."""
    shutil.copytree(report.ROOT / "docs", tmp_path / "docs")
    shutil.copy(report.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_every_marked_figure_in_the_pages_is_what_the_results_say(capsys):
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_every_name_for_marks_is_used_in_the_pages():
    pages = [report.ROOT / "README.md", *(report.ROOT / "docs").glob("*.md")]
    marks = [mark[1] for page in pages for mark in report.MARK.finditer(page.read_text(encoding="utf-8"))]
    assert {mark.partition("/")[0] for mark in marks} == report.FIGURES.keys() | report.TEXTS.keys()


def test_the_speed_table_and_the_demos_table_are_marked():
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    for heading, first in (("## Speed", "full-size training step"), ("## Two commands", "text to image")):
        table = text[text.index(heading) :]
        row = next(line for line in table.splitlines() if line.startswith(f"| {first}"))
        place = text.index(row)
        marks = report.MARK.finditer(text)
        assert "<!--=" in row or any(mark.start() < place < mark.end() for mark in marks), first


def test_a_figure_that_was_typed_is_told_in_one_sentence_and_written_back(pages, capsys):
    readme = pages / "README.md"
    good = readme.read_text(encoding="utf-8")
    mark = next(mark for mark in report.MARK.finditer(good) if mark[1] == "step/ours")
    row = next(mark for mark in report.MARK.finditer(good) if mark[1] == "demo table")[2]
    bad = good.replace(mark[0], mark[0].replace(mark[2], "1.23 s"))
    bad = bad.replace(row, row.replace("| text", "| no text"))
    readme.write_text(bad, encoding="utf-8")
    assert report.main(["--check"]) == 1
    table, step = capsys.readouterr().out.splitlines()
    assert table.startswith("README.md, line ") and "demo table is not what the results say" in table
    assert "step/ours is '1.23 s', the results say" in step and repr(mark[2]) in step
    assert report.main(["--write"]) == 0 and capsys.readouterr().out == ""
    assert readme.read_text(encoding="utf-8") == good


@pytest.mark.parametrize(
    "text, said",
    [
        ("a <!--=stop/ours-->1 s<!--/-->", "there is no figure 'stop/ours'"),
        ("a <!--=step/theirs-->1 s<!--/-->", "with 'theirs'"),
        ("a <!--=step/published/ratio-->1x<!--/-->", "no ratio"),
        ("a <!--=step/ours/share-->1x<!--/-->", "there is no figure 'step/ours/share'"),
        ("a <!--=step/ours-->3.85 s", "no end"),
        ("a <!--=step/ours-->3.85 s, <!--=step/ours-->3.85 s<!--/-->", "no end"),
        ("a\n<!--=step/ours-->3.85 s<!--/-->", "must not begin with the mark"),
    ],
)
def test_a_mark_that_cannot_be_right_is_one_sentence(text, said):
    sentences = list(report.what_is_wrong(text, [LINE]))
    assert any(said in sentence for sentence in sentences), sentences
    assert report.filled(text, [LINE]) == text  # nothing is lost


def test_the_newest_line_that_has_the_arm_counts_whatever_the_files_order():
    newer = {**LINE, "arms": {"published": 2.0, "ours": 1.0}, "date": "2026-01-03"}
    same_day = {**LINE, "arms": {"published": 3.0}, "date": "2026-01-03"}
    for lines in ([LINE, newer, same_day], [newer, same_day, LINE]):
        assert report.said("step/published", lines) == "3.00 ms"
        assert report.said("step/ours", lines) == "1.00 ms"
        assert report.said("step/wide", lines) == "12.0 ms"  # GitHub shows a comment that holds two hyphens


@pytest.mark.parametrize(
    "value, unit, said",
    [
        (7643.8, "ms", "7.64 s"),
        (0.13015, "s", "0.130 s"),
        (691.36, "s", "11.5 minutes"),
        (101, "s", "101 s"),
        (603.95, "MiB", "604 MiB"),
        (1953.1, "MiB", "1.91 GiB"),
        (11136, "samples/s", "11 136 samples/s"),
        (100.0, "%", "100 %"),
        (20.0, "", "20"),
    ],
)
def test_a_figure_is_shown_with_three_digits_in_a_unit_of_its_size(value, unit, said):
    assert report.human(value, unit) == said


def test_a_demos_run_becomes_the_readmes_table_log_and_words(tmp_path, monkeypatch, capsys):
    from benchmarks import demo, harness

    run = tmp_path / "run"
    run.mkdir()
    figures = {"R1": 23.75, "R5": 60.0, "R10": 73.375, "mAP": 26.204, "mINP": 14.651}
    (run / "results.json").write_text(json.dumps({"t2i": figures}))
    lines = ["|  test  | 100 |  400   |   800    |"]
    for epoch in (1, 2, 3, 4):
        start = f"2026-01-01 10:0{epoch}:00,123 IRRA.train INFO: Epoch[{epoch}]"
        lines += [f"{start} Iteration[{n}/50], loss: 4, mlm_acc: 0.1{epoch}" for n in (25, 50)]
        if epoch % 2 == 0:
            lines += [f"Validation Results - Epoch: {epoch}", "| task | R1 |", f"| t2i  | {20 * epoch}.000 |"]
    (run / "train_log.txt").write_text("\n".join(lines))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert demo.main(["--config_file", str(run)]) == 2 and "--chance" in capsys.readouterr().err
    (run / "results.json").write_text(json.dumps({"t2i": figures, "chance": figures}))
    assert demo.main(["--config_file", str(run / "configs.yaml")]) == 0
    found = report.all_lines(tmp_path / "results")
    assert "| text to image | 23.75 | 60.00 | 73.38 | 26.20 | 14.65 |" in report.said("demo table", found)
    log = report.said("demo log", found).split("\n")
    assert [line[:26] for line in log[3:-3]] == [f"Epoch[{n}] Iteration[50/50]," for n in (1, 2, 4)]
    assert report.said("demo validation", found) == "40 after epoch 2 and 80 after epoch 4"
    assert report.said("demo training/ours", found) == "3.00 minutes"
    assert report.said("demo split/sentences", found) == "800"


@pytest.mark.parametrize("name", ["results.json", "train_log.txt"])
def test_a_run_that_lacks_a_file_is_one_sentence(tmp_path, name, capsys):
    from benchmarks import demo

    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "train_log.txt").write_text("")
    (tmp_path / name).unlink()
    assert demo.main(["--config_file", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert name in err and err.count("\n") == 1
