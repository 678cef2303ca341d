"""LoRA in the layout of Hugging Face's peft, in and out:

    adapter_config.json          rank, alpha, the layers, and the name of the base
    adapter_model.safetensors    A and B of each layer, by the names of transformers:
                                 base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

What comes in is plain LoRA of a decoder. What goes out may also be of a whole model.
"""

import json
import re
from pathlib import Path

from .. import UserError, files
from .checkpoint import atomic_folder, saved_parameters
from .huggingface import CLIP, DECODER_FAMILIES, DECODER_PREFIXES, LLAMA, published_name
from .idefics3 import IDEFICS3_PARTS, IDEFICS3_TYPES
from .llava import LLAVA_TYPES, PROJECTOR
from .lora import is_trained, merged_weights

PREFIX = "base_model.model."  # peft puts it before every name
# Fields of adapter_config.json that change no result once A and B are known.
FREE_FIELDS = set(
    """r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern task_type
    base_model_name_or_path revision auto_mapping inference_mode lora_dropout peft_version
    megatron_core qalora_group_size ensure_weight_tying""".split()  # noqa: SIM905
)
# The values that other fields may have. A field that is not here must be empty.
PLAIN_LORA = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],  # the others change the base's weights
}


# ---- in ----
def merge_adapter(checkpoint, folder):
    """Fold an adapter of the decoder into the weights of a checkpoint.

    Raises UserError if it holds something else, or an option that is not computed here.
    """
    folder = Path(folder)
    rank, alpha = read_adapter_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    renames = [(f"^{PREFIX}", ""), *DECODER_PREFIXES]
    found, weights = files.read_weights({path: None}, renames), saved_parameters(checkpoint.model)
    shapes, ours = {}, {}
    for name, weight in weights.items():
        part, _, rest = name.removesuffix(".weight").partition(".")
        if part == "decoder" and rest.startswith("layers.") and weight.dim() == 2:
            layer = published_name(f"{rest}.weight", LLAMA).removesuffix(".weight")
            pair = [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
            if found.keys() & pair:
                shapes[pair[0]], shapes[pair[1]] = (rank, weight.shape[1]), (len(weight), rank)
                ours |= {pair[0]: f"decoder.{rest}.lora_A.weight"}
                ours |= {pair[1]: f"decoder.{rest}.lora_B.weight"}
    tensors = files.match_finite_tensors(shapes, found, "(?!)", [path])
    pairs = {ours[name]: tensor for name, tensor in tensors.items()}
    merged = merged_weights(weights | pairs, alpha / rank)
    for name, parameter in checkpoint.model.named_parameters():
        parameter.data = merged[name]


def read_adapter_config(path):
    """Returns (rank, alpha). Raises UserError for any option that is not plain LoRA."""
    config = files.read_json(path, "peft_type", "r", "lora_alpha")
    for field, value in config.items():
        plain = PLAIN_LORA.get(field, [None, False, "", [], {}])
        if field not in FREE_FIELDS and value not in plain:
            raise UserError(
                f"{path}: {field} {value!r:.80} is not computed here; merge the adapter with peft "
                "(merge_and_unload), and stitch the folder that it saves"
            )
    rank, alpha = config["r"], config["lora_alpha"]
    if files.size_error("r", rank) or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise UserError(f"{path}: r {rank!r:.80} and lora_alpha {alpha!r:.80} are not plausible")
    return rank, alpha


# ---- out ----
DECODER_ALONE = {"decoder": ("", LLAMA)}
LLAVA_PARTS = {  # as IDEFICS3_PARTS: part: what stands before its names of layers, and these
    "vision": ("model.vision_tower.", CLIP),
    "projector": ("model.", PROJECTOR),
    "decoder": (
        "",
        {
            ours: re.sub(r"^model\.", "model.language_model.", theirs)
            for ours, theirs in LLAMA.items()
        },
    ),
}
LAYOUTS = (  # model types of transformers: the parts of such a model
    dict.fromkeys(DECODER_FAMILIES, DECODER_ALONE)
    | dict.fromkeys(LLAVA_TYPES, LLAVA_PARTS)
    | dict.fromkeys(IDEFICS3_TYPES, IDEFICS3_PARTS)
)


def export_adapter(checkpoint, base, folder):
    """Write the LoRA of a run as an adapter of `base`, completely or not at all.

    checkpoint: its LoRA is not merged. base: a folder of transformers with the weights of the run's
    base, as a whole model or as its decoder alone. A whole model's adapter also holds the projector
    if that has trained. Raises UserError if something else has trained whole.
    """
    path = files.find_pretrained(base) / "config.json"
    model_type = files.read_json(path).get("model_type")
    if model_type not in LAYOUTS:
        raise UserError(
            f"{path}: a model of type {model_type} takes no adapter here, only {', '.join(LAYOUTS)}"
        )
    lora, layout, tensors = checkpoint.lora, LAYOUTS[model_type], {}
    layers, projector = set(), set()
    for name, tensor in saved_parameters(checkpoint.model).items():
        part, _, rest = name.partition(".")
        if part not in layout or not is_trained(name, lora["trained"], lora):
            continue
        where, table = layout[part]
        layer, _, kind = rest.partition(".lora_")  # kind: A.weight or B.weight
        if kind:
            published = where + published_name(f"{layer}.weight", table).removesuffix(".weight")
            layers.add(published)
            published += f".lora_{kind}"
        elif part == "projector" and rest != "newline":
            published = where + published_name(rest, table)
            projector.add(published.rpartition(".")[0])
        else:
            raise UserError(
                f"an adapter cannot hold {name}, which has trained whole: python prepare.py "
                "merge_lora, then export"
            )
        tensors[PREFIX + published] = tensor
    if not layers:
        raise UserError(f"{base} has no part with LoRA; it is in the {lora['target']}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": sorted(layers),
        "modules_to_save": sorted(projector) or None,
    }
    with atomic_folder(folder) as tmp:
        files.write_tensors(tensors, tmp / "adapter_model.safetensors")
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
