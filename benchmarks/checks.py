"""What only a GPU can tell, as questions with an answer each: does it compute what a CPU does? Parts of
`python -m benchmarks.gpu`.

A check takes (device, folder, dry), returns what it found in words, and raises where something is wrong. They
lean on the tests' helpers and on the figures in tests/reference, so they need requirements-dev.txt.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from processor.evaluator import encode
from processor.trainer import FiniteWatch, Steps, train_one_epoch
from solver import WeightAverage
from utils.metrics import rank_features

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FROM_RANDOM = "--config_file configs/small_clip.yaml --loss_names itc+mlm+id --cmt_depth 1".split()
FEW = "--ids 24 --val_ids 4 --test_ids 8".split()
MANY = "--ids 400 --val_ids 20 --test_ids 100".split()
TINY_DEMO = ["--num_epoch", "1", "--batch_size", "16", "--eval_period", "1"]
PRECISIONS = ("fp32", "fp16", "bf16")
SLACK = {"fp32": 2e-3, "fp16": 0.05, "bf16": 0.1}  # relative, of losses after a few steps of a tiny model


# ---- programs ----


def train_drawn(device, folder, dry, name, words=(), launcher=()):
    """Train the demo's model on the demo's data, from random weights; returns the run's folder. launcher:
    what Python is given before train.py."""
    python(["-m", "datasets.synthetic", "--root", str(folder / "data"), *(FEW if dry else MANY)])
    words = [*FROM_RANDOM, "--root_dir", str(folder / "data"), "--name", name, *words]
    words += ["--output_dir", str(folder / "logs"), "--device", device.type]
    python([*launcher, "train.py", *words, *(TINY_DEMO if dry else [])])
    (run,) = (folder / "logs").glob(f"*/*_{name}")
    return run


def python(words):
    """Run a program of this repository; what it says is returned, or where it fails in the error."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise RuntimeError(f"{' '.join(words[:4])} … ended with {done.returncode}: {said[-1]}")
    return done.stdout


def ended(words, seconds=120):
    """(exit status, sentences or else last words) of a program."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    lines = done.stderr.strip().splitlines()
    return done.returncode, [line for line in lines if line.startswith("error: ")] or lines[-1:]


# ---- the checks ----


def published_fp16(device, folder, dry):
    """The figures of the published code in fp16: Adam alone, and 120 steps in two regimes."""
    from tests import test_fp16 as published

    cases = {case: published.ALONE["cases"][case]["tolerance"] for case in published.CASES}
    found = {
        f"Adam alone {case}, {figure}": off / tolerance[figure]
        for case, tolerance in ({1: cases[1]} if dry else cases).items()
        for figure, off in published.off_published(case, device=device).items()
    }
    for regime in "" if dry else "ab":
        tolerance = published.TRAJECTORY[regime]["tolerance"]
        for figure, off in published.differences(regime, device=device).items():
            found[f"120 steps {regime}, {figure}"] = off / tolerance[figure]
    worst = sorted(found, key=found.get, reverse=True)
    shown = ", ".join(f"{name} {found[name]:.2f}" for name in worst[:3])
    beyond = sum(share > 1 for share in found.values())
    assert not beyond, f"{beyond} of {len(found)} figures beyond their tolerance, in shares of it: {shown}"
    return f"{len(found)} figures within their tolerances, in shares of them at most: {shown}"


def losses(device, folder, dry):
    """Every loss and head in every precision, against the CPU's."""
    from tests.recipe import COMBINATIONS, PUBLISHED
    from tests.test_pretended import train

    torch.backends.cudnn.allow_tf32 = False  # else a GPU's fp32 convolution is another one
    worst, wrong = dict.fromkeys(PRECISIONS, 0.0), []
    rows = COMBINATIONS[COMBINATIONS.index("+".join(PUBLISHED)) :]  # these together, and then the others
    rows = [*rows, "tal --token_selection --tse_norm train"]
    for typed in rows[:2] if dry else rows:
        names, *more = typed.split()
        for precision in PRECISIONS:
            try:
                here, _, _ = train(CPU, precision, names, more)
                there, weights, _ = train(device, precision, names, more)
            except Exception as error:  # one row tells nothing of the next
                wrong.append(f"{typed} in {precision}: {type(error).__name__}: {str(error)[:120]}")
                continue
            if not all(weight.isfinite().all() for weight in weights):
                wrong.append(f"{typed} in {precision}: weights are no longer numbers")
            off = max(abs(there[n] / v - 1) if v else abs(there[n]) for n, v in here.items() if "loss" in n)
            worst[precision] = max(worst[precision], off)
            if not off < SLACK[precision]:
                wrong.append(f"{typed} in {precision}: losses off by {off:.2g}")
    assert not wrong, f"{len(wrong)} of {3 * len(rows)}: {'; '.join(wrong[:6])}"
    return "largest difference of a loss: " + ", ".join(f"{p} {off:.2g}" for p, off in worst.items())


