"""Drawn pedestrians: who there is, sentences about them, and pictures of them.

A person is five phrases (head, top, bottom, shoes, bag). Any two persons of a data set differ in at least two
of them and a sentence leaves out at most one, so every sentence fits one person only.
"""

import zlib
from collections import namedtuple
from itertools import product
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # of drawing and wording: raise it when either changes, and folders drawn before are drawn again
SPLITS = ("train", "val", "test")

COLOURS = {
    "black": (24, 24, 26), "white": (240, 240, 238), "grey": (128, 130, 132), "red": (205, 28, 36),
    "orange": (242, 124, 16), "yellow": (246, 216, 38), "green": (34, 140, 58), "blue": (38, 84, 200),
    "purple": (116, 42, 156), "pink": (246, 146, 190), "brown": (108, 66, 36),
}  # fmt: skip
SHADES = COLOURS | {"blond": (228, 194, 110), "ginger": (190, 84, 26), "": (0, 0, 0)}
SKINS = ((250, 218, 190), (236, 192, 156), (208, 154, 112), (158, 106, 72), (106, 70, 48))

HEADS = list(product(("short", "curly", "long", "ponytail"), ("black", "brown", "blond", "grey", "ginger")))
HEADS += [("bald", ""), *product(("cap", "beanie"), COLOURS)]
PATTERNS = ("plain", "striped", "checked", "spotted")
TOPS = list(product(("t-shirt", "shirt", "jacket", "coat", "hoodie"), PATTERNS, COLOURS))
BOTTOMS = list(product(("trousers", "shorts", "skirt"), COLOURS))
SHOES = list(product(("sneakers", "boots"), ("black", "white", "red", "yellow", "green", "blue", "brown")))
BAGS = [("none", ""), *product(("backpack", "handbag", "shoulder bag"), COLOURS)]

# height beside a man's; in heights: the head's radius, half widths of shoulder, waist, hip, y of the crotch
Body = namedtuple("Body", "height head shoulder waist hip crotch never")
PEOPLE = {
    "man": Body(1.0, 0.070, 0.128, 0.106, 0.094, 0.51, {"long", "ponytail", "skirt"}),
    "woman": Body(0.96, 0.068, 0.108, 0.078, 0.100, 0.51, {"short", "bald"}),
    "boy": Body(0.80, 0.092, 0.122, 0.104, 0.100, 0.56, {"long", "ponytail", "bald", "skirt"}),
    "girl": Body(0.78, 0.092, 0.112, 0.090, 0.104, 0.56, {"short", "bald"}),
}
REMARKS = {  # of a direction: standing, walking
    "front": ("facing the camera", "walking towards the camera"),
    "back": ("seen from behind", "walking away from the camera"),
    "left": ("looking to the left", "walking to the left"),
    "right": ("looking to the right", "walking to the right"),
}
VIEWS = [(direction, walking) for direction in REMARKS for walking in (False, True)]

# person: a key of PEOPLE; head, top, bottom, shoes, bag: the phrases, which alone tell persons apart
Identity = namedtuple("Identity", "person skin head top bottom shoes bag")


def make_identities(seed, split, count):
    """The first `count` persons of a split; asking for more leaves the earlier ones as they are."""
    shift = Random(f"{seed}").randrange(len(TOPS))
    found = {}  # phrases -> person
    for rng in (Random(f"{seed}/{split}/{index}") for index in range(count)):
        identity = make_identity(rng, shift)
        while identity[2:] in found or split_of(identity) != split:
            identity = make_identity(rng, shift)
        found[identity[2:]] = identity
    return list(found.values())


def make_identity(rng, shift):
    person = rng.choice(list(PEOPLE))

    def pick(phrases):  # the kind first: of 34 bags one is none, but a person in four carries none
        kind = rng.choice(sorted({phrase[0] for phrase in phrases} - PEOPLE[person].never))
        return rng.choice([phrase for phrase in phrases if phrase[0] == kind])

    head, bottom, shoes, bag = pick(HEADS), pick(BOTTOMS), pick(SHOES), pick(BAGS)
    # The top is a check digit: the factors share no divisor with the 220 tops and the other lists are shorter
    # than that, so persons who differ in just one of the other phrases have different tops too.
    places = HEADS.index(head), BOTTOMS.index(bottom), SHOES.index(shoes), BAGS.index(bag)
    check = sum(factor * place for factor, place in zip((7, 31, 93, 139), places, strict=True))
    return Identity(person, rng.choice(SKINS), head, TOPS[(shift + check) % len(TOPS)], bottom, shoes, bag)


