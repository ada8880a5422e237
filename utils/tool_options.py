"""The options of search.py, demo.py, visualize.py and export.py, checked; without torch, so at once."""

import os

from utils.errors import InputError
from utils.options import parser_of, tool_args


def search_args(argv=None, program="search"):
    """Those of demo.py too."""
    parser = parser_of(program)
    args = tool_args(parser, argv)
    if args.num_workers == 0:  # here they are threads that read pictures
        parser.error('argument --num_workers: "0" is not a whole number of at least 1')
    if (args.gallery is None) == (args.split is None):
        raise InputError(
            "give either --gallery FOLDER, your own pictures, or --split test, those of the data set"
        )
    if args.gallery is not None and not os.path.isdir(args.gallery):  # "" is none
        what = "that is a file" if os.path.exists(args.gallery) else "no such folder"
        raise InputError(f"--gallery {args.gallery or repr('')}: {what}")
    return args


def visualize_args(argv=None):
    args = tool_args(parser_of("visualize"), argv)
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
    args = tool_args(parser_of("export"), argv)
    args.device, args.precision = "cpu", "fp32"  # whatever the run was trained in
    return args
