"""The data of the demonstration: drawn fridges, what is in them in words, and questions about them.

It needs Pillow only. A scene is three shelves and a drawer with three slots each, from left to
right; None is an empty slot:

    {
        "top": ("apple", None, "milk"),
        "middle": (None, None, None),
        "bottom": ("egg", "egg", None),
        "drawer": ("juice", None, None),
    }

Each scene is a function of (seed, number), so scenes can be drawn in any order. A hash of its
content decides whether a scene is held out, which is one in eight: the evaluation never shows a
fridge with the content of a training fridge.
"""

import hashlib
import json
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
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
DISHES = {
    "an omelette": ("egg", "milk", "cheese"),
    "a fruit salad": ("apple", "grapes", "juice"),
    "a fish supper": ("fish", "carrot", "broccoli"),
    "a tea party": ("cake", "milk", "grapes"),
}
SHELVES = {
    "top": "on the top shelf",
    "middle": "on the middle shelf",
    "bottom": "on the bottom shelf",
    "drawer": "in the drawer",
}
SLOTS = 3  # on each shelf
COUNT_WORDS = ("none", "one", "two", "three")
# Pixels across a slot. An image is 4 × 4 squares: a column of the open door, three of slots.
SQUARE = 48
SIDE = 4 * SQUARE


# ---- scenes ----


def foods(scene, shelf=None):
    """The foods of one shelf, or of all shelves, in order."""
    return [food for p in ([shelf] if shelf else SHELVES) for food in scene[p] if food]


def is_held_out(scene):
    """True for one scene in eight; the empty slots do not matter."""
    content = repr([foods(scene, shelf) for shelf in SHELVES])
    return hashlib.sha256(content.encode()).digest()[0] % 8 == 0


def random_scene(rng, held_out):
    """A random scene of 2 to 8 foods, of each kind at most three; 40% repeat a kind on purpose."""
    while True:
        count = rng.randint(2, 8)
        kinds = [rng.choice(FOODS) for _ in range(count)]
        if rng.random() < 0.4:
            kinds[1:3] = [kinds[0]] * len(kinds[1 : rng.randint(2, 3)])
        rng.shuffle(kinds)
        slots = rng.sample([(shelf, i) for shelf in SHELVES for i in range(SLOTS)], len(kinds))
        scene = {shelf: [None] * SLOTS for shelf in SHELVES}
        for (shelf, i), kind in zip(slots, kinds, strict=True):
            scene[shelf][i] = kind
        if max(map(kinds.count, kinds)) <= 3 and is_held_out(scene) == held_out:
            return scene


def remove_random_food(rng, scene, held_out):
    """Returns (the scene without one food, that food), which the scene has once.

    The new scene is held out if `held_out`, else a training scene. Returns None if there is none.
    """
    single = []
    for shelf in SHELVES:
        for i, food in enumerate(scene[shelf]):
            if food and foods(scene).count(food) == 1:
                single.append((shelf, i))
    rng.shuffle(single)
    for shelf, i in single:
        rest = {name: list(slots) for name, slots in scene.items()}
        rest[shelf][i] = None
        if is_held_out(rest) == held_out:
            return rest, scene[shelf][i]
    return None


# ---- words ----


def join_words(words):
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"


def describe_scene(scene, order=tuple(SHELVES)):
    """Shelf by shelf, each from left to right."""
    return ", ".join(f"{shelf} {' '.join(foods(scene, shelf)) or 'nothing'}" for shelf in order)


def grid_description(scene):
    """The scene square by square, in the order of an image's tokens.

    Each of the four rows is a square of the door, which has the name of the shelf, and three slots.
    """
    return "".join(f" {word or '.'}" for shelf in SHELVES for word in (shelf, *scene[shelf]))


def random_description(rng, scene):
    """A scene in words, which trains the language model without images."""
    order, style = rng.sample(list(SHELVES), 4), rng.random()
    if style < 0.85:
        return grid_description(scene)
    if style < 0.93:
        return describe_scene(scene, order)
    return ", ".join(f"{join_words(foods(scene, p))} {SHELVES[p]}" for p in order)