def split_of(identity):
    """The one split that may hold this person, so that no split need know whom the others hold."""
    return SPLITS[zlib.crc32(repr(identity[2:]).encode()) % len(SPLITS)]


# ---- sentences

SYNONYMS = {
    "man": ("man", "guy", "male pedestrian"), "woman": ("woman", "lady", "female pedestrian"),
    "boy": ("boy", "young boy"), "girl": ("girl", "young girl"), "plain": ("", "", "plain"),
    "grey": ("grey", "gray"), "purple": ("purple", "purple", "violet"), "blond": ("blond", "blonde"),
    "striped": ("striped", "stripy"), "checked": ("checked", "plaid", "checkered"),
    "spotted": ("spotted", "polka-dot", "dotted"), "t-shirt": ("t-shirt", "tee", "short-sleeved t-shirt"),
    "shirt": ("long-sleeved shirt", "button-up shirt"), "jacket": ("jacket", "zipped jacket"),
    "coat": ("coat", "long coat", "overcoat"), "hoodie": ("hoodie", "hooded sweatshirt"),
    "trousers": ("trousers", "pants", "jeans"), "sneakers": ("sneakers", "trainers", "sports shoes"),
    "backpack": ("backpack", "rucksack"), "handbag": ("handbag", "purse"),
    "shoulder bag": ("shoulder bag", "messenger bag"), "cap": ("cap", "baseball cap"),
    "beanie": ("beanie", "woolly hat"), "none": ("no bag", "nothing"),
}  # fmt: skip


def describe(identity, view, rng):
    """A sentence or two about a person in a view; at times the head, the shoes or the bag are left out."""

    def say(*words, article="a"):
        words = " ".join(rng.choice(SYNONYMS.get(word, (word,))) for word in words).split()
        article = "an" if article and words[0][0] in "aeiou" else article
        return " ".join([article, *words] if article else words)

    (style, shade), (kind, pattern, colour) = identity.head, identity.top
    left_out = rng.choice(("head", "shoes", "bag", "", "", "", ""))
    looks = (colour, pattern) if rng.random() < 0.5 else (pattern, colour)
    bottom = say(*identity.bottom[::-1], article="a" if identity.bottom[0] == "skirt" else "")
    worn = [say(*looks, kind), bottom]
    if left_out != "shoes":
        worn.append(rng.choice(("", "a pair of ")) + say(*identity.shoes[::-1], article=""))
    if rng.random() < 0.2:  # from the feet up
        worn.reverse()
    outfit = rng.choice((", ", " with ")).join(worn[:-1]) + " and " + worn[-1]
    bag = say(*identity.bag[::-1], article="a" if identity.bag[1] else "")
    if style in ("cap", "beanie", "ponytail"):
        head = say(shade, style)
    else:
        head = "a bald head" if style == "bald" else say(style, shade, "hair", article="")

    who, they = say(identity.person).capitalize(), "He" if identity.person in ("man", "boy") else "She"
    if rng.random() < 0.15:
        who, they = rng.choice(("A person", "A pedestrian", "Someone")), "The person"
    remark = REMARKS[view[0]][view[1]]
    having, has = ("", "") if left_out == "head" else (f" with {head}", f" {they} has {head}.")
    carrying, carries = ("", "") if left_out == "bag" else (f", carrying {bag}", f" {they} carries {bag}.")
    sentences = (
        f"{who}{having} is wearing {outfit}.{carries}",
        f"{who}{having} wears {outfit}{carrying or ', ' + remark}.",
        f"{who} {remark}, dressed in {outfit}.{has}{carries}",
        f"{who} in {outfit} is {remark}.{carries}{has}",
        f"Wearing {outfit}, {who.lower()}{having} is {remark}{carrying}.",
        f"{who}{having} is {remark}{carrying}. {they} wears {outfit}.",
    )
    return rng.choice(sentences)


