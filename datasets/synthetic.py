"""Draws pedestrians and writes sentences about them, in the on-disk format of any of the three data sets.

The demo, the tests and the benchmarks use it, so that they need nothing from outside:

    python -m datasets.synthetic --format CUHK-PEDES --ids 200 --root data_synthetic
    python -m datasets.synthetic --hard small --noise 0.2 --root data_hard          see synthetic_hard.py
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

from datasets import synthetic_hard
from datasets.drawn_files import arguments_of, draw_file, image_name, made
from datasets.pedestrians import VIEWS, describe, make_identities
from datasets.synthetic_hard import HARD
from utils.data_sets import DATA_SETS, DEFAULT
from utils.errors import InputError, printable, reports_errors


def make_dataset(
    root,
    format="CUHK-PEDES",
    train_ids=200,
    val_ids=20,
    test_ids=50,
    images_per_id=4,
    seed=0,
    size=None,
    progress=False,
):
    """Draws root/<format>/imgs/... and its annotation file; returns the path of root/<format>.

    The files are a function of the arguments alone. A folder that holds them already is left as it is, one
    drawn with other arguments is drawn again. InputError: bad arguments, or a folder with other content.
    size: (height, width) of every image; None varies it around 192x80.
    val_ids is not used for ICFG-PEDES, which has no val split.
    """
    arguments = arguments_of(format, train_ids, val_ids, test_ids, images_per_id, seed, size)

    def draw_records(imgs):
        row = DATA_SETS[format]
        pid = row.first_pid
        for split, count in arguments["ids"].items():
            for index, identity in enumerate(make_identities(seed, split, count)):
                for number in range(images_per_id):
                    # The place in the split, not the pid: more training ids change no other split's images
                    place = f"{seed}/{split}/{index}/{number}"
                    rng, words = Random(place), Random(f"{place}/words")
                    view = rng.choice(VIEWS)
                    captions = [describe(identity, view, words) for _ in range(row.captions_per_image)]
                    name = image_name(format, pid, number)
                    draw_file(imgs / name, identity, view, rng, size)
                    yield {"split": split, "captions": captions, row.path_key: name, "id": pid}
                pid += 1

    return made(Path(root) / format, arguments, draw_records, progress)


# ---- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the usage text
        raise InputError(message)


@reports_errors
def main(argv=None):
    parser = Parser(prog="python -m datasets.synthetic", description="Draws a small data set of pedestrians.")
    add = parser.add_argument
    add("--format", default=DEFAULT, choices=list(DATA_SETS), help="the data set whose files to imitate")
    add("--root", default="data_synthetic", help="the folder in which to make the folder <format>")
    sizes = f"{' or '.join(HARD)}: persons who differ in one attribute; --ids … too change what it is made of"
    add("--hard", choices=list(HARD), help=sizes)
    add("--noise", type=float, help="with --hard: share of the training captions that describe somebody else")
    reworded = "with --hard: diversity_captions too, each training caption completed and reworded (RDA)"
    add("--rewritten", action="store_true", help=reworded)
    add("--ids", type=int, default=200, help="identities to train on")
    add("--val_ids", type=int, default=20, help="not used for ICFG-PEDES, which has no val split")
    add("--test_ids", type=int, default=50)
    add("--images_per_id", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="of every image; varied when not given")
    args = parser.parse_args(argv)
    if args.noise is not None and not args.hard:
        raise InputError("--noise goes with --hard; train.py's --noisy_rate exchanges captions of any set")
    if args.rewritten and not args.hard:
        raise InputError("--rewritten goes with --hard: only hard sets are drawn with reworded captions")
    if args.hard:
        parser.set_defaults(**HARD[args.hard])
        args = parser.parse_args(argv)
    what = {"train_ids": args.ids, "val_ids": args.val_ids, "test_ids": args.test_ids}
    what |= {"images_per_id": args.images_per_id, "seed": args.seed, "size": args.size}
    where, progress = (args.root, args.format), sys.stderr.isatty()
    if args.hard:
        what |= {"noise": args.noise or 0.0, "rewritten": args.rewritten}
        folder = synthetic_hard.make_hard_dataset(*where, **what, progress=progress)
    else:
        folder = make_dataset(*where, **what, progress=progress)
    records = json.loads((folder / DATA_SETS[args.format].files[0]).read_text())
    captions = sum(len(record["captions"]) for record in records)
    people = len({record["id"] for record in records})
    print(
        f"{printable(str(folder))} holds {people} persons in {len(records)} images with {captions} sentences."
    )
    if args.hard:
        print(synthetic_hard.about(records))


if __name__ == "__main__":
    sys.exit(main())
