"""Files of strangers, tried with payloads: nothing in them runs, reads files elsewhere, uses the
network or runs forever; each ends in an error of one line.

Every payload would write a file, the `sentinel`, if it ran. A real one would do worse.
"""

import contextlib
import io
import json
import math
import os
import pickle
import re
import resource
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
import test_hf_nanovlm
import test_huggingface
import test_idefics3
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
from nanovlm.checkpoints import hf_nanovlm, huggingface, idefics3, llava
from nanovlm.checkpoints.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint_info,
    save_checkpoint,
)
from nanovlm.data import dataset, image_files, jinja, jinja_template, tokenizer
from nanovlm.evals import benchmarks, formats
from nanovlm.files import download_pretrained
from nanovlm.models.decoder import Decoder
from nanovlm.models.vision_encoder import VisionEncoder

QUESTION = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "An egg."}]


class Run:
    """Its pickle calls a function if it is loaded without weights_only."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


WAYS = {  # to write a file
    "os.system": lambda path: Run(os.system, f"touch {path}"),
    "eval": lambda path: Run(eval, f"open({str(path)!r}, 'w').close()"),
    "a method": lambda path: Run(Path.touch, path),
    "a pickle in a pickle": lambda path: Run(pickle.loads, pickle.dumps(Run(Path.touch, path))),
}


@pytest.fixture
def sentinel(tmp_path):
    """The file that a payload would write."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "the payload ran"


