"""Whatever a stranger hands over is tried with payloads: nothing of it runs, reads elsewhere, calls out or goes on forever; it is told in a line.

Every payload would leave a file, the `sentinel`, if it ran: a stranger would not stop at that.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import test_huggingface
import test_llava
import test_train
import torch
from conftest import make_vlm
from PIL import EpsImagePlugin, Image
from pyarrow import parquet
from test_parity import clip, publish

import prepare
import sample
import train
from nanovlm import UserError
from nanovlm.checkpoints import huggingface
from nanovlm.checkpoints.checkpoint import Checkpoint, load_checkpoint_info, save_checkpoint
from nanovlm.data import chat_template, dataset, image_files, jinja, tokenizer
from nanovlm.evals import benchmarks, formats
from nanovlm.files import download_pretrained

QUESTION = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "An egg."}]


class Run:
    """A pickle of it calls a function, where it is read freely."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


WAYS = {  # to leave a file
    "os.system": lambda path: Run(os.system, f"touch {path}"),
    "eval": lambda path: Run(eval, f"open({str(path)!r}, 'w').close()"),
    "a method": lambda path: Run(Path.touch, path),
    "a pickle in a pickle": lambda path: Run(pickle.loads, pickle.dumps(Run(Path.touch, path))),
}


@pytest.fixture
def sentinel(tmp_path):
    """Where a payload would leave its mark."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "the payload ran"


@contextlib.contextmanager
def refused(said="."):
    """What is done here ends in a UserError of one line."""
    with pytest.raises(UserError, match=said) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Public folders `eye`, `brain` and `llava`; `model`, a checkpoint of ours; `data`, prepared for it; `run`, which has two steps to go on from;
    `pictures`, a folder with one."""
    home = tmp_path_factory.mktemp("world")
    publish(clip(), home / "eye")
    publish(test_huggingface.llama(), home / "brain")
    test_llava.publish(home / "llava")
    shapes = {
        "vision": test_train.VISION,
        "decoder": test_train.DECODER | {"vocab_size": 260},
        "shuffle": 2,
    }
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    checkpoint = Checkpoint(
        make_vlm(decoder={"vocab_size": 260}),
        words,
        shapes,
        test_train.POLICY,
        "mistral",
        {"random_init": "seed 0"},
    )
    save_checkpoint(checkpoint, home / "model")
    test_train.write_set(home / "data", checkpoint)
    words.save(home / "data")
    (home / "pictures").mkdir()
    Image.new("RGB", (12, 12), "red").save(home / "pictures" / "egg.png")
    train.train(
        **test_train.settings(
            home, "run", steps=4, save_every=2, keep_checkpoints=2, validate_every=4
        )
    )
    return home


@pytest.fixture
def mine(world, tmp_path):
    """mine(name): a copy of a folder of the world, to be spoilt."""
    return lambda name: Path(shutil.copytree(world / name, tmp_path / name))


def ask(model, **settings):
    sample.sample(model=str(model), prompt="What is it?", device="cpu", max_tokens=2, **settings)


def stitch(vision, decoder, out, **settings):
    prepare.stitch(vision=str(vision), decoder=str(decoder), out=str(out), **settings)


def cut(world, source, out, **settings):
    prepare.data(
        model=str(world / "model"),
        source=[str(source)],
        out=str(out),
        seq_len=200,
        workers=1,
        max_skipped=0,
        **settings,
    )


def put(path, content):
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    return path


# ---- the payloads work ----


