"""Where an image's pixels come from: decoded from its file each time, or once and then kept (--image_cache).

A kept image is what decoding and resizing gave, uint8 [3, H, W]. On disk they lie one behind the other in one
file, DIR/<data set>_<H>x<W>.pixels, after an index of path, file size and time of change of each image: an
image that changed is decoded anew; all are where the file is cut short, of another kind or another Pillow's.
"""

import json
import logging
import math
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader

from datasets.transforms import read_image, resize
from utils.errors import InputError
from utils.files import lock, lock_file, remove_leftovers, whole_file
from utils.loading import batches_of, room_for_sockets
from utils.progress import progress_bar

logger = logging.getLogger("IRRA.dataset")
MAGIC = "IRRA images 2"
PAGE = 4096


class DecodedImages:
    """images[path] -> uint8 tensor [3, H, W], decoded and resized each time."""

    def __init__(self, img_size):
        self.img_size = tuple(img_size)

    def __getitem__(self, path):
        return resize(read_image(path), self.img_size)


class KeptImages:
    """images[path] -> uint8 tensor [3, H, W], not to be written to.

    pixels: array [n, 3, H, W]. paths: of each row, absolute.
    """

    def __init__(self, pixels, paths):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the array is read-only
            self.pixels = torch.from_numpy(pixels)
        self.rows = {path: row for row, path in enumerate(paths)}

    def __getitem__(self, path):
        row = self.rows.get(path)
        if row is None:
            row = self.rows[path] = self.rows[os.path.abspath(path)]
        return self.pixels[row]


class CacheFile(KeptImages):
    """KeptImages of a memory-mapped file; pickles as its name. identities: {path: [size, time of change]}."""

    def __init__(self, file):
        """Raises OSError or what else comes of a file that is not a whole cache, or another Pillow's."""
        with open(file, "rb") as opened:
            magic, _, start = opened.readline(64).decode("ascii").rpartition(" ")
            if magic != MAGIC:
                raise ValueError("this is no image cache")
            start = int(start)
            index = json.loads(opened.read(start - opened.tell()))
        shape = (len(index["images"]), 3, *index["img_size"])
        if not shape[0] or os.path.getsize(file) != start + math.prod(shape):
            raise ValueError("it is cut short")
        if index["pillow"] != PIL.__version__:  # whose resizing may round to another grey level
            raise ValueError(f"it was made with Pillow {index['pillow']}")
        self.file, self.img_size = file, tuple(index["img_size"])
        self.identities = {path: identity for path, *identity in index["images"]}
        super().__init__(np.memmap(file, np.uint8, "r", start, shape), self.identities)

    def __reduce__(self):
        return CacheFile, (self.file,)


def open_images(where, paths, img_size, name, num_workers=0):
    """What gives the pixels of image files. where: "off", "ram", or a folder for the cache file.

    Decodes what is not kept yet in num_workers processes, with a progress bar. InputError: no room.
    """
    paths = list(dict.fromkeys(map(os.path.abspath, paths)))
    if where == "off":
        return DecodedImages(img_size)
    if where == "ram":
        return keep_in_memory(paths, img_size, num_workers)
    H, W = img_size
    return keep_in_file(Path(where) / f"{name}_{H}x{W}.pixels", paths, img_size, num_workers)


def keep_in_memory(paths, img_size, num_workers):
    shape = (len(paths), 3, *img_size)
    size, free = math.prod(shape), available_memory()
    if size > free:
        raise InputError(
            f"--image_cache ram: {len(paths)} images take {gigabytes(size)}, but only {gigabytes(free)} of "
            "memory are free; give a folder instead"
        )
    pixels = np.empty(shape, np.uint8)
    for row, image in enumerate(decoded(paths, img_size, num_workers)):
        pixels[row] = image
    logger.info(f"image cache: {len(paths)} images in memory ({gigabytes(size)})")
    return KeptImages(pixels, paths)


