"""What only a GPU can tell, in one command of at most nine minutes: does the default path work, and how fast.

python -m benchmarks.gpu                 needs a CUDA GPU, this repository and its requirements (of tests too)
python -m benchmarks.gpu --dry           every part tiny, on the CPU: does it run at all
python -m benchmarks.gpu --estimate      no GPU: the memory that a step needs, counted on a pretended one
python -m benchmarks.gpu --parts step    some parts only (names as it prints them)

Parts run in the order of their worth, each in a process of its own. Each answer and figure is printed and
added to benchmarks/results/gpu.jsonl once it is known, so a run that is cut short loses nothing; a part that
fails, hangs or crashes says so and the next one begins. One that might end too late is left out. The end
lists all answers, a line each. `python -m benchmarks.report` makes a table of the figures.
"""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import evaluate, harness, loader, step
from benchmarks.checks import CHECKS, python, train_drawn
from benchmarks.harness import keep, left_out, new_parser, record, timed
from benchmarks.step import PERSONS, batch_of
from model import build_model
from processor.trainer import Steps, train_one_epoch
from solver import build_optimizer
from solver.restore import load_optimizer
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.device import pick_device
from utils.errors import ready_output

ROOT = Path(__file__).parent.parent


# ---- does it work ----


def demo(device, folder, dry):
    """A training of the demo's size and its test: Rank-1 and seconds."""
    began = time.time()
    run = train_drawn(device, folder, dry, "demo")
    seconds = time.time() - began
    python(["test.py", "--config_file", str(run), "--chance", "--device", device.type])
    found = json.loads((run / "results.json").read_text())
    arms = {task: found[task]["R1"] for task in ("t2i", "chance")}
    record("demo, Rank-1", arms, "%", "chance", "more", device)
    note = "drawing, start-up and evaluation included"
    record("demo, seconds", {"ours": seconds}, "s", device=device, note=note)


