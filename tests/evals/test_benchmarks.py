"""Each benchmark is read from a small fixture in its owner's format; errors name the question."""

import base64
import io
import json
import os
import re
import zipfile

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from nanovlm import UserError
from nanovlm.data import image_files, image_refs
from nanovlm.data.turns import CAPTION_PROMPT, LETTER_PROMPT, SHORT_PROMPT
from nanovlm.evals import benchmarks, formats, metrics

WORD_PROMPT = "Answer the question using a single word, phrase, or number."
GOOD = {"id": "a", "question": "What?", "answers": ["milk"], "image": "a.jpg", "kind": "what"}
TEN = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "racket net", "net"]


def turns(*texts):
    return [
        {"from": who, "value": text}
        for who, text in zip(["human", "gpt", "human", "gpt"], texts, strict=False)
    ]


def jpeg(width=5, height=7):
    image_file = io.BytesIO()
    Image.new("RGB", (width, height), (width, 90, 20)).save(image_file, "JPEG")
    return image_file.getvalue()


def write_files(folder, files):
    """Write {path: text, bytes, JSON, or the rows of a parquet}; None: an image."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(content), folder / path)
        elif isinstance(content, str):
            (folder / path).write_text(content, encoding="utf-8")
        else:
            (folder / path).write_bytes(
                json.dumps(content).encode() if content is not None else jpeg()
            )
    return folder


def make_zip(folder):
    """The folder as a zip, as images are downloaded."""
    with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(folder))
    return f"{folder}.zip"


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def prompt_text(text, *more, images=1):
    return "<image>\n" * images + "\n".join([text, *more])


def without_images(rows):
    return [{name: value for name, value in row.items() if name != "image"} for row in rows]


# ---- a user's questions ----


def read_user_questions(tmp_path, text, name="exact", **how):
    (tmp_path / "questions.json").write_text(text, encoding="utf-8")
    for image_name in ("a.jpg", "b.jpg"):
        (tmp_path / image_name).write_bytes(jpeg())
    return benchmarks.load_questions(name, tmp_path / "questions.json", **how)


def test_json_lines_a_list_and_llavas_format_give_the_same_questions(tmp_path):
    a, b = (image_refs.ImageFile(str(tmp_path / name)) for name in ("a.jpg", "b.jpg"))
    records = [
        GOOD,
        {"id": 2, "question": "Ho\u2028w?", "answers": ["a", "b"]},
        {**GOOD, "id": "c", "image": ["a.jpg", "b.jpg"]},
    ]
    want = [
        {
            "id": "a",
            "kind": "what",
            "image": [a],
            "answers": ["milk"],
            "choices": [],
            "question": "<image>\nWhat?",
        },
        {
            "id": 2,
            "kind": "all",
            "image": [],
            "answers": ["a", "b"],
            "choices": [],
            "question": "Ho\u2028w?",
        },
        {
            "id": "c",
            "kind": "what",
            "image": [a, b],
            "answers": ["milk"],
            "choices": [],
            "question": "<image>\n<image>\nWhat?",
        },
    ]
    assert (
        read_user_questions(
            tmp_path, "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        )
        == want
    )
    assert read_user_questions(tmp_path, json.dumps(records, indent=1)) == want
    assert read_user_questions(tmp_path, "\ufeff" + json.dumps(records)) == want
    assert read_user_questions(tmp_path, json.dumps(records[0])) == want[:1], "a single line"
    llava = [
        {
            "id": "a",
            "image": "a.jpg",
            "label": "what",
            "conversations": turns("What?\n<image>", "milk", "Sure?", "yes"),
        }
    ]
    assert read_user_questions(tmp_path, json.dumps(llava)) == want[:1], "as LLaVA trains it"
    bare = [{"id": 1, "image": "a.jpg", "conversations": turns("<image>", "a cat")}]
    for name in ("exact", "contains", "letters", "captions"):
        for source in (llava, bare):
            assert (
                read_user_questions(tmp_path, json.dumps(source), name, prompt="Say.")[0][
                    "question"
                ]
                == "<image>\nSay."
            )


def test_a_question_may_hold_its_image_and_none_is_downloaded(tmp_path):
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg()).decode()}"
    (row,) = read_user_questions(tmp_path, json.dumps(GOOD | {"image": uri}))
    assert image_refs.load_image_bytes(row["image"][0])[0] == jpeg()
    (row,) = read_user_questions(tmp_path, json.dumps(GOOD | {"image": uri[:-1] + "?"}))
    with pytest.raises(
        UserError, match="questions.json, question 1, its image cannot be read: "
    ) as e:
        image_refs.load_image_bytes(row["image"][0])
    assert uri[-40:-1] not in str(e.value)
    with pytest.raises(UserError, match="question 1: 'https://x.org/a.jpg' is a URL"):
        read_user_questions(tmp_path, json.dumps(GOOD | {"image": "https://x.org/a.jpg"}))


@pytest.mark.parametrize("name", ["../c.jpg", "{}/c.jpg", "link.jpg"])
def test_an_image_outside_is_shown_only_if_it_is_allowed(tmp_path, name):
    """A stranger's questions could put a person's files into a report."""
    (inner := tmp_path / "inner").mkdir()
    (tmp_path / "c.jpg").write_bytes(b"secret")
    (inner / "link.jpg").symlink_to(tmp_path / "c.jpg")
    text = json.dumps(GOOD | {"image": name.format(tmp_path)})
    for images in ("", str(inner)):
        with pytest.raises(UserError, match="climbs out of .*--allow_outside_images=true"):
            read_user_questions(inner, text, images=images)
        (row,) = read_user_questions(inner, text, images=images, allow_outside_images=True)
        assert image_refs.load_image_bytes(row["image"][0])[0] == b"secret"


def test_the_prompt_follows_the_question_once(tmp_path):
    choose = {**GOOD, "answers": ["B"], "choices": ["an egg", "milk"]}
    assert read_user_questions(tmp_path, json.dumps(GOOD), "contains")[0][
        "question"
    ] == prompt_text("What?")
    assert read_user_questions(tmp_path, json.dumps(choose))[0]["question"] == prompt_text(
        "What?"
    ), "only letters lists the choices"
    for question in ("What?", f"What?\n{SHORT_PROMPT}"):
        assert read_user_questions(
            tmp_path, json.dumps({**GOOD, "answers": TEN, "question": question}), "vqa"
        )[0]["question"] == prompt_text("What?", SHORT_PROMPT)
    (row,) = read_user_questions(tmp_path, json.dumps(choose), "letters")
    assert (row["question"], row["choices"]) == (
        prompt_text("What?", "A. an egg", "B. milk", LETTER_PROMPT),
        ["an egg", "milk"],
    )
    assert read_user_questions(tmp_path, json.dumps(choose), "letters", prompt="Well?")[0][
        "question"
    ] == prompt_text("Well?")
    caption = {"id": 1, "image": "a.jpg", "answers": ["A cat.", "Cats."]}
    assert read_user_questions(tmp_path, json.dumps(caption), "captions")[0][
        "question"
    ] == prompt_text(CAPTION_PROMPT)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "questions.json has no questions"),
        ("[]", "questions.json has no questions"),
        ("[{]", "questions.json: not JSON: "),
        (json.dumps(GOOD) + "\n{", "questions.json, line 2: not JSON: "),
        ("3", "questions.json, question 1 is not an object: 3"),
        ("[[]]", r"questions.json, question 1 is not an object: \[\]"),
        (
            json.dumps({"id": 1}),
            "questions.json, question 1: `question` must be a non-empty text, not ''",
        ),
        (
            json.dumps({"id": 1, "question": "What?"}),
            r"question 1: `answers` must be a list of non-empty texts, not \[\]",
        ),
        (json.dumps({"question": "What?"}), "question 1: `id` must be a number or a line of text"),
        (
            json.dumps(GOOD) + "\n" + json.dumps(GOOD),
            "questions.json, question 2: the id a is already that of .*questions.json, question 1",
        ),
        (
            json.dumps([{**GOOD, "id": 1}, {**GOOD, "id": "1"}]),
            "questions.json, question 2: the id 1 is already that of",
        ),
        (
            json.dumps({**GOOD, "answers": []}),
            r"`answers` must be a list of non-empty texts, not \[\]",
        ),
        (
            json.dumps({**GOOD, "answers": ["milk", " "]}),
            "`answers` must be a list of non-empty texts",
        ),
        (
            json.dumps({**GOOD, "image": {"road": "a"}}),
            "`image` must be a non-empty text, not None",
        ),
        (json.dumps({**GOOD, "image": [1]}), "`image` must be a non-empty text"),
        (
            json.dumps({**GOOD, "image": "c.jpg"}),
            "questions.json, question 1: no such image: .*c.jpg",
        ),
        (json.dumps({**GOOD, "image": "../a.jpg"}), "question 1: the path .*a.jpg' climbs out"),
        (json.dumps({**GOOD, "question": None}), "`question` must be a non-empty text, not ''"),
        (json.dumps({**GOOD, "question": 3}), "`question` must be a non-empty text"),
        (json.dumps({**GOOD, "question": "<image> "}), "`question` must be a non-empty text"),
        (
            json.dumps({**GOOD, "question": "<image> or <image>?"}),
            "question 1: 2 <image> in its text, but 1 images",
        ),
        (
            json.dumps({**GOOD, "question": "\ud800?"}),
            r"`question` must be a non-empty text, not '\\ud800",
        ),
        (
            json.dumps({**GOOD, "answers": ["\udfff"]}),
            r"`answers` must be a list of non-empty texts, not \['\\udfff",
        ),
        (
            json.dumps({**GOOD, "choices": ["x", "\ud800"]}),
            "`choices` must be a list of at most 26 texts",
        ),
        (
            json.dumps({**GOOD, "choices": 0}),
            r"`choices` must be a list of at most 26 texts, not \[0\]",
        ),
        *(
            (
                json.dumps({**GOOD, part: name}),
                re.escape(f"`{part}` must be {expected}, not {name!r}"),
            )
            for part, expected, names in (
                ("id", "a number or a line of text", ({"a": 1}, "a\nb", "\ud800")),
                ("kind", "a line of text", ("a\nb", "\ud800")),
            )
            for name in names
        ),
        (
            json.dumps({**GOOD, "images": ["a.jpg"], "prompt": 3}),
            "question 1: its fields are id, question, answers, image, kind, images, prompt; known "
            "are id, image, question, answers, answer, kind, choices, or LLaVA's conversations",
        ),
        (
            json.dumps([{"id": 1, "conversations": turns("What?")}]),
            "question 1: its fields are id, conversations; known are id, image, question,",
        ),
        (
            json.dumps(
                [
                    {
                        "id": 1,
                        "conversations": [
                            {"from": "system", "value": "x"},
                            *turns("What?", "milk"),
                        ],
                    }
                ]
            ),
            "question 1: its fields are id, conversations; known are",
        ),
        (
            json.dumps([{"id": 1, "conversations": "What?"}]),
            "question 1: its fields are id, conversations; known are",
        ),
    ],
)
def test_an_invalid_question_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_user_questions(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_kind_may_be_a_number_and_is_all_if_it_is_blank(tmp_path):
    for kind, want in ((0, "0"), (1.5, "1.5"), ("", "all"), (None, "all"), ("Übung", "Übung")):
        assert read_user_questions(tmp_path, json.dumps(GOOD | {"kind": kind}))[0]["kind"] == want


def test_other_fields_of_llavas_format_change_nothing(tmp_path):
    llava = {"id": "a", "image": "a.jpg", "conversations": turns("What?", "milk")}
    assert read_user_questions(
        tmp_path, json.dumps([llava | {"prompt": 3, "model": "x", "width": 5}])
    ) == read_user_questions(tmp_path, json.dumps([llava]))


def test_a_folder_may_have_the_name_of_a_zip_and_needs_questions(tmp_path):
    write_files(tmp_path, {"folder.zip/questions.jsonl": lines([GOOD]), "folder.zip/a.jpg": None})
    assert benchmarks.load_questions("exact", tmp_path / "folder.zip")[0]["image"] == [
        image_refs.ImageFile(f"{tmp_path}/folder.zip/a.jpg")
    ]
    with pytest.raises(UserError, match="^.*empty has no [*].jsonl and no [*].json$"):
        (tmp_path / "empty").mkdir()
        benchmarks.load_questions("exact", tmp_path / "empty")


def test_answers_and_choices_may_be_a_single_text(tmp_path):
    for single in ({"answers": "milk"}, {"answers": None, "answer": "milk"}):
        question = read_user_questions(tmp_path, json.dumps({**GOOD, **single}))[0]
        assert question == read_user_questions(tmp_path, json.dumps(GOOD))[0]


def test_names_may_be_in_any_script(tmp_path):
    folder = write_files(
        tmp_path / "prüf [1] 试卷",
        {
            "fragen*.jsonl": lines([GOOD | {"image": "圖 {0}.jpg", "id": "ä/1", "kind": "何"}]),
            "圖 {0}.jpg": None,
        },
    )
    for questions in (folder, folder / "fragen*.jsonl"):
        assert benchmarks.load_questions("exact", questions)[0]["image"] == [
            image_refs.ImageFile(f"{folder}/圖 {{0}}.jpg")
        ]
    archive = make_zip(folder)
    (row,) = benchmarks.load_questions("exact", folder, images=archive)
    assert row["image"] == [image_refs.ZipMember(archive, "圖 {0}.jpg")]
    assert (row["id"], row["kind"]) == ("ä/1", "何")


def test_a_question_without_its_image_is_refused(tmp_path):
    """Only a user's own questions may have no image, except for captions."""
    record = {"questionId": 1, "question": "What?", "answers": ["milk"]}
    for name, fields in (
        ("infovqa", {"image": "documents/a.jpg"}),
        ("docvqa", {"image_local_name": "a.jpg"}),
        ("docvqa", {"image": []}),
    ):
        with pytest.raises(
            UserError, match=r"question 1: `image` must be an image or its path, not \[\]"
        ):
            read_user_questions(tmp_path, json.dumps([record | fields]), name)
    no_image = {name: value for name, value in GOOD.items() if name != "image"}
    assert read_user_questions(tmp_path, json.dumps(no_image))[0]["question"] == "What?"
    for empty in ({}, {"image": []}, {"image": None}):
        with pytest.raises(UserError, match="question 1: `image` must be an image or its path"):
            read_user_questions(tmp_path, json.dumps(no_image | empty), "captions")
    with pytest.raises(UserError, match="question 1: `image` must be an image or its path"):
        benchmarks.load_questions(
            "mmmu", write_files(tmp_path, {"validation-0.parquet": [mmmu(options="['x', 'y']")]})
        )


