"""Is a data set as it should be? `python -m datasets.check --dataset_name CUHK-PEDES --root_dir data
[--decode]`, or `python -m datasets.check --annotations my_set.csv --images my_pictures`.

Prints a table and what was found; exit status 0 when nothing is wrong, 1 when training would meet a fault,
2 when the data set cannot be read at all."""

import hashlib
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from datasets.annotations import missing_images, read_splits, source_of, statistics_table, told_missing
from datasets.records import keys_beside
from utils.data_sets import DATA_SETS, DEFAULT, ignored_name
from utils.errors import InputError, printable, reports_errors
from utils.option_types import Parser, nearest
from utils.options import fraction, from_2

VALIDATION = ("validation", "valid", "dev")  # other words for val


class Finding(NamedTuple):
    what: str  # one sentence
    fault: bool  # training or evaluation would go wrong; else something worth knowing


def fault(what):
    return Finding(what, True)


def note(what):
    return Finding(what, False)


# ---- what is looked at: each yields Findings ----


def check_split_words(splits):
    """Words other than train, test and val: they count as val, which may be a slip of the pen."""
    for word, images in splits.words.items():
        meant = word.strip().lower()
        what = f'{images} images have the split "{word}", which counts as val'
        if word in ("train", "test", "val"):
            continue
        if meant in ("train", "test"):
            yield fault(f"{what}: {meant} is meant")
        elif splits.source.row:
            yield note(f"{what}, as in the published code")
        else:  # a file of one's own, where nobody else's word is to be followed
            hint = nearest(word, ("train", "test", "val")) or ": write val if it is"
            yield Finding(f"{what}{hint}", fault=meant not in VALIDATION)


def check_counts(splits):
    """Where the counts are not the published ones, with the likely cause."""
    row = splits.source.row
    found = {name: split.counts for name, split in splits.by_name.items()}
    if row is None or row.published in (None, found):
        return
    differing = [
        f"{name} {counts}, published {row.published[name]}"
        for name, counts in found.items()
        if counts != row.published[name]
    ]
    cause = ""
    if tuple(found[name][0] for name in ("train", "val", "test")) == row.old_ids:
        old = "/".join(map(str, row.old_ids))
        cause = f": this is the old file, split {old}; ask its authors for the present one"
    yield note(f"ids, images, captions are not the published ones: {'; '.join(differing)}{cause}")


def check_images_once(splits):
    """Images that stand in two splits, with two persons, or twice in one split."""
    where = defaultdict(set)
    for name, split in splits.by_name.items():
        for pid, path in zip(split.image_pids, split.image_paths, strict=True):
            where[path].add((name, pid))
    across = [path for path, uses in where.items() if len({name for name, _ in uses}) > 1]
    twice = [path for path, uses in where.items() if len(uses) > 1 and len({name for name, _ in uses}) == 1]
    if across:
        yield fault(f"{len(across)} images stand in more than one split, the first is {min(across)}")
    if twice:
        yield fault(f"{len(twice)} images show two persons, the first is {min(twice)}")
    for name, split in splits.by_name.items():
        times = Counter(split.image_paths)
        again = [path for path in times if times[path] > 1]
        if again:
            yield note(
                f"{len(again)} images of {name} are listed more than once, so that a gallery holds "
                f"{len(split.image_paths)} instead of {len(times)}, as in the published code; the first is "
                f"{min(again)}: one record an image, with all its captions, is meant"
            )


def check_persons_once(splits):
    """Persons that are trained on and tested: only where a file of one's own names them."""
    if splits.source.row:
        return
    people = {
        name: {splits.person(name, pid) for pid in split.image_pids} for name, split in splits.by_name.items()
    }
    for name in ("val", "test"):
        both = sorted(people["train"] & people[name], key=str)
        if both:
            yield note(
                f"{len(both)} persons of train stand in {name} too, which flatters its figures: {both[0]}"
            )


def check_captions(splits, text_length, plain):
    """Captions that are empty, cut, without letters, or shared by several persons. plain: as they are read
    with --plain_captions."""
    from tqdm import tqdm

    from datasets.tokenizer import SimpleTokenizer

    tokenizer, persons = SimpleTokenizer(plain=plain), defaultdict(set)
    empty, cut, wordless = [], [], []
    for name, split in splits.by_name.items():
        captions = tqdm(split.captions, desc=f"{name} captions", leave=False, disable=None)
        for pid, caption in zip(split.caption_pids, captions, strict=True):
            text = tokenizer.clean(caption)
            persons[text].add((name, pid))
            person = f"person {splits.person(name, pid)} of {name}"
            if not text:
                empty.append(person)
            elif not any(character.isalpha() for character in text):
                wordless.append(f'"{caption[:40]}" ({person})')
            elif len(tokenizer.encode(caption)) + 2 > text_length:
                cut.append(f'"{caption[:40]}…" ({person})')
    shared = [text for text, uses in persons.items() if text and len(uses) > 1]
    if empty:
        yield fault(f"{len(empty)} captions are empty, the first of {empty[0]}")
    if wordless:
        yield fault(f"{len(wordless)} captions hold no word, the first is {wordless[0]}")
    if cut:
        yield note(f"{len(cut)} captions are cut at {text_length} tokens, the first is {cut[0]}")
    if shared:
        row = splits.source.row
        known = f" (known of {splits.name})" if row and row.shares_captions else ""
        yield note(
            f'{len(shared)} captions belong to several persons{known}, the first is "{shared[0][:60]}"'
        )


