"""The little world of the demonstration: open fridges, what is in them in words, and questions about it. Pillow only, no downloads.

A scene is four places, each with three slots from left to right, None where one is empty:

    {"top": ("apple", None, "milk"), "middle": (None, None, None), "bottom": ("egg", "egg", None), "drawer": ("juice", None, None)}

Everything is a function of (seed, number), so scenes can be made in any order. One composition in eight, chosen by a hash of it, is held out: the
exam never shows a fridge with the contents of one that was trained on.
"""

import hashlib
import json
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from .. import cli

PLURAL = {
    "apple": "apples",
    "milk": "cartons of milk",
    "egg": "eggs",
    "cheese": "pieces of cheese",
    "carrot": "carrots",
    "broccoli": "heads of broccoli",
    "grapes": "bunches of grapes",
    "juice": "bottles of juice",
    "fish": "fish",
    "cake": "slices of cake",
}
FOODS = list(PLURAL)
RECIPES = {
    "an omelette": ("egg", "milk", "cheese"),
    "a fruit salad": ("apple", "grapes", "juice"),
    "a fish supper": ("fish", "carrot", "broccoli"),
    "a tea party": ("cake", "milk", "grapes"),
}
PLACES = {
    "top": "on the top shelf",
    "middle": "on the middle shelf",
    "bottom": "on the bottom shelf",
    "drawer": "in the drawer",
}
SLOTS = 3  # in each place
NUMBERS = ("none", "one", "two", "three")
SQUARE = 48  # pixels across a slot; a picture is four squares each way: a column of the open door, three of slots
SIDE = 4 * SQUARE


# ---- scenes ----


def foods(scene, place=None):
    """The foods of one place, or of all, in order."""
    return [food for p in ([place] if place else PLACES) for food in scene[p] if food]


def is_held_out(scene):
    """By what stands where, whatever the gaps between."""
    return (
        hashlib.sha256(repr([foods(scene, place) for place in PLACES]).encode()).digest()[0] % 8
        == 0
    )


def scene_of(rng, held_out):
    """A random scene of the wanted part: 2 to 8 foods, no kind more than three times, some on purpose twice or more."""
    while True:
        count = rng.randint(2, 8)
        kinds = [rng.choice(FOODS) for _ in range(count)]
        if rng.random() < 0.4:
            kinds[1:3] = [kinds[0]] * len(kinds[1 : rng.randint(2, 3)])
        rng.shuffle(kinds)
        slots = rng.sample([(place, i) for place in PLACES for i in range(SLOTS)], len(kinds))
        scene = {place: [None] * SLOTS for place in PLACES}
        for (place, i), kind in zip(slots, kinds, strict=True):
            scene[place][i] = kind
        if max(map(kinds.count, kinds)) <= 3 and is_held_out(scene) == held_out:
            return scene


def without(rng, scene, held_out):
    """(the scene with one food fewer, that food), a kind that stood there once; None if no such scene is of this part."""
    unique = [
        (p, i)
        for p in PLACES
        for i, food in enumerate(scene[p])
        if food and foods(scene).count(food) == 1
    ]
    rng.shuffle(unique)
    for place, i in unique:
        rest = {p: list(row) for p, row in scene.items()}
        rest[place][i] = None
        if is_held_out(rest) == held_out:
            return rest, scene[place][i]
    return None


# ---- words ----


def join(words):
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"


def reading(scene, order=tuple(PLACES)):
    """Shelf by shelf, each from left to right."""
    return ", ".join(f"{place} {' '.join(foods(scene, place)) or 'nothing'}" for place in order)


def plan(scene):
    """The fridge square by square, as the eye will see it: each of the four rows is a square of the door and three slots."""
    return "".join(f" {word or '.'}" for place in PLACES for word in (place, *scene[place]))


def note(rng, scene):
    """The fridge in words, for a brain without eyes."""
    order, style = rng.sample(list(PLACES), 4), rng.random()
    if style < 0.85:
        return plan(scene)
    if style < 0.93:
        return reading(scene, order)
    return ", ".join(f"{join(foods(scene, p))} {PLACES[p]}" for p in order)


