"""LLaVA folders: what transformers computes of a folder we compute too, and what we write transformers reads, with no code of ours."""

import io
import json
from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf
from bench.tokenizer import TEXTS, converted
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from test_huggingface import Read
from test_parity import DECODER, VISION, shake
from tokenizers import AddedToken, pre_tokenizers, processors

import prepare
import sample
from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.checkpoints import huggingface, llava
from nanovlm.checkpoints.checkpoint import (
    export_checkpoint,
    load_checkpoint,
    load_checkpoint_info,
    save_checkpoint,
)
from nanovlm.data import chat_template, dataset, image_processing, packing, tokenizer
from nanovlm.evals import runner
from nanovlm.inference.generate import generate

PINPOINTS = [
    [28, 56],
    [56, 28],
    [56, 56],
    [84, 28],
    [28, 84],
]  # LLaVA-NeXT's own, for tiles of 28 pixels
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # llava-hf/llava-1.5-7b-hf
LLAVA_16_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)  # llava-v1.6-mistral-7b-hf
WORDS = tokenizer.train_tokenizer(
    ["a cat, a catalogue, the category of cats"], 260, ["<s>", "</s>", "<image>"]
)
IMAGE_ID = WORDS.special["<image>"]
SIZES = {
    "square": (31, 31),
    "wide": (90, 25),
    "tall": (20, 83),
    "tiny": (3, 2),
    "a pixel off": (29, 28),
    "exact": (56, 28),
    "large": (200, 133),
}


def picture(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )


def publish(folder, kind="llava", brain="llama", eye="clip", jinja=LLAVA_15, **how):
    """A LLaVA folder as its owners make it: random numbers and config by transformers, its processors and tokenizer beside them."""
    vision = (
        hf.CLIPVisionConfig(**VISION)
        if eye == "clip"
        else hf.SiglipVisionConfig(vision_use_head=eye == "siglip with its head", **VISION)
    )
    text = {
        "llama": hf.LlamaConfig,
        "mistral": lambda **sizes: hf.MistralConfig(sliding_window=None, **sizes),
    }[brain](**DECODER)
    strategy = "default" if eye == "clip" else "full"
    both = dict(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy=strategy,
    )
    model = (
        hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **both)
        )
        if kind == "llava_next"
        else hf.LlavaForConditionalGeneration(hf.LlavaConfig(**both))
    )
    shake(model, 3).save_pretrained(folder)
    square, short = {"height": 28, "width": 28}, {"shortest_edge": 28}
    preprocessor = {
        "llava": {"image_processor_type": "CLIPImageProcessor"},
        "llava_next": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "do_pad": True,
        },
    }[kind]
    preprocessor |= {
        "size": short,
        "crop_size": square,
        "do_center_crop": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "do_convert_rgb": True,
    } | how
    kinds = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
    files = {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {
            "processor_class": kinds[kind],
            "patch_size": 7,
            "image_token": "<image>",
            "num_additional_image_tokens": int(eye == "clip"),
            "vision_feature_select_strategy": strategy,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(jinja)
    WORDS.save(folder)
    return folder


KINDS = {
    "1.5": dict(jinja=LLAVA_15),
    "1.5, padded": dict(jinja=LLAVA_15, image_processor_type="LlavaImageProcessor", do_pad=True),
    "1.5 with SigLIP": dict(eye="siglip", size={"height": 28, "width": 28}),
    "1.6 mistral": dict(kind="llava_next", brain="mistral", jinja=LLAVA_16_MISTRAL),
    "1.6 vicuna": dict(kind="llava_next", jinja=LLAVA_15),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of folder as published, for tests that only read."""
    home = tmp_path_factory.mktemp("published")
    return {name: publish(home / name, **how) for name, how in KINDS.items()}


def whole(folder):
    """(model, processor) as transformers loads them, every tensor used and none missing."""
    kind = {
        "llava": hf.LlavaForConditionalGeneration,
        "llava_next": hf.LlavaNextForConditionalGeneration,
    }
    model, told = kind[
        json.loads((folder / "config.json").read_text())["model_type"]
    ].from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.float().eval(), hf.AutoProcessor.from_pretrained(folder, backend="pil")


def ask(question, count=1):
    return [
        {
            "role": "user",
            "content": [{"type": "image"}] * count + [{"type": "text", "text": question}],
        }
    ]


def seen_by_both(ours, shown, theirs):
    """What join gives of our pictures, with the pixels of transformers in it, which may differ by a level each and by no more."""
    seen = packing.collate_images(shown, ours.image_config)
    tiles_NCYX = (
        (theirs["pixel_values"].flatten(0, -4) * ours.model.std_C11 + ours.model.mean_C11) * 255
    ).round()
    assert (tiles_NCYX - seen["tiles_NCYX"]).abs().max() <= 1
    return seen | {"tiles_NCYX": tiles_NCYX.to(torch.uint8)}


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_sees_and_says_what_transformers_says(kind, size, folders, tmp_path):
    model, processor = whole(folders[kind])
    ours = load_checkpoint(folders[kind], dtype=None)
    picture(SIZES[size]).save(tmp_path / "a.png")
    shown = [image_processing.load_image(tmp_path / "a.png", ours.image_config)]

    prompt = processor.apply_chat_template(ask("a cat?"), add_generation_prompt=True)
    theirs = processor(text=f"<s>{prompt}", images=[picture(SIZES[size])], return_tensors="pt")
    ids = chat_template.encode_prompt(
        ours, [("user", chat_template.place_images("a cat?", 1))], shown
    )
    assert [IMAGE_ID if i == IMAGE_TOKEN_ID else i for i in ids] == theirs["input_ids"][0].tolist()

    seen = seen_by_both(ours, shown, theirs)
    hidden_BTD = ours.model.decoder(
        ours.model.embed(torch.tensor([ids]), **seen), torch.arange(len(ids))[None]
    )
    torch.testing.assert_close(
        ours.model.decoder.lm_head(hidden_BTD), model(**theirs).logits, rtol=1e-4, atol=1e-4
    )

    said = [i for (i,) in generate(ours.model, [ids], **seen, stop=set(), max_tokens=12)]
    assert (
        said
        == model.generate(
            **theirs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
    )


def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {change(name): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def in_memory_names(name):
    """As transformers 5 names them in memory, and as some folders have them."""
    name = name if "lm_head" in name else name.replace("language_model.model.", "language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


SPELLINGS = {
    "transformers 4": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "transformers 5": in_memory_names,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling, folders, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 mistral"])
    rename(folder, SPELLINGS[spelling])
    ours, plain = (
        load_checkpoint(where, dtype=None).model.state_dict()
        for where in (folder, folders["1.6 mistral"])
    )
    assert ours.keys() == plain.keys() and all(
        torch.equal(ours[name], plain[name]) for name in plain
    )


def exported(source, out):
    prepare.export(model=str(source), out=str(out))
    return out


@pytest.mark.parametrize(
    "kind", [*KINDS.values(), KINDS["1.5 with SigLIP"] | {"eye": "siglip with its head"}], ids=str
)
@pytest.mark.parametrize("spell", [lambda name: name, SPELLINGS["transformers 4"]])
def test_a_folder_comes_back_tensor_for_tensor(kind, spell, tmp_path):
    """Through load, our own checkpoint and export, CLIP's last layer and norm too, which LLaVA never reads; its tokenizer byte for byte."""
    folder = publish(tmp_path / "published", **kind)
    rename(folder, spell)
    save_checkpoint(load_checkpoint(folder, dtype=None), tmp_path / "ours")
    out = exported(tmp_path / "ours", tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    whole(out)


def test_shards_and_their_index(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "MAX_SHARD_BYTES", 200_000)
    out = exported(folders["1.5"], tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        len(shards) > 2
        and shards == sorted(set(index["weight_map"].values()))
        and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    )
    tensors = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert max((out / shard).stat().st_size for shard in shards) < 210_000
    whole(out)
    again = load_checkpoint(out, dtype=None).model.state_dict()
    assert all(
        torch.equal(tensor, again[name])
        for name, tensor in load_checkpoint(folders["1.5"], dtype=None).model.state_dict().items()
    )


# ---- our own models, handed on ----
CONVERSATIONS = {
    "a question": [("user", "<image>\nIs it a cat?")],
    "two pictures": [("user", "<image>\n<image>\na or b?")],
    "more": [
        ("system", "Be kind."),
        ("user", "<image>\nIs it a cat?"),
        ("assistant", " It is. "),
        ("user", "Is it a category?"),
    ],
}


def eye_folder(folder, kind, **how):
    """A CLIP or SigLIP alone, as published."""
    model, config = {
        "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
    }[kind]
    shake(model(config(**VISION)), 1).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_resize": True,
                "size": square,
                "resample": 2,
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.3, 0.2, 0.1],
            }
            | how
        )
    )
    return folder


