"""Import and export of a whole model in the layout of Hugging Face's nanoVLM.

It is that of https://github.com/huggingface/nanoVLM, of nanoVLM-450M and nanoVLM-460M-8k:

    config.json          all numbers: vit_*, lm_*, mp_*; the tokenizer is that of another folder,
                         lm_tokenizer, and vlm_extra_tokens
    model.safetensors    vision_encoder.*, with q, k and v in one tensor; MP.proj; decoder.*

Its pixels are neither shifted nor scaled: they are from 0 to 1. Beyond lm_max_position_embeddings
tokens its RoPE changes from step to step, which is not computed here.
"""

import json

import torch

from .. import UserError, files
from ..data.chat_template import end_token_id
from ..data.image_processing import check_image_config, tokens_per_tile
from ..data.jinja_template import identify_template
from ..data.tokenizer import Tokenizer
from ..models.decoder import Decoder
from ..models.vision_encoder import VisionEncoder
from . import checkpoint as checkpoints
from .huggingface import add_special_tokens, check_fields, load_published_tensors, published_name

NANOVLM_NAMES = {  # of tensors, ours: published, as in huggingface.py
    "projector.linear_1": "MP.proj",
    "vision.patches": "vision_encoder.patch_embedding.conv",
    "vision.positions": "vision_encoder.patch_embedding.position_embedding",
    "vision.post_norm": "vision_encoder.layer_norm",
    "vision.layers.*.attention_norm": "vision_encoder.blocks.*.ln1",
    "vision.layers.*.mlp_norm": "vision_encoder.blocks.*.ln2",
    "vision.layers.*.q_proj": "vision_encoder.blocks.*.attn.q_proj",  # parts of attn.qkv_proj
    "vision.layers.*.k_proj": "vision_encoder.blocks.*.attn.k_proj",
    "vision.layers.*.v_proj": "vision_encoder.blocks.*.attn.v_proj",
    "vision.layers.*.o_proj": "vision_encoder.blocks.*.attn.out_proj",
    "vision.layers.*.up_proj": "vision_encoder.blocks.*.mlp.fc1",
    "vision.layers.*.down_proj": "vision_encoder.blocks.*.mlp.fc2",
    "decoder.embed_tokens": "decoder.token_embedding",
    "decoder.norm": "decoder.norm",
    "decoder.lm_head": "decoder.head",
    "decoder.layers.*.attention_norm": "decoder.blocks.*.norm1",
    "decoder.layers.*.mlp_norm": "decoder.blocks.*.norm2",
    "decoder.layers.*.q_proj": "decoder.blocks.*.attn.q_proj",
    "decoder.layers.*.k_proj": "decoder.blocks.*.attn.k_proj",
    "decoder.layers.*.v_proj": "decoder.blocks.*.attn.v_proj",
    "decoder.layers.*.o_proj": "decoder.blocks.*.attn.out_proj",
    "decoder.layers.*.gate_proj": "decoder.blocks.*.mlp.gate_proj",
    "decoder.layers.*.up_proj": "decoder.blocks.*.mlp.up_proj",
    "decoder.layers.*.down_proj": "decoder.blocks.*.mlp.down_proj",
}
# arguments of VisionEncoder and Decoder: their fields in config.json
VISION_NUMBERS = {
    "tile": "vit_img_size",
    "patch": "vit_patch_size",
    "width": "vit_hidden_dim",
    "layers": "vit_n_blocks",
    "heads": "vit_n_heads",
    "intermediate_size": "vit_inter_dim",
    "eps": "vit_ln_eps",
}
DECODER_NUMBERS = {
    "vocab_size": "lm_vocab_size",
    "width": "lm_hidden_dim",
    "layers": "lm_n_blocks",
    "heads": "lm_n_heads",
    "kv_heads": "lm_n_kv_heads",
    "intermediate_size": "lm_inter_dim",
    "rope_theta": "lm_re_base",
    "eps": "lm_rms_eps",
    "tied": "lm_tie_weights",
}
HEAD, EMBEDDING = "decoder.head.weight", "decoder.token_embedding.weight"


