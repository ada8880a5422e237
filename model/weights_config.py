"""What lies beside a file of weights and says how they compute: shapes tell neither activation nor heads."""

import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

from model.clip_model import ACTIVATIONS
from utils.config_file import read_yaml
from utils.errors import InputError

OPENAIS = {  # the facts that shapes do not tell, as all of OpenAI's models have them
    "activation": "quick_gelu",
    "vision_head_width": 64,
    "transformer_head_width": 64,
}
CLIP_MEAN = 0.48145466  # of the red pixels that OpenAI's models were trained with
logger = logging.getLogger("IRRA.model")


class Config(NamedTuple):
    """What a config says of a model."""

    sizes: dict = {}  # facts too; names as in model.pretrained.architecture
    image: tuple | None = None  # ((height, width), stride) that its image positions are for
    foreign: str | None = None  # why CLIP's arithmetic does not hold for it
    note: str | None = None

    @property
    def facts(self):
        return {name: value for name, value in self.sizes.items() if name in OPENAIS}


def config_beside(path, names, sizes):
    """The Config in the first of these files beside `path` that is about weights of these sizes; an empty one
    where none is. Raises InputError where CLIP's arithmetic does not hold for them."""
    for name in names:
        if not (path.parent / name).is_file():
            continue
        config = read_config(path.parent / name)
        said = {size: value for size, value in config.sizes.items() if size not in OPENAIS}
        if (config.foreign and not said) or any(sizes[size] != value for size, value in said.items()):
            logger.info(f"{name} beside it is of another model, so it is not asked")
            continue
        if config.foreign:
            raise InputError(f"{path} is refused: by {name} beside it, {config.foreign}")
        if config.facts:
            logger.info(f"{name} beside it says {config.facts}")
        if config.note:
            logger.info(config.note)
        return config
    return Config()


def read_config(path):
    """The Config of a file by one of the names in CONFIGS."""
    path = Path(path)
    try:
        if path.suffix == ".yaml":
            said = read_yaml(path)
        else:
            said = json.loads(path.read_text(encoding="utf-8"))
        config = CONFIGS[path.name](said)
        numbers = [value for name, value in config.facts.items() if name != "activation"]
        if config.image:
            (rows, columns), stride = config.image
            numbers += [rows, columns, stride]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{path} is not a config of CLIP weights ({type(error).__name__}: {error})"
        ) from None
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise InputError(f"{path} is not a config of CLIP weights (its sizes: {numbers})")
    return config


def check_config(path, source):
    """Refuse a model that is not CLIP's before its weights are fetched."""
    if foreign := read_config(path).foreign:
        raise InputError(f"{source} is refused: {foreign}")


# ---- open_clip ----

PLAIN = {  # of an encoder like OpenAI's; None and false are plain everywhere
    "pool_type": ("tok", "argmax"),
    "block_type": ("default",),
    "proj_type": ("linear",),
}
SIZES = (  # of any value: shapes tell the same, or nothing depends on it
    "layers width heads head_width mlp_ratio patch_size image_size context_length vocab_size patch_dropout "
    "pos_embed_type output_tokens hf_tokenizer_name tokenizer_kwargs tokenizer_mode pad_id eos_id "
    "attn_pooler_queries attn_pooler_heads hf_model_pretrained hf_proj_type hf_pooler_type "
    "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path"
).split()


def of_open_clip(said):
    """open_clip_config.json; its field's meaning and defaults: open_clip/model.py."""
    model = said["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    words = text.get("width", 512)
    sizes = {
        "embed_dim": model["embed_dim"],
        "vision_width": vision.get("width", 768),
        "transformer_width": words,
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_head_width": vision.get("head_width", 64),
        "transformer_head_width": _width_of(words, text.get("heads", 8)),
    }
    mean = (said.get("preprocess_cfg") or {}).get("mean")
    note = None
    if mean and not math.isclose(mean[0], CLIP_MEAN, abs_tol=1e-3):
        note = (
            f"it saw pixels normalised by a mean of {mean}, here they have CLIP's: training has to adapt it"
        )
    resnet = isinstance(vision.get("layers"), list)
    image = _both(vision.get("image_size", 224)), 32 if resnet else vision.get("patch_size", 16)
    return Config(sizes, image, _foreign(model, vision, text), note)


def _foreign(model, vision, text):
    if "multimodal_cfg" in model:
        return "it is CoCa, not CLIP: it pools by attention, and its text encoder goes on in a decoder"
    for part in (vision, text):
        for key, value in part.items():
            if key not in SIZES and value not in (None, False, *PLAIN.get(key, ())):
                return f"its config says {key}: {value}, another arithmetic than CLIP's"
    return _other_vocabulary(text)


def _other_vocabulary(text):
    words = text.get("vocab_size", 49408)
    if words == 49408:
        return None
    return f"it has another vocabulary ({words} words), and the tokeniser has CLIP's 49408"


def _width_of(width, heads):
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return width // heads


def _both(side):
    """(height, width) of an image, of which a config may say one number."""
    return (side, side) if isinstance(side, int) else tuple(side)


# ---- transformers ----


def of_transformers(said):
    """config.json of a CLIPModel; what it leaves out is as transformers' CLIPConfig has it."""
    kind = said.get("model_type")
    if kind != "clip":
        return Config(foreign=f"it is not a whole CLIP (model_type: {kind})")
    # of old files: where *_config_dict is there, it holds, whatever *_config says, as in transformers
    text, vision = (
        said.get(f"{part}_config_dict") or said.get(f"{part}_config") or {} for part in ("text", "vision")
    )
    foreign = None
    acts = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
    if len(acts) > 1 or not acts <= set(ACTIVATIONS):
        foreign = f"its activation is {' and '.join(sorted(acts))}, and IRRA's are {' or '.join(ACTIVATIONS)}"
    if epsilons := {part.get("layer_norm_eps", 1e-5) for part in (text, vision)} - {1e-5}:
        foreign = f"its norms have an eps of {epsilons.pop()}, not CLIP's 1e-05"
    width, words = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    sizes = {
        "embed_dim": said.get("projection_dim", 512),
        "vision_width": width,
        "transformer_width": words,
        "activation": acts.pop(),
        "vision_head_width": _width_of(width, vision.get("num_attention_heads", 12)),
        "transformer_head_width": _width_of(words, text.get("num_attention_heads", 8)),
    }
    image = _both(vision.get("image_size", 224)), vision.get("patch_size", 32)
    return Config(sizes, image, _other_vocabulary(text) or foreign)


# ---- this project and its family ----


def of_export(said):
    """irra.json beside an export."""
    own = said["architecture"]
    word = own["activation"]
    word = "quick_gelu" if word == "QuickGELU" else word  # as the first exports say it
    if word not in ACTIVATIONS:
        raise ValueError(f"activation {word}")
    sizes = {name: own[name] for name in ("embed_dim", "vision_width", "transformer_width")}
    sizes |= {name: own.get(name, 64) for name in ("vision_head_width", "transformer_head_width")}
    return Config({**sizes, "activation": word}, (tuple(said["image"]["size"]), own["stride_size"]))


def of_run(said):
    """configs.yaml beside a run's checkpoint, ours or of a program made of the published one."""
    image = None
    if isinstance(said.get("img_size"), list) and isinstance(said.get("stride_size"), int):
        image = tuple(said["img_size"]), said["stride_size"]
    word = said.get("activation")
    return Config({"activation": word} if word in ACTIVATIONS else {}, image)


CONFIGS = {
    "open_clip_config.json": of_open_clip,
    "config.json": of_transformers,
    "irra.json": of_export,
    "configs.yaml": of_run,
}
