"""What lies beside exported weights for the reader who has nothing else: README.md, a model card."""

import json
from pathlib import Path
from typing import NamedTuple

from datasets.tokenizer import PUNCTUATION
from model.fetch import openai_name
from utils.data_sets import name_of
from utils.run import results_of


class Use(NamedTuple):
    """How a form is used: the hub's name of the library, what to know, and the example's imports and body.

    The body takes sentences and person.jpg to similarities, (sentences, 1). unread: who leaves out the
    punctuation that a run with --plain_captions does not read.
    """

    library: str
    text: str
    imports: str
    body: str
    unread: str


USE = {
    "safetensors": Use(
        "pytorch",
        """`model.safetensors` holds both encoders by the names of OpenAI's CLIP (`visual.…`,
`transformer.…`), `irra.json` how pixels and words become their inputs. The example uses IRRA's own code,
whose folder must be on PYTHONPATH.""",
        """import torch
from datasets.tokenizer import tokenize_all
from datasets.transforms import normalise, read_image, resize
from model.irra import at_eot
from model.pretrained import load_clip""",
        """clip = load_clip("model.safetensors", ({H}, {W}), {stride}).eval()
image = normalise(resize(read_image("person.jpg"), ({H}, {W})))[None]
ids = tokenize_all(sentences, {L}{plain})
with torch.no_grad():
    image_features = clip.encode_image(image, class_only=True).flatten(1)
    text_features = at_eot(clip.encode_text(ids), ids)
image_features, text_features = map(torch.nn.functional.normalize, (image_features, text_features))
similarities = text_features @ image_features.T""",
        "`plain=True` leaves them out",
    ),
    "onnx": Use(
        "onnx",
        """Two graphs, batch size free: `image_encoder.onnx` (`images`, float32 [B, 3, {H}, {W}]) and
`text_encoder.onnx` (`ids`, int64 [B, {L}]); both give `features`, float32 [B, {D}]. `tokenizer.json` makes
the ids, `irra.json` says how pixels become inputs. The example needs onnxruntime, tokenizers and Pillow.""",
        """import numpy
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer""",
        """def normalised_features(file, name, inputs):
    (features,) = onnxruntime.InferenceSession(file).run(None, {{name: inputs}})
    return features / numpy.linalg.norm(features, axis=1, keepdims=True)

image = Image.open("person.jpg").convert("RGB").resize(({W}, {H}), Image.BILINEAR)
pixels = (numpy.asarray(image) / 255 - {mean}) / {std}
pixels = pixels.astype(numpy.float32).transpose(2, 0, 1)[None]
tokenizer = Tokenizer.from_file("tokenizer.json")
ids = numpy.array([encoding.ids for encoding in tokenizer.encode_batch(sentences)])
image_features = normalised_features("image_encoder.onnx", "images", pixels)
text_features = normalised_features("text_encoder.onnx", "ids", ids)
similarities = text_features @ image_features.T""",
        "`tokenizer.json` leaves them out",
    ),
    "open_clip": Use(
        "open_clip",
        """Images are {H}x{W}; `preprocess` squeezes any picture to that, as in training. The tokeniser of
open_clip does not know `<|mask|>`: it would read it as text, and the word "jekyll" as the mask's id. Other
sentences get the ids that training gave them{longer}.""",
        """import open_clip
import torch
from PIL import Image""",
        """model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
model.eval()
image = preprocess(Image.open("person.jpg"))[None]
{translation}with torch.no_grad():
    image_features = model.encode_image(image, normalize=True)
    text_features = model.encode_text(tokenizer({texts}), normalize=True)
similarities = text_features @ image_features.T""",
        "open_clip's tokeniser reads them, so take them out first, as the example does",
    ),
    "transformers": Use(
        "transformers",
        """`CLIPModel` and `CLIPProcessor` load this folder. The processor squeezes any picture to {H}x{W};
give it `padding=True, truncation=True`, since training cut longer sentences too. Its ids are those of
training, also of `<|mask|>`; but it does not repair damaged text, as training did (ftfy).{interpolation}""",
        """import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor""",
        """model = CLIPModel.from_pretrained(".").eval()
processor = CLIPProcessor.from_pretrained(".", backend="pil")  # the resizing of training to the bit
image = Image.open("person.jpg")
inputs = processor(text=sentences, images=image, return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    outputs = model(**inputs, interpolate_pos_encoding=True)
similarities = outputs.text_embeds @ outputs.image_embeds.T""",
        "the processor leaves them out",
    ),
}
EXAMPLE = """```python
{imports}

sentences = ["a woman in a red coat with a black bag", "a man with grey trousers and white sneakers"]
{body}
for sentence, (similarity,) in zip(sentences, similarities.tolist()):
    print(f"{{similarity:.4f}}  {{sentence}}")
```"""
CARD = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
language: en
# fill in these three: the authors of the data set and of the first weights limit what you may choose
license: other
license_name: to-be-filled-in
license_link: LICENSE
tags:
- clip
- irra
- person-retrieval
- text-to-image-retrieval
- {kind}
---