def available_memory(proc=Path("/proc"), groups=Path("/sys/fs/cgroup")):
    """Bytes that are free of the machine and of this program's share of it, that of a container or a batch
    job, which ends it without a word when it takes more. Infinity where the system does not say."""
    free = [1024 * number for number in _numbers(proc / "meminfo", "MemAvailable:")]
    for line in _lines(proc / "self" / "cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups  # of the first version of cgroups and of the second
        limit, used = ("memory.limit_in_bytes", "total_rss") if kinds else ("memory.max", "anon")
        own = root / path.lstrip("/")
        for group in (own, *own.parents):  # in a container its own is mounted at the root
            if group.is_relative_to(root):
                most, taken = _numbers(group / limit), _numbers(group / "memory.stat", used)
                free += [max(0, number - sum(taken)) for number in most]
    return min(free, default=math.inf)


def _lines(file):
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _numbers(file, name=None):
    """The whole numbers in a file of the system: of its lines that begin with the name, or of all."""
    rows = [line.split() for line in _lines(file)]
    words = [row[0] if name is None else row[1] for row in rows if row and name in (None, row[0])]
    return [int(word) for word in words if word.isdigit()]


def keep_in_file(file, paths, img_size, num_workers):
    wanted = {path: identity(path) for path in paths}

    def holds(cache):
        return cache is not None and all(cache.identities.get(path) == wanted[path] for path in wanted)

    cache = read_cache(file, img_size)
    if not holds(cache):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(file.with_suffix(".lock")) as alone:
                if not lock(alone):
                    logger.info("image cache: another run is writing it; waiting for that")
                    lock(alone, wait=True)
                cache = read_cache(file, img_size)  # another run may have written it meanwhile
                if not holds(cache):
                    write_cache(file, cache, wanted, img_size, num_workers)
                    cache = CacheFile(file)
        except OSError as error:
            raise InputError(
                f"--image_cache: {file.parent} cannot be used ({error.strerror or error}): give another "
                "folder, ram or off"
            ) from None
    logger.info(f"image cache: {len(cache.rows)} images in {file} ({gigabytes(cache.pixels.nbytes)})")
    return cache


def identity(path):
    """[size, time of change] of a file: when either differs, it is another image."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def read_cache(file, img_size):
    """The CacheFile, or None where there is none that is whole and of this image size."""
    try:
        cache = CacheFile(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        logger.info(f"image cache: {file} is written anew ({error})")
        return None
    return cache if cache.img_size == tuple(img_size) else None


def write_cache(file, old, wanted, img_size, num_workers):
    """Write the file whole and beside, then rename it: a run that reads the old one keeps it.

    Goes on keeping what another run or split wanted, as long as the image is still the same.
    """
    before = old.identities if old else {}
    kept = {path: known for path, known in before.items() if still_is(path, known)}
    kept = {path: known for path, known in kept.items() if wanted.get(path, known) == known}
    new = {path: known for path, known in wanted.items() if path not in kept}
    images = [[path, *known] for path, known in (kept | new).items()]
    index = {"img_size": list(img_size), "pillow": PIL.__version__, "images": images}
    index = json.dumps(index).encode()
    start = -(-(len(index) + 64) // PAGE) * PAGE
    size = start + len(images) * 3 * math.prod(img_size)
    remove_leftovers(file.parent, file.name)  # of a build that was killed: as large as a cache
    free = shutil.disk_usage(file.parent).free
    if size > free:
        raise InputError(
            f"--image_cache: {file} needs {gigabytes(size)}, but only {gigabytes(free)} are free there; give "
            "another folder, ram or off"
        )
    with whole_file(file, size) as out:
        out.write(f"{MAGIC} {start}\n".encode())
        out.write(index.ljust(start - out.tell()))
        for path in kept:
            out.write(old[path].numpy())
        for image in decoded(new, img_size, num_workers):
            out.write(image.numpy())
    logger.info(f"image cache: {len(new)} images decoded, {len(kept)} kept")


def still_is(path, known):
    try:
        return identity(path) == known
    except OSError:
        return False


class Decoding(DecodedImages):
    """In a loading process: an error is returned, since one raised there would keep the processes waiting."""

    def __getitem__(self, path):
        try:
            return super().__getitem__(path)
        except InputError as error:
            return error


def decoded(paths, img_size, num_workers):
    """The pixels of each path, in order, decoded in num_workers processes, behind a progress bar."""
    if num_workers:
        room_for_sockets()
    images = Decoding(img_size)
    batches = DataLoader(images, 32, sampler=paths, num_workers=num_workers, collate_fn=list)
    with progress_bar(len(paths), "image cache", unit="img") as bar:
        for batch in batches_of(batches):
            for image in batch:
                if isinstance(image, InputError):
                    raise image
                yield image
            bar.update(len(batch))


def gigabytes(size):
    return f"{size / 1e9:.2f} GB"
