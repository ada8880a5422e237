"""A gallery: which of its files are searched, and that its index keeps up with whatever happens to them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from retrieval import encoders as encoders_module
from retrieval import gallery as gallery_module
from retrieval import pictures
from retrieval.encoders import Encoders
from retrieval.gallery import Stamp, locked
from retrieval.page import Page
from retrieval.pictures import agree, scan, settled
from tests.conftest import PATIENCE, ROOT
from tests.tiny_run import QUERY, needs_faiss
from utils.errors import InputError
from utils.options import INDEX_TYPES

pytest_plugins = "tests.galleries"
pytestmark = needs_faiss
ALL = {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", os.path.join("below", "5.jpg")}
AS_IT_WAS = "0 encoded, 0 removed, 6 kept"


def found_in(index):
    """{relative path} of all that a search lists."""
    (hits,), _ = index.find(index.vectors()[:1], 999, duplicates=True)
    return {hit.path for hit in hits}


# ---- which files are searched ----


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_a_pipe_is_not_opened(opened, gallery):
    os.mkfifo(gallery / "pipe.jpg")
    assert found_in(opened(gallery)[0]) == ALL


def test_linked_folders_are_searched_each_once(opened, gallery, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.open(gallery / "0.jpg").rotate(180).save(tmp_path / "elsewhere" / "linked.jpg")
    (gallery / "more").symlink_to(tmp_path / "elsewhere")
    (gallery / "again").symlink_to(tmp_path / "elsewhere")
    (gallery / "loop").symlink_to(gallery)
    found = found_in(opened(gallery)[0])
    assert len(found) == 7 and found - ALL < {os.path.join(name, "linked.jpg") for name in ("more", "again")}


@pytest.mark.parametrize("folder", ["@eaDir", "below/@eaDir/0.jpg", "#recycle", "$RECYCLE.BIN", ".Trash"])
def test_thumbnails_and_what_was_deleted_are_not_searched(folder, gallery):
    before = scan(gallery)
    (gallery / folder).mkdir(parents=True)
    shutil.copy(gallery / "0.jpg", gallery / folder / "thumbnail.jpg")
    assert scan(gallery) == before


@pytest.mark.parametrize(
    "names, said",
    [
        ([], "there is no picture in .* or below it$"),
        (["notes.txt"], r"no picture in .* or below it \(1 files, none with a picture's suffix\)$"),
        (["IMG_1.HEIC"], r"; \.heic are not read here: export them as JPEG first$"),
        (["a.CR2", "b.jxl", "c.txt"], r"; \.cr2 and \.jxl are not read here: export them as JPEG first$"),
        (["notes.txt", "a.jpg"], "none of the 1 files in .* is a picture that can be read"),
    ],
)
def test_a_folder_without_a_picture_is_refused_and_a_format_of_phones_or_cameras_named(
    names, said, opened, tmp_path
):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_text("text")
    with pytest.raises(InputError, match=said):
        opened(tmp_path / "folder")


def test_an_unreadable_picture_is_a_line_and_the_search_goes_on(opened, gallery):
    (gallery / "broken.jpg").write_bytes((gallery / "0.jpg").read_bytes()[:900])
    (gallery / "text.png").write_text("not a picture")
    (gallery / "notes.txt").write_text("nor meant as one")
    index, lines = opened(gallery)
    assert len(index) == 6
    for name in ("broken.jpg", "text.png"):
        assert sum("passed over" in line and name in line for line in lines) == 1
    assert "0 encoded, 0 removed, 6 kept; 2 unreadable as before" in opened(gallery)[1][-1]

    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "broken.jpg")  # mended
    assert "1 encoded, 0 removed, 6 kept; 1 unreadable as before" in opened(gallery)[1][-1]


def test_copies_of_a_file_that_is_no_picture_are_named_each_and_read_once(opened, gallery):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (gallery / name).write_text("no picture")
    index, lines = opened(gallery)
    assert len(index) == 6 and sum("passed over" in line for line in lines) == 3
    assert sum("holds the same as" in line for line in lines) == 2
    _, lines = opened(gallery)
    assert "3 unreadable as before" in lines[-1] and not any("passed over" in line for line in lines)


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(13, "Permission denied"), "(Permission denied)"),
        (OSError(5, "Input/output error"), "(Input/output error)"),
        (MemoryError(), "not enough memory to read the picture"),
    ],
    ids=["permission", "input/output error", "memory"],
)
def test_a_file_that_could_not_be_read_is_tried_again_and_no_picture_is_not(
    error, said, opened, gallery, monkeypatch
):
    (gallery / "text.jpg").write_text("no picture")
    real = encoders_module.open_image

    def refuse(path):
        if str(path).endswith("0.jpg"):
            raise error
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(encoders_module, "open_image", refuse)
        *_, first, second, last = opened(gallery)[1]
    assert "passed over" in first and said in first and "passed over" in second and "text.jpg" in second
    assert "5 pictures" in last and "as before" not in last
    assert "1 encoded, 0 removed, 5 kept; 1 unreadable as before" in opened(gallery)[1][-1]


# ---- the index keeps up ----


def test_only_new_and_changed_pictures_are_encoded_and_removed_ones_leave(
    opened, encoders, gallery, monkeypatch
):
    assert "6 encoded, 0 removed, 0 kept" in opened(gallery)[1][-1]
    with monkeypatch.context() as patched:
        patched.setattr(Encoders, "pixels", lambda self, path: pytest.fail(f"{path} is read again"))
        assert AS_IT_WAS in opened(gallery)[1][-1]

    Image.open(gallery / "0.jpg").rotate(180).save(gallery / "new.jpg")
    (gallery / "1.jpg").unlink()
    Image.open(gallery / "3.jpg").convert("L").save(gallery / "2.jpg")
    index, lines = opened(gallery)
    assert "6 pictures" in lines[-1] and "2 encoded, 1 removed, 4 kept" in lines[-1]
    features = encoders.image_features([encoders.pixels(gallery / "2.jpg")])
    found = [path for _, path in index.search(features, 99)[0]]
    assert found[0] == "2.jpg" and "1.jpg" not in found and len(found) == 6


def test_renamed_touched_and_copied_pictures_are_known_by_their_content(opened, gallery):
    opened(gallery)
    (gallery / "below").rename(gallery / "under")
    (gallery / "0.jpg").rename(gallery / "zero.jpg")
    os.utime(gallery / "1.jpg")
    shutil.copy(gallery / "2.jpg", gallery / "two.jpg")
    (gallery / "3.jpg").unlink()
    index, lines = opened(gallery)
    assert "0 encoded, 1 removed, 3 kept, 3 known by content" in lines[-1]
    expected = {"1.jpg", "2.jpg", "4.jpg", "two.jpg", "zero.jpg", os.path.join("under", "5.jpg")}
    assert found_in(index) == expected == set(index.paths)


@pytest.mark.parametrize("pause", [0, 0.4], ids=["at once", "later"])
def test_a_picture_replaced_by_one_of_its_size_and_time_is_noticed(
    pause, opened, encoders, gallery, monkeypatch
):
    """As tar, rsync and cp -p leave it. At once: in the same tick of the clock, for all that is known."""
    monkeypatch.setattr(pictures, "COARSE", 200_000_000)  # ns
    Image.open(gallery / "1.jpg").rotate(180).save(gallery / "other.jpg")
    path, states = gallery / "0.jpg", [(gallery / name).read_bytes() for name in ("0.jpg", "other.jpg")]
    for data in states:
        path.write_bytes(data.ljust(max(map(len, states)), b"\0"))  # bytes after a JPEG's end are not read
        os.utime(path, (1e9, 1e9))
        if data is states[0]:
            size = path.stat().st_size
            time.sleep(pause)
            index, _ = opened(gallery)
    assert path.stat().st_size == size and not index.is_there("0.jpg") and index.is_there("1.jpg")
    index, lines = opened(gallery)
    assert "1 encoded, 0 removed, 6 kept" in lines[-1]
    features = encoders.image_features([encoders.pixels(gallery / "other.jpg")])
    assert {name for _, name in index.search(features, 2, duplicates=True)[0]} == {"0.jpg", "other.jpg"}


def test_a_file_that_changed_just_before_it_was_read_is_compared_next_time():
    """On a clock that ticks every two seconds, as FAT's, it can change once more without a new time."""
    tick = 1_800_000_000 * 10**9
    early, late = Stamp(9, 5, tick - 10**10), Stamp(9, 5, tick)
    assert agree(settled(early, tick), early) and not agree(settled(late, tick + 10**9), late)
    assert agree(settled(late, tick + 3 * 10**9), late) and not agree(early, late)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_whatever_happens_to_a_gallery_its_index_answers_as_a_new_one(
    kind, seed, opened, encoders, gallery, tmp_path
):
    draw = random.Random(seed)

    def happens():
        files = sorted(path for path in gallery.rglob("*.jpg"))
        path, other = draw.choice(files), draw.choice(files)
        fresh = gallery / f"{draw.randrange(10**6)}.jpg"
        what = draw.randrange(6)
        if what == 0 and len(files) > 3:
            path.unlink()
        elif what == 1:
            shutil.copy(path, fresh)
        elif what == 2:
            path.rename(fresh)
        elif what == 3:
            os.utime(path)
        elif what == 4:
            shutil.copy2(path, other) if path != other else None
        else:
            Image.open(path).rotate(draw.choice([90, 180, 270]), expand=True).save(other)

    features = encoders.text_features([QUERY, "a man"])
    for turn in range(6):
        for _ in range(draw.randrange(1, 4)):
            happens()
        index, _ = opened(gallery, "--index_type", kind, "--index", tmp_path / "kept")
        new, _ = opened(gallery, "--index_type", kind, "--index", tmp_path / f"new{turn}")
        (kept, gone), (fresh, _) = index.find(features, 99, True), new.find(features, 99, True)
        assert gone == 0 and index.paths == new.paths and index.faiss.ntotal == new.faiss.ntotal
        for a, b in zip(kept, fresh, strict=True):
            assert [hit.path for hit in a] == [hit.path for hit in b]
            assert np.allclose([hit.similarity for hit in a], [hit.similarity for hit in b], atol=1e-6)


