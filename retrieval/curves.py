"""Curves: CMC of a run, and what the event files of one or several runs hold. Needs matplotlib."""

import io
import warnings
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError, printable
from utils.extras import extra
from utils.files import write_whole
from utils.losses import REPORTED

FIGURES = tuple(f"{task}/{name}" for task in ("t2i", "i2t") for name in ("R1", "R5", "R10", "mAP", "mINP"))
ORDER = (*REPORTED, *FIGURES, "lr", "temperature")  # tags as train.py writes them; others come after


@contextmanager
def drawing(path, width, height):
    """A figure that never opens a window, written to path at the end. Its words are words, `$` and `_` too,
    neither mathematics nor LaTeX; letters that the font lacks are boxes."""
    with extra("matplotlib").rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
        yield figure
        data = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph ")  # is missing from the font
                figure.savefig(data, dpi=120, format="png")
        except ValueError as error:  # larger than a picture may be
            raise InputError(f"cannot draw {path}: {error}") from None
    write_whole(path, data.getvalue())


def on_a_line(text, most):
    """The text as it can be drawn, in at most so many letters: both ends of a longer one."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def draw_cmc(curves, title, path):
    """curves: {label: values in %, of rank 1, 2, …}."""
    with drawing(path, 6, 4.2) as figure:
        axes = figure.add_subplot()
        for label, values in curves.items():
            ranks = range(1, len(values) + 1)
            axes.plot(ranks, values, marker="o", markersize=3, label=f"{label}, R1 {values[0]:.1f} %")
        axes.set(xlabel="rank", ylabel="queries with a match by then, %", ylim=(0, 102))
        axes.set_title(on_a_line(title, 60))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")


def read_scalars(run):
    """{tag: (epochs, values)} of a run folder's event files. run: a Path."""
    if not run.is_dir():
        raise InputError(f"no run folder at {run}")
    if not list(run.glob("events.out.tfevents.*")):
        raise InputError(f"{run} holds no event files (events.out.tfevents.…): is it the folder of a run?")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        found[tag] = ([point.step for point in points], [point.value for point in points])
    if not found:
        raise InputError(f"the event files in {run} hold no curve yet: no epoch has ended")
    return found


def draw_curves(runs, path):
    """Every curve that one of the run folders has, a panel each, a line a run. Returns the tags drawn."""
    scalars = {label: read_scalars(run) for label, run in labelled(runs).items()}
    tags = {tag for curves in scalars.values() for tag in curves}
    tags = [tag for tag in ORDER if tag in tags] + sorted(tags - set(ORDER))
    columns = min(4, len(tags))
    rows = -(-len(tags) // columns)
    with drawing(path, 3.4 * columns, 2.5 * rows + 0.4) as figure:
        lines = {}
        for number, tag in enumerate(tags, start=1):
            axes = figure.add_subplot(rows, columns, number)
            for colour, (label, curves) in enumerate(scalars.items()):
                if tag in curves:
                    (lines[label],) = axes.plot(*curves[tag], marker=".", markersize=4, color=f"C{colour}")
            axes.set_title(on_a_line(tag, 36), fontsize=10)
            axes.set_xlabel("epoch", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        draw_legend(figure, {label: lines[label] for label in scalars}, room=36 * columns)
    return tags


def draw_legend(figure, lines, room):
    """Below the panels, a name each line. lines: {name: line}. room: letters that go side by side."""
    names = [on_a_line(name, room) for name in lines]
    across = max(1, min(3, len(names), room // (max(map(len, names)) + 6)))
    # matplotlib leaves out what is called _something, unless it is told afterwards
    legend = figure.legend(
        lines.values(), map(str, range(len(names))), loc="outside lower center", ncols=across
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def labelled(runs):
    """{label: folder}: a run's folder name, or the whole path where two have one name."""
    runs = [Path(run).parent if Path(run).is_file() else Path(run) for run in runs]
    names = [run.resolve().name for run in runs]
    return {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs, strict=True)}
