"""What the methods beside IRRA cost: a training step against IRRA's sdm+id, and encoding for evaluation.

python -m benchmarks.methods                                      CPU
python -m benchmarks.methods --device cuda --batch_size 64        on a GPU

A step is forward, backward and the optimiser's, of full-size models from random weights.
"""

import torch

from benchmarks.harness import new_parser, record_times
from benchmarks.step import PERSONS, TINY, OurStep, batch_of
from model import build_model
from solver import build_optimizer
from utils.device import pick_device, to_device
from utils.options import get_args

ARMS = {  # what is typed; the first is the baseline
    "sdm+id": "--loss_names sdm+id",
    "tal and selected tokens": "--loss_names tal --token_selection",
    "sdm and similarities of words": "--loss_names sdm --mask_by_similarity",
}


def main(argv=None):
    args = new_parser(__doc__, precision="fp32", batch_size=8).parse_args(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    tiny = ["--clip_architecture", *TINY] if args.tiny else []
    steps, encodings = {}, {}
    for name, typed in ARMS.items():
        words = ["--pretrain_choice", "random", *tiny, "--device", args.device, "--precision", args.precision]
        chosen = get_args([*words, *typed.split()])
        torch.manual_seed(0)
        model = build_model(chosen, PERSONS)
        batch = batch_of(args.batch_size, chosen.img_size)
        step = OurStep(model.train(), build_optimizer(chosen, model), batch, device)
        steps[name] = after_similarities(step) if chosen.mask_by_similarity else step
        encodings[name] = encoding_of(model, batch, device)
    what = f"batch {args.batch_size}, {args.precision}{', tiny model' if args.tiny else ''}"
    for kind, arms in (("training step", steps), ("encoding pictures and captions", encodings)):
        record_times(f"{kind}, {what}", arms, args.repeats, device=device, baseline="sdm+id")


def after_similarities(step):
    """The step, after the pass that --mask_by_similarity takes before it."""
    images, ids = (to_device(step.batch[name], step.device) for name in ("images", "caption_ids"))

    def both():
        step.model.word_similarities(images, ids)
        step()

    return both


def encoding_of(model, batch, device):
    images, ids = (to_device(batch[name], device) for name in ("images", "caption_ids"))

    def encode():
        model.eval()
        with torch.no_grad():
            model.encode_image(images)
            model.encode_text(ids)

    return encode


if __name__ == "__main__":
    main()