def ask_reading(rng, scene):
    return rng.choice(
        ["What is in the fridge?", "What do you see?", "Read the fridge from top to bottom."]
    ), reading(scene)


def ask_upward(rng, scene):
    return "Read the fridge from bottom to top.", reading(scene, tuple(reversed(PLACES)))


def whereabouts(scene, food):
    """A food and the place of each of its kind."""
    return " ".join([food, *(place for place in PLACES for found in scene[place] if found == food)])


def ask_inventory(rng, scene):
    """By kind where ask_reading goes by place: looking for a food is learnt ten times from one answer. Trained, never examined."""
    return "Where is everything?", ", ".join(
        whereabouts(scene, food) if food in foods(scene) else f"{food} nowhere" for food in FOODS
    )


def ask_shelf(rng, scene, place=None):
    place = place or rng.choice(list(PLACES))
    return f"What is {PLACES[place]}?", join(foods(scene, place))


def ask_count(rng, scene):
    number = rng.choice([0, 1, 1, 2, 2, 3])
    kinds = [f for f in FOODS if foods(scene).count(f) == number] or [
        f for f in FOODS if f in foods(scene)
    ]
    kind = rng.choice(kinds)
    return f"How many {PLURAL[kind]} are there?", NUMBERS[foods(scene).count(kind)]


def ask_exists(rng, scene):
    there = rng.random() < 0.5
    kind = rng.choice([f for f in FOODS if (f in foods(scene)) == there])
    return rng.choice(
        [f"Is there any {kind}?", f"Do you see any {kind}?"]
    ), "yes" if there else "no"


def unique_foods(scene):
    return [food for food in foods(scene) if foods(scene).count(food) == 1]


def ask_where(rng, scene):
    kinds = unique_foods(scene)
    if not kinds:
        return None
    kind = rng.choice(kinds)
    return f"Where is the {kind}?", whereabouts(scene, kind)


def ask_next(rng, scene):
    kinds = unique_foods(scene)
    if not kinds:
        return None
    kind = rng.choice(kinds)
    row = next(foods(scene, p) for p in PLACES if kind in scene[p])
    i = row.index(kind)
    return (
        f"What is next to the {kind}?",
        f"{whereabouts(scene, kind)} beside {join(row[max(0, i - 1) : i] + row[i + 1 : i + 2])}",
    )


def ask_taken(scene, rest, food):
    """Questions about a scene and the rest of it, without a food that was there once."""
    return [
        ("What was taken out?", food),
        ("Where was it?", whereabouts(scene, food)),
        ("What is left?", reading(rest)),
    ]


def ask_recipe(rng, scene):
    recipe = rng.choice(list(RECIPES))
    return f"What is missing for {recipe}?", join(
        [food for food in RECIPES[recipe] if food not in foods(scene)]
    )


KINDS = {
    "reading": ask_reading,
    "shelf": ask_shelf,
    "count": ask_count,
    "exists": ask_exists,
    "where": ask_where,
    "next": ask_next,
    "recipe": ask_recipe,
}


def questions(rng, scene, count):
    """(question, answer) pairs: the inventory, then each kind once, and the hardest twice, before any comes again."""
    asked = dict([ask_inventory(rng, scene)])
    while len(asked) < count:
        for kind in rng.sample([*KINDS, "count", "next"], len(KINDS) + 2):
            pair = KINDS[kind](rng, scene)
            if pair and len(asked) < count:
                asked.setdefault(*pair)
    return rng.sample(list(asked.items()), count)