ODD = {  # pictures that other programs show differently
    "turned": "are turned by an EXIF tag: training and test.py read them as they lie, as the published code "
    "does, search.py and demo.py upright",
    "deep": "are grey with more than eight bits: here they are brought to eight, the published code cuts "
    "them at 255, which leaves white",
}


def check_pictures(splits, missing):
    """Decode every image that is there; find unreadable ones, the same picture under two names in different
    splits, and those that other programs show differently."""
    from tqdm import tqdm

    from datasets.transforms import as_rgb, is_deep, opened, turn_of

    def look(path):
        try:
            with opened(path) as image:
                as_rgb(image)
                odd["turned"] += [path] * (turn_of(image) is not None)
                odd["deep"] += [path] * is_deep(image)
        except InputError as error:
            return path, None, str(error)
        return path, hashlib.sha256(Path(path).read_bytes()).hexdigest(), None

    owner = {path: name for name, split in splits.by_name.items() for path in split.image_paths}
    owner = {path: name for path, name in owner.items() if path not in missing}
    unreadable, pictures, odd = [], defaultdict(list), {"turned": [], "deep": []}
    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, owner), total=len(owner), desc="decoding", unit="img", disable=None)
        for path, digest, error in looked:
            if error:
                unreadable.append(error)
            else:
                pictures[digest].append(path)
    yield from map(fault, unreadable[:10])
    if len(unreadable) > 10:
        yield fault(f"{len(unreadable) - 10} more images cannot be read")
    same = [paths for paths in pictures.values() if len({owner[path] for path in paths}) > 1]
    if same:
        yield fault(f"{len(same)} pictures stand in two splits, e.g. {same[0][0]} and {same[0][1]}")
    for kind, paths in odd.items():
        if paths:
            yield note(f"{len(paths)} pictures {ODD[kind]}; the first is {min(paths)}")


# ---- the check ----


def check_dataset(source, decode=False, text_length=77, plain=False, keys=()):
    """(Splits, [Finding, …]) of a datasets.annotations.Source. Raises InputError where the annotation cannot
    be read at all, or lacks one of the keys (of datasets.records.BESIDE)."""
    splits = read_splits(source, images_must_exist=False, keys=keys)
    missing = set(missing_images(splits.by_name))
    findings = [fault(told_missing(source, missing))] if missing else []
    for check in (check_split_words, check_counts, check_images_once, check_persons_once):
        findings += check(splits)
    findings += check_captions(splits, text_length, plain)
    if decode:
        findings += check_pictures(splits, missing)
    return splits, findings


@reports_errors
def main(argv=None):
    parser = Parser(
        prog="python -m datasets.check",
        description="Check a data set before training: annotation, ids, images, captions.",
        epilog="Exit status: 0 nothing is wrong, 1 something is, 2 the data set cannot be read.",
    )
    add = parser.add_argument
    add("-h", "--help", action="help", help="show this and end")
    add("--dataset_name", choices=DATA_SETS, default=DEFAULT)
    add("--root_dir", default="./data", help="folder that holds the data sets' folders")
    add("--annotations", metavar="FILE", help="instead of a name: a JSON, JSON lines, CSV or TSV file")
    add("--images", metavar="DIR", help="where the image paths in FILE start; default: the folder of FILE")
    add("--split", choices=("train", "test", "val"), help="of all images, where FILE names no split")
    add("--decode", action="store_true", help="decode every image too: minutes on a full set")
    add("--text_length", type=from_2, metavar="N", default=77, help="tokens at which captions are cut")
    add("--plain_captions", action="store_true", help='as in training: sentences are read without .!"()*#:;~')
    add("--second_caption", action="store_true", help="as in training: it reads diversity_captions")
    add("--back_translation", type=fraction, metavar="X", default=0.0, help="it reads captions_bt")
    add("--debug", action="store_true", help="print the traceback of an input error too")
    args = parser.parse_args(argv)
    if args.split and not args.annotations:
        raise InputError(f"--split {args.split} is for an --annotations file that names no split")
    source = source_of(args, args.split)
    if ignored := ignored_name(args):
        print(printable(ignored), file=sys.stderr)
    splits, findings = check_dataset(
        source, args.decode, args.text_length, args.plain_captions, keys_beside(args)
    )
    print(printable(str(source.path)))
    print(statistics_table(splits))
    for finding in sorted(findings, key=lambda finding: not finding.fault):
        print(printable(f"{'FAULT' if finding.fault else 'note '} {finding.what}"))
    faults = sum(finding.fault for finding in findings)
    looked = "every image decoded" if args.decode else "images looked up, not decoded (--decode does)"
    print(f"{faults} faults, {len(findings) - faults} notes; {looked}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