def test_annotations_of_other_questions_are_refused(tmp_path):
    write_files(
        tmp_path,
        {"q.json": vqav2("val2014"), "notes.csv": "10", "COCO_val2014_000000262148.jpg": None},
    )
    for number, wrong in enumerate(([], {}, 3, "x", None, KARPATHY)):
        write_files(tmp_path, {f"{number}.json": json.dumps(wrong)})
        with pytest.raises(
            UserError,
            match=f"q.json or .*{number}.json is not in the format that vqav2 is published in: "
            "(Key|Type)Error",
        ):
            benchmarks.load_questions("vqav2", tmp_path / "q.json", tmp_path / f"{number}.json")
    with pytest.raises(UserError, match="notes.csv is not in the format that"):
        benchmarks.load_questions("vqav2", tmp_path / "q.json", tmp_path / "notes.csv")


@pytest.mark.parametrize("name", ["pipe", "pipe.parquet", "zero"])
def test_only_regular_files_of_questions_are_opened(name, tmp_path):
    """A pipe would wait, and a device never ends."""
    if name == "zero":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"not a regular file: .*{name}"):
        benchmarks.load_questions("exact", str(tmp_path / name))
    with pytest.raises(UserError, match="has no"):
        benchmarks.load_questions("exact", tmp_path)


