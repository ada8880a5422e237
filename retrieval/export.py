"""The two encoders of a run for other programs, in four forms; each is checked against the run."""

import contextlib
import json
import logging
import math
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.tokenizer import EOT, MASK, PUNCTUATION, SOT, VOCABULARY, tokenize_all, vocabulary_file
from datasets.transforms import MEAN, STD
from model.irra import at_eot
from model.pretrained import architecture, image_grid, new_clip
from model.weights_file import POSITIONS_GRID
from retrieval.cards import model_card
from retrieval.encoders import numbers
from retrieval.transformers_clip import fast_tokenizer, their_settings, their_weights
from utils.errors import InputError
from utils.extras import extra
from utils.files import make_folder, name_beside, remove_leftovers, uninterrupted

MOST = 1e-4  # the largest difference that is accepted, absolute, of features that are not normalised
OPSET = 18
FACTS = "irra.json"  # by which an export is known
SENTENCES = (  # what the exported text encoder is checked with: short, with a mask and marks, cut at the end
    "a woman in a red coat with a black bag",
    "man",
    "a <|mask|> man with grey trousers, white sneakers and a green backpack, walking away from the camera",
    'A "tall" man (about 30): brown shoes; no bag! * and # a ~ hat.',
    "a boy in a striped t-shirt " * 30,
)


