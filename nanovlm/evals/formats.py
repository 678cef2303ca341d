"""The files of benchmarks, as their owners publish them, and the records in these: a layout for each benchmark whose files are more than a list."""

import ast
import fnmatch
import glob
import io
import itertools
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

from .. import UserError
from ..data import image_files
from ..data.image_refs import Bytes, File, Member, archive, find, load
from ..preprocess import readers
from ..preprocess.records import LETTERS


class QuestionFile(NamedTuple):
    """A file of questions, by its path in a folder or in a zip."""

    root: str
    path: str

    @property
    def name(self):
        return os.path.join(self.root, self.path)

    @property
    def zipped(self):
        return os.path.isfile(self.root)

    def beside(self, path):
        """The sheet at a path that is told from this one's folder."""
        return QuestionFile(self.root, os.path.normpath(os.path.join(os.path.dirname(self.path), path)))


def find_question_files(path, patterns):
    """The files that `path` is or holds: a file, a folder, a zip, a part of a zip (all.zip/val.json) or a pattern (MMMU/*/test-*.parquet).

    Of a folder and a zip, all that match the first of `patterns` that matches any.
    """
    path = str(Path(path))
    parts = (path, *map(str, Path(path).parents))
    pack = next(
        (
            part
            for part in parts
            if zipfile.is_zipfile(part) or (part.endswith(".zip") and os.path.isfile(part))
        ),
        "",
    )
    if pack:
        within = path[len(pack) + 1 :]
        names = list_zip(pack, within)
        patterns = ["*"] if names == [within] else patterns
    elif os.path.isdir(path):
        names = [
            os.path.relpath(os.path.join(folder, file), path)
            for folder, _, files in os.walk(path)
            for file in files
        ]
    else:
        found = (
            [path]
            if os.path.isfile(path)
            else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        )
        if not found:
            raise UserError(f"no such file: {path}")
        return [QuestionFile(*os.path.split(file)) for file in found]
    for pattern in patterns:
        if found := sorted(
            name for name in names if fnmatch.fnmatchcase(f"/{name}", f"*/{pattern}")
        ):
            return [QuestionFile(pack or path, name) for name in found]
    raise UserError(f"{path} holds no {' and no '.join(patterns)}")


def list_zip(pack, within):
    """The files of a zip that lie in a folder of it, or the one of that name."""
    try:
        names = archive(pack, os.getpid()).namelist()
    except UserError as mistake:
        raise UserError(str(mistake).removeprefix("--images=")) from None
    names = [name for name in names if not name.endswith("/") and not name.startswith("__MACOSX/")]
    return (
        [within]
        if within in names
        else [name for name in names if not within or name.startswith(f"{within}/")]
    )


def read_document(sheet):
    """What a file says: the rows of a parquet, a text, or what JSON or the lines of it hold."""
    if sheet.path.endswith(".parquet"):
        if sheet.zipped:
            raise UserError(
                f"{sheet.name}: parquet is not read out of a zip: unpack {sheet.root} first"
            )
        return (row for row, _ in readers.read_parquet(sheet.name))
    try:
        text = load(Member(*sheet) if sheet.zipped else File(sheet.name))[0].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{sheet.name} is not text in UTF-8: {error}") from None
    return text if sheet.path.endswith((".txt", ".csv")) else parse_json(text, sheet.name)


