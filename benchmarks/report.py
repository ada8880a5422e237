"""A Markdown table of the latest figures in benchmarks/results: `python -m benchmarks.report`."""

import json

from benchmarks.harness import RESULTS
from utils.errors import ready_output


def read(folder=RESULTS):
    """The latest line of each figure on each machine, in the order in which they first came."""
    latest = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            latest[line["figure"], line["machine"].split(", load")[0]] = line
    return list(latest.values())


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


if __name__ == "__main__":
    ready_output()
    print(table(read()))
