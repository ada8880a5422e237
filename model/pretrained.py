"""A CLIP of the sizes that its weights have, with their activation and heads, fitted to the image size."""

import logging
import math

import torch
import torch.nn.functional as F

from model.clip_model import CLIP, VisionTransformer
from model.clip_resnet import ModifiedResNet
from model.fetch import locate
from model.weights import TRAINED, read_start
from model.weights_config import OPENAIS, config_beside
from model.weights_file import stored_grid
from utils.checkpoint import load_weights
from utils.errors import InputError

HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # open_clip's ViT-H, g, bigG, e, by vision width
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
DESCRIBED = (
    "embed_dim image_resolution vision_layers vision_width vision_patch_size context_length vocab_size "
    "transformer_width transformer_heads transformer_layers stride_size"
).split()
PUBLISHED_GRID = (24, 8)  # of patches, in every published training
logger = logging.getLogger("IRRA.model")


# ---- the architecture, read off the shapes ----


def architecture(weights, source="the checkpoint", facts=OPENAIS):
    """Sizes of a CLIP model from the shapes of its weights (OpenAI's key names); ViT or ResNet.

    Returns embed_dim, vision_layers (a number, or four for a ResNet), vision_width, vision_patch_size (None
    for a ResNet), vision_positions, context_length, vocab_size, transformer_width, transformer_layers; and
    facts, which shapes do not tell: activation, vision_head_width, transformer_head_width.
    """

    def size(key, dimension):
        shape = getattr(weights.get(key), "shape", ())
        if len(shape) <= max(dimension, 0) or not shape[dimension]:
            found = f"is {list(shape)}" if key in weights else "is missing"
            raise InputError(f"{source} holds no CLIP model that IRRA knows: {key} {found}")
        return shape[dimension]

    def layers(prefix):
        return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})

    sizes = {
        "embed_dim": size("text_projection", 1),
        "context_length": size("positional_embedding", 0),
        "vocab_size": size("token_embedding.weight", 0),
        "transformer_width": size("ln_final.weight", 0),
        "transformer_layers": layers("transformer.resblocks."),
        **facts,
    }
    if any(key.startswith("visual.transformer.") for key in weights):
        return {
            **sizes,
            "vision_layers": layers("visual.transformer.resblocks."),
            "vision_width": size("visual.conv1.weight", 0),
            "vision_patch_size": size("visual.conv1.weight", -1),
            "vision_positions": size("visual.positional_embedding", 0),
        }
    return {
        **sizes,
        "vision_layers": tuple(layers(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        "vision_width": size("visual.layer1.0.conv1.weight", 0),
        "vision_patch_size": None,
        "vision_positions": size("visual.attnpool.positional_embedding", 0),
    }


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
    """A CLIP of these sizes (see `architecture`), random weights, with the positions of the image size."""
    sizes = {**OPENAIS, **sizes}
    for part in ("transformer", *(["vision"] if sizes["vision_patch_size"] else [])):
        width, head = sizes[f"{part}_width"], sizes[f"{part}_head_width"]
        if width % head:
            raise InputError(f"{source}: {part}_width is {width}, but heads are {head} wide: no multiple")
    if sizes["vocab_size"] != 49408:
        raise InputError(
            f"{source} has another vocabulary ({sizes['vocab_size']} words) than CLIP's 49408, which is the "
            "tokeniser's"
        )
    grid, patch = image_grid(sizes, img_size, stride_size), sizes["vision_patch_size"]
    width, layers, head = (sizes[f"vision_{name}"] for name in ("width", "layers", "head_width"))
    embed_dim, activation = sizes["embed_dim"], sizes["activation"]
    if patch is None:
        visual = ModifiedResNet(grid, layers, width, width * 32 // head, embed_dim)
    else:
        visual = VisionTransformer(
            grid, patch, stride_size, width, layers, width // head, embed_dim, activation
        )
    width, layers, head = (sizes[f"transformer_{name}"] for name in ("width", "layers", "head_width"))
    context, vocabulary = sizes["context_length"], sizes["vocab_size"]
    clip = CLIP(visual, embed_dim, context, vocabulary, width, layers, width // head, activation)
    clip.facts = {name: sizes[name] for name in OPENAIS}
    return clip


# ---- the positions, fitted to the image ----


def known_grids(number, grid, stored=None, trained=False):
    """The (rows, columns) that so many image positions may have, the likeliest first, each with the reason.

    grid: what --img_size asks for. stored: what the file or one beside it says. trained: by a person
    retrieval training, whose positions are of its image size, while those of a CLIP are square.
    """
    side, rows, columns = math.isqrt(number), *grid
    across = math.isqrt(number * columns // rows)
    square, of_image = ((side, side), "a square"), (tuple(grid), "the number that --img_size has")
    shaped = (across * rows // columns, across), "the image's proportions"
    published = (PUBLISHED_GRID, "the published image size's")
    guesses = (published, of_image, shaped, square) if trained else (square, of_image, shaped, published)
    said = [(tuple(stored), "as its file says")] if stored else []
    return [(known, reason) for known, reason in (*said, *guesses) if math.prod(known) == number]


def resize_positions(positions, grid, stored=None, trained=False):
    """(1 + n, W) positions to (1 + rows·columns, W): bilinear, the class position kept.

    From which grid: see `known_grids`. InputError where it cannot be told.
    """
    number = len(positions) - 1
    known = known_grids(number, grid, stored, trained)
    if not known:
        raise InputError(
            f"{number} image positions are neither a square grid nor the {grid[0]} x {grid[1]} of this "
            "--img_size, nor of its proportions: say of which rows and columns with --position_grid H W"
        )
    (old, reason), *_ = known
    if old == tuple(grid):
        logger.info(f"image positions: {old[0]} x {old[1]} ({reason}), as they are")
        return positions
    logger.info(f"image positions: {old[0]} x {old[1]} ({reason}), resized to {grid[0]} x {grid[1]}")
    plane = positions[1:].T.reshape(1, -1, *old)
    resized = F.interpolate(plane.float(), size=tuple(grid), mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


# ---- what the model asks for ----


def load_clip(choice, img_size, stride_size, sizes=None, activation="auto", position_grid=None):
    """The CLIP that --pretrain_choice names, in fp32 and fitted to the image size.

    choice: a file, a folder or a name, see model.fetch.locate; or "random" (sizes: what differs from
    ViT-B/16's). activation, position_grid: the options, for what the files do not say.
    """
    return load_start(choice, img_size, stride_size, sizes, activation, position_grid)[0]


def load_start(choice, img_size, stride_size, sizes=None, activation="auto", position_grid=None):
    """load_clip's CLIP, and {name: tensor} of the heads of IRRA that lie beside it in its file."""
    if choice == "random":
        sizes = {**OPENAIS, **VIT_B_16, **(sizes or {})}
        if activation != "auto":
            sizes["activation"] = activation
        logger.info(f"CLIP starts from random weights: {_described(sizes, img_size, stride_size)}")
        return new_clip(sizes, img_size, stride_size), {}
    start = read_start(locate(choice))
    path, weights = start.path, start.weights
    sizes = architecture(weights, path)
    said = config_beside(path, start.form.configs, sizes)
    sizes.update(arithmetic({**start.form.facts, **said.facts, **start.facts}, sizes, activation, path))
    check_mlp(weights, sizes, path)
    number = sizes["vision_positions"] - 1
    if position_grid and math.prod(position_grid) != number:
        raise InputError(
            f"--position_grid {position_grid[0]} {position_grid[1]} are {math.prod(position_grid)} image "
            f"positions, but {path} has {number}"
        )
    stored = position_grid or stored_grid(path) or (said.image and image_grid(sizes, *said.image))
    key = "visual.positional_embedding"
    if sizes["vision_patch_size"] is None:
        key = "visual.attnpool.positional_embedding"
    grid = image_grid(sizes, img_size, stride_size)
    weights[key] = resize_positions(weights[key], grid, stored, trained=start.form is TRAINED)
    described = _described(sizes, img_size, stride_size)
    logger.info(f"Load pretrained {choice} CLIP model with model config: {described}")
    clip = new_clip(sizes, img_size, stride_size, path)
    load_weights(clip, weights, path)
    broken = [key for key, value in clip.state_dict().items() if not value.float().sum().isfinite()]
    if broken:
        raise InputError(
            f"{path} holds NaN or infinity (in {len(broken)} of its tensors, {broken[0]} first): its "
            "training had broken down before it was saved, so take an earlier one"
        )
    return clip, start.heads


def arithmetic(known, sizes, activation, path):
    """What shapes do not tell of weights: as files say (known), as --activation says, or assumed."""
    trained_with = known.get("activation")
    if activation == "auto" and trained_with is None:
        logger.warning(
            f"nothing says which activation {path} was trained with: QuickGELU is assumed, as OpenAI's have "
            "it; open_clip's own (laion, datacomp) mostly need --activation gelu"
        )
    if activation != "auto" and trained_with not in (None, activation):
        logger.warning(
            f"{path} was trained with {trained_with}, and --activation {activation} is another one"
        )
    facts = {**OPENAIS, **known}
    if activation != "auto":
        facts["activation"] = activation
    usual = HEAD_WIDTHS.get(sizes["vision_width"])
    if "vision_head_width" not in known and usual and sizes["vision_patch_size"]:
        facts["vision_head_width"] = usual
        logger.warning(f"nothing says how wide the heads of {path} are: {usual} is open_clip's at its width")
    return facts


def check_mlp(weights, sizes, source):
    for part, prefix in (("vision", "visual.transformer"), ("transformer", "transformer")):
        first = weights.get(f"{prefix}.resblocks.0.mlp.c_fc.weight")
        if first is not None and first.ndim and len(first) != 4 * sizes[f"{part}_width"]:
            raise InputError(
                f"{source} is refused: its MLPs are {len(first)} wide, not four times the width of "
                f"{sizes[f'{part}_width']} (as open_clip's ViT-g, ViT-bigG and ViT-e)"
            )


def _described(sizes, img_size, stride_size):
    """In the published log's words and order."""
    sizes = {**sizes, "image_resolution": tuple(img_size), "stride_size": stride_size}
    sizes["transformer_heads"] = sizes["transformer_width"] // sizes["transformer_head_width"]
    return {name: sizes[name] for name in DESCRIBED}
