"""The files of benchmarks as their owners publish them: finding, reading and parsing them.

There is a `parse_…` function for each benchmark whose files are more than a list of records.
"""

import ast
import fnmatch
import glob
import io
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

from .. import UserError
from ..data import image_files
from ..data.image_refs import (
    ImageBytes,
    ImageFile,
    embedded_image,
    find_image_ref,
    load_image_bytes,
    open_file,
)
from ..preprocess import readers
from ..preprocess.records import LETTERS, image_first


class QuestionFile(NamedTuple):
    """A file of questions, by its path in a folder."""

    root: str
    path: str
    allow_outside_images: bool = False  # its images may lie outside the folder, or --images

    @property
    def name(self):
        return os.path.join(self.root, self.path)


def find_question_files(path, patterns, allow_outside_images=False):
    """Returns the files that `path` names: a file, a folder or a pattern (MMMU/*/test-*.parquet).

    Of a folder: the files that match the first of `patterns` that any file matches.
    allow_outside_images: of each QuestionFile.
    """
    path = str(Path(path))
    if not os.path.isdir(path):
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise UserError(f"no such file: {path}")
        return [QuestionFile(*os.path.split(file), allow_outside_images) for file in found]
    names = [str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()]
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(f"/{name}", f"*/{pattern}")]
        if found:
            return [QuestionFile(path, name, allow_outside_images) for name in sorted(found)]
    raise UserError(f"{path} has no {' and no '.join(patterns)}")


def read_document(path):
    """Returns the content of a file: the rows of a parquet, a text, or the JSON."""
    try:
        with open_file(path) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
            if path.endswith(".parquet"):
                return readers.read_parquet(path)
            text = lines.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (unpack a zip first): {error}") from None
    return text if path.endswith((".txt", ".csv")) else parse_json_document(text, path)


def parse_json_document(text, name):
    """Returns a JSON list or object, or the list of the values of JSON lines."""
    try:
        value = readers.parse_json(text)
        if isinstance(value, dict | list):
            return value
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{name}: not JSON: {error}") from None
    values = []
    # splitlines would also split at characters that JSON texts may contain.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [readers.parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{name}, line {number}: not JSON: {error}") from None
    return values


def find_image(value, paths, file, images, where):
    """Returns a ref to an image that a record contains or names.

    A name is tried in each of `paths`: in `images` if given, else beside the file of the questions,
    else in the folder that has this file.
    """
    if isinstance(value, ImageBytes | ImageFile):
        return value
    if ref := embedded_image(value, f"{where}, its image"):
        return ref
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `image` must be a non-empty text, not {value!r:.80}")
    folders = [""] if images else [os.path.dirname(file.path), ""]
    first_error = None
    for folder, form in itertools.product(folders, paths):
        path = os.path.join(folder, form.format(value, name=os.path.basename(value)))
        try:
            return find_image_ref(path, file.root, images, where, file.allow_outside_images)
        except UserError as error:
            first_error = first_error or error
    raise first_error


# ---- parsers: (content of a file, the file, the annotations or None) -> records ----


def parse_records(content, file, notes):
    return content.get("data", [content]) if isinstance(content, dict) else content


USER_FIELDS = ("id", "image", "question", "answers", "answer", "kind", "choices")


def parse_user_questions(content, file, notes):
    """Yields records as they are, or from LLaVA's format.

    There, the first turn is the question, the next one the answer, and `label` the kind. Other
    records may only have USER_FIELDS: with a misspelled `image`, it would be asked without it.
    """
    for number, record in enumerate(parse_records(content, file, notes), 1):
        match record:
            case {
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                    *_,
                ]
            }:
                if question.count("<image>") == 1:
                    question = image_first(question)  # as it is trained
                kind = record.get("label")
                yield {**record, "question": question, "answers": [answer], "kind": kind}
            case dict() if not record.keys() <= {*USER_FIELDS}:
                raise UserError(
                    f"{file.name}, question {number}: its fields are {', '.join(record)}; known "
                    f"are {', '.join(USER_FIELDS)}, or LLaVA's conversations"
                )
            case _:
                yield record


def parse_coco(content, file, notes):
    """The test images of Karpathy's split: of his own file, or a list as published with BLIP."""
    if isinstance(content, list):
        for image in content:
            image_id = int(re.search(r"\d+(?=\.\w+$)", image["image"])[0])
            yield {"id": image_id, "image": image["image"], "answers": image["caption"]}
        return
    for image in content["images"]:
        if image["split"] == "test":
            texts = [sentence["raw"] for sentence in image["sentences"]]
            yield {"id": image["cocoid"], "image": image["filename"], "answers": texts}


def parse_vqav2(content, file, notes):
    """The name of an image follows from the split; test-dev2015 is a part of test2015."""
    split = content["data_subtype"].replace("-dev", "")
    if notes is None and not split.startswith("test"):
        raise UserError(f"{file.name}: {split} has published answers: give them as --annotations")
    by_question = {}
    if notes is not None:
        by_question = {annotation["question_id"]: annotation for annotation in notes["annotations"]}
    for record in content["questions"]:
        annotation = by_question.get(record["question_id"], {})
        answers = [entry["answer"] for entry in annotation.get("answers") or []]
        if notes is not None and not answers:
            raise UserError(
                f"{file.name}: --annotations has no answers to question {record['question_id']}"
            )
        yield {
            **record,
            "image": f"COCO_{split}_{record['image_id']:012d}.jpg",
            "answers": answers,
            "kind": annotation.get("answer_type"),
        }


