"""Figures in the pages come from benchmarks/results, never from a keyboard.

python -m benchmarks.report            a Markdown table of the latest figures
python -m benchmarks.report --write    fill the marked places of README.md and docs/*.md
python -m benchmarks.report --check    say which of them are not what the results say; then exit status 1

A place is marked by comments, which GitHub does not show: <!--=NAME/ARM-->7.64 s<!--/--> of a figure in
FIGURES, <!--=NAME/ARM/ratio-->1.99x<!--/--> of its ratio to the baseline, <!--=NAME-->…<!--/--> of a text in
TEXTS. Hyphens before an arm's name are left out, since GitHub shows a comment with two of them; and it takes
a line that begins with a comment for HTML, so no line of prose may.
"""

import json
import re
from pathlib import Path

from benchmarks.harness import RESULTS, new_parser
from utils.errors import InputError, reports_errors
from utils.files import write_whole

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!--=(.*?)-->(.*?)<!--/-->", re.DOTALL)
# a unit: the next larger one, how often it goes into that, and from how many on it is shown in that
LARGER = {"ms": ("s", 1000, 1000), "s": ("minutes", 60, 120), "MiB": ("GiB", 1024, 1024)}

FIGURES = {  # a name for marks: the figure in benchmarks/results
    "step": "training step, batch 8, fp32, time",
    "step peak": "training step, batch 8, fp32, peak memory",
    "step memory": "training step, batch 8, fp32, peak memory beyond these",
    "optimiser fp32": "optimiser step, fp32, host time",
    "optimiser fp16": "optimiser step, fp16, host time",
    "loader": "loader, one process",
    "evaluation": "evaluation, 32 captions, 16 images, time",
    "ranking": "ranking 6156x3074, time",
    "ranking memory": "ranking 6156x3074, extra memory",
    "large ranking": "ranking 2000x19848, time",
    "start": "start-up",
    "parts peak": "training step, batch 32, fp32, parts: peak memory",
    "parts memory": "training step, batch 32, fp32, parts: peak memory of activations and gradients",
    "parts time": "training step, batch 32, fp32, parts: CPU time",
    "selection step": "training step, batch 8, fp32, CPU time",
    "selection encoding": "encoding pictures and captions, batch 8, fp32, CPU time",
    "query": "query, index of 1000000 vectors",
    "recall": "recall at 10, index of 1000000 vectors",
    "build": "build CPU, index of 1000000 vectors",
    "load": "load, index of 1000000 vectors",
    "file": "file, index of 1000000 vectors",
    "answer": "answer over 10000 pictures, ViT-B/16, time",
    "answer search": "of it the search of 10000 vectors, CPU time",
    "words": "words of the whole sentence, weight on what they name",
    "words head": "words of the head, weight on what they name",
    "words top": "words of the top, weight on what they name",
    "words bottom": "words of the bottom, weight on what they name",
    "words shoes": "words of the shoes, weight on what they name",
    "words bag": "words of the bag, weight on what they name",
    "other words": "words of other parts, weight on the same",
    "demo split": "demo, test split",
    "demo training": "demo, training",
}


@reports_errors
def main(argv=None):
    parser = new_parser(__doc__, [])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    args, lines = parser.parse_args(argv), all_lines()
    if not (args.write or args.check):
        print(table(latest(lines)))
        return 0
    wrong = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if args.write and (new := filled(text, lines)) != text:
            write_whole(page, new)
            text = new
        wrong += [f"{page.relative_to(ROOT)}, {sentence}" for sentence in what_is_wrong(text, lines)]
    for sentence in wrong:
        print(sentence)
    return int(bool(wrong))


# ---- the results ----


def all_lines(folder=RESULTS):
    """Every line of the results, file by file, each from old to new."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def latest(lines):
    """The latest line of each benchmark's figures on each machine, in the order in which they first came."""

    def key(line):
        return line["figure"], line["machine"].split(", load")[0], line["command"].split()[2]

    return list({key(line): line for line in lines}.values())


def line_of(figure, arm, lines):
    """(the latest line in which a figure has such an arm, the arm as it stands there)."""
    for line in sorted(reversed(lines), key=lambda line: line["date"], reverse=True):
        if line["figure"] == figure:
            for name in line["arms"]:
                if name.lstrip("-") == arm:
                    return line, name
    raise InputError(f"benchmarks/results holds no figure {figure!r} with {arm!r}")


