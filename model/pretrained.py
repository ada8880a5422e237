"""CLIP's pretrained weights: fetched, read without running code, and fitted to the image size."""

import hashlib
import http.client
import logging
import math
import pickle
import re
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from model.clip_model import CLIP, VisionTransformer
from model.clip_resnet import ModifiedResNet
from utils.checkpoint import load_plain, load_weights
from utils.errors import InputError
from utils.files import whole_file

# OpenAI's archives, https://github.com/openai/CLIP; the folder in the address is the file's SHA-256
_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
CHECKPOINTS = {
    "RN50": f"{_ADDRESS}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": f"{_ADDRESS}/8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": f"{_ADDRESS}/7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": f"{_ADDRESS}/52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": f"{_ADDRESS}/be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": f"{_ADDRESS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{_ADDRESS}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{_ADDRESS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}
IGNORED = ("logit_scale", "input_resolution", "context_length", "vocab_size")  # in the archives, not in IRRA
POSITIONS_GRID = "image_positions"  # in the header of an exported safetensors file: "24x8", rows x columns
logger = logging.getLogger("IRRA.model")


# ---- getting the file ----


def download(name, cache=None):
    """Path of an OpenAI archive in the cache (~/.cache/clip), downloaded once and checked by SHA-256."""
    address = CHECKPOINTS[name]
    digest, filename = address.split("/")[-2:]
    try:
        target = Path(cache or Path.home() / ".cache" / "clip") / filename
    except RuntimeError:
        raise InputError(
            f"{name} would be kept in ~/.cache/clip, but this user has no home folder: set HOME, or fetch "
            f"{address} and give --pretrain_choice its path"
        ) from None
    by_hand = f"fetch {address} on another machine and put it at {target}, or give --pretrain_choice its path"
    if target.is_file():
        if sha256(target) == digest:
            return target
        raise InputError(
            f"{target} is not OpenAI's {name} (its SHA-256 differs): delete it to download it anew"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {target.parent} ({error.strerror}): {by_hand}") from None
    with whole_file(target) as file:
        try:
            with urllib.request.urlopen(address, timeout=30) as source:
                _copy(source, file, name)
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"cannot download {name} ({reason}): {by_hand}") from None
        file.flush()
        if sha256(file.name) != digest:
            raise InputError(
                f"the download of {name} came out damaged (its SHA-256 differs): try again, or {by_hand}"
            )
    return target


def _copy(source, file, name):
    from tqdm import tqdm

    total = int(source.headers.get("Content-Length") or 0) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"CLIP {name}", file=sys.stderr) as bar:
        while block := source.read(1 << 20):
            file.write(block)
            bar.update(len(block))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- reading the file ----


def read_weights(path):
    """{name: tensor} from safetensors, a plain state dict, or a TorchScript archive such as OpenAI's.

    No code of the file runs: state dicts load with weights_only, and of a TorchScript archive only the
    tensors are read (torch.jit.load would compile the program that lies beside them).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"--pretrain_choice {path} is neither a file nor one of {', '.join(CHECKPOINTS)}, random"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        elif zipfile.is_zipfile(path) and (root := _torchscript_root(path)):
            weights = _read_torchscript(path, root)
        else:
            weights = load_plain(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {_first(error)}") from None
    except Exception as error:  # whatever a parser trips over, the file is not CLIP weights
        raise InputError(f"{path} cannot be read as CLIP weights ({_first(error)})") from None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{path} is not a state dict of CLIP: it holds no named tensors")
    return weights


def _first(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _torchscript_root(path):
    """The archive's top folder if it is a TorchScript archive (those have constants.pkl), else None."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/constants.pkl"):
                return name.rsplit("/", 1)[0]


