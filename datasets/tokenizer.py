"""CLIP's byte-level BPE with one entry exchanged for `<|mask|>`, captions as ids, and the masking of MLM.

A literal <|startoftext|>, <|mask|> or <|endoftext|> typed in a caption is the special token, as in CLIP.
"""

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

from utils.errors import InputError

MASK, SOT, EOT = 49405, 49406, 49407
SPECIAL = ("<|mask|>", "<|startoftext|>", "<|endoftext|>")  # their pieces
PUNCTUATION = '.!"()*#:;~'  # what plain_caption takes out
START_SIMILARITY = 0.85  # of a word and its image, before any is known: a rate of 0.15 for each word
MERGES = 49152 - 256 - 2
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's; shipped inside the package open_clip_torch


def vocabulary_file():
    found = importlib.util.find_spec("open_clip")
    path = Path(found.origin).parent / VOCABULARY if found else None
    if path is None or not path.is_file():
        raise InputError(
            f"CLIP's vocabulary {VOCABULARY} is not there: pip install open_clip_torch brings it"
        )
    return path


@lru_cache
def bytes_to_unicode():
    """{byte: printable character}: BPE works on characters, none of them a space or a control character."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


@lru_cache(maxsize=1)  # a tenth of a second and more: each split and each caption's tokenizer shares it
def read_vocabulary(path):
    """{merge: rank}, {piece: id} and {id: piece} of a file of merges; not to be changed."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    characters = list(bytes_to_unicode().values())
    # the last merge makes "jekyll</w>", whose place `<|mask|>` takes: the word stays two pieces
    # (published: it is merged and then has no id, a KeyError)
    pieces = characters + [c + "</w>" for c in characters] + ["".join(merge) for merge in merges[:-1]]
    vocabulary = [*pieces, *SPECIAL]
    ranks = {merge: rank for rank, merge in enumerate(merges[:-1])}
    return ranks, {piece: i for i, piece in enumerate(vocabulary)}, dict(enumerate(vocabulary))