def test_what_has_gone_or_changed_since_the_index_was_made_is_not_shown(opened, encoders, gallery):
    shutil.copy(gallery / "2.jpg", gallery / "copy.jpg")
    index, _ = opened(gallery)
    features = encoders.text_features([QUERY])
    best = [path for _, path in index.search(features, 6)[0] if "2" not in path]
    (gallery / best[0]).unlink()
    Image.open(gallery / best[2]).rotate(180).save(gallery / best[1])
    (gallery / "2.jpg").unlink()
    (hits,), lost = index.find(features, 4)
    assert lost == 3 and [hit.path for hit in hits if hit.path != "copy.jpg"] == best[2:5]
    assert [hit.copies for hit in hits] == [0] * 4  # of the two copies one is left
    page = Page(encoders, index, 4, 9)
    result, tiles, remark = page.search(QUERY, None)
    assert result.names == [hit.path for hit in hits] and len(tiles) == 4
    assert "3 pictures gone or changed since" in remark
    gallery.rename(gallery.parent / "unplugged")
    result, tiles, remark = page.search(QUERY, None)
    assert not tiles and not result.pictures and "none of the pictures is there as it was" in remark


@pytest.mark.parametrize("function", ["scandir", "stat"], ids=["not listed", "not entered"])
def test_a_folder_that_cannot_be_looked_at_for_a_moment_keeps_its_features(
    function, opened, gallery, monkeypatch
):
    """As root nothing is forbidden, so the system's answer is put in its place."""
    opened(gallery)
    real = getattr(os, function)

    def look(path, *words, **more):
        if f"{os.sep}below{os.sep}" in f"{path}{os.sep}":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, look)
        index, lines = opened(gallery)
        assert "below cannot be read (Permission denied): what is known of it stays" in lines[0]
        assert AS_IT_WAS in lines[-1] and found_in(index) == ALL
    assert AS_IT_WAS in opened(gallery)[1][-1]


