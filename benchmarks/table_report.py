"""The result table as Markdown, JSON and a picture: statistics over seeds beside the published figures."""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from utils.data_sets import DATA_SETS
from utils.errors import InputError, printable
from utils.files import make_folder, write_whole

FIGURES = {"R1": "Rank-1", "R5": "Rank-5", "R10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}
TASKS = {"t2i": "text to image", "i2t": "image to text"}
COUNTED = ("epoch", "queries", "gallery")
SPLITS = ("train", "test", "val")
SELECTIONS = {  # heading: whose best.pth was selected on what, and which of its checkpoints
    "best epoch": ("test", "best"),
    "last epoch": ("test", "last"),
    "validation-selected": ("val", "best"),
}
VERSION = 1  # of the results file
KEYS = {  # of a run in it, and of what type
    **{"row": str, "dataset": str, "seed": int, "selected_on": str, "options": dict, "best": dict},
    **{"last": dict, "cross": dict, "data": (dict, type(None)), "machine": str, "versions": dict},
}


# ---- results files ----


def results_file(runs):
    """A line for each run, so that a comparison of two files shows which runs differ."""
    head = json.dumps({"results of": "benchmarks.table", "version": VERSION})[:-1]
    return f'{head}, "runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]}\n"


def read_results(path):
    """The runs of a results file, checked: it may come from others."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a results file of benchmarks.table: {error}") from None
    if not isinstance(found, dict) or found.get("results of") != "benchmarks.table":
        raise InputError(f"{path} is not a results file of benchmarks.table (table.json in its --output_dir)")
    if found.get("version") != VERSION or not isinstance(found.get("runs"), list):
        raise InputError(f"{path} is of version {found.get('version')}; this program reads {VERSION}")
    for number, run in enumerate(found["runs"]):
        if wrong := what_is_wrong(run):
            raise InputError(f"{path}, run {number} (from 0): {wrong} is missing or damaged")
    return found["runs"]


def what_is_wrong(run):
    """The part of a run in a results file that is not as it should be; None if all is well."""
    if not isinstance(run, dict):
        return "the record"
    for key, kind in KEYS.items():
        if not isinstance(run.get(key), kind):
            return key
    for key, found in (("best", run["best"]), ("last", run["last"]), *run["cross"].items()):
        if not are_figures(found):
            return f"figures ({key})"
    data = run["data"] or {"sha256": "", **dict.fromkeys(SPLITS, [0, 0, 0])}
    good = isinstance(data.get("sha256"), str) and all(is_list_of_counts(data.get(name)) for name in SPLITS)
    return None if good else "data"


def are_figures(found):
    """Whether it has all figures of text to image and image to text, as numbers."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int) for key in COUNTED):
        return False
    tasks = [found.get(task) for task in TASKS]
    return all(
        isinstance(task, dict) and isinstance(task.get(name), (int, float)) and math.isfinite(task[name])
        for task in tasks
        for name in FIGURES
    )


def is_list_of_counts(found):
    return isinstance(found, list) and len(found) == 3 and all(isinstance(number, int) for number in found)


def key_of(run):
    return run["row"], run["dataset"], run["seed"], run["selected_on"]


# ---- statistics ----


def values_of(runs, selection, task, figure):
    selected_on, which = SELECTIONS[selection]
    return [run[which][task][figure] for run in runs if run["selected_on"] == selected_on]


def mean_and_deviation(values):
    """(mean, standard deviation of the sample), None where there are too few for it."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def shown_mean(values):
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "–"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def shown_difference(values, published):
    """Mean minus published, and that in standard errors of the mean."""
    mean, deviation = mean_and_deviation(values)
    if mean is None or published is None:
        return "–"
    difference = mean - published
    in_errors = f" ({difference * math.sqrt(len(values)) / deviation:+.1f} s.e.)" if deviation else ""
    return f"{difference:+.2f}{in_errors}"


# ---- what belongs together ----


def shown(options):
    return ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in options.items())


def notes(runs):
    """{what of a run's options is not its row's: the number that stands for it in labels}."""
    found = sorted({printable(shown(run["options"])) for run in runs if run["options"]})
    return {text: number for number, text in enumerate(found, start=1)}


def label_of(row, note):
    return printable(row) + (f" [{note}]" if note else "")


def section_of(run):
    """What is compared with one another: the same data set with the same annotation file."""
    return printable(run["dataset"]), run["data"] and printable(run["data"]["sha256"][:12])


def sections(runs, rows, pairs=()):
    """{(data set, beginning of the annotation file's hash): {(row, number of its note): its runs}}, in the
    order of the rows; pairs: (row, data set), to be shown even where there is no run of theirs."""
    found, numbers = {}, notes(runs)
    for run in sorted(runs, key=key_of):
        kind = run["row"], numbers.get(printable(shown(run["options"])))
        found.setdefault(section_of(run), {}).setdefault(kind, []).append(run)
    for row, dataset in pairs:
        of_set = next((section for section in found if section[0] == dataset), (dataset, None))
        groups = found.setdefault(of_set, {})
        if row not in (name for name, _ in groups):
            groups[row, None] = []
    order = {name: place for place, name in enumerate(rows)}

    def by_row(item):
        (row, _), _ = item
        return order.get(row, len(order))

    return {section: dict(sorted(groups.items(), key=by_row)) for section, groups in found.items()}


def published_of(row, dataset, rows):
    """The published figures, text to image, of a row of the table; all None where there are none."""
    row = rows.get(row)
    there = row and row.published and dataset in DATA_SETS
    figures = row.published[list(DATA_SETS).index(dataset)] if there else [None] * len(FIGURES)
    return dict(zip(FIGURES, figures, strict=True))


# ---- Markdown ----


def markdown(runs, rows, pairs):
    parts, found = ["# Result tables"], sections(runs, rows, pairs)
    for (dataset, sha256), groups in found.items():
        several = sum(name == dataset for name, _ in found) > 1
        parts.append(f"## {dataset}" + (f", annotation file {sha256 or 'unknown'}" if several else ""))
        measured = [run for group in groups.values() for run in group]
        parts += [about_data(dataset, measured), *(table(dataset, groups, rows, name) for name in FIGURES)]
        parts += [about_sources(dataset, groups, rows), about_machines(measured)]
    if any(run["cross"] for run in runs):
        parts += ["## Trained on one data set, tested on another", cross_table(runs)]
    parts.append("\n".join(f"- [{number}]: with {text}" for text, number in notes(runs).items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(dataset, groups, rows, figure):
    """One figure of one data set: published, measured, and how far apart they are."""
    measured = [run for group in groups.values() for run in group]
    columns = [
        name for name in SELECTIONS if values_of(measured, name, "t2i", figure) or name == "best epoch"
    ]
    heads = [f"{dataset}, {FIGURES[figure]}", "published", *columns, "best epoch − published"]
    lines = []
    for (row, note), group in groups.items():
        published = published_of(row, dataset, rows)[figure]
        best = values_of(group, "best epoch", "t2i", figure)
        cells = [label_of(row, note), "–" if published is None else f"{published:.2f}"]
        cells += [shown_mean(values_of(group, name, "t2i", figure)) for name in columns]
        cells += [shown_difference(best, None if about_data(dataset, measured) else published)]
        lines.append([*cells, shown_mean(values_of(group, "best epoch", "i2t", figure)), str(len(best))])
    return as_markdown([*heads, "image to text, best epoch", "runs"], lines)


def as_markdown(heads, lines):
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def about_data(dataset, runs):
    """A warning where the published figures are of another set than the runs."""
    data, row = next((run["data"] for run in runs if run["data"]), None), DATA_SETS.get(dataset)
    if not data or not row or all(tuple(data[split]) == row.published[split] for split in SPLITS):
        return ""
    counts = "; ".join(f"{split} {data[split]}, published {list(row.published[split])}" for split in SPLITS)
    return f"**Not the data of the published figures**: persons, images, captions are {counts}."


def about_sources(dataset, groups, rows):
    sources = {}
    for row, note in groups:
        if published_of(row, dataset, rows)["R1"] is not None:
            sources.setdefault(rows[row].source, []).append(label_of(row, note))
    of = "; ".join(f"{', '.join(labels)}: {source}" for source, labels in sources.items())
    explained = "Mean ± standard deviation over seeds; s.e.: standard error of the mean."
    return (
        f"{explained} Published, text to image, best epoch on the test split: {of or 'none of these rows'}."
    )


def about_machines(runs):
    """Where the runs were seen finished, and with which versions."""
    places = Counter(
        "; ".join([run["machine"], ", ".join(f"{name} {n}" for name, n in run["versions"].items())])
        for run in runs
    )
    return "\n".join(
        f"- {number} run{'s' * (number > 1)}: {printable(place)}" for place, number in places.items()
    )


def cross_table(runs):
    """Text to image / image to text of best.pth, selected on the data set that it was trained on."""
    groups, numbers = {}, notes(runs)
    for run in sorted(runs, key=key_of):
        for tested, found in {run["dataset"]: run["best"], **run["cross"]}.items():
            if run["cross"] and run["selected_on"] == "test":
                size = f"{tested} ({found['queries']} sentences, {found['gallery']} images)"
                label = label_of(run["row"], numbers.get(printable(shown(run["options"]))))
                key = (label, run["dataset"], size, section_of(run))
                groups.setdefault(key, []).append(found)
    heads = ["text to image / image to text", "trained on", "tested on", *FIGURES.values(), "runs"]
    lines = []
    for names, found in groups.items():
        cells = (
            " / ".join(shown_mean([of_run[task][figure] for of_run in found]) for task in TASKS)
            for figure in FIGURES
        )
        lines.append([*map(printable, names[:3]), *cells, str(len(found))])
    return as_markdown(heads, lines)


# ---- the picture ----

LINE = {"color": "crimson", "linewidth": 1.5, "linestyle": "--"}  # of a published figure


def draw(runs, rows, pairs, path, figure="R1"):
    """Bars of the means, with the standard deviation; the published figure is a line across them."""
    from retrieval.curves import drawing, on_a_line

    found = sections(runs, rows, pairs)
    colours = {name: f"C{n}" for n, name in enumerate(SELECTIONS) if values_of(runs, name, "t2i", figure)}
    most = max(map(len, found.values()))
    with drawing(path, min(3 + 1.1 * most, 40), 3.6 * len(found)) as picture:
        for number, ((dataset, sha256), groups) in enumerate(found.items(), start=1):
            axes = picture.add_subplot(len(found), 1, number)
            for place, ((row, _), group) in enumerate(groups.items()):
                draw_bars(axes, place, group, colours, figure)
                published = published_of(row, dataset, rows)[figure]
                if published is not None:
                    axes.hlines(published, place - 0.45, place + 0.45, **LINE)
            axes.set_title(f"{dataset}{f', annotation file {sha256}' if sha256 else ''}", fontsize=10)
            axes.set_ylabel(f"{FIGURES[figure]}, text to image, %")
            axes.set_xticks(range(len(groups)), [on_a_line(label_of(*kind), 34) for kind in groups])
            axes.tick_params(axis="x", labelsize=8, rotation=20 if most > 4 else 0)
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
        handles = [axes.bar(0, 0, 0, color=colour, alpha=0.8) for colour in colours.values()]
        handles.append(axes.hlines([], 0, 0, **LINE))
        picture.legend(handles, [*colours, "published"], loc="outside lower center", ncols=4, fontsize=8)


def draw_bars(axes, place, group, colours, figure):
    """A bar for each way to select, side by side around the place, with its mean written in it."""
    wide = 0.8 / max(len(colours), 1)
    for number, (name, colour) in enumerate(colours.items()):
        mean, deviation = mean_and_deviation(values_of(group, name, "t2i", figure))
        if mean is not None:
            x = place - 0.4 + wide * (number + 0.5)
            axes.bar(x, mean, 0.92 * wide, yerr=deviation, capsize=3, color=colour, alpha=0.8)
            axes.text(x, mean / 2, f"{mean:.1f}", ha="center", va="center", fontsize=7)


def write(runs, rows, folder, name, pairs=()):
    """Print the table, and keep NAME.md, NAME.json and NAME.png in the folder."""
    runs = list({json.dumps(run, sort_keys=True): run for run in runs}.values())  # of several files, once
    folder = Path(folder)
    if not runs and not pairs:
        raise InputError("there is no run in these results files")
    make_folder(folder, "--output_dir")
    text = markdown(runs, rows, pairs)
    write_whole(folder / f"{name}.json", results_file(runs))
    write_whole(folder / f"{name}.md", text)
    print(text)
    print(f"kept in {folder}: {name}.md, {name}.json")
    try:
        draw(runs, rows, pairs, folder / f"{name}.png")
        print(f"drawn: {folder / name}.png")
    except InputError as error:  # the figures are kept already
        print(f"no picture: {error}")