@contextlib.contextmanager
def refused(message="."):
    """The code inside raises a UserError of one line."""
    with pytest.raises(UserError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Published folders `vision`, `decoder` and `llava`; `model`, a nanovlm checkpoint; `data`,
    prepared for it; `run`, with two steps to resume from; `images`, a folder with one image."""
    home = tmp_path_factory.mktemp("world")
    publish(clip(), home / "vision")
    publish(test_huggingface.llama(), home / "decoder")
    test_llava.publish(home / "llava")
    test_idefics3.publish(home / "idefics3", **test_idefics3.KINDS["SmolVLM2"])
    test_hf_nanovlm.publish(home / "nanovlm", **test_hf_nanovlm.KINDS["460M-8k"])
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
        test_train.IMAGE_CONFIG,
        "mistral",
        {"random_init": "seed 0"},
    )
    save_checkpoint(checkpoint, home / "model")
    test_train.write_set(home / "data", checkpoint)
    words.save(home / "data")
    (home / "images").mkdir()
    Image.new("RGB", (12, 12), "red").save(home / "images" / "egg.png")
    train.train(
        **test_train.settings(
            home, "run", steps=4, save_every=2, keep_checkpoints=2, validate_every=4
        )
    )
    return home


@pytest.fixture
def copied(world, tmp_path):
    """copied(name): a copy of a folder of the world, for a test that changes it."""
    return lambda name: Path(shutil.copytree(world / name, tmp_path / name))


def answer(model, **settings):
    sample.sample(model=str(model), prompt="What is it?", device="cpu", max_tokens=2, **settings)


def stitch(vision, decoder, out, **settings):
    prepare.stitch(vision=str(vision), decoder=str(decoder), out=str(out), **settings)


def prepare_data(world, source, out, **settings):
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
def test_a_payload_runs_if_a_pickle_is_loaded_freely(way, tmp_path):
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
    """PyTorch's layout before 0.1.10. torch below 2.6 loads it freely, also with weights_only
    (CVE-2025-32434)."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            add_member(tar, name, pickle.dumps(thing))


FORMATS = [as_zip, as_legacy, as_bare_pickle, as_legacy_tar]


def spoil_weights(folder, write, payload):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write({"model.norm.weight": payload}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_pickle_among_the_weights_of_a_part_does_not_run(
    part, write, world, copied, tmp_path, sentinel
):
    spoil_weights(bad := copied(part), write, WAYS["os.system"](sentinel))
    with refused("pytorch_model.bin is broken, cut short .* or holds more than tensors"):
        parts = {"vision": world / "vision", "decoder": world / "decoder", part: bad}
        stitch(**parts, out=tmp_path / "out")


@pytest.mark.parametrize("write", FORMATS)
def test_a_pickle_among_the_weights_of_a_llava_does_not_run(write, copied, tmp_path, sentinel):
    spoil_weights(bad := copied("llava"), write, WAYS["os.system"](sentinel))
    for use in (answer, lambda model: prepare.export(model=str(model), out=str(tmp_path / "out"))):
        with refused("holds more than tensors"):
            use(bad)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_call_a_function_in_a_pickle_runs(way, copied, sentinel):
    spoil_weights(bad := copied("decoder"), as_zip, WAYS[way](sentinel))
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
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name, copied, tmp_path, sentinel):
    as_zip(WAYS["os.system"](sentinel), tmp_path / "outside.bin")
    (bad := copied("decoder")).joinpath("model.safetensors").unlink()
    put(
        bad / "pytorch_model.bin.index.json",
        {"weight_map": {"lm_head.weight": name.format(folder=bad)}},
    )
    with refused("for lm_head.weight, which is not in the folder"):
        huggingface.read_decoder(bad)


def spoil_shards(step, sentinel):
    """Turn a step into one of FSDP, with the pickled .metadata of torch.distributed.checkpoint.

    nanovlm refuses any folder that has a .metadata (checkpoints/sharded.py).
    """
    (step / "model.safetensors").unlink()
    (step / "training.safetensors").unlink(missing_ok=True)
    (step / "sharded").mkdir()
    put(step / "sharded" / ".metadata", pickle.dumps(WAYS["os.system"](sentinel)))


def test_a_pickle_beside_shards_does_not_run_in_sample(copied, sentinel):
    spoil_shards(bad := copied("model"), sentinel)
    with refused():
        answer(bad)


def test_a_pickle_beside_shards_does_not_run_when_training_resumes(
    world, copied, tmp_path, sentinel
):
    run = copied("run")
    shutil.rmtree(run / "step-000004")
    spoil_shards(run / "step-000002", sentinel)
    how = dict(steps=4, save_every=2, keep_checkpoints=2, validate_every=4)
    with refused():
        train.train(**test_train.settings(world, "run", **how) | {"out": str(run), "resume": True})


# ---- code beside the weights ----


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_config_that_wants_code_of_its_own_is_refused(part, world, copied, tmp_path, sentinel):
    put((bad := copied(part)) / "modeling_evil.py", f"open({str(sentinel)!r}, 'w')")
    classes = {
        "AutoConfig": "modeling_evil.Config",
        "AutoModel": "modeling_evil.Model",
        "AutoModelForCausalLM": "modeling_evil.Model",
    }
    test_huggingface.edit(bad / "config.json", auto_map=classes, trust_remote_code=True)
    with refused("auto_map"):
        parts = {"vision": world / "vision", "decoder": world / "decoder", part: bad}
        stitch(**parts, out=tmp_path / "out")


def test_code_in_a_models_folder_is_never_imported(copied, tmp_path, monkeypatch, sentinel):
    """Neither what configs name, nor modules with the names of those that nanovlm imports, even if
    the folder is the working directory."""
    vision, decoder = copied("vision"), copied("decoder")
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
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'PATH']) }}{% endif %}{% endfor %}",
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
    "{{ 'x'.join('y' * 10**8) }}",
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
def test_an_escape_from_the_sandbox_fails_wherever_the_template_is(
    place, world, copied, tmp_path, sentinel
):
    place(bad := copied("decoder"), ESCAPES[0].replace("PATH", str(sentinel)))
    with refused("its chat template fails, or takes more than 1 s"):
        stitch(world / "vision", bad, tmp_path / "out")


def test_an_escape_in_a_llavas_template_fails_in_each_script(copied, tmp_path, sentinel):
    bad = copied("llava")
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
        answer,
        lambda model: prepare.export(model=str(model), out=str(tmp_path / "out")),
        lambda model: prepare.data(
            model=str(model), source=[str(source)], out=str(tmp_path / "set"), workers=1
        ),
    ):
        with refused("chat template fails"):
            use(bad)


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_tokenizer(["hello"], 256, ["<s>", "</s>"])


