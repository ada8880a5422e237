"""The demo's figures, of a run that `./run_irra.sh demo` left: test.py's table, and how the training went.

python -m benchmarks.demo --config_file demo/logs/CUHK-PEDES/20261125_101500_demo
"""

import json
import re
from datetime import datetime
from pathlib import Path

from benchmarks.harness import new_parser, record
from benchmarks.table_report import FIGURES
from utils.errors import InputError, reports_errors

TASKS = {"t2i": "text to image", "chance": "random order"}
EPOCH = re.compile(r" (Epoch\[(\d+)\] Iteration\[(\d+)/\3\], .*)")  # its last line
TEST_SPLIT = re.compile(r"\| +test +\| +(\d+) +\| +(\d+) +\| +(\d+) +\|")  # of the table of the data set
TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ", re.MULTILINE)
VALIDATION = re.compile(r"Validation Results - Epoch: (\d+).*?\| t2i +\| +([\d.]+)", re.DOTALL)


@reports_errors
def main(argv=None):
    parser = new_parser(__doc__, [])
    parser.add_argument("--config_file", required=True, help="the run's folder")
    run = Path(parser.parse_args(argv).config_file)
    run = run.parent if run.suffix == ".yaml" else run
    found, log = json.loads(read(run / "results.json")), read(run / "train_log.txt")
    epochs, times = EPOCH.findall(log), TIME.findall(log)
    if "chance" not in found:
        words = f"python test.py --config_file {run} --chance"
        raise InputError(f"{run / 'results.json'} has no row for random order: {words}")
    if not epochs:
        raise InputError(f"{run / 'train_log.txt'} holds no whole epoch: is it a run of the demo?")
    for task, name in TASKS.items():
        record(f"demo, {name}", {shown: found[task][key] for key, shown in FIGURES.items()}, "%")
    counts = map(int, TEST_SPLIT.search(log).groups())
    record("demo, test split", dict(zip(("persons", "images", "sentences"), counts, strict=True)), "")
    first, last = (datetime.fromisoformat(text) for text in (times[0], times[-1]))
    arms = {"ours": (last - first).total_seconds()}
    few = [epochs[0], epochs[(len(epochs) - 1) // 2], epochs[-1]]
    lines = list(dict.fromkeys(line for line, *_ in few))
    validation = [(int(epoch), float(rank_1)) for epoch, rank_1 in VALIDATION.findall(log)]
    record("demo, training", arms, "s", log=lines, validation=validation)


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be read ({reason}): ./run_irra.sh demo makes such a run") from None


if __name__ == "__main__":
    raise SystemExit(main())