def test_what_does_not_go_together_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file: nowhere.json"):
        benchmarks.load_questions("exact", "nowhere.json")
    with pytest.raises(UserError, match="--benchmark=extact is not known: exact, contains, vqa"):
        benchmarks.load_questions("extact", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no coco_pope_"):
        benchmarks.load_questions("pope", tmp_path)
    with pytest.raises(
        UserError, match=r"question 1: its answers, \['C'\], are not letters of its 2 choices"
    ):
        read_user_questions(
            tmp_path, json.dumps({**GOOD, "answers": ["C"], "choices": ["x", "y"]}), "letters"
        )
    with pytest.raises(UserError, match="question 1: `choices` must be a list of at most 26 texts"):
        read_user_questions(
            tmp_path, json.dumps({**GOOD, "answers": ["A"], "choices": ["x"] * 27}), "letters"
        )
    with pytest.raises(
        UserError, match="--annotations=x.json: the answers of exact are in its questions"
    ):
        read_user_questions(tmp_path, json.dumps(GOOD), annotations="x.json")
    (tmp_path / "questions.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="questions.json is not text in UTF-8"):
        benchmarks.load_questions("exact", tmp_path / "questions.json")
    write_files(
        tmp_path,
        {
            "pope/coco_pope_random.json": lines(
                [{"question_id": 1, "image": "a.jpg", "text": "Is it?"}]
            )
        },
    )
    with pytest.raises(
        UserError, match=r"question 1: `answers` must be a list of non-empty texts, not \[\]"
    ):
        benchmarks.load_questions("pope", tmp_path / "pope")


# ---- owners' layouts ----

KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{cocoid:012d}.jpg",
            "imgid": number,
            "cocoid": cocoid,
            "split": split,
            "sentids": [number],
            "sentences": [
                {
                    "tokens": ["a", "cat"],
                    "raw": f"A cat, {word}.",
                    "imgid": number,
                    "sentid": number,
                }
                for word in ("sitting", "asleep")
            ],
        }
        for number, (cocoid, split) in enumerate(
            [(391895, "test"), (60623, "val"), (522418, "test")]
        )
    ],
}


def test_coco_in_karpathys_split_and_in_blips(tmp_path):
    write_files(
        tmp_path,
        {
            "dataset_coco.json": KARPATHY,
            "other.json": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}],
            "coco_karpathy_test.json": [
                {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["One.", "Two."]}
            ],
            **{f"val2014/COCO_val2014_{i:012d}.jpg": None for i in (391895, 522418)},
        },
    )
    rows = benchmarks.load_questions("coco", tmp_path)
    assert [row["id"] for row in rows] == [391895, 522418] and rows[0]["answers"] == [
        "A cat, sitting.",
        "A cat, asleep.",
    ]
    assert rows[0]["question"] == prompt_text(CAPTION_PROMPT) and rows[1]["image"] == [
        image_refs.ImageFile(f"{tmp_path}/val2014/COCO_val2014_000000522418.jpg")
    ]
    assert benchmarks.load_questions(
        "coco", tmp_path / "dataset_coco.json", images=f"{tmp_path}/val2014", prompt="Say."
    )[1]["question"] == prompt_text("Say.")
    assert benchmarks.load_questions("coco", tmp_path / "coco_karpathy_test.json")[0] == {
        **rows[0],
        "answers": ["One.", "Two."],
    }
    with pytest.raises(
        UserError, match="other.json is not in the format that coco is published in: KeyError"
    ):
        benchmarks.load_questions("coco", tmp_path / "other.json")


def vqav2(split):
    return {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {},
        "data_subtype": split,
        "questions": [
            {"image_id": 262148, "question": "What is the net?", "question_id": 262148000 + k}
            for k in range(2)
        ],
    }


NOTES = {
    "info": {},
    "license": {},
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "what is",
            "multiple_choice_answer": "net",
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000 + k,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                for i, answer in enumerate(TEN, 1)
            ],
        }
        for k in range(2)
    ],
}


