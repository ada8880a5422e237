"""Where the words of a sentence look in an image: by what they add to the similarity of the two, or by the
attention of the interaction module."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode

from datasets.tokenizer import tokenize
from datasets.transforms import normalise, resize
from model.irra import at_eot, pooled
from model.pretrained import architecture, image_grid
from retrieval.contact_sheet import PAPER, font_of, inside, shortened, write
from utils.device import out_of_memory
from utils.errors import InputError


class WordMap(NamedTuple):
    word: str
    map: np.ndarray  # (rows, columns) of image tokens; those of a sentence can be compared


def words_of(sentence, tokenizer, text_length):
    """[(word, its token positions)]: words as written between spaces, cut where the model's input is.

    Punctuation at a word has tokens of its own; they are left out where the word has others.
    """
    words, position = [], 1  # position 0 is SOT
    for word in tokenizer.clean(sentence).split(" "):
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


def word_maps(encoders, sentence, picture, by="relevance", numbers=None):
    """[WordMap, …] of a sentence over a PIL picture, class token left out.

    by: of WAYS. numbers: of the words that are wanted, from 0; None: all. Raises InputError where a model has
    no interaction module and its attention is asked for.
    """
    words = words_of(sentence, encoders.tokenizer, encoders.text_length)
    words = words if numbers is None else [words[number] for number in numbers]
    with out_of_memory(encoders.device):
        pixels = normalise(resize(picture, encoders.img_size)[None].to(encoders.device))
        seen = WAYS[by](encoders, sentence, pixels, [positions for _, positions in words])
    grid = grid_of(encoders)
    rows = [row[1:].float().cpu().numpy() for row in seen]
    return [WordMap(word, row.reshape(grid)) for (word, _), row in zip(words, rows, strict=True)]


@torch.inference_mode()
def by_attention(encoders, sentence, pixels, words):
    """[(N,), …] for words, which are lists of positions: the cross-attention weights of their tokens over the
    image tokens, mean over heads and over a word's tokens."""
    model = encoders.model
    if not hasattr(model, "cross_attn"):
        raise InputError(
            "the cross attention of the words cannot be shown: this run was trained without mlm among its "
            "losses and has no interaction module; --words_by relevance needs none"
        )
    ids = tokenize(sentence, encoders.tokenizer, encoders.text_length)[None].to(encoders.device)
    with model.autocast(encoders.device):
        text = model.base_model.encode_text(ids)  # (1, L, D)
        image = model.base_model.encode_image(pixels)  # (1, N, D)
        text, image = model.ln_pre_t(text), model.ln_pre_i(image)
        _, (weights,) = model.cross_attn(text, image, image)  # (L, N)
    return [weights[positions].mean(dim=0) for positions in words]


def by_relevance(encoders, sentence, pixels, words):
    """[(N,), …] for words: of what each adds to the similarity, how much comes from each image token.

    The relevance of Chefer et al. (arXiv 2103.15679) for the class token, through the image encoder's
    attention. What a word adds: the cosine with the sentence minus that with the sentence without the word,
    whose other words stay in their places.
    """
    clip = encoders.exact
    (ids,) = encoders.tokens(sentence)
    places = torch.stack([without(positions, len(ids)) for positions in ([], *words)]).to(ids.device)
    with torch.no_grad():
        text = F.normalize(at_eot(clip.encode_text(ids[places], places=places), ids[places]), dim=1)
        added = text[:1] - text[1:]  # (W, D)
    with torch.enable_grad(), OpenAttention() as seen:
        tokens = clip.encode_image(pixels.requires_grad_(), class_only=True)
        scores = added @ F.normalize(pooled(tokens), dim=1)[0]  # (W,)
    # word by word: a backward pass for all at once would hold the layers as often as there are words
    slopes = (torch.autograd.grad(score, seen.weights, retain_graph=True) for score in scores)
    return [relevance(seen.weights, of_word) for of_word in slopes]


WAYS = {"relevance": by_relevance, "attention": by_attention}  # WORDS_BY of utils.options


