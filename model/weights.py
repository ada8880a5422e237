"""CLIP weights in any form that people have, to one state dict with OpenAI's names, or what else they are."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from model.clip_model import ACTIVATIONS
from model.weights_config import OPENAIS
from model.weights_file import named_tensors, read_file
from utils.errors import InputError

logger = logging.getLogger("IRRA.model")

# ---- the forms, and OpenAI's names from each ----


class Form(NamedTuple):
    """A kind of file. key: a name that it has, and no row above has; a regular expression."""

    name: str
    key: str
    rename: Callable = dict  # {name: tensor} to OpenAI's names
    facts: dict = {}  # what shapes do not tell, where it is the same for all files of this form
    configs: tuple = ()  # files beside it that say how it computes; the first one there is asked


def without(prefix):
    return lambda weights: {key.removeprefix(prefix): value for key, value in weights.items()}


TRANSFORMERS = (  # parts of transformers' names, in this order, and OpenAI's; exports go the other way
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # spelled so
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def from_transformers(weights):
    """transformers' CLIPModel: queries, keys and values apart, projections applied the other way round."""
    renamed = {}
    for key, value in weights.items():
        for theirs, ours in TRANSFORMERS:
            key = key.replace(theirs, ours)
        renamed[key] = value.T if key in ("visual.proj", "text_projection") else value
    for key in [key for key in renamed if re.search(r"\.attn\.q_proj\.(weight|bias)$", key)]:
        block, kind = key.split(".attn.q_proj.")
        thirds = [renamed.pop(f"{block}.attn.{part}_proj.{kind}") for part in "qkv"]
        renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return renamed


def from_long_clip(weights):
    """Long-CLIP (arXiv 2403.15378): places 0 to 19, which stay OpenAI's, have one set of positions, the
    others the second."""
    weights = dict(weights)
    rest = weights.pop("positional_embedding_res")
    weights["positional_embedding"] = torch.cat([weights["positional_embedding"][:20], rest[20:]])
    return weights


BESIDE = ("open_clip_config.json", "irra.json", "config.json")
TRAINED = Form(  # its image positions are of its own image size
    "a person retrieval training (IRRA's form)", r"base_model\..*", facts=OPENAIS, configs=("configs.yaml",)
)
FORMS = (
    TRAINED,
    Form("TBPS-CLIP", r"encode_text\.token_embedding\.weight", without("encode_text."), OPENAIS),
    Form("Long-CLIP", "positional_embedding_res", from_long_clip, OPENAIS),
    Form("OpenAI's archive", "input_resolution", facts=OPENAIS),
    Form(
        "transformers' CLIPModel",
        r"text_model\.embeddings\.token_embedding\.weight",
        from_transformers,
        configs=("config.json", "irra.json", "open_clip_config.json"),
    ),
    Form("open_clip's, a text tower", r"text\.token_embedding\.weight", without("text."), configs=BESIDE),
    Form("OpenAI's names", r"token_embedding\.weight", configs=BESIDE),
)
# of CLIP's files, and nothing of IRRA's encoders; simclr_mlp is a head of TBPS-CLIP
DROPPED = re.compile(
    r"logit_scale|logit_bias|input_resolution|context_length|vocab_size|mask[12]|temperature|simclr_mlp\..*"
    r"|n_averaged|(.*\.)?(attn_mask|position_ids)"
)


class Family(NamedTuple):
    """Weights of another arithmetic. keys: names that it has, all of them; lacks: one that it has not."""

    name: str
    keys: tuple
    lacks: str | None = None