def test_vqav2_with_its_annotations_and_its_hidden_test_set(tmp_path):
    write_files(tmp_path / "q", {"v2_OpenEnded_mscoco_val2014_questions.json": vqav2("val2014")})
    write_files(tmp_path / "a", {"v2_mscoco_val2014_annotations.json": NOTES})
    write_files(
        tmp_path,
        {
            "val2014/COCO_val2014_000000262148.jpg": None,
            "test2015/COCO_test2015_000000262148.jpg": None,
        },
    )
    rows = benchmarks.load_questions("vqav2", tmp_path / "q", tmp_path / "a", str(tmp_path))
    assert rows[1] == {
        "id": 262148001,
        "kind": "other",
        "image": [image_refs.ImageFile(f"{tmp_path}/val2014/COCO_val2014_000000262148.jpg")],
        "answers": TEN,
        "choices": [],
        "question": prompt_text("What is the net?", SHORT_PROMPT),
    }
    with pytest.raises(
        UserError, match="val2014 has published answers: give them as --annotations"
    ):
        benchmarks.load_questions("vqav2", tmp_path / "q", images=str(tmp_path))
    with pytest.raises(
        UserError,
        match="questions.json or .*questions.json is not in the format that vqav2 is published in: "
        "KeyError: 'annotations'",
    ):
        benchmarks.load_questions(
            "vqav2",
            tmp_path / "q",
            tmp_path / "q/v2_OpenEnded_mscoco_val2014_questions.json",
            str(tmp_path),
        )
    write_files(
        tmp_path / "a",
        {"v2_mscoco_val2014_annotations.json": NOTES | {"annotations": NOTES["annotations"][:1]}},
    )
    with pytest.raises(UserError, match="--annotations has no answers to question 262148001"):
        benchmarks.load_questions("vqav2", tmp_path / "q", tmp_path / "a", str(tmp_path))
    write_files(
        tmp_path / "t",
        {
            f"v2_OpenEnded_mscoco_{split}_questions.json": vqav2(split)
            for split in ("test2015", "test-dev2015")
        },
    )
    for path in (tmp_path / "t", tmp_path / "t/v2_OpenEnded_mscoco_test-dev2015_questions.json"):
        rows = benchmarks.load_questions("vqav2", path, images=str(tmp_path))
        assert (
            len(rows) == 2
            and rows[0]["answers"] == []
            and rows[0]["image"][0].path.endswith("test2015/COCO_test2015_000000262148.jpg")
        )
    handed = json.loads(
        benchmarks.format_submission(
            "vqav2", [row | {"answer": f" {k}\n"} for k, row in enumerate(rows)]
        )
    )
    assert handed == [
        {"question_id": 262148000, "answer": "0"},
        {"question_id": 262148001, "answer": "1"},
    ]


def test_textvqa(tmp_path):
    record = {
        "question": "what is the brand?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "flickr_original_url": "http",
        "flickr_300k_url": "http",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nokia"] * 10,
        "question_tokens": ["what"],
        "question_id": 34602,
        "set_name": "val",
    }
    secret = {name: value for name, value in record.items() if name != "answers"}
    write_files(
        tmp_path,
        {
            f"TextVQA_0.5.1_{split}.json": {
                "dataset_type": split,
                "dataset_name": "textvqa",
                "dataset_version": "0.5.1",
                "data": [data],
            }
            for split, data in {"val": record, "test": secret}.items()
        },
    )
    images = make_zip(
        write_files(tmp_path / "train_val_images", {"train_images/003a8ae2ef43b901.jpg": None})
    )
    (row,) = benchmarks.load_questions("textvqa", tmp_path, images=images)
    assert row == {
        "id": 34602,
        "kind": "all",
        "image": [image_refs.ZipMember(images, "train_images/003a8ae2ef43b901.jpg")],
        "answers": ["nokia"] * 10,
        "choices": [],
        "question": prompt_text("what is the brand?", WORD_PROMPT),
    }
    assert benchmarks.load_questions(
        "textvqa", tmp_path / "TextVQA_0.5.1_test.json", images=images
    ) == [{**row, "answers": []}]


def test_chartqa_of_both_kinds(tmp_path):
    record = {
        "imgname": "41699051005347.png",
        "query": "How many food item is shown in the bar graph?",
        "label": "14",
    }
    parts = [
        f"{split}/{split}_{kind}.json"
        for split in ("test", "val")
        for kind in ("human", "augmented")
    ]
    write_files(
        tmp_path / "c/ChartQA Dataset",
        {part: [record, record] for part in parts} | {"test/png/41699051005347.png": None},
    )
    folder = tmp_path / "c/ChartQA Dataset"
    rows = benchmarks.load_questions("chartqa", tmp_path / "c")
    assert [row["id"] for row in rows] == ["augmented/0", "augmented/1", "human/0", "human/1"]
    assert rows[2] == {
        "id": "human/0",
        "kind": "human",
        "image": [image_refs.ImageFile(f"{folder}/test/png/41699051005347.png")],
        "answers": ["14"],
        "choices": [],
        "question": prompt_text(record["query"], SHORT_PROMPT),
    }
    assert image_refs.load_image_bytes(rows[2]["image"][0])[0] == jpeg()
    assert benchmarks.load_questions("chartqa", folder)[3]["image"][0].path.endswith(
        "/test/png/41699051005347.png"
    )
    assert len(benchmarks.load_questions("chartqa", folder / "test/test_human.json")) == 2
    with pytest.raises(UserError, match="test_augmented.json, question 1: no such image"):
        benchmarks.load_questions("chartqa", folder, images=str(tmp_path))


@pytest.mark.parametrize(
    "name, file, record, image",
    [
        (
            "docvqa",
            "{}_v1.0{}.json",
            {
                "image": "documents/xnbl0037_1.png",
                "question_types": ["handwritten", "form"],
                "docId": 279,
                "ucsf_document_id": "xnbl0037",
                "ucsf_document_page_no": "1",
            },
            "spdocvqa_images/xnbl0037_1.png",
        ),
        (
            "infovqa",
            "infographicsVQA_{}_v1.0{}.json",
            {
                "image_local_name": "38579.jpeg",
                "image_url": "http",
                "ocr_output_file": "38579.json",
                "answer_type": ["single span"],
                "operation/reasoning": [],
            },
            "infographicsvqa_images/38579.jpeg",
        ),
    ],
)
def test_docvqa_and_infovqa(tmp_path, name, file, record, image):
    record = record | {"questionId": 337, "question": "what is the date?", "data_split": "val"}
    files = {
        file.format("val", "_withQT"): [record | {"answers": ["1/8/93"]}],
        file.format("test", ""): [record],
        file.format("train", ""): 3,
    }
    write_files(
        tmp_path,
        {
            file: {"dataset_name": name, "dataset_version": "1.0", "data": data}
            for file, data in files.items()
        }
        | {image: None},
    )
    (row,) = benchmarks.load_questions(name, tmp_path)
    assert row == {
        "id": 337,
        "kind": "all",
        "image": [image_refs.ImageFile(f"{tmp_path}/{image}")],
        "answers": ["1/8/93"],
        "choices": [],
        "question": prompt_text("what is the date?", WORD_PROMPT),
    }
    (row,) = benchmarks.load_questions(
        name, tmp_path / file.format("test", ""), images=str(tmp_path / image.split("/")[0])
    )
    assert (
        row["answers"] == []
        and benchmarks.format_submission(name, [row | {"answer": "1/8/93"}])
        == '[{"questionId": 337, "answer": "1/8/93"}]'
    )


