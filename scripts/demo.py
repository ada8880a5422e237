"""The demo of run_irra.sh: draw two sets, train a small CLIP on one and IRRA on the other, test it, paint.

    python -m scripts.demo [FLAGS FOR train.py]

Every step is made of commands that could be typed; where one fails, the demo ends with its exit code. It is
started in the repository's folder and writes in demo/ there.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from utils.errors import reports_errors
from utils.options import get_args
from utils.run_folders import newest_run

DATA, PAIRS, PICTURE = "demo/data", "demo/pairs", "demo/retrieval.png"
CLIP, CLIP_RUNS, CLIP_RECIPE = Path("demo/small_clip.pth"), "demo/clip", "configs/small_clip.yaml"
SURROUNDINGS = {
    # threads that wait asleep: where cores are shared, waiting awake takes four times as long
    "OMP_WAIT_POLICY": "PASSIVE",
    # memory that stays with the process: the scores of 49408 words are made anew each step, and were
    # otherwise asked of Linux page by page each time
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}


@reports_errors
def main(argv):
    flags = ["--config_file", "configs/demo.yaml", "--root_dir", DATA, "--output_dir", "demo/logs", *argv]
    args = get_args(flags)  # what is mistyped ends it here, before anything is drawn
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGINT, lambda *_: None)  # the running command gets it too and says what it saved
    took, begin = [], time.monotonic()
    with step("1/4 Drawing pedestrians and writing sentences about them: seconds", took):
        sizes = "--ids 400 --val_ids 20 --test_ids 100 --images_per_id 4"
        python(f"-m datasets.synthetic --format CUHK-PEDES {sizes} --root {DATA}")
    if CLIP.exists() and CLIP.stat().st_mtime > Path(CLIP_RECIPE).stat().st_mtime:
        print(f"\n== 2/4 The small CLIP is there from an earlier demo: {CLIP}", flush=True)
    else:
        with step(
            "2/4 Drawing 3200 others, and training a small CLIP on them: minutes on two CPU cores", took
        ):
            train_small_clip()
    with step("3/4 Training IRRA from that CLIP, with the losses sdm+mlm+id: a minute", took):
        python("train.py", *flags)
    run = newest_run(args).parent
    with step("4/4 Looking for persons it has never seen: seconds", took):
        python(f"test.py --chance --picture {PICTURE} --config_file", run)
    call = shlex.quote(sys.executable.removeprefix(f"{Path.cwd()}/"))
    config = f"--config_file {shlex.quote(str(run))}"
    print(f"""
The table is above, and in {run}/test_log.txt
The picture: {PICTURE}
The run:     {run}
The time:    {time.monotonic() - begin:.0f} s; {", ".join(took)}

Next, after {call} -m pip install -r requirements-demo.txt: search, look, open a page.
  {call} search.py {config} --gallery {DATA} --query "a woman in a red coat" --save demo/search.png
  {call} visualize.py {config} --worst 5
  {call} demo.py {config} --gallery {DATA}""")


def train_small_clip():
    """In the place that OpenAI's CLIP has for photographs."""
    python(f"-m datasets.synthetic --ids 3200 --val_ids 0 --test_ids 100 --images_per_id 1 --root {PAIRS}")
    flags = ["--config_file", CLIP_RECIPE, "--root_dir", PAIRS, "--output_dir", CLIP_RUNS]
    python("train.py", *flags)
    newest_run(get_args(flags)).replace(CLIP)


@contextmanager
def step(title, took):
    print(f"\n== {title}", flush=True)
    begin = time.monotonic()
    yield
    seconds = f"{time.monotonic() - begin:.0f} s"
    print(f"== done in {seconds}", flush=True)
    took.append(f"{title.split(':')[0]} {seconds}")


def python(line, *words):
    """Run a command by this Python."""
    command = [sys.executable, *line.split(), *map(str, words)]
    status = subprocess.run(command).returncode
    if status:
        said = f"The demo stopped at this step, exit code {status} (its own message is above)"
        print(f"\n{said}: {shlex.join(command)}", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)  # as a shell says which signal ended it


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
