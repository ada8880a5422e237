"""Reading torch.save's files without the power to run code."""

import _codecs
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import torch

from utils.errors import InputError
from utils.file_kinds import BEGINNING, kind_of


def load_plain(path, mapped=False):
    """What torch.save has written, on the CPU: tensors, plain objects, NumPy's numbers (as Python's) and
    arrays of numbers (as lists). Raises InputError in words of ours where there is more, or something else:
    PyTorch's own advise to run the file's code, which no program here does.

    mapped: tensors stay in the file, mapped into memory, until they are copied.
    """
    refuse_other_files(path)
    try:
        with torch.serialization.safe_globals([*NUMPY, *PLAIN]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: they are read, or refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        more = f" ({named[1][:80]}): save its state_dict alone" if named else ""
        if "operand 149" in str(error):  # where a pickle of protocol 4 begins
            more = " (its pickle protocol is not torch.save's own: save it without pickle_protocol)"
        raise InputError(f"{path} is refused: it is damaged or holds more than weights{more}") from None
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        what = "it is a TorchScript archive, a program with its weights"
        raise InputError(f"{path} is refused: {what}") from None


class _Kind:
    """Stands for numpy.dtype in a file: the kind of a number, and of nothing else."""

    def __init__(self, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype[{name}]")
        self.name = name

    def __setstate__(self, state):
        self.dtype = np.dtype({">": ">"}.get(state[1], "<") + self.name)


class _Array(list):
    """Stands for what makes NumPy's arrays in a file: a list of numbers, or of lists of them."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        _, shape, kind, by_columns, data = state
        values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_columns else "C")
        self[:] = np.atleast_1d(values).tolist()


def _number(kind, data):
    return np.frombuffer(data, kind.dtype).item()


def _words(*parts):
    """Stands for a path of pathlib."""
    return "/".join(map(str, parts))


NUMPY = [  # in place of NumPy's own functions, which would also read objects; by their names before 2.0 too
    (_Kind, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_codecs.encode, "_codecs.encode"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
OPTIONS = (  # classes of options that trainings leave beside their weights, and nobody here reads
    "argparse.Namespace",
    "types.SimpleNamespace",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
PATHS = ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")
PLAIN = [  # stand-ins without any power of their own
    *((OrderedDict, name) for name in OPTIONS),
    *((_words, f"{room}.{kind}Path") for room in ("pathlib", "pathlib._local") for kind in PATHS),
]


def refuse_other_files(path):
    """InputError that says what a file is, where its first bytes are of something else than weights."""
    with open(path, "rb") as file:
        begin = file.read(BEGINNING)
    what = kind_of(begin)
    if begin.startswith(b"PK\3\4"):  # PyTorch's own files are zips
        what = None if zipfile.is_zipfile(path) else "cut short: its saving or its download did not end"
    elif not what and len(begin) > 8 and all(32 <= letter < 127 or letter in b"\t\n\r" for letter in begin):
        what = f'text, not weights: it begins with "{begin[:60].decode()}"'
    if what:
        raise InputError(f"{path} is {what}")