# ---- pictures


class Brush:
    """Draws in body units: x from the body's axis, y from the crown (0) to the soles (1)."""

    def __init__(self, image, direction, scale, x, y, flip):
        self.image, self.pen, self.place = image, ImageDraw.Draw(image), (direction, scale, x, y, flip)
        self.scale, self.x, self.y, self.flip = scale, x, y, flip  # flip: -1 mirrors
        self.front, self.back = direction == "front", direction == "back"
        self.side = not (self.front or self.back)

    def at(self, x, y):
        return self.x + self.flip * self.scale * x, self.y + self.scale * y

    def shape(self, points, colour):
        self.pen.polygon([self.at(*point) for point in points], fill=colour)

    def block(self, x, y, half_width, half_height, colour, flare=1.0):
        """A rectangle around (x, y), or with flare a trapezium that widens downwards."""
        top, bottom, wide = y - half_height, y + half_height, half_width * flare
        points = (x - half_width, top), (x + half_width, top), (x + wide, bottom), (x - wide, bottom)
        self.shape(points, colour)

    def line(self, points, width, colour):
        width = max(1, round(width * self.scale))
        self.pen.line([self.at(*point) for point in points], fill=colour, width=width, joint="curve")

    def disc(self, x, y, rx, ry, colour, upper_half=False):
        (x, y), rx, ry = self.at(x, y), rx * self.scale, ry * self.scale
        self.pen.pieslice((x - rx, y - ry, x + rx, y + ry), 180, 360 if upper_half else 540, fill=colour)

    def cut(self, cloth, draw):
        """Pastes the part of the cloth, an image, that draw(brush) covers."""
        stencil = Brush(Image.new("L", self.image.size), *self.place)
        draw(stencil)
        self.image.paste(cloth, mask=stencil.image)


def darker(colour, factor=0.7):
    """A shade to set off folds and hems with; black has no darker one and gets a lighter one."""
    return tuple(int(v * factor) for v in colour) if sum(colour) > 120 else tuple(v + 42 for v in colour)


def draw(identity, view, rng, size, obstruct=None):
    """The PIL image, (height, width) = size, of a person in one of VIEWS; all else in it is up to rng.
    obstruct(image, rng): draws what stands in front, instead of at times an obstacle."""
    height, width = size
    smooth = 2  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (smooth * width, smooth * height))
    draw_background(image, rng)
    scale = PEOPLE[identity.person].height * rng.uniform(0.84, 0.94) * min(height, 2.6 * width) * smooth
    sole, centre = smooth * height * rng.uniform(0.95, 0.985), smooth * width * rng.uniform(0.45, 0.55)
    flip = {"left": -1, "right": 1}.get(view[0]) or rng.choice((-1, 1))
    draw_person(Brush(image, view[0], scale, centre, sole - scale, flip), identity, view[1], rng)
    if obstruct:
        obstruct(image, rng)
    elif rng.random() < 0.15:
        draw_obstacle(image, rng)
    return photograph(image.reduce(smooth), rng)


def draw_person(brush, identity, walking, rng):
    body = PEOPLE[identity.person]
    head, top, bottom, shoes, bag = (
        tuple(min(255, max(0, v + rng.randint(-9, 9))) for v in SHADES[phrase[-1]]) for phrase in identity[2:]
    )
    step = rng.uniform(0.08, 0.13) if walking else rng.uniform(0.0, 0.03)
    shoulder = 2 * body.head + 0.035  # y
    swings = (-step, step) if brush.side else (-body.shoulder - 0.04, body.shoulder + 0.04)
    far_hand, hand = ((x, body.crotch + 0.03 - 0.2 * step) for x in swings)
    if identity.bag[0] == "backpack" and brush.front:  # peeps out beside the body
        brush.block(0, (shoulder + body.crotch) / 2, body.shoulder + 0.025, 0.125, bag)
    for sign in (-1, 1):  # the far leg, then the near one
        draw_leg(brush, identity, sign, step, bottom, shoes)
    if identity.bottom[0] == "skirt":
        flare = 1.25 * body.hip / body.waist + step
        brush.block(0, body.crotch + 0.07, body.waist, 0.17, bottom, flare)
    draw_top(brush, identity, shoulder, far_hand, hand, top)
    draw_head(brush, identity, head)
    draw_bag(brush, identity.bag[0], body, shoulder, hand, bag)


