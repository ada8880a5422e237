"""Fixtures of the tests of search.py, galleries and their indices: `pytest_plugins = "tests.galleries"`."""

import shutil

import pytest

from tests.conftest import load_script
from tests.tiny_run import make_run
from utils.tool_options import search_args


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_run(folder)
    return folder


@pytest.fixture
def gallery(home, tmp_path):
    """A copy of a few pictures, one in a sub-folder, that a test may change."""
    images = sorted((home / "data" / "CUHK-PEDES" / "imgs").rglob("*.jpg"))[:6]
    (tmp_path / "gallery" / "below").mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, tmp_path / "gallery" / ("below" if number == 5 else ".") / f"{number}.jpg")
    return tmp_path / "gallery"


@pytest.fixture
def search(home, tmp_path, capsys):
    """Calls search.py on the tiny run with an index of the test's own; gives status, stdout, stderr."""
    script = load_script("search")

    def call(*words, run=home / "run", index=tmp_path / "index"):
        words = ["--config_file", run, "--device", "cpu", *(["--index", index] if index else []), *words]
        status = script.main([*map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="session")
def encoders(home):
    from retrieval.encoders import open_run

    return open_run(
        search_args(["--config_file", str(home / "run"), "--device", "cpu", "--gallery", str(home)])
    )


@pytest.fixture
def opened(home, encoders, tmp_path):
    """Calls open_gallery as search.py does, with the index in the run; gives the index and the lines."""
    from retrieval.gallery import open_gallery

    run = shutil.copytree(home / "run", tmp_path / "run")

    def call(folder, *words, **more):
        lines = []
        words = ["--config_file", run, "--device", "cpu", "--gallery", folder, "--encode_batch", 4, *words]
        return open_gallery(encoders, search_args([*map(str, words)]), lines.append, **more), lines

    return call