def waits(device, folder, dry):
    """Between two log lines the host never waits: PyTorch's own alarm is on from the second step."""
    from tests.test_pretended import Loader, build

    def alarm(mode):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    for precision in PRECISIONS:
        for names, *more in (["sdm+id+mlm"], ["sdm+id+mlm+tal", "--token_selection"], ["nitc+efa+asdm"]):
            model, optimizer = build(device, precision, names, *more)
            how = Steps(
                before_step=lambda step: alarm("error" if step > 1 else "default"),
                after_step=lambda step, meters: alarm("default") if step == 4 else None,
            )
            try:
                train_one_epoch(model, Loader(device, 4), optimizer, device, 1, how)
            except RuntimeError as error:
                raise AssertionError(f"{names} in {precision}: {str(error)[:200]}") from error
            finally:
                alarm("default")
    return "none seen"


def bad_step(device, folder, dry):
    """A step with a gradient that is no number is left out on the device, and its batch is named."""
    from tests.test_pretended import take_a_bad_step

    for precision in PRECISIONS:
        take_a_bad_step(device, precision)
    return "left out and named in every precision"


def average(device, folder, dry):
    """--ema: the average that double precision gives, and weights that come back to the bit."""
    from tests.test_pretended import Loader, build

    apart = 0.0
    for precision in PRECISIONS:
        model, optimizer = build(device, precision)
        ema, watch = WeightAverage(model, 0.9), FiniteWatch(model, optimizer, 1, 100)
        exact = {name: weight.double() for name, weight in ema.weights.items()}

        def after_step(step, meters, ema=ema, watch=watch, exact=exact):
            ema.update(watch.left_out)
            for name, weight in ema.weights.items():
                exact[name] = 0.9 * exact[name] + 0.1 * weight.double()

        train_one_epoch(
            model, Loader(device, 3), optimizer, device, 1, Steps(watch=watch, after_step=after_step)
        )
        apart = max(apart, *(float((ema.averages[n] - exact[n]).abs().max()) for n in exact))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with ema.in_place():
            pass
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), precision
    assert apart < 1e-5, f"off by {apart:.2g}"
    return f"off by at most {apart:.2g}"


def parts(device, folder, dry):
    """--micro_batch and --grad_checkpointing give the gradients of the whole batch."""
    from tests.test_pretended import train

    torch.backends.cudnn.allow_tf32 = False
    _, whole, _ = train(device, "fp32")
    apart = 0.0
    for how in (dict(micro_batch=4), dict(more=["--grad_checkpointing"])):
        _, weights, _ = train(device, "fp32", **how)
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(whole, weights, strict=True)))
    assert apart < 1e-4, f"after two steps weights are {apart:.2g} apart"
    return f"after two steps weights are at most {apart:.2g} apart"


def evaluation(device, folder, dry):
    """Features of the CPU, and the very ranking, ties too."""
    from tests.test_pretended import build, loaders

    torch.backends.cudnn.allow_tf32 = False
    here, there = (encode(build(where, "fp32")[0], *loaders(where), where) for where in (CPU, device))
    pairs = ((here.text, there.text.cpu()), (here.image, there.image.cpu()))
    off = max(float((a - b).abs().max()) for a, b in pairs)
    assert off < 1e-3, f"features are off by {off:.2g}"
    generator = torch.Generator().manual_seed(1)
    query, gallery = (torch.randn(n, 8, generator=generator).round() for n in (400, 300))  # exact in fp32
    pids = [torch.randint(0, 90, (n,), generator=generator) for n in (400, 300)]
    expected = rank_features(query, gallery, *pids)
    found = rank_features(query.to(device), gallery.to(device), *pids)
    for name, value in expected._asdict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(found, name)).cpu()), name
    return f"features off by at most {off:.2g}; {expected.tied} tied queries ranked alike"


