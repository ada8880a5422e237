"""Weights, images and the tiny model behind the figures in tests/reference, rebuilt from names and seeds.

Nothing big is stored: a parameter follows from its name and shape, an image batch from its seed. Numbers
come from splitmix64 (Steele, Lea and Flood, OOPSLA 2014); test_model_reference holds them against known
answers. The shapes stand here once more, written out of CLIP's sizes and not asked of our model.
"""

import functools
import itertools
import json
import math
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from model import build_model
from utils.losses import LOSSES
from utils.options import get_args

REFERENCE = Path(__file__).parent / "reference"
TINY = dict(embed_dim=128, grid=4, patch=16, vision_width=128, vision_layers=2, text_width=128, text_layers=2)
FULL = dict(
    embed_dim=512, grid=14, patch=16, vision_width=768, vision_layers=12, text_width=512, text_layers=12
)
POCKET = dict(embed_dim=64, grid=2, patch=16, vision_width=64, vision_layers=1, text_width=64, text_layers=1)
VOCABULARY, CONTEXT = 49408, 77
PUBLISHED = ("sdm", "itc", "cmpm", "id", "mlm")
# what is typed after --loss_names: each combination of IRRA's losses, and each row of the table beside them
COMBINATIONS = ["+".join(names) for n in range(1, 6) for names in itertools.combinations(PUBLISHED, n)]
for _name, _row in LOSSES.items():
    if _row.switches:
        COMBINATIONS += [" --".join([names, *_row.switches]) for names in ("tal", "sdm+id+mlm+tal")]
    elif _name not in PUBLISHED:
        alone = [] if _row.of == "strong" else [_name]
        COMBINATIONS += [*alone, f"sdm+id+mlm+{_name}"]
COMBINATIONS += ["nitc+ritc+citc+simclr --second_view"]
COMBINATIONS += [f"{names} --learn_temperature" for names in ("sdm", "itc+asdm+nitc+ritc+mlm")]
CLASSES = 37  # persons of the tiny model's classifier


# ---- the published figures ----


def figures(name):
    """tests/reference/<name>.json."""
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))


def arrays(name):
    """tests/reference/<name>.npz as tensors; whole numbers as int64, as the model takes them."""
    with np.load(REFERENCE / f"{name}.npz") as stored:
        return {
            key: torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "i" else array)
            for key, array in stored.items()
        }


def off(found, expected):
    """Largest difference, as a share of the largest expected magnitude."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the number stream ----

STEP, SPREAD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shift, multiplier
BLOCK = 1 << 22  # numbers made at once


def _words(key, first, last):
    """Outputs first … last - 1 (counted from 0) of splitmix64 started at key; uint64 arithmetic wraps."""
    word = np.arange(first + 1, last + 1, dtype=np.uint64)
    word *= np.uint64(STEP)
    word += np.uint64(key % 2**64)
    for shift, multiplier in ROUNDS:
        word ^= word >> np.uint64(shift)
        word *= np.uint64(multiplier)
    word ^= word >> np.uint64(31)
    return word


def _draw(key, shape, dtype, finish):
    """An array whose element i, in C order, is finish(output i); made in blocks, so that memory stays low."""
    flat = np.empty(math.prod(shape), dtype)
    for first in range(0, flat.size, BLOCK):
        last = min(first + BLOCK, flat.size)
        flat[first:last] = finish(_words(key, first, last))
    return flat.reshape(shape)


def _uniform(key, shape, scale, offset=0.0):
    """float32 of offset + scale · u, u uniform in [-1, 1) and exact in float64: a word's upper 53 bits."""
    return _draw(
        key, shape, np.float32, lambda words: offset + scale * ((words >> np.uint64(11)) / 2.0**52 - 1)
    )


def _range(name, shape):
    """(scale, offset) of a parameter: gains near 1, small biases, layers that keep their input's size."""
    if len(shape) == 1 and name.endswith("weight"):
        return 0.1, 1.0
    if len(shape) == 1 and name.endswith("bias"):
        return 0.02, 0.0
    if name.endswith(("embedding", "embedding.weight")):
        return 0.3 * math.sqrt(3), 0.0
    if name.endswith(("proj", "projection")):  # applied as x @ P
        return math.sqrt(3 / shape[0]), 0.0
    fan_in = math.prod(shape[1:])
    if name.endswith(("out_proj.weight", "c_proj.weight")):  # they end a residual branch
        return 0.5 * math.sqrt(3 / fan_in), 0.0
    return math.sqrt(3 / fan_in), 0.0