def stitched(home, template, eye="clip", vocabulary=None, decoder={}, words=None, **choices):
    """A checkpoint of ours, stitched of public parts; its tokenizer knows no <image>, its vocabulary ends with the tokenizer's."""
    words = words or tokenizer.train_tokenizer(
        ["a cat, a catalogue, the category of cats. Is it kind?"],
        280,
        chat_template.special_token_names(template),
    )
    sizes = DECODER | {"vocab_size": vocabulary or words.vocab_size} | decoder
    model, config = (
        (hf.MinistralForCausalLM, hf.MinistralConfig)
        if "layer_types" in decoder
        else (hf.MistralForCausalLM, hf.MistralConfig)
        if "sliding_window" in decoder
        else (hf.LlamaForCausalLM, hf.LlamaConfig)
    )
    shake(model(config(**sizes)), 4).save_pretrained(home / "brain")
    words.save(home / "brain")
    prepare.stitch(
        vision=str(eye_folder(home / "eye", eye)),
        decoder=str(home / "brain"),
        out=str(home / "ours"),
        template=template,
        **choices,
    )
    return home / "ours"


def messages(turns, **image):
    """A conversation as transformers wants it: what is said in parts, the pictures first."""
    return [
        {
            "role": role,
            "content": [{"type": "image", **image}] * text.count("<image>")
            + [{"type": "text", "text": text.replace("<image>\n", "")}],
        }
        for role, text in turns
    ]


@torch.no_grad()
def assert_the_same(ours, folder, turns, paths):
    """transformers, given the folder and its own chat template, reads the same ids, computes the same logits and says the same as our checkpoint."""
    model, processor = whole(folder)
    ours = load_checkpoint(ours)
    shown = [image_processing.load_image(path, ours.image_config) for path in paths]
    ids = chat_template.encode_prompt(ours, turns, shown)
    prompt = processor.apply_chat_template(messages(turns), add_generation_prompt=True)
    theirs = processor(
        text=prompt,
        images=[Image.open(path) for path in paths],
        return_tensors="pt",
        add_special_tokens=False,
    )
    image_id = model.config.image_token_id
    assert [image_id if i == IMAGE_TOKEN_ID else i for i in ids] == theirs["input_ids"][0].tolist()
    seen, end = (
        seen_by_both(ours, shown, theirs),
        chat_template.end_token_id(ours.tokenizer, ours.chat_template),
    )
    logits_BTV = ours.model.decoder.lm_head(
        ours.model.decoder(
            ours.model.embed(torch.tensor([ids]), **seen), torch.arange(len(ids))[None]
        )
    )
    torch.testing.assert_close(
        logits_BTV, model(**theirs).logits[..., : logits_BTV.shape[-1]], rtol=1e-4, atol=1e-4
    )
    said = [i for (i,) in generate(ours.model, [ids], **seen, stop={end}, max_tokens=20)]
    assert (
        said == model.generate(**theirs, max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    )


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    "template", ["mistral", "mistral-v1", "chatml", "smollm2", "llama3", "vicuna"]
)
def test_an_exported_model_says_in_transformers_what_it_says_here(template, turns, tmp_path):
    ours = stitched(tmp_path, template)
    out = exported(ours, tmp_path / "out")
    paths = [tmp_path / f"{n}.png" for n in range(sum(text.count("<image>") for _, text in turns))]
    for n, path in enumerate(paths):
        picture((40, 31), n).save(path)
    assert_the_same(ours, out, turns, paths)