class _Inert:
    """Stands in for every class and function that a pickle names; holds what it is given, does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _Storage:
    """A storage type that a pickle names, as its dtype."""

    TYPES = {
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


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads the attributes of a TorchScript module; only the names of tensors and storages mean anything."""

    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module == "torch" and name in _Storage.TYPES:
            return _Storage.TYPES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "collections" and name == "OrderedDict":
            return dict
        return type(name, (_Inert,), {})

    def persistent_load(self, saved):
        _, dtype, key, _, numel = saved
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = (
                torch.frombuffer(data, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)  # raises where it would reach outside the storage


def _read_torchscript(path, root):
    with zipfile.ZipFile(path) as archive:
        tree = _ArchiveUnpickler(archive, root).load()
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


# ---- the architecture, read off the shapes ----


def architecture(weights, source="the checkpoint"):
    """Sizes of a CLIP model from the shapes of its weights (OpenAI's key names); ViT or ResNet.

    Returns embed_dim, vision_layers (a number, or four for a ResNet), vision_width, vision_patch_size (None
    for a ResNet), vision_positions, context_length, vocab_size, transformer_width, transformer_layers.
    """

    def size(key, dimension):
        shape = getattr(weights.get(key), "shape", ())
        if len(shape) <= max(dimension, 0) or not shape[dimension]:
            found = f"is {list(shape)}" if key in weights else "is missing"
            raise InputError(f"{source} holds no CLIP model that IRRA knows: {key} {found}")
        return shape[dimension]

    sizes = {
        "embed_dim": size("text_projection", 1),
        "context_length": size("positional_embedding", 0),
        "vocab_size": size("token_embedding.weight", 0),
        "transformer_width": size("ln_final.weight", 0),
        "transformer_layers": _layers(weights, "transformer.resblocks."),
    }
    if any(key.startswith("visual.transformer.") for key in weights):
        return {
            **sizes,
            "vision_layers": _layers(weights, "visual.transformer.resblocks."),
            "vision_width": size("visual.conv1.weight", 0),
            "vision_patch_size": size("visual.conv1.weight", -1),
            "vision_positions": size("visual.positional_embedding", 0),
        }
    return {
        **sizes,
        "vision_layers": tuple(_layers(weights, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        "vision_width": size("visual.layer1.0.conv1.weight", 0),
        "vision_patch_size": None,
        "vision_positions": size("visual.attnpool.positional_embedding", 0),
    }


def _layers(weights, prefix):
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def image_grid(sizes, img_size, stride_size):
    """(rows, columns) of image tokens at this image size."""
    patch = sizes["vision_patch_size"]
    if patch is None:
        rows, columns = img_size[0] // 32, img_size[1] // 32
    else:
        rows, columns = ((side - patch) // stride_size + 1 for side in img_size)
    if rows < 1 or columns < 1:
        raise InputError(f"--img_size {img_size[0]} {img_size[1]} is smaller than one patch of this model")
    return rows, columns


def new_clip(sizes, img_size, stride_size, source="the model"):
    """A CLIP of these sizes (see `architecture`), random weights, with the positions of the image size.

    Heads are 64 wide, as in all of OpenAI's models; shapes do not tell, so others must not come here.
    """
    widths = ["transformer_width", *(["vision_width"] if sizes["vision_patch_size"] else [])]
    for name in widths:
        if sizes[name] % 64:
            raise InputError(
                f"{source}: {name} is {sizes[name]}, but heads are 64 wide: it must be a multiple of 64"
            )
    if sizes["vocab_size"] != 49408:
        raise InputError(f"{source} has {sizes['vocab_size']} words, but the tokeniser has 49408")
    grid = image_grid(sizes, img_size, stride_size)
    width, embed_dim = sizes["vision_width"], sizes["embed_dim"]
    if sizes["vision_patch_size"] is None:
        visual = ModifiedResNet(grid, sizes["vision_layers"], width, width * 32 // 64, embed_dim)
    else:
        patch = sizes["vision_patch_size"]
        visual = VisionTransformer(
            grid, patch, stride_size, width, sizes["vision_layers"], width // 64, embed_dim
        )
    return CLIP(
        visual,
        embed_dim,
        sizes["context_length"],
        sizes["vocab_size"],
        sizes["transformer_width"],
        sizes["transformer_layers"],
        sizes["transformer_width"] // 64,
    )


def stored_grid(path):
    """(rows, columns) of the image positions where a safetensors file's header says so, as exports do."""
    if Path(path).suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(POSITIONS_GRID, "")
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return tuple(map(int, found.groups())) if found else None


def resize_positions(positions, grid, stored=None):
    """(1 + n, W) positions to (1 + rows·columns, W): bilinear, the class position kept.

    stored: the (rows, columns) they were learned at; None takes a square grid, as OpenAI's are, and where
    there is none of that size the grid asked for, as in the weights of a training at that image size.
    """
    number = len(positions) - 1
    side = math.isqrt(number)
    known = [place for place in (stored, (side, side), tuple(grid)) if place and math.prod(place) == number]
    if not known:
        raise InputError(
            f"{number} image positions are neither a square grid nor the {grid[0]} x {grid[1]} of this "
            "--img_size: give the image size that these weights were trained at"
        )
    if known[0] == tuple(grid):
        return positions
    plane = positions[1:].T.reshape(1, -1, *known[0])
    resized = F.interpolate(plane.float(), size=tuple(grid), mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


# ---- what the model asks for ----


def load_clip(choice, img_size, stride_size, sizes=None):
    """The CLIP that --pretrain_choice names, in fp32 and fitted to the image size.

    choice: one of CHECKPOINTS, a file, or "random" (sizes: what differs from ViT-B/16's).
    """
    if choice == "random":
        sizes = {**VIT_B_16, **(sizes or {})}
        logger.info(f"CLIP starts from random weights: {_described(sizes, img_size, stride_size)}")
        return new_clip(sizes, img_size, stride_size)
    path = download(choice) if choice in CHECKPOINTS else Path(choice)
    weights = {key: value for key, value in read_weights(path).items() if key not in IGNORED}
    weights = {key: value for key, value in weights.items() if not key.endswith("attn_mask")}
    found = architecture(weights, path)
    resnet = found["vision_patch_size"] is None
    key = "visual.attnpool.positional_embedding" if resnet else "visual.positional_embedding"
    weights[key] = resize_positions(weights[key], image_grid(found, img_size, stride_size), stored_grid(path))
    logger.info(
        f"Load pretrained {choice} CLIP model with model config: {_described(found, img_size, stride_size)}"
    )
    clip = new_clip(found, img_size, stride_size, path)
    load_weights(clip, weights, path)
    return clip


VIT_B_16 = {
    "embed_dim": 512,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_layers": 12,
}


def _described(sizes, img_size, stride_size):
    """In the published log's words and order."""
    return {
        "embed_dim": sizes["embed_dim"],
        "image_resolution": tuple(img_size),
        "vision_layers": sizes["vision_layers"],
        "vision_width": sizes["vision_width"],
        "vision_patch_size": sizes["vision_patch_size"],
        "context_length": sizes["context_length"],
        "vocab_size": sizes["vocab_size"],
        "transformer_width": sizes["transformer_width"],
        "transformer_heads": sizes["transformer_width"] // 64,
        "transformer_layers": sizes["transformer_layers"],
        "stride_size": stride_size,
    }
