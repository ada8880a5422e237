"""Where the words of a sentence look in an image: the attention of the interaction module."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.tokenizer import clean, tokenize
from datasets.transforms import normalise, resize, resized
from retrieval.contact_sheet import PAPER, font_of, shortened, write
from utils.errors import InputError


class WordMap(NamedTuple):
    word: str
    map: np.ndarray  # (rows, columns) of image tokens, sums to 1


def words_of(sentence, tokenizer, text_length):
    """[(word, its token positions)]: words as written between spaces, cut where the model's input is.

    Punctuation at a word has tokens of its own; they are left out where the word has others.
    """
    words, position = [], 1  # position 0 is SOT
    for word in clean(sentence).split(" "):
        positions, letters = [], []
        for piece in tokenizer.pattern.findall(word):
            ids = tokenizer.encode(piece)
            places = range(position, position + len(ids))
            position += len(ids)
            positions += places
            letters += places if any(character.isalnum() for character in piece) else []
        kept = [place for place in letters or positions if place < text_length - 1]
        if kept:
            words.append((word, kept))
    return words


def attention_weights(attn, query, key):
    """Weights of an nn.MultiheadAttention, heads averaged, fp32: (B, Q, D), (B, K, D) to (B, Q, K)."""
    B, Q, D = query.shape
    heads, width = attn.num_heads, D // attn.num_heads
    wq, wk, _ = attn.in_proj_weight.chunk(3)
    bq, bk, _ = attn.in_proj_bias.chunk(3)
    q = F.linear(query, wq, bq).view(B, -1, heads, width).transpose(1, 2).float()
    k = F.linear(key, wk, bk).view(B, -1, heads, width).transpose(1, 2).float()
    return (q @ k.transpose(2, 3) / width**0.5).softmax(dim=-1).mean(dim=1)


@torch.inference_mode()
def word_maps(encoders, sentence, picture):
    """[WordMap, …] of a sentence over a PIL picture: for each word the cross-attention weights of its tokens
    over the image tokens, mean over heads, sum over the word's tokens, the class token left out.

    Raises InputError for a model without the interaction module.
    """
    model = encoders.model
    if not hasattr(model, "cross_attn"):
        raise InputError(
            "where the words look cannot be told: this run was trained without mlm among its losses and "
            "has no interaction module"
        )
    ids = tokenize(sentence, encoders.tokenizer, encoders.text_length)[None].to(encoders.device)
    pixels = normalise(resize(picture, encoders.img_size)[None].to(encoders.device))
    with model.autocast(encoders.device):
        text = model.base_model.encode_text(ids)  # (1, L, D)
        image = model.base_model.encode_image(pixels)  # (1, N, D)
        weights = attention_weights(model.cross_attn, model.ln_pre_t(text), model.ln_pre_i(image))[
            0
        ]  # (L, N)
    maps = []
    for word, positions in words_of(sentence, encoders.tokenizer, encoders.text_length):
        seen = weights[positions].sum(dim=0)[1:].cpu().numpy()
        maps.append(WordMap(word, (seen / seen.sum()).reshape(grid_of(encoders))))
    return maps


def grid_of(encoders):
    """(rows, columns) of image tokens."""
    visual = encoders.model.base_model.visual
    sides = zip(encoders.img_size, visual.conv1.kernel_size, visual.conv1.stride, strict=True)
    return tuple((side - patch) // stride + 1 for side, patch, stride in sides)


# ---- drawing ----

COLD_TO_HOT = np.array([(30, 20, 90), (80, 40, 160), (200, 60, 120), (250, 150, 60), (255, 245, 160)], float)
BICUBIC = Image.Resampling.BICUBIC
HEIGHT, GAP, LINE, PER_ROW, WORD = 256, 12, 24, 8, 240


def tile_size(picture, height):
    """(width, height) it is drawn in: `height` high, at most four times as wide, 48 at least either way."""
    scale = min(height / picture.height, 4 * height / picture.width)
    return max(48, round(picture.width * scale)), max(48, round(picture.height * scale))


def heat(picture, weights, height=HEIGHT):
    """A word's map laid over the picture: warm and light where the word looks. Returns a PIL picture.

    The scale ends at the largest weight, but not below four times an even spread: an even map stays dark.
    """
    size = tile_size(picture, height)
    share = Image.fromarray((weights / max(weights.max(), 4 * weights.mean())).astype(np.float32))
    share = np.clip(np.asarray(share.resize(size, BICUBIC)), 0, 1)[..., None]
    places = share[..., 0] * (len(COLD_TO_HOT) - 1)
    channels = [np.interp(places, range(len(COLD_TO_HOT)), COLD_TO_HOT[:, c]) for c in range(3)]
    grey = np.asarray(resized(picture.convert("L"), size, BICUBIC).convert("RGB"), float)
    opacity = 0.3 + 0.4 * share  # (H, W, 1)
    mixed = (1 - opacity) * grey + opacity * np.stack(channels, axis=-1)
    return Image.fromarray(mixed.astype(np.uint8))


def draw_word_maps(picture, maps):
    """The picture and, beside it, one heat map for each word with the word below. Returns a PIL picture."""
    tiles = [("", resized(picture, tile_size(picture, HEIGHT), BICUBIC))]
    tiles += [(word, heat(picture, weights)) for word, weights in maps]
    font = font_of(14)
    tiles = [(shortened(word, WORD, font), tile) for word, tile in tiles]
    width = max(tiles[0][1].width, *(math.ceil(font.getlength(word)) for word, _ in tiles)) + GAP
    across = min(len(tiles), PER_ROW)
    lines = -(-len(tiles) // PER_ROW)
    sheet = Image.new("RGB", (GAP + across * width, GAP + lines * (HEIGHT + LINE + GAP)), PAPER)
    for place, (word, tile) in enumerate(tiles):
        x = GAP + place % PER_ROW * width
        y = GAP + place // PER_ROW * (HEIGHT + LINE + GAP)
        sheet.paste(tile, (x, y))
        write(sheet, (x, y + HEIGHT + 4), (width - GAP, LINE - 4), word, font)
    return sheet