def reading_question(rng, scene):
    return rng.choice(
        ["What is in the fridge?", "What do you see?", "Read the fridge from top to bottom."]
    ), describe_scene(scene)


def upward_question(rng, scene):
    return "Read the fridge from bottom to top.", describe_scene(scene, tuple(reversed(SHELVES)))


def food_shelves(scene, food):
    """A food, and the shelf of each food of this kind."""
    shelves = [shelf for shelf in SHELVES for found in scene[shelf] if found == food]
    return " ".join([food, *shelves])


def inventory_question(rng, scene):
    """All kinds of food and their shelves: one answer trains ten searches.

    It is in the training data, but not in the evaluation.
    """
    return "Where is everything?", ", ".join(
        food_shelves(scene, food) if food in foods(scene) else f"{food} nowhere" for food in FOODS
    )


def shelf_question(rng, scene, shelf=None):
    shelf = shelf or rng.choice(list(SHELVES))
    return f"What is {SHELVES[shelf]}?", join_words(foods(scene, shelf))


def count_question(rng, scene):
    number = rng.choice([0, 1, 1, 2, 2, 3])
    kinds = [f for f in FOODS if foods(scene).count(f) == number] or [
        f for f in FOODS if f in foods(scene)
    ]
    kind = rng.choice(kinds)
    return f"How many {PLURAL[kind]} are there?", COUNT_WORDS[foods(scene).count(kind)]


def exists_question(rng, scene):
    there = rng.random() < 0.5
    kind = rng.choice([f for f in FOODS if (f in foods(scene)) == there])
    return rng.choice(
        [f"Is there any {kind}?", f"Do you see any {kind}?"]
    ), "yes" if there else "no"


def single_foods(scene):
    return [food for food in foods(scene) if foods(scene).count(food) == 1]


def where_question(rng, scene):
    kinds = single_foods(scene)
    if not kinds:
        return None
    kind = rng.choice(kinds)
    return f"Where is the {kind}?", food_shelves(scene, kind)


def next_question(rng, scene):
    kinds = single_foods(scene)
    if not kinds:
        return None
    kind = rng.choice(kinds)
    row = next(foods(scene, p) for p in SHELVES if kind in scene[p])
    i = row.index(kind)
    neighbours = join_words(row[max(0, i - 1) : i] + row[i + 1 : i + 2])
    return f"What is next to the {kind}?", f"{food_shelves(scene, kind)} beside {neighbours}"


def taken_questions(scene, rest, food):
    """Questions about a scene and the same scene without a food."""
    return [
        ("What was taken out?", food),
        ("Where was it?", food_shelves(scene, food)),
        ("What is left?", describe_scene(rest)),
    ]


def recipe_question(rng, scene):
    recipe = rng.choice(list(DISHES))
    return f"What is missing for {recipe}?", join_words(
        [food for food in DISHES[recipe] if food not in foods(scene)]
    )


QUESTION_KINDS = {
    "reading": reading_question,
    "shelf": shelf_question,
    "count": count_question,
    "exists": exists_question,
    "where": where_question,
    "next": next_question,
    "recipe": recipe_question,
}


def random_questions(rng, scene, count):
    """(question, answer) pairs: the inventory, then rounds of all kinds, the hardest twice each."""
    pairs = dict([inventory_question(rng, scene)])
    while len(pairs) < count:
        for kind in rng.sample([*QUESTION_KINDS, "count", "next"], len(QUESTION_KINDS) + 2):
            pair = QUESTION_KINDS[kind](rng, scene)
            if pair and len(pairs) < count:
                pairs.setdefault(*pair)
    return rng.sample(list(pairs.items()), count)


