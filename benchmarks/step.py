"""One training step at full size (ViT-B/16, 384x128, sdm+mlm+id): time, memory, the share of each shortcut.

python -m benchmarks.step                                          CPU, fp32, batch 8
python -m benchmarks.step --device cuda --batch_size 64            a GPU, fp16 as published
python -m benchmarks.step --optimizer                              the optimiser's host time alone
python -m benchmarks.step --growth 2000                            how much memory the loop gains, tiny model

MFU: 158.154 GFLOP a sample, forward and backward of the published computation, times samples a second, by the
rate of bf16 matrix products measured here. Only on an accelerator.
"""

import functools
import gc
from collections import defaultdict

import torch

from benchmarks import published
from benchmarks.harness import held, interleaved, left_out, new_parser, peak_memory, record
from benchmarks.pretended import DEVICE, Pretended
from model.build import build_model, in_precision, new_model
from processor.trainer import FiniteWatch, Meters, Steps, backward, look_period, train_one_epoch
from solver import build_optimizer
from utils.batch import Batch
from utils.device import pick_device
from utils.options import get_args

GFLOP = 158.154
PERSONS = 11003
TINY = "embed_dim=64 vision_layers=2 vision_width=64 transformer_width=64 transformer_layers=2".split()


def batch_of(size, img_size, seed=0):
    """Captions as long as CUHK-PEDES' are, masked in place as published; pictures of noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(size, 77, dtype=torch.long)
    lengths = (27 + 8 * torch.randn(size, generator=generator)).long().clamp(8, 76)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[0], row[length] = 49406, 49407
        row[1:length] = torch.randint(300, 40000, (length - 1,), generator=generator)
    chosen = (ids > 0) & (ids < 49405) & (torch.rand(ids.shape, generator=generator) < 0.15)
    chosen[:, 1] |= ~chosen.any(1)
    masked = ids.masked_fill(chosen, 49405)
    return {
        "pids": torch.randint(0, PERSONS, (size,), generator=generator),
        "image_ids": torch.arange(size),
        "images": torch.randn(size, 3, *img_size, generator=generator),
        "caption_ids": masked,
        "mlm_ids": masked.clone(),
        "mlm_labels": ids * chosen,
    }


def options(device, precision=None, tiny=False):
    """The recipe's, from random weights; in fp16 on a GPU, where that is the recipe's precision."""
    words = ["--pretrain_choice", "random", "--MLM", "--loss_names", "sdm+mlm+id", "--device", device]
    words += ["--precision", precision or ("fp32" if pick_device(device).type == "cpu" else "fp16")]
    if tiny:
        words += ["--img_size", "64", "32", "--clip_architecture", *TINY]
    return get_args(words)


def named(args, chosen):
    tiny = ", tiny model" if args.tiny else ""
    return f"training step, batch {args.batch_size}, {chosen.precision}{tiny}"


class OurStep:
    """A step as processor.trainer takes it between two log lines, its watch and its meters included."""

    def __init__(self, model, optimizer, batch, device):
        self.model, self.optimizer, self.batch, self.device = model, optimizer, Batch.of(batch), device
        self.watch = FiniteWatch(model, optimizer, 1, look_period(device, 100))
        self.meters, self.number = Meters(), 0

    def __call__(self):
        self.number += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss, report = backward(self.model, self.batch, self.device)
        self.watch.before_step(self.number, loss, report, self.batch)
        self.optimizer.step()
        self.meters.update({"loss": loss, **report}, self.batch.samples)


def arms_of(options, model, batch, device, names):
    """{arm: a function that takes one step}. All work on one model; those with the published optimiser share
    it, since two moments of each weight for each arm are more than a small machine holds."""
    shared = functools.cache(lambda: published.optimizer_of(options, model))

    def step_of(name):
        if name == "ours":
            return OurStep(model, build_optimizer(options, model), batch, device)
        optimizer = build_optimizer(options, model) if name == "merged optimiser" else shared()
        meters, switches = defaultdict(published.Meter), (name,)  # one that is no switch's changes nothing
        return lambda: published.train_step(model, optimizer, batch, device, meters, switches)

    return {name: step_of(name) for name in names}


def main(argv=None):
    parser = new_parser(__doc__, batch_size=8)
    alone = "each shortcut alone too (memory for three optimisers)"
    parser.add_argument("--alone", action="store_true", help=alone)
    parser.add_argument("--compile", action="store_true", help="an arm with compiled encoders too")
    parser.add_argument("--optimizer", action="store_true")
    parser.add_argument("--growth", type=int, default=0, metavar="STEPS")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.growth:
        return growth(args)
    if args.optimizer:
        return optimizer_time(args)
    device, chosen = pick_device(args.device), options(args.device, args.precision, args.tiny)
    gc.collect()
    libraries = held(device)
    torch.manual_seed(0)
    model = build_model(chosen, PERSONS)
    model.train()
    batch = batch_of(args.batch_size, chosen.img_size)
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    what = named(args, chosen)
    # memory first, one arm at a time: two optimisers' states at once would hide what a step needs
    fitting = memory(what, args, chosen, model, batch, device, libraries)
    if not args.repeats:  # memory alone
        return
    names = ["published", *published.SWITCHES, "no waits", "merged optimiser", "ours"]
    arms = arms_of(chosen, model, batch, device, names if args.alone else fitting)
    if args.compile:
        compiled = build_model(chosen, PERSONS)
        compiled.train()
        compiled.compile_encoders(**({"backend": "eager"} if args.tiny else {}))
        arms["ours, compiled"] = arms_of(chosen, compiled, batch, device, ["ours"])["ours"]
    times(what, args, arms, model, device)


def times(what, args, arms, model, device):
    """Record time and speed of a step, on a GPU also how much of what it can do that is."""
    warm_up = 2 if device.type == "cuda" else 0
    for _ in range(warm_up):  # twice: the first time not all moments were there yet
        for name in [name for name, step in arms.items() if not fits(step, model)]:
            del arms[name]
            left_out(f"{what}, time", name, "out of memory", device)
    seconds, cpu_seconds = interleaved(arms, args.repeats, warm_up, device)
    record(f"{what}, time", {name: 1000 * s for name, s in seconds.items()}, "ms", device=device)
    if device.type == "cpu":
        milliseconds = {name: 1000 * s for name, s in cpu_seconds.items()}
        record(f"{what}, CPU time", milliseconds, "ms", device=device)
    speed = {name: args.batch_size / s for name, s in seconds.items()}
    record(f"{what}, speed", speed, "samples/s", better="more", device=device)
    if device.type == "cuda" and not args.tiny:
        rate = bf16_rate(device)
        mfu = {name: 100 * GFLOP * 1e9 * s / rate for name, s in speed.items()}
        note = f"of {rate / 1e12:.0f} TFLOP/s measured in bf16"
        record(f"{what}, MFU", mfu, "%", better="more", device=device, note=note)


def memory(what, args, chosen, model, batch, device, libraries):
    """Record the peak of a step, on a GPU beside the estimate; returns the names of the arms that fit."""
    peak, tensors = {}, sum(p.numel() * p.element_size() for p in model.parameters())
    for name in ("published", "ours"):
        step = arms_of(chosen, model, batch, device, [name])[name]
        if fits(step, model):
            peak[name], _ = peak_memory(step, device)
        else:
            left_out(f"{what}, peak memory", name, "out of memory", device)
        del step
        model.zero_grad(set_to_none=True)
    if all(peak.values()):
        beyond = {name: (value - 4 * tensors - libraries) / 2**20 for name, value in peak.items()}
        shown = {name: value / 2**20 for name, value in peak.items()}
        note = "whole process: weights, gradients, Adam's two moments, libraries"
        if device.type == "cuda":
            note = "what PyTorch allocated: weights, gradients, Adam's two moments, activations"
            for name in peak:
                shown[f"{name}, estimate"] = estimate(name, chosen, args.batch_size) / 2**20
        record(f"{what}, peak memory", shown, "MiB", device=device, note=note)
        note = f"the peak less weights, gradients, moments and {libraries / 2**20:.0f} MiB held before"
        record(f"{what}, peak memory beyond these", beyond, "MiB", device=device, note=note)
    return list(peak)


def fits(step, model):
    """Whether the step can be taken in the memory that is there; else all is as before."""
    try:
        step()
        return True
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        return False


def estimate(name, chosen, batch_size):
    """Bytes that a GPU holds at the peak of a full-size step of this arm, counted on a pretended one. Without
    the CUDA context and the libraries' work space, half a GiB or so."""
    with torch.device("meta"):  # shapes and types alone
        model = in_precision(new_model(chosen, PERSONS), chosen.precision).train()
    batch = batch_of(batch_size, chosen.img_size)
    with Pretended(values=False) as gpu:
        model.to(DEVICE)
        # the published step reads its loss, which is not there
        arm = "no waits" if name == "published" else name
        step = arms_of(chosen, model, batch, DEVICE, [arm])[arm]
        step()  # the moments come into being
        gpu.peak = gpu.live
        step()
        return gpu.peak


