"""`python -m benchmarks.drawn`: its paired test, its page, a tiny table that is interrupted and goes on."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import drawn, drawn_report, table, table_report
from benchmarks.drawn_report import T95, difference, paired
from benchmarks.programs import TOOK, Programs
from benchmarks.table import Row, Run
from datasets.synthetic_hard import HARD, make_hard_dataset
from tests.test_synthetic import contents
from tests.test_table import TINY, folder_of, interrupted, keep, record
from utils.errors import InputError
from utils.options import read_run_options

ROOT = Path(__file__).parent.parent
SIZES = {"ids": 6, "val_ids": 0, "test_ids": 4, "images_per_id": 2, "size": [64, 32]}


# ---- the paired test ----


def test_a_paired_difference_is_that_of_an_example_by_hand():
    """Differences 2, 1, 3, 6, 3: mean 3, squares of what is left 1, 4, 0, 9, 0: variance 14/4, standard error
    √(3.5/5) = 0.83666, t of 4 degrees of freedom 2.776: 3 ± 2.3226."""
    mean, half = paired([12.0, 14.0, 13.0, 18.0, 11.0], [10.0, 13.0, 10.0, 12.0, 8.0])
    assert mean == pytest.approx(3) and half == pytest.approx(2.3226, abs=1e-4)


def test_what_all_seeds_share_widens_no_interval():
    easy, hard = [10.0, 50.0, 90.0], [9.0, 49.0, 89.0]
    assert paired(easy, hard) == (1.0, 0.0)
    assert paired([3.0], [1.0]) == (2.0, None)


@pytest.mark.parametrize("degrees", range(1, len(T95) + 1))
def test_a_quantile_leaves_2_5_percent_on_either_side(degrees):
    """By the density of Student's t, added up between 0 and the quantile."""
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    steps, width = 20_000, T95[degrees - 1] / 20_000
    middles = ((n + 0.5) * width for n in range(steps))
    inside = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in middles) * width
    assert inside == pytest.approx(0.475, abs=1e-4)


def runs_of(row, *figures, first_seed=1, **more):
    """Runs of a row with these Rank-1 of the last epoch."""
    seeds = range(first_seed, first_seed + len(figures))
    return [record(seed, R1, row, recipe="", **more) for seed, R1 in zip(seeds, figures, strict=True)]


def test_seeds_that_only_one_of_two_rows_has_do_not_count():
    ours, theirs = runs_of("irra", 5.0, 7.0, 6.0), runs_of("clip", 4.0, 5.0, 99.0, first_seed=2)
    assert difference(ours, theirs, "R1") == paired([7.0, 6.0], [4.0, 5.0])
    assert difference(ours, runs_of("clip", 1.0, first_seed=9), "R1") is None


# ---- the page ----


def test_the_page_tells_what_is_better_what_is_worse_and_what_cannot_be_told():
    runs = runs_of("clip", 10.0, 11.0, 12.0) + runs_of("irra", 15.0, 16.5, 17.0, seconds=100.0)
    runs += runs_of("cmpm", 5.0, 6.5, 7.0) + runs_of("tbps", 10.0, 15.0, 8.0)
    text = drawn_report.page(runs, drawn.ROWS, drawn.NOISE_OF)
    assert "- Rank-1 against CLIP: better: irra; worse: cmpm; no difference shown: tbps.\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| irra |")]
    mean, half = paired([15.0, 16.5, 17.0], [10.0, 11.0, 12.0])
    assert line.split("|")[2:4] == [" `--loss_names sdm+mlm+id` ", " 16.17 ± 1.04 "]
    assert f" {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] |" in line and "| 100 | 3 |" in line
    assert "Not run: sdm, sdm_masked" in text


