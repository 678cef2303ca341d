"""Every kind of source gives the same samples, and a record that cannot be used never stops the
others."""

import base64
import collections
import copy
import gc
import io
import json
import math
import os
import pickle
import random
import re
import sys
import tarfile
import unicodedata
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pyarrow
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from nanovlm import UserError
from nanovlm.data import dataset, image_refs
from nanovlm.data.turns import LETTER_PROMPT, SHORT_PROMPT
from nanovlm.preprocess import readers, records


def jpeg(seed):
    file = io.BytesIO()
    Image.new("RGB", (5 + seed, 7), (seed, 90, 20)).save(file, "JPEG")
    return file.getvalue()


IMAGES = {f"{seed}.jpg": jpeg(seed) for seed in range(4)}


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


COLLECTION = [
    {
        "id": "one",
        "image": "0.jpg",
        "conversations": talk("<image>\nWhat is it?", "An egg.", "And its color?", "White."),
    },
    {
        "id": "two",
        "images": ["1.jpg", "2.jpg"],
        "conversations": talk("First <image> then <image>: what is new?", "Milk."),
    },
    {"id": 3, "conversations": talk("Hello", "Hello you")},
    {
        "id": "four",
        "conversations": [{"from": "system", "value": "Be brief."}, *talk("Why?", "So.")],
    },
    {
        "id": "five",
        "image": "3.jpg",
        "question": "How many?",
        "answers": ["two", "2"],
        "answer_weights": [3.0, 0.0],
    },
    {
        "id": "six",
        "image": "3.jpg",
        "question": "Which?",
        "choices": ["egg", "milk"],
        "correct_choice_idx": 1,
    },
    {"id": "seven", "image": "0.jpg", "caption": "A carrot."},
    {
        "id": "eight",
        "image": "0.jpg",
        "texts": [
            {"user": "What?", "assistant": "A carrot."},
            {"user": "Sure?", "assistant": "Yes."},
        ],
    },
]


@pytest.fixture
def folder(tmp_path):
    for name, content in IMAGES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def put(path, content):
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def as_json(folder):
    return put(folder / "list.data", COLLECTION)


def as_lines(folder):
    return put(folder / "lines.data", "\n\n".join(map(json.dumps, COLLECTION)))


def named(record):
    value = record.get("image", record.get("images", []))
    return [value] if isinstance(value, str) else value


def without_images(record):
    return {name: value for name, value in record.items() if name not in ("image", "images")}


def as_tar(folder):
    with webdataset.TarWriter(str(folder / "tar.data")) as tar:
        for record in COLLECTION:
            images = {f"{i}.jpg": IMAGES[name] for i, name in enumerate(named(record))}
            tar.write({"__key__": str(record["id"]), **images, "json": without_images(record)})
    return str(folder / "tar.data")


def as_parquet(folder):
    """In columns, as Hugging Face datasets stores them: an image is a struct of bytes and path, a
    missing field is None."""
    fields = [
        "id",
        "images",
        "conversations",
        "question",
        "answers",
        "answer_weights",
        "choices",
        "correct_choice_idx",
        "caption",
        "texts",
    ]
    rows = [
        without_images(record)
        | {
            "id": str(record["id"]),
            "images": [{"bytes": IMAGES[name], "path": name} for name in named(record)],
        }
        for record in COLLECTION
    ]
    table = pyarrow.Table.from_pylist([{field: row.get(field) for field in fields} for row in rows])
    parquet.write_table(table, folder / "parquet.data", row_group_size=3)
    return str(folder / "parquet.data")


def shown(raws, images="", **options):
    """[(id, turns, bytes of the images)], or the reason if a record cannot be used. Every RawRecord
    and Sample is pickled once, as on its way to a worker."""
    found = []
    for raw in raws:
        raw = pickle.loads(pickle.dumps(raw))
        try:
            sample = pickle.loads(pickle.dumps(readers.make_sample(raw, images, **options)))
            found.append(
                (
                    sample.name,
                    sample.turns,
                    [readers.load_image_bytes(ref)[0] for ref in sample.images],
                )
            )
        except UserError as error:
            assert error.reason and "\n" not in str(error), error
            found.append(error.reason)
    return found


def reasons(raws, images="", **options):
    return [found for found in shown(raws, images, **options) if isinstance(found, str)]


def errors(source, images=""):
    """The messages of all records of a source that cannot be used."""
    found = []
    for raw in readers.read_records([source], images):
        try:
            for ref in readers.make_sample(raw, images).images:
                readers.load_image_bytes(ref)
        except UserError as error:
            found.append(str(error))
    return found


# ---- one collection in every format ----