class SimpleTokenizer:
    """encode(text) -> ids without SOT and EOT; decode(ids) -> text. plain: text is read by plain_caption."""

    def __init__(self, bpe_path=None, plain=False):
        self.plain = plain
        self.merge_rank, self.encoder, self.decoder = read_vocabulary(bpe_path or vocabulary_file())
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.cache = {special: (special,) for special in SPECIAL}
        self.pattern = regex.compile(
            r"<\|startoftext\|>|<\|mask\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
            r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )

    def bpe(self, word):
        """The pieces of one word, given in byte characters: the earliest learned pair is merged first."""
        if word in self.cache:
            return self.cache[word]
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = zip(pieces, pieces[1:], strict=False)
            best = min(pairs, key=lambda pair: self.merge_rank.get(pair, len(self.merge_rank)))
            if best not in self.merge_rank:
                break
            merged, i = [], 0
            while i < len(pieces):
                if tuple(pieces[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(pieces[i])
                    i += 1
            pieces = merged
        self.cache[word] = tuple(pieces)
        return self.cache[word]

    def clean(self, text):
        """What of a text is read: lower case, single spaces."""
        return plain_caption(clean(text)) if self.plain else clean(text)

    def encode(self, text):
        ids = []
        for word in self.pattern.findall(self.clean(text)):
            word = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            ids.extend(self.encoder[piece] for piece in self.bpe(word))
        return ids

    def decode(self, ids):
        characters = "".join(self.decoder[int(i)] for i in ids)
        data = bytearray(self.byte_decoder[c] for c in characters)
        return data.decode("utf-8", errors="replace").replace("</w>", " ")


def clean(text):
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def plain_caption(caption, most=None):
    """As TBPS-CLIP (arXiv 2308.10045) reads it: lower case, PUNCTUATION as spaces, at most so many words."""
    spaces = str.maketrans(PUNCTUATION, " " * len(PUNCTUATION))
    return " ".join(caption.lower().translate(spaces).split()[:most])


def tokenize(caption, tokenizer, text_length=77, truncate=True):
    """SOT + ids + EOT, padded with 0: a LongTensor [text_length]. A longer caption is cut, its last id EOT.

    Raises InputError for a longer caption where truncate is False.
    """
    ids = [SOT, *tokenizer.encode(caption), EOT]
    if len(ids) > text_length:
        if not truncate:
            raise InputError(f"the caption {caption[:60]!r}… has {len(ids)} tokens, more than {text_length}")
        ids = [*ids[: text_length - 1], EOT]
    padded = torch.zeros(text_length, dtype=torch.long)
    padded[: len(ids)] = torch.tensor(ids)
    return padded


def tokenize_all(captions, text_length=77, plain=False):
    """[len(captions), text_length] ids, each distinct caption encoded once. plain: see SimpleTokenizer."""
    tokenizer = SimpleTokenizer(plain=plain)
    known = {caption: tokenize(caption, tokenizer, text_length) for caption in set(captions)}
    rows = [known[caption] for caption in captions]
    return torch.stack(rows) if rows else torch.zeros(0, text_length, dtype=torch.long)


def augment_tokens(ids, rng):
    """RDE's augmentation of a caption (arXiv 2308.09911): of its words 12 % become MASK, 4 % another one, and
    4 % go. ids: [L]. rng: random.Random; a number for each word in order, and a choice for each new one."""
    kept = []
    for token in ids.tolist():
        if 0 < token < MASK and (drawn := rng.random()) < 0.2:
            if drawn / 0.2 >= 0.8:
                continue
            token = MASK if drawn / 0.2 < 0.6 else rng.choice(range(1, MASK))
        kept.append(token)
    return torch.tensor(kept + [0] * (len(ids) - len(kept)))


def drop_words(caption, probability, rng):
    """Random deletion (TBPS-CLIP, arXiv 2308.10045): the caption without words that fell to `probability`;
    where none would be left, one of them. rng: random.Random; a number for each word in order, and a choice
    of the last one."""
    words = caption.split()
    if len(words) < 2:
        return caption
    kept = [word for word in words if rng.uniform(0, 1) > probability]
    return " ".join(kept or [rng.choice(words)])


def similarity_mask(ids, similarities, rng, mask_rate=0.8, unchanged_rate=0.1):
    """NAM's masking (arXiv 2405.04940): mask_tokens with a rate for each word, lower where it resembles the
    image, 0.15 in the mean. Returns (masked ids, labels) [L].

    ids, similarities: [L]. rng: random.Random; a number for each token, and a choice for each new one.
    similarities: each word's largest cosine with a patch. As published an id 0 ends the words, and what
    follows it has a rate of 1 - similarity as it is.
    """
    rates = 1 - similarities
    end = next((place for place, token in enumerate(ids.tolist()) if token == 0), len(ids))
    words = slice(1, max(end - 1, 1))
    rates[words] = (rates[words] - rates[words].mean() + 0.15).clamp(0, 1)
    masked, labels = ids.clone(), torch.zeros_like(ids)
    for place, (token, rate) in enumerate(zip(ids.tolist(), rates.tolist(), strict=True)):
        if 0 < token < MASK and (drawn := rng.random()) < rate:
            labels[place] = token
            if drawn / rate < mask_rate:
                masked[place] = MASK
            elif drawn / rate < 1 - unchanged_rate:
                masked[place] = rng.choice(range(1, MASK))
    if not labels.any():
        labels[1], masked[1] = ids[1], MASK
    return masked, labels


def mask_tokens(ids, noise, mask_rate=0.8, unchanged_rate=0.1):
    """BERT's masking as the published code does it, for a batch of captions at once.

    ids: [B, L]. noise: [B, 2, L], uniform in [0, 1): the first row chooses positions and what becomes of
    them, the second the random ids. Of the positions with 0 < id < MASK 15 % are chosen; one becomes MASK
    (mask_rate), stays (unchanged_rate) or becomes a random id of 1 … MASK - 1. A caption without a chosen
    position gets position 1 masked. Returns (mlm_ids, mlm_labels) [B, L]; labels: the original ids, else 0.
    """
    eligible = (ids > 0) & (ids < MASK)
    chosen = eligible & (noise[:, 0] < 0.15)
    fate = noise[:, 0] / 0.15
    mlm_ids = torch.where(chosen & (fate < mask_rate), MASK, ids)
    to_random = chosen & (fate >= mask_rate) & (fate < 1 - unchanged_rate)
    mlm_ids = torch.where(to_random, 1 + (noise[:, 1] * (MASK - 1)).long(), mlm_ids)
    labels = torch.where(chosen, ids, 0)
    # position 1 is EOT in an empty caption, and id 0 in one that starts with "!!": that is the forced label
    forced = ~(labels != 0).any(dim=1)
    labels[forced, 1] = ids[forced, 1]
    mlm_ids[forced, 1] = MASK
    return mlm_ids, labels