def test_ai2d_letters_replace_the_labels(tmp_path):
    entry = {"answerTexts": ["ears", "nose", "A", "face"], "correctAnswer": 3}
    sheet = {
        "imageName": "0.png",
        "questions": {
            "What is A in the diagram?": {"abcLabel": True, "questionId": "0.png-0", **entry},
            "Which one hears?": {"abcLabel": False, "questionId": "0.png-1", **entry},
        },
    }
    label = {"id": "T0", "rectangle": [[20, 30], [60, 50]], "value": "ears", "replacementText": "A"}
    write_files(
        tmp_path,
        {
            "ai2d/questions/0.png.json": sheet,
            "ai2d/questions/10.png.json": {"imageName": "10.png", "questions": {}},
            "ai2d/annotations/0.png.json": {"imageName": "0.png", "text": {"T0": label}},
            "ai2d/categories.json": {},
            "ai2d_test_ids.csv": "10\n0\n",
        },
    )
    (tmp_path / "ai2d/images").mkdir()
    Image.new("RGB", (90, 80), (0, 0, 255)).save(tmp_path / "ai2d/images/0.png")
    write_files(tmp_path, {"ai2d/images/10.png": None})
    lettered, plain = benchmarks.load_questions("ai2d", tmp_path, tmp_path / "ai2d_test_ids.csv")
    assert plain["question"] == prompt_text(
        "Which one hears?", "A. ears", "B. nose", "C. A", "D. face", LETTER_PROMPT
    )
    assert (plain["id"], plain["answers"], plain["choices"]) == (
        "0.png-1",
        ["D"],
        entry["answerTexts"],
    )
    before, after = (
        image_files.read_image(image_refs.load_image_bytes(row["image"][0])[0])[0]
        for row in (plain, lettered)
    )
    changed = [
        (x, y)
        for x in range(90)
        for y in range(80)
        if before.getpixel((x, y)) != after.getpixel((x, y))
    ]
    assert {*changed} == {(x, y) for x in range(20, 61) for y in range(30, 51)} and min(
        after.crop((20, 30, 61, 51)).convert("L").tobytes()
    ) < 99
    (tmp_path / "ai2d_test_ids.csv").write_text("3\n")
    with pytest.raises(UserError, match="has no questions"):
        benchmarks.load_questions("ai2d", tmp_path, tmp_path / "ai2d_test_ids.csv")
    with pytest.raises(
        UserError,
        match="AI2D is evaluated on its test diagrams: give their list, ai2d_test_ids.csv, as "
        "--annotations",
    ):
        benchmarks.load_questions("ai2d", tmp_path)
    (tmp_path / "ai2d_test_ids.csv").write_text("0\n")
    for wrong in (4, -1):
        asks = {"Which?": {"abcLabel": False, "questionId": "q", **entry, "correctAnswer": wrong}}
        write_files(tmp_path, {"ai2d/questions/0.png.json": {**sheet, "questions": asks}})
        with pytest.raises(
            UserError,
            match=r"0.png.json, question 1: its answers, \['[EZ]'\], are not letters of its "
            "4 choices",
        ):
            benchmarks.load_questions("ai2d", tmp_path, tmp_path / "ai2d_test_ids.csv")
    write_files(tmp_path, {"ai2d/questions/0.png.json": sheet})
    (tmp_path / "ai2d/annotations/0.png.json").unlink()
    with pytest.raises(FileNotFoundError, match="annotations/0.png.json"):
        benchmarks.load_questions("ai2d", tmp_path, tmp_path / "ai2d_test_ids.csv")


def shown(name, width):
    return {"bytes": jpeg(width), "path": f"{name}.jpg"}


def mmmu(**fields):
    return {
        "id": "validation_Art_Theory_3",
        "question": "Where?",
        "options": "[]",
        "explanation": "",
        **{f"image_{k}": None for k in range(1, 8)},
        "img_type": "['Paintings']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Art",
        **fields,
    }


def test_mmmu_has_each_image_where_it_is_named(tmp_path):
    three = {f"image_{k}": shown(k, 10 + k) for k in (1, 2, 3)}
    rows = [
        mmmu(
            question="Of <image 2>, which is it?",
            options="['<image 1>', \"it's <image 2>\"]",
            **three,
        ),
        mmmu(
            id="validation_Art_Theory_4",
            question="How many? <image 1>",
            answer="['24/7', '3.429']",
            image_1=shown(1, 20),
        ),
    ]
    write_files(
        tmp_path,
        {
            "Art_Theory/validation-00000-of-00001.parquet": rows,
            "Art_Theory/dev-00000-of-00001.parquet": rows,
            "Music/validation-00000-of-00001.parquet": [
                mmmu(id="validation_Music_1", options="['x', 'y']", image_1=shown(1, 30))
            ],
            "Music/test-00000-of-00001.parquet": [
                mmmu(id="test_Music_1", options="['x', 'y']", image_1=shown(1, 30), answer="?")
            ],
        },
    )
    first, count, music = benchmarks.load_questions("mmmu", tmp_path)
    assert (
        first["question"]
        == f"<image>\nOf <image>, which is it?\nA. <image>\nB. it's <image>\n{LETTER_PROMPT}"
    )
    assert [image_files.read_image(ref.content)[1][0] for ref in first["image"]] == [
        13,
        12,
        11,
        12,
    ], "the unnamed one is in front"
    assert (first["kind"], first["answers"], first["choices"]) == (
        "Art_Theory",
        ["B"],
        ["<image>", "it's <image>"],
    )
    assert (count["question"], count["answers"]) == (
        f"How many? <image>\n{SHORT_PROMPT}",
        ["24/7", "3.429"],
    )
    assert (music["kind"], music["question"]) == (
        "Music",
        prompt_text("Where?", "A. x", "B. y", LETTER_PROMPT),
    )
    (test,) = benchmarks.load_questions("mmmu", f"{tmp_path}/*/test-*.parquet")
    assert (test["id"], test["answers"]) == ("test_Music_1", [])
    for answer, want in (
        ("[0, 5)", ["[0, 5)"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['(1, 2]', '1']", ["(1, 2]", "1"]),
    ):
        (row,) = benchmarks.load_questions(
            "mmmu",
            write_files(
                tmp_path, {"open/validation-0.parquet": [mmmu(answer=answer, image_1=shown(1, 20))]}
            )
            / "open",
        )
        assert row["answers"] == want, "only a list of texts is several answers"
    write_files(
        tmp_path,
        {
            "open/validation-0.parquet": [
                mmmu(options="['x', 'y']", answer="D", image_1=shown(1, 20))
            ]
        },
    )
    with pytest.raises(
        UserError, match=r"question 1: its answers, \['D'\], are not letters of its 2 choices"
    ):
        benchmarks.load_questions("mmmu", tmp_path / "open")
    for options in ("{'x': 1}", "['x', 2]", "['x'", "-" * 50_000 + "1"):
        write_files(
            tmp_path, {"open/validation-0.parquet": [mmmu(options=options, image_1=shown(1, 20))]}
        )
        with pytest.raises(
            UserError,
            match="that mmmu is published in: ValueError: options are not a list of texts: ",
        ) as error:
            benchmarks.load_questions("mmmu", tmp_path / "open")
        assert len(str(error.value)) < 500
    write_files(
        tmp_path, {"bad/validation-0.parquet": [mmmu(question="<image 4>?", image_1=shown(1, 20))]}
    )
    with pytest.raises(
        UserError, match="validation-0.parquet, question 1: `image` must be a non-empty text"
    ):
        benchmarks.load_questions("mmmu", tmp_path / "bad")


def test_mmstar_has_its_choices_in_the_question(tmp_path):
    record = {
        "index": 0,
        "question": "Which is it?\nOptions: A: A book, on B., B: The cat., C: None",
        "image": jpeg(),
        "answer": "A",
        "category": "coarse perception",
        "l2_category": "image scene",
        "meta_info": {"source": "MMBench", "split": "val", "image_path": "x"},
    }
    lined = {
        **record,
        "index": 1,
        "question": "Hint: Choose.\nQuestion: Which?\nChoices:\n(A) 3,\n4\n(B) 5",
    }
    odd = {**record, "index": 2, "question": "Which?\nOptions: B: 3, A: 4"}
    first, second, third = benchmarks.load_questions(
        "mmstar", write_files(tmp_path, {"mmstar.parquet": [record, lined, odd]})
    )
    assert first["choices"] == ["A book, on B.", "The cat.", "None"] and (
        first["id"],
        first["kind"],
    ) == (0, "coarse perception")
    assert first["question"] == prompt_text(
        "Which is it?", "A. A book, on B.", "B. The cat.", "C. None", LETTER_PROMPT
    )
    assert second["choices"] == ["3,\n4", "5"] and second["question"] == prompt_text(
        "Hint: Choose.\nQuestion: Which?", "A. 3,\n4", "B. 5", LETTER_PROMPT
    )
    assert third["choices"] == [] and third["question"] == prompt_text(
        "Which?\nOptions: B: 3, A: 4", LETTER_PROMPT
    ), "unchanged"
    for number, (options, answer, choices) in enumerate(
        [
            ("A: x, B: y, C:z, D:w", "C", ["x", "y", "z", "w"]),
            ("A: ratio A:B, B: 1:2\n", "B", ["ratio A:B", "1:2"]),
            ("A: x, B: y; C: z", "C", []),
            ("A: x, B: w\nHint: Look.", "A", []),  # more text follows the last choice
        ]
    ):
        text = f"Which?\nOptions: {options}"
        (row,) = benchmarks.load_questions(
            "mmstar",
            write_files(
                tmp_path, {f"{number}.parquet": [{**record, "question": text, "answer": answer}]}
            )
            / f"{number}.parquet",
        )
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False)]
        assert (row["choices"], row["question"]) == (
            choices,
            prompt_text("Which?" if choices else text.strip(), *lines, LETTER_PROMPT),
        ), options
    assert image_refs.load_image_bytes(first["image"][0])[0] == jpeg()


