"""The index of a gallery: equal features are one entry of it, of each type; how it is on disk."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from retrieval import update as update_module
from retrieval.gallery import GalleryIndex, Stamp
from retrieval.page import Page
from retrieval.pictures import scan
from retrieval.vectors import new_faiss
from tests.tiny_run import QUERY, needs_faiss
from utils.errors import InputError
from utils.options import INDEX_TYPES

pytest_plugins = "tests.galleries"
pytestmark = needs_faiss


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def index_of(vectors, kind, folder=None, more=()):
    """A GalleryIndex of pictures "0", "1", … that exist nowhere, and what brings it up to date. more: vectors
    of pictures that may come later."""
    index = GalleryIndex(folder, "/nowhere", "f", vectors[0].size, kind)
    all_vectors = [*vectors, *more]

    def encode(paths):
        for start in range(0, len(paths), 64):
            some = paths[start : start + 64]
            yield some, np.stack([all_vectors[int(path)] for path in some]), {}

    def update(numbers):
        return index.update({str(number): Stamp(1, 1) for number in numbers}, encode)

    update(range(len(vectors)))
    return index, update


# ---- equal features are one entry ----


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_a_thousand_copies_of_one_picture_hide_no_other(kind):
    rng = np.random.default_rng(0)
    others, one = unit(rng.normal(size=(500, 16))), unit(rng.normal(size=(1, 16)))
    vectors = np.concatenate([others[:250], np.repeat(one, 1000, axis=0), others[250:]])
    index, _ = index_of(vectors, kind)
    assert len(index) == 1500 and index.faiss.ntotal == 501
    asked = [*range(0, 250, 5), *range(1250, 1500, 5)]
    found = [
        any(path == str(n) for _, path in hits)
        for n, hits in zip(asked, index.search(vectors[asked], 5), strict=True)
    ]
    assert np.mean(found) >= (1 if kind == "flat" else 0.98)
    (((_, first), (second, other)),) = index.search(one, 2)
    assert first == "250" and len(index.copies("250")) == 999
    assert second < 0.999 and other not in index.copies("250")
    assert len(index.search(one, 1000, duplicates=True)[0]) == 1000


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_features_that_differ_in_the_last_bit_are_no_copies(kind):
    one = unit(np.ones((1, 8)))
    near = one.copy()
    near[0, 3] = np.nextafter(near[0, 3], np.float32(2))
    index, _ = index_of(np.concatenate([one, near, one]), kind)
    assert index.faiss.ntotal == 2
    assert sorted(path for _, path in index.search(one, 5)[0]) == ["0", "1"]
    assert index.copies("0") == ["2"] and index.copies("1") == []


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_copies_come_and_go_and_a_picture_stays_while_one_is_left(kind, tmp_path):
    """Each state, in memory and read again, answers as an index that was made of it at once."""
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(12, 8)))
    vectors[[4, 7, 11]] = vectors[0]
    vectors[[5, 9]] = vectors[2]
    index, update = index_of(vectors, kind, tmp_path)
    for there in ([*range(12)], [4, 7, *range(1, 4)], [*range(1, 6), 11], [11], [0, 11, 2, 9], [*range(12)]):
        update(there)
        again = GalleryIndex.load(tmp_path, "/nowhere", "f", 8)
        for one in (index, again):
            for number, hits in zip(there, one.search(vectors[there], 12, duplicates=True), strict=True):
                same = [str(n) for n in there if np.array_equal(vectors[n], vectors[number])]
                found = [path for _, path in hits]
                assert found[: len(same)] == same and sorted(found) == sorted(map(str, there))
            assert one.faiss.ntotal == len(np.unique(vectors[there], axis=0))


def test_the_page_says_how_many_copies_a_picture_has(opened, encoders, gallery):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(gallery / "3.jpg", gallery / name)
    index, _ = opened(gallery)
    _, tiles, _ = Page(encoders, index, 9, 9).search(QUERY, None)
    assert len(tiles) == 6 and sum(caption.endswith(" · +2") for _, caption in tiles) == 1
    _, tiles, _ = Page(encoders, index, 9, 9, duplicates=True).search(QUERY, None)
    assert len(tiles) == 8 and not any("+" in caption for _, caption in tiles)


# ---- types ----


def found_by(features, index):
    return [path for _, path in index.search(features, 9)[0]]


def test_approximate_indices_find_nearly_what_the_exact_one_finds():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 32))
    vectors = unit(centres[rng.integers(50, size=4000)] + 0.5 * rng.normal(size=(4000, 32)))
    exact = (vectors[:100] @ vectors.T).argsort(axis=1)[:, ::-1][:, :10]
    for kind, least in (("flat", 1), ("ivf", 0.95), ("hnsw", 0.95)):
        _, rows = new_faiss(kind, vectors).search(vectors[:100], 10)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)])
        assert recall >= least, kind


def test_an_ivf_index_that_grows_has_cells_for_its_size():
    vectors = unit(np.random.default_rng(0).normal(size=(3000, 8)))
    at_once, _ = index_of(vectors, "ivf")
    index, update = index_of(vectors[:100], "ivf", more=vectors[100:])
    for number in range(200, 3001, 100):
        update(range(number))
    assert at_once.faiss.nlist / 2 <= index.faiss.nlist <= at_once.faiss.nlist
    assert np.array_equal(index.vectors()[index.pictures["2999"].row], vectors[2999])


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_an_updated_index_answers_as_a_new_one(kind, opened, encoders, gallery, tmp_path):
    features = encoders.text_features([QUERY])
    held = gallery / "4.jpg"
    aside = held.rename(tmp_path / "4.jpg")
    opened(gallery, "--index_type", kind, "--index", tmp_path / "kept")
    shutil.move(aside, held)
    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "extra.png")
    updated, lines = opened(gallery, "--index", tmp_path / "kept")
    assert updated.kind == kind and "2 encoded, 0 removed, 5 kept" in lines[-1]
    new, _ = opened(gallery, "--index", tmp_path / "new")
    assert found_by(features, updated) == found_by(features, new)


def test_the_type_can_change_without_encoding(opened, encoders, gallery):
    features = encoders.text_features([QUERY])
    flat = found_by(features, opened(gallery)[0])
    for kind in ("hnsw", "ivf", "flat"):
        index, lines = opened(gallery, "--index_type", kind)
        assert index.kind == kind and "0 encoded" in lines[-1]
        assert found_by(features, index) == flat


# ---- on disk ----


def test_an_index_of_another_version_is_refused(opened, gallery, tmp_path):
    opened(gallery, "--index", tmp_path / "index")
    table = tmp_path / "index" / "table.json"
    table.write_text(table.read_text().replace('"layout": 2', '"layout": 1'))
    with pytest.raises(InputError, match="of another version of search.py: start again with --rebuild"):
        opened(gallery, "--index", tmp_path / "index")


def test_an_index_of_another_gallery_is_refused(opened, gallery, tmp_path):
    opened(gallery, "--index", tmp_path / "index")
    shutil.copytree(gallery, tmp_path / "other")
    with pytest.raises(InputError, match="of the pictures in"):
        opened(tmp_path / "other", "--index", tmp_path / "index")


@pytest.mark.parametrize("damage", ["table", "vectors", "missing", "swapped"])
def test_a_damaged_index_is_one_sentence(damage, opened, gallery, tmp_path):
    words = ("--index", tmp_path / "index")
    opened(gallery, *words)
    (vectors,) = (tmp_path / "index").glob("vectors-*")
    table = tmp_path / "index" / "table.json"
    if damage == "table":
        table.write_text(table.read_text()[:100])
    elif damage == "vectors":
        vectors.write_bytes(vectors.read_bytes()[:300])
    elif damage == "missing":
        vectors.unlink()
    else:
        table.write_text(json.dumps({**json.loads(table.read_text()), "paths": ["a.jpg"]}))
    with pytest.raises(InputError, match="damaged.*--rebuild"):
        opened(gallery, *words)
    assert "6 encoded" in opened(gallery, *words, "--rebuild")[1][-1]


def test_an_index_that_is_saved_anew_while_it_is_opened_is_read_anew(opened, encoders, gallery, monkeypatch):
    """By who may only read it, and so takes no lock."""
    first, real = opened(gallery)[0], open

    def between(path, *more, **named):
        if str(path).endswith(first.file):
            monkeypatch.undo()
            shutil.copy(gallery / "0.jpg", gallery / "copy.jpg")
            (gallery / "1.jpg").unlink()
            opened(gallery)
        return real(path, *more, **named)

    monkeypatch.setattr("builtins.open", between)
    index = GalleryIndex.load(first.folder, gallery, encoders.fingerprint, encoders.width)
    assert "copy.jpg" in index.paths and "1.jpg" not in index.paths and len(index) == 6


def test_an_index_is_kept_in_a_folder_whose_name_is_not_utf8(opened, gallery, tmp_path):
    """As unpacked from an archive of another system: Python opens such a name, FAISS does not."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    index, _ = opened(gallery, "--index", folder)
    again, lines = opened(gallery, "--index", folder)
    assert "0 encoded, 0 removed, 6 kept" in lines[-1]
    assert again.paths == index.paths and np.array_equal(again.vectors(), index.vectors())


def test_an_index_is_saved_each_minute(home, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(update_module, "SAVE_PAUSE", -1)
    index = GalleryIndex(tmp_path, gallery, "mine", 2)
    sizes = []

    def encode(paths):
        for path in paths:
            table = tmp_path / "table.json"
            sizes.append(len(json.loads(table.read_text())["paths"]) if table.exists() else 0)
            yield [path], np.ones((1, 2), np.float32), {}

    found, *_ = scan(gallery)
    index.update(found, encode)
    assert sizes[:2] == [0, 1] and len(index) == 6  # while the second was encoded the first was on disk
