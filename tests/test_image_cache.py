"""The image cache: the same pixels, whatever was there before and whoever writes at the same time."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from datasets import build_dataloader, image_cache
from datasets.image_cache import CacheFile, DecodedImages, open_images
from datasets.synthetic import make_dataset
from tests.conftest import PATIENCE
from tests.full_disk import limited
from utils.errors import InputError
from utils.options import get_args

SIZE = (24, 8)


@pytest.fixture
def paths(tmp_path):
    """Seven small pictures of several sizes."""
    random, found = np.random.default_rng(0), []
    for number in range(7):
        pixels = random.integers(0, 256, (40 + number, 15 + number, 3), dtype=np.uint8)
        found.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(found[-1])
    return found


def opened(where, paths, img_size=SIZE, **options):
    return open_images(str(where), paths, img_size, "SET", **options)


def same(images, paths, img_size=SIZE):
    plain = DecodedImages(img_size)
    return all(torch.equal(images[path], plain[path]) for path in paths)


@pytest.fixture
def decodings(monkeypatch):
    """Paths decoded from here on, in this process."""
    seen, decode = [], DecodedImages.__getitem__
    monkeypatch.setattr(
        DecodedImages, "__getitem__", lambda self, path: (seen.append(path), decode(self, path))[1]
    )
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_pixels_are_the_decoded_ones(tmp_path, paths, workers):
    for where in (tmp_path / "cache", "ram", "off"):
        assert same(opened(where, paths, num_workers=workers), paths)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["SET_24x8.lock", "SET_24x8.pixels"]


def test_a_second_run_decodes_nothing(tmp_path, paths, decodings):
    opened(tmp_path, paths)
    assert len(decodings) == 7
    opened(tmp_path, paths[2:5])
    assert len(decodings) == 7


def test_only_what_changed_is_decoded_again(tmp_path, paths, decodings):
    earlier = opened(tmp_path, paths)
    before = earlier[paths[3]].clone()
    Image.new("RGB", (16, 40), "red").save(paths[3])
    os.utime(paths[1], ns=(1, 1))  # touched, of the same size
    del decodings[:]
    images = opened(tmp_path, paths)
    assert decodings == [paths[1], paths[3]] and same(images, paths)
    assert torch.equal(earlier[paths[3]], before)  # a run that reads the old file goes on with it


def test_what_another_split_kept_stays_and_what_is_gone_goes(tmp_path, paths, decodings):
    opened(tmp_path, paths[:4])
    os.unlink(paths[0])
    images = opened(tmp_path, paths[4:])
    assert sorted(images.rows) == paths[1:]
    del decodings[:]
    opened(tmp_path, paths[1:])
    assert not decodings


def test_another_image_size_has_a_file_of_its_own(tmp_path, paths):
    opened(tmp_path, paths)
    assert same(opened(tmp_path, paths, (12, 12)), paths, (12, 12))
    assert len(list(tmp_path.glob("*.pixels"))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"something else entirely" * 999,
        lambda data: data.replace(b"IRRA images 2 4096", b"IRRA images 2 what"),
        lambda data: data.replace(b"img_size", b"img_sick"),
        lambda data: data.replace(b"[24, 8]", b"[8, 24]"),
        lambda data: data.replace(f'"{PIL.__version__}"'.encode(), f'"9{PIL.__version__[1:]}"'.encode()),
        lambda data: data.replace(b'{"', b'["'),
        lambda data: data + b"more",
    ],
)
def test_a_damaged_or_foreign_file_is_written_anew(tmp_path, paths, damage):
    opened(tmp_path, paths)
    file = tmp_path / "SET_24x8.pixels"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(opened(tmp_path, paths), paths)
    assert file.read_bytes() == whole


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_left_behind(tmp_path, paths):
    with open(paths[5], "wb") as file:
        file.write(b"no picture")
    for where in (tmp_path / "cache", "ram"):
        for workers in (0, 2):
            with pytest.raises(InputError, match=r"5\.png") as error:
                opened(where, paths, num_workers=workers)
            assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["SET_24x8.lock"]


def test_too_little_room_is_one_sentence_with_the_room_needed(tmp_path, paths, monkeypatch):
    full = SimpleNamespace(total=1, used=1, free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: full)
        with pytest.raises(InputError, match="needs 0.00 GB, but only 0.00 GB are free"):
            opened(tmp_path, paths)
    monkeypatch.setattr(image_cache, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="--image_cache ram: 7 images take 0.00 GB"):
        opened("ram", paths)


GIB = 1 << 30
STAT, FIRST = "memory.stat", "memory/memory.limit_in_bytes"  # FIRST: of the first version of cgroups
GROUPS = {  # /proc/self/cgroup, files below /sys/fs/cgroup, GiB that are free of a machine with 100
    "no group": ("", {}, 100),
    "no limit": ("0::/job\n", {"job/memory.max": "max", f"job/{STAT}": "anon 5"}, 100),
    "a job": ("0::/a/job\n", {"a/job/memory.max": 8 * GIB, f"a/job/{STAT}": f"file 9\nanon {3 * GIB}"}, 5),
    "a limit above it": (
        "0::/a/job\n",
        {"a/job/memory.max": "max", "a/memory.max": 7 * GIB, f"a/{STAT}": "anon 0"},
        7,
    ),
    "a container": ("0::/\n", {"memory.max": 6 * GIB}, 6),
    "a container of the first version": (
        "4:cpu:/\n3:memory:/docker/1\n",
        {FIRST: 9 * GIB, f"memory/{STAT}": f"rss 1\ntotal_rss {GIB}\n\n"},
        8,
    ),
    "no limit of the first version": ("3:cpu,memory:/x\n", {FIRST.replace("/", "/x/"): 2**63 - 4096}, 100),
    "more than all": ("0::/\n", {"memory.max": 5, STAT: "anon 9"}, 0),
}


@pytest.mark.parametrize("group, files, free", GROUPS.values(), ids=GROUPS)
def test_of_memory_a_program_may_take_its_containers_share_only(group, files, free, tmp_path):
    tree = {"proc/meminfo": f"MemTotal: 7 kB\nMemAvailable: {100 << 20} kB\n", "proc/self/cgroup": group}
    for name, text in {**tree, **{f"groups/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    assert image_cache.available_memory(tmp_path / "proc", tmp_path / "groups") == free * GIB
    assert image_cache.available_memory(tmp_path / "none", tmp_path / "none") == np.inf


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path, paths):
    # 5000 bytes: the header fits, the pixels do not
    with (
        limited(5000),
        pytest.raises(InputError, match=r"cannot write .*SET_24x8\.pixels \(0\.1 MiB") as error,
    ):
        opened(tmp_path, paths)
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".png"] == ["SET_24x8.lock"]


def test_what_a_killed_build_left_goes_with_the_next_one(tmp_path, paths):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".SET_24x8.pixels.{ended.pid}"
    left.write_bytes(b"half of a cache")
    opened(tmp_path, paths)
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(paths):
    with pytest.raises(InputError, match="--image_cache: .*Not a directory"):
        opened(f"{paths[0]}/below", paths)


def build(folder, paths):
    opened(folder, paths)


def test_runs_that_build_at_once_build_one_cache(tmp_path, paths):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=build, args=(tmp_path / "cache", paths)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(PATIENCE)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert same(opened(tmp_path / "cache", paths), paths)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_travels_to_another_process_by_name(tmp_path, paths):
    images = opened(tmp_path, paths)
    sent = pickle.dumps(images)
    assert len(sent) < 500
    assert isinstance(pickle.loads(sent), CacheFile) and same(pickle.loads(sent), paths)


def test_loaders_give_the_same_batches_with_and_without_a_cache(tmp_path):
    make_dataset(tmp_path, train_ids=6, val_ids=1, test_ids=3, images_per_id=2)
    words = ["--root_dir", str(tmp_path), "--MLM", "--img_aug", "--batch_size", "5", "--img_size", "48", "16"]
    batches = {}
    for where in ("off", "ram", str(tmp_path / "cache")):
        for workers in ("0", "2"):
            args = get_args([*words, "--image_cache", where, "--num_workers", workers, "--device", "cpu"])
            train_loader, img_loader, _, _ = build_dataloader(args)
            batches[where, workers] = [*train_loader, *({"pids": p, "images": i} for p, i in img_loader)]
    plain = batches["off", "0"]
    for found in batches.values():
        assert len(found) == len(plain)
        for batch, expected in zip(found, plain, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