def test_ocrbench_in_both_editions(tmp_path):
    records = [
        {
            "dataset_name": "IIIT5K",
            "type": "Regular Text Recognition",
            "id": 0,
            "image_path": "IIIT5K/1.png",
            "question": "what is written?",
            "answers": ["CENTRE"],
        },
        {
            "dataset_name": "HME100k",
            "type": "Handwritten",
            "id": 0,
            "image_path": "HME/1.png",
            "question": "Write it.",
            "answers": "x ^ 2",
        },
    ]
    write_files(tmp_path, {"OCRBench/OCRBench.json": records, "OCRBench/FullTest.json": 3})
    write_files(tmp_path, {"OCRBench_Images/IIIT5K/1.png": None, "OCRBench_Images/HME/1.png": None})
    rows = benchmarks.load_questions("ocrbench", tmp_path)
    assert rows[1] == {
        "id": 1,
        "kind": "Handwritten",
        "image": [image_refs.ImageFile(f"{tmp_path}/OCRBench_Images/HME/1.png")],
        "answers": ["x ^ 2"],
        "choices": [],
        "question": prompt_text("Write it."),
        "dataset_name": "HME100k",
    }
    table = [
        {
            "dataset": r["dataset_name"],
            "question": r["question"],
            "question_type": r["type"],
            "image": shown("x", 5),
            "answer": [r["answers"]] if isinstance(r["answers"], str) else r["answers"],
        }
        for r in records
    ]
    again = benchmarks.load_questions(
        "ocrbench", write_files(tmp_path / "hub", {"data/test-00000-of-00001.parquet": table})
    )
    assert without_images(again) == without_images(rows)


def test_popes_three_files_repeat_ids(tmp_path):
    record = {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    kinds = ["adversarial", "popular", "random"]
    write_files(
        tmp_path,
        {
            f"output/coco/coco_pope_{kind}.json": lines(
                [record, record | {"question_id": 2, "label": "no"}]
            )
            for kind in kinds
        }
        | {"val2014/COCO_val2014_000000310196.jpg": None},
    )
    rows = benchmarks.load_questions("pope", tmp_path)
    assert [row["id"] for row in rows] == [
        f"{kind}/{k}" for kind in kinds for k in (1, 2)
    ] and rows[3]["answers"] == ["no"]
    assert (rows[2]["kind"], rows[2]["question"]) == (
        "popular",
        prompt_text(record["text"], SHORT_PROMPT),
    )
    assert rows == benchmarks.load_questions(
        "pope", tmp_path / "output", images=str(tmp_path / "val2014")
    )


def test_mme_in_both_of_its_folders_layouts(tmp_path):
    asks = "Is it {}? Please answer yes or no.\t{}\n"
    text = asks.format("red", "Yes") + asks.format("blue", "No") + "\n"
    write_files(
        tmp_path / "m/M",
        {
            "MME_Benchmark/color/0001.txt": text,
            "MME_Benchmark/color/0001.jpg": None,
            "eval_tool/Your_Results/color.txt": "x\ty\n",
            "MME_Benchmark/artwork/questions_answers_YN/9.txt": text,
            "MME_Benchmark/artwork/images/9.png": None,
        },
    )
    folder = tmp_path / "m" / "M" / "MME_Benchmark"
    rows = benchmarks.load_questions("mme", tmp_path / "m")
    assert [row["id"] for row in rows] == [
        "artwork/9/1",
        "artwork/9/2",
        "color/0001/1",
        "color/0001/2",
    ]
    assert rows[3] == {
        "id": "color/0001/2",
        "kind": "color",
        "image": [image_refs.ImageFile(f"{folder}/color/0001.jpg")],
        "answers": ["No"],
        "choices": [],
        "question": prompt_text("Is it blue?", SHORT_PROMPT),
    }
    assert rows[0]["image"] == [image_refs.ImageFile(f"{folder}/artwork/images/9.png")]
    assert without_images(benchmarks.load_questions("mme", folder)) == without_images(rows)
    assert without_images(benchmarks.load_questions("mme", folder / "artwork")) == without_images(
        rows[:2]
    )
    (folder / "color" / "0001.jpg").unlink()
    with pytest.raises(UserError, match="color/0001.txt: no such image: .*0001"):
        benchmarks.load_questions("mme", folder)


def test_mathvista(tmp_path):
    query = "Hint: Please answer the question.\nQuestion: how far? (Unit: cm)"
    record = {
        "pid": "1",
        "question": "how far?",
        "image": "images/1.jpg",
        "decoded_image": shown("1", 5),
        "choices": None,
        "unit": "cm",
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "textbook question answering", "split": "testmini"},
        "query": query,
    }
    choose = record | {
        "pid": "2",
        "choices": ["3", "4"],
        "answer": "4",
        "question_type": "multi_choice",
        "answer_type": "text",
        "unit": None,
        "precision": None,
    }
    write_files(
        tmp_path,
        {
            "data/testmini-00000-of-00001-72.parquet": [record, choose],
            "data/test-00000-of-00002-6b.parquet": [record | {"answer": ""}],
        },
    )
    rows = benchmarks.load_questions("mathvista", tmp_path)
    assert without_images(rows[:1]) == [
        {
            "id": "1",
            "kind": "textbook question answering",
            "answers": ["1.2"],
            "choices": [],
            "question": prompt_text(query),  # as the owners ask it
            "answer_type": "float",
            "precision": 1.0,
        }
    ]
    assert rows[1]["choices"] == ["3", "4"] and rows[1]["question"] == prompt_text(query)
    assert isinstance(rows[0]["image"][0], image_refs.ImageBytes)
    (hidden,) = benchmarks.load_questions("mathvista", f"{tmp_path}/data/test-*.parquet")
    assert hidden["answers"] == []