def draw_leg(brush, identity, sign, step, cloth, leather):
    body, kind = PEOPLE[identity.person], identity.bottom[0]
    x, reach = (0, sign * step) if brush.side else (0.52 * sign * body.hip, 0.12 * sign * step)
    lift = 0.3 * step * (sign < 0)
    hip, ankle = (x, body.crotch - 0.03), (x + reach, 0.965 - lift)
    knee = (x + reach / 2 + 0.012 * brush.side, (body.crotch + 1) / 2 - lift / 2)
    if sign < 0:  # in the shade, so that the legs stay apart to the eye
        cloth, leather = darker(cloth, 0.8), darker(leather, 0.8)
    brush.line((hip, knee, ankle), 0.7 * body.hip, identity.skin)
    if kind != "skirt":
        brush.line((hip, knee, ankle)[: 3 if kind == "trousers" else 2], 0.98 * body.hip, cloth)
    (x, y), toe = ankle, 0.045 * brush.side
    if identity.shoes[0] == "boots":  # up to the middle of the shin, over the trousers
        shin = (x + 0.45 * (knee[0] - x), y + 0.45 * (knee[1] - y))
        brush.line((shin, (x, y + 0.01)), 0.09, leather)
        brush.line((shin, (shin[0], shin[1] + 0.014)), 0.1, darker(leather))
    brush.disc(x + 0.7 * toe, y + 0.008, 0.048 + 0.6 * toe, 0.027, leather)
    if identity.shoes[0] == "sneakers":
        sole = darker(leather, 0.6) if min(leather) > 180 else (244, 244, 244)
        brush.line(((x - 0.042, y + 0.03), (x + 0.042 + 1.2 * toe, y + 0.03)), 0.016, sole)


def draw_top(brush, identity, y, far_hand, hand, colour):
    """Arms, cloth and what tells one kind of top from another; y: of the shoulders."""
    body, (kind, pattern, _) = PEOPLE[identity.person], identity.top
    bulk = (1.0 if kind in ("t-shirt", "shirt") else 1.08) * (0.72 if brush.side else 1)
    shoulder, waist, hip = bulk * body.shoulder, bulk * body.waist, bulk * (body.hip + 0.006)
    hem = body.crotch + (0.08 if kind == "coat" else 0)
    right = [(0.04, y - 0.025), (shoulder - 0.02, y - 0.005), (shoulder, y + 0.03), (waist, (y + hem) / 2)]
    right.append((hip * (1.15 if kind == "coat" else 1), hem))
    left = [(-x, height) for x, height in reversed(right)]
    cloth = draw_cloth(brush, pattern, colour)
    shaded = cloth.point([int(v * 0.8) for v in range(256)] * 3)

    def draw_arm(hand, sign):
        start = (0.0, y + 0.035) if brush.side else (sign * (shoulder - 0.025), y + 0.03)
        elbow = ((start[0] + hand[0]) / 2 + 0.012 * sign, (start[1] + hand[1]) / 2)
        sleeve = (start, elbow) if kind == "t-shirt" else (start, elbow, hand)
        brush.line((start, elbow, hand), 0.042, identity.skin)
        brush.disc(*hand, 0.026, 0.028, identity.skin)
        brush.cut(shaded, lambda b: (b.line(sleeve, 0.068, 255), b.disc(*start, 0.034, 0.034, 255)))

    draw_arm(far_hand, -1)
    brush.cut(cloth, lambda b: b.shape(right + left, 255))
    dark = darker(colour, 0.6)
    if kind in ("jacket", "coat"):  # a zip, a collar, and a waistband or a belt
        if brush.front:
            brush.line(((0, y), (0, hem)), 0.012, dark)
        brush.block(0, y - 0.015, 0.06, 0.016, dark)
        brush.block(0, *((hem - 0.01, hip, 0.016) if kind == "jacket" else (hem - 0.2, waist, 0.01)), dark)
    if kind == "shirt":
        brush.line(((-0.05, y - 0.022), (0, y + 0.02), (0.05, y - 0.022)), 0.022, dark)
        for i in range(6 * brush.front):
            brush.disc(0, y + 0.06 + 0.05 * i, 0.008, 0.008, dark)
    if kind == "hoodie":
        brush.disc(-0.03 * brush.side, y - 0.01, 0.085, 0.07 if brush.back else 0.04, dark)
    draw_arm(hand, 1)