def test_no_known_escape_from_jinjas_sandbox_runs(sentinel):
    for template in ESCAPES:
        text = jinja.render_jinja_template(
            template.replace("PATH", str(sentinel)), {}, jinja_template.PROBES[0], False
        )
        assert text is None or not re.search("class|module|function|globals", text), template


@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_that_takes_too_much_time_or_memory_is_not_known(template, words):
    """Its process is stopped after two seconds of CPU time, one of which may be its start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with refused("the folder: its chat template fails, or takes more than 1 s or 256 MiB; name it"):
        jinja_template.identify_template(template, {}, words, "the folder")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("template", ODD, ids=range(len(ODD)))
def test_a_template_that_raises_any_error_refuses_the_conversation(template):
    assert jinja.render_jinja_template(template, {}, jinja_template.PROBES[0], False) is None


def test_a_template_that_is_not_text_is_refused(copied):
    as_jinja_file(bad := copied("decoder"), b"\xff\xfe{{")
    with refused("chat_template.jinja is not text in UTF-8"):
        huggingface.read_decoder(bad, tensors=False)
    for encoding in ("cp1252", "utf-16"):
        as_jinja_file(bad, "{{ bos_token }}é’".encode(encoding))
        with refused("chat_template.jinja is not text in UTF-8"):
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
def test_a_tokenizers_config_of_the_wrong_kinds_is_harmless_or_refused(fields, copied):
    test_huggingface.edit((bad := copied("decoder")) / "tokenizer_config.json", **fields)
    with contextlib.suppress(UserError):
        huggingface.read_decoder(bad, tensors=False)


# ---- tokenizers ----


def with_pattern(words, pattern, lost=()):
    """A tokenizer that splits texts by `pattern`, and has no token for the bytes in `lost`."""
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


def test_a_pattern_that_backtracks_forever_is_stopped(words):
    slow = tokenizer.Tokenizer(with_pattern(words, r"(?:(?=a)a+)+b|(?s:.)"))
    with refused("pattern does not come to an end with this text: 'aaaa"):
        slow.encode("a" * 3000)


def test_a_tokenizer_that_lacks_a_letter_leaves_it_out_whatever_its_pattern(words):
    slow = tokenizer.Tokenizer(with_pattern(words, r"(?:a|a|aa|a)+?b|(?s:.)", lost=("z",)))
    assert slow.decode(slow.encode("z" + "a" * 60)) == "a" * 60


def test_data_is_not_prepared_with_a_pattern_that_backtracks_forever(
    world, copied, words, tmp_path
):
    bad = copied("model")
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
def test_an_invalid_or_too_large_pattern_is_refused(pattern, words):
    with refused("cannot be read as a tokenizer"):
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
def test_invalid_or_too_deeply_nested_json_is_refused_in_each_file(twist, world, copied):
    vision, decoder, ours = copied("vision"), copied("decoder"), copied("model")
    for read, folder, name in [
        (huggingface.read_vision_encoder, vision, "preprocessor_config.json"),
        (huggingface.read_vision_encoder, vision, "config.json"),
        (huggingface.read_decoder, decoder, "tokenizer_config.json"),
        (huggingface.read_decoder, decoder, "tokenizer.json"),
        (huggingface.read_decoder, decoder, "config.json"),
        (load_checkpoint_info, ours, "nanovlm.json"),
        (dataset.PreparedDataset, copied("data"), "header.json"),
    ]:
        put(folder / name, TWISTED[twist])
        with refused(name):
            read(folder)


@pytest.mark.parametrize("twist", TWISTED)
def test_answers_that_are_no_json_are_refused(twist, tmp_path):
    put(tmp_path / "a.jsonl", TWISTED[twist] + b"\n{}\n")
    with refused("a.jsonl"):
        sample.sample(score=str(tmp_path / "a.jsonl"), benchmark="exact")


def test_an_index_that_is_nested_too_deep_is_refused(copied):
    (bad := copied("decoder")).joinpath("model.safetensors").unlink()
    put(bad / "model.safetensors.index.json", TWISTED["nested"])
    with refused("index.json is not JSON"):
        huggingface.read_decoder(bad)


def test_a_config_of_a_billion_layers_is_refused_before_they_are_built(copied):
    test_huggingface.edit((bad := copied("decoder")) / "config.json", num_hidden_layers=10**9)
    with refused("num_hidden_layers 1000000000 is not a whole number from 1 on, at most 1,024"):
        huggingface.read_decoder(bad)


ODD_VALUES = [None, "zzz", "1e-05", [], [[7]], {}, {"a": 1}, True, 0, -1, -5.5, 2.5, 10**9, 10**400]
ODD_VALUES += [math.nan, math.inf, 1e300]


def edits(value):
    """Yields (names, copy of a JSON value) with one field, nested ones too, set to each of ODD_VALUES, and
    once without it."""
    fields = list(value) if isinstance(value, dict) else range(len(value))
    for field in fields:
        for odd in ODD_VALUES:
            yield (
                f"{field} {odd!r:.20}",
                {**value, field: odd}
                if isinstance(value, dict)
                else [*value[:field], odd, *value[field + 1 :]],
            )
        if isinstance(value, dict):
            yield f"no {field}", {name: value[name] for name in fields if name != field}
        if isinstance(value[field], dict | list):
            for name, inner in edits(value[field]):
                changed = value.copy()
                changed[field] = inner
                yield f"{field}: {name}", changed


def read_and_build(part, folder):
    """What reads a folder's configs; then the model is built without memory."""
    read = {
        "vision": lambda: huggingface.read_vision_encoder(folder, tensors=False),
        "decoder": lambda: huggingface.read_decoder(folder, template="chatml", tensors=False),
        "llava": lambda: llava.read_llava(folder, template="llama2", tensors=False),
        "idefics3": lambda: idefics3.read_idefics3(folder, template="smolvlm", tensors=False),
        "nanovlm": lambda: hf_nanovlm.read_hf_nanovlm(folder, template="nanovlm", tensors=False),
        "model": lambda: load_checkpoint_info(folder),
    }
    found = read[part]()
    with torch.device("meta"):
        if part == "vision":
            VisionEncoder(**found.shapes["vision"])
        elif part == "decoder":
            Decoder(**found.shapes["decoder"])
        else:
            build_model(found.shapes, found.image_config)