def test_realworldqa_in_both_editions(tmp_path):
    how = "\n\nPlease answer directly with only the letter of the correct option and nothing else."
    records = [
        {
            "image": "0.webp",
            "question": f"Where to?\n\nA. Left\nB. Straight on\nC. Right{how}",
            "answer": "C",
        },
        {
            "image": "1.webp",
            "question": "How many?\n\nPlease answer directly with a single word or number.",
            "answer": "2",
        },
    ]
    write_files(
        tmp_path / "z", {"annotations.jsonl": lines(records), "images/0.webp": None, "1.webp": None}
    )
    rows = benchmarks.load_questions("realworldqa", tmp_path / "z")
    assert rows == [
        {
            "id": k,
            "kind": "all",
            "image": [image_refs.ImageFile(f"{tmp_path}/z/{('images/0.webp', '1.webp')[k]}")],
            "answers": [record["answer"]],
            "choices": [["Left", "Straight on", "Right"], []][k],
            "question": prompt_text(record["question"]),
        }
        for k, record in enumerate(records)
    ]
    shards = {
        f"data/test-0000{k}-of-00002.parquet": [{**record, "image": shown(k, 5)}]
        for k, record in enumerate(records)
    }
    assert without_images(
        benchmarks.load_questions("realworldqa", write_files(tmp_path / "p", shards))
    ) == without_images(rows)


def test_prompts_can_be_replaced_and_submissions_are_known(tmp_path):
    write_files(
        tmp_path,
        {
            "test_human.json": [{"imgname": "1.png", "query": "How many?", "label": 14}],
            "1.png": None,
        },
    )
    assert benchmarks.load_questions("chartqa", tmp_path, prompt="Be brief.")[0][
        "question"
    ] == prompt_text("How many?", "Be brief.")
    assert benchmarks.load_questions("chartqa", tmp_path)[0]["answers"] == ["14"]
    assert (
        benchmarks.format_submission("coco", [{"id": 42, "answer": "A cat."}])
        == '[{"image_id": 42, "caption": "A cat."}]'
    )
    with pytest.raises(
        UserError,
        match="--submission: pope has no submission format; coco, vqav2, docvqa, infovqa have",
    ):
        benchmarks.format_submission("pope", [])


@pytest.mark.parametrize(
    "name, files",
    [
        ("coco", ["dataset_coco.json", "coco_karpathy_test.json"]),
        (
            "vqav2",
            [
                "v2_OpenEnded_mscoco_val2014_questions.json",
                "v2_OpenEnded_mscoco_test2015_questions.json",
            ],
        ),
        ("docvqa", ["val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"]),
        ("infovqa", ["infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_test_v1.0.json"]),
        ("mmmu", ["validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"]),
        ("ocrbench", ["OCRBench.json", "test-00000-of-00001.parquet"]),
        ("mathvista", ["testmini-00000-of-00001.parquet"]),
        ("realworldqa", ["annotations.json", "test-00000-of-00002.parquet"]),
    ],
)
def test_of_several_files_in_a_folder_the_one_with_published_answers_is_read(tmp_path, name, files):
    for file in (
        *files,
        "train.json",
        "dev-00000-of-00001.parquet",
        "v2_OpenEnded_mscoco_train2014_questions.json",
    ):
        (tmp_path / file).touch()
    for file in files:
        assert formats.find_question_files(tmp_path, benchmarks.BENCHMARKS[name].files) == [
            formats.QuestionFile(str(tmp_path), file)
        ]
        (tmp_path / file).unlink()


@pytest.mark.parametrize(
    "name, value, places",
    [
        (
            "coco",
            "COCO_val2014_000000000042.jpg",
            ["val2014/COCO_val2014_000000000042.jpg", "COCO_val2014_000000000042.jpg"],
        ),
        ("vqav2", "COCO_test2015_1.jpg", ["test2015/COCO_test2015_1.jpg", "COCO_test2015_1.jpg"]),
        (
            "textvqa",
            "003a8ae2",
            ["train_images/003a8ae2.jpg", "test_images/003a8ae2.jpg", "003a8ae2.jpg"],
        ),
        (
            "docvqa",
            "documents/x_1.png",
            ["spdocvqa_images/x_1.png", "documents/x_1.png", "x_1.png"],
        ),
        ("infovqa", "7.jpeg", ["infographicsvqa_images/7.jpeg", "7.jpeg"]),
        ("ocrbench", "IIIT5K/1.png", ["OCRBench_Images/IIIT5K/1.png", "IIIT5K/1.png"]),
        ("realworldqa", "0.webp", ["images/0.webp", "0.webp"]),
    ],
)
def test_images_may_be_the_folder_of_the_images_or_one_above_it(tmp_path, name, value, places):
    for place in places:
        found = formats.find_image(
            value,
            benchmarks.BENCHMARKS[name].image_paths,
            formats.QuestionFile("elsewhere", "q.json"),
            str(write_files(tmp_path, {place: None})),
            "here",
        )
        assert found == image_refs.ImageFile(f"{tmp_path}/{place}")
        (tmp_path / place).unlink()


