"""What lies beside exported weights for the reader who has nothing else: README.md, a model card."""

import json
from pathlib import Path

from model.pretrained import CHECKPOINTS
from utils.data_sets import name_of
from utils.run import results_of

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
    "transformers": """```python
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("THIS FOLDER").eval()
processor = CLIPProcessor.from_pretrained("THIS FOLDER", backend="pil")  # the resizing of training to the bit
inputs = processor(text=sentences, images=images, return_tensors="pt", padding=True, truncation=True)
outputs = model(**inputs, interpolate_pos_encoding=True)
```

Images are {H}x{W}; each call needs `interpolate_pos_encoding=True` where that is not square. The positions in
the file are those of a square grid, made so that their interpolation gives the run's.""",
}


def model_card(args, facts, kind, difference):
    H, W = facts["image"]["size"]
    longer = ""
    if facts["text"]["context_length"] < facts["architecture"]["context_length"]:
        longer = f"; those of more than {facts['text']['context_length']} tokens, training cut there"
    use = USE[kind].format(
        H=H,
        W=W,
        L=facts["text"]["context_length"],
        D=facts["architecture"]["embed_dim"],
        mean=facts["image"]["mean"],
        std=facts["image"]["std"],
        longer=longer,
    )
    start = args.pretrain_choice if args.pretrain_choice in (*CHECKPOINTS, "random") else "weights of a file"
    return f"""# {args.name}: IRRA on {name_of(args)}

Retrieves the image of a person from a sentence that describes them (IRRA, CVPR 2023, arXiv 2303.12501): an
image and a text encoder into one space of {facts["architecture"]["embed_dim"]} dimensions. Form: {
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