def full_size(device, folder, dry):
    """300 steps of the recipe in its precision, from weights made on the spot, through the training loop;
    then 50 more twice, the second time from a checkpoint."""
    steps, more = (40, 2) if dry else (300, 50)
    chosen, model, optimizer = fresh(device, dry)
    losses, unmoved = [], []

    def after_step(number, meters):
        # the sums stay on the device: read at the end only
        losses.append(meters.sums[0].clone())
        if "frac_unmoved" in meters.latest:
            unmoved.append(meters.latest["frac_unmoved"])

    batches = batches_of(device, dry, chosen, steps)
    size = len(batches[0]["pids"])
    train_one_epoch(model, batches, optimizer, device, 1, Steps(log_period=steps // 4, after_step=after_step))
    sums = [0.0, *torch.stack(losses).tolist()]
    each = [(b - a) / size for a, b in zip(sums, sums[1:], strict=False)]
    tenth = steps // 10  # a few times all its batches
    first, last = sum(each[:tenth]) / tenth, sum(each[-tenth:]) / tenth
    note = f"{chosen.precision}, {steps} steps of {size}: mean loss of the first and last {tenth}"
    record("full size, loss", {"first": first, "last": last}, "", "first", device=device, note=note)
    record("full size, weights that a step leaves", {"ours": 100 * unmoved[-1]}, "%", device=device)
    assert all(map(math.isfinite, each)) and last < first, f"losses do not fall: {first} to {last}"

    parts = {"model": model, "optimizer": optimizer}
    save_checkpoint(folder / "full.pth", parts)
    train_one_epoch(model, batches_of(device, dry, chosen, more), optimizer, device, 2)
    unbroken = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    del model, optimizer, parts
    _, model, optimizer = fresh(device, dry)
    state = load_checkpoint(folder / "full.pth")
    load_weights(model, state["model"], "full.pth")
    load_optimizer(optimizer, state["optimizer"], "full.pth")
    train_one_epoch(model, batches_of(device, dry, chosen, more), optimizer, device, 2)
    pairs = [(weight.detach().cpu(), unbroken[name]) for name, weight in model.state_dict().items()]
    differ = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    apart = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    note = f"after {more} steps; the largest difference is {apart:.3g}"
    what = "full size, weights that differ after a resume"
    record(what, {"ours": 100 * differ}, "%", device=device, note=note)


def fresh(device, dry):
    chosen = step.options(device.type, "fp16", dry)
    torch.manual_seed(0)
    model = build_model(chosen, PERSONS)
    return chosen, model, build_optimizer(chosen, model)


def batches_of(device, dry, chosen, steps):
    """A few batches in turn, ids on the host and images on the device, as the loader gives them."""
    size, number = (4, 2) if dry else (32, 10)
    made = [batch_on(batch_of(size, chosen.img_size, seed), device) for seed in range(number)]
    return [made[step % number] for step in range(steps)]


def one_process(device, folder, dry):
    """torchrun with one process (NCCL on a GPU) against none: the same weights after an epoch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    weights = []
    for name, how in (("alone", []), ("group", launcher)):
        run = train_drawn(device, folder, dry, name, ["--num_epoch", "1", "--eval_period", "9"], how)
        weights.append(load_checkpoint(run / "last.pth")["model"])
    apart = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])
    note = "largest difference of a weight after an epoch of the demo"
    record("one process of a group against none", {"ours": apart}, "", device=device, note=note)


def compiled(device, folder, dry):
    """--compile: no graph is made anew for other batches and lengths once there were two."""
    from torch._dynamo.utils import counters

    chosen, model, optimizer = fresh(device, dry)
    before = counters["stats"]["unique_graphs"]  # of an earlier part
    model.compile_encoders(**({"backend": "eager"} if dry else {}))
    sizes = (6, 4) if dry else (32, 17)
    made = []
    for size in (*sizes, *sizes, sizes[0] - 1):
        for seed in range(2):
            batch = batch_on(batch_of(size, chosen.img_size, seed), device)
            train_one_epoch(model, [batch], optimizer, device, 1)
        made.append(counters["stats"]["unique_graphs"])
    arms = {"at the start": made[1] - before, "after": made[-1] - made[1]}
    note = f"batches of {sizes[0]}, {sizes[1]} and {sizes[0] - 1}"
    record("--compile, graphs made anew", arms, "", "", device=device, note=note)


def batch_on(batch, device):
    return {**batch, "images": batch["images"].to(device)}


def answer(name):
    """A part that is one of the CHECKS."""

    def part(device, folder, dry):
        found = CHECKS[name][0](device, folder, dry)
        keep(name, device, verdict="right", note=found)

    return part


# ---- how fast ----


def program(main, words, dry_words):
    """A part that is another benchmark with these words, or with those for --dry."""
    return lambda device, folder, dry: main(dry_words if dry else ["--device", "cuda", *words])


def fed(device, folder, dry):
    """Training with batches from the loader, files and cache, against batches that are there already."""
    from datasets.build import TrainLoader, as_it_is
    from datasets.image_cache import DecodedImages, open_images
    from datasets.image_text import CaptionChanges, Images, PairDataset
    from datasets.sampler import BatchShares, RandomOrder

    chosen, model, optimizer = fresh(device, dry)
    number, size, workers = (16, 4, 0) if dry else (768, 64, 8)
    drawn = loader.draw_files(folder, min(number, 192))
    samples = [drawn[i % len(drawn)] for i in range(number)]
    settings = dict(text_length=77, seed=1, img_aug=True, changes=CaptionChanges(masking=(0.8, 0.1)))
    img_size = tuple(chosen.img_size)
    cache = open_images(folder, [sample.image_path for sample in drawn], img_size, "gpu")

    def seconds_of(batches):
        _, (seconds, _) = timed(train_one_epoch, model, batches, optimizer, device, 1, device=device)
        return seconds

    speed = {}
    for name, source in (("files", DecodedImages(img_size)), ("--image_cache", cache)):
        dataset = PairDataset(samples, Images(source, img_size), **settings)
        batches = TrainLoader(
            dataset,
            batch_sampler=BatchShares(RandomOrder(number, 1), size),
            collate_fn=as_it_is,
            device=device,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type != "cpu",
        )
        for epoch in (1, 2):  # the first one starts the loading processes
            batches.set_epoch(epoch)
            speed[name] = number / seconds_of(batches)
    there = [batch_on(batch_of(size, chosen.img_size, seed), device) for seed in range(number // size)]
    speed["already there"] = number / seconds_of(there)
    note = f"{workers} loading processes, batches of {size}"
    record("training fed by the loader", speed, "samples/s", "already there", "more", device, note=note)


TINY = ["--tiny", "--batch_size", "2", "--repeats", "1"]
EACH = ["--alone", "--compile"]
SPLIT = ["--images", "3074", "--captions", "6156", "--repeats", "2"]  # CUHK-PEDES' test split
PARTS = {  # name: what it does, seconds that it may take on a 24 GB card; in the order of their worth
    "demo": (demo, 60),
    **{name: (answer(name), seconds) for name, (_, seconds) in CHECKS.items()},
    "full size": (full_size, 90),
    "step": (program(step.main, ["--batch_size", "64", *EACH], [*TINY, "--precision", "fp16", *EACH]), 110),
    "evaluation": (program(evaluate.main, SPLIT, [*TINY, "--images", "6", "--captions", "8"]), 60),
    "one process": (one_process, 40),
    "compile": (compiled, 60),
    "step of 128": (program(step.main, ["--batch_size", "128", "--repeats", "3"], TINY), 40),
    "optimiser": (program(step.main, ["--optimizer"], ["--optimizer", *TINY]), 15),
    "fed": (fed, 60),
}


FAILED = 3  # exit status where a part has failed and said so


def run_parts(args, device):
    """Returns the names of the parts that failed."""
    began, failed = time.time(), []
    for name, (part, needed) in PARTS.items():
        if args.parts and name not in args.parts:
            continue
        left = 60 * args.minutes - (time.time() - began)
        if left < needed and not args.dry:
            left_out(name, "ours", f"it may take {needed} s, and {left:.0f} are left", device)
            continue
        if not args.here:
            print(f"== {name}", flush=True)
        if args.here or args.dry or args.debug:
            reason = run_here(part, args, device)
        else:
            words = ["--parts", name, "--here", "--minutes", f"{left / 60 + 0.05:.2f}"]
            reason = guarded([sys.executable, "-m", "benchmarks.gpu", *words], left)
        if reason is not None:
            failed.append(name)
        if reason:
            left_out(name, "ours", reason, device)
    return failed


def run_here(part, args, device):
    """Why the part failed, or None."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            part(device, Path(folder), args.dry)
    except Exception as error:  # whatever it was, the other parts tell something too
        if args.debug:
            raise
        said = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {said[:600]}"
    gc.collect()  # a compiled model is a ring of references
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def guarded(command, seconds):
    """Run a part in a process of its own: after an error of CUDA one is of no more use, and a crash or a wait
    for ever would end all. Returns why it failed, "" where it has said so itself, or None."""
    with tempfile.TemporaryDirectory() as folder:  # for what a part that is killed leaves
        where = {"cwd": ROOT, "env": {**os.environ, "TMPDIR": folder}}
        child = subprocess.Popen(command, start_new_session=True, **where)
        try:
            status = child.wait(seconds)
            return {0: None, FAILED: ""}.get(status, f"its process ended with {status}")
        except subprocess.TimeoutExpired:
            return f"killed after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the programs that it has started too
                child.wait()


def summary(file, start):
    """What has been answered since the file had `start` bytes, a line each."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_bytes()[start:].splitlines()]
    told = [f"right: {line['figure']}: {line['note']}" for line in lines if "verdict" in line]
    told += [f"NOT: {x['figure']}: {next(iter(x['left_out'].values()))}" for x in lines if "left_out" in x]
    return told


# ---- what it would need ----


def estimates(args):
    """The table of --estimate, in Markdown. The published code knows no autocast; its precision is fp16."""
    rows = ["| batch | image | precision | published, GiB | here, GiB |", "|---|---|---|---|---|"]
    for batch_size in args.batch_size:
        for precision in args.precision:
            chosen = step.options("cpu", precision)
            chosen.img_size = args.img_size
            arms = ("ours",) if precision == "bf16" else ("published", "ours")
            found = {arm: f"{step.estimate(arm, chosen, batch_size) / 2**30:.1f}" for arm in arms}
            size = "x".join(map(str, args.img_size))
            cells = batch_size, size, precision, found.get("published", ""), found["ours"]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main(argv=None):
    ready_output()
    parser = new_parser(__doc__, [])
    add = parser.add_argument
    add("--dry", action="store_true", help="every part tiny, on the CPU; nothing is kept")
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--minutes", type=float, default=9.0, help="parts that would end later are left out")
    add("--here", action="store_true", help="in this process: what fails may take the rest with it")
    add("--debug", action="store_true", help="stop at the first part that fails, with its traceback")
    add("--estimate", action="store_true", help="print the memory of a step, sdm+mlm+id, ViT-B/16")
    add("--batch_size", type=int, nargs="+", default=[64, 128], help="for --estimate")
    add("--img_size", type=int, nargs=2, default=[384, 128], help="for --estimate")
    add("--precision", nargs="+", default=["fp16", "bf16", "fp32"], help="for --estimate")
    args = parser.parse_args(argv)
    if args.estimate:
        print(estimates(args))
        return 0
    if not args.dry and not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA GPU here; --dry and --estimate need none", file=sys.stderr)
        return 2
    device = pick_device("cpu" if args.dry else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        if args.dry:
            harness.RESULTS = Path(folder)
        file = harness.results_file()
        start = file.stat().st_size if file.exists() else 0
        failed = run_parts(args, device)
        if not args.here:
            print(*summary(file, start), sep="\n")
    if not args.here:
        print(f"failed: {', '.join(failed)}" if failed else "all parts ran", flush=True)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
