"""Import and export of a whole model as an Idefics3 or SmolVLM folder.

It is the layout of Idefics3 (Laurençon et al. 2024), SmolVLM and SmolVLM2 (Marafioti et al. 2025)
in transformers, vLLM and llama.cpp. Videos are not read. A stitched model goes out as an Idefics3.
The files are those of llava.py, but for

    model.safetensors          model.vision_model.*, model.connector.*, model.text_model.*, lm_head
    preprocessor_config.json   how an image is split into tiles
"""

import re

import torch

from .. import UserError, files
from ..data import chat_template, image_processing
from . import huggingface, llava
from .huggingface import check_fields

CONNECTOR = {"linear_1": "connector.modality_projection.proj"}  # names of tensors, ours: published
IDEFICS3_PARTS = {  # of llava.published_tensors
    "vision": ("model.vision_model.", huggingface.CLIP),
    "projector": ("model.", CONNECTOR),
    "decoder": (
        "",
        {
            ours: re.sub(r"^model\.", "model.text_model.", theirs)
            for ours, theirs in huggingface.LLAMA.items()
        },
    ),
}
IDEFICS3_TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>")
IDEFICS3_TYPES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}  # model_type: name of its classes
JINJA = """\
«start»{% for message in messages %}{{ message['role'] | capitalize }}\
{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}\
{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}\
{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}\
{% endfor %}{% endif %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


# ---- reading ----
def read_idefics3(name, template=None, tensors=True):
    """Returns the Checkpoint of an Idefics3 or SmolVLM folder, or owner/name.

    template: of chat_template.TEMPLATES, if the folder's own is unknown. tensors: False for a
    Checkpoint without its model. Parameters keep their dtypes in the files.
    """
    folder = files.find_pretrained(name)
    path = folder / "config.json"
    config = {"scale_factor": 2} | files.read_json(path)
    if error := files.size_error("scale_factor", config["scale_factor"]):
        raise UserError(f"{path}: {error}")
    vision = huggingface.read_vision_encoder(name, shuffle=config["scale_factor"], tensors=tensors)
    decoder = huggingface.read_decoder(name, template=template, tensors=tensors)
    check_parts_fit(config, vision, decoder, folder)
    vision = vision._replace(shapes=vision.shapes | {"projector_mlp": False})
    found, _ = huggingface.read_whole_model(name, vision, decoder, CONNECTOR, "connector")
    if tensors:
        found.history["idefics3"] = decoder.history["folder"] | {"model_type": config["model_type"]}
    return found


def check_parts_fit(config, vision, decoder, folder):
    """Raises UserError if the folder joins the two parts in a way that is not computed here."""
    tied, image_config = decoder.shapes["decoder"]["tied"], vision.image_config
    check_fields(config, {"tie_word_embeddings": tied}, folder / "config.json")
    size, patch = config["vision_config"].get("image_size", 224), image_config["patch"]
    found = image_config["fit"], image_config["tile"]
    if (found[0], found[1] // patch) != ("split", size // patch):
        raise UserError(
            f"{folder}: its preprocessor makes tiles by fit={found[0]} of {found[1]} pixels, not "
            f"by max_image_size of {size}, the image_size of its vision_config"
        )
    for name in IDEFICS3_TOKENS:
        if name not in decoder.tokenizer.special:
            raise UserError(f"{folder}: {name} is not a special token of its tokenizer")
    check_positions(size // patch, folder)


def check_positions(side, where):
    """Raises UserError unless patch i of `side` patches across a tile has position i.

    The formula of transformers (Idefics3VisionEmbeddings) rounds: of 19 patches two get the same
    position. No published model has such a size.
    """
    index, boundaries = torch.arange(side), torch.arange(1 / side, 1.0, 1 / side)
    fraction = (index * (1.0 / torch.tensor(side))).clamp(max=1 - 1e-6)
    if not torch.bucketize(fraction, boundaries, right=True).equal(index):
        raise UserError(
            f"{where}: transformers gives some of {side} patches across a tile the same position, "
            "which is not computed here: choose another --tile"
        )


# ---- writing ----
def export_idefics3(checkpoint, folder):
    """Write a checkpoint as a folder of the kind that it was read from, or else as an Idefics3
    folder, completely or not at all.

    Raises UserError if the layout cannot express it.
    """
    llava.check_exportable(checkpoint, "an Idefics3", idefics3_rules(checkpoint))
    vision = checkpoint.shapes["vision"]
    check_positions(vision["tile"] // vision["patch"], "an Idefics3 folder")
    template = chat_template.TEMPLATES[checkpoint.chat_template]
    jinja = JINJA.replace("«start»", template["start"])
    if template["image_space"]:
        jinja = llava.template_to_jinja(checkpoint.chat_template, checkpoint.tokenizer)
    tensors = llava.published_tensors(checkpoint.model, IDEFICS3_PARTS)
    llava.write_folder(checkpoint, folder, config_files(checkpoint), jinja, tensors)


def idefics3_rules(checkpoint):
    """Returns the rules of llava.check_exportable for an Idefics3 folder."""
    vision, tokenizer = checkpoint.shapes["vision"], checkpoint.tokenizer
    template = chat_template.TEMPLATES[checkpoint.chat_template]
    return [
        (
            checkpoint.shapes.get("projector_mlp", True),
            "a projector of two layers: stitch with --projector=linear",
        ),
        (
            llava.vision_type(vision) != "siglip_vision_model" or not vision.get("post_norm", True),
            "a vision encoder that is not a SigLIP with its last norm: stitch with the --vision of "
            "one, without --vision_feature_layer",
        ),
        (
            not tokenizer.special.keys() >= set(IDEFICS3_TOKENS),
            "a tokenizer that lacks a special token around an image: stitch again",
        ),
        (
            tokenizer.prefix_space == "first",
            "a SentencePiece whose space stands before the first text alone: stitch with another "
            "--decoder",
        ),
        (
            not template["image_space"] and template["end"] != "<end_of_utterance>",
            f"the template {checkpoint.chat_template}: stitch with another --template",
        ),
    ]


def config_files(checkpoint):
    """Returns {file name: content}: those of a LLaVA folder, with what differs."""
    image_config, image_id = checkpoint.image_config, checkpoint.tokenizer.special["<image>"]
    model_type = checkpoint.history.get("idefics3", {}).get("model_type", "idefics3")
    name = IDEFICS3_TYPES[model_type]
    contents = llava.json_files(checkpoint, image_id)
    config, preprocessor = contents["config.json"], contents["preprocessor_config.json"]
    del preprocessor["do_center_crop"], preprocessor["crop_size"]
    del config["vision_config"]["vision_use_head"]
    config["vision_config"]["model_type"] = f"{model_type}_vision"
    kept = ("dtype", "vision_config", "text_config", "tie_word_embeddings")
    contents["config.json"] = {key: config[key] for key in kept} | {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "image_token_id": image_id,
        "scale_factor": image_config["shuffle"],
    }
    preprocessor |= {
        "image_processor_type": f"{name}ImageProcessor",
        "do_image_splitting": True,
        "do_pad": True,
        "size": {"longest_edge": image_config["longest_edge"]},
        "max_image_size": {"longest_edge": image_config["tile"]},
    }
    tokens = image_processing.tokens_per_tile(image_config)
    contents["processor_config.json"] = {"image_seq_len": tokens}
    for file in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        contents[file]["processor_class"] = f"{name}Processor"
    return contents
