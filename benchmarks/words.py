"""Whether the words point where they should: the share of a word's map that lies on what the word names.

python -m benchmarks.words --config_file RUN                    both ways of visualize.py --words_by
python -m benchmarks.words --config_file RUN --persons 1000     for figures that hardly depend on the draw

Drawn persons, new to a run on a drawn set. The truth comes from the drawing: a part is where pixels change
when it alone is drawn in other colours. A patch's weight counts by the share of it that the part covers.
"""

import itertools
from collections import defaultdict
from random import Random
from statistics import fmean

import numpy as np
from PIL import Image

from benchmarks.harness import new_parser, record
from datasets.pedestrians import SYNONYMS, VIEWS, Identity, describe, draw, make_identities
from utils.errors import reports_errors
from utils.options import WORDS_BY, from_1, parser_of, tool_args

PARTS = Identity._fields[2:]  # head, top, bottom, shoes, bag
SIZE = (192, 80)  # of a picture
VISIBLE = 12  # grey levels: what blur carries further is no part


@reports_errors
def main(argv=None):
    parser = new_parser(__doc__, ["device"], device="auto")
    parser.add_argument("--config_file", required=True, help="the run, its folder or its configs.yaml")
    parser.add_argument("--persons", type=from_1, default=100)
    args = parser.parse_args(argv)
    from retrieval.encoders import open_run

    run = ["--config_file", args.config_file, "--device", args.device]
    encoders = open_run(tool_args(parser_of("visualize"), run))
    ways = WORDS_BY if hasattr(encoders.model, "cross_attn") else WORDS_BY[:1]
    found, others = measure(encoders, args.persons, ways)
    for part in (*PARTS, "whole sentence"):
        named = [share for name, share in found if part in (name, "whole sentence")]
        keep(f"words of the {part}, weight on what they name", named, args, encoders.device)
    keep("words of other parts, weight on the same", others, args, encoders.device)


def keep(figure, shares, args, device):
    if not shares:  # few persons: none with a bag, say
        return
    arms = {way: 100 * fmean(share[way] for share in shares) for way in shares[0]}
    note = f"{len(shares)} times, {args.persons} drawn persons"
    record(figure, arms, "%", "even spread", "more", device, note=note)


def measure(encoders, persons, ways):
    """([(part, shares), …] of the words that name a part, [shares, …] of each part by the words of others).

    shares: {way: weight on the part} with that of an even spread.
    """
    from retrieval.relevance import word_maps

    found, others = [], []
    for number, identity in enumerate(make_identities(0, "test", persons)):
        rng = Random(f"words/{number}")
        view = rng.choice(VIEWS)
        sentence = describe(identity, view, rng)
        picture, regions = draw_with_truth(identity, view, f"picture/{number}")
        maps = {way: word_maps(encoders, sentence, picture, way) for way in ways}
        named = words_that_name(identity, [word for word, _ in maps[ways[0]]])
        for part, region in regions.items():
            on_it = defaultdict(list)  # by whether the word names this part
            for word, name in named.items():
                shares = {way: on(region, maps[way][word].map) for way in ways}
                on_it[name == part].append({"even spread": float(region.mean()), **shares})
            found += [(part, shares) for shares in on_it[True]]
            others += on_it[False] if on_it[True] else []
    return found, others


def on(region, weights):
    """The share of a word's map that lies in a region. weights: (rows, columns). region: (H, W) bool."""
    size = weights.shape[::-1]
    covered = Image.fromarray(region.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return float((weights * np.asarray(covered)).sum() / weights.sum())


# ---- the truth ----


def draw_with_truth(identity, view, seed):
    """(PIL picture of a person, {part: (H, W) bool, where it is seen}), of those parts that are seen."""

    def drawn(identity):
        return np.asarray(draw(identity, view, Random(seed), SIZE), int)

    picture, regions = drawn(identity), {}
    for part in PARTS:
        others = in_other_colours(getattr(identity, part))
        changed = [abs(drawn(identity._replace(**{part: other})) - picture) for other in others]
        region = np.any([change.max(axis=2) > VISIBLE for change in changed], axis=0) if changed else None
        if region is not None and region.any():
            regions[part] = region
    return Image.fromarray(picture.astype(np.uint8)), regions


def in_other_colours(phrase):
    """The same thing in colours of which one differs from its own; a bald head is where a hat would be."""
    if phrase[0] == "none":
        return []
    kind = "beanie" if phrase[0] == "bald" else phrase[0]
    return [(kind, *phrase[1:-1], colour) for colour in ("black", "white", "red")]


def words_that_name(identity, words):
    """{number of a word: the part that it names}. words: of a sentence about this person."""
    bare, named = [word.strip(".,") for word in words], {}
    for part in PARTS:
        said = [phrase.split() for phrase in sayings(part, getattr(identity, part))]
        places = [
            range(start, start + len(phrase))
            for phrase in said
            for start in range(len(bare))
            if bare[start : start + len(phrase)] == phrase
        ]
        named.update(dict.fromkeys(max(places, key=len, default=()), part))
    return named


def sayings(part, phrase):
    """What datasets.pedestrians.describe may call a part, in any of its words."""
    if phrase[0] == "none":
        return []
    if phrase[0] == "bald":
        return ["bald head"]
    orders = [phrase[::-1]]  # the colour, then the thing
    if part == "head" and phrase[0] in ("short", "curly", "long"):
        orders = [(*phrase, "hair")]
    if part == "top":
        kind, pattern, colour = phrase
        orders = [(colour, pattern, kind), (pattern, colour, kind)]
    ways = [itertools.product(*(SYNONYMS.get(word, (word,)) for word in order)) for order in orders]
    return [" ".join(way) for way in itertools.chain(*ways)]


if __name__ == "__main__":
    raise SystemExit(main())
