"""The demonstration's data: the same for everybody, right answers, and no training fridge in the evaluation."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanovlm.data import chat_template
from nanovlm.demo import fridge


def write(folder, **how):
    fridge.write_fridges(
        out=folder, **{"scenes": 24, "text": 30, "eval_scenes": 7, "seed": 5, "workers": 2} | how
    )
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fridge")
    return folder, write(folder)


def test_a_seed_draws_one_world_whatever_the_number_of_workers(world, tmp_path):
    _, files = world
    assert write(tmp_path / "one", workers=1) == files
    assert write(tmp_path / "other", seed=6)["chats.json"] != files["chats.json"]


def test_a_world_that_is_not_whole_leaves_nothing_behind(tmp_path, monkeypatch):
    def stopped(scene, rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(fridge, "draw_scene", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "deep" / "fridge", scenes=0, eval_scenes=0)
    assert not any((tmp_path / "deep").iterdir())


def test_the_same_number_gives_the_same_fridge_in_a_larger_world(world, tmp_path):
    _, files = world
    larger = write(tmp_path / "larger", scenes=30, eval_scenes=9)
    assert all(
        larger[name] == content for name, content in files.items() if name.startswith("images/")
    )


def test_evaluation_shares_no_content_with_training():
    """What stands on which shelf in which order, gaps aside: the hash decides, so no pair of scenes need ever be compared."""

    def composition(seed, held_out):
        scene = fridge.random_scene(random.Random(seed), held_out)
        return str([fridge.foods(scene, place) for place in fridge.SHELVES])

    trained, examined = (
        {composition(seed, held_out) for seed in range(400)} for held_out in (False, True)
    )
    assert not trained & examined and min(len(trained), len(examined)) > 300
    pairs = filter(
        None,
        (
            fridge.remove_random_food(
                random.Random(seed), fridge.random_scene(random.Random(seed), True), True
            )
            for seed in range(40)
        ),
    )
    assert all(fridge.is_held_out(rest) for rest, _ in pairs)


def test_conversations_are_llavas_and_name_pictures_that_exist(world):
    folder, files = world
    pictures = Counter()
    for name in ("text", "captions", "chats"):
        for record in json.loads(files[f"{name}.json"]):
            paths = record.get("image", [])
            paths = [paths] if isinstance(paths, str) else paths
            chat_template.check_turns(chat_template.read_turns(record, name), len(paths), name)
            pictures[name, len(paths)] += 1
            for path in paths:
                with Image.open(folder / "images" / path) as picture:
                    assert picture.format == "JPEG" and picture.size == (fridge.SIDE, fridge.SIDE)
    assert pictures["text", 0] == 30 and pictures["captions", 1] == 24
    assert all(pictures["chats", count] >= 2 for count in (0, 1, 2)), (
        "text alone, one picture, two pictures"
    )


SCENE = {
    "top": ("apple", None, "milk"),
    "middle": (None, None, None),
    "bottom": ("egg", "cake", "egg"),
    "drawer": (None, "juice", None),
}


@pytest.mark.parametrize(
    "ask, answers",
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
                "*": "apple top, milk top, egg bottom bottom, cheese nowhere, carrot nowhere, broccoli nowhere, grapes nowhere, "
                "juice drawer, fish nowhere, cake bottom"
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
        ),  # there are two eggs: nobody asks where *the* egg is
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
def test_answers_worked_out_by_hand(ask, answers):
    pairs = dict(ask(random.Random(i), SCENE) for i in range(60))
    assert set(pairs.values()) == {answers["*"]} if "*" in answers else pairs == answers


def test_counts_and_presence_worked_out_by_hand():
    counted = dict(fridge.count_question(random.Random(i), SCENE) for i in range(90))
    assert (
        counted["How many eggs are there?"] == "two"
        and counted["How many slices of cake are there?"] == "one"
    )
    assert counted["How many fish are there?"] == "none"
    present = {
        question.split()[-1]: answer
        for question, answer in (fridge.exists_question(random.Random(i), SCENE) for i in range(90))
    }
    assert {food.strip("?") for food, answer in present.items() if answer == "yes"} == {
        "apple",
        "milk",
        "egg",
        "cake",
        "juice",
    }


def test_what_was_taken_is_what_the_second_fridge_lacks():
    rest, food = next(
        filter(
            None,
            (fridge.remove_random_food(random.Random(3), SCENE, part) for part in (False, True)),
        )
    )
    assert Counter(fridge.foods(SCENE)) - Counter(fridge.foods(rest)) == Counter([food])
    asked = dict(fridge.taken_questions(SCENE, rest, food))
    assert (
        asked["What was taken out?"] == food
        and asked["Where was it?"].split()[0] == food
        and asked["What is left?"] == fridge.describe_scene(rest)
    )


def test_a_grid_description_has_a_word_for_each_square():
    assert (
        fridge.grid_description(SCENE)
        == " top apple . milk middle . . . bottom egg cake egg drawer . juice ."
    )


def test_a_food_changes_the_image_in_its_own_square_most():
    """The same chance with and without a food: what differs lies where the food stands."""
    empty = {place: (None,) * 3 for place in fridge.SHELVES}
    for row, place in enumerate(fridge.SHELVES):
        for column in range(3):
            scene = empty | {place: tuple("apple" if i == column else None for i in range(3))}
            one, other = (
                np.asarray(fridge.draw_scene(s, random.Random(0))).astype(int)
                for s in (scene, empty)
            )
            differs = (
                np.abs(one - other).sum(-1).reshape(4, fridge.SQUARE, 4, fridge.SQUARE).sum((1, 3))
            )
            assert np.unravel_index(differs.argmax(), (4, 4)) == (row, column + 1)


def test_no_two_drawings_of_a_scene_are_alike():
    drawings = [
        np.asarray(fridge.draw_scene(SCENE, random.Random(i))).astype(int) for i in range(4)
    ]
    assert min(np.abs(a - b).mean() for i, a in enumerate(drawings) for b in drawings[:i]) > 3