def test_a_row_with_wrong_captions_is_held_against_baselines_with_as_many():
    runs = runs_of("clip", 50.0, 51.0) + runs_of("clip_noise_0.2", 30.0, 32.0)
    runs += runs_of("irra_noise_0.2", 33.0, 36.0)
    text = drawn_report.page(runs, drawn.ROWS, drawn.NOISE_OF)
    section = text.split("## 20% of the training captions wrong")[1].split("\n## ")[0]
    mean, half = paired([33.0, 36.0], [30.0, 32.0])
    assert f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" in section and "| clip |" not in section


def test_a_part_is_held_against_the_row_that_has_all_but_it():
    assert {row for pair in drawn_report.PARTS for row in pair} <= drawn.METHODS.keys()
    runs = runs_of("rde", 12.0, 13.0, 17.0) + runs_of("rde_no_division", 10.0, 12.0, 14.0)
    runs += runs_of("irra_clean", 5.0, 6.0) + runs_of("rde_noise_0.2", 7.0, 8.0)
    lines = drawn_report.page(runs, drawn.ROWS, drawn.NOISE_OF).splitlines()
    (line,) = [line for line in lines if " − rde_no_division" in line]
    assert line == "| division | rde − rde_no_division | +2.00 [-0.48, +4.48] |"


def test_the_page_in_docs_is_what_the_kept_runs_give(capsys):
    assert drawn.main(["--check"]) == 0, capsys.readouterr().err


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A page and its figures, of four runs, that tests may spoil."""
    monkeypatch.setattr(drawn, "REPOSITORY", tmp_path)
    monkeypatch.setattr(drawn, "FIGURES", tmp_path / "drawn.json")
    monkeypatch.setattr(drawn, "PAGE", tmp_path / "results.md")
    runs = runs_of("clip", 10.0, 11.0) + runs_of("irra", 12.0, 14.0)
    runs = [{**run, "recipe": drawn.recipe_of(run["row"])} for run in runs]
    drawn.FIGURES.write_text(table_report.results_file(runs))
    drawn.PAGE.write_text(drawn_report.page(runs, drawn.ROWS, drawn.NOISE_OF))
    return tmp_path


def test_a_figure_that_was_typed_is_found(repository, capsys):
    assert drawn.main(["--check"]) == 0
    drawn.PAGE.write_text(drawn.PAGE.read_text().replace("13.00", "13.10"))
    assert drawn.main(["--check"]) == 2
    assert "--write makes it" in capsys.readouterr().err
    drawn.PAGE.unlink()
    assert drawn.main(["--check"]) == 2


def test_figures_of_another_recipe_than_stands_there_are_found(repository, monkeypatch, capsys):
    monkeypatch.setitem(drawn.ROWS, "irra", drawn.ROWS["irra"]._replace(words="--loss_names sdm+id"))
    assert drawn.main(["--check"]) == 2
    err = capsys.readouterr().err
    assert "irra, seed 1, was made with another recipe" in err and err.count("\n") == 1


def test_a_recipe_is_known_by_its_options_and_by_its_set(monkeypatch):
    found = {name: drawn.recipe_of(name) for name in drawn.ROWS}
    assert len(set(found.values())) == len(found)
    monkeypatch.setitem(HARD["small"], "ids", 7)
    assert not set(found.values()) & {drawn.recipe_of(name) for name in found}


# ---- running ----


@pytest.mark.parametrize("method", drawn.METHODS)
def test_each_method_starts_on_a_hard_set_and_takes_a_step(method, tmp_path, monkeypatch, train_script):
    monkeypatch.setitem(HARD, "small", SIZES)
    words = ["--rows", method, "--seeds", "1", "--root_dir", str(tmp_path / "data")]
    args = drawn.read_words([*words, "--output_dir", str(tmp_path / "logs"), "--", *TINY, "--num_epoch", "1"])
    drawn.draw_sets(args)
    assert train_script.main(table.train_words(Run(method, "CUHK-PEDES", 1), args)) == 0


def test_the_baselines_are_rows_of_every_share_of_wrong_captions():
    for noise in drawn.NOISE:
        names = {drawn.name_of(method, noise) for method in drawn_report.BASELINES}
        assert names <= {name for name, of in drawn.NOISE_OF.items() if of == noise}


@pytest.mark.parametrize("row, more", [("irra_noise_0.2", {"noise": 0.2}), ("rda", {"rewritten": True})])
def test_a_rows_set_has_its_noise_its_seed_and_its_second_captions(row, more, tmp_path, monkeypatch):
    sizes = {"ids": 4, "val_ids": 2, "test_ids": 2, "images_per_id": 1, "size": [64, 32]}
    monkeypatch.setitem(HARD, "small", sizes)
    words = ["--rows", row, "--seeds", "3", "--root_dir", str(tmp_path / "data")]
    drawn.draw_sets(drawn.read_words([*words, "--output_dir", str(tmp_path / "logs")]))
    (drawn_set,) = (path.parent for path in tmp_path.rglob("synthetic.json"))
    counts = {key: sizes[key] for key in ("val_ids", "test_ids", "images_per_id", "size")}
    expected = make_hard_dataset(tmp_path / "b", train_ids=4, seed=3, **counts, **more)
    assert contents(drawn_set) == contents(expected)


# ---- what all rows start from ----


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Where the rows look for their CLIP, here of a tiny recipe."""
    file = tmp_path / "start" / "small_clip.pth"
    for name, row in drawn.ROWS.items():
        monkeypatch.setitem(drawn.ROWS, name, row._replace(words=f"{row.words} --pretrain_choice {file}"))
    row = Row(drawn.CLIP, " ".join([*TINY, "--num_epoch 1 --eval_period 1"]), below=drawn.CLIP)
    monkeypatch.setitem(drawn.CLIP_ROWS, drawn.CLIP, row)
    sizes = {"train_ids": 6, "val_ids": 0, "test_ids": 4, "images_per_id": 2}
    monkeypatch.setattr(drawn, "CLIP_SIZES", sizes)
    return file


