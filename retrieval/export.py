"""The two encoders of a run for other programs: safetensors, ONNX, open_clip; each is checked."""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.tokenizer import EOT, MASK, SOT, VOCABULARY, tokenize_all, vocabulary_file
from datasets.transforms import MEAN, STD
from model.clip_resnet import ModifiedResNet
from model.pretrained import CHECKPOINTS, POSITIONS_GRID, architecture, image_grid, new_clip
from utils.data_sets import name_of
from utils.errors import InputError
from utils.extras import extra
from utils.run import results_of

MOST = 1e-4  # the largest difference that is accepted, absolute, of features that are not normalised
OPSET = 18
SENTENCES = (  # what the exported text encoder is checked with: short, long, with a mask, cut at the end
    "a woman in a red coat with a black bag",
    "man",
    "a <|mask|> man with grey trousers, white sneakers and a green backpack, walking away from the camera",
    "a boy in a striped t-shirt " * 30,
)


class ImageEncoder(nn.Module):
    """(B, 3, H, W), normalised pixels, to (B, D); not L2-normalised, as model.encode_image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.encode_image(images)


class TextEncoder(nn.Module):
    """(B, L) ids to (B, D); not L2-normalised, as model.encode_text."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.encode_text(ids)


def export(encoders, args, kind, folder):
    """Write a form (kind: of utils.options.FORMATS) of a run's encoders, fp32 on the CPU, to a folder.

    It appears there once its features have been compared with the run's. Returns the largest difference.
    """
    folder = Path(folder)
    if encoders.model.selects:
        raise InputError(
            f"the {kind} form has no place for the second embedding of this run (--token_selection): search "
            "with the run itself"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror} (see --output)") from None
    try:
        difference = WRITERS[kind](encoders, args, beside)
        if not difference <= MOST:
            raise InputError(
                f"the {kind} form gives other features than the run (largest difference {difference:.1e}, at "
                f"most {MOST} is accepted), so nothing is written"
            )
        settings = described(encoders, args)
        (beside / "irra.json").write_text(json.dumps(settings, indent=1) + "\n")
        shutil.copy(vocabulary_file(), beside / VOCABULARY)
        (beside / "README.md").write_text(model_card(args, settings, kind, difference), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for path in sorted(beside.iterdir()):
            path.chmod(0o644)  # safetensors makes its files readable by their owner only
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; the export is not complete") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return difference


def described(encoders, args):
    """What a program needs beside the weights: how pixels and words become numbers."""
    sizes = architecture(encoders.model.base_model.state_dict())
    return {
        "architecture": {**sizes, "stride_size": args.stride_size, "activation": "QuickGELU"},
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
            "cleaning": "ftfy, html unescaped twice, whitespace collapsed, lower case",
            "note": f"id {MASK} is <|mask|>; in OpenAI's vocabulary it is jekyll</w>, here two pieces",
        },
        "features": "fp32, not L2-normalised; similarity is the inner product after normalising",
    }


# ---- the three forms ----


def clip_weights(model):
    """The encoders' weights by OpenAI's names, fp32, contiguous."""
    return {name: value.float().contiguous() for name, value in model.base_model.state_dict().items()}


def header_of(weights, encoders, args):
    """What a safetensors file says of itself: without its grid, 16 positions of 8 x 2 would be 4 x 4."""
    rows, columns = image_grid(architecture(weights), encoders.img_size, args.stride_size)
    return {"format": "pt", POSITIONS_GRID: f"{rows}x{columns}"}


def write_safetensors(encoders, args, folder):
    from safetensors.torch import load_file, save_file

    weights = clip_weights(encoders.model)
    save_file(weights, folder / "model.safetensors", metadata=header_of(weights, encoders, args))
    again = load_file(folder / "model.safetensors")
    clip = new_clip(architecture(again), encoders.img_size, args.stride_size).eval()
    clip.load_state_dict(again)
    images, ids = sample_inputs(encoders)

    def image_features(x):
        tokens = clip.encode_image(x, class_only=True)
        return tokens[:, 0] if tokens.ndim == 3 else tokens

    def text_features(x):
        return clip.encode_text(x)[torch.arange(len(x)), x.argmax(dim=1)]

    return largest_difference(encoders, images, ids, image_features, text_features)


