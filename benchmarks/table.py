"""Rerun the rows of the result tables, and see them beside the published figures.

python -m benchmarks.table --rows irra,clip_baseline --seeds 1,2,3     what is missing, and the table
python -m benchmarks.table --rows all --datasets all --dry             the commands only, to be pasted
python -m benchmarks.table --datasets all --cross                      test these runs on the other data sets
python -m benchmarks.table --merge a/table.json b/table.json           one table of several results files
python -m benchmarks.table --rows irra -- --precision bf16             what follows -- goes to every training

A run is trained by train.py and its best.pth and last.pth are tested by test.py. What is finished is
recognised by its results, so a table that was interrupted goes on; checkpoints of finished runs may go. The
table is of all runs in OUTPUT_DIR, and is kept there: table.md, table.png, and table.json to send to others,
which holds no paths and no names.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import table_report
from benchmarks.programs import Programs, Stopping, gpus_for, seconds_in
from utils.data_sets import DATA_SETS, DEFAULT
from utils.errors import InputError, printable, reports_errors, stop_like_an_interrupt
from utils.files import make_folder
from utils.option_types import Parser, number_list, one_of, path
from utils.options import CLIP_MODELS, OPTIONS, PATHS, from_1, get_args, read_run_options
from utils.run_folders import name_in

ROOT = Path(os.path.relpath(Path(__file__).parent.parent))  # commands that are shown are for this folder


class Row(NamedTuple):
    config: str  # configs/CONFIG.yaml
    words: str = ""  # what is typed besides; {number}: of the data set, from 0
    source: str = ""  # of the published figures
    published: tuple = ()  # for each of DATA_SETS: Rank-1, Rank-5, Rank-10, mAP, mINP; None: not given
    below: str = ""  # where below --root_dir its data sets are; {seed}: of the run
    best: str = "best"  # the checkpoint that is tested as the best one
    last: str = "last"  # and as that of the last epoch


IRRA, RDE, NAM = "arXiv 2303.12501", "arXiv 2308.09911", "arXiv 2405.04940"
ICL = "Qin et al., CVPR 2025, without its questions about each query"
NOISE = f"{RDE}, with a draw of the noise of its own"
# fmt: off
ROWS = {
"irra": Row("irra", "", IRRA, (
    (73.38, 89.93, 93.71, 66.13, 50.24), (63.46, 80.24, 85.82, 38.05, 7.92),
    (60.20, 81.30, 88.20, 47.17, 25.28))),
"irra_clean": Row("irra_clean"),
"clip_baseline": Row("clip_baseline", "", IRRA, (
    (68.19, 86.47, 91.47, 61.12, 44.86), (56.74, 75.72, 82.26, 31.84, 5.03),
    (54.05, 80.70, 88.00, 43.41, 22.31))),
# the ablation; clip_baseline and irra are its first and last rows
**{name: Row(f"ablation/{name}") for name in (
    "cmpm", "sdm", "id", "mlm", "itc_id", "itc_mlm", "mlm_id", "sdm_id", "sdm_mlm", "sdm_itc_mlm_id")},
# backbones; irra's is ViT-B/16. A ResNet gives no tokens, which mlm needs
"irra_vit_b32": Row("irra", "--pretrain_choice ViT-B/32 --stride_size 32"),
"irra_vit_l14": Row("irra", "--pretrain_choice ViT-L/14 --stride_size 14"),
"sdm_id_rn50": Row("ablation/sdm_id", "--pretrain_choice RN50"),
"clip_baseline_rn50": Row("clip_baseline", "--pretrain_choice RN50"),
# temperatures; irra's is 0.02
**{f"irra_temperature_{x}": Row("irra", f"--temperature {x}") for x in ("0.01", "0.04", "0.07")},
# of no paper: docs/methods.md
"irra_ema": Row("irra", "--ema 0.999", best="best_ema"),
"irra_learn_temperature": Row("irra", "--learn_temperature"),
"irra_rate_per_step": Row("irra", "--lr_per step"),
# other methods and other starts: docs/methods.md
"rde": Row("rde", "", RDE, (
    (75.94, 90.14, 94.12, 67.56, 51.44), (67.68, 82.47, 87.36, 40.06, 7.87),
    (65.35, 83.95, 89.90, 50.88, 28.08))),
"rde_noise_0.2": Row("rde", "--noisy_rate 0.2", NOISE, (
    (74.46, 89.42, 93.63, 66.13, 49.66), (66.54, 81.70, 86.70, 39.08, 7.55),
    (64.45, 83.50, 90.00, 49.78, 27.43))),
"rde_noise_0.5": Row("rde", "--noisy_rate 0.5", NOISE, (
    (71.33, 87.41, 91.81, 63.50, 47.36), (63.76, 79.53, 84.91, 37.38, 6.80),
    (62.85, 83.20, 89.15, 47.67, 23.97))),
"rda": Row("rda", "", ICL, (
    (76.41, 90.48, 94.33, 68.04, 51.99), (68.11, 82.59, 87.52, 40.81, 8.18),
    (67.70, 86.05, 91.75, 52.62, 29.36))),
"rde_from_nam": Row("rde_from_nam", "--pretrain_choice weights/nam/best{number}.pth"),
"rda_from_nam": Row("rda_from_nam", "--pretrain_choice weights/nam/best{number}.pth", ICL, (
    (78.18, 91.63, 94.83, 69.58, 53.48), (69.22, 83.49, 88.06, 42.34, 9.01),
    (70.00, 86.60, 91.70, 54.16, 30.93))),
"fmfa": Row("fmfa"),
"tbps_clip": Row("tbps_clip"),  # not the whole method, of which figures are published: docs/methods.md
"irra_nam": Row("irra_nam", "--pretrain_choice weights/nam/best{number}.pth", NAM, (
    (76.82, 91.16, 94.46, 69.55, None), (67.05, 82.16, 87.33, 41.51, None),
    (68.50, 87.15, 92.10, 53.02, None))),
"irra_ham": Row("irra_ham"),
}
# fmt: on

SET_HERE = "dataset_name root_dir output_dir name seed val_dataset config_file annotations images".split()
SET_HERE += "resume resume_ckpt_file debug test help".split()
NO_MATTER = {  # options that figures do not depend on, or that stand in a run's record by themselves
    *SET_HERE,
    *"log_period save_period keep local_rank device num_workers image_cache test_batch_size".split(),
    *"training micro_batch grad_checkpointing run_dir distributed".split(),
}
NO_VAL = {name for name, row in DATA_SETS.items() if not row.published["val"][0]}
PATTERN = "????????_??????_"  # TIME_ of a run's folder that is not there yet, for the shell


class Run(NamedTuple):
    row: str
    dataset: str
    seed: int
    val: bool = False  # whether best.pth was picked on the validation split

    @property
    def name(self):
        return f"{self.row}_seed{self.seed}{'_val' if self.val else ''}"

    def __str__(self):
        return f"{self.dataset}, {self.row}, seed {self.seed}{', selected on val' if self.val else ''}"


# ---- what is there, and what is to be done ----


def runs_in(output_dir, rows=ROWS):
    """{Run: folder} of what can be gone on with or is finished; the newest where there are several."""
    found, output_dir = {}, Path(output_dir)
    for file in sorted([*output_dir.glob("*/*/last.pth"), *output_dir.glob("*/*/results*.json")]):
        folder = file.parent
        named = re.fullmatch(r"(.+)_seed(\d+)(_val)?", name_in(folder) or "")
        if named and named[1] in rows and folder.parent.name in DATA_SETS:
            found[Run(named[1], folder.parent.name, int(named[2]), bool(named[3]))] = folder
    return found


def results(folder, checkpoint, other=""):
    """What test.py --i2t has found, on the run's data set or on another; None where it has not, or half."""
    name = ["results", *[checkpoint] * (checkpoint != "best"), *[f"{other}_test"] * bool(other)]
    try:
        found = json.loads((folder / f"{'_'.join(name)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if table_report.are_figures(found) else None


def is_finished(folder, row):
    best, last = results(folder, row.best), results(folder, row.last)
    try:
        return bool(best and last) and last["epoch"] == read_run_options(folder / "configs.yaml").num_epoch
    except InputError:  # who asks for this run is told
        return False


def recipe(run, row):
    words = row.words.format(number=list(DATA_SETS).index(run.dataset)).split()
    return ["--config_file", str(ROOT / f"configs/{row.config}.yaml"), *words]


def root_of(run, args):
    """The folder that holds a run's data sets."""
    below = args.known[run.row].below.format(seed=run.seed)
    return str(Path(args.root_dir, below)) if below else args.root_dir


def train_words(run, args):
    where = ["--dataset_name", run.dataset, "--root_dir", root_of(run, args), "--output_dir", args.output_dir]
    where += ["--name", run.name, "--seed", str(run.seed)]
    return [*recipe(run, args.known[run.row]), *args.words, *where, *["--val_dataset", "val"] * run.val]


def differing(options, others):
    """{name: value} of the options that figures depend on, where they are not the others'."""
    found = {key: value for key, value in options.items() if key not in NO_MATTER and value != others[key]}
    if others["activation"] == "auto":  # a run keeps what was found
        found.pop("activation", None)
    return found


def commands(run, args, folder=None):
    """What is still to run, as words for Python. Raises InputError where the run that is there is another."""
    words, root, row = train_words(run, args), root_of(run, args), args.known[run.row]
    if folder:
        other = differing(vars(read_run_options(folder / "configs.yaml")), vars(get_args(words)))
        if other:
            raise InputError(
                f"{folder} was made with {table_report.shown(other)}, which is not what is asked for now: "
                "give another --output_dir, or move that folder away"
            )
        if is_finished(folder, row):
            return []
    if folder and (folder / "last.pth").exists():
        words += ["--resume", "--resume_ckpt_file", str(folder)]
    else:
        folder = Path(args.output_dir) / run.dataset / f"{PATTERN}{run.name}"
    tests = [test_words(folder, root, checkpoint) for checkpoint in (row.best, row.last)]
    return [[str(ROOT / "train.py"), *words], *tests]


def test_words(folder, root, checkpoint, *more):
    words = [str(ROOT / "test.py"), "--config_file", str(folder), "--i2t", "--root_dir", root, *more]
    return words + ["--checkpoint", str(folder / f"{checkpoint}.pth")] * (checkpoint != "best")


def cross_results(run, row, folder):
    """{another data set: what the run's best checkpoint, as it is now, gave there}."""
    best = results(folder, row.best)
    found = {other: results(folder, row.best, other) for other in DATA_SETS if other != run.dataset}
    return {other: of for other, of in found.items() if of and of["epoch"] == best["epoch"]}


def cross_commands(run, args, folder):
    """Test a run on the other data sets that are asked for, where that is still to be done."""
    row, done = args.known[run.row], cross_results(run, args.known[run.row], folder)
    return [
        test_words(folder, root_of(run, args), row.best, "--dataset_name", other)
        for other in args.datasets
        if other != run.dataset and other not in done
    ]


def plan(args):
    """{Run: what gives its commands}, in the order of data sets, rows, seeds."""
    there = runs_in(args.output_dir, args.known)
    kinds = (False, True) if args.val else (False,)
    asked = [Run(*of, seed, val) for of in args.pairs for seed in dict.fromkeys(args.seeds) for val in kinds]
    asked = [run for run in asked if not (run.val and run.dataset in NO_VAL)]
    if not args.cross:
        return {run: lambda run=run: commands(run, args, there.get(run)) for run in asked}
    there = {run: there[run] for run in asked if run in there and not run.val}
    finished = [run for run in there if is_finished(there[run], args.known[run.row])]
    if not finished:
        raise InputError(f"--cross: {args.output_dir} holds no finished run of what is asked for")
    return {run: lambda run=run: cross_commands(run, args, there[run]) for run in finished}


def shown_command(words, program="python"):
    """As a line for the shell, in which the pattern stays one."""
    parts = (PATTERN.join(part and shlex.quote(part) for part in word.split(PATTERN)) for word in words)
    return " ".join([program, *(part or "''" for part in parts)])


def list_commands(args):
    for run, commands_of in plan(args).items():
        try:
            lines = [shown_command(words) for words in commands_of()]
            print(f"# {run}{'' if lines else ': finished'}", *lines, sep="\n")
        except InputError as error:
            print(f"# {run}: {error}")


# ---- running ----


def log_of(run, args):
    return Path(args.output_dir) / run.dataset / f"{run.name}.txt"


def run_all(args, programs):
    """Run what is missing; returns a sentence for each run that failed."""
    failed = []

    def execute(run, commands_of):
        gpu = programs.gpus.get()
        try:
            for number, words in enumerate(todo := commands_of(), start=1):
                if any(PATTERN in word for word in words):
                    folder = runs_in(args.output_dir, args.known)[run].name
                    words = [word.replace(f"{PATTERN}{run.name}", folder) for word in words]
                log = log_of(run, args)
                make_folder(log.parent, "--output_dir")
                print(f"{run}: {Path(words[0]).name} ({number} of {len(todo)}; {log})", flush=True)
                programs.run(words, log, gpu)
        except Stopping:
            pass
        except InputError as error:
            failed.append(f"{run}: {error}")
            print(f"failed: {failed[-1]}", flush=True)
        finally:
            programs.gpus.put(gpu)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for done in [pool.submit(execute, *item) for item in plan(args).items()]:
                done.result()
        except BaseException:
            programs.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


# ---- what was found, as it may be sent to others ----


def collect(args, kept):
    """The record of each finished run in OUTPUT_DIR. kept: earlier records; facts of the machine and the data
    stay those of the time when a run was first seen finished."""
    kept = {table_report.key_of(run): run for run in kept}
    records, data = [], {}
    for run, folder in runs_in(args.output_dir, args.known).items():
        row = args.known[run.row]
        if not is_finished(folder, row):
            continue
        record = record_of(run, folder, row)
        old, seconds = kept.get(table_report.key_of(record)), seconds_in(log_of(run, args))
        if old and all(old[key] == record[key] for key in ("options", "best", "last")):
            facts = {key: old[key] for key in ("data", "machine", "versions")}
            seconds = seconds or old.get("seconds")
        else:
            place = run.dataset, root_of(run, args)
            if place not in data:
                data[place] = describe_data(*place)
            facts = {"data": data[place], **describe_machine()}
        records.append({**record, "seconds": seconds, **facts})
    return records


def record_of(run, folder, row):
    options = differing(vars(read_run_options(folder / "configs.yaml")), vars(get_args(recipe(run, row))))
    return {
        "row": run.row,
        "dataset": run.dataset,
        "seed": run.seed,
        "selected_on": "val" if run.val else "test",
        "options": {key: without_paths(key, value) for key, value in options.items()},
        "best": figures_of(results(folder, row.best)),
        "last": figures_of(results(folder, row.last)),
        "cross": {other: figures_of(of) for other, of in cross_results(run, row, folder).items()},
    }


def figures_of(found):
    return {key: found[key] for key in (*table_report.COUNTED, *table_report.TASKS)}


def without_paths(key, value):
    """An option's value as it may be sent to others."""
    kinds = {name.split()[0][2:]: kind for rows in OPTIONS.values() for name, _, kind, *_ in rows}
    private = kinds[key] in PATHS and value not in (None, "", "random", *CLIP_MODELS)
    return f"another, {zlib.crc32(str(value).encode()):08x}" if private else value


def describe_data(dataset, root_dir):
    """Counts of persons, images and captions, and the annotation file's hash; None where it is not there."""
    from datasets.annotations import read_splits

    try:
        splits = read_splits(dataset, root_dir, images_must_exist=False)
    except InputError:  # the runs may have been made elsewhere
        return None
    counts = {name: list(split.counts) for name, split in splits.by_name.items()}
    return {"sha256": hashlib.sha256(splits.source.path.read_bytes()).hexdigest(), **counts}


def describe_machine():
    import torch

    from benchmarks import harness

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"machine": harness.machine(device).split(", load")[0], "versions": harness.versions()}


# ---- the command ----


def name_list(known):
    """The type of some names or all, as `irra,rde`."""

    def parse(text):
        names = known if text == "all" else [one_of(*known)(name.strip()) for name in text.split(",")]
        return list(dict.fromkeys(names))

    return parse


def read_words(argv):
    parser = Parser(prog="benchmarks.table", usage="python -m %(prog)s [option ...]", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-h", "--help", action="help", help="this list")
    rows = "irra,clip_baseline"
    add("--rows", type=name_list(ROWS), default=rows, help=f"all, or of: {', '.join(ROWS)} [{rows}]")
    names = f"all, or of: {', '.join(DATA_SETS)} [{DEFAULT}]"
    add("--datasets", type=name_list(DATA_SETS), default=DEFAULT, help=names)
    add("--seeds", type=number_list, default="1", help="e.g. 1,2,3 or 1-5 [1]")
    add("--val", action="store_true", help="train again with best.pth picked on the validation split")
    add("--cross", action="store_true", help="train nothing: test what is there on the other data sets")
    add("--root_dir", type=path, default="data", help="folder that holds the data sets' folders [data]")
    add("--output_dir", type=path, default="logs/table", help="where runs and table are kept [logs/table]")
    add("--jobs", type=from_1, default=1, help="runs at a time, each on a GPU of its own [1]")
    add("--dry", action="store_true", help="list the commands that are missing, run nothing")
    add("--merge", nargs="+", metavar="FILE", help="results files, table.json; run nothing")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.words, args.known = argv[cut + 1 :], ROWS
    args.pairs = [(row, dataset) for dataset in args.datasets for row in args.rows]
    check_words(args)
    return args


def check_words(args):
    """A mistyped word is found before anything runs."""
    for word in args.words:
        if word.startswith("--") and (name := word[2:].partition("=")[0]) in SET_HERE:
            raise InputError(f"--{name} cannot stand after --: it is set for each run by the options before")
    for row, dataset in args.pairs:
        get_args(train_words(Run(row, dataset, 1), args))


@reports_errors
def main(argv=None):
    args = read_words(list(sys.argv[1:] if argv is None else argv))
    if args.merge:
        runs = [run for file in args.merge for run in table_report.read_results(file)]
        table_report.write(runs, ROWS, args.output_dir, "merged")
        return 0
    for dataset in NO_VAL.intersection(args.datasets if args.val else ()):
        print(f"# {dataset} has no validation split: --val adds nothing there")
    if args.dry:
        list_commands(args)
        return 0
    stop_like_an_interrupt()
    make_folder(args.output_dir, "--output_dir")
    file = Path(args.output_dir) / "table.json"
    kept = table_report.read_results(file) if file.exists() else []
    failed = run_all(args, Programs(gpus_for(args.jobs)))
    table_report.write(collect(args, kept), ROWS, args.output_dir, "table", args.pairs)
    for sentence in failed:
        print(f"failed: {printable(sentence)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