# {args.name}: IRRA on {data_set}

Retrieves the image of a person from a sentence that describes them (IRRA, CVPR 2023, arXiv 2303.12501): an
image and a text encoder into one space of {D} dimensions. Form: {kind}. The classifier and the module of
masked words, which only training needs, are left out.

## Use

{use}

Run in this folder, with a picture person.jpg beside it:

{example}

The encoders' features are not L2-normalised; the similarity of a sentence and an image is the inner product
of the normalised ones.

## Training

Data set {data_set}; losses {args.loss_names}; started from {start};
{args.num_epoch} epochs; temperature {temperature:.4g}.
{figures}
## Check

The largest difference between these features and those of the run, over noise images and a few sentences:
{difference:.1e} (absolute, before normalising).

## Limits

It knows the kind of pictures and sentences it was trained on: one person, cut out, described in English in
full sentences. It can be wrong, and it finds people: mind whose pictures you search, and the law where you
are. The data set's authors limit what may be done with models trained on it.
"""
CUT = "; those of more than {L} tokens, training cut there"
NOT_SQUARE = """

Each call of the model needs `interpolate_pos_encoding=True`, since images are not square (`pipeline()` does
not pass it). The positions in the file are those of a square grid, made so that their interpolation gives
the run's."""
PLAIN = """

The run was trained on sentences without `{marks}` (each is a space): {unread}."""
TRANSLATION = f"""marks = dict.fromkeys(map(ord, '{PUNCTUATION}'), " ")\n"""


def model_card(args, facts, kind, difference):
    """README.md as the hub reads it: what the model is, how it is used, what it can do and what it cannot."""
    sizes, (H, W), L = facts["architecture"], facts["image"]["size"], facts["text"]["context_length"]
    use, plain, start = USE[kind], args.plain_captions, args.pretrain_choice
    values = {
        "H": H,
        "W": W,
        "L": L,
        "D": sizes["embed_dim"],
        "stride": sizes["stride_size"],
        "mean": facts["image"]["mean"],
        "std": facts["image"]["std"],
        "longer": CUT.format(L=L) if L < sizes["context_length"] else "",
        "interpolation": NOT_SQUARE if H != W else "",
        "plain": ", plain=True" if plain else "",
        "translation": TRANSLATION if plain else "",
        "texts": "[text.translate(marks) for text in sentences]" if plain else "sentences",
    }
    text = use.text + (PLAIN if plain else "")
    return CARD.format(
        **values,
        library=use.library,
        kind=kind,
        args=args,
        data_set=name_of(args),
        use=text.format(**values, marks=" ".join(PUNCTUATION), unread=use.unread),
        example=EXAMPLE.format(imports=use.imports, body=use.body.format(**values)),
        start=start if openai_name(start) or start == "random" else "weights of a file",
        temperature=facts["temperature"],
        figures=figures_of(args),
        difference=difference,
    )


def figures_of(args):
    """A table of what test.py found, if it has been run."""
    path = Path(args.run_dir) / f"{results_of(args.run_dir, args.checkpoint)}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = {task: results[task] for task in ("t2i", "i2t") if task in results}
        names = list(next(iter(found.values())))
        rows = [["task", *names], ["---"] * (1 + len(names))]
        rows += [[task, *(f"{value:.3f}" for value in row.values())] for task, row in found.items()]
    except (OSError, ValueError, KeyError, StopIteration, AttributeError, TypeError):
        return "\nIt has not been tested: `python test.py --config_file RUN` writes the figures.\n"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"\nOn the {results.get('split', 'test')} split ({results.get('queries')} sentences, "
        f"{results.get('gallery')} images), in %:\n\n{table}\n"
    )
