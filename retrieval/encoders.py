"""A trained run as two functions: sentences to features, pictures to features."""

import contextlib
import copy
import functools
import hashlib
import math
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from datasets.image_text import finish
from datasets.tokenizer import EOT, SimpleTokenizer, clean, plain_caption, tokenize
from datasets.transforms import as_rgb, open_image, resize
from model.build import build_trained_model, facts_to_keep
from model.irra import PARTS
from utils.checkpoint import load_checkpoint
from utils.device import out_of_memory
from utils.errors import InputError, printable
from utils.file_kinds import BEGINNING, kind_of
from utils.settings import resolve


class Encoders:
    """model: an IRRA on its device, of that epoch. Features are L2-normalised fp32 numpy arrays [n, D]."""

    def __init__(self, model, img_size, text_length, device, fingerprint, plain=False, epoch=None):
        self.model, self.device, self.epoch = model.eval(), device, epoch
        self.img_size, self.text_length = tuple(img_size), text_length
        self.fingerprint = fingerprint  # as fingerprint_of gives it
        self.tokenizer = SimpleTokenizer(plain=plain)
        self.width = model.width

    @functools.cached_property
    def exact(self):
        """CLIP's two encoders in fp32, so that no small gradient becomes zero; a copy if they are fp16."""
        clip = self.model.base_model
        whole = all(parameter.dtype == torch.float32 for parameter in clip.parameters())
        return clip if whole else copy.deepcopy(clip).float()

    def tokens(self, sentence):
        """(1, L) ids, cut after the sentence's end: the encoder is causal and never looked further."""
        ids = tokenize(sentence, self.tokenizer, self.text_length)
        return ids[None, : 1 + int(ids.argmax())].to(self.device)

    @torch.inference_mode()
    def text_features(self, sentences):
        """[n, D]. Sentence by sentence: a query's answer does not depend on what else is asked."""
        with out_of_memory(self.device):
            features = [F.normalize(self.model.encode_text(self.tokens(text)), dim=1) for text in sentences]
            return numbers(torch.cat(features).cpu().numpy())

    @torch.inference_mode()
    def image_features(self, pictures):
        """[n, D] of uint8 tensors [3, H, W], as `pixels` gives them."""
        with out_of_memory(self.device, len(pictures), "--encode_batch"):
            images = finish(torch.stack(pictures), self.device)
            return numbers(F.normalize(self.model.encode_image(images), dim=1).cpu().numpy())

    def pixels(self, path):
        return resize(open_picture(path), self.img_size)

    def encode_files(self, paths, batch_size=64, workers=4, folder=""):
        """Yields (paths, features [n, D], {path: InputError} of those that cannot be read), batch by batch.

        paths: an iterable, below the folder. The next batch is read while this one is encoded.
        """
        paths = iter(paths)
        with ThreadPoolExecutor(workers) as pool:

            def read_batch():
                some = islice(paths, batch_size)
                return [(path, pool.submit(self.pixels, os.path.join(folder, path))) for path in some]

            coming = read_batch()
            while coming:
                reading, coming = coming, read_batch()
                good, bad = {}, {}
                for path, future in reading:
                    try:
                        good[path] = future.result()
                    except InputError as error:
                        bad[path] = error
                nothing = np.zeros((0, self.width), np.float32)
                yield list(good), self.image_features(list(good.values())) if good else nothing, bad


def numbers(features):
    if not np.isfinite(features).all():
        raise InputError("the features of this model are not numbers: it cannot be used")
    return features


def open_run(args):
    """Encoders of the run that a tool's options name (utils.options.tool_args)."""
    checkpoint = Path(args.checkpoint or Path(args.run_dir) / "best.pth")
    state = load_checkpoint(checkpoint)
    weights, device = state["model"], resolve(args).device
    with out_of_memory(device):
        model = build_trained_model(args, weights, checkpoint, state.get("clip"))
    applied = [args.select_ratio, args.text_length] if model.selects else []
    applied += [sorted(facts.items()) for facts in facts_to_keep(model).values()]
    fingerprint = fingerprint_of(weights, args.img_size, args.stride_size, *applied)
    read = args.img_size, args.text_length
    return Encoders(model, *read, device, fingerprint, args.plain_captions, state.get("epoch"))