# ---- reading ----
def read_hf_nanovlm(name, template=None, tensors=True):
    """Returns the Checkpoint of a folder of nanoVLM, or owner/name.

    template: of chat_template.TEMPLATES, if the folder's own is unknown. tensors: False for a
    Checkpoint without its model.
    """
    folder = files.find_pretrained(name)
    path = folder / "config.json"
    config = files.read_json(path)
    if not config.get("vlm_extra_tokens"):
        raise UserError(
            f"{path}: a nanoVLM without vlm_extra_tokens, such as nanoVLM-222M, whose images stand "
            "before all text, is not read here"
        )
    with files.refuse_odd_values(path):
        shapes, image_config = read_numbers(config)
        check_image_config(image_config, path)
        tokens = tokens_per_tile(image_config)
        required = dict(vit_cls_flag=False, lm_attn_scaling=1.0, mp_image_token_length=tokens)
        check_fields(config, required, path)
        tokenizer = read_tokenizer(folder, config)
        found = template or identify_template(config["lm_chat_template"], {}, tokenizer, path)
    if not template and found != "chatml":
        raise UserError(f"{path}: lm_chat_template is {found}, not chatml as in nanoVLM's code")
    template = template or "nanovlm"
    checkpoints.check_arguments(VisionEncoder, shapes["vision"], path, VISION_NUMBERS)
    checkpoints.check_arguments(Decoder, shapes["decoder"], path, DECODER_NUMBERS)
    end_token_id(tokenizer, template)  # raises UserError if there is none
    checkpoints.check_vocab_size(tokenizer, shapes["decoder"], path)
    history = {"folder": str(name), "nanovlm": {"from": str(name), "config": config}}
    model = read_model(shapes, image_config, folder) if tensors else None
    return checkpoints.Checkpoint(model, tokenizer, shapes, image_config, template, history)


def read_numbers(config):
    """Returns (arguments of VLM, image config) of a config.json."""
    vision = {ours: config[theirs] for ours, theirs in VISION_NUMBERS.items()}
    decoder = {ours: config[theirs] for ours, theirs in DECODER_NUMBERS.items()}
    shuffle, tile = config["mp_pixel_shuffle_factor"], vision["tile"]
    shapes = dict(vision=vision, decoder=decoder, shuffle=shuffle, projector_mlp=False)
    image_config = dict(tile=tile, patch=vision["patch"], shuffle=shuffle)
    image_config |= dict(mean=[0.0] * 3, std=[1.0] * 3, fit="squash", resample="bilinear")
    if edge := config.get("max_img_size"):  # nanoVLM-450M has none
        token = config["vlm_extra_tokens"].get("global_image_token")
        if edge % tile or token != "<|global_image|>":
            raise ValueError(f"max_img_size {edge} is not a multiple of {tile}, or no global image")
        image_config |= dict(fit="grid", resample="bicubic", longest_edge=edge)
        image_config["enlarge"] = config.get("resize_to_max_side_len", False)
        image_config["tile_texts"] = "nanovlm"
    return shapes, image_config


def read_tokenizer(folder, config):
    """Returns the tokenizer of lm_tokenizer, which is not downloaded, and of vlm_extra_tokens.

    The folder's own tokenizer.json goes before, if it has one.
    """
    name = config["lm_tokenizer"]
    found = folder if (folder / "tokenizer.json").is_file() else files.cached_snapshot(name)
    if found is None:
        raise UserError(
            f"{folder}: its tokenizer is {name}'s: hf download {name} config.json tokenizer.json"
        )
    return add_special_tokens(Tokenizer.load(found), config["vlm_extra_tokens"].values())


def read_model(shapes, image_config, folder):
    """Returns the VLM of a folder's weights."""
    paths, found = files.list_weight_files(folder), {}
    for name, (tensor, path) in files.read_weights(paths, []).items():
        if "position_embedding" in name:
            tensor = tensor.squeeze(0)
        found[name] = tensor, path
        if "qkv_proj" in name:
            del found[name]
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", letter)] = part, path
    if shapes["decoder"]["tied"] and HEAD in found:
        found[EMBEDDING] = found[HEAD]
    with torch.device("meta"):
        model = checkpoints.build_model(shapes, image_config)
    load_published_tensors(model, NANOVLM_NAMES, found, r"decoder\.rotary_embd", paths)
    if shapes["decoder"]["tied"]:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return model


# ---- writing ----
def export_hf_nanovlm(checkpoint, folder):
    """Write a checkpoint that read_hf_nanovlm made, trained or not, completely or not at all."""
    tensors, config = {}, checkpoint.history["nanovlm"]["config"]
    for name, tensor in checkpoints.saved_parameters(checkpoint.model).items():
        tensors[published_name(name, NANOVLM_NAMES)] = tensor
    for name in [name for name in tensors if name.startswith("vision_encoder.")]:
        if "position_embedding" in name:
            tensors[name] = tensors[name][None]
        if ".q_proj" in name:
            parts = [tensors.pop(name.replace("q_", f"{letter}_")) for letter in "qkv"]
            tensors[name.replace("q_", "qkv_")] = torch.cat(parts)
    if checkpoint.shapes["decoder"]["tied"]:
        tensors[HEAD] = tensors.pop(EMBEDDING)  # the name that safetensors keeps of the two
    K = checkpoint.model.decoder.head_dim
    exponent_k = torch.arange(0, K, 2).float() / K
    tensors["decoder.rotary_embd.inv_freq"] = 1.0 / config["lm_re_base"] ** exponent_k
    with checkpoints.atomic_folder(folder) as tmp:
        (tmp / "config.json").write_text(json.dumps(config, indent=4))
        files.write_tensors(tensors, tmp / "model.safetensors")