# ---- SentencePiece's spaces ----
# Where a text's first space comes from: a normalizer's Prepend (Llama 2), Metaspace before every text that has none, Metaspace before the first alone
# (Mistral v0.3, LLaVA-1.5), nowhere, or from a tokenizer.model.
LAYOUTS = ["prepend", "always", "first", "never", "model"]
SPOKEN = CONVERSATIONS | {
    "one turn": [("user", "Hello")],
    "turns": [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "<image>\ne"),
    ],
    "spaces": [
        ("system", " Be kind. "),
        ("user", "  Is it?  "),
        ("assistant", " It is.  "),
        ("user", " And \n"),
    ],
    "white": [("user", " "), ("assistant", "  b"), ("user", "<image>\n ")],
    "nothing": [("user", ""), ("assistant", ""), ("user", "")],
}
AMID = [
    ("system", "<image>"),
    ("user", "Is <image> like <image>it?"),
    ("assistant", "No."),
    ("user", "<image><image> Or \n<image>"),
]


@cache
def sentencepiece(layout, names):
    """A tokenizer of a few hundred pieces, a tokenizer.json with a post-processor that puts <s> before any text, as published ones have it."""
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS["prose"].split("\n")),
        model_writer=out,
        vocab_size=500,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        control_symbols=[name for name in names if name not in ("<s>", "</s>")],
    )
    if layout == "model":
        return tokenizer.Tokenizer({"tokenizer.model": out.getvalue()})
    spec = converted(out.getvalue())
    if layout != "prepend":
        spec.normalizer, spec.pre_tokenizer = (
            None,
            pre_tokenizers.Metaspace(prepend_scheme=layout, split=False),
        )
    spec.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<unk>", *names)]
    )
    spec.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer.Tokenizer({"tokenizer.json": spec.to_str().encode()})


def names_of(template):
    """The special tokens of tokenizers that a template is used with: every one that it writes; <s> and </s> alone, if it can end with those."""
    every = tuple(dict.fromkeys(["<s>", "</s>", *chat_template.special_token_names(template)]))
    return (
        dict.fromkeys([every, every[:2]])
        if chat_template.TEMPLATES[template]["end"] == "</s>"
        else [every]
    )


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    return load_checkpoint(stitched(tmp_path_factory.mktemp("model"), "chatml", vocabulary=520))


SPACED = [
    (template, names)
    for template, form in chat_template.TEMPLATES.items()
    if not form.get("mute")
    for names in names_of(template)
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "template, names", SPACED, ids=lambda x: x if isinstance(x, str) else f"{len(x)} names"
)
def test_an_exported_template_puts_spaces_where_render_does(
    template, names, layout, whole_model, tmp_path
):
    """By the tokenizer, and by the processor with its pictures, which must not put a start token before a prompt; and the template is known again."""
    ours, out = (
        whole_model._replace(tokenizer=sentencepiece(layout, names), chat_template=template),
        tmp_path / "out",
    )
    export_checkpoint(ours, out)
    processor, image_id, photo = (
        hf.AutoProcessor.from_pretrained(out, backend="pil"),
        ours.tokenizer.vocab_size,
        picture((28, 28)),
    )
    photo.save(tmp_path / "a.png")
    shown = image_processing.load_image(tmp_path / "a.png", ours.image_config)
    how = dict(add_generation_prompt=True, return_dict=False)
    for turns in [*SPOKEN.values(), AMID]:
        ids = [
            image_id if i == IMAGE_TOKEN_ID else i
            for i in chat_template.render_conversation(turns, ours.tokenizer, template)[0]
        ]
        said = [{"role": role, "content": text} for role, text in turns]
        assert processor.tokenizer.apply_chat_template(said, **how) == ids
    for turns in SPOKEN.values():
        asked = messages(turns, image=photo)
        ids = chat_template.encode_prompt(
            ours, turns, [shown] * sum(text.count("<image>") for _, text in turns)
        )
        assert processor.apply_chat_template(asked, tokenize=True, **how)[0] == [
            image_id if i == IMAGE_TOKEN_ID else i for i in ids
        ]
    assert load_checkpoint_info(out).chat_template == template


@pytest.mark.parametrize(
    "template, layout",
    [("mistral", "first"), ("llava", "first"), ("zephyr", "first"), ("mistral-v1", "model")],
)
def test_an_exported_model_with_sentencepiece_says_what_it_says_here(template, layout, tmp_path):
    ours = stitched(tmp_path, template, words=sentencepiece(layout, next(iter(names_of(template)))))
    picture((40, 31)).save(tmp_path / "a.png")
    assert_the_same(
        ours, exported(ours, tmp_path / "out"), CONVERSATIONS["more"], [tmp_path / "a.png"]
    )