@pytest.mark.parametrize("keep", [as_json, as_lines, as_tar, as_parquet])
def test_a_collection_is_the_same_in_every_format(folder, keep):
    """The names do not help: the first bytes of a file show its format."""
    found = shown(readers.read_records([keep(folder)]))
    assert [name for name, _, _ in found] == [str(record["id"]) for record in COLLECTION]
    assert [images for _, _, images in found] == [
        [IMAGES[name] for name in named(record)] for record in COLLECTION
    ]
    turns = {name: turns for name, turns, _ in found}
    for record in COLLECTION[:4]:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        assert turns[str(record["id"])] == [
            (roles[turn["from"]], turn["value"]) for turn in record["conversations"]
        ]
    assert turns["five"] == [("user", f"<image>\nHow many?\n{SHORT_PROMPT}"), ("assistant", "two")]
    assert turns["six"] == [
        ("user", f"<image>\nWhich?\nA. egg\nB. milk\n{LETTER_PROMPT}"),
        ("assistant", "B"),
    ]
    assert turns["seven"][0][1].removeprefix("<image>\n") in records.CAPTION_PROMPTS and turns[
        "seven"
    ][1] == ("assistant", "A carrot.")
    assert turns["eight"] == [
        ("user", "<image>\nWhat?"),
        ("assistant", "A carrot."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]


def test_sources_come_in_the_order_given_and_the_files_of_a_folder_by_their_names(folder):
    (shards := folder / "shards").mkdir()
    for number in (10, 2, 1):
        with webdataset.TarWriter(str(shards / f"{number:02d}.tar")) as tar:
            tar.write({"__key__": f"{number}", "jpg": IMAGES["0.jpg"], "txt": "An egg."})
    put(shards / "notes.md", "not a shard")
    for path in (str(shards), str(shards / "*.tar")):
        found = [
            readers.make_sample(raw).name
            for raw in readers.read_records([as_lines(folder), path, as_json(folder)])
        ]
        assert found == [
            *(ids := [str(record["id"]) for record in COLLECTION]),
            "1",
            "2",
            "10",
            *ids,
        ]


def test_images_in_a_zip_are_those_in_a_folder(folder):
    (folder / "elsewhere").mkdir()
    source = put(
        folder / "elsewhere" / "a.json", [{**COLLECTION[0], "image": "./0.jpg"}, *COLLECTION[1:]]
    )
    with zipfile.ZipFile(folder / "images", "w", zipfile.ZIP_DEFLATED) as pack:
        for name in IMAGES:
            pack.write(folder / name, name)
    zipped = str(folder / "images")
    assert shown(readers.read_records([source], str(folder)), str(folder)) == shown(
        readers.read_records([source], zipped), zipped
    )
    # each process has its own position in the file
    assert image_refs.open_zip(zipped, 1) is not image_refs.open_zip(zipped, 2)


def test_an_absolute_path_must_lead_into_the_folder_of_the_images(folder):
    record = {"id": 1, "image": str(folder / "0.jpg"), "caption": "An egg."}
    assert reasons(readers.read_records([put(folder / "a.json", [record])])) == []
    (folder / "empty").mkdir()
    elsewhere = put(folder / "empty" / "a.json", [record])
    for images, expected in (
        ("", ["path climbs out"]),
        (str(folder / "empty"), ["path climbs out"]),
        (str(folder), []),
        ("/", []),
    ):
        assert reasons(readers.read_records([elsewhere], images), images) == expected
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        tar.write({"__key__": "1", "json": record})
        tar.write({"__key__": "2", "json": {**record, "image": "0.jpg"}})
    assert reasons(readers.read_records([str(folder / "a.tar")])) == ["image missing"] * 2
    assert reasons(readers.read_records([str(folder / "a.tar")]), str(folder)) == []
    images = str(folder / "empty")
    assert reasons(readers.read_records([str(folder / "a.tar")]), images) == [
        "path climbs out",
        "image missing",
    ]


@pytest.mark.parametrize("name", ["../0.jpg", "{}/0.jpg", "link.jpg", "linked/0.jpg"])
@pytest.mark.parametrize("kind", ["folder", "beside", "zip"])
def test_an_image_outside_is_read_only_if_it_is_allowed(folder, name, kind):
    """By `..`, by an absolute path, or by a link in the folder of the images."""
    (inner := folder / "inner").mkdir()
    (inner / "link.jpg").symlink_to(folder / "0.jpg")
    (inner / "linked").symlink_to(folder)
    (inner / "1.jpg").write_bytes(IMAGES["1.jpg"])
    rows = [{"image": path, "caption": "x"} for path in (name.format(folder), "1.jpg")]
    source, images = put(inner / "a.json", rows), {"folder": str(inner), "beside": ""}.get(kind)
    if kind == "zip":
        images = zip_of(folder / "inner" / "a.zip", {"1.jpg": IMAGES["1.jpg"]})
        name = name.replace("../", "../../")  # of the zip
        source = put(inner / "a.json", [rows[0] | {"image": name.format(folder)}, rows[1]])
    raws = list(readers.read_records([source], images))
    is_member = kind == "zip" and "link" in name  # which this zip does not have
    reason = "image missing" if is_member else "path climbs out"
    assert reasons(raws, images) == [reason]
    assert is_member or "give --allow_outside_images=true" in errors(source, images)[0]
    if not is_member:
        allowed = shown(raws, images, allow_outside=True)
        assert [sample[2] for sample in allowed] == [[IMAGES["0.jpg"]], [IMAGES["1.jpg"]]]


def test_links_are_followed_as_long_as_they_stay_inside(folder):
    """--images itself may be a link, and an absolute path may name its target."""
    (folder / "deep").mkdir()
    (folder / "deep" / "in.jpg").symlink_to("../0.jpg")
    (folder / "moved").symlink_to(folder)
    for name in ("deep/in.jpg", "moved/deep/in.jpg", f"{folder}/moved/0.jpg", f"{folder}/0.jpg"):
        source = put(folder / "a.json", [{"image": name, "caption": "x"}])
        for images in ("", str(folder), str(folder / "moved")):
            assert shown(readers.read_records([source], images), images)[0][2] == [IMAGES["0.jpg"]]


def test_an_id_is_a_text_or_a_number_and_without_one_it_is_the_place(folder):
    records = [COLLECTION[2] | {"id": name} for name in ("a b", 7, 1.5, None)] + [
        {"question": "Why?", "answer": "So.", "question_id": 262148000}
    ]
    source = put(folder / "a.json", records)
    samples = [readers.make_sample(raw) for raw in readers.read_records([source])]
    assert [sample.name for sample in samples] == ["a b", "7", "1.5", "a.json:4", "262148000"]
    odd = [
        5,
        {"id": ["a"], "caption": "x"},
        {"id": "a\nb", "caption": "x"},
        {"id": "\ud800", "caption": "x"},
    ]
    listed = [
        readers.record_id(raw)
        for raw in readers.read_records([put(folder / "odd.json", [records[0], *odd])])
    ]
    # a record that cannot be used has an id, too
    assert listed == ["a b", "odd.json:2", ["a"], "a\nb", "\ud800"]
    assert [sample.where for sample in samples][2:4] == [
        f"{source}, sample 3",
        f"{source}, sample 4",
    ]


# ---- kinds of records ----


ANSWER = {"role": "assistant", "content": "An egg."}


def turns_of(record, images=0, name="x"):
    refs = [image_refs.ImageBytes("an image", b"")] * images
    return readers.parse_conversation(readers.RawRecord("here", name, record, refs))[1]


def test_openai_parts_become_text_with_the_images_in_place():
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "image"},
        {"type": "text", "text": "with"},
        {"type": "image_url", "image_url": {"url": "b"}},
    ]
    messages = [
        {"role": "system", "content": parts[:1]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Done."},
    ]
    both = {"conversations": [], "messages": messages}
    assert turns_of(both, 2) == turns_of({"messages": messages}, 2)
    assert turns_of({"messages": messages}, 2) == [
        ("system", "Compare"),
        ("user", "Compare\n<image>\nwith\n<image>"),
        ("assistant", "Done."),
    ]
    for part in ({"type": "video"}, {"type": "text"}, {"type": "text", "text": 5}, "words", None):
        with pytest.raises(UserError, match="a turn needs a text and a role"):
            turns_of(
                {
                    "messages": [
                        {"role": "user", "content": [part]},
                        {"role": "assistant", "content": "Done."},
                    ]
                }
            )


def preprocess_multimodal(sources, data_args):
    """LLaVA's llava/train/train.py, literally."""
    is_multimodal = data_args.is_multimodal
    if not is_multimodal:
        return sources

    for source in sources:
        for sentence in source:
            if DEFAULT_IMAGE_TOKEN in sentence["value"]:
                sentence["value"] = sentence["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
                sentence["value"] = DEFAULT_IMAGE_TOKEN + "\n" + sentence["value"]
                sentence["value"] = sentence["value"].strip()
                if "mmtag" in conversation_lib.default_conversation.version:
                    sentence["value"] = sentence["value"].replace(
                        DEFAULT_IMAGE_TOKEN, "<Image>" + DEFAULT_IMAGE_TOKEN + "</Image>"
                    )
            replace_token = DEFAULT_IMAGE_TOKEN
            if data_args.mm_use_im_start_end:
                replace_token = DEFAULT_IM_START_TOKEN + replace_token + DEFAULT_IM_END_TOKEN
            sentence["value"] = sentence["value"].replace(DEFAULT_IMAGE_TOKEN, replace_token)

    return sources


# its surroundings: llava/constants.py, and the values of LLaVA-1.5
DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN = [
    "<image>",
    "<im_start>",
    "<im_end>",
]
conversation_lib = SimpleNamespace(default_conversation=SimpleNamespace(version="v1"))
DATA_ARGS = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)


@pytest.mark.parametrize(
    "texts, is_moved",
    [
        (["What?\n<image>", "An egg."], True),
        (["What <image> is it? ", "An egg."], True),
        (["<image>\nWhat?", "An egg."], False),
        (["\n <image>What? ", "An egg.", "And now? ", "Milk."], False),
        (["Hello", "Hello", "What is it?<image>", "An egg."], True),
        (["<image>\nWrite a tag.", "An egg."], False),
    ],
)
def test_an_image_is_in_front_of_its_question_as_llava_trains_it(folder, texts, is_moved):
    record = {"id": 1, "image": "0.jpg", "conversations": talk(*texts)}
    (theirs,) = preprocess_multimodal([copy.deepcopy(record["conversations"])], DATA_ARGS)
    (raw,) = readers.read_records([put(folder / "a.json", [record])])
    sample = readers.make_sample(raw)
    assert [text for _, text in sample.turns] == [turn["value"] for turn in theirs]
    moved = ["<image> moved to the front of its turn, as LLaVA does"] * is_moved
    assert sample.counted == moved


def test_an_image_stays_where_other_formats_and_several_images_have_it(folder):
    last = [{"type": "text", "text": "What?"}, {"type": "image"}]
    for record in (
        {"image": ["0.jpg", "1.jpg"], "conversations": talk("What <image>, <image>?", "Eggs.")},
        {"image": "0.jpg", "messages": [{"role": "user", "content": "What? <image>"}, ANSWER]},
        {"image": "0.jpg", "conversations": [{"role": "user", "content": last}, ANSWER]},
        {"image": "0.jpg", "question": "What is in <image>?", "answer": "An egg."},
    ):
        (raw,) = readers.read_records([put(folder / "a.json", [record])])
        sample = readers.make_sample(raw)
        assert sample.counted == [] and sample.turns[0][1].startswith("What")


def test_the_place_of_an_image_in_a_conversation_is_never_guessed():
    with pytest.raises(UserError, match="0 <image> in its text but 1 images"):
        turns_of({"conversations": talk("What is it?", "An egg.")}, 1)
    with pytest.raises(UserError, match="1 <image> in its text but 2 images"):
        turns_of({"question": "What is in <image>?", "answer": "An egg."}, 2)
    assert turns_of({"question": "What is in <image>?", "answer": "An egg."}, 1)[0][1].startswith(
        "What is in <image>?\n"
    )


def test_an_answer_is_drawn_by_its_weight_and_always_the_same():
    """Over many ids its share is its weight, within five standard deviations of a binomial."""
    record, weights = (
        {
            "context": "How many?",
            "answers": ["one", "two", "none", "many"],
            "weights": [1, 0.5, 0, 2.5],
        },
        [1 / 4, 1 / 8, 0, 5 / 8],
    )
    drawn = [turns_of(record, name=str(name))[1][1] for name in range(4000)]
    assert drawn == [turns_of(record, name=str(name))[1][1] for name in range(4000)]
    for answer, share in zip(record["answers"], weights, strict=True):
        assert abs(drawn.count(answer) - 4000 * share) <= 5 * math.sqrt(4000 * share * (1 - share))
    people = {
        "question": "How many?",
        "answers": [{"answer": "two", "answer_id": i} for i in range(10)],
    }
    assert (
        turns_of(people)[1]
        == ("assistant", "two")
        == turns_of({"question": "How many?", "answer": "two"})[1]
    )
    assert turns_of({"question": "How many?", "answers": [2]})[1] == ("assistant", "2")


def test_a_choice_is_its_letter_whether_its_index_or_its_letter_is_given():
    record = {"question": "Which?", "options": ["egg", "milk", 7]}
    for right in ({"correct_choice_idx": 2}, {"correct": "C"}, {"answer": " c "}):
        assert turns_of(record | right) == [
            ("user", f"Which?\nA. egg\nB. milk\nC. 7\n{LETTER_PROMPT}"),
            ("assistant", "C"),
        ]
    # an open question among others with choices
    open_question = {"question": "How?", "choices": [], "answer": "Well."}
    assert turns_of(open_question)[1] == ("assistant", "Well.")


def test_the_prompt_of_a_caption_is_one_of_llavas_eleven_by_the_id_alone():
    """Each as often as the others, among validation samples, too: their hash is another one."""
    names = [str(name) for name in range(20_000)]
    prompts = {name: turns_of({"caption": "An egg."}, 1, name)[0][1] for name in names}
    for chosen in (names, [name for name in names if dataset.is_validation(name)]):
        counts = collections.Counter(prompts[name] for name in chosen)
        assert set(counts) == {f"<image>\n{prompt}" for prompt in records.CAPTION_PROMPTS}
        assert len(counts) == 11
        assert max(counts.values()) - min(counts.values()) < 10 * math.sqrt(len(chosen) / 11)
    paired = [
        turns_of({"caption": list(records.CAPTION_PROMPTS)}, 1, name) for name in names[:1000]
    ]
    # 91 on average: which of several captions is chosen is another draw
    assert 50 < sum(prompt.endswith(answer) for (_, prompt), (_, answer) in paired) < 150
    assert turns_of({"text": ["An egg."]}, 2)[0][1].startswith("<image>\n<image>\n")
    with pytest.raises(UserError, match="a caption, but no image"):
        turns_of({"caption": "An egg."})


# ---- what the fields of published formats mean ----

# (a record, the fields that nothing is made from; or why it cannot be used)
PUBLISHED = {
    "LLaVA-1.5": ({"id": 1, "image": "0.jpg", "conversations": talk("<image>?", "x")}, []),
    "LLaVA-1.5, text": ({"id": 1, "model": "", "conversations": talk("Why?", "So.")}, []),
    "ShareGPT, LLaMA-Factory": (
        {"conversations": talk("Why?", "So."), "system": "Be brief.", "tools": "[{}]"},
        ["tools"],
    ),
    "OpenOrca": ({"system_prompt": "x", "question": "Why?", "response": "So."}, "no known kind"),
    "the_cauldron": (
        {"image": "0.jpg", "texts": [{"user": "a", "assistant": "b", "source": "x"}]},
        [],
    ),
    "A-OKVQA": (
        {
            "image": "0.jpg",
            "question_id": "x",
            "question": "Which?",
            "choices": ["a", "b"],
            "correct_choice_idx": 1,
            "direct_answers": "['b']",
            "rationales": ["Since."],
        },
        ["direct_answers", "rationales"],
    ),
    "ScienceQA": (
        {
            "image": None,
            "question": "Which?",
            "choices": ["a", "b"],
            "answer": 1,
            "hint": "Look.",
            "lecture": "",
            "solution": "Since.",
        },
        ["solution"],
    ),
    "SQuAD": ({"context": "He is four.", "question": "How old?", "answers": ["four"]}, []),
    "VQAv2": (
        {"image_id": 42, "question": "What?", "question_id": 420, "answers": [{"answer": "x"}]},
        "image in an unknown field",
    ),
    "Hateful Memes": ({"id": 1, "img": "0.jpg", "label": 0, "text": "x"}, "image in an unknown"),
    "COCO": ({"id": 1, "file_name": "0.jpg", "caption": "x"}, "image in an unknown field"),
    "Ollama": (
        {
            "messages": [
                {"role": "user", "content": "x?", "images": ["iVBORw0KGgo="]},
                {"role": "assistant", "content": "y"},
            ]
        },
        "image in an unknown field",
    ),
    "LLaVA's questions": (
        {"question_id": 0, "image": "0.jpg", "text": "Is it?", "category": "x"},
        "question of an evaluation",
    ),
    "POPE": (
        {"question_id": 1, "image": "0.jpg", "text": "Is it?", "label": "yes"},
        "question of an evaluation",
    ),
    "img2dataset": ({"caption": "x", "image": "0.jpg", "url": "http://x/y.jpg"}, ["url"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_field_of_a_published_format_is_used_counted_or_refused(folder, name):
    record, expected = PUBLISHED[name]
    raws = list(readers.read_records([put(folder / "a.json", [COLLECTION[2], record])]))
    if isinstance(expected, str):
        assert reasons(raws)[0].startswith(expected)
    else:
        unused = [f"an unused `{field}`" for field in expected]
        assert sorted(readers.make_sample(raws[1]).counted) == unused


@pytest.mark.parametrize(
    "field, value, is_image",
    [
        ("img", "a", True),
        ("image_path", "a", True),
        ("image_id", 7, True),
        ("Image", "a", True),
        ("IMAGES", ["a"], True),
        ("picture", "a", True),
        ("photo_url", "http://x", True),
        ("file", "deep/a.JPG", True),
        ("files", ["a.png", "b.webp"], True),
        ("data", b"\xff", True),
        ("data", {"bytes": b"'", "path": None}, True),
        ("pic", "a", True),
        ("topic", "a", False),  # ScienceQA
        ("has_image", False, False),
        ("img", None, False),
        ("img", float("nan"), False),
        ("source", "a page about x.jpg and more", False),
        ("time", 7, False),
    ],
)
def test_an_image_in_an_unknown_field_is_refused_not_trained_blind(field, value, is_image):
    for record in (QUESTION, {"conversations": talk("Why?", "So.")}, {"caption": "x"}):
        if is_image:
            with pytest.raises(UserError, match=re.escape(f"it has no image, but '{field}': ")):
                turns_of(record | {field: value})
        elif "caption" not in record:
            assert turns_of(record | {field: value}) == turns_of(record)
    # beside an image that is used it is only counted
    assert turns_of({"caption": "x", field: value}, 1) == turns_of({"caption": "x"}, 1)


def test_a_system_beside_a_conversation_is_its_first_turn():
    for record in (
        {"conversations": talk("Why?", "So.")},
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        {"texts": [{"user": "Why?", "assistant": "So."}]},
    ):
        plain = [("user", "Why?"), ("assistant", "So.")]
        assert turns_of(record | {"system": "Be brief."}) == [("system", "Be brief."), *plain]
        for empty in ("", None, float("nan"), []):
            assert turns_of(record | {"system": empty}) == plain
    for system in (7, ["x"]):
        with pytest.raises(UserError, match="a turn needs a text"):
            turns_of({"conversations": talk("Why?", "So."), "system": system})
    for turns in (5, "text", {"a": 1}):
        with pytest.raises(UserError, match="is a list of turns"):
            turns_of({"conversations": turns, "system": "Be brief."})
    with pytest.raises(UserError, match="not system, system, user, assistant"):
        first = {"from": "system", "value": "Be brief."}
        turns_of({"conversations": [first, *talk("Why?", "So.")], "system": "Be brief."})


def test_context_and_hint_stand_before_the_question_as_in_llavas_mmbench():
    """llava/eval/model_vqa_mmbench.py: if not is_none(hint): question = hint + '\\n' + question"""
    record = {"question": "How old?", "answer": "four"}
    for more, text in [
        ({"hint": "He is four."}, "He is four.\nHow old?"),
        ({"context": "He is four."}, "He is four.\nHow old?"),
        ({"context": "He is four.", "hint": "Read."}, "He is four.\nRead.\nHow old?"),
        ({"context": "", "hint": None}, "How old?"),
        ({"hint": float("nan")}, "How old?"),
        ({"question": None, "context": "How old?"}, "How old?"),
    ]:
        assert turns_of(record | more)[0][1] == f"{text}\n{SHORT_PROMPT}"
        choice = {"choices": ["three", "four"], **record, **more}
        assert turns_of(choice)[0][1].startswith(f"{text}\nA. three\nB. four\n")
    with pytest.raises(UserError, match="its question is not a text"):
        turns_of(record | {"context": {"contexts": ["He is four."]}})


def test_a_number_that_is_none_is_missing_and_never_a_word(folder):
    """pandas writes NaN for None, in JSON and in parquet."""
    nan, infinite = float("nan"), float("inf")
    rows = [
        ({"image": "0.jpg", "caption": nan}, "no known kind of record"),
        ({"image": "0.jpg", "caption": [nan]}, "answer is not a text"),
        ({"question": "What?", "answer": nan}, "no known kind of record"),
        ({"question": "What?", "answer": infinite}, "answer is not a text"),
        ({"question": "What?", "answers": ["a", nan], "weights": [0, 1]}, "answer is not a text"),
        ({"question": nan, "answer": "x"}, "no known kind of record"),
        (CHOICE | {"choices": ["a", nan]}, "choice is not a text"),
        ({"texts": [{"user": "a", "assistant": nan}]}, "turn is not a text"),
    ]
    source = put(folder / "a.json", [COLLECTION[2], *(row for row, _ in rows)])
    assert reasons(readers.read_records([source])) == [reason for _, reason in rows]
    assert turns_of({"question": "What?", "answers": nan, "answer": 1.5})[1] == ("assistant", "1.5")
    columns = {"image": ["0.jpg"] * 3, "caption": [nan, nan, 4.0], "id": [nan, 1.0, 2.0]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    found = shown(readers.read_records([str(folder / "a.parquet")]), str(folder))
    assert found[:2] == ["no known kind of record"] * 2 and found[2][1][1] == ("assistant", "4.0")


def test_choices_as_ai2d_publishes_them():
    """lmms-lab/ai2d gives the index as a text; others a letter in brackets, or the choice."""
    record = {"question": "Who eats it?", "options": ["krill", "cod", "fox", "2"]}
    lines = "Who eats it?\nA. krill\nB. cod\nC. fox\nD. 2\n"
    for right in ("1", 1, "cod", "B", "b", "(B)", "B.", "b)", "B. cod", " cod "):
        prompt, answer = turns_of(record | {"answer": right})
        assert answer == ("assistant", "B") and prompt[1] == lines + LETTER_PROMPT
    # 2 is an index and a choice; a number is always an index
    assert turns_of(record | {"answer": 2})[1][1] == "C"
    for right in ("2", "Cod", "4", "E", "", "()"):
        with pytest.raises(UserError, match="must be the letter, index or text of one"):
            turns_of(record | {"answer": right})
    with pytest.raises(UserError, match=re.escape("not ['A', 'B']")):
        turns_of({"question": "?", "choices": ["yes", "yes"], "answer": "yes"})
    with pytest.raises(UserError, match=re.escape("not ['A', 'B']")):
        turns_of({"question": "Which letter?", "choices": ["B", "A"], "answer": "A"})


def test_choices_that_carry_their_letters_have_them_once():
    for form in ("{}. {}", "({}) {}", "{}) {}", "{}: {}", "{}.{}"):
        choices = [form.format(*pair) for pair in zip("ABC", ("krill", "cod", "A"), strict=True)]
        for right in ("B", 1, "cod", choices[1]):
            prompt, answer = turns_of({"question": "?", "choices": choices, "answer": right})
            assert prompt[1].startswith("?\nA. krill\nB. cod\nC. A\n") and answer[1] == "B"
    species = {"question": "?", "choices": ["A. afarensis", "H. sapiens"], "answer": 0}
    assert turns_of(species)[0][1].startswith("?\nA. A. afarensis\nB. H. sapiens\n")


# ---- WebDataset ----


def test_a_byte_order_mark_is_no_text(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "1", "jpg": b"x", "txt": b"\xef\xbb\xbfAn egg."})
        tar.write({"__key__": "2", "jpg": b"x", "json": b'\xef\xbb\xbf{"caption": "An egg."}'})
    found = shown(readers.read_records([str(tmp_path / "a.tar")]))
    assert [turns[1] for _, turns, _ in found] == [("assistant", "An egg.")] * 2


@pytest.mark.parametrize(
    "names, is_sample",
    [
        ("v1.0_a.png v1.0_b.png v1.0_c.txt", False),
        ("v1.0_a.png v1.0_c.txt", False),
        ("v1.0_a.png v1.0_a.txt v1.0_b.png", False),
        ("./v1.0_a.png ./v1.0_b.png ./v1.0_c.json", False),
        ("v1.left.png v1.right.png v1.txt", True),
        ("./x/v1.left.png ./x/v1.right.png ./x/v1.json", True),
        ("v1.0_a.png v1.0_a.txt", True),
        ("v1.png v1.caption.txt", True),
        ("v1.png v1.seg.png v1.cls v1.txt", True),
    ],
)
def test_members_share_a_key_only_if_they_mean_to(tmp_path, names, is_sample):
    """webdataset's key is a name up to its first dot, so version numbers join what lies apart."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "0")
        for name in names.split():
            content = b'{"caption": "x"}' if name.endswith(("json", "txt")) else IMAGES["0.jpg"]
            add(tar, name, content)
    expected = [] if is_sample else ["names that share a key by chance"]
    assert reasons(readers.read_records([str(tmp_path / "a.tar")])) == expected


def test_megatrons_own_shards(folder):
    """examples/multimodal/convert_llava_pretrain_to_wds.py: a jpg and LLaVA's list of turns, whose
    key is the id."""
    with webdataset.ShardWriter(str(folder / "pretrain-%d.tar"), maxcount=2, verbose=0) as shards:
        for number in range(5):
            turns = json.dumps(talk("<image>\nWhat?", f"Egg {number}")).encode()
            shards.write(
                {"__key__": f"{number:09d}", "jpg": IMAGES[f"{number % 4}.jpg"], "json": turns}
            )
    found = shown(readers.read_records([str(folder / "pretrain-*.tar")]))
    assert found == [
        (
            f"{number:09d}",
            [("user", "<image>\nWhat?"), ("assistant", f"Egg {number}")],
            [IMAGES[f"{number % 4}.jpg"]],
        )
        for number in range(5)
    ]


def test_records_of_a_tar_are_those_of_webdataset(folder):
    """Keys with folders, members that are no images, upper case, several images, metadata beside a
    caption (img2dataset)."""
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        tar.write({"__key__": "train/1", "PNG": b"p", "cls": b"7", "txt": "An egg."})
        tar.write(
            {
                "__key__": "train/2",
                "right.jpg": b"r",
                "left.jpg": b"l",
                "txt": "Two eggs.",
                "json": {"url": "http://x", "width": 5},
            }
        )
        tar.write(
            {
                "__key__": "test/1",
                "webp": b"w",
                "json": {"caption": "Milk.", "url": "http://y"},
                "txt": "not this",
            }
        )
    with open(folder / "a.tar", "rb") as stream:
        groups = list(
            webdataset.tariterators.group_by_keys(
                webdataset.tariterators.tar_file_expander([{"url": "a.tar", "stream": stream}])
            )
        )
    theirs = [
        (
            group["__key__"],
            {value for name, value in group.items() if name.endswith(("jpg", "png", "webp"))},
        )
        for group in groups
    ]
    found = shown(readers.read_records([str(folder / "a.tar")]))
    assert [(name, set(images)) for name, _, images in found] == theirs
    assert [turns[1][1] for _, turns, _ in found] == ["An egg.", "Two eggs.", "Milk."]
    with tarfile.open(folder / "a.tar") as tar:  # several images in the order of the members
        order = [
            tar.extractfile(member).read()
            for member in tar
            if member.name.startswith("train/2") and member.name.endswith("jpg")
        ]
    assert found[1][2] == order and len(order) == 2
    # as `tar -c .` names them
    assert readers.tar_key("./shards/000012.left.JPG") == ("shards/000012", "jpg")


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def add_sample(tar, key):
    add(tar, f"{key}.jpg", IMAGES["0.jpg"])
    add(tar, f"{key}.txt", b"An egg.")


@pytest.mark.parametrize(
    "name, fields, reason",
    [
        ("../b.jpg", {}, "unsafe member of a tar"),
        ("x/../../b.jpg", {}, "unsafe member of a tar"),
        ("/etc/b.jpg", {}, "unsafe member of a tar"),
        ("b\n.jpg", {}, "unsafe member of a tar"),
        ("b\udcff.jpg", {}, "unsafe member of a tar"),
        ("..", {}, None),
        ("b.jpg", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "unsafe member of a tar"),
        ("b.jpg", dict(type=tarfile.LNKTYPE, linkname="a.jpg"), "unsafe member of a tar"),
        ("b.jpg", dict(type=tarfile.CHRTYPE), "unsafe member of a tar"),
        ("b.jpg", dict(type=tarfile.FIFOTYPE), "unsafe member of a tar"),
        ("b", dict(type=tarfile.DIRTYPE), None),
        ("._b.jpg", {}, None),
        (".DS_Store", {}, None),  # folders and hidden files are no samples
        ("b", {}, "no known kind of record"),
        ("b.jpg", {}, "no known kind of record"),
        ("b.npy", {}, "no known kind of record"),
        ("b.json", {"content": b"{"}, "broken JSON"),
        ("b.json", {"content": b"5"}, "no known kind of record"),
        ("b.txt", {"content": b"\xff"}, "not text in UTF-8"),
        ("b.txt", {"content": b" \n"}, "no image"),
        ("a.txt", {"content": b"again"}, "two texts or a text too large"),
        ("b.json", {"content": b"[" * 40 + b"]" * 40}, "nested too deep"),
        ("b.txt", {"content": b" " * (readers.MAX_TEXT + 1)}, "two texts or a text too large"),
        (
            "b.jpg",
            {"pax_headers": {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}},
            "unsafe member of a tar",
        ),
    ],
)
def test_a_bad_member_is_skipped_with_its_reason_and_the_other_samples_are_read(
    tmp_path, name, fields, reason
):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "0")
        add_sample(tar, "a")
        add(tar, name, **fields)
        add_sample(tar, "c")
    found = shown(readers.read_records([str(tmp_path / "a.tar")]))
    good = ["0", "c"] if name == "a.txt" else ["0", "a", "c"]
    assert [sample[0] for sample in found if not isinstance(sample, str)] == good
    assert [sample for sample in found if isinstance(sample, str)] == [reason] * bool(reason)


def test_a_sample_with_one_bad_member_is_skipped_completely(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "a")
        add(tar, "b.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(tar, "b.txt", b"An egg.")
    assert [
        found if isinstance(found, str) else found[0]
        for found in shown(readers.read_records([str(tmp_path / "a.tar")]))
    ] == ["a", "unsafe member of a tar"]


def test_a_tar_cut_short_is_refused_and_never_read_as_a_shorter_one(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in "abc":
            add_sample(tar, key)
    whole = (tmp_path / "a.tar").read_bytes()
    # the end of the last member's last block; the end mark follows
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(600, end + 512, 256), end + 512, len(whole)]:
        path = put(tmp_path / "cut.tar", whole[:length])
        try:
            count = len(list(readers.read_records([path])))
        except UserError as error:
            assert "damaged or cut short" in str(error) and length < end + 512
        else:
            assert count == 3 and length >= end + 512


def test_a_tar_with_a_negative_size_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add_sample(tar, "a")
        member = tarfile.TarInfo("b.txt")
        member.size = -1024
        tar.addfile(member)
    with pytest.raises(UserError, match="the size of 'b.txt' is -1024"):
        readers.read_records([str(tmp_path / "a.tar")])


def test_the_members_of_a_tar_are_not_all_kept_in_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in range(200):
            add_sample(tar, key)
    del tar  # it keeps what it wrote
    gc.collect()
    raws = readers.read_records([str(tmp_path / "a.tar")])
    read = [next(raws) for _ in range(199)]
    members = [thing for thing in gc.get_objects() if type(thing) is tarfile.TarInfo]
    assert len(members) < 10 and len(read) == 199


@pytest.mark.parametrize(
    "names, message",
    [
        ("a.jpg b.jpg a.txt b.txt", "an image, but no json or txt beside it; the members of a"),
        ("a.txt b.txt a.jpg b.jpg", "members of a record follow one another, as tar --sort=name"),
        ("v1.0_a.jpg v1.0_b.txt", "one must have just this name, or none have a dot in it"),
        ("a.avif a.txt", "an image 'a.avif' of a format that is not read here: convert it"),
    ],
)
def test_what_is_wrong_with_a_tar_is_told_with_its_remedy(tmp_path, names, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "0")
        for name in names.split():
            add(tar, name, b"An egg." if name.endswith("txt") else IMAGES["0.jpg"])
    assert message in errors(str(tmp_path / "a.tar"))[0]


def test_a_jfif_is_a_jpeg(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jfif", IMAGES["2.jpg"])
        add(tar, "a.txt", b"An egg.")
    assert shown(readers.read_records([str(tmp_path / "a.tar")]))[0][2] == [IMAGES["2.jpg"]]


# ---- data: URIs, and URLs ----


def data_uri(content):
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def ask(*parts):
    """A conversation in OpenAI's format."""
    return {"messages": [{"role": "user", "content": [*parts]}, ANSWER]}


WORDS = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(IMAGES["3.jpg"]),
        data_uri(IMAGES["3.jpg"]).replace("data:image/jpeg", "DATA:"),
        "data:image/jpeg;charset=x;base64,"
        + "\n".join(re.findall(".{1,76}", data_uri(IMAGES["3.jpg"]).partition(",")[2])),
        "data:image/jpeg;base64," + quote(base64.b64encode(IMAGES["3.jpg"])),
        "data:image/jpeg," + quote(IMAGES["3.jpg"]),
    ],
    ids=["base64", "upper case", "wrapped", "quoted", "percent"],
)
def test_a_data_uri_is_the_image_that_it_holds(folder, uri):
    """urllib reads it so."""
    assert urllib.request.urlopen(uri).read() == IMAGES["3.jpg"]
    caption, question = {"id": "a", "caption": "An egg."}, {"id": "b", "image": "3.jpg"}
    files = [caption | {"image": "3.jpg"}, question | ask({"type": "image"}, WORDS)]
    want = shown(readers.read_records([put(folder / "files.json", files)]))
    rows = [caption | {"image": uri}, {"id": "b"} | ask(image_part(uri), WORDS)]
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        for row in rows:
            tar.write({"__key__": row["id"], "json": row})
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), folder / "a.parquet")
    put(folder / "a.json", rows)
    put(folder / "a.jsonl", "\n".join(map(json.dumps, rows)))
    for name in ("a.json", "a.jsonl", "a.tar", "a.parquet"):
        found = shown(readers.read_records([str(folder / name)]))
        assert found == want[: len(found)] and len(found) == (1 if name == "a.parquet" else 2)


