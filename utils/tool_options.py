"""The options of search.py, visualize.py, demo.py and export.py; without torch, so that --help is instant."""

import argparse
import sys
from pathlib import Path

from utils.data_sets import check_data_options, options_over
from utils.errors import InputError
from utils.option_types import Parser, count, count_or_0, number, one_of
from utils.options import DATASETS, EXIT_STATUS, add_by_path, read_run_options, test_parser

INDEX_TYPES = ("flat", "ivf", "hnsw")
FORMATS = ("safetensors", "onnx", "open_clip")
SPLITS = ("test", "val", "train")
port = number(int, "a port from 0 to 65535 (0: a free one)", lambda n: 0 <= n <= 65535)
SPECIAL = "<|mask|> and <|endoftext|>, typed in a sentence, are the special tokens, not text."


def number_list(text):
    """`0,17` or `0-5,17` as [0, 17], [0, 1, …, 5, 17]."""
    found = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f'"{text}" is not a list of numbers such as 0,17 or 0-5,17')
        found += range(int(first), int(last or first) + 1)
    return found


def add_run(parser, required=True):
    """Which model: the options that most tools have."""
    add = parser.add_argument_group("model").add_argument
    add("--config_file", required=required, metavar="RUN", help="run's folder, or its configs.yaml")
    add("--checkpoint", default=None, metavar="FILE", help="instead of the best.pth in the run's folder")
    for name in ("device", "precision"):
        option = test_parser().options()[name]
        add(f"--{name}", default=option.default, type=option.type, help=option.help)
    add("--debug", action="store_true", help="print the traceback of an input error too")


def add_data(add):
    """Which data set: for tools that read a split of it."""
    add("--root_dir", default=argparse.SUPPRESS, help="folder that holds the data sets' folders")
    add(
        "--dataset_name",
        default=argparse.SUPPRESS,
        type=one_of(*DATASETS),
        help="another data set than the run's",
    )
    add_by_path(add)


def add_gallery(parser):
    """Which pictures, and where their index is."""
    group = parser.add_argument_group("gallery")
    add = group.add_argument
    add("--gallery", default=None, metavar="FOLDER", help="folder of pictures, sub-folders included")
    add(
        "--split", default=None, type=one_of(*SPLITS), help="instead: the images of a split of the run's data"
    )
    add_data(add)
    add(
        "--index",
        default=None,
        metavar="FOLDER",
        help="where the pictures' features are kept; default: in the run's folder, below search/",
    )
    add(
        "--index_type",
        default=None,
        type=one_of(*INDEX_TYPES),
        help="flat (exact; the first choice), ivf or hnsw (approximate, for a million pictures and more); "
        "default: what the index is, flat for a new one",
    )
    add("--rebuild", action="store_true", help="encode every picture anew, whatever the index holds")
    add("--encode_batch", default=64, type=count, help="pictures encoded at once")
    add("--num_workers", default=4, type=count, help="threads that read pictures")


def search_parser():
    parser = Parser(
        prog="search.py",
        description="Find persons in a folder of pictures by a sentence. The folder is encoded once; next "
        f"time only new and changed pictures are. Without a query it just does that. {SPECIAL}",
        epilog=EXIT_STATUS,
    )
    add_run(parser)
    add_gallery(parser)
    add = parser.add_argument_group("query").add_argument
    add(
        "--query",
        nargs="+",
        action="extend",
        default=[],
        metavar="SENTENCE",
        help="who is looked for; several can be given",
    )
    add("--query_file", default=None, metavar="FILE", help="a text file, one sentence a line")
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="find persons similar to this picture's",
    )
    add = parser.add_argument_group("result").add_argument
    add("--top_k", default=10, type=count, help="pictures shown for each query")
    add("--save", default=None, metavar="FILE", help="draw the result, e.g. result.png")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def visualize_parser():
    parser = Parser(
        prog="visualize.py",
        description="Pictures of a run: what queries of a split find, its CMC curve, training curves, and "
        f"where the words of a sentence look in an image. {SPECIAL}",
        epilog=EXIT_STATUS,
    )
    add_run(parser, required=False)
    add = parser.add_argument_group("queries of a split, one picture each").add_argument
    add("--split", default="test", type=one_of(*SPLITS), help="split to look at")
    add_data(add)
    add(
        "--queries",
        default=None,
        type=number_list,
        metavar="N,N,…",
        help="by number, from 0, e.g. 0,17 or 0-5",
    )
    add("--worst", default=0, type=count_or_0, metavar="N", help="whose first right image comes last")
    add("--best", default=0, type=count_or_0, metavar="N", help="found with the largest margin")
    add("--random", default=0, type=count_or_0, metavar="N", help="drawn by --seed")
    add("--seed", default=argparse.SUPPRESS, type=count_or_0, help="of --random; default: the run's")
    add("--num_workers", default=argparse.SUPPRESS, type=count_or_0, help="loading processes")
    add("--test_batch_size", default=argparse.SUPPRESS, type=count, help="batch of images or captions")
    add = parser.add_argument_group("curves").add_argument
    add("--cmc", action="store_true", help="CMC curve on the split, text to image and image to text")
    add(
        "--curves",
        nargs="+",
        default=[],
        metavar="RUN",
        help="losses, accuracies and figures of one or several runs in one plot, from their event files",
    )
    add = parser.add_argument_group("where the words look (needs a model trained with mlm)").add_argument
    add("--words", default=None, metavar="SENTENCE", help="a sentence; goes with --image")
    add("--image", default=None, metavar="FILE", help="a picture; goes with --words")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        default=None,
        metavar="FOLDER",
        help="where the pictures go; default: pictures/ in the run's folder, or here without one",
    )
    return parser