def can_write_onnx():
    """Whether this PyTorch's exporter manages: that of 2.6 ends in errors or crashes, 2.9 and 2.14 do."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def write_onnx(encoders, args, folder):
    if not can_write_onnx():
        raise InputError(
            f"--format onnx needs PyTorch 2.9 or newer, and this is {torch.__version__}: choose safetensors "
            "or open_clip, or export where a newer one is"
        )
    onnx, runtime = extra("onnx"), extra("onnxruntime")
    extra("onnxscript")
    images, ids = sample_inputs(encoders)
    parts = {
        "image_encoder": (ImageEncoder(encoders.model), images, "images", {0: "batch"}),
        "text_encoder": (TextEncoder(encoders.model), ids, "ids", {0: "batch"}),
    }
    sessions = {}
    for name, (module, example, input_name, axes) in parts.items():
        path = folder / f"{name}.onnx"
        with quiet(), torch.no_grad():
            torch.onnx.export(
                module.eval(),
                (example,),
                str(path),
                input_names=[input_name],
                output_names=["features"],
                dynamic_shapes=({axis: torch.export.Dim(label) for axis, label in axes.items()},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        onnx.checker.check_model(str(path))
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        sessions[input_name] = session

    def run(name):
        return lambda x: torch.from_numpy(sessions[name].run(None, {name: x.numpy()})[0])

    found = largest_difference(encoders, images, ids, run("images"), run("ids"))
    one = largest_difference(encoders, images[:1], ids[1:2], run("images"), run("ids"))  # another batch size
    return max(found, one)


@contextlib.contextmanager
def quiet():
    """Without the exporter's remarks on its own folding and deprecations; errors still raise."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_open_clip(encoders, args, folder):
    import open_clip
    from safetensors.torch import save_file

    clip = encoders.model.base_model
    if isinstance(clip.visual, ModifiedResNet):
        raise InputError(
            "open_clip's ResNets take square images only, so this run has no such form: choose another one"
        )
    sizes = architecture(clip.state_dict())
    if args.stride_size != sizes["vision_patch_size"]:
        raise InputError(
            f"open_clip's patches do not overlap (--stride_size {args.stride_size}, patches of "
            f"{sizes['vision_patch_size']}), so this run has no such form: choose safetensors or onnx"
        )
    config = {
        "model_cfg": {
            "embed_dim": sizes["embed_dim"],
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": list(encoders.img_size),
                "layers": sizes["vision_layers"],
                "width": sizes["vision_width"],
                "head_width": 64,
                "patch_size": sizes["vision_patch_size"],
            },
            "text_cfg": {
                "context_length": sizes["context_length"],
                "vocab_size": sizes["vocab_size"],
                "width": sizes["transformer_width"],
                "heads": sizes["transformer_width"] // 64,
                "layers": sizes["transformer_layers"],
            },
        },
        "preprocess_cfg": {
            "size": list(encoders.img_size),
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    logit_scale = torch.tensor(math.log(encoders.model.logit_scale))
    weights = {**clip_weights(encoders.model), "logit_scale": logit_scale}
    save_file(weights, folder / "open_clip_model.safetensors", metadata=header_of(weights, encoders, args))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    images, ids = sample_inputs(encoders)
    ids = nn.functional.pad(ids, (0, sizes["context_length"] - ids.shape[1]))
    return largest_difference(encoders, images, ids, model.encode_image, model.encode_text)


WRITERS = {"safetensors": write_safetensors, "onnx": write_onnx, "open_clip": write_open_clip}


# ---- the check ----


def sample_inputs(encoders):
    """Noise as images and a few sentences as ids; two and more of each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *encoders.img_size, generator=generator)
    return images, tokenize_all(list(SENTENCES), encoders.text_length)


@torch.no_grad()
def largest_difference(encoders, images, ids, image_features, text_features):
    """Between the run's features and those of two other functions, absolute."""
    differences = []
    for own, other, inputs in (
        (encoders.model.encode_image, image_features, images),
        (encoders.model.encode_text, text_features, ids),
    ):
        expected, found = own(inputs), other(inputs)
        if found.shape != expected.shape:
            return math.inf
        differences.append(float(np.abs((expected - found).numpy()).max()))
    return max(differences)


# ---- the model card ----

USE = {
    "safetensors": """`model.safetensors` holds both encoders by the names of OpenAI's CLIP (`visual.…`,
`transformer.…`), `irra.json` how pixels and words become their inputs.

```python
from safetensors.torch import load_file
weights = load_file("model.safetensors")
```""",
    "onnx": """Two graphs, batch size free: `image_encoder.onnx` (`images`, float32 [B, 3, {H}, {W}]) and
`text_encoder.onnx` (`ids`, int64 [B, {L}]); both give `features`, float32 [B, {D}]. `irra.json` says how
pixels and words become their inputs.

```python
import numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession("image_encoder.onnx")
image = Image.open("person.jpg").convert("RGB").resize(({W}, {H}), Image.BILINEAR)
pixels = (numpy.asarray(image) / 255 - {mean}) / {std}
pixels = pixels.astype(numpy.float32).transpose(2, 0, 1)[None]
(features,) = session.run(None, {{"images": pixels}})
features /= numpy.linalg.norm(features, axis=1, keepdims=True)
```""",
    "open_clip": """```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS FOLDER")
model.eval()
```

Images are {H}x{W}, not square; `preprocess` squeezes any picture to that, as in training. open_clip's
tokeniser does not know `<|mask|>`: it would read it as text, and the word "jekyll" as the mask's id. Other
sentences get the ids that training gave them{longer}.""",
}


def model_card(args, settings, kind, difference):
    H, W = settings["image"]["size"]
    longer = ""
    if settings["text"]["context_length"] < settings["architecture"]["context_length"]:
        longer = f"; those of more than {settings['text']['context_length']} tokens, training cut there"
    use = USE[kind].format(
        H=H,
        W=W,
        L=settings["text"]["context_length"],
        D=settings["architecture"]["embed_dim"],
        mean=list(MEAN),
        std=list(STD),
        longer=longer,
    )
    start = args.pretrain_choice if args.pretrain_choice in (*CHECKPOINTS, "random") else "weights of a file"
    return f"""# {args.name}: IRRA on {name_of(args)}

Retrieves the image of a person from a sentence that describes them (IRRA, CVPR 2023, arXiv 2303.12501): an
image and a text encoder into one space of {settings["architecture"]["embed_dim"]} dimensions. Form: {
        kind
    }. The classifier and the
module of masked words, which only training needs, are left out.

## Use

{use}

Features are not L2-normalised; the similarity of a sentence and an image is the inner product of the
normalised ones.

## Training

Data set {name_of(args)}; losses {args.loss_names}; started from {start};
{args.num_epoch} epochs; temperature {args.temperature}.
{figures_of(args)}
## Check

The largest difference between these features and those of the run, over noise images and a few sentences: \
{difference:.1e} (absolute, before normalising).

## Limits

It knows the kind of pictures and sentences it was trained on: one person, cut out, described in English in
full sentences. It can be wrong, and it finds people: mind whose pictures you search, and the law where you
are. The data set's authors limit what may be done with models trained on it.
"""


def figures_of(args):
    """A table of what test.py found, if it has been run."""
    path = Path(args.run_dir) / f"{results_of(args.run_dir, args.checkpoint)}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [(task, results[task]) for task in ("t2i", "i2t") if task in results]
        lines = [
            f"| {task} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |" for task, row in rows
        ]
        names = " | ".join(rows[0][1])
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        return "\nIt has not been tested: `python test.py --config_file RUN` writes the figures.\n"
    rule = "| --- " * (1 + len(rows[0][1])) + "|"
    return (
        f"\nOn the {results.get('split', 'test')} split ({results.get('queries')} sentences, "
        f"{results.get('gallery')} images), in %:\n\n| task | {names} |\n{rule}\n" + "\n".join(lines) + "\n"
    )
