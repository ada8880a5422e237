"""What transformers' CLIPModel and CLIPProcessor load: weights, positions, settings and a tokeniser."""

import math

import ftfy.chardata
import torch
import torch.nn.functional as F

from datasets.tokenizer import EOT, MASK, PUNCTUATION, SOT
from model.weights import TRANSFORMERS

# ---- the weights ----


def their_weights(weights, grid):
    """The state dict of a CLIPModel. weights: by OpenAI's names; grid: (rows, columns) of its positions."""
    theirs = {}
    for name, value in weights.items():
        if name == "visual.positional_embedding":
            value = square_positions(value, grid)
        elif name in ("visual.proj", "text_projection"):  # theirs are linear layers
            value = value.T
        new = their_name(name)
        if "in_proj_" in new:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                theirs[new.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            theirs[new] = value.contiguous()
    return theirs


def their_name(name):
    for theirs, ours in TRANSFORMERS:
        if name.startswith(ours) or ours.startswith("."):  # what stands within a block
            name = name.replace(ours, theirs)
    return name


def square_positions(positions, grid):
    """(1 + rows·columns, W) positions as those of a square grid whose interpolation gives them back.

    transformers keeps positions of a square grid and, asked to, interpolates them (bicubic, without
    antialiasing) to the image's. Where an odd number of places becomes one, the middle one is taken: of 24 x
    8 each column stands three times in 24 x 24, and what comes back is exact, elsewhere up to rounding.
    """
    plane = positions[1:].double().reshape(*grid, -1)
    rows, columns = (stretch(length, max(grid)) for length in grid)
    plane = torch.einsum("yr,xc,rcw->yxw", rows, columns, plane)
    return torch.cat([positions[:1], plane.flatten(0, 1).to(positions.dtype)])


def stretch(length, side):
    """(side, length): repeats each place, then changes as little as makes the interpolation its inverse."""
    repeated = torch.eye(length)[torch.arange(side) * length // side]
    taken = F.interpolate(torch.eye(side)[None, None], size=(length, side), mode="bicubic")[0, 0]
    repeated, taken = repeated.double(), taken.double()  # (side, length), (length, side)
    return repeated + torch.linalg.pinv(taken) @ (torch.eye(length) - taken @ repeated)


# ---- the settings ----


def their_settings(facts):
    """{file name: content}, beside weights and tokenizer.json. facts: see retrieval.export.described."""
    return {
        "config.json": model_config(facts),
        "preprocessor_config.json": image_config(facts["image"]),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",  # CLIPTokenizer would make its own of the pieces
            "model_max_length": facts["text"]["context_length"],
            # id 0, as in training, is also the piece "!"; a token that has a role is not looked for in text,
            # which is why those that may be typed have none here
            "pad_token": "!",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
    }


def model_config(facts):
    sizes = facts["architecture"]

    def tower(part):
        width = sizes[f"{part}_width"]
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": sizes[f"{part}_layers"],
            "num_attention_heads": width // sizes[f"{part}_head_width"],
            "projection_dim": sizes["embed_dim"],
            "hidden_act": sizes["activation"],
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes["embed_dim"],
        "logit_scale_init_value": -math.log(facts["temperature"]),
        "text_config": {
            **tower("transformer"),
            "max_position_embeddings": sizes["context_length"],
            "vocab_size": sizes["vocab_size"],
            "bos_token_id": SOT,
            "eos_token_id": EOT,  # their feature is that of the first one, as ours
            "pad_token_id": 0,
        },
        "vision_config": {
            **tower("vision"),
            "image_size": max(facts["image"]["size"]),  # a square image needs no interpolation
            "patch_size": sizes["vision_patch_size"],
        },
    }


def image_config(image):
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": dict(zip(("height", "width"), image["size"], strict=True)),
        "resample": 2,  # Pillow's number of bilinear
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
    }


# ---- the tokeniser ----

SPECIAL = {MASK: "<|mask|>", SOT: "<|startoftext|>", EOT: "<|endoftext|>"}
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " "}


def fast_tokenizer(own, tokenizers):
    """A tokenizers.Tokenizer that gives the ids of own, a SimpleTokenizer, between start and end.

    Of the cleaning before, it does what can be said by replacements: not what needs ftfy's judgement.
    """
    normal, before = tokenizers.normalizers, tokenizers.pre_tokenizers
    pieces = tokenizers.models.BPE(
        vocab=own.encoder, merges=list(own.merge_rank), end_of_word_suffix="</w>", unk_token=SPECIAL[EOT]
    )
    tokenizer = tokenizers.Tokenizer(pieces)
    gone = dict.fromkeys(ftfy.chardata.CONTROL_CHARS, "")
    characters = {**gone, **ftfy.chardata.LIGATURES, **ftfy.chardata.WIDTH_MAP}
    quotes = {ftfy.chardata.SINGLE_QUOTE_RE.pattern: "'", ftfy.chardata.DOUBLE_QUOTE_RE.pattern: '"'}
    names = [text.strip("<|>") for text in SPECIAL.values()]
    after_punctuation = r"(?<=[^\s\p{L}\p{N}])" + "".join(rf"(?<!<\|{name}\|>)" for name in names)
    left_out = [normal.Replace(mark, " ") for mark in PUNCTUATION] if own.plain else []
    typed = rf"{after_punctuation}<\|(?=({'|'.join(names)})\|>)"
    tokenizer.normalizer = normal.Sequence(
        [
            *(normal.Replace(old, new) for old, new in ENTITIES.items()),
            *(normal.Replace(chr(old), new) for old, new in characters.items()),
            *(normal.Replace(tokenizers.Regex(old), new) for old, new in quotes.items()),
            normal.NFC(),
            *left_out,
            normal.Replace(tokenizers.Regex(r"\s+"), " "),
            normal.Strip(),
            normal.Lowercase(),
            # right after a punctuation mark own reads a special token as text: so that it is not found
            normal.Replace(tokenizers.Regex(typed), "<| "),
        ]
    )
    tokenizer.pre_tokenizer = before.Sequence(
        [
            before.Split(tokenizers.Regex(own.pattern.pattern), behavior="removed", invert=True),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIAL[SOT]} $A {SPECIAL[EOT]}",
        special_tokens=[(SPECIAL[SOT], SOT), (SPECIAL[EOT], EOT)],
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in SPECIAL.values()])
    return tokenizer