def talk(pairs, before):
    """LLaVA's list of turns, with `before` in front of the first question."""
    turns = [
        turn
        for question, answer in pairs
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
    turns[0]["value"] = before + turns[0]["value"]
    return turns


def text_only(rng):
    """A conversation without a picture: small talk, two fridges compared, or questions about one that is told in words."""
    style = rng.random()
    if style < 0.04:
        recipe = rng.choice(list(RECIPES))
        return talk(
            [
                ("Hello!", "Hello! Show me your fridge."),
                (f"What do I need for {recipe}?", join(list(RECIPES[recipe]))),
            ],
            "",
        )
    scene = scene_of(rng, False)
    pair = without(rng, scene, False) if style < 0.5 else None
    if pair:
        rest, food = pair
        return talk(ask_taken(scene, rest, food), f"{plan(scene)}\n{plan(rest)}\n")
    return talk(questions(rng, scene, rng.randint(8, 12)), note(rng, scene) + "\n")


# ---- pictures ----


def sprite_apple(d):
    d.ellipse((10, 26, 72, 118), fill="#d42020")
    d.ellipse((56, 26, 118, 118), fill="#d42020")
    d.ellipse((26, 40, 44, 66), fill="#f08070")
    d.line((64, 34, 70, 8), fill="#5a3a1a", width=8)
    d.ellipse((70, 6, 104, 26), fill="#3a9a30")


def sprite_milk(d):
    d.polygon([(28, 40), (44, 12), (84, 12), (100, 40)], fill="#d8e4f4", outline="#8090b0")
    d.rectangle((28, 40, 100, 122), fill="#fafcff", outline="#8090b0", width=3)
    d.rectangle((28, 62, 100, 98), fill="#2860d8")
    d.rectangle((44, 4, 84, 16), fill="#2860d8")


def sprite_egg(d):
    d.ellipse((26, 18, 102, 122), fill="#f0cfa0", outline="#b08850", width=4)
    d.ellipse((42, 36, 64, 66), fill="#fcecd4")


def sprite_cheese(d):
    d.polygon([(6, 84), (100, 36), (122, 84)], fill="#ffe060")
    d.rectangle((6, 84, 122, 122), fill="#f4b800")
    for x, y, r in ((32, 102, 10), (70, 98, 12), (102, 108, 8)):
        d.ellipse((x - r, y - r, x + r, y + r), fill="#b87c00")


def sprite_carrot(d):
    d.polygon([(38, 44), (90, 44), (70, 124), (58, 124)], fill="#ff7a10")
    for y in (62, 80, 98):
        d.line((48, y, 66, y), fill="#c85000", width=4)
    for x in (36, 64, 92):
        d.line((64, 46, x, 6), fill="#2ca02c", width=13)


def sprite_broccoli(d):
    d.polygon([(48, 70), (80, 70), (86, 122), (42, 122)], fill="#a8d070")
    for x, y, r in ((34, 54, 28), (94, 54, 28), (64, 34, 30), (64, 62, 28)):
        d.ellipse((x - r, y - r, x + r, y + r), fill="#187818")
    for x, y in ((34, 46), (64, 26), (92, 48), (60, 60)):
        d.ellipse((x - 8, y - 8, x + 8, y + 8), fill="#38a038")


def sprite_grapes(d):
    for row, count in enumerate((4, 3, 2, 1)):
        for i in range(count):
            x, y = 64 + (i - (count - 1) / 2) * 28, 38 + row * 24
            d.ellipse((x - 17, y - 17, x + 17, y + 17), fill="#7020a0", outline="#480870", width=3)
    d.line((64, 26, 72, 4), fill="#4a7a20", width=8)


def sprite_juice(d):
    d.rectangle((52, 4, 76, 20), fill="#18a0a0")
    d.polygon([(54, 20), (74, 20), (96, 52), (96, 122), (32, 122), (32, 52)], fill="#20c8c8")
    d.rectangle((32, 66, 96, 102), fill="#fff4a0")


def sprite_fish(d):
    d.polygon([(84, 66), (124, 34), (124, 100)], fill="#506880")
    d.ellipse((4, 36, 100, 98), fill="#7890a8", outline="#405468", width=4)
    d.ellipse((20, 54, 36, 70), fill="#ffffff")
    d.ellipse((25, 58, 33, 66), fill="#000000")
    d.arc((30, 44, 62, 92), 270, 90, fill="#405468", width=4)


def sprite_cake(d):
    d.polygon([(8, 58), (86, 28), (122, 58)], fill="#ff9ac8")
    d.rectangle((8, 58, 122, 122), fill="#fff0d8")
    d.rectangle((8, 58, 122, 74), fill="#ff60a8")
    d.rectangle((8, 92, 122, 104), fill="#ff60a8")
    d.ellipse((72, 12, 100, 40), fill="#e01040")


@cache
def sprite(food):
    """A food on a transparent square of 128 pixels."""
    picture = Image.new("RGBA", (128, 128))
    globals()[f"sprite_{food}"](ImageDraw.Draw(picture))
    return picture.filter(ImageFilter.SMOOTH)


def put(rng, picture, food, x, floor, size):
    """Stand a food on a floor, its middle at x, in its own size and tint."""
    size = round(size * rng.uniform(0.88, 1.14))
    thing = sprite(food).resize((size, size), Image.BILINEAR)
    colour = ImageEnhance.Brightness(
        ImageEnhance.Color(thing).enhance(rng.uniform(0.8, 1.2))
    ).enhance(rng.uniform(0.88, 1.1))
    left, top = (
        round(x - size / 2 + rng.uniform(-4, 4)),
        round(floor - size * 0.95 + rng.uniform(-1, 1)),
    )
    picture.paste(colour, (left, top), thing.getchannel("A"))


def draw(scene, rng):
    """The open fridge of a scene, SIDE × SIDE pixels: the inside of its door on the left, three shelves and a drawer on the right."""
    tone = rng.randint(222, 250)
    wall = (tone, tone, min(255, tone + rng.randint(0, 8)))
    picture = Image.new("RGB", (SIDE, SIDE), wall)
    d = ImageDraw.Draw(picture)
    for y in range(0, SIDE, 6):  # light falls from the lamp above
        d.rectangle(
            (SQUARE, y, SIDE, y + 5),
            fill=tuple(round(c * (1 - rng.uniform(0.05, 0.07) * y / SIDE)) for c in wall),
        )
    d.rectangle(
        (0, 0, SQUARE - 5, SIDE),
        fill=tuple(c - rng.randint(16, 40) for c in wall),
        outline=(150, 155, 165),
        width=2,
    )
    for _ in range(rng.randint(0, 5)):  # magnets on the door, and notes: they mean nothing
        x, y, size = rng.randint(5, 26), rng.randint(4, SIDE - 20), rng.randint(4, 13)
        rng.choice([d.ellipse, d.rectangle])(
            (x, y, x + size, y + size), fill=tuple(rng.randint(60, 255) for _ in range(3))
        )
    d.rectangle((SQUARE, SIDE - SQUARE + 1, SIDE, SIDE), fill=tuple(c - 22 for c in wall))
    for row in range(1, 4):
        d.rectangle((SQUARE, row * SQUARE - 2, SIDE, row * SQUARE), fill=(165, 185, 200))
    for _ in range(rng.randint(0, 3)):  # frost
        x, y = rng.randint(SQUARE, SIDE - 10), rng.randint(4, SIDE - 10)
        d.ellipse((x, y, x + rng.randint(2, 5), y + rng.randint(2, 4)), fill=(255, 255, 255))
    things = [
        (row, i, food)
        for row, place in enumerate(PLACES)
        for i, food in enumerate(scene[place])
        if food
    ]
    for row, i, food in rng.sample(things, len(things)):  # who stands in front of whom is chance
        put(rng, picture, food, (i + 1.5) * SQUARE, (row + 1) * SQUARE - 2, 0.9 * SQUARE)
    d.rectangle(
        (SQUARE, SIDE - 7, SIDE, SIDE), fill=(185, 200, 212)
    )  # the drawer's front hides the feet of what lies in it
    d.rectangle((SQUARE + 60, SIDE - 5, SQUARE + 84, SIDE - 3), fill=(130, 140, 155))
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.85, 1.1))
    warm = rng.uniform(-0.05, 0.05)
    r, g, b = picture.split()
    return Image.merge(
        "RGB", (r.point(lambda v: v * (1 + warm)), g, b.point(lambda v: v * (1 - warm)))
    )