def full_memory(device, folder, dry):
    """A training that finds the GPU full of another program's data ends with the sentence that says so."""
    if device.type != "cuda":
        return "not tried on a CPU"
    words = ["train.py", "--pretrain_choice", "random", "--precision", "fp32", "--num_workers", "0"]
    words += ["--root_dir", str(folder / "data"), "--output_dir", str(folder / "logs"), "--batch_size", "64"]
    python(["-m", "datasets.synthetic", "--root", str(folder / "data"), *FEW])
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.empty(max(free - 3 * 2**30, 1), dtype=torch.uint8, device=device)  # too little for ViT-B/16
    status, said = ended([*words, "--device", "cuda"])
    del held
    assert status == 2 and "".join(said).startswith("error: out of memory on cuda"), said
    assert "other programs use" in said[0], said
    return said[0]


FAILING = """
import sys, torch, torch.distributed as dist
from utils.device import pick_device
from utils.dist import process_index
from utils.errors import InputError, reports_errors
from utils.process_group import process_group

@reports_errors
def main(argv):
    device = pick_device(sys.argv[1])
    with process_group(device):
        x = torch.ones(1, device=device)
        dist.all_reduce(x)
        float(x)
        if process_index() == 0:
            raise InputError("the first process has failed")
        dist.all_reduce(x)
        float(x)

raise SystemExit(main([]))
"""


def failing_process(device, folder, dry):
    """Of as many processes as there are GPUs the first fails while the others, if any, wait for it."""
    script, number = folder / "failing.py", torch.cuda.device_count() if device.type == "cuda" else 1
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{FAILING}")
    began = time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    status, said = ended([*launcher, str(script), device.type], seconds=100)
    assert status and "error: the first process has failed" in said, said
    return f"all {number} ended after {time.monotonic() - began:.0f} s, and the sentence was said"


def tools(device, folder, dry):
    """A run of fp16 in test.py, search.py, visualize.py and export.py: what they find on the CPU too."""
    if dry:
        return "not tried: the tests do"
    precision = ["--optimizer", "SGD", "--lr", "1e-3", "--num_epoch", "1", "--eval_period", "1"]
    run = train_drawn(device, folder, dry, "tools", [*precision, "--precision", "fp16"])
    figures, hits = [], []
    for where, precision in ((device.type, "fp16"), ("cpu", "fp32")):
        words = ["--config_file", str(run), "--device", where, "--precision", precision]
        python(["test.py", *words])
        figures.append(json.loads((run / "results.json").read_text())["t2i"]["mAP"])
        words += ["--split", "test", "--index", str(folder / where)]
        said = python(["search.py", *words, "--query", "a man in a red coat", "--json"])
        hits.append(json.loads(said)[0]["results"])
    picture = hits[0][0]["file"]
    words = ["--config_file", str(run), "--device", device.type, "--output", str(folder / "pictures")]
    for by in ("relevance", "attention"):
        python(["visualize.py", *words, "--image", picture, "--words", "a red coat", "--words_by", by])
    python(["export.py", str(run), "--format", "safetensors", "--output", str(folder / "export")])
    apart = abs(hits[0][0]["similarity"] - hits[1][0]["similarity"])
    assert abs(figures[0] - figures[1]) < 1 and apart < 0.01, f"mAP {figures}, best hit {apart:.2g} apart"
    return f"mAP {figures[0]:.2f} beside {figures[1]:.2f} % on the CPU; the best hit {apart:.1g} apart"


CHECKS = {  # name: the check, seconds that it may take; in the order of their worth
    "published fp16": (published_fp16, 60),
    "losses": (losses, 90),
    "bad step": (bad_step, 15),
    "waits": (waits, 20),
    "average": (average, 15),
    "parts": (parts, 15),
    "evaluation as on a CPU": (evaluation, 15),
    "full memory": (full_memory, 30),
    "failing process": (failing_process, 30),
    "tools": (tools, 60),
}