def words_for(folder, *more):
    where = ["--root_dir", f"{folder}/data", "--output_dir", f"{folder}/logs"]
    return ["--rows", "irra", "--seeds", "1", *where, *more]


def finished_clip(args):
    return finished(drawn.CLIP, drawn.of_clip(args))


def finished(row, args):
    """Files of a row's finished training; returns its last.pth."""
    folder = folder_of(Run(row, "CUHK-PEDES", 1), args)
    for name in ("results", "results_last"):
        keep(folder, name, read_run_options(folder / "configs.yaml").num_epoch)
    (folder / "last.pth").write_bytes(b"weights")
    return folder / "last.pth"


def test_rows_start_from_the_small_clip_unless_other_weights_are_typed(start, tmp_path):
    assert drawn.clip_of(drawn.read_words(words_for(tmp_path))) == start
    args = drawn.read_words(words_for(tmp_path, "--", "--pretrain_choice", "random"))
    assert drawn.clip_of(args) is None and drawn.make_clip(args, None) == []
    assert not list(tmp_path.iterdir())


def test_a_trained_small_clip_is_put_where_the_rows_look_for_it_whenever_it_is_not_there(start, tmp_path):
    args = drawn.read_words(words_for(tmp_path))
    trained = finished_clip(args)
    for _ in range(2):
        assert drawn.make_clip(args, Programs([None])) == [] and start.read_bytes() == b"weights"
        start.unlink()
    trained.unlink()  # checkpoints of finished runs may go
    (sentence,) = drawn.make_clip(args, Programs([None]))
    assert f"{trained} and {start} are gone" in sentence
    start.write_bytes(b"weights")
    assert drawn.make_clip(args, Programs([None])) == []


def test_no_small_clip_is_trained_for_rows_that_are_finished(start, tmp_path):
    args = drawn.read_words(words_for(tmp_path))
    finished("irra", args)
    assert drawn.make_clip(args, None) == [] and not start.exists() and not (tmp_path / "data").exists()