def make_conversation(pairs, prefix):
    """LLaVA's list of turns, with `prefix` in front of the first question."""
    turns = [
        turn
        for question, answer in pairs
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
    turns[0]["value"] = prefix + turns[0]["value"]
    return turns


def text_conversation(rng):
    """A conversation without an image.

    It is small talk, a comparison of two fridges, or questions about one fridge in words.
    """
    style = rng.random()
    if style < 0.04:
        recipe = rng.choice(list(DISHES))
        return make_conversation(
            [
                ("Hello!", "Hello! Show me your fridge."),
                (f"What do I need for {recipe}?", join_words(list(DISHES[recipe]))),
            ],
            "",
        )
    scene = random_scene(rng, False)
    pair = remove_random_food(rng, scene, False) if style < 0.5 else None
    if pair:
        rest, food = pair
        return make_conversation(
            taken_questions(scene, rest, food),
            f"{grid_description(scene)}\n{grid_description(rest)}\n",
        )
    return make_conversation(
        random_questions(rng, scene, rng.randint(8, 12)), random_description(rng, scene) + "\n"
    )


# ---- images ----


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
    image = Image.new("RGBA", (128, 128))
    globals()[f"sprite_{food}"](ImageDraw.Draw(image))
    return image.filter(ImageFilter.SMOOTH)


def paste_food(rng, image, food, x, floor, size):
    """Paste a food onto the floor of a shelf, centred at x, in a random size and tint."""
    size = round(size * rng.uniform(0.88, 1.14))
    thing = sprite(food).resize((size, size), Image.BILINEAR)
    colour = ImageEnhance.Brightness(
        ImageEnhance.Color(thing).enhance(rng.uniform(0.8, 1.2))
    ).enhance(rng.uniform(0.88, 1.1))
    left, top = (
        round(x - size / 2 + rng.uniform(-4, 4)),
        round(floor - size * 0.95 + rng.uniform(-1, 1)),
    )
    image.paste(colour, (left, top), thing.getchannel("A"))


def draw_scene(scene, rng):
    """The image of a scene, SIDE × SIDE pixels.

    The inside of the open door is on the left, three shelves and a drawer are on the right.
    """
    tone = rng.randint(222, 250)
    wall = (tone, tone, min(255, tone + rng.randint(0, 8)))
    image = Image.new("RGB", (SIDE, SIDE), wall)
    d = ImageDraw.Draw(image)
    for y in range(0, SIDE, 6):  # light comes from above
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
    for _ in range(rng.randint(0, 5)):  # magnets and notes on the door
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
        for row, shelf in enumerate(SHELVES)
        for i, food in enumerate(scene[shelf])
        if food
    ]
    for row, i, food in rng.sample(things, len(things)):  # which food covers which is random
        paste_food(rng, image, food, (i + 1.5) * SQUARE, (row + 1) * SQUARE - 2, 0.9 * SQUARE)
    # The drawer's front hides the lower edge of its foods.
    d.rectangle((SQUARE, SIDE - 7, SIDE, SIDE), fill=(185, 200, 212))
    d.rectangle((SQUARE + 60, SIDE - 5, SQUARE + 84, SIDE - 3), fill=(130, 140, 155))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.1))
    warm = rng.uniform(-0.05, 0.05)
    r, g, b = image.split()
    return Image.merge(
        "RGB", (r.point(lambda v: v * (1 + warm)), g, b.point(lambda v: v * (1 - warm)))
    )


# ---- files ----


def make_training_sample(number, seed, folder):
    """Write the image of one training fridge; returns its captions and its chat, as LLaVA records.

    Every other chat is about two images, before and after a food was taken out.
    """
    rng, name = random.Random(f"{seed}-train-{number}"), f"train-{number:05d}"
    scene = random_scene(rng, False)
    save_jpeg(draw_scene(scene, rng), folder / f"{name}.jpg")
    parts = [upward_question(rng, scene), *(shelf_question(rng, scene, shelf) for shelf in SHELVES)]
    captions = [reading_question(rng, scene), inventory_question(rng, scene), *rng.sample(parts, 2)]
    caption = {
        "id": name,
        "image": f"{name}.jpg",
        "conversations": make_conversation(captions, "<image>\n"),
    }
    images, pairs = [f"{name}.jpg"], random_questions(rng, scene, rng.randint(8, 12))
    without_food = remove_random_food(rng, scene, False) if number % 2 else None
    if without_food:
        rest, food = without_food
        save_jpeg(draw_scene(rest, rng), folder / f"{name}-b.jpg")
        images, pairs = [f"{name}.jpg", f"{name}-b.jpg"], taken_questions(scene, rest, food)
    conversation = make_conversation(pairs, "<image>\n" * len(images))
    return caption, {"id": name, "image": images, "conversations": conversation}