def draw_cloth(brush, pattern, colour):
    """A whole canvas of cloth; the top is cut from it."""
    cloth = Brush(Image.new("RGB", brush.image.size, colour), *brush.place)
    ink = (245, 245, 245) if sum(colour) < 430 else (20, 20, 24)
    columns = [-0.225 + 0.05 * i for i in range(10)]
    for i in range(12 if pattern != "plain" else 0):
        y = 0.13 + 0.05 * i
        if pattern == "spotted":
            for x in columns:
                cloth.disc(x + 0.025 * (i % 2), y, 0.011, 0.011, ink)
        else:
            cloth.line(((-0.3, y), (0.3, y)), 0.017 if pattern == "striped" else 0.01, ink)
    for x in columns if pattern == "checked" else ():
        cloth.line(((x, 0), (x, 0.8)), 0.01, ink)
    return cloth.image


def draw_head(brush, identity, colour):
    style, r = identity.head[0], PEOPLE[identity.person].head
    hat, behind = style in ("cap", "beanie"), -0.35 * r * brush.side  # hair lies towards the back of the head
    hair = (46, 40, 38) if hat else colour
    face = hair if brush.back and style != "bald" else identity.skin
    brush.line(((0, r), (0, 2 * r + 0.03)), 0.75 * r, darker(identity.skin, 0.85))
    if style == "long" or (hat and identity.person in ("woman", "girl")):
        brush.block(1.6 * behind, 1.65 * r, r * (0.7 if brush.side else 1), 1.15 * r, hair)
    if style == "curly":
        for x, y in ((0.8, 0.5), (0.9, 1.05), (0.4, 0.15)):
            brush.disc(behind - x * r, y * r, 0.48 * r, 0.48 * r, hair)
            brush.disc(behind + x * r, y * r, 0.48 * r, 0.48 * r, hair)
    brush.disc(0, r, 0.82 * r, r, face)
    if style != "bald":
        brush.disc(0.4 * behind, 0.72 * r, 0.9 * r, 0.8 * r, hair, upper_half=True)
    if style != "bald" and brush.side:
        brush.disc(-0.45 * r, 0.95 * r, 0.5 * r, 0.75 * r, hair)
    if style == "ponytail":
        tail = ((0, 0.9), (0, 3.1)) if brush.back else ((-0.8, 0.4), (-1.5, 0.7), (-1.6, 2.3))
        brush.line([(x * r, y * r) for x, y in tail], 0.5 * r, darker(hair, 0.85))
    if not brush.back:
        for x in (0.55,) if brush.side else (-0.32, 0.32):
            brush.disc(x * r, r, 0.1 * r, 0.1 * r, (30, 26, 26))
        brush.block(0.5 * r * brush.side, 1.5 * r, 0.2 * r, 0.006, (150, 60, 60))
    if hat:
        brush.disc(0, 0.75 * r, r, (0.95 if style == "cap" else 1.15) * r, colour, upper_half=True)
    if style == "beanie":
        brush.block(0, 0.68 * r, 1.02 * r, 0.17 * r, darker(colour))
        brush.disc(0, -0.4 * r, 0.3 * r, 0.3 * r, darker(colour))
    if style == "cap" and not brush.back:
        brush.block(r * brush.side, 0.74 * r, 0.8 * r, 0.12 * r, darker(colour))