def test_choices_count_only_if_their_letters_are_in_order_and_the_answer_is_one():
    assert formats.ordered_choices([("A", "x "), ("B", "y")], "B") == ["x", "y"]
    assert [
        formats.ordered_choices(pairs, "A")
        for pairs in ([], [("B", "x"), ("A", "y")], [("A", "x"), ("C", "y")])
    ] == [[]] * 3
    assert [
        formats.ordered_choices([("A", "x"), ("B", "y")], answer) for answer in ("C", "x", "", "AB")
    ] == [[]] * 4


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("pope", {"label": "maybe"}, r"its answers, \['maybe'\], are not yes or no"),
        ("pope", {"label": []}, r"`answers` must be a list of non-empty texts, not \[\]"),
        ("ocrbench", {"answers": []}, "`answers` must be a list of non-empty texts"),
        *(
            (
                "mathvista",
                {
                    "pid": "1",
                    "answer": "1.2",
                    "answer_type": kind,
                    "precision": places,
                    "metadata": {"task": "x"},
                },
                # NaN stands for a missing value.
                f"a precision from 0 to 9, not {kind!r} with "
                f"{places if places == places else None!r}",
            )
            for kind, places in (
                ("float", None),
                ("float", "x"),
                ("float", float("nan")),
                ("float", 1.5),
                ("text", 1),
            )
        ),
        (
            "textvqa",
            {"question_id": 1, "answers": ["red"] * 3},
            "has 3 reference answers, but VQA accuracy needs at least 4",
        ),
        ("vqa", {"answers": ["red"]}, "has 1 reference answers, but VQA accuracy needs"),
    ],
)
def test_a_reference_that_no_metric_can_score_is_refused_before_anything_is_generated(
    tmp_path, name, fields, message
):
    record = (
        {
            "id": 1,
            "image": "a.jpg",
            "image_path": "a.jpg",
            "decoded_image": "a.jpg",
            "image_id": "a",
            "question": "Is it?",
            "text": "Is it?",
            "query": "Is it?",
            "dataset_name": "IIIT5K",
            **fields,
        }
        if name != "vqa"
        else GOOD | fields
    )
    with pytest.raises(UserError, match=f"questions.json, question 1:? .*{message}"):
        read_user_questions(tmp_path, json.dumps([record]), name)


@pytest.mark.parametrize("name, reference", [("pope", "x\ny"), ("letters", "x\ny" * 99)])
def test_an_invalid_reference_is_named_in_one_short_line(tmp_path, name, reference):
    record = (
        GOOD | {"answers": [reference], "choices": ["x", "y"]}
        if name == "letters"
        else {"image": "a.jpg", "text": "Is it?", "label": reference}
    )
    with pytest.raises(UserError, match="question 1: its answers, ") as error:
        read_user_questions(tmp_path, json.dumps([record]), name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_answers_may_be_hidden(tmp_path):
    record = {"questionId": 1, "question": "What?", "image": "a.jpg"}
    assert read_user_questions(tmp_path, json.dumps([record]), "docvqa")[0]["answers"] == []
    with pytest.raises(
        UserError, match=r"`answers` must be a list of non-empty texts, not \['milk', None\]"
    ):
        read_user_questions(tmp_path, json.dumps([record | {"answers": ["milk", None]}]), "docvqa")
    write_files(tmp_path, {"q.json": vqav2("val2014"), "COCO_val2014_000000262148.jpg": None})
    for answers in (None, []):
        write_files(
            tmp_path,
            {
                "n.json": {
                    "annotations": [{**note, "answers": answers} for note in NOTES["annotations"]]
                }
            },
        )
        with pytest.raises(
            UserError, match="q.json: --annotations has no answers to question 262148000"
        ):
            benchmarks.load_questions("vqav2", tmp_path / "q.json", tmp_path / "n.json")


def test_a_blank_reference_is_one_of_the_ten(tmp_path):
    record = {"question_id": 1, "image_id": "a", "question": "What?", "answers": ["red"] * 9 + [""]}
    assert read_user_questions(tmp_path, json.dumps([record]), "textvqa")[0]["answers"] == [
        "red"
    ] * 9 + [""]


def test_every_benchmark_has_a_score_and_plain_patterns():
    names = (
        "coco vqav2 textvqa chartqa docvqa infovqa ai2d mmmu mmstar ocrbench pope mme mathvista "
        "realworldqa vqa exact contains letters captions"
    )
    assert benchmarks.BENCHMARKS.keys() == set(names.split())
    for name, benchmark in benchmarks.BENCHMARKS.items():
        assert all(
            re.fullmatch(r"(?:[\w.*-]+/)?[\w.*-]+", pattern)
            for pattern in benchmark.files + benchmark.annotation_files
        ), name
        assert benchmark.is_caption or benchmark.score in vars(metrics).values(), name


def test_a_right_answer_is_scored_right_by_the_metric_of_its_benchmark(tmp_path):
    """The references of MathVista are the text of a choice, MMMU's a letter or texts, MME's Yes."""
    number = {
        "pid": "1",
        "decoded_image": shown("1", 5),
        "choices": None,
        "precision": 1.0,
        "answer": "1.2",
        "answer_type": "float",
        "query": "?",
        "metadata": {"task": "x"},
    }
    choose = {"pid": "2", "answer": "no", "choices": ["yes", "no"], "answer_type": "text"}
    write_files(
        tmp_path,
        {
            "testmini-0.parquet": [number, number | choose],
            "validation-0.parquet": [
                mmmu(options="['x', 'y']", image_1=shown(1, 9)),
                mmmu(id="validation_Music_9", answer="['24/7', '3.43']", image_1=shown(1, 9)),
            ],
            "OCRBench.json": [
                {
                    "dataset_name": "HME100k",
                    "type": "x",
                    "image_path": "a.jpg",
                    "question": "?",
                    "answers": "x ^ 2",
                }
            ],
            "annotations.json": [{"image": "a.jpg", "question": "Is it?", "answer": "Yes"}],
            "a.jpg": None,
            "color/a.txt": "Is it?\tYes\n",
            "color/a.jpg": None,
        },
    )
    for name, answers in (
        ("mathvista", ["It is 1.2.", "(B) no"]),
        ("mmmu", ["B", "so it is 3.43"]),
        ("ocrbench", ["It says x^2"]),
        ("mme", ["Yes."]),
        ("realworldqa", ["yes"]),
    ):
        rows = benchmarks.load_questions(name, tmp_path)
        results = [row | {"answer": text} for row, text in zip(rows, answers, strict=True)]
        scores = [result["score"] for result in benchmarks.score_results(results, name)]
        assert scores == [1.0] * len(answers), name


def test_answers_are_hidden_for_all_questions_or_for_none(tmp_path):
    record = {"questionId": 1, "question": "What?", "image": "a.jpg"}
    assert read_user_questions(tmp_path, json.dumps([record]), "docvqa")[0]["answers"] == []
    mixed = [record, record | {"questionId": 2, "answers": ["milk"]}]
    with pytest.raises(UserError, match="json: 1 of 2 questions have no answers, the first is 1"):
        read_user_questions(tmp_path, json.dumps(mixed), "docvqa")


def test_what_no_question_uses_is_refused(tmp_path):
    """--images if no question has a path, and a second file of annotations."""
    (tmp_path / "questions.jsonl").write_text('{"id": 1, "question": "What?", "answers": ["a"]}')
    with pytest.raises(UserError, match="--images=.*: no question of .* has the path of an image"):
        benchmarks.load_questions("exact", tmp_path / "questions.jsonl", images=tmp_path)
    for split in ("a", "b"):
        (tmp_path / f"{split}_val2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="--annotations=.* has 2 files: name the one"):
        benchmarks.load_questions("vqav2", tmp_path / "questions.jsonl", tmp_path)