@pytest.mark.parametrize(
    "part, name",
    [
        ("vision", "config.json"),
        ("vision", "preprocessor_config.json"),
        ("decoder", "config.json"),
        ("llava", "config.json"),
        ("llava", "preprocessor_config.json"),
        ("idefics3", "config.json"),
        ("idefics3", "preprocessor_config.json"),
        ("nanovlm", "config.json"),
        ("model", "nanovlm.json"),
    ],
)
def test_any_odd_value_in_a_config_is_refused_in_one_line_or_harmless(part, name, copied):
    path = (folder := copied(part)) / name
    read_and_build(part, folder)
    # these read the others' fields by the same functions, or have very many
    step = 7 if part in ("llava", "idefics3", "nanovlm") else 1
    for edit, content in list(edits(json.loads(path.read_text())))[::step]:
        path.write_text(json.dumps(content))
        try:
            read_and_build(part, folder)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, edit
        except Exception as error:
            pytest.fail(f"{name}, {edit}: {type(error).__name__} {error}")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("std", [0.5, -5.5, 0.5], "std .* is not three numbers"),
        ("std", [0.5, 0, 0.5], "std .* is not three numbers"),
        ("fit", "zzz", "fit 'zzz' is not one of"),
        ("tile", 10**9, "tile 1000000000 is not a whole number from 1 on, at most 8,192"),
        ("tile", 24, "image config differs from the shapes"),
        ("chat_template", "zzz", "chat_template 'zzz' is not one of mistral"),
        ("eps", "1e-05", "nanovlm.json: .* eps '1e-05'"),
        ("rope_theta", math.nan, "rope_theta nan"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}, "RoPE of 8 numbers"),
        ("heads", 5, "2 key/value heads do not divide 5 heads"),
        ("layers", 10**9, "layers 1000000000"),
        ("activation", "zzz", "activation 'zzz'"),
    ],
)
def test_a_false_number_in_nanovlm_json_is_named(field, value, message, copied):
    path = copied("model") / "nanovlm.json"
    meta = json.loads(path.read_text())
    if field == "activation":
        part = meta["shapes"]["vision"]
    elif field in meta:
        part = meta
    else:
        part = meta["image_config" if field in meta["image_config"] else "shapes"]
        part = part if field in part else part["decoder"]
    part[field] = value
    path.write_text(json.dumps(meta))
    with refused(message):
        load_checkpoint_info(path.parent)


