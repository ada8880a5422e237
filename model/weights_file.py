"""A file of weights of any kind to named tensors.

No code of a file runs: state dicts load with weights_only, of a TorchScript archive only the tensors are
read. Files are mapped into memory, not copied: what is there twice for a moment is the disk's cache.
"""

import json
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch

from utils.checkpoint import plain_names, weights_in
from utils.errors import InputError, first_line
from utils.plain_load import load_plain, refuse_other_files

POSITIONS_GRID = "image_positions"  # in the header of an exported safetensors file: "24x8", rows x columns


def read_file(path):
    """What lies in a file of any kind, as torch.load gives it: safetensors, a state dict, what holds one, an
    archive of TorchScript such as OpenAI's, or the index of a model in several files. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file of weights at {path}")
    if shard := re.search(r"-(\d{5})-of-(\d{5})\.", path.name):
        raise InputError(
            f"{path} is one of {int(shard[2])} files of a model: give the folder, or the index.json in it"
        )
    try:
        if path.suffix == ".json":
            return {key: value for shard in _present(path) for key, value in _read(shard).items()}
        return _read(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {first_line(error)}") from None
    except Exception as error:  # whatever a parser trips over, the file is not CLIP weights
        raise InputError(f"{path} cannot be read as CLIP weights ({first_line(error)})") from None


def _read(path):
    safetensors = _is_safetensors(path)
    if not safetensors:
        refuse_other_files(path)
    if safetensors or path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if not zipfile.is_zipfile(path):
        return load_plain(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next((name.rsplit("/", 1)[0] for name in names if name.endswith("/constants.pkl")), None)
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        if root:
            return _read_torchscript(path, archive, root)
        if not any(name.endswith("data.pkl") for name in names):
            arrays = any(name.endswith(".npy") for name in names)
            what = "arrays of NumPy, as SigLIP's of big_vision (JAX)" if arrays else ", ".join(names[:3])
            raise InputError(
                f"{path} is a zip of other files ({what or 'none'}), not PyTorch's file of weights"
            )
    return load_plain(path, mapped=stored)


def _is_safetensors(path):
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and struct.unpack("<Q", begin[:8])[0] < path.stat().st_size


def shards(index):
    """Names of the files that an index.json lists, all of which lie beside it."""
    try:
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        plain = files and all(Path(name).name == name for name in files)
    except (ValueError, TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise InputError(
            f"{index} is not the index of a model in several files: it has no weight_map of names"
        )
    return files


def _present(index):
    """Paths of the files that an index.json lists."""
    names = shards(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index} lists files that are not beside it ({_named(missing)}): an index alone holds no weights"
        )
    return [index.parent / name for name in names]


# a weight of every image encoder, behind what is before the names of the model that it belongs to
OF_IMAGES = re.compile(
    r"(.*?)(base_model\.)?(visual\.conv1\.weight|vision_model\.embeddings\.class_embedding)"
)


def named_tensors(tree, path):
    """(the state dict of a CLIP in what a file holds, the names of what lies beside it).

    Names are without what a training put before them, as in `backbone.visual.…` beside `criterion.…`. Raises
    InputError where there are several models.
    """
    tree = weights_in(tree)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{path} is not a state dict of CLIP: it holds no named tensors")
    tensors = {key: value for key, value in plain_names(tree).items() if isinstance(value, torch.Tensor)}
    if tree and not tensors:
        raise InputError(f"{path} is not a state dict of CLIP: it holds no named tensors, but {_named(tree)}")
    prefixes = {match[1] for key in tensors if (match := OF_IMAGES.fullmatch(key))}
    if len(prefixes) > 1 and "" not in prefixes:
        raise InputError(
            f"{path} holds several models ({_named(sorted(prefixes))}): save the state dict of one of them "
            "alone"
        )
    if not prefixes:  # another model, which its family's name is to tell, wrapped as a whole or not
        tensors = {re.sub(r"^((clip_)?model\.|clip\.)+", "", key): value for key, value in tensors.items()}
    prefix = min(prefixes, default="")
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return own, [key for key in tensors if not key.startswith(prefix)]


def _named(names):
    first = ", ".join(map(str, [*names][:5]))
    return first + (", …" if len(names) > 5 else "")


# ---- TorchScript archives ----


STORAGES = {  # types of storages that a pickle names
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Inert:
    """Stands in for every other class and function that a pickle names; keeps its state, does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads the attributes of a TorchScript module; only the names of tensors and storages mean anything."""

    def __init__(self, path, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "collections" and name == "OrderedDict":
            return dict
        return _Inert

    def persistent_load(self, saved):
        _, dtype, key, _, numel = saved
        if not numel:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes(key), dtype=dtype, count=numel)

    def _bytes(self, key):
        """A storage's bytes where they lie in the mapped file; its check sum is compared, as zipfile does."""
        entry = self.archive.getinfo(f"{self.root}/data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            return bytearray(self.archive.read(entry))
        # the local header, which ends with a name and an extra field of the lengths that it says
        lengths = struct.unpack_from("<HH", self.map, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)
        data = memoryview(self.map)[start : start + entry.file_size]
        if len(data) != entry.file_size or zlib.crc32(data) != entry.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {entry.filename!r}")
        return data


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)  # raises where it would reach outside the storage


def _read_torchscript(path, archive, root):
    tree = _ArchiveUnpickler(path, archive, root).load()
    weights, stack, seen = {}, [("", tree)], set()
    while stack:
        prefix, node = stack.pop()
        if id(node) in seen:  # a module within itself, which no archive of OpenAI's has
            continue
        seen.add(id(node))
        for name, value in getattr(node, "state", {}).items():
            if isinstance(value, torch.Tensor):
                weights[prefix + name] = value
            elif isinstance(value, _Inert):
                stack.append((f"{prefix}{name}.", value))
    return weights


# ---- what a file says of itself ----


def stored_grid(path):
    """(rows, columns) of the image positions where a safetensors file's header says so, as exports do."""
    if Path(path).suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(POSITIONS_GRID, "")
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return tuple(map(int, found.groups())) if found else None
