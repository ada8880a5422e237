"""`python -m benchmarks.table`: its rows, its commands, what it runs, and the arithmetic of its table."""

import copy
import getpass
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from benchmarks import table, table_report
from benchmarks.programs import TOOK, Programs, seconds_in
from benchmarks.table import ROWS, Run
from datasets.synthetic import make_dataset
from tests.children import ARCHITECTURE, draw, rewritten
from tests.conftest import PATIENCE
from utils.data_sets import DATA_SETS
from utils.errors import InputError
from utils.options import get_args, parser_of

ROOT = Path(__file__).parent.parent
TINY = [  # what goes to every training: it takes a second
    *("--device", "cpu", "--pretrain_choice", "random", "--clip_architecture", *ARCHITECTURE),
    *("--img_size", "64", "32", "--text_length", "48", "--cmt_depth", "1", "--lr", "1e-3"),
    *("--batch_size", "8", "--num_workers", "0", "--log_period", "1", "--warmup_epochs", "0"),
]


# ---- the rows ----


def test_every_config_of_a_full_training_has_a_row():
    configs = {str(path.relative_to(ROOT / "configs"))[:-5] for path in (ROOT / "configs").rglob("*.yaml")}
    assert {row.config for row in ROWS.values()} == configs - {"demo", "drawn", "small_clip"}


def readme_tables():
    """{(data set, row's title): figures} of the README's result tables."""
    text, found = (ROOT / "README.md").read_text(encoding="utf-8").split("## Results")[1], {}
    for block in re.split(r"\n\n+", text.split("\n## ")[0]):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        if lines and lines[0] and lines[0][0] in DATA_SETS:
            for title, *figures in lines[2:]:
                found[lines[0][0], title.split(",")[0]] = tuple(map(float, figures))
    return found


def test_published_figures_are_those_of_the_readme():
    found = readme_tables()
    assert len(found) == 2 * len(DATA_SETS)
    for (dataset, title), figures in found.items():
        row = ROWS[{"IRRA": "irra", "CLIP": "clip_baseline"}[title]]
        assert row.published[list(DATA_SETS).index(dataset)] == figures
    nam = re.search(r"from NAM's weights \(.*\) \| (.*) \| (.*) \| (.*) \|", (ROOT / "README.md").read_text())
    assert [figures[0] for figures in ROWS["irra_nam"].published] == list(map(float, nam.groups()))
    before = {name: rf"## {name.upper()}\b.*\n\nPublished: " for name in ("rde", "rda")}
    before["rda_from_nam"] = r"\(`configs/rda_from_nam.yaml`\) "
    for name, words in before.items():
        (found,) = re.findall(rf"{words}(.+?) / (.+?) / (\d+\.\d+)", (ROOT / "docs/methods.md").read_text())
        assert [figures[0] for figures in ROWS[name].published] == list(map(float, found))


@pytest.mark.parametrize("name", ROWS)
def test_figures_are_percentages_that_grow_with_the_rank_and_have_a_source(name):
    row = ROWS[name]
    assert bool(row.source) == bool(row.published) and len(row.published) in (0, len(DATA_SETS))
    for R1, R5, R10, mAP, mINP in row.published:
        assert 0 < (mINP or 1) < mAP < R1 < R5 < R10 < 100