@pytest.mark.parametrize(
    "record, reason, message",
    [
        (ask(image_part("https://x.org/a.jpg"), WORDS), "image on the network", "is a URL"),
        (ask(image_part("http://x.org/a.jpg"), WORDS), "image on the network", "not downloaded"),
        (ask(image_part("file:///a/0.jpg"), WORDS), "image on the network", "is a URL"),
        (ask(image_part("data:image/png;base64,QUJD"), WORDS), None, None),
        (ask(image_part("data:image/png;base64,QUJDQ"), WORDS), "image cannot be read", "base64"),
        (ask(image_part("data:image/png;base64,QU-D"), WORDS), "image cannot be read", "image 1"),
        (
            ask(image_part("0.jpg"), image_part("data:,QUJD"), WORDS),
            "images of two kinds",
            "as bytes and as paths",
        ),
        (
            ask(image_part("0.jpg"), WORDS) | {"image": "1.jpg"},
            "images in two places",
            "in its turns",
        ),
        (ask(WORDS) | {"image": "0.jpg", "images": ["1.jpg"]}, "images in two places", "`images`"),
        (ask(image_part("0.jpg"), WORDS) | {"image": "0.jpg"}, None, None),
        (ask({"type": "image", "image": "0.jpg"}, WORDS), None, None),
        (
            {"question": "What?", "answer": "x", "x": "data:image/png;base64,QUJD"},
            "image in an",
            "`image`",
        ),
    ],
)
def test_images_in_a_record_are_read_or_refused_and_never_downloaded(
    folder, record, reason, message
):
    source = put(folder / "a.json", [COLLECTION[2], record])
    if reason is None:
        assert reasons(readers.read_records([source])) == []
    else:
        assert reasons(readers.read_records([source]))[0].startswith(reason)
        (error,) = errors(source)
        assert message in error and (len(error) < 300) and "QU-D" not in error