def bf16_rate(device, size=8192):
    """FLOP/s of square matrix products."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = interleaved({"product": lambda: [a @ a for _ in range(10)]}, 5, 2, device)[0]["product"]
    return 10 * 2 * size**3 / seconds


def optimizer_time(args):
    """Adam's step over the model's 367 tensors, each cut to one number: what remains is the host's work."""
    chosen, device = options(args.device, args.precision, args.tiny), pick_device(args.device)
    model = build_model(chosen, PERSONS)
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:1].clone()
        parameter.grad = torch.ones_like(parameter)
    ours = build_optimizer(chosen, model)

    def our_step():
        if device.type != "cpu":  # there the watch lets the device decide
            ours.found_inf = torch.zeros((), device=device)
        ours.step()

    arms = {"published": published.optimizer_of(chosen, model).step, "ours": our_step}
    note = f"{len(list(model.parameters()))} tensors of one number each"
    measured = interleaved(arms, max(args.repeats, 21), 3, device)
    for seconds, what in zip(measured, ("host time", "host CPU time"), strict=True):
        milliseconds = {name: 1000 * s for name, s in seconds.items()}
        record(f"optimiser step, {chosen.precision}, {what}", milliseconds, "ms", device=device, note=note)


def growth(args):
    """Resident memory over many steps of the training loop."""
    chosen, device = options(args.device, args.precision, tiny=True), pick_device(args.device)
    model = build_model(chosen, 50)
    batches = [batch_of(4, chosen.img_size, seed) for seed in range(8)]
    batches = [{**batch, "pids": batch["pids"] % 50} for batch in batches]
    optimizer, memory = build_optimizer(chosen, model), {}
    first, last = args.growth // 2, args.growth + args.growth // 2

    def look(step, meters):
        if step in (first, last):
            memory[step] = held()

    loader = [batches[step % 8] for step in range(last)]
    train_one_epoch(model, loader, optimizer, device, 1, Steps(log_period=10**9, after_step=look))
    grown = {"ours": (memory[last] - memory[first]) / args.growth}
    record("host memory, growth a step", grown, "bytes", device=device, note=f"over {args.growth} steps")


if __name__ == "__main__":
    main()