@torch.no_grad()
def export(encoders, args, kind, folder):
    """Write a form (kind: of utils.options.FORMATS) of a run's encoders, fp32 on the CPU, to a folder.

    It appears there once its features have been compared with the run's. Returns the largest difference.
    """
    folder = Path(os.path.abspath(folder))
    check_place(folder)
    if encoders.model.selects:
        raise InputError(
            f"the {kind} form has no place for the second embedding of this run (--token_selection): search "
            "with the run itself"
        )
    make_folder(folder.parent, "--output")
    remove_leftovers(folder.parent, folder.name)  # of an export that was killed
    beside = name_beside(folder)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        facts = described(encoders, args)
        difference = WRITERS[kind](encoders, facts, beside)
        if not difference <= MOST:
            raise InputError(
                f"the {kind} form gives other features than the run (largest difference {difference:.1e}, at "
                f"most {MOST} is accepted), so nothing is written"
            )
        write_json(beside / FACTS, facts)
        shutil.copy(vocabulary_file(), beside / VOCABULARY)
        (beside / "README.md").write_text(model_card(args, facts, kind, difference), encoding="utf-8")
        put_in_place(beside, folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; the export is not complete"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return difference


def check_place(folder):
    """InputError where the files of an export would come among, or over, files that are none."""
    try:
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:  # not there, or told where it is written
        return
    if names and FACTS not in names:
        raise InputError(
            f"{folder} holds other files than an earlier export's ({', '.join(sorted(names)[:3])}): give "
            "another --output"
        )


def put_in_place(beside, folder):
    """At once where there is no such folder yet; else in the place of an earlier export's files."""
    if not folder.exists():
        return os.rename(beside, folder)
    with uninterrupted():
        for path in sorted(beside.iterdir()):
            os.replace(path, folder / path.name)


def described(encoders, args):
    """What a program needs beside the weights: how pixels and words become numbers."""
    clip = encoders.model.base_model
    sizes = architecture(clip.state_dict(), facts=clip.facts)
    cleaning = "ftfy, html unescaped twice, whitespace collapsed, lower case"
    if encoders.tokenizer.plain:
        cleaning += f"; each of {' '.join(PUNCTUATION)} to a space, and whitespace collapsed again"
    return {
        "architecture": {**sizes, "stride_size": args.stride_size},
        "image": {
            "size": list(encoders.img_size),
            "resize": "bilinear, antialiased (Pillow), to exactly this height and width",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "text": {
            "vocabulary": VOCABULARY,
            "context_length": encoders.text_length,
            "start": SOT,
            "end": EOT,
            "mask": MASK,
            "padding": 0,
            "cleaning": cleaning,
            "note": f"id {MASK} is <|mask|>; in OpenAI's vocabulary it is jekyll</w>, here two pieces",
        },
        "features": "fp32, not L2-normalised; similarity is the inner product after normalising",
        "temperature": 1 / float(encoders.model.logit_scale),
        "epoch": encoders.epoch if isinstance(encoders.epoch, int) else None,
    }


# ---- the forms ----


def clip_weights(model):
    """The encoders' weights by OpenAI's names, fp32, contiguous."""
    return {name: value.float().contiguous() for name, value in model.base_model.state_dict().items()}


def weights_and_scale(model, facts):
    """The same, and the similarities' scale as every CLIP has it."""
    return {**clip_weights(model), "logit_scale": torch.tensor(-math.log(facts["temperature"]))}


def grid_of(facts):
    """(rows, columns) of the image tokens."""
    sizes = facts["architecture"]
    return image_grid(sizes, facts["image"]["size"], sizes["stride_size"])


def header_of(facts):
    """What a safetensors file says of itself: without its grid, 16 positions of 8 x 2 would be 4 x 4."""
    rows, columns = grid_of(facts)
    return {"format": "pt", POSITIONS_GRID: f"{rows}x{columns}"}


def check_plain_vit(facts, library):
    """What other programs' CLIPs can be at any image size: a ViT whose patches do not overlap."""
    sizes = facts["architecture"]
    stride, patch = sizes["stride_size"], sizes["vision_patch_size"]
    if patch is None:
        why = "form is of ViTs, and this run's image encoder is a ResNet"
    elif stride != patch:
        why = f"patches do not overlap (--stride_size {stride}, patches of {patch})"
    else:
        return
    raise InputError(f"{library}'s {why}: choose safetensors or onnx")


def write_weights(path, weights, header):
    """A safetensors file with everybody's rights, whose error on a full disk is an OSError."""
    from safetensors.torch import save

    path.write_bytes(save(weights, metadata=header))


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_safetensors(encoders, facts, folder):
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    write_weights(path, clip_weights(encoders.model), header_of(facts))
    again = load_file(path)
    stride = facts["architecture"]["stride_size"]
    sizes = architecture(again, facts=encoders.model.base_model.facts)
    clip = new_clip(sizes, encoders.img_size, stride).eval()
    clip.load_state_dict(again)
    return largest_difference(
        encoders,
        lambda images: clip.encode_image(images, class_only=True).flatten(1),
        lambda ids: at_eot(clip.encode_text(ids), ids),
    )


def can_write_onnx():
    """Whether this PyTorch's exporter manages: that of 2.6 ends in errors or crashes, 2.9 and 2.14 do."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def write_onnx(encoders, facts, folder):
    if not can_write_onnx():
        raise InputError(
            f"--format onnx needs PyTorch 2.9 or newer, and this is {torch.__version__}: choose another "
            "form, or export where a newer one is"
        )
    tokenizers, (images, ids) = extra("tokenizers"), sample_inputs(encoders)
    look = graph(Encoder(encoders.model, "encode_image"), "images", images, folder / "image_encoder.onnx")
    read = graph(Encoder(encoders.model, "encode_text"), "ids", ids, folder / "text_encoder.onnx")
    tokenizer = fast_tokenizer(encoders.tokenizer, tokenizers)
    tokenizer.enable_truncation(encoders.text_length)
    tokenizer.enable_padding(length=encoders.text_length, pad_id=0, pad_token="!")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")

    def read_sentences(_):  # not ids: the tokeniser is checked too
        return read(torch.tensor([each.ids for each in tokenizer.encode_batch(list(SENTENCES))]))

    return largest_difference(encoders, look, read_sentences)


class Encoder(nn.Module):
    """An encode_image or encode_text as a module of its own, as the exporter wants it."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


def graph(encoder, name, example, path):
    """Write an encoder as an ONNX file, which onnx finds sound. name: of its input. Returns what runs it."""
    onnx, runtime = extra("onnx"), extra("onnxruntime")
    extra("onnxscript")
    with quiet():
        torch.onnx.export(
            encoder.eval(),
            (example,),
            str(path),
            input_names=[name],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    onnx.checker.check_model(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs):  # in two batches, of other sizes than the example's
        found = [session.run(None, {name: some.numpy()})[0] for some in (inputs[:1], inputs[1:])]
        return torch.from_numpy(np.concatenate(found))

    return run


@contextlib.contextmanager
def quiet():
    """Without an exporter's or a loader's remarks; errors still raise."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_open_clip(encoders, facts, folder):
    import open_clip

    check_plain_vit(facts, "open_clip")
    sizes, image = facts["architecture"], facts["image"]
    config = {
        "model_cfg": {
            "embed_dim": sizes["embed_dim"],
            "quick_gelu": sizes["activation"] == "quick_gelu",
            "vision_cfg": {
                "image_size": image["size"],
                "layers": sizes["vision_layers"],
                "width": sizes["vision_width"],
                "head_width": sizes["vision_head_width"],
                "patch_size": sizes["vision_patch_size"],
            },
            "text_cfg": {
                "context_length": sizes["context_length"],
                "vocab_size": sizes["vocab_size"],
                "width": sizes["transformer_width"],
                "heads": sizes["transformer_width"] // sizes["transformer_head_width"],
                "layers": sizes["transformer_layers"],
            },
        },
        "preprocess_cfg": {
            "size": image["size"],
            "mean": image["mean"],
            "std": image["std"],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    write_json(folder / "open_clip_config.json", config)
    weights = weights_and_scale(encoders.model, facts)
    write_weights(folder / "open_clip_model.safetensors", weights, header_of(facts))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    missing = sizes["context_length"] - encoders.text_length
    return largest_difference(
        encoders, model.encode_image, lambda ids: model.encode_text(nn.functional.pad(ids, (0, missing)))
    )


def write_transformers(encoders, facts, folder):
    check_plain_vit(facts, "transformers")
    transformers, tokenizers = extra("transformers"), extra("tokenizers")
    weights = their_weights(weights_and_scale(encoders.model, facts), grid_of(facts))
    write_weights(folder / "model.safetensors", weights, {"format": "pt"})
    for name, content in their_settings(facts).items():
        write_json(folder / name, content)
    tokenizer = fast_tokenizer(encoders.tokenizer, tokenizers)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    transformers.utils.logging.disable_progress_bar()
    with quiet():
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        processor = transformers.CLIPProcessor.from_pretrained(folder)

    def read(_):  # sentences, not ids: the tokeniser is checked too
        words = processor(text=list(SENTENCES), return_tensors="pt", padding=True, truncation=True)
        return model.text_projection(model.text_model(**words).pooler_output)

    def look(images):
        found = model.vision_model(pixel_values=images, interpolate_pos_encoding=True)
        return model.visual_projection(found.pooler_output)

    return largest_difference(encoders, look, read)


WRITERS = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "open_clip": write_open_clip,
    "transformers": write_transformers,
}


# ---- the check ----


def sample_inputs(encoders):
    """Noise as images and a few sentences as ids."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *encoders.img_size, generator=generator)
    return images, tokenize_all(list(SENTENCES), encoders.text_length, encoders.tokenizer.plain)


def largest_difference(encoders, image_features, text_features):
    """Between the run's features and those of two other functions, absolute."""
    images, ids = sample_inputs(encoders)
    differences = []
    for own, other, inputs in (
        (encoders.model.encode_image, image_features, images),
        (encoders.model.encode_text, text_features, ids),
    ):
        expected, found = own(inputs), other(inputs)
        if found.shape != expected.shape:
            return math.inf
        differences.append(np.abs(numbers(expected.numpy()) - found.numpy()).max())
    return float(np.max(differences))  # of Python's max, one that is no number would be lost
