"""The data of the demonstration: drawings of fridges, descriptions of them, and questions.

Only Pillow is needed. A scene has three shelves and a drawer with three slots each, from left to
right; None is an empty slot:

    {
        "top": ("apple", None, "milk"),
        "middle": (None, None, None),
        "bottom": ("egg", "egg", None),
        "drawer": ("juice", None, None),
    }

Each scene is a function of (seed, number), so scenes can be drawn in any order. One scene in eight
is held out; a hash of its content decides. So no fridge of the evaluation has the content of a
training fridge.
"""

import hashlib
import json
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, product
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
SLOTS = list(product(SHELVES, range(3)))  # three on each shelf
COUNT_WORDS = ("none", "one", "two", "three")
# Pixels across a slot. An image is 4 × 4 squares: a column of the open door, three of slots.
SQUARE = 48
SIDE = 4 * SQUARE


# ---- scenes ----


def foods(scene, shelf=None):
    """Returns the foods of one shelf, or of all shelves, in order."""
    slots = scene[shelf] if shelf else chain(*scene.values())
    return [food for food in slots if food]


def single_foods(scene):
    """Returns the foods that the scene has exactly once."""
    return [food for food in foods(scene) if foods(scene).count(food) == 1]


def is_held_out(scene):
    """Returns True for one scene in eight. Empty slots do not matter."""
    content = repr([foods(scene, shelf) for shelf in SHELVES])
    return hashlib.sha256(content.encode()).digest()[0] % 8 == 0


def random_scene(rng, held_out):
    """Returns a scene of 2 to 8 foods, at most three of a kind; 40% repeat a kind on purpose."""
    while True:
        count = rng.randint(2, 8)
        kinds = [rng.choice(FOODS) for _ in range(count)]
        if rng.random() < 0.4:
            kinds[1:3] = [kinds[0]] * len(kinds[1 : rng.randint(2, 3)])
        rng.shuffle(kinds)
        scene = {shelf: [None] * 3 for shelf in SHELVES}
        for (shelf, i), kind in zip(rng.sample(SLOTS, len(kinds)), kinds, strict=True):
            scene[shelf][i] = kind
        if max(map(kinds.count, kinds)) <= 3 and is_held_out(scene) == held_out:
            return scene


def remove_random_food(rng, scene, held_out):
    """Returns (the scene without a food, that food). The scene has the food exactly once.

    The new scene is held out if `held_out`, else a training scene. Returns None if there is no such
    food.
    """
    singles = single_foods(scene)
    slots = [(shelf, i) for shelf, i in SLOTS if scene[shelf][i] in singles]
    rng.shuffle(slots)
    for shelf, i in slots:
        rest = scene | {shelf: list(scene[shelf])}
        rest[shelf][i] = None
        if is_held_out(rest) == held_out:
            return rest, scene[shelf][i]
    return None


# ---- words ----


def join_words(words):
    """Returns a list in English: "apple, milk and egg"."""
    if len(words) < 2:
        return "".join(words) or "nothing"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def describe_scene(scene, order=tuple(SHELVES)):
    """Returns the foods of each shelf, from left to right."""
    return ", ".join(f"{shelf} {' '.join(foods(scene, shelf)) or 'nothing'}" for shelf in order)


def grid_description(scene):
    """Returns a word for each square, in the order of an image's tokens.

    Each of the four rows is the name of the shelf, at the square of the door, and three slots.
    """
    words = []
    for shelf in SHELVES:
        words += [shelf, *scene[shelf]]
    return "".join(f" {word or '.'}" for word in words)


def random_description(rng, scene):
    """Returns a scene in words, to train the language model without images."""
    order, style = rng.sample(list(SHELVES), 4), rng.random()
    if style < 0.85:
        return grid_description(scene)
    if style < 0.93:
        return describe_scene(scene, order)
    return ", ".join(f"{join_words(foods(scene, p))} {SHELVES[p]}" for p in order)