def make_eval_sample(number, seed, folder):
    """Write the images of one held-out fridge; returns a question of each kind that fits it."""
    # "exam" in the seed and "told" below are names of an older version: they decide the numbers.
    rng, name = random.Random(f"{seed}-exam-{number}"), f"eval-{number:05d}"
    scene = random_scene(rng, True)
    while not remove_random_food(rng, scene, True):
        scene = random_scene(rng, True)
    rest, taken = remove_random_food(rng, scene, True)
    save_jpeg(draw_scene(scene, rng), folder / f"{name}.jpg")
    save_jpeg(draw_scene(rest, rng), folder / f"{name}-b.jpg")
    questions = [(kind, make(rng, scene), f"{name}.jpg") for kind, make in QUESTION_KINDS.items()]
    both = [f"{name}.jpg", f"{name}-b.jpg"]
    questions.append(("taken", taken_questions(scene, rest, taken)[0], both))
    records = []
    for kind, pair, image in questions:
        if pair:
            record = {"id": f"{name}-{kind}", "kind": kind, "image": image}
            records.append(record | {"question": pair[0], "answers": [pair[1]]})
    return records


def save_jpeg(image, path):
    image.save(path, quality=90)


def write_fridges(*, out, scenes=8000, text=12000, eval_scenes=500, seed=0, workers=2):
    """Write images, captions, chats, text and questions into a new folder.

    The same seed gives the same bytes for any number of workers.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as tmp:
        draw_fridges(Path(tmp) / "fridges", scenes, text, eval_scenes, seed, workers)
        os.rename(Path(tmp) / "fridges", out)  # only a complete folder gets the name
    cli.print_status(
        f"{out}: {scenes} training fridges, {text} conversations without images, "
        f"{eval_scenes} held-out fridges with questions"
    )


def draw_fridges(out, scenes, text, eval_scenes, seed, workers):
    images = out / "images"
    images.mkdir(parents=True)
    with ProcessPoolExecutor(workers) as pool:
        make = partial(make_training_sample, seed=seed, folder=images)
        training = list(pool.map(make, range(scenes), chunksize=100))
        make = partial(make_eval_sample, seed=seed, folder=images)
        questions = list(pool.map(make, range(eval_scenes), chunksize=50))
    files = {
        "text": text_records("text", text, seed),
        "captions": [caption for caption, _ in training],
        "chats": [chat for _, chat in training] + text_records("told", scenes // 12, seed),
    }
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records))
    lines = [json.dumps(question) + "\n" for some in questions for question in some]
    (out / "questions.jsonl").write_text("".join(lines))
    write_example(out, seed)


def text_records(name, count, seed):
    """LLaVA records of conversations without images."""
    records = []
    for i in range(count):
        conversation = text_conversation(random.Random(f"{seed}-{name}-{i}"))
        records.append({"id": f"{name}-{i:05d}", "conversations": conversation})
    return records


def write_example(out, seed):
    """Write fridge.jpg, a held-out fridge with 6 foods and no empty shelf, and fridge.txt."""
    rng = random.Random(f"{seed}-demo")
    scene = random_scene(rng, True)
    while not (len(foods(scene)) == 6 and all(foods(scene, shelf) for shelf in SHELVES)):
        scene = random_scene(rng, True)
    save_jpeg(draw_scene(scene, rng), out / "fridge.jpg")
    (out / "fridge.txt").write_text(describe_scene(scene) + "\n")
