"""Packages that training does not need. A missing one is a sentence that names the command."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.errors import InputError

ROOT = Path(__file__).parents[1]

PACKAGES = {  # where the package's name is not the module's
    "faiss": "faiss-cpu",
    "sklearn.mixture": "scikit-learn",
}


def extra(module, requirements="requirements-search.txt"):
    """The module, imported; requirements: the file that lists its package."""
    package = PACKAGES.get(module, module.split(".")[0])
    if older := too_old(package, requirements):
        raise InputError(f"{older}: python -m pip install -r {requirements}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        what = "is not installed" if missing else f"does not load ({error})"
        raise InputError(
            f"this needs the package {package}, which {what}: python -m pip install -r {requirements}"
        ) from None


def too_old(package, requirements):
    """A sentence about a package that is older than the file asks for, whose functions may be others; or
    None, too where it does not say which it is."""
    try:
        listed, here = (ROOT / requirements).read_text(encoding="utf-8"), version(package)
        wanted = re.search(rf"^{re.escape(package)}>=([\d.]+)", listed, re.MULTILINE)[1]
        older = numbers(here) < numbers(wanted)
    except (OSError, PackageNotFoundError, KeyError, TypeError):
        return None
    return f"this needs the package {package} from {wanted} on, and {here} is installed" if older else None


def numbers(text):
    return [int(number) for number in re.match(r"[\d.]*\d", text)[0].split(".")]