def fill(name, shape):
    """The float32 parameter of this name and shape. Name: OpenAI's key, or a head's state-dict name."""
    return torch.from_numpy(_uniform(zlib.crc32(name.encode()) * SPREAD, tuple(shape), *_range(name, shape)))


def pixels(seed, shape):
    """A float32 batch of images in normalised space, uniform in [-2, 2)."""
    return torch.from_numpy(_uniform(seed * SPREAD + 0x5EED, tuple(shape), 2.0))


def caption_ids(seed, count, length=77):
    """[count, length] ids as the methods' figures have them: 1, 2, 3, 5 and as many words as fit in the first
    five rows, then 6 to 60; row 5 has id 0 as its third word."""
    drawn = _words(seed * SPREAD + 0x5EED, 0, count * (length + 1)).reshape(count, length + 1)
    ids = torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        words = (1, 2, 3, 5, length - 2)[row] if row < 5 else int(6 + drawn[row, 0] % np.uint64(55))
        ids[row, 0], ids[row, 1 + words] = 49406, 49407
        ids[row, 1 : 1 + words] = torch.from_numpy(
            (1 + drawn[row, 1 : 1 + words] % np.uint64(49404)).astype(int)
        )
    if count > 5:
        ids[5, 3] = 0
    return ids


def bytes8(seed, shape):
    """uint8, uniform in 0 … 255, for tests that start from undecoded images (a numpy array)."""
    return _draw(seed * SPREAD + 0x5EED, tuple(shape), np.uint8, lambda words: words >> np.uint64(56))


# ---- shapes, from CLIP's sizes ----


def _block(prefix, width):
    return {
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width),
        f"{prefix}.attn.out_proj.bias": (width,),
        **_gain_and_bias(f"{prefix}.ln_1", width),
        f"{prefix}.mlp.c_fc.weight": (4 * width, width),
        f"{prefix}.mlp.c_fc.bias": (4 * width,),
        f"{prefix}.mlp.c_proj.weight": (width, 4 * width),
        f"{prefix}.mlp.c_proj.bias": (width,),
        **_gain_and_bias(f"{prefix}.ln_2", width),
    }


def _blocks(prefix, width, layers):
    return {key: s for layer in range(layers) for key, s in _block(f"{prefix}.{layer}", width).items()}


def _gain_and_bias(prefix, width):
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _text_shapes(embed_dim, text_width, text_layers, context=CONTEXT):
    return {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embed_dim),
        **_blocks("transformer.resblocks", text_width, text_layers),
        "token_embedding.weight": (VOCABULARY, text_width),
        **_gain_and_bias("ln_final", text_width),
    }


def clip_shapes(
    embed_dim, grid, patch, vision_width, vision_layers, text_width, text_layers, context=CONTEXT
):
    """{OpenAI key: shape} of a CLIP with a vision transformer; grid² patches in its image."""
    return {
        **_text_shapes(embed_dim, text_width, text_layers, context),
        "visual.class_embedding": (vision_width,),
        "visual.positional_embedding": (grid * grid + 1, vision_width),
        "visual.proj": (vision_width, embed_dim),
        "visual.conv1.weight": (vision_width, 3, patch, patch),
        **_gain_and_bias("visual.ln_pre", vision_width),
        **_blocks("visual.transformer.resblocks", vision_width, vision_layers),
        **_gain_and_bias("visual.ln_post", vision_width),
    }


def resnet_shapes(embed_dim, grid, width, layers, text_width, text_layers):
    """{OpenAI key: shape} of a CLIP with a ResNet, but for its batch norms' running statistics."""
    shapes = _text_shapes(embed_dim, text_width, text_layers)

    def conv_and_norm(conv, norm, outputs, inputs, side):
        shapes[f"{conv}.weight"] = (outputs, inputs, side, side)
        shapes.update(_gain_and_bias(norm, outputs))

    half = width // 2
    for i, (outputs, inputs) in enumerate(((half, 3), (half, half), (width, half)), start=1):
        conv_and_norm(f"visual.conv{i}", f"visual.bn{i}", outputs, inputs, 3)
    inputs = width
    for stage, blocks in enumerate(layers):
        planes = width * 2**stage
        for block in range(blocks):
            prefix = f"visual.layer{stage + 1}.{block}"
            conv_and_norm(f"{prefix}.conv1", f"{prefix}.bn1", planes, inputs, 1)
            conv_and_norm(f"{prefix}.conv2", f"{prefix}.bn2", planes, planes, 3)
            conv_and_norm(f"{prefix}.conv3", f"{prefix}.bn3", 4 * planes, planes, 1)
            if block == 0:
                conv_and_norm(f"{prefix}.downsample.0", f"{prefix}.downsample.1", 4 * planes, inputs, 1)
            inputs = 4 * planes
    shapes["visual.attnpool.positional_embedding"] = (grid * grid + 1, inputs)
    for name, outputs in (("q", inputs), ("k", inputs), ("v", inputs), ("c", embed_dim)):
        shapes[f"visual.attnpool.{name}_proj.weight"] = (outputs, inputs)
        shapes[f"visual.attnpool.{name}_proj.bias"] = (outputs,)
    return shapes


