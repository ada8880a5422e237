"""Hard sets of drawn pedestrians, whose truth is known: near-identical persons, seen and described in part.

    python -m datasets.synthetic --hard small --noise 0.2 --root data_hard

Persons come in groups of two to four who are alike but for one attribute, such as the colour of their shoes.
No two persons of a data set have all attributes in common. A sentence leaves many attributes out and has many
words for one thing, and half of the images have something large in front of the person.

A record of the annotation file has two more lists than other files, an entry for each of its captions:

    described   the id of the person whom the caption describes. With --noise that share of the training
                captions describes another person than the image shows, and does not fit that one.
    fits        how many persons of the split have all that the caption says: 1 in the val and test splits,
                where the attribute that tells a person's group apart is always said

With --rewritten a training record also has diversity_captions (see configs/rda.yaml): what the person of each
caption wears, piece by piece, each piece in a few wordings, also what the caption leaves out.
"""

from collections import namedtuple
from pathlib import Path
from random import Random

from PIL import ImageDraw

from datasets import pedestrians
from datasets.drawn_files import arguments_of, draw_file, image_name, made
from datasets.pedestrians import SYNONYMS, VIEWS
from utils.data_sets import DATA_SETS, DEFAULT
from utils.errors import InputError

VERSION = 1  # of what is drawn and worded here
GROUP = 4  # most persons who differ in one attribute only
LEFT_OUT = 0.45  # share of attributes that a sentence does not say
OBSTRUCTED = 0.5  # share of images with something large in front
WORDINGS = 3  # of each piece of a rewritten caption
HARD = {  # sizes, by the word that is typed
    "small": {"ids": 800, "val_ids": 100, "test_ids": 300, "images_per_id": 3, "size": [128, 48]},
    "cuhk": {"ids": 11_003, "val_ids": 1000, "test_ids": 1000, "images_per_id": 3},
}

PHRASES = {
    "head": pedestrians.HEADS,
    "top": pedestrians.TOPS,
    "bottom": pedestrians.BOTTOMS,
    "shoes": pedestrians.SHOES,
    "bag": pedestrians.BAGS,
}
WORN = [(part, place) for part, phrases in PHRASES.items() for place in range(len(phrases[0]))]
PERSON = ("person", None)
ATTRIBUTES = [PERSON, *WORN]  # (phrase, place in it)

Member = namedtuple("Member", "identity apart")  # apart: the attribute in which the group's persons differ


def value(identity, attribute):
    """'' where there is none, as the colour of a bag that nobody carries."""
    part, place = attribute
    found = getattr(identity, part)
    return found if place is None else found[place]


# ---- persons


def make_groups(seed, split, count, taken):
    """The members of a split, group by group; adds their phrases to taken, which holds other splits' too."""
    rng, members = Random(f"{seed}/hard/{split}"), []
    shift = rng.randrange(len(pedestrians.TOPS))
    while (left := count - len(members)) > 0:
        apart = rng.choice(WORN)
        group = make_group(pedestrians.make_identity(rng, shift), apart, rng)
        group = [identity for identity in group if identity[2:] not in taken][: min(GROUP, left)]
        if left - len(group) == 1:  # nobody is to be left alone
            group.pop()
        if len(group) >= 2:
            members += [Member(identity, apart) for identity in group]
            taken.update(identity[2:] for identity in group)
    return members


def make_group(base, apart, rng):
    """The base and those who differ from it in the attribute only, in any order."""
    part, place = apart
    never = pedestrians.PEOPLE[base.person].never

    def others(phrase):
        return [word for number, word in enumerate(phrase) if number != place]

    like = [phrase for phrase in PHRASES[part] if others(phrase) == others(getattr(base, part))]
    like = [phrase for phrase in like if phrase[0] not in never]
    return [base._replace(**{part: phrase}) for phrase in rng.sample(like, len(like))]


# ---- what a sentence says


class Crowd:
    """The persons of a split, and whom of them a sentence fits."""

    def __init__(self, members):
        self.members, self.who = members, {}  # who: numbers of the persons of each (attribute, value)
        for number, member in enumerate(members):
            for attribute in ATTRIBUTES:
                self.who.setdefault((attribute, value(member.identity, attribute)), set()).add(number)

    def fitting(self, identity, said):
        """The numbers of those who have the identity's values of the attributes that are said."""
        sets = [self.who[attribute, value(identity, attribute)] for attribute in said]
        return set.intersection(*sorted(sets, key=len))


def choose_attributes(number, crowd, rng, telling):
    """Those that a sentence about a person says; telling: so many that it fits nobody else in the crowd."""
    identity, apart = crowd.members[number]
    known = [attribute for attribute in ATTRIBUTES if value(identity, attribute)]
    said = {attribute for attribute in known if rng.random() >= LEFT_OUT}
    more = [apart, *rng.sample(known, len(known))]  # in which order they are added
    if telling:
        said.add(more.pop(0))
    while not said or (telling and len(crowd.fitting(identity, said)) > 1):
        said.add(more.pop(0))
    if ("head", 1) in said:  # a colour is one of hair or of a hat
        said.add(("head", 0))
    return said