TRUNK = r"(visual\.trunk|visual|vision_model|image_encoder\.model)\."
FAMILIES = (  # the first one that fits; more special ones come first
    Family(
        "a model with LoRA adapters that are yet to be merged into it, or these alone (merge_and_unload of "
        "PEFT merges them)",
        (r".*lora_[AB]\b.*",),
    ),
    Family("Perception Encoder", (r"visual\.trunk\.attn_pool\.latent", r"visual\.trunk\.cls_token")),
    Family("SigLIP", (r"visual\.trunk\.attn_pool\.latent|vision_model\.head\.probe",)),
    Family("EVA-CLIP", (rf"{TRUNK}blocks\.0\.(attn\.(q_bias|q_proj.*|inner_attn_ln.*)|mlp\.(w1|fc1_g).*)",)),
    Family("MobileCLIP", (r"image_encoder\.model\..*|visual\.trunk\.stem\.0\.(conv_kxk|reparam_conv).*",)),
    Family("MobileCLIP", (r"visual\.trunk\.patch_embed\.backbone\.0\.conv\.weight",)),
    Family("CoCa", (r"text_decoder\..*|visual\.attn_pool\..*",)),
    Family("open_clip's with an image tower of timm", (r"visual\.trunk\..*",)),
    Family("BLIP or ALBEF", (r"visual_encoder\..*", r"text_encoder\..*")),
    Family("open_clip's with a text encoder of transformers", (r"text\.transformer\.embeddings\..*",)),
    Family("Chinese-CLIP", (r"bert\..*|text_model\.encoder\.layer\.0\..*",)),
    Family("AltCLIP", (r"text_model\.roberta\..*",)),
    Family("open_clip's with LayerScale (ViT-*-alt)", (r".*\.resblocks\.0\.ls_1\.gamma",)),
    Family("an image encoder alone", (r"vision_model\.embeddings\..*",), r"text_model\..*"),
    Family("a text encoder alone", (r"text_model\.embeddings\..*",), r"vision_model\..*"),
    Family(
        "an image encoder alone", (r"visual\.(conv1|class_embedding|layer1).*",), r"(.*\.)?token_embedding.*"
    ),
    Family("an image encoder of ImageNet's kind (timm)", (r"patch_embed\.proj\.weight",)),
    Family(
        "CLIPA (no norm before the blocks, image features by average pooling)",
        (r"visual\.class_embedding", r"visual\.transformer\.resblocks\.0\.ln_1\.weight"),
        r"visual\.ln_pre\..*",
    ),
    Family("with a bias in its text projection, as SigLIP's", (r"text\.text_projection\.bias",)),
)


def has(weights, pattern):
    return any(re.fullmatch(pattern, key) for key in weights)


def refuse_families(weights, path):
    """InputError, by its name, where CLIP's arithmetic does not hold for these weights."""
    for family in FAMILIES:
        complete = family.lacks and has(weights, family.lacks)
        if not complete and all(has(weights, key) for key in family.keys):
            raise InputError(
                f"{path} is refused: it is {family.name}, and IRRA starts from a CLIP like OpenAI's (class "
                "token, causal text encoder)"
            )


# ---- a file of any form ----


class Start(NamedTuple):
    """What a training can start from."""

    path: Path
    form: Form
    weights: dict  # of CLIP, by OpenAI's names
    heads: dict  # of IRRA, by their names, where the file has some
    facts: dict  # of a checkpoint's "clip" part, see read_facts


def read_start(path):
    """The Start in a file of any form. Raises InputError, which names what else it is."""
    path = Path(path)
    tree = read_file(path)
    weights, others = named_tensors(tree, path)
    form = next((form for form in FORMS if has(weights, form.key)), None)
    heads, facts = {}, {}
    if form is TRAINED:
        heads = {key: value for key, value in weights.items() if not key.startswith("base_model.")}
        weights = without("base_model.")({key: weights[key] for key in weights if key not in heads})
        facts = read_facts(tree.get("clip"), path)
    refuse_families(weights, path)
    if form is None:
        shown = ", ".join(list(weights)[:3]) or "nothing"
        raise InputError(f"{path} holds no CLIP model that IRRA knows (its tensors: {shown}, …)")
    try:
        weights = form.rename(weights)
    except (KeyError, RuntimeError, IndexError) as error:  # parts that do not belong together
        raise InputError(f"{path} is damaged: as {form.name} it does not fit together ({error})") from None
    dropped = [key for key in weights if DROPPED.fullmatch(key)]
    weights = {key: value for key, value in weights.items() if key not in dropped}
    beside = {"left out": dropped, "heads beside it": tops(heads), "left out beside it": tops(others)}
    found = "".join(f"; {what}: {', '.join(sorted(names))}" for what, names in beside.items() if names)
    logger.info(f"{path}: {form.name}{found}")
    return Start(path, form, weights, heads, facts)


def tops(names):
    return {name.split(".")[0] for name in names}


def read_facts(said, source):
    """The "clip" part of a checkpoint: how its weights compute, where it is not as OpenAI's do."""
    if said is None:
        return {}
    facts = {name: said.get(name) for name in OPENAIS} if isinstance(said, dict) else {}
    widths = [value for name, value in facts.items() if name != "activation"]
    sound = all(isinstance(width, int) and width > 0 for width in widths)
    if not sound or facts.get("activation") not in tuple(ACTIVATIONS):
        raise InputError(f'{source}: its part "clip" does not say {", ".join(OPENAIS)}')
    return facts
