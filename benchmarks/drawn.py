"""Compare methods on hard drawn sets (datasets/synthetic_hard.py), on two cores: docs/results.md.

python -m benchmarks.drawn --rows all --seeds 1-5 --jobs 2     what is missing, and the table
python -m benchmarks.drawn --rows irra,rde --dry               the commands only, to be pasted
python -m benchmarks.drawn --write                             docs/results.md, of these runs and those kept
python -m benchmarks.drawn --check                             whether docs/results.md is what they give
python -m benchmarks.drawn --rows irra -- --num_epoch 2        what follows -- goes to each row's training

Each training starts from the same small CLIP, which is trained first, on other drawn persons, as IRRA's
starts from OpenAI's. A seed is that of a training and of a drawing: with another seed the persons are others
too, so that what is found of a method over seeds is not of one set of persons. Rows of one seed and one
share of wrong captions have the same set. A run has one thread; it is trained, tested, recognised and gone
on with as in benchmarks.table.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

from benchmarks import drawn_report, table, table_report
from benchmarks.harness import RESULTS
from benchmarks.programs import Programs
from benchmarks.table import Row, Run
from datasets import synthetic
from datasets.pedestrians import VERSION as EASY_VERSION
from datasets.synthetic_hard import HARD, VERSION
from utils.data_sets import DEFAULT
from utils.errors import InputError, printable, reports_errors, stop_like_an_interrupt
from utils.files import link_or_copy, make_folder, write_whole
from utils.option_types import Parser, number_list, path
from utils.options import from_1, get_args

REPOSITORY = Path(__file__).parent.parent
FIGURES, PAGE = RESULTS / "drawn.json", REPOSITORY / "docs" / "results.md"
CLIP = "small_clip"  # the row of what all others start from
CLIP_ROWS = {CLIP: Row(CLIP, below=CLIP)}
CLIP_SIZES = {"train_ids": 3200, "val_ids": 0, "test_ids": 100, "images_per_id": 1}
METHODS = {  # what is typed after --config_file configs/drawn.yaml
    "clip": "--loss_names itc",
    "cmpm": "--loss_names cmpm",
    "sdm": "--loss_names sdm",
    "sdm_masked": "--loss_names sdm --MLM",
    "nam": "--loss_names sdm --MLM --mask_by_similarity",
    "sdm_learn_temperature": "--loss_names sdm --learn_temperature",
    "sdm_rate_per_epoch": "--loss_names sdm --lr_per epoch",
    "sdm_id": "--loss_names sdm+id",
    "sdm_mlm": "--loss_names sdm+mlm",
    "sdm_mlm_clean": "--loss_names sdm+mlm --clean_captions",
    "irra": "--loss_names sdm+mlm+id",
    "irra_clean": "--loss_names sdm+mlm+id --clean_captions",
    "irra_ema": "--loss_names sdm+mlm+id --ema 0.99",
    "tal": "--loss_names tal --tau 0.1",
    "rde_no_division": "--loss_names tal --tau 0.1 --token_selection",
    "rde": "--loss_names tal --tau 0.1 --token_selection --division",
    "rda": "--loss_names tal --tau 0.1 --token_selection --division --second_caption",
    "fmfa": "--loss_names asdm+id+mlm+efa",
    "tbps": "--loss_names nitc+ritc --soft_label 0.5",
    "tbps_views": "--loss_names nitc+ritc+citc+simclr --soft_label 0.5 --second_view --two_of_six",
}
WITH_NOISE = ("clip", "sdm", "sdm_masked", "nam", "irra", "rde_no_division", "rde")
NOISE = {  # share of wrong training captions: the rows that are run with it
    0.0: METHODS,
    0.2: WITH_NOISE,
    0.5: WITH_NOISE,
}


def name_of(method, noise):
    return f"{method}_noise_{noise}" if noise else method


def row_of(method, noise):
    last = "best_ema" if "--ema" in METHODS[method] else "last"
    below = "rewritten" if is_rewritten(method) else f"noise_{noise}"
    return Row("drawn", METHODS[method], below=f"{below}_seed_{{seed}}", last=last)


def is_rewritten(name):
    """Whether a row's set has a second caption for each of the first ones, and all else as the other sets."""
    return "--second_caption" in METHODS.get(name, "")


ROWS = {name_of(method, noise): row_of(method, noise) for noise in NOISE for method in NOISE[noise]}
NOISE_OF = {name_of(method, noise): noise for noise in NOISE for method in NOISE[noise]}


