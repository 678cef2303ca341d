"""The demonstration's data: equal for each seed, with right answers; no training fridge is in the
evaluation."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanovlm.data.turns import check_turns, read_turns
from nanovlm.demo import fridge


def write(folder, **settings):
    """Returns {path: content} of the files that write_fridges makes."""
    defaults = {"scenes": 24, "text": 30, "eval_scenes": 7, "seed": 5, "workers": 2}
    fridge.write_fridges(out=folder, **defaults | settings)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fridge")
    return folder, write(folder)


def test_a_seed_gives_the_same_files_for_any_number_of_workers(dataset, tmp_path):
    _, files = dataset
    assert write(tmp_path / "one", workers=1) == files
    assert write(tmp_path / "other", seed=6)["chats.json"] != files["chats.json"]


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(scene, rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(fridge, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "deep" / "fridge", scenes=0, eval_scenes=0)
    assert not any((tmp_path / "deep").iterdir())


def test_the_same_number_gives_the_same_fridge_in_a_larger_dataset(dataset, tmp_path):
    _, files = dataset
    larger = write(tmp_path / "larger", scenes=30, eval_scenes=9)
    images = [name for name in files if name.startswith("images/")]
    assert all(larger[name] == files[name] for name in images)


def test_evaluation_shares_no_content_with_training():
    """Content is the foods of each shelf in order; a hash of it decides."""

    def content(seed, held_out):
        scene = fridge.random_scene(random.Random(seed), held_out)
        return str([fridge.foods(scene, shelf) for shelf in fridge.SHELVES])

    training = {content(seed, False) for seed in range(400)}
    evaluation = {content(seed, True) for seed in range(400)}
    assert not training & evaluation and min(len(training), len(evaluation)) > 300
    for seed in range(40):
        scene = fridge.random_scene(random.Random(seed), True)
        removed = fridge.remove_random_food(random.Random(seed), scene, True)
        assert removed is None or fridge.is_held_out(removed[0])


def test_conversations_are_in_llavas_format_and_their_images_exist(dataset):
    folder, files = dataset
    image_counts = Counter()
    for name in ("text", "captions", "chats"):
        for record in json.loads(files[f"{name}.json"]):
            paths = record.get("image", [])
            paths = [paths] if isinstance(paths, str) else paths
            check_turns(read_turns(record, name), len(paths), name)
            image_counts[name, len(paths)] += 1
            for path in paths:
                with Image.open(folder / "images" / path) as image:
                    assert image.format == "JPEG" and image.size == (fridge.SIDE, fridge.SIDE)
    assert image_counts["text", 0] == 30 and image_counts["captions", 1] == 24
    assert all(image_counts["chats", count] >= 2 for count in (0, 1, 2))


SCENE = {
    "top": ("apple", None, "milk"),
    "middle": (None, None, None),
    "bottom": ("egg", "cake", "egg"),
    "drawer": (None, "juice", None),
}


@pytest.mark.parametrize(
    "make_question, answers",
    [
        (
            fridge.reading_question,
            {"*": "top apple milk, middle nothing, bottom egg cake egg, drawer juice"},
        ),
        (
            fridge.upward_question,
            {"*": "drawer juice, bottom egg cake egg, middle nothing, top apple milk"},
        ),
        (
            fridge.inventory_question,
            {
                "*": "apple top, milk top, egg bottom bottom, cheese nowhere, carrot nowhere, "
                "broccoli nowhere, grapes nowhere, juice drawer, fish nowhere, cake bottom"
            },
        ),
        (
            fridge.shelf_question,
            {
                "What is on the top shelf?": "apple and milk",
                "What is on the middle shelf?": "nothing",
                "What is on the bottom shelf?": "egg, cake and egg",
                "What is in the drawer?": "juice",
            },
        ),
        (
            fridge.where_question,
            {
                "Where is the apple?": "apple top",
                "Where is the milk?": "milk top",
                "Where is the juice?": "juice drawer",
                "Where is the cake?": "cake bottom",
            },
        ),  # there are two eggs, so there is no question about the egg
        (
            fridge.next_question,
            {
                "What is next to the apple?": "apple top beside milk",
                "What is next to the milk?": "milk top beside apple",
                "What is next to the juice?": "juice drawer beside nothing",
                "What is next to the cake?": "cake bottom beside egg and egg",
            },
        ),
        (
            fridge.recipe_question,
            {
                "What is missing for an omelette?": "cheese",
                "What is missing for a fruit salad?": "grapes",
                "What is missing for a fish supper?": "fish, carrot and broccoli",
                "What is missing for a tea party?": "grapes",
            },
        ),
    ],
)
def test_answers_are_those_worked_out_by_hand(make_question, answers):
    pairs = dict(make_question(random.Random(i), SCENE) for i in range(60))
    assert set(pairs.values()) == {answers["*"]} if "*" in answers else pairs == answers


def test_counts_and_presence_are_those_worked_out_by_hand():
    counts = dict(fridge.count_question(random.Random(i), SCENE) for i in range(90))
    assert counts["How many eggs are there?"] == "two"
    assert counts["How many slices of cake are there?"] == "one"
    assert counts["How many fish are there?"] == "none"
    pairs = [fridge.exists_question(random.Random(i), SCENE) for i in range(90)]
    present = {question.split()[-1].strip("?") for question, answer in pairs if answer == "yes"}
    absent = {question.split()[-1].strip("?") for question, answer in pairs if answer == "no"}
    assert present == {"apple", "milk", "egg", "cake", "juice"} and not present & absent


def test_the_food_that_was_taken_is_what_the_second_fridge_lacks():
    attempts = [fridge.remove_random_food(random.Random(3), SCENE, part) for part in (False, True)]
    rest, food = next(filter(None, attempts))
    assert Counter(fridge.foods(SCENE)) - Counter(fridge.foods(rest)) == Counter([food])
    answers = dict(fridge.taken_questions(SCENE, rest, food))
    assert answers["What was taken out?"] == food
    assert answers["Where was it?"].split()[0] == food
    assert answers["What is left?"] == fridge.describe_scene(rest)


def test_a_grid_description_has_a_word_for_each_square():
    assert (
        fridge.grid_description(SCENE)
        == " top apple . milk middle . . . bottom egg cake egg drawer . juice ."
    )


def test_a_food_changes_the_image_in_its_own_square_most():
    """Drawn with the same seed, with and without the food."""
    empty = {shelf: (None,) * 3 for shelf in fridge.SHELVES}
    for row, shelf in enumerate(fridge.SHELVES):
        for column in range(3):
            slots = [None] * 3
            slots[column] = "apple"
            difference = np.abs(pixels(empty | {shelf: slots}, 0) - pixels(empty, 0)).sum(-1)
            per_square = difference.reshape(4, fridge.SQUARE, 4, fridge.SQUARE).sum((1, 3))
            assert np.unravel_index(per_square.argmax(), (4, 4)) == (row, column + 1)


def test_two_drawings_of_a_scene_differ():
    drawings = [pixels(SCENE, seed) for seed in range(4)]
    for a, b in itertools.combinations(drawings, 2):
        assert np.abs(a - b).mean() > 3


def pixels(scene, seed):
    return np.asarray(fridge.draw_scene(scene, random.Random(seed))).astype(int)