@pytest.mark.parametrize("how", ["linked pictures", "a linked folder"])
def test_a_disk_that_links_lead_to_keeps_its_features_while_it_is_away(how, opened, gallery, tmp_path):
    disk = (gallery / "below").rename(tmp_path / "disk")
    shutil.copy(gallery / "4.jpg", disk / "same.jpg")
    if how == "linked pictures":
        (gallery / "below").mkdir()
        for path in disk.iterdir():
            (gallery / "below" / path.name).symlink_to(path)
        links = "2 links to nothing, e.g. below/"
    else:
        (gallery / "below").symlink_to(disk)
        links = "1 link to nothing, e.g. below:"
    whole, lines = opened(gallery)
    same = os.path.join("below", "same.jpg")
    assert found_in(whole) == ALL | {same} and "6 encoded, 0 removed, 0 kept, 1 known by content" in lines[-1]
    disk.rename(tmp_path / "unplugged")
    index, lines = opened(gallery)
    (hits,), lost = index.find(index.vectors()[:1], 999, duplicates=True)
    assert {hit.path for hit in hits} == ALL - {os.path.join("below", "5.jpg")} and lost == 0
    assert links in lines[0] and "0 encoded, 0 removed, 7 kept" in lines[-1]
    (tmp_path / "unplugged").rename(disk)
    index, lines = opened(gallery)
    assert found_in(index) == found_in(whole) and "0 encoded, 0 removed, 7 kept" in lines[-1]