def without(positions, length):
    """(length,) places in a sentence, those of these positions last: behind its end, where the causal encoder
    does not see them."""
    return torch.tensor(sorted(range(length), key=lambda place: place in positions))


class OpenAttention(TorchFunctionMode):
    """Computes attention (not a causal one) in the open while it is on, and keeps each layer's weights."""

    def __init__(self):
        super().__init__()
        self.weights = []  # (B, heads, Q, K) each, in the order of the layers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        self.weights.append((query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3))
        return self.weights[-1] @ value


@torch.no_grad()
def relevance(weights, slopes):
    """The class token's row of (1 + Ā_n) … (1 + Ā_1): (N,). Ā: max(0, slope · weight), mean over heads.

    weights, slopes: of an image, (1, heads, N, N) a layer; of the last one the first row is enough.
    """
    pairs = zip(weights, slopes, strict=True)
    *layers, last = [(weight * slope)[0].clamp(min=0).mean(dim=0) for weight, slope in pairs]
    row = last[0].clone()
    row[0] += 1
    for layer in reversed(layers):
        row = row + row @ layer
    return row


def grid_of(encoders):
    """(rows, columns) of image tokens."""
    clip = encoders.model.base_model
    return image_grid(architecture(clip.state_dict()), encoders.img_size, clip.visual.conv1.stride[0])


# ---- drawing ----

COLD_TO_HOT = np.array([(30, 20, 90), (80, 40, 160), (200, 60, 120), (250, 150, 60), (255, 245, 160)], float)
HEIGHT, GAP, LINE, PER_ROW, WORD = 256, 12, 24, 8, 240


def tile(picture, height):
    """The picture `height` high, or less where it is more than four times as wide."""
    return inside(picture, (4 * height, height), least=48)


def end_of_scale(weights):
    """The largest weight, but not below four times an even spread: an even map stays dark."""
    return max(weights.max(), 4 * weights.mean())


def heat(picture, weights, height=HEIGHT, most=0):
    """A word's map laid over the picture: warm and light where the word looks. Returns a PIL picture.

    most: the largest end_of_scale of the maps beside it. The colours end at the geometric mean of that and of
    the map's own: of a word whose weights are a hundredth of another's they go a tenth as far.
    """
    grey, own = tile(picture.convert("L"), height), end_of_scale(weights)
    end = math.sqrt(own * max(own, most)) or 1  # 0 where the words add nothing: then nothing is lit
    share = Image.fromarray((weights / end).astype(np.float32))
    share = np.clip(np.asarray(share.resize(grey.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    places = share[..., 0] * (len(COLD_TO_HOT) - 1)
    channels = [np.interp(places, range(len(COLD_TO_HOT)), COLD_TO_HOT[:, c]) for c in range(3)]
    opacity = 0.3 + 0.4 * share  # (H, W, 1)
    mixed = (1 - opacity) * np.asarray(grey, float)[..., None] + opacity * np.stack(channels, axis=-1)
    return Image.fromarray(mixed.astype(np.uint8))


def draw_word_maps(picture, maps):
    """The picture and, beside it, one heat map for each word with the word below. Returns a PIL picture."""
    tiles = [("", tile(picture, HEIGHT))]
    most = max(end_of_scale(weights) for _, weights in maps)
    tiles += [(word, heat(picture, weights, most=most)) for word, weights in maps]
    font = font_of(14)
    tiles = [(shortened(word, WORD, font), drawn) for word, drawn in tiles]
    width = max(tiles[0][1].width, *(math.ceil(font.getlength(word)) for word, _ in tiles)) + GAP
    across = min(len(tiles), PER_ROW)
    lines = math.ceil(len(tiles) / PER_ROW)
    sheet = Image.new("RGB", (GAP + across * width, GAP + lines * (HEIGHT + LINE + GAP)), PAPER)
    for place, (word, drawn) in enumerate(tiles):
        x = GAP + place % PER_ROW * width
        y = GAP + place // PER_ROW * (HEIGHT + LINE + GAP)
        sheet.paste(drawn, (x, y))
        write(sheet, (x, y + HEIGHT + 4), (width - GAP, LINE - 4), word, font)
    return sheet