@pytest.mark.parametrize("way", WAYS)
def test_a_payload_runs_where_a_pickle_is_read_freely(way, tmp_path):
    pickle.loads(pickle.dumps(WAYS[way](tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


# ---- weights ----


def as_zip(thing, path):
    torch.save(thing, path)


def as_legacy(thing, path):
    torch.save(thing, path, _use_new_zipfile_serialization=False)


def as_bare_pickle(thing, path):
    path.write_bytes(pickle.dumps(thing))


def as_legacy_tar(thing, path):
    """PyTorch's layout before 0.1.10, which torch below 2.6 read freely whatever it was told (CVE-2025-32434)."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            add_member(tar, name, pickle.dumps(thing))


FORMATS = [as_zip, as_legacy, as_bare_pickle, as_legacy_tar]


def spoil_weights(folder, write, payload):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write({"model.norm.weight": payload}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("part", ["eye", "brain"])
def test_a_pickle_among_the_weights_of_an_eye_or_a_brain_does_not_run(
    part, write, world, mine, tmp_path, sentinel
):
    spoil_weights(bad := mine(part), write, WAYS["os.system"](sentinel))
    with refused("pytorch_model.bin is broken, cut short .* or holds more than tensors"):
        stitch(
            **{
                "vision": world / "eye",
                "decoder": world / "brain",
                {"eye": "vision", "brain": "decoder"}[part]: bad,
            },
            out=tmp_path / "out",
        )


@pytest.mark.parametrize("write", FORMATS)
def test_a_pickle_among_the_weights_of_a_llava_does_not_run(write, mine, tmp_path, sentinel):
    spoil_weights(bad := mine("llava"), write, WAYS["os.system"](sentinel))
    for use in (ask, lambda model: prepare.export(model=str(model), out=str(tmp_path / "out"))):
        with refused("holds more than tensors"):
            use(bad)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_call_a_function_in_a_pickle_runs(way, mine, sentinel):
    spoil_weights(bad := mine("brain"), as_zip, WAYS[way](sentinel))
    with refused("holds more than tensors"):
        huggingface.read_decoder(bad)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "{folder}/../outside.bin",
        "/etc/passwd",
        "..",
        "a/../../outside.bin",
        "pytorch_model.bin\0",
    ],
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name, mine, tmp_path, sentinel):
    as_zip(WAYS["os.system"](sentinel), tmp_path / "outside.bin")
    (bad := mine("brain")).joinpath("model.safetensors").unlink()
    put(
        bad / "pytorch_model.bin.index.json",
        {"weight_map": {"lm_head.weight": name.format(folder=bad)}},
    )
    with refused("for lm_head.weight, which is not in the folder"):
        huggingface.read_decoder(bad)


def spoil_shards(step, sentinel):
    """A step as FSDP leaves it, with a pickled .metadata as torch.distributed.checkpoint reads one.

    nanovlm refuses any folder that has a .metadata (checkpoints/sharded.py).
    """
    (step / "model.safetensors").unlink()
    (step / "training.safetensors").unlink(missing_ok=True)
    (step / "sharded").mkdir()
    put(step / "sharded" / ".metadata", pickle.dumps(WAYS["os.system"](sentinel)))


def test_a_pickle_beside_shards_does_not_run_when_the_model_is_asked(mine, sentinel):
    spoil_shards(bad := mine("model"), sentinel)
    with refused():
        ask(bad)


def test_a_pickle_beside_shards_does_not_run_when_training_goes_on(world, mine, tmp_path, sentinel):
    run = mine("run")
    shutil.rmtree(run / "step-000004")
    spoil_shards(run / "step-000002", sentinel)
    how = dict(steps=4, save_every=2, keep_checkpoints=2, validate_every=4)
    with refused():
        train.train(**test_train.settings(world, "run", **how) | {"out": str(run), "resume": True})


# ---- code beside the weights ----


@pytest.mark.parametrize("part", ["eye", "brain"])
def test_a_config_that_wants_code_of_its_own_is_refused(part, world, mine, tmp_path, sentinel):
    put((bad := mine(part)) / "modeling_evil.py", f"open({str(sentinel)!r}, 'w')")
    classes = {
        "AutoConfig": "modeling_evil.Config",
        "AutoModel": "modeling_evil.Model",
        "AutoModelForCausalLM": "modeling_evil.Model",
    }
    test_huggingface.edit(bad / "config.json", auto_map=classes, trust_remote_code=True)
    with refused("auto_map"):
        stitch(
            **{
                "vision": world / "eye",
                "decoder": world / "brain",
                {"eye": "vision", "brain": "decoder"}[part]: bad,
            },
            out=tmp_path / "out",
        )


def test_code_that_lies_in_a_folder_is_never_imported(mine, tmp_path, monkeypatch, sentinel):
    """Neither what configs name, nor modules called as those that we import, even where the folder is the one that we stand in."""
    vision, decoder = mine("eye"), mine("brain")
    for folder in (vision, decoder):
        for name in (
            "modeling_evil",
            "jinja2",
            "json",
            "torch",
            "nanovlm",
            "sitecustomize",
            "__init__",
            "conftest",
        ):
            put(folder / f"{name}.py", f"open({str(sentinel)!r}, 'w')")
    classes = {"AutoTokenizer": ["modeling_evil.T", None], "AutoImageProcessor": "modeling_evil.P"}
    for path in (vision / "preprocessor_config.json", decoder / "tokenizer_config.json"):
        test_huggingface.edit(path, auto_map=classes, trust_remote_code=True)
    put(decoder / "generation_config.json", {"custom_generate": "modeling_evil.py"})
    monkeypatch.chdir(decoder)
    stitch(vision, decoder, tmp_path / "out")
    assert (tmp_path / "out" / "nanovlm.json").is_file()


# ---- chat templates ----


def as_jinja_file(folder, template):
    put(folder / "chat_template.jinja", template)


def as_json_file(folder, template):
    put(folder / "chat_template.json", {"chat_template": template})


def in_the_tokenizers_config(folder, template):
    test_huggingface.edit(folder / "tokenizer_config.json", chat_template=template)


def as_one_of_several(folder, template):
    test_huggingface.edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": template}, 5, {}],
    )


PLACES = [as_jinja_file, as_json_file, in_the_tokenizers_config, as_one_of_several]
ESCAPES = [
    "{{ cycler.__init__.__globals__.os.popen('touch PATH').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch PATH') }}",
    "{{ namespace.__init__.__globals__['os'].system('touch PATH') }}",
    "{{ lipsum.__globals__['os'].system('touch PATH') }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch PATH') }}",
    "{{ self.__init__.__globals__.__builtins__.open('PATH', 'w') }}",
    "{{ self._TemplateReference__context.environment.from_string.__globals__ }}",
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}{{ c(['touch', 'PATH']) }}{% endif %}{% endfor %}",
    "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "{{ ''|attr('format')|attr('__self__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",  # CVE-2016-10745
    "{{ ('{0.__class__}'|attr('format'))(messages) }}",  # CVE-2025-27516
    "{% set f = '{0.__init__.__globals__}'.format %}{{ [cycler]|map(f)|list }}",  # CVE-2024-56326
    "{{ messages.append(1) }}",
    "{% include 'PATH' %}",
    "{% import 'os' as os %}{{ os.system('touch PATH') }}",
    "{% extends '/etc/passwd' %}",
]
TOO_MUCH = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**(10**10) }}",
]
ODD = [
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[7].x.y }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ 'x' * 200000 }}",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_template_that_climbs_out_of_its_sandbox_does_not_wherever_it_stands(
    place, world, mine, tmp_path, sentinel
):
    place(bad := mine("brain"), ESCAPES[0].replace("PATH", str(sentinel)))
    with refused("its chat template writes None, as none of ours does"):
        stitch(world / "eye", bad, tmp_path / "out")


def test_a_llavas_template_is_tried_by_each_script_and_climbs_out_of_none(mine, tmp_path, sentinel):
    bad = mine("llava")
    as_jinja_file(bad, ESCAPES[0].replace("PATH", str(sentinel)))
    source = put(
        tmp_path / "a.json",
        [
            {
                "id": 1,
                "conversations": [
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hello"},
                ],
            }
        ],
    )
    for use in (
        ask,
        lambda model: prepare.export(model=str(model), out=str(tmp_path / "out")),
        lambda model: prepare.data(
            model=str(model), source=[str(source)], out=str(tmp_path / "set"), workers=1
        ),
    ):
        with refused("chat template writes None"):
            use(bad)


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_tokenizer(["hello"], 256, ["<s>", "</s>"])


def test_no_known_escape_from_jinjas_sandbox_runs(sentinel):
    for template in ESCAPES:
        text = jinja.render_jinja_template(
            template.replace("PATH", str(sentinel)), {}, chat_template.PROBES[0], False
        )
        assert text is None or not re.search("class|module|function|globals", text), template


@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_that_takes_all_time_or_memory_is_stopped(template, words, monkeypatch):
    monkeypatch.setattr(chat_template, "JINJA_SECONDS", 1)
    with refused("the folder: its chat template did not finish within 1 s and 1024 MiB"):
        chat_template.identify_template(template, {}, words, "the folder")


@pytest.mark.parametrize("template", ODD, ids=range(len(ODD)))
def test_a_template_that_fails_in_its_own_way_is_one_that_refuses(template):
    assert jinja.render_jinja_template(template, {}, chat_template.PROBES[0], False) is None


def test_a_template_that_is_no_text_is_refused(mine):
    as_jinja_file(bad := mine("brain"), b"\xff\xfe{{")
    with refused("as none of ours does"):
        huggingface.read_decoder(bad, tensors=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": 5},
        {"chat_template": [5]},
        {"chat_template": {}},
        {"bos_token": {}},
        {"eos_token": [1]},
    ],
)
def test_a_tokenizers_config_of_the_wrong_kinds_is_harmless_or_refused(fields, mine):
    test_huggingface.edit((bad := mine("brain")) / "tokenizer_config.json", **fields)
    with contextlib.suppress(UserError):
        huggingface.read_decoder(bad, tensors=False)


# ---- tokenizers ----


def with_pattern(words, pattern, lost=()):
    """A tokenizer that cuts texts by a pattern of a stranger's, and has no token for the bytes in `lost`."""
    spec = json.loads(words.files["tokenizer.json"])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ],
    }
    spec["model"]["vocab"] = {
        token: i for token, i in spec["model"]["vocab"].items() if token not in lost
    }
    return {"tokenizer.json": json.dumps(spec).encode()}


def test_a_tokenizer_whose_pattern_tries_every_way_to_cut_gives_up_in_a_line(words):
    slow = tokenizer.Tokenizer(with_pattern(words, r"(?:(?=a)a+)+b|(?s:.)"))
    with refused("pattern does not come to an end with this text: 'aaaa"):
        slow.encode("a" * 3000)


def test_a_tokenizer_that_also_lacks_a_letter_gives_up_in_a_line(words):
    slow = tokenizer.Tokenizer(with_pattern(words, r"(?:a|a|aa|a)+?b|(?s:.)", lost=("z",)))
    with refused("pattern does not come to an end"):
        slow.encode("z" + "a" * 60)


def test_a_set_is_not_prepared_with_a_pattern_that_does_not_end(world, mine, words, tmp_path):
    bad = mine("model")
    own = tokenizer.Tokenizer.load(bad)
    put(bad / "tokenizer.json", with_pattern(own, r"(?:(?=a)a+)+b|(?s:.)")["tokenizer.json"])
    source = put(
        tmp_path / "a.json",
        [
            {
                "id": 1,
                "conversations": [
                    {"from": "human", "value": "a" * 3000},
                    {"from": "gpt", "value": "a"},
                ],
            }
        ],
    )
    with refused("pattern does not come to an end"):
        prepare.data(model=str(bad), source=[str(source)], out=str(tmp_path / "set"), workers=1)


@pytest.mark.parametrize("pattern", ["(", r"(?:(?:x{900}){900}){900}", "(?<a"])
def test_a_pattern_that_is_none_or_too_large_is_refused(pattern, words):
    with refused("is no tokenizer that can be read here"):
        tokenizer.Tokenizer(with_pattern(words, pattern))


# ---- JSON ----

TWISTED = {
    "nested": b"[" * 200_000,
    "objects": b'{"a":' * 100_000,
    "digits": b"9" * 10_000,
    "pickle": pickle.dumps({"a": 1}),
    "no utf-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("twist", TWISTED)
def test_a_json_that_is_nested_too_deep_or_is_none_is_refused_wherever_it_lies(twist, world, mine):
    eye, brain, ours = mine("eye"), mine("brain"), mine("model")
    for read, folder, name in [
        (huggingface.read_vision_encoder, eye, "preprocessor_config.json"),
        (huggingface.read_vision_encoder, eye, "config.json"),
        (huggingface.read_decoder, brain, "tokenizer_config.json"),
        (huggingface.read_decoder, brain, "tokenizer.json"),
        (huggingface.read_decoder, brain, "config.json"),
        (load_checkpoint_info, ours, "nanovlm.json"),
        (dataset.PreparedDataset, mine("data"), "header.json"),
    ]:
        put(folder / name, TWISTED[twist])
        with refused(name):
            read(folder)


@pytest.mark.parametrize("twist", TWISTED)
def test_answers_that_are_no_json_are_refused(twist, tmp_path):
    put(tmp_path / "a.jsonl", TWISTED[twist] + b"\n{}\n")
    with refused("a.jsonl"):
        sample.sample(score=str(tmp_path / "a.jsonl"), benchmark="exact")


def test_an_index_that_is_nested_too_deep_is_refused(mine):
    (bad := mine("brain")).joinpath("model.safetensors").unlink()
    put(bad / "model.safetensors.index.json", TWISTED["nested"])
    with refused("index.json is not JSON"):
        huggingface.read_decoder(bad)


def test_a_config_of_a_billion_layers_is_refused_before_they_are_built(mine):
    test_huggingface.edit((bad := mine("brain")) / "config.json", num_hidden_layers=10**9)
    with refused("num_hidden_layers 1000000000 is more than"):
        huggingface.read_decoder(bad)


# ---- prepared sets ----


@pytest.mark.parametrize("kind", [*dataset.FILE_DTYPES, "header.json"])
def test_an_array_of_pickled_objects_in_place_of_a_file_of_a_set_does_not_run(kind, mine, sentinel):
    bad = mine("data")
    path = bad / kind if kind == "header.json" else bad / "00000" / kind
    array = io.BytesIO()
    np.save(array, np.array([WAYS["os.system"](sentinel)], dtype=object), allow_pickle=True)
    path.write_bytes(
        array.getvalue().ljust(path.stat().st_size, b"\n")[: path.stat().st_size]
    )  # of the size that its header says
    with refused("data"):
        prepare.check(data=str(bad), seq_len=22)
    with contextlib.suppress(UserError):
        prepare.show(data=str(bad), sample="sample-1", out=str(bad / "sample.png"))


def test_pickles_beside_the_files_of_a_set_are_never_read(world, mine, sentinel):
    bad = mine("data")
    for name in ("skipped.jsonl", "cache.pkl", "00000/ids.npy", "00000/receipt.json"):
        put(bad / name, pickle.dumps(WAYS["os.system"](sentinel)))
    prepare.check(data=str(bad), seq_len=22)


@pytest.mark.parametrize(
    "file, width, column, value",
    [
        ("samples", 6, 0, 10**12),
        ("samples", 6, 1, 10**15),
        ("samples", 6, 0, -5),
        ("samples", 6, 3, 10**9),
        ("samples", 6, 1, 2**63 - 1),
        ("images", 4, 1, 10**7),
        ("images", 4, 0, -1),
    ],
)
def test_a_table_that_leads_out_of_its_files_is_refused(file, width, column, value, world, mine):
    path = (bad := mine("data")) / "00000" / file
    table = np.fromfile(path, "<i8").reshape(-1, width)
    table[:, column] = value
    table.tofile(path)
    with refused("lie outside its files"):
        train.train(**test_train.settings(world, "never", data=str(bad)))


# ---- pictures ----


def eps(path):
    """PostScript that starts a program, if Ghostscript reads it; `gs` is ours here."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch {path}) (w) file\nshowpage\n".encode()


def svg(path):
    return f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>touch("{path}")</script></svg>'.encode()


def saved(kind):
    def content(_):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(file, kind)
        return file.getvalue()

    return content


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )


def tiff(entries):
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + tags + bytes(4)


PICTURES = {
    "eps": eps,
    "eps in a doubled header": lambda path: (
        struct.pack("<III", 0xC6D3D0C5, 32, 99) + bytes(20) + eps(path)
    ),
    "svg": svg,
    "a pickle": lambda path: pickle.dumps(WAYS["os.system"](path)),
    "pdf": saved("PDF"),
    "icns": saved("ICNS"),
    "ico": saved("ICO"),
    "pcx": saved("PCX"),
    "tga": saved("TGA"),
    "jpeg 2000": saved("JPEG2000"),
    "sgi": saved("SGI"),
    "xbm": lambda path: b"#define a_width 9\n" * 3,
    "a bomb of a png": lambda path: png(60_000, 60_000),
    "a long png": lambda path: png(1, 20_001),
    "a png of 2^31": lambda path: png(2**31 - 1, 2**31 - 1),
    "a bomb of a png's text": lambda path: png(
        9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23)))
    ),
    "a bomb of a png's profile": lambda path: png(
        9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 23)))
    ),
    "a bomb of a bmp": lambda path: (
        b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "a bomb of a gif": lambda path: (
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0\0;"
    ),
    "a bomb of a ppm": lambda path: b"P6 99999 99999 255\n",
    "a tiff of 2^31": lambda path: tiff(
        [(256, 4, 1, 2**31), (257, 4, 1, 2**31), (259, 3, 1, 1), (273, 4, 1, 8)]
    ),
    "a tiff with a tag of 4 GB": lambda path: tiff(
        [(256, 4, 1, 9), (257, 4, 1, 9), (258, 1, 2**32 - 1, 8), (273, 4, 2**30, 8)]
    ),
    "a tiff that is its own next": lambda path: tiff([])[:-4] + struct.pack("<I", 8),
}


@pytest.fixture
def ghostscript(tmp_path, monkeypatch, sentinel):
    """The program that Pillow would start for PostScript is one that leaves the sentinel."""
    (tmp_path / "bin").mkdir()
    put(tmp_path / "bin" / "gs", f"#!/bin/sh\ntouch {sentinel}\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)


def test_pillow_by_itself_starts_a_program_for_postscript(
    tmp_path, monkeypatch, ghostscript, sentinel
):
    with (
        contextlib.suppress(OSError),
        Image.open(put(tmp_path / "a.png", eps(sentinel))) as picture,
    ):
        picture.load()
    assert sentinel.exists()
    sentinel.unlink()


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_none_of_ours_or_unpacks_to_too_much_is_refused(
    kind, tmp_path, ghostscript, sentinel
):
    path = put(tmp_path / "a.png", PICTURES[kind](sentinel))
    for source in (path, path.read_bytes()):
        with refused("is no image that can be read here|is broken or cut short|pixels"):
            image_files.read_image(source)


def test_postscript_is_refused_by_each_script(world, tmp_path, ghostscript, sentinel):
    bad = put(tmp_path / "a.png", eps(sentinel))
    with refused("a.png is no image"):
        ask(world / "model", image=[str(bad)])
    put(tmp_path / "a.json", [{"id": 1, "image": "a.png", "conversations": QUESTION}])
    with refused("a.png is no image"):
        cut(world, tmp_path / "a.json", tmp_path / "set")
    exam = put(
        tmp_path / "exam.jsonl", {"id": 1, "image": "a.png", "question": "What?", "answers": ["x"]}
    )
    with refused("a.png is no image"):
        sample.sample(model=str(world / "model"), questions=str(exam), device="cpu")


# ---- where pictures are read from ----


@pytest.fixture
def no_network(monkeypatch):
    def called(*_):
        raise AssertionError("something was fetched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, called)
    monkeypatch.setattr(socket, "getaddrinfo", called)


ELSEWHERE = [
    "/etc/passwd",
    "{home}/secret.png",
    "../secret.png",
    "deep/../../secret.png",
    "link/../secret.png",
    "../pictures/../secret.png",
    "file://{home}/secret.png",
    "file:///etc/passwd",
    "http://127.0.0.1/secret.png",
    "https://example.org/a.png",
    "//example.org/a.png",
    "data:image/png;base64,AAAA",
    "~/secret.png",
    "$HOME/secret.png",
    "/dev/zero",
    "/proc/self/environ",
    "|touch x",
    "",
    ".",
    "\0",
]


def hide(home):
    """Pictures that records may name, beside one that they may not; also beside where a link of theirs leads."""
    for folder in ("pictures/deep", "other/linked"):
        (home / folder).mkdir(parents=True)
    for path in (home / "secret.png", home / "other" / "secret.png", home / "pictures" / "egg.png"):
        Image.new("RGB", (12, 12), "red").save(path)
    (home / "pictures" / "link").symlink_to(home / "other" / "linked")
    with zipfile.ZipFile(home / "pictures.zip", "w") as pack:
        for name in ("egg.png", "../secret.png", str(home / "secret.png")):
            pack.write(home / "secret.png", name)
        (link := zipfile.ZipInfo("link")).external_attr = 0o120777 << 16
        pack.writestr(link, "/etc/passwd")


@pytest.mark.parametrize("images", ["pictures", "pictures.zip", ""])
def test_a_record_names_no_picture_outside_its_folder_and_none_is_fetched(
    images, world, tmp_path, no_network
):
    hide(tmp_path)
    beside = {"images": str(tmp_path / images)} if images else {}
    source = tmp_path / "pictures" / "a.json"
    put(source, [{"id": 1, "image": "egg.png", "conversations": QUESTION}])
    cut(world, source, tmp_path / "good", **beside)
    named = [
        name.format(home=tmp_path)
        for name in [*ELSEWHERE, *(["link"] if images == "pictures.zip" else [])]
    ]
    put(
        source,
        [{"id": i, "image": name, "conversations": QUESTION} for i, name in enumerate(named)],
    )
    with refused(f"{len(named)} of {len(named)} samples cannot be used"):
        cut(world, source, tmp_path / "set", **beside)
    for name in filter(str.strip, named):
        exam = put(
            tmp_path / "pictures" / "exam.jsonl",
            {"id": 1, "image": name, "question": "What?", "answers": ["x"]},
        )
        with refused("climbs out|no such image"):
            benchmarks.load_questions("exact", str(exam), images=beside.get("images", ""))


def add_member(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def test_members_of_a_tar_that_would_lie_outside_or_lead_there_are_skipped_and_nothing_is_unpacked(
    world, tmp_path
):
    hide(tmp_path)
    picture = (tmp_path / "secret.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../unpacked", f"{tmp_path}/unpacked", "a/../../unpacked"):
            add_member(tar, f"{name}.png", picture)
            add_member(tar, f"{name}.txt", b"An egg.")
        links = [
            (tarfile.SYMTYPE, tmp_path / "secret.png"),
            (tarfile.LNKTYPE, "../secret.png"),
            (tarfile.CHRTYPE, ""),
        ]
        for number, (kind, target) in enumerate(links):
            add_member(tar, f"{number}.png", type=kind, linkname=str(target))
            add_member(tar, f"{number}.txt", b"An egg.")
        add_member(
            tar,
            "9.json",
            json.dumps({"image": str(tmp_path / "secret.png"), "caption": "x"}).encode(),
        )
    with refused("7 of 7 samples cannot be used"):
        cut(world, tmp_path / "a.tar", tmp_path / "set")
    assert not list(tmp_path.parent.rglob("unpacked*"))


def test_a_zip_of_questions_unpacks_nothing_and_reads_nothing_outside(tmp_path):
    hide(tmp_path)
    exam = {"id": 1, "image": "../secret.png", "question": "What?", "answers": ["x"]}
    with zipfile.ZipFile(tmp_path / "exam.zip", "w") as pack:
        pack.writestr("a/exam.jsonl", json.dumps(exam))
        pack.writestr("../evil.png", b"")
    with refused("no such image|climbs out"):
        benchmarks.load_questions("exact", str(tmp_path / "exam.zip"))
    assert not list(tmp_path.parent.glob("evil.png"))


def test_a_parquet_whose_columns_are_of_a_pickled_type_does_not_run(world, tmp_path, sentinel):
    """CVE-2023-47248: pyarrow below 14.0.1 unpickled what such a file says of itself."""
    marks = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(WAYS["os.system"](sentinel)),
    }
    schema = pyarrow.schema(
        [
            pyarrow.field("caption", pyarrow.string(), metadata=marks),
            pyarrow.field("image", pyarrow.string()),
        ]
    )
    parquet.write_table(
        pyarrow.table({"caption": ["An egg."], "image": ["egg.png"]}, schema=schema),
        tmp_path / "a.parquet",
    )
    with contextlib.suppress(UserError):
        cut(world, tmp_path / "a.parquet", tmp_path / "set", images=str(world / "pictures"))


# ---- what is written as Python ----

PYTHON = [
    "__import__('os').system('touch PATH')",
    "[__import__('os').system('touch PATH')]",
    "[" * 100_000,
    "-" * 100_000 + "1",
    "{" * 300,
    "[" + "(" * 5000 + ")" * 5000 + "]",
    "9" * 10_000,
    "['a' * 10**10]",
    "['a'\0]",
    '[f\'{open("PATH", "w")}\']',
    "'a'.__class__",
    "\ud800",
    "1+" * 50_000 + "1",
]


@pytest.mark.parametrize("text", PYTHON, ids=range(len(PYTHON)))
def test_a_list_written_as_python_is_read_and_never_run(text, tmp_path, sentinel):
    assert formats.parse_python_list(text.replace("PATH", str(sentinel))) is None
    record = {
        "id": "test_Art_1",
        "question": "What?",
        "options": text.replace("PATH", str(sentinel)),
        "answer": "A",
        "image_1": "egg.png",
    }
    with refused("a.json"):
        benchmarks.load_questions("mmmu", str(put(tmp_path / "a.json", [record])))


# ---- a folder of somebody's answers ----


def test_what_a_question_says_cannot_become_part_of_a_report(world, tmp_path):
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    exam = put(
        tmp_path / "exam.jsonl",
        {"id": evil, "kind": evil, "image": "egg.png", "question": evil, "answers": [evil]},
    )
    sample.sample(
        model=str(world / "model"),
        questions=str(exam),
        images=str(world / "pictures"),
        device="cpu",
        max_tokens=2,
        out=str(tmp_path / "a.jsonl"),
        report=str(tmp_path / "a.html"),
    )
    page = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page


def test_a_model_of_somebodys_is_never_fetched_with_code():
    asked = []

    files = [
        "config.json",
        "modeling_evil.py",
        "model.safetensors",
        "pytorch_model.bin",
        "evil.pkl",
        "a/b.json",
    ]

    class Hub:
        list_repo_files = staticmethod(lambda name: files)
        snapshot_download = staticmethod(
            lambda name, allow_patterns: asked.extend(allow_patterns) or "."
        )

    download_pretrained("some/body", Hub)
    assert asked == ["config.json", "model.safetensors"]
