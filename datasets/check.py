"""Is a data set as it should be? `python -m datasets.check --dataset_name CUHK-PEDES --root_dir data
[--decode]`, or `python -m datasets.check --annotations my_set.csv --images my_pictures`.

Prints a table and what was found; exit status 0 when nothing is wrong, 1 when training would meet a fault,
2 when the data set cannot be read at all."""

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from datasets.annotations import (
    missing_images,
    read_splits,
    source_of,
    statistics_table,
    told_missing,
)
from utils.data_sets import DATA_SETS, DEFAULT, ignored_name
from utils.errors import InputError, printable, reports_errors
from utils.option_types import nearest

VALIDATION = ("validation", "valid", "dev")  # other words for val


class Finding(NamedTuple):
    what: str  # one sentence
    fault: bool  # training or evaluation would go wrong; else something worth knowing


def check_counts(splits):
    """Where the counts are not the published ones, with the likely cause."""
    row = splits.source.row
    if row is None or row.published is None:
        return []
    found = {name: split.counts for name, split in splits.by_name.items()}
    differing = [
        f"{name} {found[name]}, published {row.published[name]}"
        for name in found
        if found[name] != row.published[name]
    ]
    if not differing:
        return []
    cause = ""
    if tuple(found[name][0] for name in ("train", "val", "test")) == row.old_ids:
        old = "/".join(map(str, row.old_ids))
        cause = f": this is the old file, split {old}; ask its authors for the present one"
    return [
        Finding(f"ids, images, captions are not the published ones: {'; '.join(differing)}{cause}", False)
    ]


def check_images_once(splits):
    """Images that stand in two splits, or twice in one with different persons."""
    where, findings = defaultdict(set), []
    for name, split in splits.by_name.items():
        for pid, path in zip(split.image_pids, split.image_paths, strict=True):
            where[path].add((name, pid))
    across = sorted(path for path, uses in where.items() if len({name for name, _ in uses}) > 1)
    twice = sorted(
        path for path, uses in where.items() if len({pid for name, pid in uses}) > 1 and path not in across
    )
    if across:
        findings.append(
            Finding(f"{len(across)} images stand in more than one split, the first is {across[0]}", True)
        )
    if twice:
        findings.append(Finding(f"{len(twice)} images show two persons, the first is {twice[0]}", True))
    for name, split in splits.by_name.items():
        again = [path for path, times in Counter(split.image_paths).items() if times > 1]
        if again:
            images = len(set(split.image_paths))
            findings.append(
                Finding(
                    f"{len(again)} images of {name} are listed more than once, so that a gallery holds "
                    f"{len(split.image_paths)} instead of {images}, as in the published code; the first is "
                    f"{min(again)}: one record an image, with all its captions, is meant",
                    False,
                )
            )
    return findings


def check_split_words(splits):
    """Words other than train, test and val: they count as val, which may be a slip of the pen."""
    findings = []
    for word, images in splits.words.items():
        meant = word.strip().lower()
        if word in ("train", "test", "val"):
            continue
        if meant in ("train", "test"):
            what = f'{images} images have the split "{word}", which counts as val: {meant} is meant'
            findings.append(Finding(what, True))
        elif splits.source.row:
            what = f'{images} images have the split "{word}", which counts as val, as in the published code'
            findings.append(Finding(what, False))
        else:  # a file of one's own, where nobody else's word is to be followed
            hint = nearest(word, ("train", "test", "val")) or ": write val if it is"
            what = f'{images} images have the split "{word}", which counts as val{hint}'
            findings.append(Finding(what, meant not in VALIDATION))
    return findings


def check_persons_once(splits):
    """Persons that are trained on and tested: only where a file of one's own names them."""
    if splits.source.row:
        return []
    people = {
        name: {splits.person(name, pid) for pid in split.image_pids} for name, split in splits.by_name.items()
    }
    findings = []
    for name in ("val", "test"):
        both = sorted(people["train"] & people[name], key=str)
        if both:
            what = f"{len(both)} persons of train stand in {name} too, which flatters its figures: {both[0]}"
            findings.append(Finding(what, False))
    return findings


