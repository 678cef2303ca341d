"""Whatever kind of collection it is, the same samples come out of it, and what is wrong with one never stops the others."""

import collections
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
import zipfile
from pathlib import Path

import pyarrow
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from nanovlm import UserError
from nanovlm.data import chat_template, dataset, image_refs
from nanovlm.preprocess import readers, records


def jpeg(seed):
    picture = io.BytesIO()
    Image.new("RGB", (5 + seed, 7), (seed, 90, 20)).save(picture, "JPEG")
    return picture.getvalue()


PICTURES = {f"{seed}.jpg": jpeg(seed) for seed in range(4)}


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


COLLECTION = [
    {
        "id": "one",
        "image": "0.jpg",
        "conversations": talk("<image>\nWhat is it?", "An egg.", "And its colour?", "White."),
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
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def put(path, content):
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    return str(path)


def as_json(folder):
    return put(folder / "list.data", COLLECTION)


def as_lines(folder):
    return put(folder / "lines.data", "\n\n".join(map(json.dumps, COLLECTION)))


def named(record):
    value = record.get("image", record.get("images", []))
    return [value] if isinstance(value, str) else value


def without_pictures(record):
    return {name: value for name, value in record.items() if name not in ("image", "images")}


def as_tar(folder):
    with webdataset.TarWriter(str(folder / "tar.data")) as tar:
        for record in COLLECTION:
            pictures = {f"{i}.jpg": PICTURES[name] for i, name in enumerate(named(record))}
            tar.write({"__key__": str(record["id"]), **pictures, "json": without_pictures(record)})
    return str(folder / "tar.data")


def as_parquet(folder):
    """In columns that all have in common, as Hugging Face datasets has it: a struct of bytes and path, None where a record has no such field."""
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
        without_pictures(record)
        | {
            "id": str(record["id"]),
            "images": [{"bytes": PICTURES[name], "path": name} for name in named(record)],
        }
        for record in COLLECTION
    ]
    table = pyarrow.Table.from_pylist([{field: row.get(field) for field in fields} for row in rows])
    parquet.write_table(table, folder / "parquet.data", row_group_size=3)
    return str(folder / "parquet.data")


def shown(raws, images=""):
    """[(id, turns, bytes of the pictures)], a reason in place of what cannot be used; every Raw and ref has been pickled on its way."""
    found = []
    for raw in raws:
        raw = pickle.loads(pickle.dumps(raw))
        assert isinstance(readers.record_digest(raw), bytes)
        try:
            sample = pickle.loads(pickle.dumps(readers.make_sample(raw, images)))
            found.append(
                (
                    sample.name,
                    sample.turns,
                    [readers.load_image_bytes(ref)[0] for ref in sample.images],
                )
            )
        except UserError as mistake:
            assert mistake.reason and "\n" not in str(mistake), mistake
            found.append(mistake.reason)
    return found


def reasons(raws, images=""):
    return [found for found in shown(raws, images) if isinstance(found, str)]


# ---- one collection, however it is kept ----


@pytest.mark.parametrize("keep", [as_json, as_lines, as_tar, as_parquet])
def test_a_collection_is_the_same_however_it_is_kept(folder, keep):
    """No name helps: the kind of a file shows in its first bytes."""
    found = shown(readers.read_records([keep(folder)]))
    assert [name for name, _, _ in found] == [str(record["id"]) for record in COLLECTION]
    assert [pictures for _, _, pictures in found] == [
        [PICTURES[name] for name in named(record)] for record in COLLECTION
    ]
    turns = {name: said for name, said, _ in found}
    for record in COLLECTION[:4]:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        assert turns[str(record["id"])] == [
            (roles[turn["from"]], turn["value"]) for turn in record["conversations"]
        ]
    assert turns["five"] == [
        ("user", f"<image>\nHow many?\n{chat_template.SHORT_PROMPT}"),
        ("assistant", "two"),
    ]
    assert turns["six"] == [
        ("user", f"<image>\nWhich?\nA. egg\nB. milk\n{chat_template.LETTER_PROMPT}"),
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


def test_several_sources_follow_one_another_in_the_order_given_and_shards_in_that_of_their_names(
    folder,
):
    (shards := folder / "shards").mkdir()
    for number in (10, 2, 1):
        with webdataset.TarWriter(str(shards / f"{number:02d}.tar")) as tar:
            tar.write({"__key__": f"{number}", "jpg": PICTURES["0.jpg"], "txt": "An egg."})
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


def test_pictures_in_a_zip_are_those_in_a_folder(folder):
    (folder / "elsewhere").mkdir()
    source = put(
        folder / "elsewhere" / "a.json", [{**COLLECTION[0], "image": "./0.jpg"}, *COLLECTION[1:]]
    )
    with zipfile.ZipFile(folder / "pictures", "w", zipfile.ZIP_DEFLATED) as pack:
        for name in PICTURES:
            pack.write(folder / name, name)
    zipped = str(folder / "pictures")
    assert shown(readers.read_records([source], str(folder)), str(folder)) == shown(
        readers.read_records([source], zipped), zipped
    )
    assert image_refs.open_zip(zipped, 1) is not image_refs.open_zip(
        zipped, 2
    )  # each process has its own place in the file


def test_absolute_paths_are_good_in_a_json_alone_and_within_the_folder_of_its_pictures(folder):
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
    assert reasons(readers.read_records([str(folder / "a.tar")]), str(folder)) == [
        "path climbs out"
    ]


def test_ids_are_texts_or_numbers_and_where_there_is_none_it_is_the_place(folder):
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
    assert listed == [
        "a b",
        "odd.json:2",
        "odd.json:3",
        r"'a\nb'",
        r"'\ud800'",
    ]  # what cannot be used has an id to be listed by
    assert [sample.where for sample in samples][2:4] == [
        f"{source}, sample 3 (1.5)",
        f"{source}, sample 4",
    ]


# ---- kinds of records ----


def turns_of(record, pictures=0, name="x"):
    return records.record_turns(record, name, pictures, "here")


def test_openai_parts_become_text_with_the_pictures_in_place():
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "image"},
        {"type": "text", "text": "with"},
        {"type": "image_url", "image_url": {"url": "b"}},
    ]
    said = [
        {"role": "system", "content": parts[:1]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Done."},
    ]
    assert turns_of({"conversations": [], "messages": said}, 2) == turns_of({"messages": said}, 2)
    assert turns_of({"messages": said}, 2) == [
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


def test_pictures_without_a_place_in_a_conversation_are_never_guessed():
    with pytest.raises(UserError, match="0 <image> in its text but 1 images"):
        turns_of({"conversations": talk("What is it?", "An egg.")}, 1)
    with pytest.raises(UserError, match="1 <image> in its text but 2 images"):
        turns_of({"question": "What is in <image>?", "answer": "An egg."}, 2)
    assert turns_of({"question": "What is in <image>?", "answer": "An egg."}, 1)[0][1].startswith(
        "What is in <image>?\n"
    )


def test_an_answer_is_drawn_by_its_weight_and_always_the_same():
    """Over many ids the shares are the weights': within five standard deviations of a binomial."""
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
            ("user", f"Which?\nA. egg\nB. milk\nC. 7\n{chat_template.LETTER_PROMPT}"),
            ("assistant", "C"),
        ]
    assert turns_of({"question": "How?", "choices": [], "answer": "Well."})[1] == (
        "assistant",
        "Well.",
    )  # an open question among others with choices


def test_captions_are_asked_for_in_llavas_eleven_ways_by_the_id_alone():
    """Each as often as the others, among those held out as well: the hash is not the one that holds out."""
    names = [str(name) for name in range(20_000)]
    asked = {name: turns_of({"caption": "An egg."}, 1, name)[0][1] for name in names}
    for chosen in (names, [name for name in names if dataset.is_validation(name)]):
        counts = collections.Counter(asked[name] for name in chosen)
        assert (
            set(counts) == {f"<image>\n{prompt}" for prompt in records.CAPTION_PROMPTS}
            and len(counts) == 11
        )
        assert max(counts.values()) - min(counts.values()) < 10 * math.sqrt(len(chosen) / 11)
    paired = [
        turns_of({"caption": list(records.CAPTION_PROMPTS)}, 1, name) for name in names[:1000]
    ]
    assert (
        50 < sum(asked.endswith(answer) for (_, asked), (_, answer) in paired) < 150
    )  # 91: which of several captions is another draw
    assert turns_of({"text": ["An egg."]}, 2)[0][1].startswith("<image>\n<image>\n")
    with pytest.raises(UserError, match="a caption, but no image"):
        turns_of({"caption": "An egg."})


# ---- WebDataset ----


def test_megatrons_own_shards(folder):
    """examples/multimodal/convert_llava_pretrain_to_wds.py: a jpg and LLaVA's list of turns under the sample's id."""
    with webdataset.ShardWriter(str(folder / "pretrain-%d.tar"), maxcount=2, verbose=0) as shards:
        for number in range(5):
            turns = json.dumps(talk("<image>\nWhat?", f"Egg {number}")).encode()
            shards.write(
                {"__key__": f"{number:09d}", "jpg": PICTURES[f"{number % 4}.jpg"], "json": turns}
            )
    found = shown(readers.read_records([str(folder / "pretrain-*.tar")]))
    assert found == [
        (
            f"{number:09d}",
            [("user", "<image>\nWhat?"), ("assistant", f"Egg {number}")],
            [PICTURES[f"{number % 4}.jpg"]],
        )
        for number in range(5)
    ]


def test_what_webdataset_reads_is_what_we_read(folder):
    """Keys with folders, members that are no pictures, upper case, several pictures, notes beside a caption (img2dataset)."""
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
    assert [(name, set(pictures)) for name, _, pictures in found] == theirs
    assert [turns[1][1] for _, turns, _ in found] == ["An egg.", "Two eggs.", "Milk."]
    with tarfile.open(folder / "a.tar") as tar:  # several pictures in the order of the members
        order = [
            tar.extractfile(member).read()
            for member in tar
            if member.name.startswith("train/2") and member.name.endswith("jpg")
        ]
    assert found[1][2] == order and len(order) == 2
    assert readers.tar_key("./shards/000012.left.JPG") == (
        "shards/000012",
        "jpg",
    )  # as `tar -c .` names them


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def add_sample(tar, key):
    add(tar, f"{key}.jpg", PICTURES["0.jpg"])
    add(tar, f"{key}.txt", b"An egg.")


@pytest.mark.parametrize(
    "name, fields, reason",
    [
        ("../b.jpg", {}, "unsafe name of a tar member"),
        ("x/../../b.jpg", {}, "unsafe name of a tar member"),
        ("/etc/b.jpg", {}, "unsafe name of a tar member"),
        ("b\n.jpg", {}, "unsafe name of a tar member"),
        ("b\udcff.jpg", {}, "unsafe name of a tar member"),
        ("..", {}, None),
        (
            "b.jpg",
            dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "a tar member is no plain file",
        ),
        ("b.jpg", dict(type=tarfile.LNKTYPE, linkname="a.jpg"), "a tar member is no plain file"),
        ("b.jpg", dict(type=tarfile.CHRTYPE), "a tar member is no plain file"),
        ("b.jpg", dict(type=tarfile.FIFOTYPE), "a tar member is no plain file"),
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
        ("a.txt", {"content": b"again"}, "two texts under one key"),
        ("b.json", {"content": b"[" * 40 + b"]" * 40}, "nested too deep"),
        ("b.txt", {"content": b" " * (readers.MAX_TEXT + 1)}, "text too large"),
        (
            "b.jpg",
            {"pax_headers": {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}},
            "a tar member is no plain file",
        ),
    ],
)
def test_an_odd_member_is_skipped_with_its_reason_and_the_samples_beside_it_are_not(
    tmp_path, name, fields, reason
):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "0")
        add_sample(tar, "a")
        add(tar, name, **fields)
        add_sample(tar, "c")
    found = shown(readers.read_records([str(tmp_path / "a.tar")]))
    good = ["0", "c"] if reason == "two texts under one key" else ["0", "a", "c"]
    assert [sample[0] for sample in found if not isinstance(sample, str)] == good
    assert [sample for sample in found if isinstance(sample, str)] == [reason] * bool(reason)