def parse_json(text, name):
    """A JSON list or object, or the list that JSON lines are."""
    try:
        whole = readers.parse(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{name}: not JSON: {error}") from None
        whole = None
    if isinstance(whole, dict | list):
        return whole
    records = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # JSON may hold what splitlines takes for the end of a line
        try:
            records += [readers.parse(line)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{name}, line {number}: not JSON: {error}") from None
    return records


def find_image(value, forms, sheet, images, where):
    """A ref to a picture that came along, or that is named: looked for under each form of its path, in `images`, else beside its question or
    from where the questions were found."""
    if isinstance(value, Bytes | File | Member):
        return value
    if isinstance(value, dict | bytes):
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            return Bytes(f"{where}, its picture", content)
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `image` should be text that says something, not {value!r:.80}")
    fault = None
    for folder, form in itertools.product(
        [""] if images else [os.path.dirname(sheet.path), ""], forms
    ):
        path = os.path.normpath(
            os.path.join(folder, form.format(value, name=os.path.basename(value)))
        )
        try:
            return find(
                path,
                None if sheet.zipped else sheet.root,
                images or (sheet.root if sheet.zipped else ""),
                where,
            )
        except UserError as mistake:
            fault = fault or mistake
    raise fault


# ---- layouts: what a file says, the sheet, and the annotations if they are apart, as records ----


def parse_records(said, sheet, notes):
    return said.get("data", [said]) if isinstance(said, dict) else said


USER_FIELDS = (
    "id",
    "image",
    "question",
    "answers",
    "answer",
    "kind",
    "choices",
)  # of anybody's questions


def parse_user_questions(said, sheet, notes):
    """Records as they are, or in LLaVA's format, of which the first turn is the question, the reply to it the answer, and a label the kind.

    The former have no other FIELDS: a question whose picture is called `img` would be asked without it.
    """
    for number, record in enumerate(parse_records(said, sheet, notes), 1):
        match record:
            case {
                "conversations": [
                    {"from": "human", "value": asked},
                    {"from": "gpt", "value": answer},
                    *_,
                ]
            }:
                yield {
                    **record,
                    "question": asked,
                    "answers": [answer],
                    "kind": record.get("label"),
                }
            case {"conversations": _}:
                raise UserError(
                    f"{sheet.name}, question {number}: its first two turns are no question and answer"
                )
            case dict() if unknown := [name for name in record if name not in USER_FIELDS]:
                raise UserError(
                    f"{sheet.name}, question {number}: nobody reads its {', '.join(unknown)}; known are {', '.join(USER_FIELDS)}"
                )
            case _:
                yield record


def parse_coco(said, sheet, notes):
    """Karpathy's split, of which the test images count, its test set as BLIP cut it out (a list), or COCO's own captions, which are also what
    --annotations may be."""
    captions = defaultdict(list)
    for note in (
        notes["annotations"]
        if notes is not None
        else said.get("annotations", [])
        if isinstance(said, dict)
        else []
    ):
        captions[note["image_id"]].append(note["caption"])
    if isinstance(said, list):
        ids = [int(re.search(r"\d+(?=\.\w+$)", image["image"])[0]) for image in said]
        records = [
            {"id": number, "image": image["image"], "answers": image["caption"]}
            for number, image in zip(ids, said, strict=True)
        ]
    elif "annotations" in said:
        records = [{"id": image["id"], "image": image["file_name"]} for image in said["images"]]
    else:
        records = [
            {
                "id": image["cocoid"],
                "image": image["filename"],
                "answers": [sentence["raw"] for sentence in image["sentences"]],
            }
            for image in said["images"]
            if image["split"] == "test"
        ]
    for record in records:
        yield (
            record | {"answers": captions[record["id"]]}
            if captions or notes is not None
            else record
        )


def parse_vqav2(said, sheet, notes):
    """The picture's name follows from the set's, but test-dev2015 is a part of test2015."""
    split = said["data_subtype"].replace("-dev", "")
    golds = (
        {note["question_id"]: note for note in notes["annotations"]} if notes is not None else {}
    )
    if notes is None and not split.startswith("test"):
        raise UserError(
            f"{sheet.name}: the answers of {split} are published: give them as --annotations"
        )
    for record in said["questions"]:
        gold = golds.get(record["question_id"], {})
        if notes is not None and not gold.get("answers"):
            raise UserError(
                f"{sheet.name}: the annotations have no answers to question {record['question_id']}"
            )
        yield {
            **record,
            "image": f"COCO_{split}_{record['image_id']:012d}.jpg",
            "answers": gold.get("answers"),
            "kind": gold.get("answer_type"),
        }


def parse_split_files(said, sheet, notes):
    """The kind is the last word of the file's name; ids begin anew in each."""
    kind = Path(sheet.path).stem.rpartition("_")[2]
    return [
        {**record, "kind": kind, "id": f"{kind}/{record.get('question_id', number)}"}
        for number, record in enumerate(parse_records(said, sheet, notes))
    ]


def parse_ai2d(said, sheet, notes):
    """A file for each diagram, of which the annotations list the test's. Some questions ask of letters in the places of the labels."""
    if notes is None:
        raise UserError(
            f"{sheet.name}: AI2D is asked of the test's diagrams alone: give their list, ai2d_test_ids.csv, as --annotations"
        )
    if said["imageName"].split(".")[0] not in notes.split():
        return
    plain = find_image(said["imageName"], ("../images/{}",), sheet, "", sheet.name)
    letters = None
    for asked, told in said["questions"].items():
        if told["abcLabel"] and not letters:
            letters = draw_letters(
                plain, read_document(sheet.beside(f"../annotations/{said['imageName']}.json"))
            )
        yield {
            "id": told["questionId"],
            "question": asked,
            "choices": told["answerTexts"],
            "answers": LETTERS[told["correctAnswer"]],
            "image": letters if told["abcLabel"] else plain,
        }


def draw_letters(ref, labels):
    """A picture of AI2D with each label covered by its letter, as a PNG."""
    content, name = load(ref)
    drawn, _ = image_files.read(content, name)
    pen = ImageDraw.Draw(drawn)
    for label in labels["text"].values():
        (left, top), (right, bottom) = label["rectangle"]
        pen.rectangle((left, top, right, bottom), "white")
        pen.text(
            ((left + right) / 2, (top + bottom) / 2),
            label["replacementText"],
            "black",
            ImageFont.load_default(max(10, bottom - top)),
            "mm",
        )
    png = io.BytesIO()
    drawn.save(png, "PNG")
    return Bytes(f"{name}, lettered", png.getvalue())


def parse_mmmu(said, sheet, notes):
    """Up to seven pictures, each in the place of its <image 2>; a list of choices or of answers is written as Python's; the id tells the subject."""
    for record in said:
        choices, answer = parse_python_list(record["options"]), record["answer"]
        if choices is None:
            raise ValueError(f"options are no list of texts: {record['options']!r:.80}")
        marks = re.findall(r"<image (\d)>", "\n".join([record["question"], *choices]))
        first = [
            number
            for number in "1234567"
            if record.get(f"image_{number}") is not None and number not in marks
        ]
        asked, *choices = [
            re.sub(r"<image \d>", "<image>", text) for text in (record["question"], *choices)
        ]
        yield {
            **record,
            "question": "<image>\n" * len(first) + asked,
            "choices": choices,
            "image": [record[f"image_{number}"] for number in (*first, *marks)],
            "kind": re.sub(r"^[a-z]+_|_\d+$", "", record["id"]),
            "answers": parse_python_list(answer) or answer,
        }


def parse_python_list(text):
    """The list of texts that is written in Python; None for something else, such as "[0, 5)"."""
    try:
        texts = ast.literal_eval(text)
    except (
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ):  # the first two: nested too deep
        return None
    return (
        texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None
    )


def parse_mmstar(said, sheet, notes):
    """Its choices stand behind the question, as "Options: A: one, B: two" or on a line each, "(A) one", under "Choices:".

    The record is kept as it stands if they are not the last that it says, for which the line tells where the last ends.
    """
    for record in said:
        asked, *options = re.split("\n(?:Options|Choices):", record["question"], maxsplit=1)
        pairs = re.findall(
            r"(?:^|,|\n)\s*\(?([A-Z])[:)](.*?)(?=(?:,|\n)\s*\(?[A-Z][:)]|$)",
            "".join(options).strip(),
            re.DOTALL,
        )
        choices = [] if pairs and "\n" in pairs[-1][1] else ordered_choices(pairs, record["answer"])
        yield {**record, "question": asked, "choices": choices} if choices else record


def parse_realworldqa(said, sheet, notes):
    """Most questions have choices, a line each; all end with how to answer."""
    for record in parse_records(said, sheet, notes):
        yield {
            **record,
            "choices": ordered_choices(
                re.findall(r"^([A-Z])\. (.*)", record["question"], re.MULTILINE), record["answer"]
            ),
        }


def ordered_choices(lettered, answer):
    """The texts of (letter, text) pairs; none unless the letters are A, B, C, ... and the answer is one of them."""
    letters = "".join(letter for letter, _ in lettered)
    return (
        [text.strip() for _, text in lettered]
        if LETTERS.startswith(letters) and answer in [*letters]
        else []
    )


def parse_mme(said, sheet, notes):
    """A text for each picture, a question and its answer on a line; the picture lies beside it, or in the next folder."""
    folder, stem = (
        os.path.dirname(sheet.name).removesuffix("/questions_answers_YN"),
        Path(sheet.path).stem,
    )
    ref = find_image(
        stem,
        [form.format(f"{{}}.{end}") for form in ("{}", "../images/{}") for end in ("jpg", "png")],
        sheet,
        "",
        sheet.name,
    )
    category = os.path.basename(folder)
    for number, line in enumerate(filter(str.strip, said.split("\n")), 1):
        asked, _, answer = line.partition("\t")
        yield {
            "id": f"{category}/{stem}/{number}",
            "kind": category,
            "image": ref,
            "answers": answer.strip(),
            "question": asked.replace("Please answer yes or no.", "").strip(),
        }  # the prompt says it in other words, as in LLaVA's llava_mme.jsonl


HINTS = {  # MathVista's build_query.py, by the kind of answer and how many places a number has
    ("text", None): "and provide the correct option letter, e.g., A, B, C, D",
    ("integer", None): "requiring an integer answer and provide the final value, e.g., 1, 2, 3",
    (
        "float",
        1,
    ): "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4",
    (
        "float",
        2,
    ): "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45",
    (
        "list",
        None,
    ): "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]",
}


def parse_mathvista(said, sheet, notes):
    """The kind is the task. In the JSON edition the query is still to be made."""
    for record in said.values() if isinstance(said, dict) else said:
        yield {
            **record,
            "query": record.get("query") or mathvista_query(record),
            "kind": record["metadata"]["task"],
        }


def mathvista_query(record):
    """What MathVista asks: a hint of how to answer, the question and its choices."""
    hint = HINTS[
        record["answer_type"], record["precision"] if record["answer_type"] == "float" else None
    ]
    unit = f" (Unit: {record['unit']})" if record["unit"] else ""
    lines = [
        f"Hint: Please answer the question {hint}, at the end.",
        f"Question: {record['question']}{unit}",
    ]
    choices = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(record["choices"] or [])]
    return "\n".join([*lines, "Choices:", *choices] if choices else lines)