@pytest.mark.parametrize("name", ROWS)
def test_each_row_starts_on_a_drawn_set_and_takes_a_step(name, tmp_path, train_script):
    dataset = list(DATA_SETS)[list(ROWS).index(name) % len(DATA_SETS)]
    make_dataset(tmp_path / "data", dataset, 4, 2, 2, images_per_id=2, size=(64, 32))
    rewritten(tmp_path / "data", dataset)
    typed = ["--root_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "logs")]
    args = table.read_words([*typed, "--", *TINY, "--num_epoch", "1", "--batch_size", "4"])
    run = Run(name, dataset, 1)
    assert train_script.main(table.train_words(run, args)) == 0
    assert table.runs_in(args.output_dir).keys() == {run}


# ---- the commands ----


def test_dry_lists_commands_that_the_programs_take_for_all_rows_data_sets_and_seeds(tmp_path, capsys):
    words = ["--rows", "all", "--datasets", "all", "--seeds", "1,2", "--val", "--dry"]
    assert table.main([*words, "--output_dir", str(tmp_path / "a $b"), "--", "--num_epoch", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == 3 * 2 * len(ROWS) * (2 + 1 + 2)  # ICFG-PEDES has no validation split
    trained = set()
    for line in lines:
        python, script, *words = shlex.split(line)
        if script == "train.py":
            args = get_args(words)
            trained.add((args.name, args.dataset_name, args.val_dataset))
            assert (python, args.num_epoch, args.output_dir) == ("python", 2, str(tmp_path / "a $b"))
        else:
            parser_of("test").parse_args(words)
    assert len(trained) == len(lines) / 3 and not (tmp_path / "a $b").exists()


def test_the_shell_finds_the_runs_folder_by_the_pattern_and_no_other_rows(tmp_path):
    for name in ("20261124_101500_id_seed1", "20261124_101500_sdm_id_seed1", "20261124_101500_id_seed11"):
        (tmp_path / "a b" / name).mkdir(parents=True)
    command = table.shown_command(["x", str(tmp_path / "a b" / f"{table.PATTERN}id_seed1")])
    said = subprocess.run(["sh", "-c", f"echo {command}"], capture_output=True, text=True).stdout
    assert said == f"python x {tmp_path}/a b/20261124_101500_id_seed1\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--rows", "irrra"], "did you mean irra?"),
        (["--datasets", "CUHK"], "did you mean CUHK-PEDES?"),
        (["--seeds", "1;2"], "is not a list of numbers"),
        (["--seed", "1"], "did you mean --seeds?"),
        (["--dry", "--", "--lrr", "1"], "did you mean --lr?"),
        (["--dry", "--", "--seed=3"], "--seed cannot stand after --"),
        (["--dry", "--rows", "irra", "--", "--pretrain_choice", "RN50"], "needs image tokens"),
        (["--cross"], "holds no finished run"),
        (["--jobs", "0"], "whole number"),
        (["--merge", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_runs(words, said, tmp_path, capsys):
    try:
        status = table.main(["--output_dir", str(tmp_path / "none"), *words])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("none/*/*"))


def scripts(commands):
    return [Path(words[0]).name for words in commands]


def folder_of(run, args):
    """A run's folder, as train.py begins it."""
    folder = Path(args.output_dir) / run.dataset / f"20261124_101500_{run.name}"
    folder.mkdir(parents=True)
    options = vars(get_args(table.train_words(run, args)))
    (folder / "configs.yaml").write_text(yaml.safe_dump(options))
    return folder


def keep(folder, name, epoch, R1=70.0, tasks=("t2i", "i2t")):
    """What test.py has found, as it keeps it."""
    found = {**record(1, R1)["best"], "epoch": epoch}
    kept = {key: value for key, value in found.items() if key not in ("t2i", "i2t") or key in tasks}
    (folder / f"{name}.json").write_text(json.dumps(kept))


def test_what_is_half_done_goes_on_and_only_results_of_the_last_epoch_make_it_finished(tmp_path):
    args = table.read_words(["--output_dir", str(tmp_path), "--", "--num_epoch", "3"])
    run = Run("irra", "CUHK-PEDES", 1)
    folder = folder_of(run, args)

    def left():
        return table.commands(run, args, table.runs_in(tmp_path).get(run))

    assert "--resume" not in left()[0]  # it was ended before anything was saved
    (folder / "last.pth").touch()
    other = table.read_words(["--output_dir", str(tmp_path), "--", "--num_epoch", "4"])
    with pytest.raises(InputError, match="was made with num_epoch 3, which is not what is asked for"):
        table.commands(run, other, folder)
    assert scripts(left()) == ["train.py", "test.py", "test.py"]
    assert left()[0][-3:] == ["--resume", "--resume_ckpt_file", str(folder)]
    keep(folder, "results", 2)
    keep(folder, "results_last", 2)  # tested by hand while it was under way
    assert len(left()) == 3
    keep(folder, "results_last", 3, tasks=["t2i"])
    assert len(left()) == 3
    keep(folder, "results_last", 3)
    assert left() == []
    (folder / "last.pth").unlink()  # the checkpoints of a finished run may go
    assert left() == []


def test_of_averaged_weights_the_best_average_is_tested_here_and_on_other_sets(tmp_path):
    words = ["--rows", "irra_ema", "--datasets", "CUHK-PEDES,RSTPReid", "--output_dir", str(tmp_path)]
    args = table.read_words([*words, "--", "--num_epoch", "3"])
    run = Run("irra_ema", "CUHK-PEDES", 1)
    folder = folder_of(run, args)
    (folder / "last.pth").touch()
    keep(folder, "results", 1, 60.0)  # of best.pth, which is not what the row is about
    keep(folder, "results_last", 3, 70.0)
    _, best, last = table.commands(run, args, folder)
    assert best[-2:] == ["--checkpoint", f"{folder}/best_ema.pth"] and last[-1] == f"{folder}/last.pth"
    keep(folder, "results_best_ema", 2, 80.0)
    assert table.commands(run, args, folder) == []
    (cross,) = table.cross_commands(run, args, folder)
    assert {"RSTPReid", f"{folder}/best_ema.pth"} <= set(cross)
    keep(folder, "results_best_ema_RSTPReid_test", 2, 50.0)
    assert table.cross_commands(run, args, folder) == []
    found = table.record_of(run, folder, table.ROWS["irra_ema"])
    figures = [found[key]["t2i"]["R1"] for key in ("best", "last")], found["cross"]["RSTPReid"]["t2i"]["R1"]
    assert figures == ([80.0, 70.0], 50.0)


# ---- running ----


def test_a_program_sees_the_gpu_of_its_job_and_a_failure_tells_its_last_line(tmp_path):
    code = "import os, sys\nprint(os.environ['CUDA_VISIBLE_DEVICES'])\nsys.exit(*sys.argv[1:])"
    (tmp_path / "p.py").write_text(code)
    programs = Programs(["2", "5"])
    programs.run([str(tmp_path / "p.py")], tmp_path / "log", "5")
    assert (tmp_path / "log").read_text().startswith(f"5\n{TOOK}")
    with pytest.raises(InputError, match=r"p.py ended with status 1: error of its own \(see "):
        programs.run([str(tmp_path / "p.py"), "error of its own"], tmp_path / "log", "2")


def test_the_seconds_of_cpu_are_a_programs_own_with_those_that_it_starts(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.3:\n    pass\n"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])\n"
    for name, code in (("p", start), ("q", "pass")):
        (tmp_path / name).write_text(code)
    programs = Programs([None])
    with ThreadPoolExecutor(2) as pool:  # the seconds of the one are not the other's
        jobs = [pool.submit(programs.run, [str(tmp_path / n)], tmp_path / f"{n}.log", None) for n in "pq"]
    assert [job.result() for job in jobs] == [None, None]
    assert seconds_in(tmp_path / "p.log") >= 0.3 > (seconds_in(tmp_path / "q.log") or 0)


def test_the_seconds_of_a_program_that_ended_just_before_it_was_stopped_are_known():
    programs, process = Programs([None]), subprocess.Popen([sys.executable, "-c", "pass"])
    programs.running.add(process)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    programs.stop()
    status, seconds = programs.end_of(process)
    assert status == 0 and seconds > 0


def program(*words):
    return [sys.executable, "-m", "benchmarks.table", *map(str, words)]


STOP = """
import contextlib, logging, os, signal, time

class Stop(logging.Handler):
    told = False

    def emit(self, record):
        table = os.getppid()
        if "finishing the batch" in record.getMessage():
            self.told = True
        elif "Epoch[2]" in record.getMessage():
            with contextlib.suppress(FileExistsError):  # once, and one training only
                open({mark!r}, "x").close()
                os.kill(table, signal.SIGTERM)
                while not self.told and os.getppid() == table:
                    time.sleep(0.01)

logging.getLogger("IRRA.train").addHandler(Stop())
"""


def interrupted(command, folder):
    """The exit status of a table that a training tells to stop when there is something to go on with; it
    waits until the table has told it to. Python runs sitecustomize.py when a program starts."""
    (folder / "stop").mkdir()
    (folder / "stop" / "sitecustomize.py").write_text(STOP.format(mark=str(folder / "stopped")))
    path = f"{folder / 'stop'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    how = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}, "stdout": subprocess.DEVNULL}
    return subprocess.run(command, timeout=PATIENCE, **how).returncode


class Table:
    """What was run, once for the tests below: a table that is interrupted, goes on, and has failures."""

    def __init__(self, folder):
        self.output = folder / "logs"
        self.data, extra = draw(folder), ["--", *TINY, "--num_epoch", "3"]
        self.words = ["--rows", "clip_baseline", "--root_dir", self.data, "--output_dir", self.output]
        self.interrupted = interrupted(program(*self.words, *extra), folder)
        self.left = {path.name for path in self.output.glob("*/*/results*.json")}
        dry = self.run("--seeds", 2, "--dry", *extra).stdout  # pasted
        paste = f'set -e\npython() {{ {shlex.quote(sys.executable)} "$@"; }}\n{dry}'
        self.pasted = subprocess.run(["sh", "-c", paste], cwd=ROOT, capture_output=True, text=True)
        self.more = ["--seeds", "1,2", "--datasets", "CUHK-PEDES,RSTPReid"]
        self.first = self.run(*self.more, "--jobs", 2, *extra)  # RSTPReid is not there yet
        self.results = table_report.read_results(self.output / "table.json")
        make_dataset(self.data, "RSTPReid", 4, 2, 6, images_per_id=2, size=(64, 32))
        self.times = {path: path.stat().st_mtime_ns for path in self.output.glob("*/*/*.pth")}
        self.cross = self.run(*self.more, "--cross", *extra)

    def run(self, *more):
        return subprocess.run(program(*self.words, *more), cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Table(tmp_path_factory.mktemp("table"))


def test_an_interrupted_table_goes_on_where_it_was(made):
    assert made.interrupted == 130 and "results_last.json" not in made.left
    folders = table.runs_in(made.output)
    assert folders.keys() == {Run("clip_baseline", "CUHK-PEDES", seed) for seed in (1, 2)}
    assert len(list((made.output / "CUHK-PEDES").glob("*/"))) == 2
    log = (folders[Run("clip_baseline", "CUHK-PEDES", 1)] / "train_log.txt").read_text()
    assert "SIGTERM: finishing the batch" in log and "resumed from" in log


def test_the_commands_that_dry_lists_make_a_run_that_counts_as_finished(made):
    assert made.pasted.returncode == 0, made.pasted.stderr
    assert "CUHK-PEDES, clip_baseline, seed 1: train.py (1 of 3;" in made.first.stdout
    assert "CUHK-PEDES, clip_baseline, seed 2:" not in made.first.stdout


def test_a_failure_names_its_run_and_what_it_said_and_leaves_the_rest(made):
    assert made.first.returncode == 1
    lines = made.first.stderr.splitlines()
    assert [line.split(": train.py")[0] for line in sorted(lines)] == [
        f"failed: RSTPReid, clip_baseline, seed {seed}" for seed in (1, 2)
    ]
    assert all("RSTPReid: no annotation file at" in line for line in lines)
    assert len(made.results) == 2


def test_the_table_has_what_test_py_found_of_best_and_last_epoch(made):
    for record in made.results:
        folder = table.runs_in(made.output)[Run("clip_baseline", "CUHK-PEDES", record["seed"])]
        for which, name in (("best", "results.json"), ("last", "results_last.json")):
            found = json.loads((folder / name).read_text())
            assert record[which] == {key: found[key] for key in record[which]}
        assert record["last"]["epoch"] == 3 and {"t2i", "i2t"} < record["best"].keys()
        assert record["data"]["train"] == [12, 24, 48] and len(record["data"]["sha256"]) == 64
        assert record["options"]["num_epoch"] == 3 and "device" not in record["options"]
    mean = sum(record["last"]["t2i"]["R1"] for record in made.results) / 2
    row = next(line for line in made.first.stdout.splitlines() if line.startswith("| clip_baseline"))
    assert row.split("|")[-5].strip().startswith(f"{mean:.2f} ± ") and "Not the data" in made.first.stdout


def test_what_is_finished_is_not_run_again_and_the_other_data_set_is_tested_once(made):
    assert made.cross.returncode == 0, made.cross.stderr
    assert made.cross.stdout.count("test.py (1 of 1;") == 2 and "train.py" not in made.cross.stdout
    assert {path: path.stat().st_mtime_ns for path in made.output.glob("*/*/*.pth")} == made.times
    records = table_report.read_results(made.output / "table.json")
    assert [record["cross"]["RSTPReid"]["queries"] for record in records] == [24, 24]
    cross = [line for line in made.cross.stdout.splitlines() if "RSTPReid (24 sentences, 12 images)" in line]
    assert len(cross) == 1 and cross[0].count(" / ") == len(table_report.FIGURES)
    assert cross[0].endswith("| 2 |")
    commands = made.run(*made.more, "--cross", "--dry")
    assert commands.stdout.count(": finished") == 2 and "python" not in commands.stdout


def test_the_results_file_has_no_paths_and_no_names(made):
    text = (made.output / "table.json").read_text()
    assert not re.search(r'"[^"]*(?<!ViT-B)(?<!PU)/[^"]*"', re.sub(r'"machine": ".*"', "", text))
    for name in (socket.gethostname(), getpass.getuser(), str(made.output), str(Path.home())):
        assert len(name) < 4 or name not in text
    assert table.without_paths("pretrain_choice", "/home/anna/best.pth").startswith("another, ")
    assert table.without_paths("pretrain_choice", "ViT-B/32") == "ViT-B/32"


def test_a_run_that_was_made_with_other_options_is_refused_not_taken(made, capsys):
    words = [*map(str, made.words), "--dry", "--", *TINY]
    assert table.main([*words, "--num_epoch", "7"]) == 0
    assert "was made with num_epoch 3, which is not what is asked for" in capsys.readouterr().out
    assert table.main([*words, "--num_epoch", "3", "--num_workers", "1"]) == 0
    assert capsys.readouterr().out == "# CUHK-PEDES, clip_baseline, seed 1: finished\n"


def test_the_picture_is_drawn(made):
    from PIL import Image

    assert Image.open(made.output / "table.png").size[0] > 300


# ---- the arithmetic, and several results files ----


def record(seed, R1, row="irra", selected_on="test", **more):
    task = {"R1": R1, "R5": 90.0, "R10": 95.0, "mAP": 66.0, "mINP": 50.0}
    found = {"epoch": 60, "queries": 6156, "gallery": 3074, "t2i": task, "i2t": {**task, "R1": R1 + 10}}
    counts = {name: list(row) for name, row in DATA_SETS["CUHK-PEDES"].published.items()}
    data = {"sha256": "0" * 64, **counts}
    return {
        **{"row": row, "dataset": "CUHK-PEDES", "seed": seed, "selected_on": selected_on, "options": {}},
        **{"best": found, "last": copy.deepcopy(found), "cross": {}, "data": data},
        **{"machine": "a GPU", "versions": {"torch": "2.14"}, **more},
    }


def merged(folder, capsys, *files):
    for number, runs in enumerate(files):
        (folder / f"{number}.json").write_text(table_report.results_file(runs))
    paths = [str(folder / f"{number}.json") for number in range(len(files))]
    assert table.main(["--output_dir", str(folder / "out"), "--merge", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_merged_files_give_mean_deviation_and_difference_in_standard_errors(tmp_path, capsys):
    """72, 73, 74: mean 73, deviation 1, so the standard error is 1/√3 and 73.38 is 0.66 of them above."""
    one, other = [record(1, 72.0), record(2, 73.0)], [record(3, 74.0), record(2, 73.0)]
    other += [record(1, 71.0, selected_on="val"), record(1, 60.0, "irra_clean")]
    head, _, irra, clean, *_ = merged(tmp_path, capsys, one, other)
    assert head[2:5] == ["best epoch", "last epoch", "validation-selected"]
    assert irra == [
        *("irra", "73.38", "73.00 ± 1.00", "73.00 ± 1.00", "71.00", "-0.38 (-0.7 s.e.)"),
        *("83.00 ± 1.00", "3"),  # the record that both files hold counts once
    ]
    assert clean[1:4] == ["–", "60.00", "60.00"] and clean[5] == "–"
    assert -0.38 * math.sqrt(3) == pytest.approx(-0.66, abs=0.005)


def test_other_options_and_other_annotation_files_are_not_averaged_with_the_rest(tmp_path, capsys):
    bf16 = record(2, 70.0, options={"precision": "bf16"})
    old = record(3, 60.0)
    old["data"] = {**old["data"], "sha256": "f" * 64, "test": [1000, 3000, 6000]}
    lines = merged(tmp_path, capsys, [record(1, 72.0), bf16, old])
    found = {line[0]: line[2] for line in lines[:4]}
    text = (tmp_path / "out" / "merged.md").read_text()
    assert found["irra [1]"] == "70.00" and found["irra"] == "72.00"
    assert '- [1]: with precision "bf16"\n' in text
    assert text.count("\n## CUHK-PEDES, annotation file ") == 2
    assert text.count("Not the data of the published figures") == 1


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: run.pop("seed"), "seed is missing"),
        (lambda run: run.update(machine=3), "machine"),
        (lambda run: run["best"]["t2i"].update(R1="high"), "figures (best)"),
        (lambda run: run["last"]["i2t"].pop("mINP"), "figures (last)"),
        (lambda run: run["data"].update(test=3), "data"),
        (lambda run: run.update(cross={"RSTPReid": None}), "figures (RSTPReid)"),
        (lambda run: run["best"]["t2i"].update(R1=float("nan")), "figures (best)"),
    ],
)
def test_a_damaged_results_file_is_one_sentence(damage, said, tmp_path, capsys):
    damage(run := record(1, 72.0))
    (tmp_path / "a.json").write_text(table_report.results_file([run]))
    assert table.main(["--merge", str(tmp_path / "a.json"), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "a.json, run 0" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"runs": []}', "[" * 100_000])
def test_what_is_no_results_file_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert table.main(["--merge", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_file_is_read_before_anything_runs(tmp_path, capsys):
    (tmp_path / "table.json").write_text("{")
    assert table.main(["--output_dir", str(tmp_path)]) == 2
    assert os.listdir(tmp_path) == ["table.json"] and "is not a results file" in capsys.readouterr().err