def demo_parser():
    parser = Parser(
        prog="demo.py",
        description="A page in the browser: a sentence in, the persons out, and where its words look. "
        f"It listens on this machine only, and nothing leaves it. {SPECIAL}",
        epilog=EXIT_STATUS,
    )
    add_run(parser)
    add_gallery(parser)
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets every machine in")
    add("--port", default=7860, type=port, help="0 takes a free one")
    add("--top_k", default=12, type=count, help="pictures shown for a sentence")
    add("--max_upload", default=20, type=count, metavar="MB", help="largest picture that can be uploaded")
    add("--max_pictures", default=500, type=count, help="most pictures in an uploaded folder")
    add("--example", nargs="+", action="extend", default=[], metavar="SENTENCE", help="offered for a click")
    return parser


def export_parser():
    parser = Parser(
        prog="export.py",
        description="The two encoders of a run for other programs, with tokeniser settings and a model card; "
        "checked against the run before it is said to be done.",
        epilog=EXIT_STATUS,
    )
    add = parser.add_argument
    add("config_file", metavar="RUN", help="run's folder, or its configs.yaml")
    add("--format", required=True, type=one_of(*FORMATS), help=", ".join(FORMATS))
    add("--output", default=None, metavar="FOLDER", help="default: export/FORMAT in the run's folder")
    add("--checkpoint", default=None, metavar="FILE", help="instead of the best.pth in the run's folder")
    add("--debug", action="store_true", help="print the traceback of an input error too")
    return parser


def tool_args(parser, argv=None):
    """The options of a tool over those of the run that it names: a Namespace, with `run_dir` added.

    Without --config_file, where a tool allows that, run_dir is None and the tool's options are all.
    """
    given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    if given.config_file is None:
        given.run_dir = None
        return given
    config_file = Path(given.config_file)
    if config_file.is_dir():
        config_file = config_file / "configs.yaml"
    args = read_run_options(config_file)
    vars(args).update(options_over(vars(args), vars(given)))
    check_data_options(args)
    args.training, args.run_dir = False, str(config_file.parent)
    return args


def search_args(argv=None):
    args = tool_args(search_parser(), argv)
    check_gallery(args)
    return args


def demo_args(argv=None):
    args = tool_args(demo_parser(), argv)
    check_gallery(args)
    return args


def check_gallery(args):
    if (args.gallery is None) == (args.split is None):
        raise InputError(
            "give either --gallery FOLDER, your own pictures, or --split test, those of the data set"
        )
    if args.gallery is not None and not Path(args.gallery).is_dir():
        what = "that is a file" if Path(args.gallery).exists() else "no such folder"
        raise InputError(f"--gallery {args.gallery}: {what}")


def visualize_args(argv=None):
    args = tool_args(visualize_parser(), argv)
    asked = bool(args.queries or args.worst or args.best or args.random)
    if not (asked or args.cmc or args.curves or args.words is not None or args.image):
        raise InputError(
            "nothing to draw: give --queries 0,17, --worst 20, --best 20, --random 20, --cmc, --curves RUN, "
            "or --words SENTENCE --image FILE"
        )
    if (args.words is None) != (args.image is None):
        raise InputError("--words SENTENCE and --image FILE go together")
    if args.run_dir is None and (asked or args.cmc or args.words is not None):
        raise InputError("--config_file RUN is missing: only --curves can do without")
    return args


def export_args(argv=None):
    args = tool_args(export_parser(), argv)
    args.device, args.precision = "cpu", "fp32"  # whatever the run was trained in
    return args
