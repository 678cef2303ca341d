"""The eye: a Vision Transformer (Dosovitskiy et al. 2020) with the options that CLIP, SigLIP and DINOv2 need.

A tile of Y × X pixels is cut into patches; each becomes a vector, gets the embedding of its place added, and looks at all the others, layer
after layer. What comes out is one feature vector a patch.

    CLIP     class token · norm before the layers · quick-GELU · no bias on the patches · LLaVA reads the last layer but one, un-normed
    SigLIP   neither class token nor pre-norm · tanh-GELU · bias on the patches · the last layer, normed
    DINOv2   class token · GELU · bias on the patches · every layer's two additions scaled by learnt weights · the last layer, normed
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import attention

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # SigLIP
}


def sincos(side, width):
    """(side², D): the sines and cosines of a patch's row and column at D/4 frequencies. A small ViT that starts from these learns where things
    are many times sooner than from random places (Beyer et al. 2022, "Better plain ViT baselines"); they train on from there."""
    frequency_d = 100.0 ** -torch.linspace(0, 1, -(-width // 4))  # radians a patch: from 1 down to 1/100
    angle_Yd = torch.arange(side)[:, None] * frequency_d
    wave = torch.cat([angle_Yd.sin(), angle_Yd.cos()], dim=1)
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)[:, :width]


def scaled(x_NPD, scale_D):
    """LayerScale (Touvron et al. 2021), for an eye that has it."""
    return x_NPD if scale_D is None else x_NPD * scale_D


class Block(nn.Module):
    def __init__(self, *, width, heads, ffn, activation, eps, layer_scale=False):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.attention_norm = nn.LayerNorm(width, eps)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.attention_scale = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if layer_scale else None

    def forward(self, x_NPD):
        normed_NPD = self.attention_norm(x_NPD)
        q_NPHK, k_NPHK, v_NPHK = (part(normed_NPD).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        x_NPD = x_NPD + scaled(self.out(attention(q_NPHK, k_NPHK, v_NPHK, causal=False).flatten(-2)), self.attention_scale)
        return x_NPD + scaled(self.down(self.activation(self.up(self.mlp_norm(x_NPD)))), self.mlp_scale)


class Vision(nn.Module):
    """tiles_NCYX, normalised floats -> features_NPD, one a patch, row by row, the class token dropped.

    read: which layer's output to take, counted as transformers counts hidden states (-1 the last, -2 the last but one, 0 what enters the
    first layer); post_norm: whether the final LayerNorm is applied to it. Layers after the one read are not built.
    """

    def __init__(self, *, tile, patch, width, layers, heads, ffn, class_token=False, pre_norm=False, post_norm=True,
                 patch_bias=True, activation="gelu_tanh", layer_scale=False, eps=1e-6, read=-1):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch, bias=patch_bias)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5) if class_token else None
        self.positions = nn.Parameter(torch.cat([torch.zeros(int(class_token), width), sincos(tile // patch, width)]))
        self.pre_norm = nn.LayerNorm(width, eps) if pre_norm else None
        used = layers + 1 + read if read < 0 else read
        self.layers = nn.ModuleList(Block(width=width, heads=heads, ffn=ffn, activation=activation, eps=eps, layer_scale=layer_scale)
                                    for _ in range(used))
        self.post_norm = nn.LayerNorm(width, eps) if post_norm else None

    def forward(self, tiles_NCYX):
        x_NPD = self.patches(tiles_NCYX).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_NPD = torch.cat([self.class_token.expand(len(x_NPD), 1, -1), x_NPD], dim=1)
        x_NPD = x_NPD + self.positions
        if self.pre_norm is not None:
            x_NPD = self.pre_norm(x_NPD)
        for layer in self.layers:
            x_NPD = layer(x_NPD)
        if self.post_norm is not None:
            x_NPD = self.post_norm(x_NPD)
        return x_NPD if self.class_token is None else x_NPD[:, 1:]