def fingerprint_of(weights, img_size, stride_size, *more):
    """Changes with the encoders' weights and with how they are applied, and with nothing else.

    weights: a checkpoint's, so that it is the same on every device and in every precision. more: what else
    they are applied with, where it is not as published.
    """
    applied = " ".join(map(str, (list(img_size), stride_size, *more)))
    digest = hashlib.blake2b(applied.encode(), digest_size=16)
    for name in sorted(name for name in weights if PARTS[name.split(".")[0]].encodes):
        digest.update(f"{name} {list(weights[name].shape)}".encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy())  # its bytes, of bfloat16 too
    return digest.hexdigest()


class NotAPicture(InputError):
    """The file was read, and it is no whole picture: that will not change by itself."""


def open_picture(path, box=None):
    """RGB picture of any file that Pillow reads, turned upright as its EXIF data asks for.

    box: (width, height) that the picture will be shown in: a JPEG of more than twice that is decoded at a
    half, a quarter or an eighth of its size, which takes a fraction of the time. Never for the model.
    """
    try:
        with open_image(path) as image:
            if box:
                image.draft(None, enough(image.size, box))
            return as_rgb(image, upright=True)
    except FileNotFoundError:
        raise InputError(f"no picture at {shown(path)}") from None
    except IsADirectoryError:
        raise InputError(f"{shown(path)} is a folder, not a picture") from None
    except UnidentifiedImageError:
        raise NotAPicture(f"{shown(path)} is not a picture that Pillow can read{what_it_is(path)}") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise NotAPicture(
            f"the picture {shown(path)} has too many pixels: make it smaller, at most {most} million are read"
        ) from None
    except MemoryError:
        raise InputError(f"there is not enough memory to read the picture {shown(path)}") from None
    except Exception as error:  # whatever a decoder trips over, the file is no whole picture
        # what the system says, of a permission, of a disk that is away: another time it may be a picture
        system = getattr(error, "strerror", None)
        reason = system or str(error) or type(error).__name__
        kind = InputError if system else NotAPicture
        raise kind(f"the picture {shown(path)} cannot be read ({reason})") from None


def what_it_is(path):
    """' (it is empty)': why a file that is named like a picture is none, where its first bytes tell."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if what := kind_of(file.read(BEGINNING)):
            return f" (it is {what})"
    return ""


def enough(size, box):
    """(width, height), twice what a picture of this size has inside the box, upright or turned."""
    (width, height), (most, high) = size, box
    scale = 2 * max(min(most / width, high / height), min(most / height, high / width))
    return math.ceil(scale * width), math.ceil(scale * height)


def shown(text):
    """A path or a sentence that can be printed, whatever bytes the file system holds."""
    return printable(str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def checked_sentence(sentence, what="the query", plain=False):
    """plain: whether it is read without punctuation; see datasets.tokenizer.SimpleTokenizer."""
    if any("\ud800" <= letter <= "\udfff" for letter in sentence):  # as Python shows bytes of another kind
        raise InputError(f"{what} is not text in UTF-8: type it anew, or give it in a file saved as UTF-8")
    if not clean(sentence):  # as the model gets it
        raise InputError(f"{what} is empty: describe a person in a sentence")
    if plain and not plain_caption(clean(sentence)):
        raise InputError(
            f"{what} is empty but for punctuation, which this run does not read: describe a person in a "
            "sentence"
        )
    return sentence.strip()


def cut_notice(encoders, sentence):
    """One line about a sentence that the model does not read whole, or hardly understands; or None."""
    notes, letters = [], [letter for letter in sentence if letter.isalpha()]
    if 2 * sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) > len(letters):
        notes.append("is not in English letters: only a run that was trained on such captions understands it")
    ids, most = encoders.tokenizer.encode(sentence), encoders.text_length - 2  # without those at its ends
    if len(ids) > most and EOT not in ids[:most]:
        notes.append(f"has {len(ids) + 2} tokens, and the model reads {most + 2}: the rest is cut off")
    begin = sentence if len(sentence) <= 40 else f"{sentence[:40].rstrip()}…"
    return f'"{begin}" {"; it ".join(notes)}' if notes else None
