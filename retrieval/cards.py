"""What lies beside exported weights for the reader who has nothing else: README.md, a model card.

Its text is model_cards/card.md; how a form is used, with an example that runs, is a file of that name.
"""

import json
from pathlib import Path
from string import Template

from datasets.tokenizer import PUNCTUATION
from model.fetch import openai_name
from utils.data_sets import name_of
from utils.run_folders import results_of

TEXTS = Path(__file__).parent / "model_cards"
CUT = "; those of more than $L tokens, training cut there"
NOT_SQUARE = """

Each call of the model needs `interpolate_pos_encoding=True`, since images are not square (`pipeline()` does
not pass it). The positions in the file are those of a square grid, made so that their interpolation gives
the run's."""
PLAIN = """

The run was trained on sentences without `$marks` (each is a space): $who."""
UNREAD = {  # who leaves out the punctuation that a run with --plain_captions does not read
    "safetensors": "`plain=True` leaves them out",
    "onnx": "`tokenizer.json` leaves them out",
    "open_clip": "open_clip's tokeniser reads them, so take them out first, as the example does",
    "transformers": "the processor leaves them out",
}
TRANSLATION = f"""marks = dict.fromkeys(map(ord, '{PUNCTUATION}'), " ")\n"""


def model_card(args, facts, kind, difference):
    """README.md as the hub reads it: what the model is, how it is used, what it can do and what it cannot."""
    sizes, (H, W), L = facts["architecture"], facts["image"]["size"], facts["text"]["context_length"]
    plain, start = args.plain_captions, args.pretrain_choice
    values = {
        "kind": kind,
        "library": "pytorch" if kind == "safetensors" else kind,  # as the hub calls it
        "H": H,
        "W": W,
        "L": L,
        "D": sizes["embed_dim"],
        "stride": sizes["stride_size"],
        "mean": facts["image"]["mean"],
        "std": facts["image"]["std"],
        "longer": filled(CUT, L=L) if L < sizes["context_length"] else "",
        "interpolation": NOT_SQUARE if H != W else "",
        "plain": ", plain=True" if plain else "",
        "unread": filled(PLAIN, marks=" ".join(PUNCTUATION), who=UNREAD[kind]) if plain else "",
        "translation": TRANSLATION if plain else "",
        "texts": "[text.translate(marks) for text in sentences]" if plain else "sentences",
        "name": args.name,
        "data_set": name_of(args),
        "loss_names": args.loss_names,
        "num_epoch": args.num_epoch,
        "start": start if openai_name(start) or start == "random" else "weights of a file",
        "temperature": f"{facts['temperature']:.4g}",
        "figures": figures_of(args, facts["epoch"]),
        "difference": f"{difference:.1e}",
    }
    use = filled(text_of(kind), **values).rstrip()
    return filled(text_of("card"), **values, use=use)


def text_of(name):
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def filled(text, **values):
    return Template(text).substitute(values)


def figures_of(args, epoch):
    """A table of what test.py found, if it has been run on the weights of this epoch, not on earlier ones."""
    path = Path(args.run_dir) / f"{results_of(args.run_dir, args.checkpoint)}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("epoch", epoch) != epoch:
            raise ValueError("of other weights")
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