# ---- sentences

WORDS = SYNONYMS | {
    "black": ("black", "black", "jet-black"), "white": ("white", "white", "snow-white"),
    "grey": ("grey", "gray", "ash-coloured"), "red": ("red", "scarlet", "crimson"),
    "orange": ("orange", "tangerine"), "yellow": ("yellow", "lemon-yellow"), "green": ("green", "emerald"),
    "blue": ("blue", "royal-blue", "azure"), "purple": ("purple", "violet"), "pink": ("pink", "rose-pink"),
    "brown": ("brown", "chocolate"), "ginger": ("ginger", "copper"),
    "plain": ("plain", "unpatterned", "solid"),  # said in a word: without one, nothing is said of the pattern
    "shorts": ("shorts", "short trousers"), "boots": ("boots", "ankle boots"), "curly": ("curly", "frizzy"),
}  # fmt: skip
UNNAMED = {"top": "top", "bottom": "bottoms", "shoes": "shoes", "bag": "bag"}  # their kind is left out
PLURAL = {"bottoms", "shoes", "trousers", "shorts", "sneakers", "boots"}


def name(identity, part, said, rng):
    """What is said of a phrase, as `a striped red shirt`; '' if nothing."""
    if not any((part, place) in said for place in range(len(getattr(identity, part)))):
        return ""
    phrase = getattr(identity, part)
    kind = phrase[0] if (part, 0) in said else UNNAMED[part]
    shown = [kind, *(word if (part, n) in said else "" for n, word in enumerate(phrase[1:], start=1))]
    order = rng.choice(((1, 2, 0), (2, 1, 0))) if part == "top" else (1, 0)
    words = " ".join(worded(shown[n], rng) for n in order if shown[n])
    if kind in PLURAL:
        return rng.choice(("", "a pair of ")) + words
    return words if kind == "none" else with_article(words)


def worded(word, rng):
    return rng.choice(WORDS.get(word, (word,)))


def name_head(identity, said, rng):
    style, shade = identity.head
    if ("head", 0) not in said:
        return ""
    if style == "bald":
        return "a bald head"
    shade = [worded(shade, rng)] if ("head", 1) in said else []
    if style in ("cap", "beanie", "ponytail"):
        return with_article(" ".join([*shade, worded(style, rng)]))
    return " ".join([worded(style, rng), *shade, "hair"])


def with_article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(identity, said, view, rng):
    """Sentences about a person in a view that say these attributes, and no others."""
    who, they = rng.choice(("a person", "a pedestrian", "someone")), "The person"
    if PERSON in said:
        who = with_article(worded(identity.person, rng))
        they = "He" if identity.person in ("man", "boy") else "She"
    clauses = []  # (as part of a sentence, as its predicate)
    worn = [words for part in ("top", "bottom", "shoes") if (words := name(identity, part, said, rng))]
    if rng.random() < 0.3:
        worn.reverse()
    if worn:
        outfit = listed(worn)
        part = rng.choice(("wearing", "dressed in", "in", "clad in"))
        clauses.append((f"{part} {outfit}", f"{rng.choice(('wears', 'is dressed in', 'has on'))} {outfit}"))
    if head := name_head(identity, said, rng):
        clauses.append((f"{rng.choice(('with', 'having'))} {head}", f"has {head}"))
    if bag := name(identity, "bag", said, rng):
        clauses.append((f"{rng.choice(('carrying', 'holding'))} {bag}", f"carries {bag}"))
    remark = pedestrians.REMARKS[view[0]][view[1]]
    if not clauses or rng.random() < 0.5:
        clauses.append((remark, f"is {remark}"))
    rng.shuffle(clauses)
    parts, predicates = zip(*clauses, strict=True)
    sentences = [f"{who} {', '.join(parts)}.", f"{who} {listed(predicates)}."]
    if len(clauses) > 1:
        sentences.append(f"{parts[0]}, {who} {listed(predicates[1:])}.")
        sentences.append(f"{who} {predicates[0]}. {they} {listed(predicates[1:])}.")
    text = rng.choice(sentences)
    return text[0].upper() + text[1:]


def rewrite(identity, view, rng):
    """A caption about the person, completed and cut into pieces, each in some wordings: a list of lists."""
    pieces = [[(part, place) for place in range(len(phrases[0]))] for part, phrases in PHRASES.items()]
    pieces = [[one for one in piece if value(identity, one)] for piece in pieces]
    return [[describe(identity, {PERSON, *piece}, view, rng) for _ in range(WORDINGS)] for piece in pieces]