def check_captions(splits, text_length=77):
    """Captions that are empty, cut, without letters, or shared by several persons."""
    from tqdm import tqdm

    from datasets.tokenizer import SimpleTokenizer, clean

    tokenizer, findings, persons = SimpleTokenizer(), [], defaultdict(set)
    empty, cut, wordless = [], [], []
    for name, split in splits.by_name.items():
        captions = tqdm(split.captions, desc=f"{name} captions", leave=False, disable=None)
        for pid, caption in zip(split.caption_pids, captions, strict=True):
            text = clean(caption)
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
        findings.append(Finding(f"{len(empty)} captions are empty, the first of {empty[0]}", True))
    if wordless:
        findings.append(Finding(f"{len(wordless)} captions hold no word, the first is {wordless[0]}", True))
    if cut:
        findings.append(
            Finding(f"{len(cut)} captions are cut at {text_length} tokens, the first is {cut[0]}", False)
        )
    if shared:
        row = splits.source.row
        known = f" (known of {splits.name})" if row and row.shares_captions else ""
        findings.append(
            Finding(
                f'{len(shared)} captions belong to several persons{known}, the first is "{shared[0][:60]}"',
                False,
            )
        )
    return findings


ODD = {  # pictures that other programs show differently
    "turned": "are turned by an EXIF tag: training and test.py read them as they lie, as the published code "
    "does, search.py and demo.py upright",
    "deep": "are grey with more than eight bits: here they are brought to eight, the published code cuts "
    "them at 255, which leaves white",
}


def check_pictures(splits):
    """Decode every image; find unreadable ones, the same picture under two names in different splits, and
    those that other programs show differently."""
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
    unreadable, pictures, odd = [], defaultdict(list), {"turned": [], "deep": []}
    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, owner), total=len(owner), desc="decoding", unit="img", disable=None)
        for path, digest, error in looked:
            if error:
                unreadable.append(error)
            else:
                pictures[digest].append(path)
    findings = [Finding(error, True) for error in unreadable[:10]]
    if len(unreadable) > 10:
        findings.append(Finding(f"{len(unreadable) - 10} more images cannot be read", True))
    same = [paths for paths in pictures.values() if len({owner[path] for path in paths}) > 1]
    if same:
        findings.append(
            Finding(
                f"{len(same)} pictures stand in two splits, e.g. {same[0][0]} and {same[0][1]}",
                True,
            )
        )
    findings += [
        Finding(f"{len(paths)} pictures {ODD[kind]}; the first is {min(paths)}", False)
        for kind, paths in odd.items()
        if paths
    ]
    return findings


def check_dataset(source, decode=False, text_length=77):
    """(Splits, [Finding, …]) of a datasets.annotations.Source. Raises InputError where the annotation cannot
    be read at all."""
    splits = read_splits(source, images_must_exist=False)
    findings = []
    absent = missing_images({path for split in splits.by_name.values() for path in split.image_paths})
    if absent:
        folders = Counter(str(Path(path).parent) for path in absent)
        most, number = folders.most_common(1)[0]
        whole = "" if Path(most).is_dir() else ", a folder that does not exist"
        findings.append(
            Finding(
                f"{told_missing(absent)}; {number} of them in {most}{whole}: "
                + ("is the archive unpacked whole?" if source.row else f"is --images {source.images} right?"),
                True,
            )
        )
    findings += check_split_words(splits) + check_counts(splits) + check_images_once(splits)
    findings += check_persons_once(splits)
    findings += check_captions(splits, text_length)
    if decode and not absent:
        findings += check_pictures(splits)
    return splits, findings


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m datasets.check",
        description="Check a data set before training: annotation, ids, images, captions.",
        epilog="Exit status: 0 nothing is wrong, 1 something is, 2 the data set cannot be read.",
    )
    add = parser.add_argument
    add("--dataset_name", choices=DATA_SETS, default=DEFAULT)
    add("--root_dir", default="./data", help="folder that holds the data sets' folders")
    add("--annotations", metavar="FILE", help="instead of a name: a JSON, JSON lines, CSV or TSV file")
    add("--images", metavar="DIR", help="where the image paths in FILE start; default: the folder of FILE")
    add("--split", choices=("train", "test", "val"), help="of all images, where FILE names no split")
    add("--decode", action="store_true", help="decode every image too: minutes on a full set")
    add("--text_length", type=int, default=77, help="tokens at which captions are cut")
    add("--debug", action="store_true", help="print the traceback of an input error too")
    args = parser.parse_args(argv)
    if args.split and not args.annotations:
        raise InputError(f"--split {args.split} is for an --annotations file that names no split")
    source = source_of(args, args.split)
    if ignored := ignored_name(args):
        print(printable(ignored), file=sys.stderr)
    splits, findings = check_dataset(source, args.decode, args.text_length)
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
