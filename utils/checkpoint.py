"""Checkpoints: saved in one step, loaded without the power to run code."""

from pathlib import Path

import torch

from utils.errors import InputError, first_line
from utils.files import neighbours, uninterrupted, whole_file
from utils.plain_load import load_plain

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net")  # where trainings' files hold weights
WRAPPED = ("module", "_orig_mod")  # what DataParallel and torch.compile put into a weight's name


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
    except FileNotFoundError:
        there = neighbours(path, (".pth",)) or f" (no .pth file lies in {path.parent})"
        raise InputError(f"no checkpoint at {path}{there}") from None
    except Exception as error:  # whatever PyTorch's readers trip over, the file is no checkpoint
        ours = isinstance(error, InputError)
        what = error if ours else f"{path} cannot be read as a checkpoint: {first_line(error)}"
        raise InputError(f"{what}{neighbours(path, ('.pth',))}") from None
    weights = weights_in(state)
    if isinstance(weights, dict) and any(str(key).startswith("base_model.") for key in plain_names(weights)):
        state = {"model": weights} if weights is state else {**state, "model": weights}  # a fork's, too
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
        raise InputError(f'{path} is not a checkpoint of a run: it has no "model" part, names and weights')
    state["model"] = plain_names(model)
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


def load_weights(model, weights, source):
    """Load a state dict in full; a missing, superfluous or misshapen key is an error that names it."""
    own, differences = model.state_dict(), []
    for key, tensor in own.items():
        given = weights.get(key)
        if not isinstance(given, torch.Tensor):
            differences.append(f"{key} is missing")
        elif given.shape != tensor.shape:
            differences.append(f"{key} is {list(given.shape)}, not {list(tensor.shape)}")
        elif tensor.is_floating_point() and not given.is_floating_point():
            kind = str(given.dtype).removeprefix("torch.")
            differences.append(f"{key} is {kind}, not a floating-point number")
    differences += [f"{key} has no place" for key in weights if key not in own]
    if differences:
        shown = "; ".join(differences[:3])
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(f"{source} does not fit the model: {shown}{more}")
    model.load_state_dict(weights)