def reading_question(rng, scene):
    questions = [
        "What is in the fridge?",
        "What do you see?",
        "Read the fridge from top to bottom.",
    ]
    return rng.choice(questions), describe_scene(scene)


def upward_question(rng, scene):
    return "Read the fridge from bottom to top.", describe_scene(scene, tuple(reversed(SHELVES)))


def food_shelves(scene, food):
    """Returns a food, then the shelf of each food of this kind."""
    shelves = [shelf for shelf, i in SLOTS if scene[shelf][i] == food]
    return " ".join([food, *(shelves or ["nowhere"])])


def inventory_question(rng, scene):
    """All kinds of food and their shelves; in the training data only.

    One answer trains ten searches.
    """
    return "Where is everything?", ", ".join(food_shelves(scene, food) for food in FOODS)


def shelf_question(rng, scene, shelf=None):
    shelf = shelf or rng.choice(list(SHELVES))
    return f"What is {SHELVES[shelf]}?", join_words(foods(scene, shelf))


def count_question(rng, scene):
    number = rng.choice([0, 1, 1, 2, 2, 3])
    counts = {food: foods(scene).count(food) for food in FOODS}
    kinds = [food for food in FOODS if counts[food] == number]
    kind = rng.choice(kinds or [food for food in FOODS if counts[food]])
    return f"How many {PLURAL[kind]} are there?", COUNT_WORDS[counts[kind]]


def exists_question(rng, scene):
    answer = "yes" if rng.random() < 0.5 else "no"
    kind = rng.choice([food for food in FOODS if (food in foods(scene)) == (answer == "yes")])
    return rng.choice([f"Is there any {kind}?", f"Do you see any {kind}?"]), answer


def where_question(rng, scene):
    """Returns None if the scene has no food exactly once."""
    if kinds := single_foods(scene):
        kind = rng.choice(kinds)
        return f"Where is the {kind}?", food_shelves(scene, kind)


def next_question(rng, scene):
    """Returns None if the scene has no food exactly once."""
    if kinds := single_foods(scene):
        kind = rng.choice(kinds)
        row = next(foods(scene, shelf) for shelf in SHELVES if kind in scene[shelf])
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
    missing = [food for food in DISHES[recipe] if food not in foods(scene)]
    return f"What is missing for {recipe}?", join_words(missing)


QUESTION_KINDS = {
    "reading": reading_question,
    "shelf": shelf_question,
    "count": count_question,
    "exists": exists_question,
    "where": where_question,
    "next": next_question,
    "recipe": recipe_question,
}


def random_questions(rng, scene):
    """Returns 8 to 12 (question, answer) pairs of all kinds; the hardest kinds come twice each."""
    count = rng.randint(8, 12)
    pairs = dict([inventory_question(rng, scene)])
    while len(pairs) < count:
        for kind in rng.sample([*QUESTION_KINDS, "count", "next"], len(QUESTION_KINDS) + 2):
            pair = QUESTION_KINDS[kind](rng, scene)
            if pair and len(pairs) < count:
                pairs.setdefault(*pair)
    return rng.sample(list(pairs.items()), count)


