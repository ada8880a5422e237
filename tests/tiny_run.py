"""A run folder with the tiny model of tests/recipe.py and a drawn data set, for the tests of the tools."""

import pytest
import torch
import yaml

from datasets.synthetic import make_dataset
from tests.recipe import tiny_args, tiny_model


def missing(module, package, requirements="requirements-search.txt"):
    """A pytest mark: skips, with the command to run, where an optional package is not installed."""
    from importlib.util import find_spec

    reason = f"{package} is not installed: python -m pip install -r {requirements}"
    return pytest.mark.skipif(find_spec(module) is None, reason=reason)


needs_faiss = missing("faiss", "faiss-cpu")
QUERY = "a woman in a red coat"


def make_run(folder, loss_names="sdm+mlm+id", **options):
    """Writes configs.yaml and best.pth as train.py does; the data set lies in folder/data."""
    data = folder / "data"
    if not data.exists():
        make_dataset(data, "CUHK-PEDES", 3, 2, 6, 3)
    run = folder / "run"
    run.mkdir()
    args = tiny_args(loss_names, root_dir=data, num_workers=0, **options)
    saved = {key: value for key, value in vars(args).items() if key not in ("config_file", "debug")}
    (run / "configs.yaml").write_text(yaml.safe_dump(saved))
    model = tiny_model(loss_names, **options)
    torch.save({"model": model.state_dict(), "epoch": 1}, run / "best.pth")
    return run
