"""Folders of Hugging Face's nanoVLM. Its code is no package: its formulas are written out here, on
tensors with its names (models/*.py and data/*.py of github.com/huggingface/nanoVLM)."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_idefics3 import SIZES
from test_llava import noise_image

import prepare
import sample
import train
from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint, load_checkpoint_info, save_checkpoint
from nanovlm.data import chat_template, image_processing, packing, tokenizer
from nanovlm.inference.generate import generate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = tokenizer.train_tokenizer(
    ["a cat, a catalogue, the category of cats"], 260, ["<|im_start|>", "<|im_end|>"]
)
PLACES = {f"r{i}c{j}": f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)}
KINDS = {
    "450M": dict(vlm_extra_tokens={"image_token": "<|image|>"}, mp_pixel_shuffle_factor=2),
    "460M-8k": dict(
        vlm_extra_tokens={"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
        | PLACES,
        mp_pixel_shuffle_factor=4,
        max_img_size=84,
        resize_to_max_side_len=False,
    ),
    "enlarged, untied": dict(
        vlm_extra_tokens={"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
        | PLACES,
        mp_pixel_shuffle_factor=1,
        max_img_size=56,
        resize_to_max_side_len=True,
        lm_tie_weights=False,
    ),
}


def publish(folder, **fields):
    """Write a folder as nanoVLM's save_pretrained does, with random weights; its tokenizer lies in
    it, as the hub's is not at hand."""
    cfg = (
        dict(
            vit_hidden_dim=48,
            vit_inter_dim=80,
            vit_patch_size=7,
            vit_img_size=28,
            vit_n_heads=4,
            vit_dropout=0.0,
            vit_n_blocks=3,
            vit_ln_eps=1e-6,
            vit_cls_flag=False,
            lm_hidden_dim=36,
            lm_inter_dim=52,
            lm_rms_eps=1e-5,
            lm_re_base=1000,
            lm_max_position_embeddings=512,
            lm_vocab_size=WORDS.vocab_size + len(fields["vlm_extra_tokens"]),
            lm_n_heads=6,
            lm_n_kv_heads=2,
            lm_n_blocks=2,
            lm_attn_scaling=1.0,
            lm_use_tokens=False,
            lm_tie_weights=True,
            lm_tokenizer="some/words",
            lm_chat_template=CHATML,
            mp_image_token_length=(4 // fields["mp_pixel_shuffle_factor"]) ** 2,
        )
        | fields
    )
    D, M, E, L = (cfg[f"{x}_dim"] for x in ("vit_hidden", "vit_inter", "lm_hidden", "lm_inter"))
    G, V = E // 3, cfg["lm_vocab_size"]
    shapes = {
        "vision_encoder.patch_embedding.position_embedding": (1, 16, D),
        "vision_encoder.patch_embedding.conv.weight": (D, 3, 7, 7),
        "vision_encoder.patch_embedding.conv.bias": (D,),
        "vision_encoder.layer_norm.weight": (D,),
        "vision_encoder.layer_norm.bias": (D,),
        "MP.proj.weight": (E, D * cfg["mp_pixel_shuffle_factor"] ** 2),
        "decoder.head.weight": (V, E),  # safetensors drops the second name of a tied tensor
        "decoder.norm.weight": (E,),
    }
    if not cfg["lm_tie_weights"]:
        shapes["decoder.token_embedding.weight"] = (V, E)
    for i in range(cfg["vit_n_blocks"]):
        for name, shape in {
            "ln1": (D,),
            "attn.qkv_proj": (3 * D, D),
            "attn.out_proj": (D, D),
            "ln2": (D,),
            "mlp.fc1": (M, D),
            "mlp.fc2": (D, M),
        }.items():
            shapes[f"vision_encoder.blocks.{i}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{i}.{name}.bias"] = shape[:1]
    for i in range(cfg["lm_n_blocks"]):
        for name, shape in {
            "norm1": (E,),
            "attn.q_proj": (E, E),
            "attn.k_proj": (G, E),
            "attn.v_proj": (G, E),
            "attn.out_proj": (E, E),
            "norm2": (E,),
            "mlp.gate_proj": (L, E),
            "mlp.up_proj": (L, E),
            "mlp.down_proj": (E, L),
        }.items():
            shapes[f"decoder.blocks.{i}.{name}.weight"] = shape
    random = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=random) * 0.2 + float(len(shape) == 1)
        for name, shape in shapes.items()
    }
    K = E // cfg["lm_n_heads"]
    tensors["decoder.rotary_embd.inv_freq"] = 1.0 / (1000 ** (torch.arange(0, K, 2).float() / K))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(cfg, indent=4))
    WORDS.save(folder)
    return folder