def recipe_of(name):
    """A number for all that a row's figures depend on and that stands in this repository."""
    drawn = {"drawing": VERSION, "noise": NOISE_OF[name], **HARD["small"]}
    drawn |= {"rewritten": True} if is_rewritten(name) else {}
    start = typed_of(CLIP, CLIP_ROWS[CLIP]), {"drawing": EASY_VERSION, **CLIP_SIZES}
    found = json.dumps([typed_of(name, ROWS[name]), drawn, start], sort_keys=True)
    return f"{zlib.crc32(found.encode()):08x}"


def recipes():
    return {name: recipe_of(name) for name in ROWS}


def typed_of(name, row):
    """The options of a row that figures depend on, where they are not the usual ones."""
    options, usual = vars(get_args(table.recipe(Run(name, DEFAULT, 1), row))), vars(get_args([]))
    return {key: of for key, of in options.items() if of != usual[key] and key not in table.NO_MATTER}


# ---- the sets ----


def missing(args):
    """The runs that are not finished; those that cannot be are told of when it is their turn."""
    found = []
    for run, commands_of in table.plan(args).items():
        try:
            found += [run] if commands_of() else []
        except InputError:
            pass
    return found


def drawing(run, args):
    """What is typed to draw the set of a run."""
    root, noise = table.root_of(run, args), str(NOISE_OF[run.row])
    more = ["--rewritten"] if is_rewritten(run.row) else []
    return ["--hard", "small", "--noise", noise, *more, "--seed", str(run.seed), "--root", root]


def draw_sets(args):
    for root, run in {table.root_of(run, args): run for run in missing(args)}.items():
        draw(root, drawing(run, args))


def draw(root, words):
    make_folder(root, "--root_dir")
    if status := synthetic.main(words):  # it has said why
        raise SystemExit(status)


# ---- what all rows start from ----


def drawing_of_clip(root):
    sizes = [(f"--{key.removeprefix('train_')}", str(number)) for key, number in CLIP_SIZES.items()]
    return [*(word for pair in sizes for word in pair), "--root", root]


def of_clip(args):
    """args, for the one run that all others start from."""
    own = {"known": CLIP_ROWS, "pairs": [(CLIP, DEFAULT)], "seeds": [1], "words": [], "jobs": 1}
    return argparse.Namespace(**{**vars(args), **own})


def clip_of(args):
    """Where configs/drawn.yaml has it from; None where what follows -- names other weights."""
    asked = get_args(table.train_words(Run(args.rows[0], DEFAULT, args.seeds[0]), args)).pretrain_choice
    usual = get_args(table.recipe(Run(CLIP, DEFAULT, 1), next(iter(ROWS.values())))).pretrain_choice
    return Path(usual) if asked == usual else None


def make_clip(args, programs):
    """Put it where the missing runs look for it, trained if it is not; returns a sentence if that failed."""
    file, own = clip_of(args), of_clip(args)
    if not file or not missing(args):
        return []
    (run,) = table.plan(own)
    if missing(own):
        root = table.root_of(run, own)
        draw(root, drawing_of_clip(root))
    if failed := table.run_all(own, programs):  # also where the one that is there has another recipe
        return failed
    trained = table.runs_in(own.output_dir, CLIP_ROWS)[run] / "last.pth"
    if trained.exists():
        make_folder(file.parent, "--root_dir")
        link_or_copy(trained, file)
    elif not file.exists():
        return [f"{trained} and {file} are gone: move {trained.parent} away, and it is trained again"]
    return []


def list_clip(args):
    own = of_clip(args)
    (run,) = table.plan(own)
    if missing(own):
        words = drawing_of_clip(table.root_of(run, own))
        print(table.shown_command(["-m", "datasets.synthetic", *words]))
    table.list_commands(own)
    trained, file = Path(own.output_dir, DEFAULT, table.PATTERN + run.name, "last.pth"), clip_of(args)
    print(table.shown_command(["-p", str(file.parent)], "mkdir"))
    print(table.shown_command([str(trained), str(file)], "cp"))


def list_commands(args):
    if clip_of(args) and missing(args):
        list_clip(args)
    sets = {table.root_of(run, args): run for run in missing(args)}
    for run in sets.values():
        print(table.shown_command(["-m", "datasets.synthetic", *drawing(run, args)]))
    table.list_commands(args)


# ---- the figures ----