def make_conversation(pairs, prefix):
    """Returns LLaVA's list of turns, with `prefix` before the first question."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": prefix + question})
        turns.append({"from": "gpt", "value": answer})
        prefix = ""
    return turns


def text_conversation(rng):
    """Returns a conversation without images.

    It is small talk, a comparison of two descriptions, or questions about one description.
    """
    style = rng.random()
    if style < 0.04:
        recipe = rng.choice(list(DISHES))
        request = f"What do I need for {recipe}?", join_words(DISHES[recipe])
        return make_conversation([("Hello!", "Hello! Show me your fridge."), request], "")
    scene = random_scene(rng, False)
    removed = remove_random_food(rng, scene, False) if style < 0.5 else None
    if removed:
        descriptions = f"{grid_description(scene)}\n{grid_description(removed[0])}\n"
        return make_conversation(taken_questions(scene, *removed), descriptions)
    pairs = random_questions(rng, scene)
    return make_conversation(pairs, random_description(rng, scene) + "\n")


# ---- images ----

GRAPES = [(22, 38), (50, 38), (78, 38), (106, 38), (36, 62), (64, 62), (92, 62), (50, 86), (78, 86)]
# (method of ImageDraw, its arguments), on a square of 128 pixels
SPRITES = {
    "apple": [
        ("ellipse", (10, 26, 72, 118), "#d42020"),
        ("ellipse", (56, 26, 118, 118), "#d42020"),
        ("ellipse", (26, 40, 44, 66), "#f08070"),
        ("line", (64, 34, 70, 8), "#5a3a1a", 8),
        ("ellipse", (70, 6, 104, 26), "#3a9a30"),
    ],
    "milk": [
        ("polygon", (28, 40, 44, 12, 84, 12, 100, 40), "#d8e4f4", "#8090b0"),
        ("rectangle", (28, 40, 100, 122), "#fafcff", "#8090b0", 3),
        ("rectangle", (28, 62, 100, 98), "#2860d8"),
        ("rectangle", (44, 4, 84, 16), "#2860d8"),
    ],
    "egg": [
        ("ellipse", (26, 18, 102, 122), "#f0cfa0", "#b08850", 4),
        ("ellipse", (42, 36, 64, 66), "#fcecd4"),
    ],
    "cheese": [
        ("polygon", (6, 84, 100, 36, 122, 84), "#ffe060"),
        ("rectangle", (6, 84, 122, 122), "#f4b800"),
        ("circle", (32, 102), 10, "#b87c00"),
        ("circle", (70, 98), 12, "#b87c00"),
        ("circle", (102, 108), 8, "#b87c00"),
    ],
    "carrot": [
        ("polygon", (38, 44, 90, 44, 70, 124, 58, 124), "#ff7a10"),
        *(("line", (48, y, 66, y), "#c85000", 4) for y in (62, 80, 98)),
        *(("line", (64, 46, x, 6), "#2ca02c", 13) for x in (36, 64, 92)),
    ],
    "broccoli": [
        ("polygon", (48, 70, 80, 70, 86, 122, 42, 122), "#a8d070"),
        ("circle", (34, 54), 28, "#187818"),
        ("circle", (94, 54), 28, "#187818"),
        ("circle", (64, 34), 30, "#187818"),
        ("circle", (64, 62), 28, "#187818"),
        *(("circle", xy, 8, "#38a038") for xy in ((34, 46), (64, 26), (92, 48), (60, 60))),
    ],
    "grapes": [
        *(("circle", xy, 17, "#7020a0", "#480870", 3) for xy in (*GRAPES, (64, 110))),
        ("line", (64, 26, 72, 4), "#4a7a20", 8),
    ],
    "juice": [
        ("rectangle", (52, 4, 76, 20), "#18a0a0"),
        ("polygon", (54, 20, 74, 20, 96, 52, 96, 122, 32, 122, 32, 52), "#20c8c8"),
        ("rectangle", (32, 66, 96, 102), "#fff4a0"),
    ],
    "fish": [
        ("polygon", (84, 66, 124, 34, 124, 100), "#506880"),
        ("ellipse", (4, 36, 100, 98), "#7890a8", "#405468", 4),
        ("ellipse", (20, 54, 36, 70), "#ffffff"),
        ("ellipse", (25, 58, 33, 66), "#000000"),
        ("arc", (30, 44, 62, 92), 270, 90, "#405468", 4),
    ],
    "cake": [
        ("polygon", (8, 58, 86, 28, 122, 58), "#ff9ac8"),
        ("rectangle", (8, 58, 122, 122), "#fff0d8"),
        ("rectangle", (8, 58, 122, 74), "#ff60a8"),
        ("rectangle", (8, 92, 122, 104), "#ff60a8"),
        ("ellipse", (72, 12, 100, 40), "#e01040"),
    ],
}


@cache
def sprite(food):
    """Returns a food on a transparent square of 128 pixels."""
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    for method, *arguments in SPRITES[food]:
        getattr(draw, method)(*arguments)
    return image.filter(ImageFilter.SMOOTH)


def paste_food(rng, image, food, x, floor):
    """Paste a food onto the floor of a shelf, centered at x, in a random size and tint."""
    size = round(0.9 * SQUARE * rng.uniform(0.88, 1.14))
    thing = sprite(food).resize((size, size), Image.BILINEAR)
    colour = ImageEnhance.Color(thing).enhance(rng.uniform(0.8, 1.2))
    colour = ImageEnhance.Brightness(colour).enhance(rng.uniform(0.88, 1.1))
    left = round(x - size / 2 + rng.uniform(-4, 4))
    top = round(floor - size * 0.95 + rng.uniform(-1, 1))
    image.paste(colour, (left, top), thing.getchannel("A"))


def draw_scene(scene, rng):
    """Returns the image of a scene, SIDE × SIDE pixels.

    The open door is on the left; three shelves and a drawer are on the right.
    """
    tone = rng.randint(222, 250)
    wall = (tone, tone, min(255, tone + rng.randint(0, 8)))
    image = Image.new("RGB", (SIDE, SIDE), wall)
    draw = ImageDraw.Draw(image)
    for y in range(0, SIDE, 6):  # light comes from above
        color = tuple(round(c * (1 - rng.uniform(0.05, 0.07) * y / SIDE)) for c in wall)
        draw.rectangle((SQUARE, y, SIDE, y + 5), color)
    color = tuple(c - rng.randint(16, 40) for c in wall)
    draw.rectangle((0, 0, SQUARE - 5, SIDE), color, (150, 155, 165), 2)
    for _ in range(rng.randint(0, 5)):  # magnets and notes on the door
        x, y, size = rng.randint(5, 26), rng.randint(4, SIDE - 20), rng.randint(4, 13)
        shape = rng.choice([draw.ellipse, draw.rectangle])
        shape((x, y, x + size, y + size), tuple(rng.randint(60, 255) for _ in range(3)))
    draw.rectangle((SQUARE, SIDE - SQUARE + 1, SIDE, SIDE), tuple(c - 22 for c in wall))
    for y in range(SQUARE, SIDE, SQUARE):
        draw.rectangle((SQUARE, y - 2, SIDE, y), (165, 185, 200))
    for _ in range(rng.randint(0, 3)):  # frost
        x, y = rng.randint(SQUARE, SIDE - 10), rng.randint(4, SIDE - 10)
        draw.ellipse((x, y, x + rng.randint(2, 5), y + rng.randint(2, 4)), "white")
    rows = list(scene.values())
    filled = [(row, i) for row, i in product(range(4), range(3)) if rows[row][i]]
    for row, i in rng.sample(filled, len(filled)):  # a random food covers its neighbour
        paste_food(rng, image, rows[row][i], (i + 1.5) * SQUARE, (row + 1) * SQUARE - 2)
    # The drawer's front hides the lower edge of its foods.
    draw.rectangle((SQUARE, SIDE - 7, SIDE, SIDE), (185, 200, 212))
    draw.rectangle((SQUARE + 60, SIDE - 5, SQUARE + 84, SIDE - 3), (130, 140, 155))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.1))
    warm = rng.uniform(-0.05, 0.05)
    red, green, blue = image.split()
    red, blue = red.point(lambda v: v * (1 + warm)), blue.point(lambda v: v * (1 - warm))
    return Image.merge("RGB", (red, green, blue))


# ---- files ----


def save_scene(scene, rng, path):
    """Draw a scene into a JPEG; returns the file's name."""
    draw_scene(scene, rng).save(path, quality=90)
    return path.name


