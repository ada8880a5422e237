"""Kill a training again and again at random moments; each time it is resumed, and it must end as one that
nothing interrupted, bit for bit: `python -m tests.kill_many --kills 50`.

Each training is killed some times (--per_run) in turn while it takes steps, while it evaluates, in the middle
of saving and at any moment, then it is left to end. Prints a line for each kill and a summary; exit status 0
when every training ended with the same weights and no checkpoint was ever unreadable.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests import children
from utils.checkpoint import load_checkpoint
from utils.errors import InputError

MOMENTS = ("saving", "step", "evaluation", "any")
DEMO = (  # from random weights
    "--config_file configs/small_clip.yaml --loss_names sdm+mlm+id --cmt_depth 1 --num_epoch 3 "
    "--eval_period 1 --log_period 2 --save_period 4"
).split()


class Kill(NamedTuple):
    moment: str  # what it was meant to hit
    left: str  # names of half-written files that it left: it did hit a save
    unreadable: list  # checkpoints that do not load afterwards


def log_of(logs):
    """What the newest run in this folder has logged."""
    found = sorted(Path(logs).glob("*/*/train_log.txt"))
    return found[-1].read_text() if found else ""


def half_written(logs):
    return [path.name for path in Path(logs).glob("*/*/.*.pth.[0-9]*")]


def halt_in_a_save(process, logs, pause):
    """Halt it so many seconds after it has begun to save; where that was too late, sooner in a later save."""
    while children.wait_for(lambda: half_written(logs), process):
        time.sleep(pause)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
            if half_written(logs):
                return
            os.kill(process.pid, signal.SIGCONT)
        pause /= 2


def kill_once(argv, logs, output, moment, rng, seconds):
    """Start a training and kill it; returns a Kill, or None where it had ended before.

    seconds: how long a training takes, for the moment "any".
    """
    known = len(log_of(logs))
    process = children.start(argv, output)

    def says(text):
        return lambda: text in log_of(logs)[known:]

    if moment == "any":
        process.join(rng.uniform(0, 0.7 * seconds))
    elif children.wait_for(says("start training"), process):
        if moment == "saving":
            # the first file or a later one, at a random byte of it
            for _ in range(rng.randint(1, 3)):
                children.wait_for(lambda: not half_written(logs), process)
                children.wait_for(lambda: half_written(logs), process)
            halt_in_a_save(process, logs, rng.uniform(0, 0.03))
        elif moment == "evaluation":
            children.wait_for(says("Validation Results"), process)
            time.sleep(rng.uniform(0, 0.02))
        else:
            children.wait_for(says(f"Iteration[{rng.choice((2, 4, 6))}"), process)
            time.sleep(rng.uniform(0, 0.3))
    if not children.kill(process):
        return None
    unreadable = []
    for path in Path(logs).glob("*/*/*.pth"):
        try:
            load_checkpoint(path)
        except InputError as error:
            unreadable.append(str(error))
    return Kill(moment, " ".join(sorted(half_written(logs))), unreadable)


def kill_and_end(begin, logs, moments, rng, seconds):
    """Kill a training at these moments, then let it end; returns the Kills and its run folder.

    begin: the words that start it anew, where nothing was saved yet.
    """
    kills, output = [], Path(logs) / "output"
    output.parent.mkdir(parents=True, exist_ok=True)

    def argv():
        saved = sorted(Path(logs).glob("*/*/last.pth"))
        return ["--resume", "--resume_ckpt_file", saved[-1].parent] if saved else begin

    for moment in moments:
        kill = kill_once(argv(), logs, output, moment, rng, seconds)
        kills += [kill] if kill else []
    status = children.run(argv(), output, seconds=3600)
    if status:
        raise RuntimeError(f"the training ended with status {status}; {output} holds what it said")
    return kills, sorted(Path(logs).glob("*/*/last.pth"))[-1].parent


def kill_many(begin_of, folder, number, per_run, seed=0, report=print):
    """(kills, unreadable checkpoints, places where a resumed run differs from the unbroken one).

    begin_of(logs): the words that start a training in this folder.
    """
    rng = random.Random(seed)
    (folder / "unbroken").mkdir(parents=True)
    children.run(["--resume", "--output_dir", folder], folder / "first")  # the server's start takes seconds
    began = time.monotonic()
    if children.run(begin_of(folder / "unbroken"), folder / "unbroken" / "output", seconds=3600):
        raise RuntimeError((folder / "unbroken" / "output").read_text()[-2000:])
    seconds, whole = time.monotonic() - began, children.only_run(folder / "unbroken")
    kills, differing, trainings = [], [], 0
    while len(kills) < number:
        trainings += 1
        moments = [MOMENTS[(len(kills) + i) % len(MOMENTS)] for i in range(min(per_run, number - len(kills)))]
        logs = folder / f"killed_{trainings}"
        done, run = kill_and_end(begin_of(logs), logs, moments, rng, seconds)
        differ = [name for name in ("last.pth", "best.pth") if children.differ(run / name, whole / name)]
        differing += [f"training {trainings}: {name}" for name in differ]
        if len(list(run.parent.iterdir())) == 1 and half_written(logs):
            differing.append(f"training {trainings}: left {half_written(logs)}")
        kills += done
        for kill in done:
            report(f"killed in {kill.moment:10} {kill.left or '-':24} unreadable: {len(kill.unreadable)}")
        report(f"training {trainings}: {len(done)} kills, {'differs' if differ else 'the same weights'}")
        shutil.rmtree(logs)
    return kills, [text for kill in kills for text in kill.unreadable], differing


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.kill_many", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per_run", type=int, default=5, help="kills of a training before it may end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ids", type=int, default=100, help="persons of the drawn training set")
    parser.add_argument("--tiny", action="store_true", help="the tests' model, not the demo's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = children.draw(folder, 12 if args.tiny else args.ids, None if not args.tiny else (64, 32))

        def begin_of(logs):
            if args.tiny:
                return children.words(data, logs)
            return [*DEMO, "--root_dir", data, "--output_dir", logs]

        kills, unreadable, differing = kill_many(begin_of, folder, args.kills, args.per_run, args.seed)
    hit = sum(bool(kill.left) for kill in kills)
    print(
        f"{len(kills)} kills, {hit} of them in the middle of a save; {len(unreadable)} unreadable checkpoints"
    )
    print("\n".join(["every training ended with the same weights"] if not differing else differing))
    return 1 if unreadable or differing else 0


if __name__ == "__main__":
    sys.exit(main())