def draw_bag(brush, kind, body, y, hand, colour):
    middle, dark = (y + body.crotch) / 2, darker(colour)
    if kind == "backpack" and brush.side:
        brush.block(-0.72 * body.shoulder - 0.05, middle - 0.01, 0.065, 0.125, colour)
        brush.line(((-0.05, y), (0.02, middle)), 0.026, colour)
    elif kind == "backpack" and brush.back:
        brush.block(0, middle, 0.85 * body.shoulder, 0.135, colour)
        brush.block(0, middle + 0.055, 0.6 * body.shoulder, 0.05, dark)
    elif kind == "backpack":
        for x in (-0.62 * body.shoulder, 0.62 * body.shoulder):
            brush.line(((x, y - 0.01), (1.1 * x, middle + 0.06)), 0.032, colour)
    if kind == "handbag":
        x, y = hand
        brush.line(((x - 0.03, y + 0.06), (x, y), (x + 0.03, y + 0.06)), 0.012, dark)
        brush.block(x, y + 0.105, 0.06, 0.055, colour, flare=1.25)
        brush.block(x, y + 0.085, 0.065, 0.006, dark)
    if kind == "shoulder bag":
        x, strap = (0.0, 0.0) if brush.side else (body.hip + 0.02, -0.6 * body.shoulder)
        brush.line(((strap, y - 0.01), (x, body.crotch - 0.04)), 0.024, colour)
        brush.block(x, body.crotch, 0.075, 0.06, colour)
        brush.block(x, body.crotch - 0.03, 0.075, 0.025, dark)


def draw_background(image, rng):
    """Wall, ground and windows or bushes in muted colours, so that none is taken for clothes."""

    def muted(low, high):
        grey = rng.randint(low, high)
        return tuple(grey + rng.randint(-12, 12) for _ in range(3))

    pen, (width, height) = ImageDraw.Draw(image), image.size
    horizon = int(height * rng.uniform(0.45, 0.85))
    pen.rectangle((0, 0, width, horizon), fill=muted(110, 200))
    window = rng.choice((pen.rectangle, pen.ellipse))
    for _ in range(rng.choice((0, 0, 3, 6))):
        x, y = rng.randint(-width // 4, width), rng.randint(0, horizon)
        right, bottom = x + rng.randint(width // 5, width), y + rng.randint(height // 9, height)
        window((x, y, right, bottom), muted(110, 180))
    pen.rectangle((0, horizon, width, height), fill=muted(90, 180))
    for _ in range(rng.choice((0, 1, 4))):  # kerbs and lines on the road
        left, right = rng.randint(horizon, height), rng.randint(horizon, height)
        pen.line((0, left, width, right), muted(90, 200), height // 80 + 1)


def draw_obstacle(image, rng):
    """Something in front: a pole, a crate or a bicycle."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    kind, x, y = rng.choice(("pole", "crate", "bicycle")), rng.randrange(width), int(height * 0.9)
    tone, thick, r = rng.randint(70, 150), width // 36 + 1, width // 5
    colour = (tone, tone, tone + 8)
    if kind == "pole":
        pen.line((x, 0, x, height), colour, 3 * thick)
    if kind == "crate":
        pen.rectangle((x - 2 * r, y, x + 2 * r, height), colour, darker(colour), thick)
    if kind == "bicycle":
        back, front = x - 1.3 * r, x + 1.3 * r
        for wheel in (back, front):
            pen.ellipse((wheel - r, y - r, wheel + r, y + r), outline=(40, 40, 44), width=thick)
        saddle, bar = (x - 0.4 * r, y - 1.3 * r), (x + 0.9 * r, y - 1.3 * r)
        pen.line([(back, y), saddle, bar, (front, y), bar, (x, y), (back, y)], colour, thick)


def photograph(image, rng):
    """Blur, light and noise, mild enough for a white coat never to look grey."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.8)))
    gain, contrast, slope = rng.uniform(0.84, 1.1), rng.uniform(0.88, 1.08), rng.uniform(-0.1, 0.1)
    cast = np.array([rng.uniform(0.95, 1.05) for _ in range(3)], np.float32)
    light = np.linspace(1 - slope, 1 + slope, image.width, dtype=np.float32)[:, None] * cast * gain  # (W, 3)
    pixels = np.asarray(image, np.float32) * light * contrast + 110 * gain * (1 - contrast)
    # numpy does not promise the same random stream in its next version: the noise is the standard library's
    noise = np.frombuffer(rng.randbytes(image.width * image.height), np.int8)
    pixels += noise.reshape(image.height, image.width, 1) * np.float32(rng.uniform(0.0, 0.06))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