def head_shapes(loss_names, embed_dim, num_classes, cmt_depth):
    """{state-dict name: shape} of what IRRA adds to CLIP for these losses."""
    shapes, names = {}, loss_names.split("+")
    if "id" in names:
        shapes.update({"classifier.weight": (num_classes, embed_dim), "classifier.bias": (num_classes,)})
    if "mlm" in names:
        shapes.update(
            {
                "cross_attn.in_proj_weight": (3 * embed_dim, embed_dim),
                "cross_attn.in_proj_bias": (3 * embed_dim,),
                "cross_attn.out_proj.weight": (embed_dim, embed_dim),
                "cross_attn.out_proj.bias": (embed_dim,),
                **_blocks("cross_modal_transformer.resblocks", embed_dim, cmt_depth),
                **_gain_and_bias("ln_pre_t", embed_dim),
                **_gain_and_bias("ln_pre_i", embed_dim),
                **_gain_and_bias("ln_post", embed_dim),
                "mlm_head.dense.weight": (embed_dim, embed_dim),
                "mlm_head.dense.bias": (embed_dim,),
                **_gain_and_bias("mlm_head.ln", embed_dim),
                "mlm_head.fc.weight": (VOCABULARY, embed_dim),
                "mlm_head.fc.bias": (VOCABULARY,),
            }
        )
    return shapes


# ---- weights and models ----


def clip_weights(**sizes):
    """{OpenAI key: tensor} of a vision transformer's CLIP; sizes as in TINY, on the native square grid."""
    return {key: fill(key, shape) for key, shape in clip_shapes(**sizes).items()}


def resnet_weights(**sizes):
    """{OpenAI key: tensor} of a ResNet's CLIP; its running statistics are those of a fresh batch norm."""
    weights = {key: fill(key, shape) for key, shape in resnet_shapes(**sizes).items()}
    for key in [key for key in weights if ".bn" in key or ".downsample.1." in key]:
        prefix, kind = key.rsplit(".", 1)
        if kind == "weight":
            weights[f"{prefix}.running_mean"] = torch.zeros_like(weights[key])
            weights[f"{prefix}.running_var"] = torch.ones_like(weights[key])
            weights[f"{prefix}.num_batches_tracked"] = torch.tensor(0)
    return weights


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="irra-tests-")  # goes when Python ends


@functools.cache
def tiny_clip_file():
    """Path of a state dict of the tiny model's CLIP."""
    path = Path(_folder().name) / "tiny_clip.pt"
    torch.save(clip_weights(**TINY), path)
    return path


def arguments(**options):
    """{img_size: (96, 32), MLM: True, …} as the words of a command line."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def tiny_args(loss_names="sdm+mlm+id", **options):
    """The options of the reference figures' tiny model, through get_args."""
    tiny = dict(pretrain_choice=tiny_clip_file(), img_size=(96, 32), cmt_depth=2, device="cpu")
    return get_args(arguments(**{**tiny, "loss_names": loss_names, **options}))


def fill_heads(model, loss_names, embed_dim, num_classes, cmt_depth):
    """Put the recipe's weights into the heads of an IRRA, which must have these heads and no others."""
    heads = {
        name: fill(name, s) for name, s in head_shapes(loss_names, embed_dim, num_classes, cmt_depth).items()
    }
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if not name.startswith("base_model.")
    }
    assert heads.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == heads[name].shape
            parameter.copy_(heads[name])
    return model


def tiny_model(loss_names="sdm+mlm+id", **options):
    """The reference figures' tiny model with the recipe's weights, through get_args and build_model."""
    args = tiny_args(loss_names, **options)
    return fill_heads(build_model(args, CLASSES), loss_names, TINY["embed_dim"], CLASSES, args.cmt_depth)


def refused_in_one_sentence(typed, named, capsys):
    """What train.py says of a command line that it refuses: one sentence, with `named` in it, status 2."""
    with pytest.raises(SystemExit) as stop:
        get_args(typed.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
