"""Checkpoints: saved in one step, loaded without the power to run code."""

import _codecs
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError, first_line
from utils.file_kinds import BEGINNING, kind_of
from utils.files import uninterrupted, whole_file

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net")  # where trainings' files hold weights
WRAPPED = ("module", "_orig_mod")  # what DataParallel and torch.compile put into a weight's name
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # whose shape is the parameter's
HOW = ("fused", "foreach", "capturable", "differentiable")  # PyTorch's words for ways to compute one step


def save_checkpoint(path, parts, **values):
    """Write {name: part.state_dict(), …, **values}; the file is whole or the earlier one stays.

    parts: model, optimizer and scheduler by name. values: plain numbers, words and lists.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    size = sum(tensor.nbytes for tensor in tensors(state))
    # the error of a signal, as that of a loading process's end, comes when the file is in its place
    with uninterrupted(), whole_file(path, size) as file:
        try:
            torch.save({**state, **values}, file)
        except RuntimeError as error:  # what PyTorch's zip writer makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(None, str(error).splitlines()[0]) from error


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(item)


def load_checkpoint(path):
    """What a best.pth or last.pth holds, on the CPU: ours or a published one. Runs no code of the file."""
    path = Path(path)
    try:
        state = load_plain(path)
    except InputError as error:
        raise InputError(f"{error}{_neighbours(path)}") from None
    except FileNotFoundError:
        there = _neighbours(path) or f" (no .pth file lies in {path.parent})"
        raise InputError(f"no checkpoint at {path}{there}") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {error}{_neighbours(path)}") from None
    except Exception as error:  # whatever PyTorch's readers trip over, the file is no checkpoint
        what = f"cannot be read as a checkpoint: {first_line(error)}"
        raise InputError(f"{path} {what}{_neighbours(path)}") from None
    weights = weights_in(state)
    if isinstance(weights, dict) and any(str(key).startswith("base_model.") for key in plain_names(weights)):
        state = {"model": weights} if weights is state else {**state, "model": weights}  # a fork's, too
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f'{path} is not a checkpoint of a run: it has no "model" part')
    state["model"] = plain_names(state["model"])
    return state


def weights_in(tree):
    """The state dict in what a training's file holds: under a name of WRAPPERS, or in the only dictionary of
    tensors; what is there itself where neither is."""
    for _ in range(9):  # a pickle may hold itself
        if not isinstance(tree, dict):
            break
        inner = [tree[name] for name in WRAPPERS if isinstance(tree.get(name), dict)]
        if not inner and not _has_tensors(tree):
            inner = [part for part in tree.values() if _has_tensors(part)]
            inner = inner if len(inner) == 1 else []
        if not inner:
            break
        tree = inner[0]
    return tree


def _has_tensors(tree):
    return isinstance(tree, dict) and any(isinstance(value, torch.Tensor) for value in tree.values())


def plain_names(weights):
    """A state dict without what DataParallel and torch.compile, of a model or of a part, put into names."""
    if not all(isinstance(key, str) for key in weights):
        return weights
    plain = {
        ".".join(part for part in key.split(".") if part not in WRAPPED): value
        for key, value in weights.items()
    }
    return plain if len(plain) == len(weights) else weights


# ---- reading without running ----


def load_plain(path, mapped=False):
    """What torch.save has written, on the CPU: tensors, plain objects, NumPy's numbers (as Python's) and
    arrays of numbers (as lists). Raises pickle.UnpicklingError with a reason of ours where there is more, or
    something else: PyTorch's own words advise to run the file's code, which no program here does.

    mapped: tensors stay in the file, mapped into memory, until they are copied. Raises InputError where the
    file is of another kind.
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
        raise pickle.UnpicklingError(f"it is damaged or holds more than weights{more}") from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise pickle.UnpicklingError("it is a TorchScript archive, a program with its weights") from None
        raise


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