def parse_split_files(content, file, notes):
    """The files repeat ids, so each id begins with its kind, the last word of the file's name."""
    kind = Path(file.path).stem.rpartition("_")[2]
    return [
        {**record, "kind": kind, "id": f"{kind}/{record.get('question_id', number)}"}
        for number, record in enumerate(parse_records(content, file, notes))
    ]


def parse_ai2d(content, file, notes):
    """A file per diagram; the annotations list those of the test set.

    Some questions are about letters that replace the diagram's labels.
    """
    if notes is None:
        raise UserError(
            f"{file.name}: AI2D is evaluated on its test diagrams: give their list, "
            "ai2d_test_ids.csv, as --annotations"
        )
    if content["imageName"].split(".")[0] not in notes.split():
        return
    diagram = find_image(content["imageName"], ("../images/{}",), file, "", file.name)
    with_letters = None
    for question, entry in content["questions"].items():
        if entry["abcLabel"] and not with_letters:
            folder = Path(file.name).parent.parent / "annotations"
            labels = read_document(f"{folder}/{content['imageName']}.json")
            with_letters = draw_letters(diagram, labels)
        yield {
            "id": entry["questionId"],
            "question": question,
            "choices": entry["answerTexts"],
            "answers": LETTERS[entry["correctAnswer"]],
            "image": with_letters if entry["abcLabel"] else diagram,
        }


def draw_letters(ref, labels):
    """Returns a PNG of an AI2D diagram with a letter over each label."""
    content, name = load_image_bytes(ref)
    image, _ = image_files.read_image(content, name)
    draw = ImageDraw.Draw(image)
    for label in labels["text"].values():
        (left, top), (right, bottom) = label["rectangle"]
        draw.rectangle((left, top, right, bottom), "white")
        center = (left + right) / 2, (top + bottom) / 2
        font = ImageFont.load_default(max(10, bottom - top))
        draw.text(center, label["replacementText"], "black", font, "mm")
    png = io.BytesIO()
    image.save(png, "PNG")
    return ImageBytes(f"{name}, lettered", png.getvalue())


def parse_mmmu(content, file, notes):
    """Up to seven images, each at its <image 2> in the text, or else in front.

    Lists of choices and of answers are written in Python; the id has the subject.
    """
    for record in content:
        choices, answer = parse_python_list(record["options"]), record["answer"]
        if choices is None:
            raise ValueError(f"options are not a list of texts: {record['options']!r:.80}")
        texts = [record["question"], *choices]
        placed = re.findall(r"<image (\d)>", "\n".join(texts))
        existing = [n for n in "1234567" if record.get(f"image_{n}") is not None]
        in_front = [n for n in existing if n not in placed]
        texts = [re.sub(r"<image \d>", "<image>", text) for text in texts]
        yield {
            **record,
            "question": "<image>\n" * len(in_front) + texts[0],
            "choices": texts[1:],
            "image": [record[f"image_{n}"] for n in (*in_front, *placed)],
            "kind": re.sub(r"^[a-z]+_|_\d+$", "", record["id"]),
            "answers": parse_python_list(answer) or answer,
        }


def parse_python_list(text):
    """Returns the list of texts that Python code spells, or None for something else ("[0, 5)")."""
    try:
        texts = ast.literal_eval(text)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return None  # the first two: nested too deeply
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return texts
    return None


def parse_mmstar(content, file, notes):
    """Splits off the choices: "Options: A: one, B: two", or "Choices:" and a line "(A) one" each.

    A record stays as it is if more text follows the choices: the last one would have no end.
    """
    for record in content:
        question, *options = re.split("\n(?:Options|Choices):", record["question"], maxsplit=1)
        pairs = re.findall(
            r"(?:^|,|\n)\s*\(?([A-Z])[:)](.*?)(?=(?:,|\n)\s*\(?[A-Z][:)]|$)",
            "".join(options).strip(),
            re.DOTALL,
        )
        is_last = not pairs or "\n" not in pairs[-1][1]
        choices = ordered_choices(pairs, record["answer"]) if is_last else []
        yield {**record, "question": question, "choices": choices} if choices else record


def parse_realworldqa(content, file, notes):
    """Most questions have choices, a line each; all end with how to answer."""
    for record in parse_records(content, file, notes):
        pairs = re.findall(r"^([A-Z])\. (.*)", record["question"], re.MULTILINE)
        yield {**record, "choices": ordered_choices(pairs, record["answer"])}


def ordered_choices(pairs, answer):
    """Returns the texts of (letter, text) pairs.

    Returns [] unless the letters are A, B, C, … and the answer is one of them.
    """
    letters = "".join(letter for letter, _ in pairs)
    if LETTERS.startswith(letters) and answer in [*letters]:
        return [text.strip() for _, text in pairs]
    return []


def parse_mme(content, file, notes):
    """A text file per image, a question and its answer on each line.

    The image is beside it or in ../images.
    """
    folder = os.path.dirname(file.name).removesuffix("/questions_answers_YN")
    stem = Path(file.path).stem
    paths = ("{}.jpg", "{}.png", "../images/{}.jpg", "../images/{}.png")
    ref = find_image(stem, paths, file, "", file.name)
    category = os.path.basename(folder)
    for number, line in enumerate(filter(str.strip, content.split("\n")), 1):
        question, _, answer = line.partition("\t")
        yield {
            "id": f"{category}/{stem}/{number}",
            "kind": category,
            "image": ref,
            "answers": answer.strip(),
            # The prompt replaces this sentence, as in LLaVA's llava_mme.jsonl.
            "question": question.replace("Please answer yes or no.", "").strip(),
        }


def parse_mathvista(content, file, notes):
    """The kind is the task; the query has the hint, the question and its choices."""
    for record in content:
        yield {**record, "kind": record["metadata"]["task"]}