def test_a_data_uri_has_the_size_limit_of_an_image_file(folder, monkeypatch):
    monkeypatch.setattr(image_refs, "MAX_IMAGE_BYTES", 1000)
    for size, expected in ((1000, []), (1001, ["image cannot be read"])):
        row = {"image": data_uri(b"x" * size), "caption": "x"}
        source = put(folder / "a.json", [row])
        assert reasons(readers.read_records([source])) == expected
    (error,) = errors(source)
    assert (
        error
        == f"{source}, sample 1, image 1 cannot be read: 1,001 bytes are more than the 1,000 of an image"
    )


# ---- zips ----


def zip_of(path, members, **settings):
    with zipfile.ZipFile(path, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return str(path)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("../evil.jpg", "path climbs out"),
        ("a/../../evil.jpg", "path climbs out"),
        ("/evil.jpg", "path climbs out"),
        ("..", "path climbs out"),
        ("nowhere.jpg", "image missing"),
        ("deep", "image missing"),
        ("deep/", "image missing"),
        ("link.jpg", "image missing"),
        ("a\0b", "image missing"),
        ("\ud800", "image missing"),
        ("", "wrong number of <image>"),
        ("x" * 5000, "image missing"),
    ],
)
def test_a_path_that_leads_out_or_nowhere(tmp_path, path, reason):
    """In a zip that has members of such names, and in a folder with such a file beside it."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("evil.jpg", "images/0.jpg"):
        (tmp_path / name).write_bytes(IMAGES["0.jpg"])
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    pack = zip_of(
        tmp_path / "images.zip",
        {
            name: IMAGES["0.jpg"]
            for name in ("0.jpg", "../evil.jpg", "a/../../evil.jpg", "/evil.jpg", link)
        },
    )
    with zipfile.ZipFile(pack, "a") as more:
        more.writestr("deep/", "")
    records = [
        {"id": 1, "image": "0.jpg", "conversations": talk("<image>", "x")},
        {"id": 2, "image": path, "conversations": talk("<image>", "x")},
    ]
    source = put(tmp_path / "a.json", records)
    for images in (pack, str(tmp_path / "images")):
        assert reasons(readers.read_records([source], images), images) == [reason]


def test_a_name_that_differs_only_in_its_spelling_is_told(tmp_path):
    """As macOS decomposes accents, and Windows separates folders."""
    names = [
        unicodedata.normalize("NFD", "Käse.jpg"),
        unicodedata.normalize("NFC", "Öl.jpg"),
        "s/a.jpg",
    ]
    given = [
        unicodedata.normalize("NFC", names[0]),
        unicodedata.normalize("NFD", names[1]),
        "s\\a.jpg",
    ]
    pack = zip_of(tmp_path / "a.zip", {name: IMAGES["0.jpg"] for name in names})
    with zipfile.ZipFile(pack) as members:
        members.extractall(tmp_path / "images")
    source = put(
        tmp_path / "a.json", [{"image": name, "caption": "x"} for name in (*given, "b.jpg")]
    )
    for images in (pack, str(tmp_path / "images")):
        *found, last = errors(source, images)
        for name, error in zip(names, found, strict=True):
            assert (
                f"no such image: '{images}/" in error
                and f", but {name!a} exists: name it so" in error
            )
        assert last.endswith(f"no such image: '{images}/b.jpg'")


def test_a_member_that_cannot_be_unpacked_is_named(tmp_path):
    pack = zip_of(tmp_path / "a.zip", {"0.jpg": b"x" * 100, "1.jpg": b"y" * 100})
    put(Path(pack), Path(pack).read_bytes().replace(b"y" * 100, b"z" * 100))
    ref = image_refs.ZipMember(pack, "0.jpg")
    assert readers.load_image_bytes(ref) == (b"x" * 100, f"{pack}/0.jpg")
    with pytest.raises(UserError, match="a.zip/1.jpg cannot be read: Bad CRC-32"):
        readers.load_image_bytes(image_refs.ZipMember(pack, "1.jpg"))


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(image_refs.MAX_IMAGE_BYTES + 1)  # a hole: it takes no space
    with pytest.raises(UserError, match="more than the 1,073,741,824 of an image") as caught:
        readers.load_image_bytes(image_refs.ImageFile(str(tmp_path / "a.jpg")))
    assert caught.value.reason == "image cannot be read"
    with pytest.raises(UserError, match="ends after 0 of 5 bytes") as caught:
        readers.load_image_bytes(
            image_refs.TarMember(
                str(tmp_path / "a.jpg"), "0.jpg", image_refs.MAX_IMAGE_BYTES + 1, 5
            )
        )
    assert caught.value.reason == "image cannot be read"
    with pytest.raises(UserError, match="No such file"):
        readers.load_image_bytes(image_refs.ImageFile(str(tmp_path / "b.jpg")))


# ---- parquet ----


def test_a_row_with_images_as_bytes_and_as_paths_is_refused(folder):
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "0.png"}]
    table = pyarrow.Table.from_pylist([{"images": images, "caption": "Two."}])
    parquet.write_table(table, folder / "a.parquet")
    with pytest.raises(UserError, match="row 1 has images as bytes and as paths"):
        list(readers.read_records([str(folder / "a.parquet")]))


def test_parquet_of_plain_bytes_or_paths_without_ids(folder):
    rows = [
        {"image": IMAGES.get(name), "caption": "An egg."} for name in ("0.jpg", "none", "1.jpg")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    found = shown(readers.read_records([str(folder)]))
    assert [found[0][0], found[1], found[2][0]] == ["a.parquet:1", "no image", "a.parquet:3"]
    assert [found[i][2] for i in (0, 2)] == [[IMAGES["0.jpg"]], [IMAGES["1.jpg"]]]
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [{"image": "0.jpg", "caption": "x"}, {"image": "9.jpg", "caption": "x"}]
        ),
        folder / "a.parquet",
    )
    assert reasons(readers.read_records([str(folder)]), str(folder)) == ["image missing"]
    assert reasons(readers.read_records([str(folder)])) == ["image missing"] * 2


def test_without_pyarrow_parquet_is_refused_by_name(folder, monkeypatch):
    path = as_parquet(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"parquet.data is a parquet file, which pyarrow reads: pip install pyarrow"
    ):
        readers.read_records([path])


# ---- files that are no source ----


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it begins with b''"),
        (
            b"\xff\xd8\xff\xe0 a photograph",
            "is neither JSON nor an uncompressed tar nor parquet: it begins with",
        ),
        (b"id,text\n", "it begins with b'id,text"),
        (b"\x1f\x8b\x08", "nor an uncompressed tar"),
        (b"BZh9", "nor an uncompressed tar"),
        (b"[]", "holds no samples"),
        (b"\n\n", "begins with"),
        (b"[1, 2", "is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"{'id': 1}", "line 1 is not JSON"),
        (json.dumps({"data": COLLECTION[:2]}, indent=2), "is one JSON object over several lines"),
        (b'\xef\xbb\xbf{ \r\n"id": 1}', "give a list of records, or one record a line"),
        (b'{"id":\n1}', "line 1 is not JSON"),
        (b"PAR1", "cannot be read beyond row 0"),
        (b"\0" * 257 + b"ustar", "damaged or cut short"),
        (b"[5]", "sample 1 is not an object: 5"),
        (
            b'{"a": 5}\n',
            "line 1 is no known kind of record (of a conversation, a question with answers or "
            "choices, a caption): {'a': 5}",
        ),
        (b'[{"id": 1, "question": "Why?"}]', "sample 1 is no known kind of record"),
        (b"\0" * 2000, "begins with"),
    ],
)
def test_a_source_of_no_known_kind_is_refused_at_once_and_quoted(tmp_path, content, message):
    good = put(tmp_path / "good.json", [COLLECTION[2]])
    with pytest.raises(UserError) as caught:
        readers.read_records([good, put(tmp_path / "a.json", content)])
    assert (
        message in str(caught.value)
        and str(tmp_path / "a.json") in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_missing_sources_and_images(tmp_path):
    (tmp_path / "empty").mkdir()
    good = put(tmp_path / "good.json", [COLLECTION[2]])
    for paths, images, message in [
        (["nowhere.json"], "", "nowhere.json is neither a file nor a folder of .tar"),
        (["no-*.tar"], "", "no-*.tar is neither a file nor a folder of .tar"),
        ([str(tmp_path / "empty")], "", "empty is neither a file nor a folder of .tar"),
        ([good], "nowhere", "--images=nowhere is neither a folder nor a zip: [Errno 2]"),
        ([good], good, "is neither a folder nor a zip"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            readers.read_records(paths, images)


def test_a_source_may_begin_with_a_broken_record(folder):
    """It is enough if one of the first ten records can be used."""
    lines = [
        '{"id": 1, broken',
        json.dumps(COLLECTION[2]),
        '{"x": 1}',
        "[]",
        '"text"',
        '{"id": 1,',
        json.dumps(COLLECTION[3]),
    ]
    assert reasons(readers.read_records([put(folder / "a.jsonl", "\n".join(lines))])) == [
        "broken JSON",
        "no known kind of record",
        "no known kind of record",
        "no known kind of record",
        "broken JSON",
    ]


def test_reading_keeps_no_file_open(folder):
    opened = len(os.listdir("/proc/self/fd"))
    raws = readers.read_records([as_lines(folder), as_tar(folder), as_parquet(folder)])
    # a thousand shards would be a thousand open files
    assert len(os.listdir("/proc/self/fd")) == opened
    next(raws)
    del raws
    assert len(os.listdir("/proc/self/fd")) == opened


# ---- records that cannot be used ----

GOOD = {"id": "x", "image": "0.jpg", "conversations": talk("<image>\nWhat?", "An egg.")}
QUESTION = {"id": "x", "question": "What?", "answers": ["a", "b"]}
CHOICE = {"id": "x", "question": "What?", "choices": ["a", "b"], "answer": "A"}


@pytest.mark.parametrize(
    "record, reason",
    [
        (5, "no known kind of record"),
        (None, "no known kind of record"),
        ([], "no known kind of record"),
        ({}, "no known kind of record"),
        (GOOD | {"id": True}, "id is not a text"),
        (GOOD | {"id": ["a"]}, "id is not a text"),
        (GOOD | {"id": ""}, "id is not one line of text"),
        (GOOD | {"id": "a\nb"}, "id is not one line of text"),
        (GOOD | {"id": "\ud800"}, "id is not one line of text"),
        (GOOD | {"image": 5}, "no path of an image"),
        (GOOD | {"image": [None]}, "no path of an image"),
        (GOOD | {"image": {"bytes": "x"}}, "no path of an image"),
        (GOOD | {"image": "nowhere.jpg"}, "image missing"),
        (GOOD | {"image": []}, "wrong number of <image>"),
        (GOOD | {"image": ["0.jpg", "0.jpg"]}, "wrong number of <image>"),
        (GOOD | {"image": "../0.jpg"}, "path climbs out"),
        (GOOD | {"conversations": talk("<image>")}, "turns out of order"),
        (GOOD | {"conversations": talk("<image>", " \n")}, "empty answer"),
        (GOOD | {"conversations": []}, "no known kind of record"),
        (GOOD | {"conversations": "text"}, "no conversation"),
        (GOOD | {"conversations": [None]}, "no conversation"),
        (GOOD | {"conversations": talk("<image>", 5)}, "no conversation"),
        (GOOD | {"conversations": talk("<image>", "\ud800")}, "half a character"),
        (GOOD | {"extra": json.loads("[" * 50 + "]" * 50)}, "nested too deep"),
        ({"id": "x", "texts": [{"user": "a"}]}, "turn is not a text"),
        ({"id": "x", "texts": []}, "no known kind of record"),
        ({"id": "x", "texts": 5}, "turn is not a text"),
        (QUESTION | {"question": {}}, "question is not a text"),
        (QUESTION | {"answers": []}, "no known kind of record"),
        (QUESTION | {"answers": [""]}, "empty answer"),
        (QUESTION | {"answers": [None]}, "answer is not a text"),
        (QUESTION | {"weights": [1]}, "wrong weights"),
        (QUESTION | {"weights": [1, -1]}, "wrong weights"),
        (QUESTION | {"weights": [1, float("nan")]}, "wrong weights"),
        (QUESTION | {"weights": ["1", 1]}, "wrong weights"),
        (QUESTION | {"weights": 7}, "wrong weights"),
        (QUESTION | {"weights": [True, 1]}, "wrong weights"),
        (QUESTION | {"weights": [0, 0]}, "empty answer"),
        (QUESTION | {"weights": [10**400, 1]}, "wrong weights"),
        (QUESTION | {"weights": [5e-324] * 2}, "empty answer"),
        (CHOICE | {"answer": "C"}, "no right choice"),
        (CHOICE | {"answer": 2}, "no right choice"),
        (CHOICE | {"answer": -1}, "no right choice"),
        (CHOICE | {"answer": ""}, "no right choice"),
        (CHOICE | {"answer": "AB"}, "no right choice"),
        (CHOICE | {"answer": True}, "no right choice"),
        (CHOICE | {"answer": 1.0}, "no right choice"),
        (CHOICE | {"choices": "ab"}, "choices are not a list"),
        (CHOICE | {"choices": ["a"] * 27}, "choices are not a list"),
        (CHOICE | {"choices": ["a", None]}, "choice is not a text"),
        ({"id": "x", "caption": "An egg."}, "no image"),
        ({"id": "x", "image": "0.jpg", "caption": {}}, "answer is not a text"),
    ],
)
def test_a_record_that_cannot_be_used_is_skipped_with_its_reason(folder, record, reason):
    for name, content in [
        ("a.json", json.dumps([COLLECTION[0], record, COLLECTION[0]])),
        ("a.jsonl", "\n".join(json.dumps(line) for line in (COLLECTION[0], record, COLLECTION[0]))),
    ]:
        found = shown(readers.read_records([put(folder / name, content)]))
        assert found[0] == found[2] and not isinstance(found[0], str)
        assert found[1] == reason


# ---- stamps ----


def test_a_source_that_is_named_twice_is_read_once(folder):
    """By its name and by a pattern."""
    path = str(folder / "b.tar")
    os.replace(as_tar(folder), path)
    for twice in ([path, path], [path, str(folder / "*.tar")]):
        assert len(list(readers.read_records(twice))) == len(COLLECTION)


def test_stamps_differ_after_a_source_has_changed(folder):
    paths, pack = [as_json(folder), str(folder / "*.tar")], zip_of(folder / "a.zip", IMAGES)
    for name in ("b.tar", "a.tar"):
        os.replace(as_tar(folder), folder / name)
    before = readers.source_stamps(paths, pack)
    files = [paths[0], str(folder / "a.tar"), str(folder / "b.tar"), pack]
    assert [file for file, _, _ in before] == files
    assert before == readers.source_stamps(paths, pack)
    assert readers.source_stamps(paths, str(folder)) == before[:3]
    assert before[3] == [pack, os.path.getsize(pack), os.stat(pack).st_mtime_ns]
    os.utime(folder / "b.tar", ns=(1, 1))
    after = readers.source_stamps(paths, pack)
    assert [old[0] for old, new in zip(before, after, strict=True) if old != new] == [files[2]]


# ---- random and damaged sources are skipped or refused ----

SMALL = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-3, 3)
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(
        ["<image>", "human", "gpt", "user", "assistant", "A", "0.jpg", "../0.jpg", "a\0b"]
    )
)
KEYS = st.sampled_from(
    [
        "from",
        "value",
        "role",
        "content",
        "type",
        "text",
        "answer",
        "user",
        "assistant",
        "bytes",
        "path",
    ]
)
ANY = st.recursive(
    SMALL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "id",
    "question_id",
    "image",
    "images",
    "conversations",
    "messages",
    "texts",
    "question",
    "context",
    "answers",
    "answer",
    "answer_weights",
    "weights",
    "choices",
    "options",
    "correct_choice_idx",
    "correct",
    "caption",
    "text",
    "system",
    "hint",
    "img",
    "label",
]
BOUNDED = dict(
    deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(max_examples=300, **BOUNDED)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4),
    base=st.sampled_from([{}, *COLLECTION]),
    images=st.booleans(),
)
def test_any_json_in_any_field_is_used_or_skipped(folder, changes, base, images):
    path = put(folder / "a.json", json.dumps([COLLECTION[2], {**base, **changes}]))
    assert len(shown(readers.read_records([path]), str(folder) if images else "")) == 2


def damaged(content, random_seed):
    """Bytes changed, cut out, doubled or lost at the end, at one to four positions."""
    chance = random.Random(random_seed)
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(5):
            case 0:
                content[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del content[at : at + chance.choice([1, 7, 512])]
            case 2:
                content[at:at] = content[at : at + chance.choice([1, 100, 512])]
            case 3:
                content[at : at + 12] = chance.choice(
                    [b"\xff" * 12, b"\0" * 12, b"\x80" + b"\xff" * 11, b"77777777777 "]
                )
            case 4:
                del content[max(at, 1) :]
    return bytes(content)


@pytest.mark.parametrize("keep", [as_json, as_lines, as_tar, as_parquet])
# the same bytes each time, because Arrow has errors of its own
@settings(max_examples=150, derandomize=True, **BOUNDED)
@given(seed=st.integers(0, 2**32))
def test_damaged_sources_are_read_as_far_as_possible_or_refused(folder, keep, seed):
    path = keep(folder)
    put(Path(path), damaged(Path(path).read_bytes(), seed))
    try:
        shown(readers.read_records([path]))
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, **BOUNDED)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_zip_of_images_is_read_as_far_as_possible_or_refused(folder, seed):
    path = as_json(folder)
    pack = zip_of(folder / "a.zip", IMAGES)
    put(Path(pack), damaged(Path(pack).read_bytes(), seed))
    image_refs.open_zip.cache_clear()  # the file has changed under the same name
    try:
        assert len(shown(readers.read_records([path], pack), pack)) == len(COLLECTION)
    except UserError as error:
        assert "\n" not in str(error)
