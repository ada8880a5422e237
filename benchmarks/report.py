"""A Markdown table of the latest figures in benchmarks/results: `python -m benchmarks.report`."""

import json
import sys

from benchmarks.harness import RESULTS


def read(folder=RESULTS):
    """The latest line of each figure on each machine, in the order in which they first came."""
    latest = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            latest[line["figure"], line["machine"].split(", load")[0]] = line
    return list(latest.values())


def table(lines):
    rows = ["| figure | published | ours | ratio | command |", "|---|---|---|---|---|"]
    for line in lines:
        unit, arms = line["unit"], line["arms"]
        baseline = shown(arms["published"], unit) if "published" in arms else ""
        for name, value in arms.items():
            if name != "published":
                what = line["figure"] + ("" if name == "ours" else f": {name}")
                ratio = f"{line['ratio'][name]:.3g}x" if name in line["ratio"] else ""
                cells = what, baseline, shown(value, unit), ratio, f"`{line['command']}`"
                rows.append(f"| {' | '.join(cells)} |")
    for line in lines[-1:]:
        rows += ["", ", ".join(f"{name} {number}" for name, number in line["versions"].items())]
    machines = dict.fromkeys(line["machine"].split(", load")[0] for line in lines)
    return "\n".join([*rows, *(f"Machine: {machine}" for machine in machines)])


def shown(value, unit):
    return f"{value:,.4g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


if __name__ == "__main__":
    sys.stdout.write(table(read()) + "\n")
