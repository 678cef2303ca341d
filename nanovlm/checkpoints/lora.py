"""LoRA (Hu et al. 2021): a weight W stays as it is, and the product of two small matrices trains.

    y = W x + (alpha / rank) · B (A x)      A: (rank, in), random;  B: (out, rank), zero at first

A run with --lora_rank trains A and B of every linear layer in the blocks of a part. Its checkpoints
hold them, the parts that train whole (mostly the projector), and the name and the sha256 of the
base, the model that the run started from (checkpoint.py).
"""

import torch.nn as nn

LORA_PARTS = {"decoder": ("decoder",), "vision": ("vision",), "both": ("vision", "decoder")}


class LoRALinear(nn.Linear):
    """A linear layer with A and B beside its own weight and bias, whose names do not change.

    A starts as in peft, which is nn.Linear's default: uniform, Kaiming's with a = sqrt(5). As B
    starts at zero, the first output is that of the layer alone, to the bit.
    """

    def __init__(self, layer, rank, alpha):
        nn.Module.__init__(self)  # nn.Linear's would make a second weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = super().forward(x)
        y += self.lora_B(self.scale * self.lora_A(x))  # scaled where it is small; in place
        return y


def add_lora(model, *, rank, alpha, target, **_):
    """Put a LoRALinear in place of every linear layer in the blocks of a VLM's parts.

    target: decoder, vision or both. The weights stay the same tensors.
    """
    for part in LORA_PARTS[target]:
        for block in getattr(model, part).layers:
            for name, layer in [*block.named_children()]:
                if isinstance(layer, nn.Linear):
                    setattr(block, name, LoRALinear(layer, rank, alpha))


def is_trained(name, parts, lora):
    """Whether a parameter trains if these parts do. Of a part with LoRA, only A and B train.

    lora: the arguments of add_lora, or None.
    """
    part = name.partition(".")[0]
    has_lora = lora is not None and part in LORA_PARTS[lora["target"]]
    return part in parts and (not has_lora or ".lora_" in name)


def merged_weights(tensors, scale):
    """Returns {name: tensor} without A and B: W + scale · B A, in the dtype of W."""
    merged = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix("weight")
        if f"{layer}lora_A.weight" in tensors:
            a, b = (tensors[f"{layer}lora_{x}.weight"].float() for x in "AB")
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        if ".lora_" not in name:
            merged[name] = tensor
    return merged
