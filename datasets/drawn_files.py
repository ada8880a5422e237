"""A folder of drawn pedestrians, in the on-disk format of any of the three data sets."""

import json
import shutil

from tqdm import tqdm

from datasets.pedestrians import VERSION, draw
from utils.data_sets import DATA_SETS
from utils.errors import InputError
from utils.files import write_whole

CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")
MAX_IDS = 30_000  # of a split: a fraction of the persons there are, so that new ones are found at once


def arguments_of(format, train_ids, val_ids, test_ids, images_per_id, seed, size):
    """What any set is drawn by, as its folder keeps it. InputError: it cannot be drawn."""
    if format not in DATA_SETS:
        raise InputError(f"there is no format {format!r} to draw in, only {', '.join(DATA_SETS)}")
    ids = {"train": train_ids, "val": 0 if format == "ICFG-PEDES" else val_ids, "test": test_ids}
    for split, count in ids.items():
        least = 0 if split == "val" else 1
        if not least <= count <= MAX_IDS:
            raise InputError(f"{count} {split} identities cannot be drawn: give {least} to {MAX_IDS}")
    if images_per_id < 1:
        raise InputError(f"{images_per_id} images per identity cannot be drawn: give 1 or more")
    if size and not (48 <= size[0] <= 2048 and 20 <= size[1] <= 2048):
        raise InputError(f"images of {size[0]}x{size[1]} cannot be drawn: give 48..2048 high, 20..2048 wide")
    return {"version": VERSION, "ids": ids, "images": images_per_id, "seed": seed, "size": size}


def made(folder, arguments, draw_records, progress):
    """The folder, of the name of a format, with what the arguments stand for: the images that
    draw_records(imgs) draws, and their records, which it yields. progress: show a bar."""
    annotation, stamp = folder / DATA_SETS[folder.name].files[0], folder / "synthetic.json"
    number, arguments = sum(arguments["ids"].values()) * arguments["images"], json.dumps(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not stamp.exists() and any(folder.iterdir()):
            raise InputError(
                f"{folder} holds files that were not drawn here: give another root, or move them away"
            )
        if annotation.exists() and stamp.read_bytes() == arguments.encode():
            return folder
        annotation.unlink(missing_ok=True)  # first of all, so that it never names images of another drawing
        write_whole(stamp, arguments)
        if (folder / "imgs").exists():
            shutil.rmtree(folder / "imgs")
        bar = tqdm(draw_records(folder / "imgs"), total=number, disable=not progress, unit=" images")
        write_whole(annotation, json.dumps(list(bar), indent=1))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def draw_file(path, identity, view, rng, size, obstruct=None):
    height = rng.randint(160, 224)
    varied = height, round(height * rng.uniform(0.38, 0.46))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(identity, view, rng, size or varied, obstruct).save(path, quality=rng.randint(75, 95))


def image_name(format, pid, number):
    """As in the real sets, where folders are the images' sources and not the splits."""
    if format == "CUHK-PEDES":
        return f"{CUHK_FOLDERS[pid % len(CUHK_FOLDERS)]}/{pid:05d}_{number:03d}.jpg"
    if format == "ICFG-PEDES":
        return f"{('train', 'test')[pid % 2]}/{pid:04d}/{pid:04d}_{number:03d}.jpg"
    return f"{pid:04d}_c{number % 15 + 1}_{number:04d}.jpg"