# ---- prepared data ----


@pytest.mark.parametrize("kind", [*dataset.FILE_DTYPES, "header.json"])
def test_an_array_of_pickled_objects_in_place_of_prepared_data_does_not_run(kind, copied, sentinel):
    bad = copied("data")
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


def test_pickles_beside_prepared_data_are_never_read(world, copied, sentinel):
    bad = copied("data")
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
def test_a_table_with_offsets_outside_its_files_is_refused(
    file, width, column, value, world, copied
):
    path = (bad := copied("data")) / "00000" / file
    table = np.fromfile(path, "<i8").reshape(-1, width)
    table[:, column] = value
    table.tofile(path)
    with refused("lie outside its files"):
        train.train(**test_train.settings(world, "never", data=str(bad)))


# ---- images ----


def eps(path):
    """PostScript that starts a program, if Ghostscript reads it. `gs` is a test's script here."""
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return f"{header}(%pipe%touch {path}) (w) file\nshowpage\n".encode()


def svg(path):
    content = f'<image href="file:///etc/passwd"/><script>touch("{path}")</script>'
    return f'<svg xmlns="http://www.w3.org/2000/svg">{content}</svg>'.encode()


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


IMAGES = {
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
    """The program that Pillow would start for PostScript writes the sentinel."""
    (tmp_path / "bin").mkdir()
    put(tmp_path / "bin" / "gs", f"#!/bin/sh\ntouch {sentinel}\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)


def test_pillow_by_itself_starts_a_program_for_postscript(
    tmp_path, monkeypatch, ghostscript, sentinel
):
    with contextlib.suppress(OSError), Image.open(put(tmp_path / "a.png", eps(sentinel))) as image:
        image.load()
    assert sentinel.exists()
    sentinel.unlink()


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_of_another_format_or_of_too_many_pixels_is_refused(
    kind, tmp_path, ghostscript, sentinel
):
    path = put(tmp_path / "a.png", IMAGES[kind](sentinel))
    for source in (path, path.read_bytes()):
        with refused("is not an image that can be read here|is broken or cut short|pixels"):
            image_files.read_image(source)


def test_postscript_is_refused_by_each_script(world, tmp_path, ghostscript, sentinel):
    bad = put(tmp_path / "a.png", eps(sentinel))
    with refused("a.png is not an image"):
        answer(world / "model", image=[str(bad)])
    put(tmp_path / "a.json", [{"id": 1, "image": "a.png", "conversations": QUESTION}])
    with refused("a.png is not an image"):
        prepare_data(world, tmp_path / "a.json", tmp_path / "set")
    questions = put(
        tmp_path / "questions.jsonl",
        {"id": 1, "image": "a.png", "question": "What?", "answers": ["x"]},
    )
    with refused("a.png is not an image"):
        sample.sample(model=str(world / "model"), questions=str(questions), device="cpu")


# ---- where images are read from ----


@pytest.fixture
def no_network(monkeypatch):
    def called(*_):
        raise AssertionError("something was downloaded")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, called)
    monkeypatch.setattr(socket, "getaddrinfo", called)


ELSEWHERE = [
    "/etc/passwd",
    "{home}/secret.png",
    "../secret.png",
    "deep/../../secret.png",
    "link/../secret.png",
    "../images/../secret.png",
    "file://{home}/secret.png",
    "file:///etc/passwd",
    "http://127.0.0.1/secret.png",
    "https://example.org/a.png",
    "//example.org/a.png",
    "data:image/png;base64,AAAA",  # which is not an image
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
    """Write images that records may name, beside one that they may not; a link leads to a folder
    beside another."""
    for folder in ("images/deep", "other/linked"):
        (home / folder).mkdir(parents=True)
    for path in (home / "secret.png", home / "other" / "secret.png", home / "images" / "egg.png"):
        Image.new("RGB", (12, 12), "red").save(path)
    (home / "images" / "link").symlink_to(home / "other" / "linked")
    with zipfile.ZipFile(home / "images.zip", "w") as pack:
        for name in ("egg.png", "../secret.png", str(home / "secret.png")):
            pack.write(home / "secret.png", name)
        (link := zipfile.ZipInfo("link")).external_attr = 0o120777 << 16
        pack.writestr(link, "/etc/passwd")


@pytest.mark.parametrize("images", ["images", "images.zip", ""])
def test_a_record_names_no_image_outside_its_folder_and_none_is_downloaded(
    images, world, tmp_path, no_network
):
    hide(tmp_path)
    beside = {"images": str(tmp_path / images)} if images else {}
    source = tmp_path / "images" / "a.json"
    put(source, [{"id": 1, "image": "egg.png", "conversations": QUESTION}])
    prepare_data(world, source, tmp_path / "good", **beside)
    named = [
        name.format(home=tmp_path)
        for name in [*ELSEWHERE, *(["link"] if images == "images.zip" else [])]
    ]
    put(
        source,
        [{"id": i, "image": name, "conversations": QUESTION} for i, name in enumerate(named)],
    )
    with refused(f"{len(named)} of {len(named)} samples cannot be used"):
        prepare_data(world, source, tmp_path / "set", **beside)
    for name in (name for name in named if name.strip() and not name.startswith("data:")):
        questions = put(
            tmp_path / "images" / "questions.jsonl",
            {"id": 1, "image": name, "question": "What?", "answers": ["x"]},
        )
        with refused("climbs out|no such image|is a URL"):
            benchmarks.load_questions("exact", str(questions), images=beside.get("images", ""))


def add_member(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def test_members_of_a_tar_outside_its_folder_are_skipped_and_nothing_is_unpacked(world, tmp_path):
    hide(tmp_path)
    image = (tmp_path / "secret.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../unpacked", f"{tmp_path}/unpacked", "a/../../unpacked"):
            add_member(tar, f"{name}.png", image)
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
        prepare_data(world, tmp_path / "a.tar", tmp_path / "set")
    assert not list(tmp_path.parent.rglob("unpacked*"))


def test_a_zip_of_questions_unpacks_nothing_and_reads_nothing_outside(tmp_path):
    hide(tmp_path)
    questions = {"id": 1, "image": "../secret.png", "question": "What?", "answers": ["x"]}
    with zipfile.ZipFile(tmp_path / "questions.zip", "w") as pack:
        pack.writestr("a/questions.jsonl", json.dumps(questions))
        pack.writestr("../evil.png", b"")
    with refused("not text in UTF-8|not JSON"):
        benchmarks.load_questions("exact", str(tmp_path / "questions.zip"))
    assert not list(tmp_path.parent.glob("evil.png"))


def test_a_parquet_whose_columns_are_of_a_pickled_type_does_not_run(world, tmp_path, sentinel):
    """CVE-2023-47248: pyarrow below 14.0.1 unpickles the metadata of such a file."""
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
        prepare_data(world, tmp_path / "a.parquet", tmp_path / "set", images=str(world / "images"))


# ---- lists in Python's syntax ----

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


# ---- reports and downloads ----


def test_a_questions_text_is_escaped_in_a_report(world, tmp_path):
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    questions = put(
        tmp_path / "questions.jsonl",
        {"id": evil, "kind": evil, "image": "egg.png", "question": evil, "answers": [evil]},
    )
    sample.sample(
        model=str(world / "model"),
        questions=str(questions),
        images=str(world / "images"),
        device="cpu",
        max_tokens=2,
        out=str(tmp_path / "a.jsonl"),
        report=str(tmp_path / "a.html"),
    )
    page = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page


def test_a_model_is_never_downloaded_with_code():
    downloaded = []

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
            lambda name, allow_patterns: downloaded.extend(allow_patterns) or "."
        )

    download_pretrained("some/body", Hub)
    assert downloaded == ["config.json", "model.safetensors"]
