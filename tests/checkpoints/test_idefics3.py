"""Idefics3, SmolVLM and SmolVLM2 folders: nanovlm computes what transformers computes, and
transformers reads what nanovlm writes."""

import contextlib
import json
from functools import cache

import numpy as np
import pytest
import test_llava
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_llava import messages, noise_image
from test_parity import DECODER, VISION, shake
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

import prepare
import sample
import train
from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint, load_checkpoint_info, save_checkpoint
from nanovlm.checkpoints.idefics3 import IDEFICS3_TOKENS, check_positions
from nanovlm.data import chat_template, dataset, image_processing, image_refs, packing, tokenizer
from nanovlm.evals import runner
from nanovlm.inference.generate import generate

# as HuggingFaceTB publishes SmolVLM and SmolVLM2
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BESIDE_IMAGES = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
PLACES = ["<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]


def train_words(start, names):
    text = "User: a cat, a catalogue?\n\nAssistant: the category of cats. System: <row_1_col_2>"
    return tokenizer.train_tokenizer([text], 270, [start, *names])


# SmolVLM-256M and 500M have a special token for each place; in the others these are plain text.
KINDS = {
    "SmolVLM-256M": dict(start="<|im_start|>", names=BESIDE_IMAGES + PLACES, shuffle=4, edge=90),
    "SmolVLM2": dict(start="<|im_start|>", names=BESIDE_IMAGES, model_type="smolvlm", shuffle=2),
    "Idefics3": dict(start="<|begin_of_text|>", names=BESIDE_IMAGES, shuffle=1, edge=112),
    "one tile": dict(start="<|im_start|>", names=BESIDE_IMAGES, edge=28),
}
SIZES = {
    "square": [(31, 31)],
    "wide": [(90, 25)],
    "tall": [(20, 83)],
    "tiny": [(3, 2)],
    "two": [(200, 133), (41, 113)],
    "none": [],
}


def publish(
    folder, start, names, model_type="idefics3", shuffle=2, edge=84, jinja=SMOLVLM, **fields
):
    """Write a folder as its owners publish it: random weights and config by transformers,
    processors and tokenizer beside them. fields: of its preprocessor_config.json."""
    words, name = train_words(start, names), {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
    config = getattr(hf, f"{name[model_type]}Config")(
        vision_config=VISION,
        text_config=DECODER | {"model_type": "llama", "vocab_size": words.vocab_size + 3},
        scale_factor=shuffle,
        image_token_id=words.special["<image>"],
    )
    model = getattr(hf, f"{name[model_type]}ForConditionalGeneration")(config)
    shake(model, 3).save_pretrained(folder)
    files = {
        "preprocessor_config.json": {
            "image_processor_type": f"{name[model_type]}ImageProcessor",
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "max_image_size": {"longest_edge": 28},
            "processor_class": f"{name[model_type]}Processor",
            "resample": 1,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": edge},
        }
        | fields,
        "processor_config.json": {
            "image_seq_len": (4 // shuffle) ** 2,
            "processor_class": f"{name[model_type]}Processor",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start,
            "eos_token": "<end_of_utterance>",
            "pad_token": "<end_of_utterance>",
        },
        "chat_template.json": {"chat_template": jinja.replace("<|im_start|>", start)},
        "generation_config.json": {"eos_token_id": words.special["<end_of_utterance>"]},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    words.save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind, for tests that only read."""
    home = tmp_path_factory.mktemp("published")
    return {name: publish(home / name, **options) for name, options in KINDS.items()}


@cache
def load_in_transformers(folder):
    """Returns (model, processor) of transformers. Every tensor is used and none is missing.

    SmolVLMProcessor needs torchvision, for videos. On images it is Idefics3Processor.
    """
    config = json.loads((folder / "config.json").read_text())
    kinds = {
        "idefics3": (hf.Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
        "smolvlm": (hf.SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
    }
    model_class, image_processor = kinds[config["model_type"]]
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    jinja = folder / "chat_template.jinja"
    processor = hf.Idefics3Processor(
        image_processor.from_pretrained(folder),
        hf.AutoTokenizer.from_pretrained(folder),
        image_seq_len=json.loads((folder / "processor_config.json").read_text())["image_seq_len"],
        chat_template=jinja.read_text()
        if jinja.is_file()
        else json.loads((folder / "chat_template.json").read_text())["chat_template"],
    )
    return model.float().eval(), processor


@cache
def load_ours(folder):
    return load_checkpoint(folder, dtype=None)


@torch.no_grad()
def assert_the_same(ours, folder, turns, sizes, tmp_path):
    """transformers has the ids, pixels, logits and the answer of a Checkpoint of ours."""
    model, processor = load_in_transformers(folder)
    images = []
    for number, size in enumerate(sizes):
        noise_image(size, number).save(tmp_path / f"{number}.png")
        image = image_processing.load_image(tmp_path / f"{number}.png", ours.image_config)
        planned = image_processing.plan_image(size, ours.image_config)
        assert planned.tiles.shape == image.tiles.shape
        images.append(image)
    ids = chat_template.encode_prompt(ours, turns, images)
    theirs = processor(
        text=processor.apply_chat_template(messages(turns), add_generation_prompt=True),
        images=[noise_image(size, number) for number, size in enumerate(sizes)] or None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    image_id = ours.tokenizer.special["<image>"]
    assert [image_id if i == IMAGE_TOKEN_ID else i for i in ids] == theirs["input_ids"][0].tolist()
    inputs = packing.collate_images(images, ours.image_config)
    if images:
        mean_C11, std_C11 = ours.model.mean_C11, ours.model.std_C11
        tiles_NCYX = (theirs["pixel_values"][0] * std_C11 + mean_C11) * 255
        assert torch.equal(tiles_NCYX.round().to(torch.uint8), inputs["tiles_NCYX"])
    x_BTD = ours.model.embed(torch.tensor([ids]), **inputs)
    hidden_BTD = ours.model.decoder(x_BTD, torch.arange(len(ids))[None])
    logits_BTV = ours.model.decoder.lm_head(hidden_BTD)
    torch.testing.assert_close(logits_BTV, model(**theirs).logits, rtol=1e-4, atol=1e-4)
    answer = [i for (i,) in generate(ours.model, [ids], **inputs, stop=set(), max_tokens=12)]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer == model.generate(**theirs, **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_gives_pixels_ids_logits_and_answers_of_transformers(
    kind, size, folders, tmp_path
):
    sizes = SIZES[size]
    turns = [("user", chat_template.place_images("a cat?", len(sizes)))]
    assert_the_same(load_ours(folders[kind]), folders[kind], turns, sizes, tmp_path)


CONVERSATIONS = {
    "turns": [
        ("system", "Be kind."),
        ("user", "<image>\nIs it a cat?"),
        ("assistant", "It is."),
        ("user", "<image>\n<image>\nAnd 5 or 6?"),
    ],
    "white": [("user", " "), ("assistant", "5"), ("user", "\n")],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_is_written_as_in_transformers(turns, folders, tmp_path):
    sizes = [(40, 31), (20, 83), (3, 2)][: sum(text.count("<image>") for _, text in turns)]
    folder = folders["SmolVLM-256M"]
    assert_the_same(load_ours(folder), folder, turns, sizes, tmp_path)


@pytest.mark.parametrize(
    "start, name", [("<|im_start|>", "smolvlm"), ("<|begin_of_text|>", "idefics3")]
)
@pytest.mark.parametrize("jinja", [SMOLVLM, DEFAULT_CHAT_TEMPLATE], ids=["parts", "parts or text"])
def test_the_chat_template_is_known_by_what_it_writes(jinja, start, name, tmp_path):
    publish(tmp_path / "x", start, BESIDE_IMAGES, jinja=jinja)
    assert load_checkpoint_info(tmp_path / "x").chat_template == name


@pytest.mark.parametrize("tile, edge", [(512, 2048), (384, 1536), (364, 1456), (384, 2000)])
def test_the_grid_is_that_of_transformers(tile, edge):
    """On images of any size; the processor's resizing is left out."""
    processor = Idefics3ImageProcessorPil()
    processor.resize = lambda image, size, **_: (size.height, size.width)
    image_config = {"fit": "split", "tile": tile, "longest_edge": edge}
    for size in np.random.default_rng(0).integers(1, 3000, (400, 2)).tolist():
        image = np.broadcast_to(np.uint8(0), (3, *size[::-1]))
        first = get_resize_output_image_size(image, edge)
        assert image_processing.scale_longest_edge(size, edge) == first[::-1]
        image = np.broadcast_to(np.uint8(0), (3, *first))
        height, width = processor.resize_for_vision_encoder(image, tile)
        assert image_processing.tile_grid(size, image_config) == (height // tile, width // tile)


def test_a_batch_of_split_images_is_answered_as_one_by_one(folders, tmp_path):
    """The lengths of the prompts are known before the images are decoded."""
    ours, prompts, questions = load_ours(folders["SmolVLM-256M"]), [], []
    for number, size in enumerate([(90, 25), (20, 83), (3, 2)]):
        noise_image(size, number).save(path := tmp_path / f"{number}.png")
        image = image_processing.load_image(path, ours.image_config)
        prompts.append(("<image>\na cat?", [image]))
        questions.append({"image": [image_refs.ImageFile(str(path))], "question": prompts[-1][0]})
    ids = [chat_template.encode_prompt(ours, [("user", text)], of) for text, of in prompts]
    assert runner.prompt_lengths(ours, questions) == list(map(len, ids))
    replies = runner.generate_answers(ours, prompts, max_tokens=8)
    for reply, (text, images) in zip(replies, prompts, strict=True):
        one_by_one = sample.stream_answer(ours, [("user", text)], images, max_tokens=8)
        assert reply.answer == "".join(one_by_one)


# ---- export ----
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_tensor_for_tensor_and_says_the_same(kind, folders, tmp_path):
    save_checkpoint(load_checkpoint(folders[kind], dtype=None), tmp_path / "ours")
    prepare.export(model=str(tmp_path / "ours"), out=str(tmp_path / "back"))
    before, after = (load_file(f / "model.safetensors") for f in (folders[kind], tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        folders[kind] / "tokenizer.json"
    ).read_bytes()
    for name in ("preprocessor_config.json", "processor_config.json"):
        files = [folder / name for folder in (folders[kind], tmp_path / "back")]
        published, written = (json.loads(file.read_text()) for file in files)
        assert published == written
    ours, turns = load_checkpoint(tmp_path / "ours"), [("user", "<image>\nA cat?")]
    assert_the_same(ours, tmp_path / "back", turns, [(40, 31)], tmp_path)
    assert load_checkpoint_info(tmp_path / "back").fingerprint() == ours.fingerprint()


# ---- export of what was stitched ----
LINEAR = dict(encoder="siglip", projector="linear", longest_edge=90)
ENDS = ("<s>", "</s>")
STITCHES = {
    "split": dict(template="smollm2", shuffle=2),
    "one tile": dict(template="llama3", longest_edge=28),
    "tied": dict(template="mistral", decoder={"tie_word_embeddings": True, "sliding_window": 9}),
    "rows to spare": dict(
        template="zephyr", shuffle=4, vocabulary=520, words=test_llava.sentencepiece("always", ENDS)
    ),
    "larger tiles": dict(
        template="llama2", tile=42, shuffle=3, words=test_llava.sentencepiece("prepend", ENDS)
    ),
}


@pytest.mark.parametrize("stitch", STITCHES.values(), ids=STITCHES)
def test_a_stitched_model_is_exported_and_read_again(stitch, tmp_path):
    folder = test_llava.stitched(tmp_path, **LINEAR | stitch)
    ours, out = load_checkpoint(folder), tmp_path / "out"
    prepare.export(model=str(folder), out=str(out))
    for turns, sizes in [
        (CONVERSATIONS["turns"], [(40, 31), (20, 83), (3, 2)]),
        ([("user", "<image>\nIs it a cat?")], [(90, 25)]),
        ([("user", "a cat?")], []),
    ]:
        assert_the_same(ours, out, turns, sizes, tmp_path)
    back = load_checkpoint(out)
    for field in ("shapes", "image_config", "chat_template"):
        assert getattr(back, field) == getattr(ours, field)
    assert back.tokenizer.special == ours.tokenizer.special
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor)


def test_special_tokens_that_are_added_leave_the_other_tokens_as_they_are(tmp_path):
    """New rows are the mean of the others: such a token is never the most probable."""
    plain = load_checkpoint(test_llava.stitched(tmp_path, "chatml", "siglip"))
    choices = dict(projector="linear", longest_edge=90)
    parts = {"vision": str(tmp_path / "encoder"), "decoder": str(tmp_path / "decoder")}
    prepare.stitch(**parts, out=str(tmp_path / "split"), template="chatml", **choices)
    split = load_checkpoint(tmp_path / "split")
    size, before, after = plain.tokenizer.vocab_size, plain.tokenizer.special, split.tokenizer
    assert after.special == before | {name: size + n for n, name in enumerate(IDEFICS3_TOKENS)}
    assert after.encode("<image>") == plain.tokenizer.encode("<image>")  # a user's own text
    for module in ("embed_tokens", "lm_head"):
        old_VD = getattr(plain.model.decoder, module).weight
        new_VD = getattr(split.model.decoder, module).weight
        assert torch.equal(new_VD[:size], old_VD) and len(new_VD) == size + 3
        torch.testing.assert_close(new_VD[size:], old_VD.mean(0).expand(3, -1))


@pytest.mark.parametrize(
    "stitch, message",
    [
        (dict(projector="mlp"), "a projector of two layers: stitch with --projector=linear"),
        (
            dict(encoder="clip"),
            "is not a SigLIP with its last norm: stitch with the --vision of one",
        ),
        (dict(vision_feature_layer=-1), "of one, without --vision_feature_layer"),
        (dict(tile=19 * 7), "19 patches across a tile the same position.*: choose another --tile"),
        (
            dict(template="mistral", words=test_llava.sentencepiece("first", ENDS)),
            "a SentencePiece whose space stands before the first text alone",
        ),
        (dict(template="nanovlm"), "the template nanovlm: stitch with another --template"),
        (dict(template="plain"), "the template plain, which has no questions"),
    ],
)
def test_what_idefics3_cannot_express_is_refused_with_the_setting_to_stitch_with(
    stitch, message, tmp_path
):
    folder = test_llava.stitched(tmp_path, **LINEAR | {"template": "chatml"} | stitch)
    with pytest.raises(UserError, match=message):
        prepare.export(model=str(folder), out=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(longest_edge=90, tiles=2), "--longest_edge=90 splits an image into tiles: leave out"),
        (dict(longest_edge=90, fit="pad"), "leave out --tiles and --fit"),
        (dict(longest_edge=4097), "longest_edge 4097 is more than 4096"),
        (dict(longest_edge=0), "longest_edge 0 is"),
        (dict(projector="bilinear"), "--projector=bilinear is .*of mlp, linear"),
    ],
)
def test_settings_that_do_not_fit_are_refused(choices, message, tmp_path):
    folder = str(test_llava.vision_folder(tmp_path / "encoder", "siglip"))
    with pytest.raises(UserError, match=message):
        prepare.stitch(vision=folder, decoder=folder, out=str(tmp_path / "ours"), **choices)


def test_tokens_are_added_to_a_tokenizer_json_alone(tmp_path):
    words = test_llava.sentencepiece("model", ENDS)
    with pytest.raises(UserError, match="<image> cannot be added to a tokenizer.model, only to a"):
        test_llava.stitched(tmp_path, "mistral", words=words, **LINEAR)
    assert not list(tmp_path.glob("ours*"))


@torch.no_grad()
def test_positions_of_patches_are_those_of_transformers_or_refused():
    refused = []
    for side in range(1, 40):
        config = hf.Idefics3VisionConfig(image_size=side, patch_size=1, hidden_size=4)
        embeddings, pixels = Idefics3VisionEmbeddings(config), torch.zeros(1, 3, side, side)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        features = embeddings(pixels, mask)[0] - embeddings.patch_embedding.bias
        positions_PD = embeddings.position_embedding.weight
        is_plain = bool((features - positions_PD).abs().max() < 1e-5)
        refusal = contextlib.nullcontext() if is_plain else pytest.raises(UserError, match="tile")
        with refusal:
            check_positions(side, "x")
        refused += [side] * (not is_plain)
    assert refused == [19, 25, 29, 31, 38]


# ---- training ----
def test_a_published_folder_is_trained_sampled_and_exported(tmp_path, capsys):
    folder = publish(tmp_path / "published", **KINDS["SmolVLM-256M"] | {"edge": 56})
    records = []
    for number, size in enumerate([(60, 40), (20, 90), (31, 30)]):
        noise_image(size, number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "x.json").write_text(json.dumps(records))
    data = str(tmp_path / "set")
    prepare.data(model=str(folder), source=[str(tmp_path / "x.json")], out=data)
    assert "samples of 1 image(s): 3" in capsys.readouterr().err  # whatever their tiles
    run = tmp_path / "run"
    settings = dict(steps=2, seq_len=96, global_batch_size=2, micro_batch_size=1, lr=1e-3)
    train.train(
        stage="sft",
        model=str(folder),
        data=data,
        out=str(run),
        freeze="vision",
        device="cpu",
        **settings,
    )
    before, ours = load_checkpoint(folder), load_checkpoint(run)
    changed = set()
    for name, tensor in ours.model.state_dict().items():
        if not torch.equal(tensor, before.model.state_dict()[name]):
            changed.add(name.split(".")[0])
    assert changed == {"projector", "decoder"}
    # a sample of the dataset begins with the ids of the prompt
    image = image_processing.load_image(tmp_path / "0.png", ours.image_config)
    prompt = chat_template.encode_prompt(ours, [("user", "<image>\nWhat?")], [image])
    assert dataset.PreparedDataset(data).read(0)[0][: len(prompt)].tolist() == prompt
    sample.sample(model=str(run), image=[str(tmp_path / "0.png")], prompt="What?", max_tokens=5)
    assert capsys.readouterr().out.strip()
    prepare.export(model=str(run), out=str(tmp_path / "out"))
    assert_the_same(ours, tmp_path / "out", [("user", "<image>\nWhat?")], [(60, 40)], tmp_path)


# ---- published folders that are refused ----
@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("config.json", {"scale_factor": "2"}, "scale_factor '2' is not a whole number"),
        ("config.json", {"scale_factor": 3}, "--shuffle=3 does not divide the 4 patches"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (
            "config.json",
            {"vision_config": VISION | {"image_size": 35}},
            "tiles by fit=split of 28 pixels, not by max_image_size of 35, the image_size",
        ),
        ("preprocessor_config.json", {"size": {"height": 28}}, "KeyError: 'longest_edge'"),
        ("preprocessor_config.json", {"max_image_size": None}, "choose --fit"),
        ("preprocessor_config.json", {"do_image_splitting": False}, "do_image_splitting False"),
        (
            "preprocessor_config.json",
            {"size": {"longest_edge": 5000}},
            "longest_edge 5000 is more than 4096",
        ),
        ("preprocessor_config.json", {"resample": 0}, "resample 0"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize False"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused_by_name(file, fields, message, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["SmolVLM2"])
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=message):
        load_checkpoint_info(folder)


def test_a_size_for_which_transformers_rounds_positions_is_refused(tmp_path):
    kind = KINDS["Idefics3"] | {"max_image_size": {"longest_edge": 19 * 7}}
    path = publish(tmp_path / "x", **kind) / "config.json"
    config = json.loads(path.read_text()) | {"vision_config": VISION | {"image_size": 19 * 7}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="some of 19 patches across a tile the same position"):
        load_checkpoint_info(tmp_path / "x")


def test_a_tokenizer_needs_the_tokens_beside_an_image(tmp_path):
    publish(tmp_path / "x", **KINDS["SmolVLM2"])
    train_words("<|im_start|>", BESIDE_IMAGES[1:]).save(tmp_path / "x")
    with pytest.raises(UserError, match="<fake_token_around_image> is not a special token"):
        load_checkpoint_info(tmp_path / "x")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("connector.", "conjunctor.", "conjunctor.* is not used"),
        ("vision_model.post_", "vision_model.past_", "post_layernorm.weight is missing"),
        ("text_model.norm", "text_model.form", "model.norm.weight is missing"),
    ],
)
def test_a_tensor_that_is_missing_or_not_used_is_named(old, new, message, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["SmolVLM2"])
    path = folder / "model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)
