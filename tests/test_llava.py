"""LLaVA folders: what transformers computes of a folder we compute too, and what we write transformers reads, with no code of ours."""
import json

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from test_parity import BRAIN, EYE, shake

import prepare
import sample
from nanovlm import IMAGE, Mistake, chat, data, huggingface, images, llava, tokenizer, weights

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # LLaVA-NeXT's own, for tiles of 28 pixels
LLAVA_15 = ("{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
            "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
            "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
            "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
            "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")  # llava-hf/llava-1.5-7b-hf
LLAVA_16_MISTRAL = ("{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
                    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% for content in message['content'] | "
                    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
                    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
                    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}"
                    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")  # llava-hf/llava-v1.6-mistral-7b-hf
WORDS = tokenizer.learn(["a cat, a catalogue, the category of cats"], 260, ["<s>", "</s>", "<image>"])
IMAGE_ID = WORDS.special["<image>"]
SIZES = {"square": (31, 31), "wide": (90, 25), "tall": (20, 83), "tiny": (3, 2), "a pixel off": (29, 28), "exact": (56, 28), "large": (200, 133)}


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def publish(folder, kind="llava", brain="llama", eye="clip", jinja=LLAVA_15, **how):
    """A LLaVA folder as its owners make it: random numbers and config by transformers, its processors and tokenizer beside them."""
    vision = {"clip": hf.CLIPVisionConfig, "siglip": lambda **sizes: hf.SiglipVisionConfig(vision_use_head=False, **sizes)}[eye](**EYE)
    text = {"llama": hf.LlamaConfig, "mistral": lambda **sizes: hf.MistralConfig(sliding_window=None, **sizes)}[brain](**BRAIN)
    both = dict(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, vision_feature_select_strategy="default" if eye == "clip" else "full")
    model = (hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **both)) if kind == "llava_next"
             else hf.LlavaForConditionalGeneration(hf.LlavaConfig(**both)))
    shake(model, 3).save_pretrained(folder)
    square, short = {"height": 28, "width": 28}, {"shortest_edge": 28}
    preprocessor = {"llava": {"image_processor_type": "CLIPImageProcessor"},
                    "llava_next": {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, "do_pad": True}}[kind]
    preprocessor |= {"size": short, "crop_size": square, "do_center_crop": True, "do_resize": True, "resample": 3, "do_rescale": True, "do_normalize": True,
                     "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True} | how
    kinds = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
    files = {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {"processor_class": kinds[kind], "patch_size": 7, "image_token": "<image>", "num_additional_image_tokens": int(eye == "clip"),
                                  "vision_feature_select_strategy": both["vision_feature_select_strategy"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(jinja)
    WORDS.save(folder)
    return folder


KINDS = {
    "1.5": dict(jinja=LLAVA_15), "1.5, padded": dict(jinja=LLAVA_15, image_processor_type="LlavaImageProcessor", do_pad=True),
    "1.5 with SigLIP": dict(eye="siglip", size={"height": 28, "width": 28}),
    "1.6 mistral": dict(kind="llava_next", brain="mistral", jinja=LLAVA_16_MISTRAL), "1.6 vicuna": dict(kind="llava_next", jinja=LLAVA_15),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of folder as published, for tests that only read."""
    home = tmp_path_factory.mktemp("published")
    return {name: publish(home / name, **how) for name, how in KINDS.items()}


def whole(folder):
    """(model, processor) as transformers loads them, every tensor used and none missing."""
    kind = {"llava": hf.LlavaForConditionalGeneration, "llava_next": hf.LlavaNextForConditionalGeneration}
    model, told = kind[json.loads((folder / "config.json").read_text())["model_type"]].from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.float().eval(), hf.AutoProcessor.from_pretrained(folder, backend="pil")


def ask(question, count=1):
    return [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_sees_and_says_what_transformers_says(kind, size, folders, tmp_path):
    model, processor = whole(folders[kind])
    ours = weights.load(folders[kind], dtype=None)
    picture(SIZES[size]).save(tmp_path / "a.png")
    shown = [images.load(tmp_path / "a.png", ours.policy)]

    prompt = processor.apply_chat_template(ask("a cat?"), add_generation_prompt=True)
    theirs = processor(text=f"<s>{prompt}", images=[picture(SIZES[size])], return_tensors="pt")
    ids = sample.prompt_ids(ours, [("user", sample.place_pictures("a cat?", 1))], shown)
    assert [IMAGE_ID if i == IMAGE else i for i in ids] == theirs["input_ids"][0].tolist()

    pixels = theirs["pixel_values"].flatten(0, -4)
    mean_C11, std_C11 = ours.model.mean_C11, ours.model.std_C11
    assert ((pixels * std_C11 + mean_C11) * 255 - torch.tensor(shown[0].tiles)).abs().max() <= 1

    seen = sample.as_tensors(shown, ours.policy)
    hidden_BTD = ours.model.decoder(ours.model.embed(torch.tensor([ids]), **seen), torch.arange(len(ids))[None])
    torch.testing.assert_close(ours.model.decoder.head(hidden_BTD), model(**theirs).logits, rtol=1e-4, atol=1e-4)

    said = [i for (i,) in ours.model.generate([ids], **seen, stop=set(), max_tokens=12)]
    assert said == model.generate(**theirs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()


def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def in_memory_names(name):
    """As transformers 5 names them in memory, and as some folders have them."""
    name = name if "lm_head" in name else name.replace("language_model.model.", "language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


SPELLINGS = {"transformers 4": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."), "transformers 5": in_memory_names}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling, folders, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["1.6 mistral"])
    rename(folder, SPELLINGS[spelling])
    ours, plain = (weights.load(where, dtype=None).model.state_dict() for where in (folder, folders["1.6 mistral"]))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)


def exported(source, out):
    prepare.export(model=str(source), out=str(out))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spell", [lambda name: name, SPELLINGS["transformers 4"]])
def test_a_folder_comes_back_tensor_for_tensor(kind, spell, tmp_path):
    """Through load, our own checkpoint and export, CLIP's last layer and norm too, which LLaVA never reads; its tokenizer byte for byte."""
    folder = publish(tmp_path / "published", **KINDS[kind])
    rename(folder, spell)
    weights.save(weights.load(folder, dtype=None), tmp_path / "ours")
    out = exported(tmp_path / "ours", tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    whole(out)


def test_shards_and_their_index(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "SHARD_BYTES", 200_000)
    out = exported(folders["1.5"], tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and shards == sorted(set(index["weight_map"].values())) and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert max((out / shard).stat().st_size for shard in shards) < 210_000
    whole(out)
    again = weights.load(out, dtype=None).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.load(folders["1.5"], dtype=None).model.state_dict().items())