def test_llama_cpp_is_told_to_put_no_start_token_before_a_prompt(whole_model, tmp_path):
    gguf = pytest.importorskip("gguf")
    for template, layout in (("zephyr", "first"), ("zephyr", "model"), ("mistral", "first")):
        export_checkpoint(
            whole_model._replace(
                tokenizer=sentencepiece(layout, ("<s>", "</s>")), chat_template=template
            ),
            tmp_path / "out",
        )
        assert gguf.SpecialVocab(tmp_path / "out").add_special_token["bos"] is False


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MADE = {
    "SigLIP before its last layer": dict(eye="siglip", vision_feature_layer=-2),
    "SigLIP un-normed": dict(eye="siglip", vision_feature_layer=-1),
    "a layer from below": dict(vision_feature_layer=2),
    "padded": dict(fit="pad"),
    "cropped": dict(fit="crop"),
    "larger": dict(tile=42),
    "room in the vocabulary": dict(vocabulary=320),
    "a window": dict(decoder={"sliding_window": 9}),
    "tied": dict(decoder={"tie_word_embeddings": True}),
    "llama 3": dict(decoder={"rope_parameters": ROPE}),
    "windows": dict(
        decoder={
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "head_dim": 8,
        }
    ),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_whatever_the_layout_can_say_is_said(made, tmp_path):
    ours = stitched(tmp_path, "chatml", **made)
    picture((90, 31)).save(tmp_path / "a.png")
    assert_the_same(
        ours, exported(ours, tmp_path / "out"), CONVERSATIONS["a question"], [tmp_path / "a.png"]
    )


def test_a_token_for_pictures_is_added_to_a_tokenizer_that_has_none(tmp_path):
    """Its row is the start token's, its id is never said, and the tokenizer's own file stays as it is."""
    ours = stitched(tmp_path, "mistral")
    out, own = exported(ours, tmp_path / "out"), load_checkpoint(ours)
    config, tensors, added = (
        json.loads((out / "config.json").read_text()),
        load_file(out / "model.safetensors"),
        own.tokenizer.vocab_size,
    )
    assert config["image_token_index"] == added and config["text_config"]["vocab_size"] == added + 1
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [added]
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert torch.equal(tensors[name][added], tensors[name][own.tokenizer.special["<s>"]])
    assert (out / "tokenizer.json").read_bytes() == own.tokenizer.files["tokenizer.json"]
    assert hf.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>") == added


def test_the_grid_is_the_one_that_transformers_chooses():
    """The order in which a folder lists its grids decides only where two show as much and waste as much."""
    random = np.random.default_rng(0)
    for _ in range(300):
        size, pinpoints = (
            random.integers(1, 120, 2).tolist(),
            random.permutation(PINPOINTS).tolist(),
        )
        theirs = hf.image_processing_utils.select_best_resolution(size[::-1], pinpoints)
        assert image_processing.select_best_resolution(size, {"pinpoints": pinpoints}) == list(
            theirs
        )


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(shuffle=2), "pixel shuffle by 2: stitch without --shuffle"),
        (dict(tiles=4), "InternVL's tiles: stitch without --tiles"),
        (
            dict(eye="siglip"),
            "a norm after the last layer of the vision encoder: stitch a CLIP or SigLIP folder with --vision_feature_layer=-2",
        ),
    ],
)
def test_what_the_layout_cannot_say_is_refused_with_the_setting_to_train_with(
    change, said, tmp_path
):
    with pytest.raises(UserError, match=said):
        exported(stitched(tmp_path, "chatml", **change), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_public_eye_takes_tiles_and_one_of_ours_has_settled_it(tmp_path):
    ours = stitched(tmp_path, "chatml", tiles=4, tile_choice="area", tile_tags=True, draft=True)
    policy = load_checkpoint(ours).image_config
    image_processing.check_image_config(policy)
    assert {
        name: policy[name] for name in ("fit", "tiles", "thumbnail", "choice", "tags", "draft")
    } == {
        "fit": "tiles",
        "tiles": 4,
        "thumbnail": True,
        "choice": "area",
        "tags": True,
        "draft": True,
    }
    with pytest.raises(UserError, match="--tiles=4 is for a Hugging Face folder; .* has its own"):
        prepare.stitch(
            vision=str(ours), decoder=str(tmp_path / "brain"), out=str(tmp_path / "again"), tiles=4
        )


def test_an_eye_of_another_kind_is_refused():
    vision = dict(tile=28, patch=7, width=20, layers=2, heads=5, intermediate_size=28)
    assert llava.vision_type(vision) == "siglip_vision_model"
    assert (
        llava.vision_type(vision | dict(class_token=True, pre_norm=True, patch_bias=False))
        == "clip_vision_model"
    )
    for other in (
        dict(class_token=True),
        dict(layer_scale=True),
        dict(class_token=True, pre_norm=True),
        dict(patch_bias=False),
    ):
        assert llava.vision_type(vision | other) is None


# ---- what is refused of others' folders ----
def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "file, fields, said",
    [
        ("config.json", {"projector_hidden_act": "relu"}, "projector_hidden_act relu"),
        ("config.json", {"multimodal_projector_bias": False}, "multimodal_projector_bias False"),
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy full",
        ),
        ("config.json", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (
            "config.json",
            {"use_image_newline_parameter": False},
            "use_image_newline_parameter False",
        ),
        ("config.json", {"quantization_config": {}}, "quantization_config"),
        (
            "config.json",
            {"image_grid_pinpoints": [[28, 56]]},
            "image_grid_pinpoints are .*28, 84.* for its preprocessor, .*28, 56.* in config.json",
        ),
        ("config.json", {"model_type": "llava_onevision"}, "type llava_onevision is no LLaVA"),
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[28, 50]]},
            r"pinpoints \[\[28, 50\]\] is no list of heights and widths in whole tiles",
        ),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "choose --fit"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused_by_name(file, fields, said, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 vicuna"])
    edit(folder / file, **fields)
    if "28, 50" in said:
        edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=said):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "kind, config", [("1.5", hf.LlavaConfig), ("1.6 vicuna", hf.LlavaNextConfig)]
)
def test_every_field_that_transformers_knows_is_read_or_changes_nothing(
    kind, config, folders, monkeypatch
):
    """How many tokens a picture takes follows from its tiles, where they go from the prompt; the two parts read their own configs."""
    asked = []
    monkeypatch.setattr(
        llava,
        "read_json",
        lambda path: asked.append(Read(huggingface.read_json(path))) or asked[-1],
    )
    load_checkpoint_info(folders[kind])
    own = config().to_dict().keys() - hf.PretrainedConfig().to_dict().keys()
    assert (
        own - asked[0].asked == {"image_seq_length", "image_token_index", "vision_config"}
        and len(asked) == 1
    )


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("image_newline", "image_comma", "image_comma"),
        ("linear_2.bias", "linear_3.bias", "linear_2.bias is missing"),
        ("vision_tower.pre_", "vision_tower.past_", "pre_layrnorm.weight is missing"),
    ],
)
def test_a_tensor_that_is_missing_or_not_used_is_named(old, new, said, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 vicuna"])
    rename(folder, lambda name: name.replace(old, new))
    with pytest.raises(UserError, match=said):
        load_checkpoint(folder)


# ---- through the doors ----
def test_a_folder_that_states_no_template_gets_the_one_of_its_kind(tmp_path):
    for kind, template in (("1.5", "llava"), ("1.6 mistral", "mistral-v1")):
        folder = publish(tmp_path / kind, **KINDS[kind])
        assert load_checkpoint(folder).chat_template == template
        (folder / "chat_template.jinja").unlink()
        assert load_checkpoint(folder).chat_template == template


def test_a_template_that_nobody_knows_is_said_to_export_which_stores_it(tmp_path):
    folder = publish(tmp_path / "odd", **KINDS["1.5"] | {"jinja": "{{ 'odd' }}"})
    for read in (load_checkpoint, load_checkpoint_info):
        with pytest.raises(
            UserError,
            match="writes 'odd', as none of ours does; name it by --template of .*export. .*: .*vicuna",
        ):
            read(folder)
    with pytest.raises(UserError, match="--template=odd is none of mistral"):
        prepare.export(model=str(folder), out=str(tmp_path / "out"), template="odd")
    prepare.export(model=str(folder), out=str(tmp_path / "out"), template="vicuna")
    assert load_checkpoint(tmp_path / "out").chat_template == "vicuna"
    save_checkpoint(load_checkpoint(tmp_path / "out"), tmp_path / "ours")
    with pytest.raises(
        UserError, match="--template=llava: .*ours is a checkpoint and has its own template"
    ):
        prepare.export(model=str(tmp_path / "ours"), out=str(tmp_path / "again"), template="llava")


def test_sample_takes_a_folder_or_a_name_in_the_cache(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "models--some--llava"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "abc").symlink_to(folders["1.6 mistral"])
    picture((90, 31)).save(tmp_path / "a.png")
    heard = []
    for model in (str(folders["1.6 mistral"]), "some/llava"):
        sample.sample(model=model, image=[str(tmp_path / "a.png")], prompt="a cat?", max_tokens=9)
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1] and heard[0].strip()