def make_training_sample(number, seed, folder):
    """Write the image of a training fridge; returns LLaVA records of its captions and its chat.

    Every second chat is about two images, before and after a food was taken out.
    """
    rng, name = random.Random(f"{seed}-train-{number}"), f"train-{number:05d}"
    scene = random_scene(rng, False)
    image = save_scene(scene, rng, folder / f"{name}.jpg")
    parts = [upward_question(rng, scene), *(shelf_question(rng, scene, shelf) for shelf in SHELVES)]
    captions = [reading_question(rng, scene), inventory_question(rng, scene), *rng.sample(parts, 2)]
    turns = make_conversation(captions, "<image>\n")
    caption = {"id": name, "image": image, "conversations": turns}
    images, pairs = [image], random_questions(rng, scene)
    removed = remove_random_food(rng, scene, False) if number % 2 else None
    if removed:
        images.append(save_scene(removed[0], rng, folder / f"{name}-b.jpg"))
        pairs = taken_questions(scene, *removed)
    turns = make_conversation(pairs, "<image>\n" * len(images))
    return caption, {"id": name, "image": images, "conversations": turns}


def held_out_scene(number, seed):
    """Returns a scene of the evaluation, as (rng, scene, what `remove_random_food` returns)."""
    # "exam" here and "told" below are old names; they are in the seeds, so they decide the data.
    rng = random.Random(f"{seed}-exam-{number}")
    scene = random_scene(rng, True)
    while not remove_random_food(rng, scene, True):
        scene = random_scene(rng, True)
    return rng, scene, remove_random_food(rng, scene, True)