def test_nothing_stays_of_a_folder_or_a_link_that_is_removed(opened, gallery):
    (gallery / "link.jpg").symlink_to(gallery / "below" / "5.jpg")
    opened(gallery)
    shutil.rmtree(gallery / "below")
    (gallery / "link.jpg").unlink()
    lines = opened(gallery)[1]
    assert "5 pictures" in lines[-1] and "2 removed, 5 kept" in lines[-1]


def test_a_gallery_of_links_to_nothing_says_so(opened, tmp_path):
    (tmp_path / "annex").mkdir()
    (tmp_path / "annex" / "0.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"no picture in .* \(1 link to nothing, e\.g\. 0\.jpg: is their disk"
    ):
        opened(tmp_path / "annex")


def test_a_known_picture_that_cannot_be_read_for_a_moment_stays(opened, gallery, monkeypatch):
    opened(gallery)
    os.chmod(gallery / "0.jpg", 0)  # which moves the time of its change, and no other

    def forbidden(path, *words, **more):
        if str(path).endswith("0.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "open", forbidden, raising=False)
        patched.setattr(encoders_module, "open_image", forbidden)
        index, lines = opened(gallery)
        assert AS_IT_WAS in lines[-1] and "0.jpg" in found_in(index)
    os.chmod(gallery / "0.jpg", 0o644)
    assert AS_IT_WAS in opened(gallery)[1][-1]


# ---- where it is kept ----


def test_without_index_it_is_kept_in_the_run_and_the_run_moves_with_it(home, search, gallery, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    assert search("--gallery", gallery, run=run, index=None)[0] == 0
    assert list((run / "search").glob("gallery-*/table.json"))
    run = run.rename(tmp_path / "moved")
    assert AS_IT_WAS in search("--gallery", gallery, run=run / "configs.yaml", index=None)[2]


def test_an_index_that_cannot_be_kept_answers_from_memory(opened, gallery, tmp_path):
    """Its place is a file: known before the pictures are encoded."""
    (tmp_path / "file").write_text("")
    index, (before, after) = opened(gallery, "--index", tmp_path / "file" / "index")
    assert "cannot make the folder" in before and before.endswith("the index stays in memory")
    assert found_in(index) == ALL and "6 pictures in memory: 6 encoded" in after


def test_a_disk_that_fills_up_while_the_index_is_written_costs_no_answer(
    opened, gallery, monkeypatch, tmp_path
):
    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        index, lines = opened(gallery, "--index", tmp_path / "index")
    assert "No space left on device" in lines[0] and "the answer comes from memory" in lines[0]
    assert found_in(index) == ALL and "6 pictures in memory: 6 encoded" in lines[-1]
    assert [path.name for path in (tmp_path / "index").iterdir()] == [".lock"]


def test_two_programs_take_turns_at_an_index(tmp_path):
    order, waits = [], threading.Event()

    def second():
        with locked(tmp_path, lambda line: waits.set()):
            order.append("second")

    with locked(tmp_path, order.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(PATIENCE)
        order.append("first")
    thread.join(PATIENCE)
    assert order == ["first", "second"]


def test_a_gallery_that_moved_takes_its_index_along(opened, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COARSE", -(10**12))  # as if all files had been there for long
    opened(gallery)
    old = gallery.rename(tmp_path / "elsewhere")
    index, lines = opened(old)
    assert AS_IT_WAS in lines[-1] and f"6 of its 6 pictures lie in {old} now" in lines[0]
    assert len(list((tmp_path / "run" / "search").iterdir())) == 1
    # another gallery at the old place is another gallery, and the moved one keeps what it has
    gallery.mkdir()
    Image.open(old / "0.jpg").rotate(180).save(gallery / "0.jpg")
    assert "1 encoded, 0 removed, 0 kept" in opened(gallery)[1][-1]
    assert AS_IT_WAS in opened(old)[1][-1]
    assert found_in(index) == ALL


@pytest.mark.parametrize("place", ["run", "index"])
def test_a_disk_that_is_mounted_elsewhere_is_recognised_though_its_old_place_is_still_there(
    place, opened, gallery, tmp_path
):
    """Copied byte by byte, with other times, and its sub-folder renamed."""
    words = ("--index", tmp_path / "index") if place == "index" else ()
    opened(gallery, *words)
    other = tmp_path / "media"
    (other / "under").mkdir(parents=True)
    for path in gallery.rglob("*.jpg"):
        copy = other / ("under" if path.parent != gallery else ".") / path.name
        shutil.copyfile(path, copy)
        os.utime(copy, (1, 1))
        path.unlink()
    index, lines = opened(other, *words)
    assert index.gallery == str(other)
    assert "0 encoded, 0 removed, 5 kept, 1 known by content" in lines[-1]
    assert os.path.join("under", "5.jpg") in found_in(index)
    assert AS_IT_WAS in opened(other, *words)[1][-1]


def test_a_gallery_by_the_name_of_a_link_is_the_same_gallery(opened, gallery, tmp_path):
    opened(gallery, "--index", tmp_path / "index")
    opened(gallery)
    (tmp_path / "link").symlink_to(gallery)
    for words in ((), ("--index", tmp_path / "index")):
        assert AS_IT_WAS in opened(tmp_path / "link", *words)[1][-1]
        assert AS_IT_WAS in opened(gallery, *words)[1][-1]


def test_an_index_whose_disk_is_away_is_not_given_to_another_gallery(opened, gallery, tmp_path):
    opened(gallery)
    opened(gallery, "--index", tmp_path / "index")
    other = tmp_path / "other"
    other.mkdir()
    for path in gallery.glob("*.jpg"):
        Image.open(path).rotate(180).save(other / path.name)
    away = gallery.rename(tmp_path / "unplugged")
    _, lines = opened(other)
    assert "5 encoded, 0 removed, 0 kept" in lines[-1]
    with pytest.raises(InputError, match="which are not there now, and most are not in"):
        opened(other, "--index", tmp_path / "index")
    away.rename(gallery)
    for words in ((), ("--index", tmp_path / "index")):
        assert AS_IT_WAS in opened(gallery, *words)[1][-1]


# ---- an update that is interrupted ----


def test_an_interrupted_start_keeps_what_was_encoded(opened, gallery, monkeypatch):
    encode = Encoders.image_features

    def stopped(self, pictures):
        if len(pictures) == 2:  # the second batch: four and two
            raise KeyboardInterrupt
        return encode(self, pictures)

    with monkeypatch.context() as patched:
        patched.setattr(Encoders, "image_features", stopped)
        with pytest.raises(KeyboardInterrupt):
            opened(gallery)
    assert "2 encoded, 0 removed, 4 kept" in opened(gallery)[1][-1]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1],  # one of each kind
    ids=lambda number: number.name,
)
def test_a_program_that_a_signal_ends_keeps_what_has_been_encoded(number, home, gallery, tmp_path):
    """Batches of one picture; the signal comes from the program itself, after the third."""
    code = f"""
import signal, sys
from retrieval.encoders import Encoders
import search
encode, calls = Encoders.image_features, []
def signalled(self, pictures):
    calls.append(pictures)
    if len(calls) == 4:
        signal.raise_signal({int(number)})  # to this thread: at once, however busy the others are
    return encode(self, pictures)
Encoders.image_features = signalled
sys.exit(search.main(sys.argv[1:]))
"""
    words = ["--config_file", home / "run", "--device", "cpu", "--gallery", gallery, "--encode_batch", "1"]
    words += ["--index", tmp_path / "index"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    table = json.loads((tmp_path / "index" / "table.json").read_text())
    assert len(table["paths"]) == 3


def test_an_update_that_is_interrupted_forgets_nothing_of_a_gallery_that_moved(
    opened, gallery, tmp_path, monkeypatch
):
    opened(gallery)
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(gallery.rglob("*.jpg"))):
        (other / f"renamed{number}.jpg").write_bytes(path.read_bytes())
    Image.open(other / "renamed0.jpg").rotate(180).save(other / "new.jpg")
    shutil.rmtree(gallery)
    other.rename(gallery)

    def interrupted(self, pictures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Encoders, "image_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(gallery)
    _, lines = opened(gallery)
    assert "1 encoded" in lines[-1] and "6 kept" in lines[-1]


def test_a_program_of_ones_own_opens_a_gallery_without_a_bar(opened, gallery, monkeypatch):
    shown, bar = [], gallery_module.progress_bar

    def watched(total, what, is_shown, **more):
        shown.append(is_shown)
        return bar(total, what, is_shown, **more)

    monkeypatch.setattr(gallery_module, "progress_bar", watched)
    for more in ({}, {"progress": False}):
        index, _ = opened(gallery, "--rebuild", **more)
        assert isinstance(index, gallery_module.GalleryIndex) and len(index) == 6
    assert shown == [True, False]
