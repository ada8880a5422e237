"""Evaluation from loaders to figures: encoding captions and images, ranking them.

python -m benchmarks.evaluate                                                CPU, a part of the gallery
python -m benchmarks.evaluate --device cuda --images 3074 --captions 6156    CUHK-PEDES' test split on a GPU

Images come from memory in both arms, as normalised floats: decoding is the loader's benchmark.
"""

import torch

from benchmarks import published
from benchmarks.harness import new_parser, record_times
from benchmarks.step import PERSONS, batch_of, options
from model import build_model
from processor.evaluator import encode, evaluate
from utils.device import pick_device


def main(argv=None):
    parser = new_parser(__doc__, batch_size=512)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--captions", type=int, default=32)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, chosen = pick_device(args.device), options(args.device, args.precision, args.tiny)
    torch.manual_seed(0)
    model = build_model(chosen, PERSONS)
    pids = torch.arange(args.images) // 3
    images = torch.randn(min(args.images, args.batch_size), 3, *chosen.img_size)
    parts = pids.split(args.batch_size)
    img_loader = [(part, images[: len(part)]) for part in parts]
    ids = batch_of(args.captions, chosen.img_size)["caption_ids"]
    q_pids = torch.arange(args.captions) % int(pids.max() + 1)
    txt_loader = list(zip(q_pids.split(args.batch_size), ids.split(args.batch_size), strict=True))
    arms = {
        "published": lambda: published.evaluate(model, img_loader, txt_loader, device),
        "ours": lambda: evaluate(encode(model, img_loader, txt_loader, device)),
    }
    tiny = ", tiny model" if args.tiny else ""
    what = f"evaluation, {args.captions} captions, {args.images} images{tiny}"
    record_times(what, arms, args.repeats, int(device.type == "cuda"), device)


if __name__ == "__main__":
    main()
