"""The loader: samples a second of one loading process, images from files like CUHK-PEDES' and from the cache.

python -m benchmarks.loader

Drawn JPEGs of 300-500 x 100-200 pixels, batches of 64, the recipe's augmentation and masking. The published
samples are normalised floats; ours are bytes, which are normalised on the device as one batch: that is an arm
of its own, "cached, normalised here".
"""

import tempfile
from pathlib import Path
from random import Random

import torch
from torch.utils.data import default_collate

from benchmarks import published
from benchmarks.harness import interleaved, new_parser, record
from datasets import pedestrians
from datasets.annotations import TrainSample
from datasets.image_cache import DecodedImages, open_images
from datasets.image_text import CaptionChanges, Images, PairDataset, finish

IMG_SIZE = (384, 128)


def draw_files(folder, number):
    """Pictures of the size and compression of the data sets'; (samples)."""
    samples = []
    for index, person in enumerate(pedestrians.make_identities(0, "train", number)):
        random = Random(index)
        size = random.randint(300, 500), random.randint(100, 200)
        view, path = random.choice(pedestrians.VIEWS), Path(folder) / f"{index:05d}.jpg"
        pedestrians.draw(person, view, random, size).save(path, quality=random.randint(75, 95))
        samples.append(TrainSample(index, index, str(path), pedestrians.describe(person, view, random)))
    return samples


def main(argv=None):
    parser = new_parser(__doc__, ["batch_size", "repeats"], batch_size=64)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_files(folder, args.images)
        compare(samples, folder, args)


def compare(samples, folder, args):
    settings = dict(text_length=77, seed=1, img_aug=True, changes=CaptionChanges(masking=(0.8, 0.1)))
    paths = [sample.image_path for sample in samples]
    cache = open_images(folder, paths, IMG_SIZE, "benchmark")
    plain = published.PairDataset(samples, IMG_SIZE)
    sources = (DecodedImages(IMG_SIZE), cache)
    cold, cached = (PairDataset(samples, Images(source, IMG_SIZE), **settings) for source in sources)
    starts = range(0, len(samples) - args.batch_size + 1, args.batch_size)
    batches = [[(1, index) for index in range(start, start + args.batch_size)] for start in starts]

    def of_published():
        for batch in batches:
            default_collate([plain[index] for _, index in batch])

    def of(dataset, passes=1, on=None):
        for batch in passes * batches:
            found = dataset.__getitems__(batch)
            if on:
                finish(found["images"], on, found["boxes"])

    many = 5  # passes: the cache is so quick that one is hard to time
    arms = {
        "published": of_published,
        "cold JPEG": lambda: of(cold),
        "cached": lambda: of(cached, many),
        "cached, normalised here": lambda: of(cached, on=torch.device("cpu")),
    }
    number = len(batches) * args.batch_size
    numbers = {name: number * (many if name == "cached" else 1) for name in arms}
    note = f"batches of {args.batch_size}"
    for seconds, what in zip(interleaved(arms, args.repeats), ("", ", of CPU time"), strict=True):
        speed = {name: numbers[name] / s for name, s in seconds.items()}
        record(f"loader, one process{what}", speed, "samples/s", better="more", note=note)


if __name__ == "__main__":
    main()