# ---- files ----


def train_sample(number, seed, folder):
    """One training fridge: its picture on disk, its captions and its chat; every other chat is about two pictures, before and after."""
    rng, name = random.Random(f"{seed}-train-{number}"), f"train-{number:05d}"
    scene = scene_of(rng, False)
    save(draw(scene, rng), folder / f"{name}.jpg")
    parts = [ask_upward(rng, scene), *(ask_shelf(rng, scene, place) for place in PLACES)]
    captions = [ask_reading(rng, scene), ask_inventory(rng, scene), *rng.sample(parts, 2)]
    caption = {"id": name, "image": f"{name}.jpg", "conversations": talk(captions, "<image>\n")}
    images, asked = [f"{name}.jpg"], questions(rng, scene, rng.randint(8, 12))
    pair = without(rng, scene, False) if number % 2 else None
    if pair:
        rest, food = pair
        save(draw(rest, rng), folder / f"{name}-b.jpg")
        images, asked = [f"{name}.jpg", f"{name}-b.jpg"], ask_taken(scene, rest, food)
    chat = {"id": name, "image": images, "conversations": talk(asked, "<image>\n" * len(images))}
    return caption, chat


def exam_sample(number, seed, folder):
    """One held-out fridge: its pictures, and a question of each kind that fits it."""
    rng, name = random.Random(f"{seed}-exam-{number}"), f"exam-{number:05d}"
    scene = scene_of(rng, True)
    while not without(rng, scene, True):
        scene = scene_of(rng, True)
    rest, taken = without(rng, scene, True)
    save(draw(scene, rng), folder / f"{name}.jpg")
    save(draw(rest, rng), folder / f"{name}-b.jpg")
    asked = [(kind, ask(rng, scene), f"{name}.jpg") for kind, ask in KINDS.items()]
    asked.append(("taken", ask_taken(scene, rest, taken)[0], [f"{name}.jpg", f"{name}-b.jpg"]))
    return [
        {
            "id": f"{name}-{kind}",
            "kind": kind,
            "image": image,
            "question": pair[0],
            "answers": [pair[1]],
        }
        for kind, pair, image in asked
        if pair
    ]