def test_a_sample_with_one_odd_member_is_skipped_as_a_whole(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "a")
        add(tar, "b.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(tar, "b.txt", b"An egg.")
    assert [
        found if isinstance(found, str) else found[0]
        for found in shown(readers.read_records([str(tmp_path / "a.tar")]))
    ] == ["a", "a tar member is no plain file"]


def test_a_tar_cut_short_is_refused_wherever_it_is_cut_and_never_read_as_a_shorter_one(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in "abc":
            add_sample(tar, key)
    whole = (tmp_path / "a.tar").read_bytes()
    end = (
        len(whole.rstrip(b"\0")) // 512 * 512 + 512
    )  # the last member's last block; behind it stands the end mark
    for length in [*range(600, end + 512, 256), end + 512, len(whole)]:
        path = put(tmp_path / "cut.tar", whole[:length])
        try:
            count = len(list(readers.read_records([path])))
        except UserError as mistake:
            assert "damaged or cut short" in str(mistake) and length < end + 512
        else:
            assert count == 3 and length >= end + 512


def test_a_tar_whose_sizes_lead_back_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add_sample(tar, "a")
        member = tarfile.TarInfo("b.txt")
        member.size = -1024
        tar.addfile(member)
    with pytest.raises(UserError, match="the size of 'b.txt' is -1024"):
        readers.read_records([str(tmp_path / "a.tar")])


def test_a_tar_of_many_members_is_never_held_as_a_whole(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in range(200):
            add_sample(tar, key)
    del tar  # which remembers what it wrote
    gc.collect()
    raws = readers.read_records([str(tmp_path / "a.tar")])
    read = [next(raws) for _ in range(199)]
    assert (
        sum(type(thing) is tarfile.TarInfo for thing in gc.get_objects()) < 10 and len(read) == 199
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
    """In a zip that has members of such names, and in a folder beside which such a file lies."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name in ("evil.jpg", "pictures/0.jpg"):
        (tmp_path / name).write_bytes(PICTURES["0.jpg"])
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    pack = zip_of(
        tmp_path / "pictures.zip",
        {
            name: PICTURES["0.jpg"]
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
    for images in (pack, str(tmp_path / "pictures")):
        assert reasons(readers.read_records([source], images), images) == [reason]


def test_a_member_that_cannot_be_unpacked_is_told(tmp_path):
    pack = zip_of(tmp_path / "a.zip", {"0.jpg": b"x" * 100, "1.jpg": b"y" * 100})
    put(Path(pack), Path(pack).read_bytes().replace(b"y" * 100, b"z" * 100))
    ref = image_refs.ZipMember(pack, "0.jpg")
    assert readers.load_image_bytes(ref) == (b"x" * 100, f"{pack}/0.jpg")
    with pytest.raises(UserError, match="a.zip/1.jpg cannot be unpacked: Bad CRC-32"):
        readers.load_image_bytes(image_refs.ZipMember(pack, "1.jpg"))


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(image_refs.MAX_IMAGE_BYTES + 1)  # a hole: it takes no room
    with pytest.raises(UserError, match="more than the 1,073,741,824 of an image") as caught:
        readers.load_image_bytes(image_refs.ImageFile(str(tmp_path / "a.jpg")))
    assert caught.value.reason == "image too large"
    with pytest.raises(UserError, match="ends after 0 of 5 bytes") as caught:
        readers.load_image_bytes(
            image_refs.TarMember(
                str(tmp_path / "a.jpg"), "0.jpg", image_refs.MAX_IMAGE_BYTES + 1, 5
            )
        )
    assert caught.value.reason == "image cut short"
    with pytest.raises(UserError, match="No such file"):
        readers.load_image_bytes(image_refs.ImageFile(str(tmp_path / "b.jpg")))


# ---- parquet ----


def test_parquet_of_plain_bytes_or_paths_without_ids(folder):
    rows = [
        {"image": PICTURES.get(name), "caption": "An egg."} for name in ("0.jpg", "none", "1.jpg")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    found = shown(readers.read_records([str(folder)]))
    assert [found[0][0], found[1], found[2][0]] == ["a.parquet:1", "no image", "a.parquet:3"]
    assert [found[i][2] for i in (0, 2)] == [[PICTURES["0.jpg"]], [PICTURES["1.jpg"]]]
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


# ---- what is no source ----


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (
            b"\xff\xd8\xff\xe0 a photograph",
            "is neither JSON nor an unpacked tar nor parquet: it begins with",
        ),
        (b"id,text\n", "it begins with b'id,text"),
        (b"\x1f\x8b\x08", "is packed by gzip"),
        (b"BZh9", "is packed by bzip2"),
        (b"[]", "holds no samples"),
        (b"\n\n", "begins with"),
        (b"[1, 2", "is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"{'id': 1}", "line 1 is not JSON"),
        (b'{"id":\n1}', "line 1 is not JSON"),
        (b"PAR1", "cannot be read beyond row 0"),
        (b"\0" * 257 + b"ustar", "damaged or cut short"),
        (b"[5]", "sample 1 is no object: 5"),
        (
            b'{"a": 5}\n',
            "line 1 is no known kind of record (of a conversation, a question with answers or choices, a caption): {'a': 5}",
        ),
        (b'[{"id": 1, "question": "Why?"}]', "sample 1 is no known kind of record"),
        (b"\0" * 2000, "begins with"),
    ],
)
def test_a_source_of_no_known_kind_is_refused_before_any_work_and_quoted(tmp_path, content, said):
    good = put(tmp_path / "good.json", [COLLECTION[2]])
    with pytest.raises(UserError) as caught:
        readers.read_records([good, put(tmp_path / "a.json", content)])
    assert (
        said in str(caught.value)
        and str(tmp_path / "a.json") in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_sources_and_pictures_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    good = put(tmp_path / "good.json", [COLLECTION[2]])
    for paths, images, said in [
        ([], "", "no source"),
        (["nowhere.json"], "", "no such file: nowhere.json"),
        (["no-*.tar"], "", "no such file: no-*.tar"),
        ([str(tmp_path / "empty")], "", "holds neither .tar nor .parquet"),
        ([good], "nowhere", "--images=nowhere: no such folder or zip"),
        ([good], good, "is neither a folder nor a zip"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            readers.read_records(paths, images)


def test_a_first_record_that_is_only_broken_stops_nothing(folder):
    """The kind of a source is known from its first records that can be read at all."""
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
        "no conversation",
        "no known kind of record",
        "broken JSON",
    ]


def test_reading_keeps_no_file_open(folder):
    opened = len(os.listdir("/proc/self/fd"))
    raws = readers.read_records([as_lines(folder), as_tar(folder), as_parquet(folder)])
    assert (
        len(os.listdir("/proc/self/fd")) == opened
    )  # a thousand shards would else be a thousand files
    next(raws)
    del raws
    assert len(os.listdir("/proc/self/fd")) == opened


# ---- dirt ----

GOOD = {"id": "x", "image": "0.jpg", "conversations": talk("<image>\nWhat?", "An egg.")}
ASKED = {"id": "x", "question": "What?", "answers": ["a", "b"]}
CHOSEN = {"id": "x", "question": "What?", "choices": ["a", "b"], "answer": "A"}


@pytest.mark.parametrize(
    "record, reason",
    [
        (5, "no known kind of record"),
        (None, "no known kind of record"),
        ([], "no known kind of record"),
        ({}, "no known kind of record"),
        (GOOD | {"id": True}, "id is not one line of text"),
        (GOOD | {"id": ["a"]}, "id is not one line of text"),
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
        (GOOD | {"conversations": []}, "no conversation"),
        (GOOD | {"conversations": "text"}, "no conversation"),
        (GOOD | {"conversations": [None]}, "no conversation"),
        (GOOD | {"conversations": talk("<image>", 5)}, "no conversation"),
        (GOOD | {"conversations": talk("<image>", "\ud800")}, "half a character"),
        (GOOD | {"extra": json.loads("[" * 50 + "]" * 50)}, "nested too deep"),
        ({"id": "x", "texts": [{"user": "a"}]}, "turn is no text"),
        ({"id": "x", "texts": []}, "no conversation"),
        ({"id": "x", "texts": 5}, "turn is no text"),
        (ASKED | {"question": {}}, "question is no text"),
        (ASKED | {"answers": []}, "empty answer"),
        (ASKED | {"answers": [""]}, "empty answer"),
        (ASKED | {"answers": [None]}, "answer is no text"),
        (ASKED | {"weights": [1]}, "wrong weights"),
        (ASKED | {"weights": [1, -1]}, "wrong weights"),
        (ASKED | {"weights": [1, float("nan")]}, "wrong weights"),
        (ASKED | {"weights": ["1", 1]}, "wrong weights"),
        (ASKED | {"weights": 7}, "wrong weights"),
        (ASKED | {"weights": [True, 1]}, "wrong weights"),
        (ASKED | {"weights": [0, 0]}, "empty answer"),
        (ASKED | {"weights": [10**400, 1]}, "wrong weights"),
        (ASKED | {"weights": [5e-324] * 2}, "empty answer"),
        (CHOSEN | {"answer": "C"}, "no right choice"),
        (CHOSEN | {"answer": 2}, "no right choice"),
        (CHOSEN | {"answer": -1}, "no right choice"),
        (CHOSEN | {"answer": ""}, "no right choice"),
        (CHOSEN | {"answer": "AB"}, "no right choice"),
        (CHOSEN | {"answer": True}, "no right choice"),
        (CHOSEN | {"answer": 1.0}, "no right choice"),
        (CHOSEN | {"choices": "ab"}, "choices are no list"),
        (CHOSEN | {"choices": ["a"] * 27}, "choices are no list"),
        (CHOSEN | {"choices": ["a", None]}, "choice is no text"),
        ({"id": "x", "caption": "An egg."}, "no image"),
        ({"id": "x", "image": "0.jpg", "caption": {}}, "answer is no text"),
    ],
)
def test_a_dirty_record_is_skipped_with_its_reason(folder, record, reason):
    for name, content in [
        ("a.json", json.dumps([COLLECTION[0], record, COLLECTION[0]])),
        ("a.jsonl", "\n".join(json.dumps(line) for line in (COLLECTION[0], record, COLLECTION[0]))),
    ]:
        found = shown(readers.read_records([put(folder / name, content)]))
        assert found[0] == found[2] and not isinstance(found[0], str)
        assert found[1] == ("no conversation" if record == [] and name == "a.jsonl" else reason)


# ---- identity and stamps ----


def test_only_the_same_id_with_the_same_content_is_the_same_sample(folder):
    other = [
        COLLECTION[0] | {"conversations": talk("<image>\nAnd this?", "An egg.")},
        COLLECTION[0] | {"id": "other"},
        COLLECTION[0] | {"image": "1.jpg"},
        {name: value for name, value in COLLECTION[6].items() if name != "id"},
    ]
    reversed_fields = dict(reversed(COLLECTION[0].items()))
    first, *others, same = map(
        readers.record_digest,
        readers.read_records(
            [put(folder / "a.json", [COLLECTION[0], *other, other[-1], reversed_fields])]
        ),
    )
    assert same == first and len({first, *others}) == 1 + len(others)  # two without an id are two
    lines = list(map(readers.record_digest, readers.read_records([as_lines(folder)])))
    assert (
        lines == list(map(readers.record_digest, readers.read_records([as_json(folder)])))
        and len(set(lines)) == len(COLLECTION)
        and first == lines[0]
    )


def test_two_pictures_of_one_name_in_two_folders_are_two(folder):
    (folder / "other").mkdir()
    pictured, blind = (
        [
            readers.record_digest(*readers.read_records([put(place / "a.json", [record])]))
            for place in (folder, folder / "other")
        ]
        for record in (COLLECTION[0], COLLECTION[2])
    )
    assert pictured[0] != pictured[1] and blind[0] == blind[1]


def test_in_containers_pictures_count_as_well(folder):
    """One key, one caption, another picture: of another size in a tar, of other bytes in a parquet file."""
    seen = set()
    for name, picture in (("a", b"12"), ("b", b"123"), ("c", b"124")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            add(tar, "0.jpg", picture)
            add(tar, "0.txt", b"An egg.")
        parquet.write_table(
            pyarrow.Table.from_pylist([{"id": 0, "image": picture, "caption": "An egg."}]),
            folder / f"{name}.parquet",
        )
    tars = [
        readers.record_digest(*readers.read_records([str(folder / f"{name}.tar")]))
        for name in "abc"
    ]
    assert tars[0] != tars[1] == tars[2]
    seen = {
        readers.record_digest(*readers.read_records([str(folder / f"{name}.parquet")]))
        for name in "abc"
    }
    assert len(seen) == 3


def test_a_source_that_is_named_twice_is_refused(folder):
    """By its name and by a pattern: its samples would weigh double, or half of what was asked for be left out."""
    path = str(folder / "b.tar")
    os.replace(as_tar(folder), path)
    for twice in ([path, path], [path, str(folder / "*.tar")]):
        with pytest.raises(UserError, match=f"{path} is named twice among the sources"):
            readers.read_records(twice)


def test_stamps_tell_when_a_source_has_changed(folder):
    paths, pack = [as_json(folder), str(folder / "*.tar")], zip_of(folder / "a.zip", PICTURES)
    for name in ("b.tar", "a.tar"):
        os.replace(as_tar(folder), folder / name)
    before = readers.source_stamps(paths, pack)
    assert list(before) == [paths[0], str(folder / "a.tar"), str(folder / "b.tar"), pack]
    assert before == readers.source_stamps(paths, pack) and set(
        readers.source_stamps(paths, str(folder))
    ) == set(before) - {pack}
    assert before[pack] == [os.path.getsize(pack), os.stat(pack).st_mtime_ns]
    os.utime(folder / "b.tar", ns=(1, 1))
    assert [
        path for path, stamp in readers.source_stamps(paths, pack).items() if stamp != before[path]
    ] == [str(folder / "b.tar")]


# ---- whatever comes, it is skipped or refused ----

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
    """Bytes changed, cut out, doubled or lost at the end, at one to four places."""
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
@settings(
    max_examples=150, derandomize=True, **BOUNDED
)  # the same bytes each time: Arrow is a world of its own
@given(seed=st.integers(0, 2**32))
def test_damaged_sources_are_read_as_far_as_can_be_or_refused(folder, keep, seed):
    path = keep(folder)
    put(Path(path), damaged(Path(path).read_bytes(), seed))
    try:
        shown(readers.read_records([path]))
    except UserError as mistake:
        assert "\n" not in str(mistake)


@settings(max_examples=150, **BOUNDED)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_zip_of_pictures_gives_what_it_can_or_is_refused(folder, seed):
    path = as_json(folder)
    pack = zip_of(folder / "a.zip", PICTURES)
    put(Path(pack), damaged(Path(pack).read_bytes(), seed))
    image_refs.open_zip.cache_clear()  # the file has changed under the same name
    try:
        assert len(shown(readers.read_records([path], pack), pack)) == len(COLLECTION)
    except UserError as mistake:
        assert "\n" not in str(mistake)