def collected(args):
    """The finished runs in OUTPUT_DIR, kept there too, with the recipes that they have."""
    file = Path(args.output_dir) / "table.json"
    kept = table_report.read_results(file) if file.exists() else []
    runs = table.collect(args, kept)
    if runs:
        write_whole(file, table_report.results_file(runs))
    now = recipes()
    return [{**run, "recipe": now[run["row"]]} for run in runs]


def check_sets(runs, args):
    """A set that was drawn anew, otherwise, is not the one that was trained on; nor is a CLIP of another
    recipe the one that was started from."""
    for commands_of in table.plan(of_clip(args)).values():
        commands_of()
    for run in runs:
        of = Run(run["row"], run["dataset"], run["seed"])
        now = table.describe_data(run["dataset"], table.root_of(of, args))
        if now and run["data"] and now["sha256"] != run["data"]["sha256"]:
            raise InputError(
                f"{of}: its set was drawn anew, otherwise: give another --output_dir, or move the run away"
            )


def write(args):
    """Put the runs in OUTPUT_DIR whose options are their row's into the repository, beside those that are
    there and that the recipes of now would give."""
    runs = [run for run in collected(args) if not run["options"]]
    if not runs:
        raise InputError(f"{args.output_dir} holds no finished run of a row with the row's own options")
    check_sets(runs, args)
    there = table_report.read_results(FIGURES) if FIGURES.exists() else []
    now = recipes()
    there = [run for run in there if run.get("recipe", "") == now.get(run["row"])]
    runs = list({table_report.key_of(run): run for run in [*there, *runs]}.values())
    write_whole(FIGURES, table_report.results_file(runs))
    write_whole(PAGE, drawn_report.page(runs, ROWS, NOISE_OF))
    print(f"written: {FIGURES.relative_to(REPOSITORY)}, {PAGE.relative_to(REPOSITORY)} ({len(runs)} runs)")


def check():
    """Raises InputError where docs/results.md is not what the figures that are kept give."""
    runs, now = table_report.read_results(FIGURES), recipes()
    for run in runs:
        if run.get("recipe", "") != now.get(run["row"]):
            raise InputError(
                f"{FIGURES}: {run['row']}, seed {run['seed']}, was made with another recipe than stands in "
                "configs/drawn.yaml and benchmarks/drawn.py now: run it again, then --write"
            )
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != drawn_report.page(runs, ROWS, NOISE_OF):
        raise InputError(f"{PAGE} is not what {FIGURES} gives: --write makes it")
    print(f"{PAGE.relative_to(REPOSITORY)} is what {len(runs)} runs give")


# ---- the command ----


def read_words(argv):
    parser = Parser(prog="benchmarks.drawn", usage="python -m %(prog)s [option ...]", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-h", "--help", action="help", help="this list")
    add("--rows", type=table.name_list(ROWS), default="all", help=f"all, or of: {', '.join(ROWS)} [all]")
    add("--seeds", type=number_list, default="1-5", help="e.g. 1,2,3 or 1-5 [1-5]")
    add("--root_dir", type=path, default="data/drawn", help="where the sets are drawn [data/drawn]")
    add("--output_dir", type=path, default="logs/drawn", help="where runs are kept [logs/drawn]")
    add("--jobs", type=from_1, default=1, help="runs at a time, each with one thread [1]")
    add("--dry", action="store_true", help="list the commands that are missing, run nothing")
    add("--write", action="store_true", help="run nothing: write docs/results.md of what is in OUTPUT_DIR")
    add("--check", action="store_true", help="run nothing: say whether docs/results.md is as --write made it")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.words, args.known, args.val, args.cross = argv[cut + 1 :], ROWS, False, False
    args.pairs = [(row, DEFAULT) for row in args.rows]
    table.check_words(args)
    return args


@reports_errors
def main(argv=None):
    args = read_words(list(sys.argv[1:] if argv is None else argv))
    if args.check:
        return check()
    if args.dry:
        return list_commands(args)
    if args.write:
        return write(args)
    stop_like_an_interrupt()
    make_folder(args.output_dir, "--output_dir")
    draw_sets(args)
    programs = Programs([None] * args.jobs, OMP_NUM_THREADS="1")
    failed = make_clip(args, programs) or table.run_all(args, programs)
    runs = [run for run in collected(args) if bool(run["options"]) == bool(args.words)]
    print(drawn_report.tables(runs, ROWS, NOISE_OF))
    for sentence in failed:
        print(f"failed: {printable(sentence)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