def _neighbours(path):
    """' (that folder holds best.pth)': what may be taken instead of it."""
    names = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
    others = [name for name in names if name != path.name]
    return f" (that folder holds {', '.join(others)})" if others else ""


def fit_groups(optimizer, saved, model, weights, source):
    """A saved optimiser's state in the parameter groups of this one. They depend on the precision, so a run
    that goes on in another one has others; InputError where they are not those of any.

    weights: the checkpoint's, whose types tell in which precision it was saved.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved is None:
        raise InputError(
            f"{source} cannot be resumed: it holds weights and no optimizer part, as last.pth does"
        )
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes == own:
            return saved
        halves = {name for name, value in weights.items() if value.element_size() == 2}
        for kind in (halves.__contains__, lambda name: None):  # once, fp16 had the groups of fp32
            groups = _names_by_group(optimizer, model, kind)
            if [len(group) for group in groups] == sizes:
                return _regrouped(optimizer, saved, model, [name for group in groups for name in group])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise InputError(f"{source} cannot be resumed: its optimizer part is missing or damaged") from None
    why = "the published code makes one of each parameter; such a file is for test.py"
    if others := sorted({*weights} ^ {*model.state_dict()}):
        there = "there" if others[0] in weights else "missing"
        why = f"it is of another model, in which {others[0]} is {there}"
    raise InputError(
        f"{source} cannot be resumed: its optimiser has {len(sizes)} parameter groups, ours {len(own)} "
        f"({why})"
    )


def _names_by_group(optimizer, model, kind):
    """Names of the parameters in groups of one rate, decay and kind(name), in the order of the model."""
    rule = {
        id(parameter): (group.get("initial_lr", group["lr"]), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    groups = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in rule:
            groups.setdefault((*rule[id(parameter)], kind(name)), []).append(name)
    return list(groups.values())


def _regrouped(optimizer, saved, model, names):
    """names: of the parameters in the saved order."""
    places = [index for group in saved["param_groups"] for index in group["params"]]
    place_of = dict(zip(names, places, strict=True))
    group_of = {index: group for group in saved["param_groups"] for index in group["params"]}
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        found = [place_of[name_of[id(parameter)]] for parameter in group["params"]]
        numbers = range(number, number + len(found))
        pairs = zip(numbers, found, strict=True)
        state.update({n: saved["state"][place] for n, place in pairs if place in saved["state"]})
        groups.append({**group_of[found[0]], "params": list(numbers)})
        number += len(found)
    return {**saved, "state": state, "param_groups": groups}


def load_optimizer(optimizer, saved, source):
    """Load an optimiser's state where it fits: a misshapen moment makes PyTorch write beside it."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    try:
        for index, moments in saved["state"].items():
            for name, moment in moments.items():
                if name in MOMENTS and moment is not None and moment.shape != shapes[index]:
                    raise ValueError(f"{name} of parameter {index} is {list(moment.shape)}")
        # how a step is computed follows from this run's weights: fused in fp16 would be another recipe
        groups = [
            {**group, **{key: own[key] for key in HOW if key in own}}
            for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({**saved, "param_groups": groups})
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        reason = f"its optimizer part does not fit ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"{source} cannot be resumed: {reason}") from None


def load_weights(model, weights, source):
    """Load a state dict in full; a missing, superfluous or misshapen key is an error that names it."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    kinds = {key: value.is_floating_point() for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items() if isinstance(value, torch.Tensor)}
    differences = [f"{key} is missing" for key in own if key not in given]
    differences += [f"{key} has no place" for key in weights if key not in own]
    differences += [
        f"{key} is {list(given[key])}, not {list(own[key])}"
        for key in own
        if key in given and given[key] != own[key]
    ]
    differences += [
        f"{key} is {str(weights[key].dtype).removeprefix('torch.')}, not a floating-point number"
        for key in own
        if key in given and kinds[key] and not weights[key].is_floating_point()
    ]
    if differences:
        shown = "; ".join(differences[:3])
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(f"{source} does not fit the model: {shown}{more}")
    model.load_state_dict(weights)