def table(lines):
    rows = ["| figure | published | ours | ratio | on | command |", "|---|---|---|---|---|---|"]
    places = {}  # where it was measured, by letter
    for line in lines:
        unit, arms = line["unit"], line["arms"]
        place = places.setdefault(place_of(line), chr(ord("a") + len(places)))
        baseline = shown(arms["published"], unit) if "published" in arms else ""
        for name, value in arms.items():
            if name != "published":
                what = line["figure"] + ("" if name == "ours" else f": {name}")
                ratio = f"{line['ratio'][name]:.3g}x" if name in line["ratio"] else ""
                cells = what, baseline, shown(value, unit), ratio, place, f"`{line['command']}`"
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *(f"- {letter}: {place}" for place, letter in places.items())])


def place_of(line):
    machine, versions = line["machine"].split(", load")[0], line["versions"].items()
    return "; ".join([machine, ", ".join(f"{name} {number}" for name, number in versions)])


def shown(value, unit):
    return f"{value:,.4g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


# ---- the pages ----


def filled(text, lines):
    """The page with what the results say at each place whose name is known."""

    def fill(place):
        if "<!--=" in place[2]:  # its end is missing, so what follows is not its own
            return place[0]
        try:
            return f"<!--={place[1]}-->{said(place[1], lines)}<!--/-->"
        except InputError:
            return place[0]

    return MARK.sub(fill, text)


def what_is_wrong(text, lines):
    """A sentence for each place of a page that is not as the results say, or is not marked well."""
    for place in MARK.finditer(text):
        where = f"line {text.count(chr(10), 0, place.start()) + 1}"
        try:
            right = said(place[1], lines)
        except InputError as error:
            yield f"{where}: {error}"
            continue
        if "<!--=" in place[2]:
            yield f"{where}: the mark {place[1]} has no end <!--/--> before the next one"
        elif place[2] != right and "\n" in right:
            yield f"{where}: {place[1]} is not what the results say (--write mends it)"
        elif place[2] != right:
            yield f"{where}: {place[1]} is {place[2]!r}, the results say {right!r} (--write mends it)"
        if "\n" not in right and text[: place.start()].rpartition("\n")[2].strip() == "":
            yield f"{where}: a line must not begin with the mark {place[1]}: GitHub takes it for HTML"
    if text.count("<!--=") > len(MARK.findall(text)):
        yield "at its end: the last mark has no end <!--/-->"


def said(mark, lines):
    """What belongs at a mark. Raises InputError for one that the results cannot fill."""
    if mark in TEXTS:
        text = TEXTS[mark](lines)
        return f"\n\n{text}\n\n" if "\n" in text else text
    name, _, arm = mark.partition("/")
    arm, _, kind = arm.partition("/")
    if name not in FIGURES or kind not in ("", "ratio"):
        raise InputError(f"there is no figure {mark!r}: see FIGURES and TEXTS in benchmarks/report.py")
    line, arm = line_of(FIGURES[name], arm, lines)
    if not kind:
        return human(line["arms"][arm], line["unit"])
    if arm not in line["ratio"]:
        raise InputError(f"benchmarks/results holds no ratio of {FIGURES[name]!r} for {arm!r}")
    return f"{human(line['ratio'][arm], '')}x"


def human(value, unit):
    """Three digits in a unit of their size, or all digits before the point; counts as they are."""
    while unit in LARGER and value >= LARGER[unit][2]:
        unit, value = LARGER[unit][0], value / LARGER[unit][1]
    whole = value >= 100 or (unit == "" and value == int(value))
    number = f"{value:,.0f}".replace(",", " ") if whole else f"{value:#.3g}"
    return f"{number} {unit}".strip()


def demo_table(lines):
    names = ("Rank-1", "Rank-5", "Rank-10", "mAP", "mINP")
    rows = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for task in ("text to image", "random order"):
        line, _ = line_of(f"demo, {task}", names[0], lines)
        rows.append(" | ".join([f"| {task}", *(f"{line['arms'][name]:.2f}" for name in names)]) + " |")
    return "\n".join(rows)


def demo_log(lines):
    line, _ = line_of(FIGURES["demo training"], "ours", lines)
    return "\n".join(["```", *line["log"], "```"])


def demo_validation(lines):
    """Rank-1 on the validation split after each epoch that was evaluated, as words."""
    line, _ = line_of(FIGURES["demo training"], "ours", lines)
    after = [f"{rank_1:.0f} after epoch {epoch}" for epoch, rank_1 in line["validation"]]
    return " and ".join([", ".join(after[:-1]), after[-1]] if after[1:] else after)


TEXTS = {
    "table": lambda lines: table(latest(lines)),
    "demo table": demo_table,
    "demo log": demo_log,
    "demo validation": demo_validation,
}


if __name__ == "__main__":
    raise SystemExit(main())