def listed(words):
    return " and ".join(", ".join(words).rsplit(", ", 1))


# ---- files


def obstruct(image, rng):
    """Half of the time something large and grey in front: a wall, a pillar or a sign."""
    if rng.random() >= OBSTRUCTED:
        return
    pen, (width, height) = ImageDraw.Draw(image), image.size
    kind, much, x = rng.choice(("wall", "pillar", "sign")), rng.random(), rng.random()
    tone = (rng.randint(70, 170),) * 3
    boxes = {
        "wall": (0, height * (0.9 - 0.25 * much), width, height),
        "pillar": (width * (x - 0.1 - 0.1 * much), 0, width * (x + 0.1 + 0.1 * much), height),
        "sign": (0, 0, width, height * (0.08 + 0.14 * much)),
    }
    pen.rectangle(boxes[kind], tone, pedestrians.darker(tone), width // 36 + 1)


def make_hard_dataset(
    root,
    format=DEFAULT,
    *,
    train_ids,
    val_ids,
    test_ids,
    images_per_id,
    seed=0,
    size=None,
    noise=0.0,
    rewritten=False,
    progress=False,
):
    """As synthetic.make_dataset, a hard set. noise: share of the training captions that describe another
    person than their image shows; images and right captions are the same for any noise. rewritten: with
    diversity_captions, and all else the same."""
    arguments = arguments_of(format, train_ids, val_ids, test_ids, images_per_id, seed, size)
    ids = arguments["ids"]
    if 1 in ids.values():
        raise InputError("of 1 identity nobody is near-identical: give 2 or more of each split")
    if not 0 <= noise <= 1:
        raise InputError(f"a share of {noise} wrong captions cannot be drawn: give 0 to 1")
    arguments = {"hard": VERSION, **arguments, "noise": noise}
    arguments |= {"rewritten": True} if rewritten else {}

    def draw_records(imgs):
        taken, first_pid = set(), DATA_SETS[format].first_pid
        # the training persons last, so that more of them change no other split
        groups = {split: make_groups(seed, split, ids[split], taken) for split in ("test", "val", "train")}
        for split in ids:
            yield from draw_split(imgs, format, split, Crowd(groups[split]), first_pid, arguments)
            first_pid += ids[split]

    return made(Path(root) / format, arguments, draw_records, progress)


def draw_split(imgs, format, split, crowd, first_pid, arguments):
    """Draws the images of a split; yields their records."""
    row, training = DATA_SETS[format], split == "train"
    each = arguments["images"] * row.captions_per_image
    noise = arguments["noise"] if training else 0
    wrong = wrong_captions(len(crowd.members), each, noise, arguments["seed"])
    rewritten = training and "rewritten" in arguments
    for index, member in enumerate(crowd.members):
        for number in range(arguments["images"]):
            place = f"{arguments['seed']}/hard/{split}/{index}/{number}"
            rng = Random(place)
            view = rng.choice(VIEWS)
            file = image_name(format, first_pid + index, number)
            draw_file(imgs / file, member.identity, view, rng, arguments["size"], obstruct)
            record = {"split": split, "captions": [], row.path_key: file, "id": first_pid + index}
            record |= {"described": [], "fits": []} | ({"diversity_captions": []} if rewritten else {})
            for n in range(row.captions_per_image):
                words = Random(f"{place}/words/{n}")
                other = wrong.get((index, number * row.captions_per_image + n), index)
                identity = crowd.members[other].identity
                said = choose_attributes(other, crowd, words, telling=not training)
                while other != index and index in crowd.fitting(identity, said):
                    said = choose_attributes(other, crowd, words, telling=False)
                record["captions"].append(describe(identity, said, view, words))
                record["described"].append(first_pid + other)
                record["fits"].append(len(crowd.fitting(identity, said)))
                if rewritten:
                    record["diversity_captions"].append(rewrite(identity, view, words))
            yield record


def wrong_captions(persons, captions_each, share, seed):
    """{(person, caption): another person, whom it describes}, of that share of all captions."""
    rng = Random(f"{seed}/hard/wrong")
    chosen = rng.sample(range(persons * captions_each), round(share * persons * captions_each))
    found = {}
    for person, caption in (divmod(number, captions_each) for number in sorted(chosen)):
        other = rng.randrange(persons - 1)
        found[person, caption] = other + (other >= person)
    return found


def about(records):
    """What is known of the sentences, in one."""
    train = [record for record in records if record["split"] == "train"]
    fits = [number for record in train for number in record["fits"]]
    wrong = sum(pid != record["id"] for record in train for pid in record["described"])
    several = sum(number > 1 for number in fits)
    return (
        f"Of the {len(fits)} training sentences {wrong} describe another person than their image shows, and "
        f"{several} fit several persons ({sum(fits) / len(fits):.2f} on average); each of the other splits "
        "fits one."
    )