def save(picture, path):
    picture.save(path, quality=90)


def write_world(*, out, scenes=8000, text=12000, exam=500, seed=0, workers=2):
    """Draw and describe the world into a new folder; the same seed gives the same bytes, whatever the number of workers."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{out.name}.", dir=out.parent
    ) as tmp:  # a world that is not whole never has the name
        draw_all(Path(tmp) / "world", scenes, text, exam, seed, workers)
        os.rename(Path(tmp) / "world", out)
    cli.status(
        f"{out}: {scenes} fridges to learn from, {text} conversations without one, {exam} held out for the exam"
    )


def draw_all(out, scenes, text, exam, seed, workers):
    (out / "images").mkdir(parents=True)
    with ProcessPoolExecutor(workers) as pool:
        trained = list(
            pool.map(
                train_sample,
                range(scenes),
                [seed] * scenes,
                [out / "images"] * scenes,
                chunksize=100,
            )
        )
        asked = list(
            pool.map(exam_sample, range(exam), [seed] * exam, [out / "images"] * exam, chunksize=50)
        )
    told = [
        {"id": f"text-{i:05d}", "conversations": text_only(random.Random(f"{seed}-text-{i}"))}
        for i in range(text)
    ]
    extra = [
        {"id": f"told-{i:05d}", "conversations": text_only(random.Random(f"{seed}-told-{i}"))}
        for i in range(scenes // 12)
    ]
    files = {
        "text": told,
        "captions": [caption for caption, _ in trained],
        "chats": [chat for _, chat in trained] + extra,
    }
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records))
    rng = random.Random(f"{seed}-demo")
    scene = scene_of(rng, True)
    while not (len(foods(scene)) == 6 and all(foods(scene, p) for p in PLACES)):
        scene = scene_of(rng, True)
    save(draw(scene, rng), out / "fridge.jpg")
    (out / "fridge.txt").write_text(reading(scene) + "\n")
    (out / "exam.jsonl").write_text(
        "".join(json.dumps(q) + "\n" for questions in asked for q in questions)
    )