def test_many_pictures_of_many_sizes_at_once_are_answered_as_one_by_one(folders, tmp_path):
    ours = load_checkpoint(folders["1.6 vicuna"])
    for name, size in SIZES.items():
        picture(size).save(tmp_path / f"{name}.png")
    shown = {
        name: image_processing.load_image(tmp_path / f"{name}.png", ours.image_config)
        for name in SIZES
    }
    questions = [
        ("a cat?", [shown["wide"]]),
        ("or", [shown["tall"], shown["square"]]),
        ("no", []),
        ("b", [shown["a pixel off"]]),
    ]
    questions = [(chat_template.place_images(text, len(seen)), seen) for text, seen in questions]
    for said, (text, seen) in zip(
        runner.generate_answers(ours, questions, max_tokens=8), questions, strict=True
    ):
        assert said.text == "".join(
            sample.stream_answer(ours, [("user", text)], seen, max_tokens=8)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_is_all_but_the_model_and_reads_no_weights(kind, folders, tmp_path):
    loaded = load_checkpoint(folders[kind], dtype=None)
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in folders[kind].iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    told = load_checkpoint_info(folder)
    assert (
        told.model is None
        and told.fingerprint() == loaded.fingerprint()
        and told.shapes == loaded.shapes
    )
    with pytest.raises(UserError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_stay_as_their_files_have_them(dtype, folders, tmp_path):
    """7B parameters take 14 GB in half precision; read as float32 they would take 28."""
    folder = publish(tmp_path / "half", **KINDS["1.6 vicuna"])
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    kept = load_checkpoint(folder, dtype=sample.WEIGHT_DTYPES["auto"])
    assert {p.dtype for p in kept.model.parameters()} == {dtype}
    assert {
        p.dtype
        for p in load_checkpoint(folder, dtype=sample.WEIGHT_DTYPES["float32"]).model.parameters()
    } == {torch.float32}
    picture((90, 31)).save(tmp_path / "a.png")
    list(
        sample.stream_answer(
            kept,
            [("user", "<image>a")],
            [image_processing.load_image(tmp_path / "a.png", kept.image_config)],
            max_tokens=3,
        )
    )
    out = exported(folder, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
        "torch."
    )


def test_a_llava_next_is_prepared_for_with_pictures_of_any_size(folders, tmp_path):
    """Each takes the tokens that its size asks for, and what training reads of it is what sample.py shows."""
    folder, ours = str(folders["1.6 vicuna"]), load_checkpoint(folders["1.6 vicuna"])
    records = []
    for number, size in enumerate([(60, 40), (20, 90)]):
        Image.fromarray(
            np.random.default_rng(number).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
        ).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "x.json").write_text(json.dumps(records))
    prepare.data(model=folder, source=[str(tmp_path / "x.json")], out=str(tmp_path / "set"))
    samples = dataset.PreparedDataset(tmp_path / "set")
    batch, _ = packing.collate(samples, [[0, 1]])
    shown = [
        image_processing.load_image(tmp_path / f"{number}.png", ours.image_config)
        for number in (0, 1)
    ]
    joined = packing.collate_images(shown, ours.image_config)
    assert len(shown[0].feature_index) != len(shown[1].feature_index) and all(
        batch[name].equal(joined[name]) for name in joined
    )
    for number in (0, 1):
        asked = chat_template.encode_prompt(ours, [("user", "<image>\nWhat?")], [shown[number]])
        assert samples.read(number)[0][: len(asked)].tolist() == asked
    ours.model.train()(**batch).backward()
    assert ours.model.projector.newline.grad.abs().sum() > 0
