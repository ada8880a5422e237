"""Packages that training does not need. A missing one is a sentence that names the command."""

import importlib

from utils.errors import InputError

PACKAGES = {  # where the package's name is not the module's
    "faiss": "faiss-cpu",
    "sklearn.mixture": "scikit-learn",
}


def extra(module, requirements="requirements-search.txt"):
    """The module, imported; requirements: the file that lists its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module, module.split(".")[0])
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        what = "is not installed" if missing else f"does not load ({error})"
        raise InputError(
            f"this needs the package {package}, which {what}: python -m pip install -r {requirements}"
        ) from None
