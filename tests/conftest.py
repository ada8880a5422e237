"""What several test files share."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest

# before PyTorch is loaded: on busy cores, threads that spin while they wait make the tests ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parent.parent


def load_script(name):
    """train.py or test.py as a module; `import test` would find Python's own package of that name."""
    spec = importlib.util.spec_from_file_location(f"irra_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train_script():
    return load_script("train")


@pytest.fixture(scope="session")
def test_script():
    return load_script("test")


@pytest.fixture(autouse=True)
def clean_logger():
    """A run points the logger at its folder; the next test starts without that."""
    yield
    logger = logging.getLogger("IRRA")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