# ---- nanoVLM's formulas ----
def their_tiles(image, cfg):
    """data/custom_transforms.py: (pixels from 0 to 1, (rows, columns))."""
    p = cfg["vit_img_size"]
    if "max_img_size" not in cfg:
        pixels = np.asarray(image.resize((p, p), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255, (1, 1)
    w, h = image.size
    long, short = (w, h) if w >= h else (h, w)
    m = cfg["max_img_size"]
    target_long = m if cfg["resize_to_max_side_len"] else min(m, math.ceil(long / p) * p)
    target_short = max(math.ceil(short * (target_long / long) / p) * p, p)
    size = (target_long, target_short) if w >= h else (target_short, target_long)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    rows, columns = size[1] // p, size[0] // p
    tiles = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # 1, C, rows, p, columns, p
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    if (rows, columns) == (1, 1):
        return tiles, (1, 1)
    whole = F.interpolate(x, size=(p, p), mode="bilinear", antialias=True)
    return torch.cat([whole, tiles]), (rows, columns)


def their_image_string(grids, cfg):
    """data/processors.py, get_image_string."""
    extra, text = cfg["vlm_extra_tokens"], ""
    for idx, (n_h, n_w) in enumerate(grids):
        if len(grids) > 1 and "global_image_token" in extra:
            text += f"<image: {idx}>"
        image = extra["image_token"] * cfg["mp_image_token_length"]
        text += extra.get("global_image_token", "") + image
        if (n_h, n_w) != (1, 1):
            for i in range(n_h):
                for j in range(n_w):
                    text += extra[f"r{i + 1}c{j + 1}"] + image
    return text


def their_logits(tensors, cfg, ids, pixels):
    """models/*.py: the logits of each of the ids, one sequence."""

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def heads(x, count):
        return x.unflatten(-1, (count, -1)).transpose(-3, -2)

    def layer_norm(x, name):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, cfg["vit_ln_eps"])

    def rms_norm(x, name):
        irms = torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + cfg["lm_rms_eps"])
        return x * irms * tensors[f"{name}.weight"]

    head = tensors["decoder.head.weight"]
    x = tensors.get("decoder.token_embedding.weight", head)[ids]
    if len(pixels):
        v = "vision_encoder.patch_embedding"
        conv = tensors[f"{v}.conv.weight"], tensors[f"{v}.conv.bias"]
        z = F.conv2d(pixels, *conv, stride=cfg["vit_patch_size"]).flatten(2).transpose(1, 2)
        z = z + tensors[f"{v}.position_embedding"]
        for i in range(cfg["vit_n_blocks"]):
            b = f"vision_encoder.blocks.{i}"
            qkv = linear(layer_norm(z, f"{b}.ln1"), f"{b}.attn.qkv_proj").chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(*(heads(t, cfg["vit_n_heads"]) for t in qkv))
            z = z + linear(y.transpose(-3, -2).flatten(-2), f"{b}.attn.out_proj")
            y = F.gelu(linear(layer_norm(z, f"{b}.ln2"), f"{b}.mlp.fc1"), approximate="tanh")
            z = z + linear(y, f"{b}.mlp.fc2")
        z = layer_norm(z, "vision_encoder.layer_norm")
        n, s = cfg["mp_pixel_shuffle_factor"], 4
        z = z.view(len(z), s // n, n, s // n, n, -1).permute(0, 1, 3, 2, 4, 5)
        z = linear(z.reshape(len(z), (s // n) ** 2, -1), "MP.proj").flatten(0, 1)
        x = x.masked_scatter((ids == WORDS.vocab_size)[:, None], z)  # <|image|>: the first added
    angles = torch.arange(len(ids))[:, None] * tensors["decoder.rotary_embd.inv_freq"]
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    def rotate(t):
        a, b = t.chunk(2, dim=-1)
        return t * cos + torch.cat([-b, a], -1) * sin

    for i in range(cfg["lm_n_blocks"]):
        b = f"decoder.blocks.{i}"
        y = rms_norm(x, f"{b}.norm1")
        q = rotate(heads(linear(y, f"{b}.attn.q_proj"), cfg["lm_n_heads"]))
        k = rotate(heads(linear(y, f"{b}.attn.k_proj"), cfg["lm_n_kv_heads"]))
        groups = cfg["lm_n_heads"] // cfg["lm_n_kv_heads"]
        v = heads(linear(y, f"{b}.attn.v_proj"), cfg["lm_n_kv_heads"])
        k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(0, 1).flatten(-2), f"{b}.attn.out_proj")
        y = rms_norm(x, f"{b}.norm2")
        gate = F.silu(linear(y, f"{b}.mlp.gate_proj"))
        x = x + linear(gate * linear(y, f"{b}.mlp.up_proj"), f"{b}.mlp.down_proj")
    return rms_norm(x, "decoder.norm") @ head.T


@torch.no_grad()
def assert_the_same(ours, folder, question, sizes, tmp_path):
    """The formulas give the ids, pixels, logits and the answer of a Checkpoint of ours."""
    cfg, tensors = json.loads((folder / "config.json").read_text()), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor.float()
    images, tiles, grids = [], [], []
    for number, size in enumerate(sizes):
        noise_image(size, number).save(tmp_path / f"{number}.png")
        images.append(image_processing.load_image(tmp_path / f"{number}.png", ours.image_config))
        planned = image_processing.plan_image(size, ours.image_config)
        assert planned.tiles.shape == images[-1].tiles.shape
        pixels, grid = their_tiles(noise_image(size, number), cfg)
        tiles.append(pixels)
        grids.append(grid)
    turns = [("user", chat_template.place_images(question, len(sizes)))]
    ids = chat_template.encode_prompt(ours, turns, images)
    text = f"<|im_start|>user\n{their_image_string(grids, cfg)}{question}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    names = ours.tokenizer.special
    theirs = []
    for part in chat_template.split_at_tokens(text, names):
        theirs += ours.tokenizer.encode(part) if isinstance(part, str) else [part]
    image_id = names["<|image|>"]
    assert [image_id if i == IMAGE_TOKEN_ID else i for i in ids] == theirs
    inputs = packing.collate_images(images, ours.image_config)
    for image, pixels in zip(images, tiles, strict=True):
        levels = ((pixels * 255).round() - torch.from_numpy(image.tiles)).abs()
        # theirs resizes the global image in floats
        assert levels.max() <= (len(pixels) > 1) and not levels[1:].any()
    x_BTD = ours.model.embed(torch.tensor([ids]), **inputs)
    hidden_BTD = ours.model.decoder(x_BTD, torch.arange(len(ids))[None])
    pixels = inputs["tiles_NCYX"] / 255
    logits_TV = their_logits(tensors, cfg, torch.tensor(theirs), pixels)
    torch.testing.assert_close(
        ours.model.decoder.lm_head(hidden_BTD)[0], logits_TV, rtol=1e-4, atol=1e-4
    )
    answer = [i for (i,) in generate(ours.model, [ids], **inputs, stop=set(), max_tokens=8)]
    for expected in answer:
        logits_TV = their_logits(tensors, cfg, torch.tensor(theirs), pixels)
        assert int(logits_TV[-1].argmax()) == expected
        theirs.append(expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind, for tests that only read."""
    home = tmp_path_factory.mktemp("published")
    return {name: publish(home / name, **options) for name, options in KINDS.items()}


@cache
def load_ours(folder):
    return load_checkpoint(folder, dtype=None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_gives_pixels_ids_logits_and_answers(kind, size, folders, tmp_path):
    assert_the_same(load_ours(folders[kind]), folders[kind], "a cat?", SIZES[size], tmp_path)


@pytest.mark.parametrize("kind", ["450M", "enlarged, untied"])
def test_a_folder_comes_back_tensor_for_tensor(kind, tmp_path):
    folder = publish(tmp_path / "published", **KINDS[kind])
    save_checkpoint(load_checkpoint(folder, dtype=None), tmp_path / "ours")
    prepare.export(model=str(tmp_path / "ours"), out=str(tmp_path / "back"))
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/config.json").read_text() == (folder / "config.json").read_text()


def test_a_published_folder_is_trained_sampled_and_exported(tmp_path, capsys):
    folder, records = publish(tmp_path / "published", **KINDS["460M-8k"]), []
    for number, size in enumerate([(60, 40), (20, 90)]):
        noise_image(size, number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "x.json").write_text(json.dumps(records))
    data, run = str(tmp_path / "set"), tmp_path / "run"
    prepare.data(model=str(folder), source=[str(tmp_path / "x.json")], out=data)
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
    sample.sample(model=str(run), image=[str(tmp_path / "0.png")], prompt="What?", max_tokens=5)
    assert capsys.readouterr().out.strip()
    prepare.export(model=str(run), out=str(tmp_path / "out"))
    assert_the_same(load_checkpoint(run), tmp_path / "out", "What?", [(60, 40)], tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vlm_extra_tokens": None}, "nanoVLM-222M, whose images stand"),
        ({"vit_cls_flag": True}, "vit_cls_flag True is not known here"),
        ({"mp_image_token_length": 9}, "mp_image_token_length 9 is not known here, only 1"),
        ({"max_img_size": 90}, "max_img_size 90 is not a multiple of 28"),
        ({"vit_hidden_dim": "48"}, "vit_hidden_dim '48'"),
        ({"lm_n_heads": None}, "lm_n_heads None"),
        ({"lm_vocab_size": 261}, "the vocabulary is 261"),
        ({"lm_chat_template": "{{ 'odd' }}"}, "its chat template writes 'odd'"),
        ({"lm_chat_template": SMOLLM2}, "lm_chat_template is smollm2, not chatml"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused_by_name(fields, message, tmp_path):
    folder = publish(tmp_path / "x", **KINDS["460M-8k"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        load_checkpoint_info(folder)


def test_the_tokenizer_is_that_of_another_folder_which_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = publish(tmp_path / "x", **KINDS["450M"])
    expected = load_checkpoint_info(folder).tokenizer.fingerprint
    words = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer is some/words's: hf download some/words config"):
        load_checkpoint_info(folder)
    cache = tmp_path / "hub/models--some--words"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots/abc").mkdir(parents=True)
    words.rename(cache / "snapshots/abc/tokenizer.json")
    (cache / "snapshots/abc/config.json").write_text("{}")
    assert load_checkpoint_info(folder).tokenizer.fingerprint == expected
