"""Import and export of a whole model as an Idefics3 or SmolVLM folder.

It is the layout of Idefics3 (Laurençon et al. 2024), SmolVLM and SmolVLM2 (Marafioti et al. 2025)
in transformers, vLLM and llama.cpp. Videos are not read. The files are those of llava.py, but for

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
    with torch.device("meta"):
        found = huggingface.combine_parts(vision, decoder, {"folder": str(name)})
    if not tensors:
        return found
    paths = files.list_weight_files(folder)
    weights = files.read_weights(paths, [(r"^model\.", "")])
    ignored = r"(?!connector)"
    huggingface.load_published_tensors(found.model.projector, CONNECTOR, weights, ignored, paths)
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
    for name in ("<image>", "<fake_token_around_image>"):
        if name not in decoder.tokenizer.special:
            raise UserError(f"{folder}: {name} is no special token of its tokenizer")


# ---- writing ----
def export_idefics3(checkpoint, folder):
    """Write a checkpoint that read_idefics3 made, trained or not, as a folder of the same kind,
    completely or not at all."""
    template = chat_template.TEMPLATES[checkpoint.chat_template]
    jinja = JINJA.replace("«start»", template["start"])
    if template["image_space"]:
        jinja = llava.template_to_jinja(checkpoint.chat_template, checkpoint.tokenizer)
    tensors = llava.published_tensors(checkpoint.model, IDEFICS3_PARTS)
    llava.write_folder(checkpoint, folder, config_files(checkpoint), jinja, tensors)


def config_files(checkpoint):
    """Returns {file name: content}: those of a LLaVA folder, with what differs."""
    image_config, image_id = checkpoint.image_config, checkpoint.tokenizer.special["<image>"]
    model_type = checkpoint.history["idefics3"]["model_type"]
    name = IDEFICS3_TYPES[model_type]
    contents = llava.json_files(checkpoint, image_id)
    config, preprocessor = contents["config.json"], contents["preprocessor_config.json"]
    del preprocessor["do_center_crop"], preprocessor["crop_size"]
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