def test_a_small_clip_of_another_recipe_is_neither_started_from_nor_written_down(
    start, tmp_path, monkeypatch
):
    args = drawn.read_words(words_for(tmp_path))
    finished_clip(args)
    row = drawn.CLIP_ROWS[drawn.CLIP]
    monkeypatch.setitem(drawn.CLIP_ROWS, drawn.CLIP, row._replace(words=f"{row.words} --loss_names sdm"))
    (sentence,) = drawn.make_clip(args, Programs([None]))
    assert 'was made with loss_names "itc"' in sentence and not start.exists()
    with pytest.raises(InputError, match='was made with loss_names "itc"'):
        drawn.check_sets([], args)


def test_the_small_clip_is_listed_before_the_rows_that_start_from_it(start, tmp_path, capsys):
    assert drawn.main(words_for(tmp_path, "--dry")) == 0
    lines = capsys.readouterr().out.splitlines()
    begins = [line.split(" --")[0] for line in lines]
    draw, train = "python -m datasets.synthetic", f"python {table.ROOT / 'train.py'}"
    test = f"python {table.ROOT / 'test.py'}"
    run = f"{tmp_path}/logs/CUHK-PEDES/????????_??????_small_clip_seed1"
    clip = [draw, "# CUHK-PEDES, small_clip, seed 1", train, test, test]
    clip += [f"mkdir -p {start.parent}", f"cp {run}/last.pth {start}"]
    assert begins == [*clip, draw, "# CUHK-PEDES, irra, seed 1", train, test, test]
    assert "--ids 6 --val_ids 0 --test_ids 4 --images_per_id 2" in lines[0]
    finished_clip(drawn.read_words(words_for(tmp_path)))
    assert drawn.main(words_for(tmp_path, "--dry")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# CUHK-PEDES, small_clip, seed 1: finished" and lines[1:3] == clip[-2:]


def test_the_small_clip_is_trained_once_and_a_row_starts_from_it(start, tmp_path, train_script):
    args = drawn.read_words(words_for(tmp_path))
    for _ in range(2):
        assert drawn.make_clip(args, Programs([None], OMP_NUM_THREADS="1")) == []
    ((run, folder),) = table.runs_in(args.output_dir, drawn.CLIP_ROWS).items()
    assert run == Run(drawn.CLIP, "CUHK-PEDES", 1)
    assert start.read_bytes() == (folder / "last.pth").read_bytes()
    assert table.log_of(run, args).read_text().count(TOOK) == 3  # programs, in both calls together
    words = table.train_words(Run("irra", "CUHK-PEDES", 1), args)
    more = ["--root_dir", str(tmp_path / "data" / drawn.CLIP), "--img_size", "64", "32", "--batch_size", "8"]
    assert train_script.main([*words, *more, "--num_epoch", "1"]) == 0
    (log,) = Path(args.output_dir).glob("*/*_irra_seed1/train_log.txt")
    assert str(start) in log.read_text()


# ---- a table ----


class Drawn:
    """A table of two rows that is interrupted, goes on, is finished, and is written down."""

    def __init__(self, folder):
        self.output = folder / "logs"
        where = ["--root_dir", str(folder / "data"), "--output_dir", str(self.output)]
        self.words = ["--rows", "clip,irra_ema", "--seeds", "1", *where]
        self.extra = ["--", *TINY, "--num_epoch", "3", "--eval_period", "3"]
        self.interrupted = interrupted(self.program("--jobs", "2"), folder)
        self.left = [path.name for path in self.output.glob("*/*/results*.json")]
        self.second, self.third = (self.run("--jobs", "2") for _ in range(2))

    def program(self, *more):
        start = f"from benchmarks import drawn; drawn.HARD['small'] = {SIZES}; raise SystemExit(drawn.main())"
        return [sys.executable, "-c", start, *self.words, *more, *self.extra]

    def run(self, *more):
        return subprocess.run(self.program(*more), cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Drawn(tmp_path_factory.mktemp("drawn"))


def test_an_interrupted_table_goes_on_and_does_nothing_twice(made):
    assert made.interrupted == 130 and len(made.left) < 4
    assert made.second.returncode == made.third.returncode == 0, made.second.stderr
    assert "train.py (1 of 3;" in made.second.stdout and "test.py (" not in made.third.stdout
    assert "\n| clip |" in made.third.stdout and "\n| irra_ema |" in made.third.stdout
    folders = table.runs_in(made.output, drawn.ROWS)
    assert folders.keys() == {Run(row, "CUHK-PEDES", 1) for row in ("clip", "irra_ema")}
    assert len(list((made.output / "CUHK-PEDES").glob("*/"))) == 2
    logs = [(folder / "train_log.txt").read_text() for folder in folders.values()]
    assert any("resumed from" in log for log in logs)


def test_the_average_is_what_is_measured_of_the_row_that_averages(made):
    for run in table_report.read_results(made.output / "table.json"):
        folder = table.runs_in(made.output, drawn.ROWS)[Run(run["row"], "CUHK-PEDES", 1)]
        name = {"clip": "results_last", "irra_ema": "results_best_ema"}[run["row"]]
        found = json.loads((folder / f"{name}.json").read_text())
        assert found["epoch"] == 3 and run["last"] == {key: found[key] for key in run["last"]}


def test_the_seconds_of_cpu_are_those_of_all_programs_of_a_run(made):
    for run in table_report.read_results(made.output / "table.json"):
        log = (made.output / "CUHK-PEDES" / f"{run['row']}_seed1.txt").read_text()
        parts = [float(line.split(": ")[-1]) for line in log.splitlines() if line.startswith(TOOK)]
        assert len(parts) >= 3 and run["seconds"] == pytest.approx(sum(parts), abs=0.06) and min(parts) > 0


def test_runs_with_options_of_their_own_are_not_written_down(made, repository, capsys):
    words = ["--root_dir", made.words[5], "--output_dir", made.words[7]]
    before = drawn.FIGURES.read_text()
    assert drawn.main([*words, "--write"]) == 2
    assert "no finished run of a row with the row's own options" in capsys.readouterr().err
    assert drawn.FIGURES.read_text() == before


def test_what_is_written_down_is_what_was_run_and_passes_the_check(made, repository, monkeypatch, capsys):
    # as if the tiny recipe were the row's
    monkeypatch.setattr(table, "differing", lambda options, others: {})
    words = ["--root_dir", made.words[5], "--output_dir", made.words[7]]
    there = table_report.read_results(drawn.FIGURES)
    assert drawn.main([*words, "--write"]) == 0 and drawn.main(["--check"]) == 0
    runs = {table_report.key_of(run)[::2]: run for run in table_report.read_results(drawn.FIGURES)}
    assert runs.keys() == {("clip", 1), ("clip", 2), ("irra", 1), ("irra", 2), ("irra_ema", 1)}
    measured = {run["row"]: run for run in table_report.read_results(made.output / "table.json")}
    assert runs["clip", 1]["last"] == measured["clip"]["last"] != there[0]["last"]
    assert runs["clip", 2] == there[1] and runs["irra", 2] == there[3]  # those of rows or seeds not run here


def test_of_runs_kept_of_an_earlier_recipe_none_is_written_down_again(made, repository, monkeypatch, capsys):
    monkeypatch.setattr(table, "differing", lambda options, others: {})
    monkeypatch.setitem(drawn.ROWS, "irra", drawn.ROWS["irra"]._replace(words="--loss_names sdm+id"))
    assert drawn.main(["--root_dir", made.words[5], "--output_dir", made.words[7], "--write"]) == 0
    assert drawn.main(["--check"]) == 0
    assert "irra" not in {run["row"] for run in table_report.read_results(drawn.FIGURES)}


def test_a_set_that_was_drawn_anew_is_found(made):
    args = drawn.read_words(made.words)
    runs = table_report.read_results(made.output / "table.json")
    drawn.check_sets(runs, args)
    runs[0]["data"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="drawn anew, otherwise"):
        drawn.check_sets(runs, args)
