"""LLaVA folders: nanovlm computes what transformers computes, and transformers reads what nanovlm
writes, with no code of ours."""

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
from nanovlm.checkpoints.checkpoint import load_checkpoint, load_checkpoint_info, save_checkpoint
from nanovlm.checkpoints.llava import export_checkpoint
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
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() "
    "+ ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', "
    "'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content "
    "in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% "
    "for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% "
    "endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # llava-hf/llava-1.5-7b-hf
LLAVA_16_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + "
    "message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% for content in "
    "message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in "
    "message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> "
    "'}}{% else %}"
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


def noise_image(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )


def publish(folder, kind="llava", decoder="llama", encoder="clip", jinja=LLAVA_15, **fields):
    """Write a LLaVA folder as its owners publish it: random weights and config by transformers,
    processors and tokenizer beside them. fields: of its preprocessor_config.json."""
    vision = (
        hf.CLIPVisionConfig(**VISION)
        if encoder == "clip"
        else hf.SiglipVisionConfig(vision_use_head=encoder == "siglip with its head", **VISION)
    )
    text = {
        "llama": hf.LlamaConfig,
        "mistral": lambda **sizes: hf.MistralConfig(sliding_window=None, **sizes),
    }[decoder](**DECODER)
    strategy = "default" if encoder == "clip" else "full"
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
    } | fields
    kinds = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
    files = {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {
            "processor_class": kinds[kind],
            "patch_size": 7,
            "image_token": "<image>",
            "num_additional_image_tokens": int(encoder == "clip"),
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
    "1.5 with SigLIP": dict(encoder="siglip", size={"height": 28, "width": 28}),
    "1.6 mistral": dict(kind="llava_next", decoder="mistral", jinja=LLAVA_16_MISTRAL),
    "1.6 vicuna": dict(kind="llava_next", jinja=LLAVA_15),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind, for tests that only read."""
    home = tmp_path_factory.mktemp("published")
    return {name: publish(home / name, **options) for name, options in KINDS.items()}


def load_in_transformers(folder):
    """Returns (model, processor) of transformers. Every tensor is used and none is missing."""
    kind = {
        "llava": hf.LlavaForConditionalGeneration,
        "llava_next": hf.LlavaNextForConditionalGeneration,
    }
    model, info = kind[
        json.loads((folder / "config.json").read_text())["model_type"]
    ].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.float().eval(), hf.AutoProcessor.from_pretrained(folder, backend="pil")


def messages_of(question, count=1):
    return [
        {
            "role": "user",
            "content": [{"type": "image"}] * count + [{"type": "text", "text": question}],
        }
    ]


def same_images(ours, images, theirs):
    """Returns collate_images of our images, which have the pixels of transformers."""
    inputs = packing.collate_images(images, ours.image_config)
    pixels_NCYX = theirs["pixel_values"].flatten(0, -4) * ours.model.std_C11 + ours.model.mean_C11
    assert torch.equal((pixels_NCYX * 255).round().to(torch.uint8), inputs["tiles_NCYX"])
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_gives_the_logits_and_answers_of_transformers(
    kind, size, folders, tmp_path
):
    model, processor = load_in_transformers(folders[kind])
    ours = load_checkpoint(folders[kind], dtype=None)
    noise_image(SIZES[size]).save(tmp_path / "a.png")
    images = [image_processing.load_image(tmp_path / "a.png", ours.image_config)]

    prompt = processor.apply_chat_template(messages_of("a cat?"), add_generation_prompt=True)
    theirs = processor(text=f"<s>{prompt}", images=[noise_image(SIZES[size])], return_tensors="pt")
    ids = chat_template.encode_prompt(
        ours, [("user", chat_template.place_images("a cat?", 1))], images
    )
    assert [IMAGE_ID if i == IMAGE_TOKEN_ID else i for i in ids] == theirs["input_ids"][0].tolist()

    inputs = same_images(ours, images, theirs)
    hidden_BTD = ours.model.decoder(
        ours.model.embed(torch.tensor([ids]), **inputs), torch.arange(len(ids))[None]
    )
    torch.testing.assert_close(
        ours.model.decoder.lm_head(hidden_BTD), model(**theirs).logits, rtol=1e-4, atol=1e-4
    )

    answer = [i for (i,) in generate(ours.model, [ids], **inputs, stop=set(), max_tokens=12)]
    assert (
        answer
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
    """Returns the name that transformers 5 has in memory. Some folders have it, too."""
    name = name if "lm_head" in name else name.replace("language_model.model.", "language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


NAMINGS = {
    "transformers 4": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "transformers 5": in_memory_names,
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_tensor_names_of_each_version_give_the_same_model(naming, folders, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 mistral"])
    rename(folder, NAMINGS[naming])
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
    "kind",
    [*KINDS.values(), KINDS["1.5 with SigLIP"] | {"encoder": "siglip with its head"}],
    ids=str,
)
@pytest.mark.parametrize("naming", [lambda name: name, NAMINGS["transformers 4"]])
def test_a_folder_comes_back_tensor_for_tensor(kind, naming, tmp_path):
    """Load, save as a nanovlm checkpoint, export: also CLIP's last layer and norm, which LLaVA does
    not use. The tokenizer is the same byte for byte."""
    folder = publish(tmp_path / "published", **kind)
    rename(folder, naming)
    save_checkpoint(load_checkpoint(folder, dtype=None), tmp_path / "ours")
    out = exported(tmp_path / "ours", tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    load_in_transformers(out)


# ---- export of nanovlm checkpoints ----
CONVERSATIONS = {
    "a question": [("user", "<image>\nIs it a cat?")],
    "two images": [("user", "<image>\n<image>\na or b?")],
    "more": [
        ("system", "Be kind."),
        ("user", "<image>\nIs it a cat?"),
        ("assistant", " It is. "),
        ("user", "Is it a category?"),
    ],
}


def vision_folder(folder, kind):
    """Write a CLIP or SigLIP alone, as published."""
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
        )
    )
    return folder


def stitched(home, template, encoder="clip", vocabulary=None, decoder={}, words=None, **choices):
    """Write a nanovlm checkpoint, stitched from published parts. Its tokenizer has no <image>; by
    default, the decoder's vocabulary is exactly the tokenizer's."""
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
    shake(model(config(**sizes)), 4).save_pretrained(home / "decoder")
    words.save(home / "decoder")
    prepare.stitch(
        vision=str(vision_folder(home / "encoder", encoder)),
        decoder=str(home / "decoder"),
        out=str(home / "ours"),
        template=template,
        **choices,
    )
    return home / "ours"


def messages(turns, **image):
    """Returns a conversation as transformers takes it: each content in parts, the images first."""
    return [
        {
            "role": role,
            "content": [{"type": "image", **image}] * text.count("<image>")
            + [{"type": "text", "text": text.replace("<image>\n", "")}],
        }
        for role, text in turns
    ]


@torch.no_grad()
def assert_the_same(ours, folder, turns, sizes, tmp_path):
    """transformers, with the exported folder and its chat template, has the ids, the logits and the
    answer of a Checkpoint of ours."""
    model, processor = load_in_transformers(folder)
    photos, images = [noise_image(size, number) for number, size in enumerate(sizes)], []
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
        images.append(image_processing.load_image(tmp_path / f"{number}.png", ours.image_config))
    ids = chat_template.encode_prompt(ours, turns, images)
    prompt = processor.apply_chat_template(messages(turns), add_generation_prompt=True)
    theirs = processor(text=prompt, images=photos, return_tensors="pt")
    image_id = model.config.image_token_id
    assert [image_id if i == IMAGE_TOKEN_ID else i for i in ids] == theirs["input_ids"][0].tolist()
    inputs, end = (
        same_images(ours, images, theirs),
        chat_template.end_token_id(ours.tokenizer, ours.chat_template),
    )
    logits_BTV = ours.model.decoder.lm_head(
        ours.model.decoder(
            ours.model.embed(torch.tensor([ids]), **inputs), torch.arange(len(ids))[None]
        )
    )
    torch.testing.assert_close(
        logits_BTV, model(**theirs).logits[..., : logits_BTV.shape[-1]], rtol=1e-4, atol=1e-4
    )
    answer = [i for (i,) in generate(ours.model, [ids], **inputs, stop={end}, max_tokens=20)]
    assert (
        answer
        == model.generate(**theirs, max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    )


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    "template", ["mistral", "mistral-v1", "chatml", "smollm2", "llama3", "vicuna"]
)
def test_an_exported_model_answers_in_transformers_as_here(template, turns, tmp_path):
    ours = stitched(tmp_path, template)
    out = exported(ours, tmp_path / "out")
    sizes = [(40, 31)] * sum(text.count("<image>") for _, text in turns)
    assert_the_same(load_checkpoint(ours), out, turns, sizes, tmp_path)


# ---- SentencePiece's spaces ----
# Where a text's first space comes from: a normalizer's Prepend (Llama 2), Metaspace before every
# text that has none, Metaspace before the first text alone (Mistral v0.3, LLaVA-1.5), nowhere, or
# a tokenizer.model.
LAYOUTS = ["prepend", "always", "first", "never", "model"]
SPACED_CONVERSATIONS = CONVERSATIONS | {
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
    """Returns a tokenizer of a few hundred pieces. Its tokenizer.json has a post-processor that
    puts <s> before any text, as published ones have."""
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
    """Returns the special tokens of the tokenizers that a template is used with: all that it
    writes; also <s> and </s> alone, if it ends with </s>."""
    every = tuple(dict.fromkeys(["<s>", "</s>", *chat_template.special_token_names(template)]))
    return (
        dict.fromkeys([every, every[:2]])
        if chat_template.TEMPLATES[template]["end"] == "</s>"
        else [every]
    )


@pytest.fixture(scope="module")
def stitched_model(tmp_path_factory):
    return load_checkpoint(stitched(tmp_path_factory.mktemp("model"), "chatml", vocabulary=520))


TEMPLATES_AND_NAMES = [
    (template, names)
    for template, form in chat_template.TEMPLATES.items()
    if not form["caption_only"] and form["image_space"]  # the others have layouts of their own
    for names in names_of(template)
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "template, names",
    TEMPLATES_AND_NAMES,
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} names",
)
def test_an_exported_template_puts_spaces_where_render_does(
    template, names, layout, stitched_model, tmp_path
):
    """The tokenizer's ids are ours, and so are the processor's with images, in one step or in two
    (the template, then the processor on its text), which must not put a start token before a
    prompt. The exported template is identified."""
    ours, out = (
        stitched_model._replace(tokenizer=sentencepiece(layout, names), chat_template=template),
        tmp_path / "out",
    )
    export_checkpoint(ours, out)
    processor, image_id, photo = (
        hf.AutoProcessor.from_pretrained(out, backend="pil"),
        ours.tokenizer.vocab_size,
        noise_image((28, 28)),
    )
    photo.save(tmp_path / "a.png")
    loaded = image_processing.load_image(tmp_path / "a.png", ours.image_config)
    options = dict(add_generation_prompt=True, return_dict=False)
    for turns in [*SPACED_CONVERSATIONS.values(), AMID]:
        ids = [
            image_id if i == IMAGE_TOKEN_ID else i
            for i in chat_template.render_conversation(turns, ours.tokenizer, template)[0]
        ]
        plain = [{"role": role, "content": text} for role, text in turns]
        assert processor.tokenizer.apply_chat_template(plain, **options) == ids
    for turns in SPACED_CONVERSATIONS.values():
        parts = messages(turns, image=photo)
        ids = chat_template.encode_prompt(
            ours, turns, [loaded] * sum(text.count("<image>") for _, text in turns)
        )
        ids = [image_id if i == IMAGE_TOKEN_ID else i for i in ids]
        assert processor.apply_chat_template(parts, tokenize=True, **options)[0] == ids
        prompt = processor.apply_chat_template(parts, add_generation_prompt=True)
        photos = [photo] * prompt.count("<image>") or None
        assert processor(text=prompt, images=photos)["input_ids"][0] == ids
    assert load_checkpoint_info(out).chat_template == template


@pytest.mark.parametrize(
    "template, layout",
    [("mistral", "first"), ("llava", "first"), ("zephyr", "first"), ("mistral-v1", "model")],
)
def test_an_exported_model_with_sentencepiece_answers_as_here(template, layout, tmp_path):
    ours = stitched(tmp_path, template, words=sentencepiece(layout, next(iter(names_of(template)))))
    out = exported(ours, tmp_path / "out")
    assert_the_same(load_checkpoint(ours), out, CONVERSATIONS["more"], [(40, 31)], tmp_path)


def test_llama_cpp_puts_no_start_token_before_a_prompt(stitched_model, tmp_path):
    gguf = pytest.importorskip("gguf")
    for template, layout in (("zephyr", "first"), ("zephyr", "model"), ("mistral", "first")):
        export_checkpoint(
            stitched_model._replace(
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
    "SigLIP before its last layer": dict(encoder="siglip", vision_feature_layer=-2),
    "SigLIP un-normed": dict(encoder="siglip", vision_feature_layer=-1),
    "a layer from below": dict(vision_feature_layer=2),
    "padded": dict(fit="pad"),
    "cropped": dict(fit="crop"),
    "larger": dict(tile=42),
    "a larger vocabulary": dict(vocabulary=320),
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
def test_all_that_the_layout_can_express_is_exported(made, tmp_path):
    ours = stitched(tmp_path, "chatml", **made)
    out, turns = exported(ours, tmp_path / "out"), CONVERSATIONS["a question"]
    assert_the_same(load_checkpoint(ours), out, turns, [(90, 31)], tmp_path)


def test_an_image_token_is_added_to_a_tokenizer_that_has_none(tmp_path):
    """Its embedding is the start token's, its id is never generated, and the tokenizer's own file
    stays as it is."""
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
    """The order of the pinpoints matters only if two show and waste equally many pixels."""
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
    "change, message",
    [
        (dict(shuffle=2), "pixel shuffle by 2: stitch without --shuffle .*--projector=linear"),
        (dict(tiles=4), "several tiles of an image: stitch without --tiles"),
        (dict(projector="linear"), "a projector of one layer: stitch without --projector=linear"),
        (
            dict(encoder="siglip"),
            "a norm after the last layer of the vision encoder: stitch a CLIP or SigLIP folder "
            "with --vision_feature_layer=-2",
        ),
    ],
)
def test_what_the_layout_cannot_express_is_refused_with_the_setting_to_stitch_with(
    change, message, tmp_path
):
    with pytest.raises(UserError, match=message):
        exported(stitched(tmp_path, "chatml", **change), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_tiles_are_a_setting_of_a_published_vision_encoder_alone(tmp_path):
    ours = stitched(tmp_path, "chatml", tiles=4, tile_choice="area", tile_tags=True, draft=True)
    image_config = load_checkpoint(ours).image_config
    image_processing.check_image_config(image_config)
    assert {
        name: image_config[name]
        for name in ("fit", "tiles", "thumbnail", "choice", "tags", "draft")
    } == {
        "fit": "tiles",
        "tiles": 4,
        "thumbnail": True,
        "choice": "area",
        "tags": True,
        "draft": True,
    }
    with pytest.raises(
        UserError, match="--tiles, .*: only for a Hugging Face folder; .* has its own"
    ):
        prepare.stitch(
            vision=str(ours),
            decoder=str(tmp_path / "decoder"),
            out=str(tmp_path / "again"),
            tiles=4,
        )


def test_another_kind_of_vision_encoder_is_not_exported():
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


# ---- published folders that are refused ----
def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "file, fields, message",
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
        (
            "config.json",
            {"model_type": "llava_onevision"},
            "llava_onevision is not read here as a whole",
        ),
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[28, 50]]},
            "pinpoints is not a list of heights and widths in whole tiles",
        ),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "choose --fit"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused_by_name(file, fields, message, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 vicuna"])
    edit(folder / file, **fields)
    if "whole tiles" in message:
        edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "kind, config", [("1.5", hf.LlavaConfig), ("1.6 vicuna", hf.LlavaNextConfig)]
)
def test_every_field_that_transformers_knows_is_read_or_changes_nothing(
    kind, config, folders, monkeypatch
):
    """The number of image tokens follows from the tiles, their place from the prompt. The two parts
    read their own configs."""
    configs = []
    monkeypatch.setattr(
        llava.files,
        "read_json",
        lambda path: configs.append(Read(huggingface.read_json(path))) or configs[-1],
    )
    load_checkpoint_info(folders[kind])
    own = config().to_dict().keys() - hf.PretrainedConfig().to_dict().keys()
    assert (
        own - configs[0].fields_read
        == {"image_seq_length", "image_token_index", "text_config", "vision_config"}
        and len(configs) == 1
    )


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("image_newline", "image_comma", "image_comma"),
        ("linear_2.bias", "linear_3.bias", "linear_2.bias is missing"),
        ("vision_tower.pre_", "vision_tower.past_", "pre_layrnorm.weight is missing"),
    ],
)
def test_a_tensor_that_is_missing_or_not_used_is_named(old, new, message, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 vicuna"])
    rename(folder, lambda name: name.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


# ---- the scripts ----
def test_an_unknown_template_is_named_to_export_which_stores_it(tmp_path):
    folder = publish(tmp_path / "odd", **KINDS["1.5"] | {"jinja": "{{ 'odd' }}"})
    for read in (load_checkpoint, load_checkpoint_info):
        with pytest.raises(
            UserError,
            match="writes 'odd', as none of ours does; name it by --template of .*export. .*: "
            ".*vicuna",
        ):
            read(folder)
    with pytest.raises(UserError, match="--template=odd is not one of mistral"):
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
    noise_image((90, 31)).save(tmp_path / "a.png")
    answers = []
    for model in (str(folders["1.6 mistral"]), "some/llava"):
        sample.sample(model=model, image=[str(tmp_path / "a.png")], prompt="a cat?", max_tokens=9)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()


def test_a_batch_of_images_of_many_sizes_is_answered_as_one_by_one(folders, tmp_path):
    ours = load_checkpoint(folders["1.6 vicuna"])
    for name, size in SIZES.items():
        noise_image(size).save(tmp_path / f"{name}.png")
    images = {
        name: image_processing.load_image(tmp_path / f"{name}.png", ours.image_config)
        for name in SIZES
    }
    questions = [
        ("a cat?", [images["wide"]]),
        ("or", [images["tall"], images["square"]]),
        ("no", []),
        ("b", [images["a pixel off"]]),
    ]
    questions = [(chat_template.place_images(text, len(those)), those) for text, those in questions]
    for reply, (text, those) in zip(
        runner.generate_answers(ours, questions, max_tokens=8), questions, strict=True
    ):
        assert reply.answer == "".join(
            sample.stream_answer(ours, [("user", text)], those, max_tokens=8)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_load_checkpoint_info_reads_all_but_the_weights(kind, folders, tmp_path):
    loaded = load_checkpoint(folders[kind], dtype=None)
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in folders[kind].iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    info = load_checkpoint_info(folder)
    assert (
        info.model is None
        and info.fingerprint() == loaded.fingerprint()
        and info.shapes == loaded.shapes
    )
    with pytest.raises(UserError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_of_their_file(dtype, folders, tmp_path):
    """7B parameters take 14 GB in half precision; read as float32 they would take 28."""
    folder = publish(tmp_path / "half", **KINDS["1.6 vicuna"])
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    kept = load_checkpoint(folder, dtype=None)
    assert {p.dtype for p in kept.model.parameters()} == {dtype}
    assert {p.dtype for p in load_checkpoint(folder, dtype=torch.float32).model.parameters()} == {
        torch.float32
    }
    noise_image((90, 31)).save(tmp_path / "a.png")
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


def test_data_for_a_llava_next_has_images_of_any_size(folders, tmp_path):
    """The number of tokens of an image follows from its size, and training has the tiles and ids of
    sample.py."""
    folder, ours = str(folders["1.6 vicuna"]), load_checkpoint(folders["1.6 vicuna"])
    records = []
    for number, size in enumerate([(60, 40), (20, 90)]):
        Image.fromarray(
            np.random.default_rng(number).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
        ).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "x.json").write_text(json.dumps(records))
    prepare.data(model=folder, source=[str(tmp_path / "x.json")], out=str(tmp_path / "set"))
    samples = dataset.PreparedDataset(tmp_path / "set")
    batch, _ = packing.collate(samples, [[0, 1]])
    images = [
        image_processing.load_image(tmp_path / f"{number}.png", ours.image_config)
        for number in (0, 1)
    ]
    joined = packing.collate_images(images, ours.image_config)
    assert len(images[0].feature_index) != len(images[1].feature_index) and all(
        batch[name].equal(joined[name]) for name in joined
    )
    for number in (0, 1):
        prompt = chat_template.encode_prompt(ours, [("user", "<image>\nWhat?")], [images[number]])
        assert samples.read(number)[0][: len(prompt)].tolist() == prompt
    ours.model.train()(**batch).backward()
    assert ours.model.projector.newline.grad.abs().sum() > 0