def make_eval_sample(number, seed, folder):
    """Write the images of a held-out fridge; returns a question of each kind that fits it."""
    rng, scene, (rest, taken) = held_out_scene(number, seed)
    name = f"eval-{number:05d}"
    image = save_scene(scene, rng, folder / f"{name}.jpg")
    both = [image, save_scene(rest, rng, folder / f"{name}-b.jpg")]
    questions = [(kind, make(rng, scene), image) for kind, make in QUESTION_KINDS.items()]
    questions.append(("taken", taken_questions(scene, rest, taken)[0], both))
    records = []
    for kind, pair, images in questions:
        if pair:
            record = {"id": f"{name}-{kind}", "kind": kind, "image": images, "question": pair[0]}
            records.append(record | {"answers": [pair[1]]})
    return records


def write_fridges(*, out, scenes, text, eval_scenes, seed, workers=2):
    """Write images, captions, chats, text and questions into a new folder.

    The same seed gives the same bytes for any number of workers.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as tmp:
        folder = Path(tmp, "fridges")
        options = {"seed": seed, "folder": folder / "images"}
        options["folder"].mkdir(parents=True)
        with ProcessPoolExecutor(workers) as pool:
            make = partial(make_training_sample, **options)
            training = list(pool.map(make, range(scenes), chunksize=100))
            make = partial(make_eval_sample, **options)
            questions = chain(*pool.map(make, range(eval_scenes), chunksize=50))
        files = {
            "text": text_records("text", text, seed),
            "captions": [caption for caption, _ in training],
            "chats": [chat for _, chat in training] + text_records("told", scenes // 12, seed),
        }
        for name, records in files.items():
            (folder / f"{name}.json").write_text(json.dumps(records))
        lines = [json.dumps(question) + "\n" for question in questions]
        (folder / "questions.jsonl").write_text("".join(lines))
        write_example(folder, seed)
        os.rename(folder, out)  # only a complete folder gets the name
    cli.print_status(
        f"{out}: {scenes} training fridges, {text} conversations without images, "
        f"{eval_scenes} held-out fridges with questions"
    )


def text_records(name, count, seed):
    """Returns LLaVA records of conversations without images."""
    records = []
    for i in range(count):
        turns = text_conversation(random.Random(f"{seed}-{name}-{i}"))
        records.append({"id": f"{name}-{i:05d}", "conversations": turns})
    return records


def write_example(out, seed):
    """Write fridge.jpg, a held-out fridge with 6 foods and no empty shelf, and fridge.txt."""
    rng, scene = random.Random(f"{seed}-demo"), {}
    while len(foods(scene)) != 6 or not all(foods(scene, shelf) for shelf in SHELVES):
        scene = random_scene(rng, True)
    save_scene(scene, rng, out / "fridge.jpg")
    (out / "fridge.txt").write_text(describe_scene(scene) + "\n")
