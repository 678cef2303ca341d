"""The vision encoder: a Vision Transformer (Dosovitskiy et al. 2020).

A tile of Y × X pixels is cut into patches. Each becomes a vector, plus the embedding of its
position. In every layer all patches attend to each other. Options make it one of these:

                            CLIP         SigLIP 1, 2  DINOv2
    class token             yes          no           yes
    norm before the layers  yes          no           no
    activation              quick-GELU   tanh-GELU    GELU
    bias of the patches     no           yes          yes
    LayerScale              no           no           yes
    features                layer -2     last, normed last, normed       (CLIP: as LLaVA does)
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import Attention

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # SigLIP
}


def sincos_positions(side, width):
    """Returns (side², D): sines and cosines of a patch's row and column at D/4 frequencies. It is
    the initial value of the position embeddings, from which a small ViT learns faster than from
    random ones (Beyer et al. 2022, "Better plain ViT baselines")."""
    # radians per patch: 1 to 1/100, as a row has tens of patches, not thousands
    frequency_d = 100.0 ** -torch.linspace(0, 1, math.ceil(width / 4))
    angle_Yd = torch.arange(side)[:, None] * frequency_d
    embedding = torch.cat([angle_Yd.sin(), angle_Yd.cos()], dim=1)
    rows, columns = embedding.repeat_interleave(side, 0), embedding.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)[:, :width]


def layer_scaled(x_NPD, scale_D):
    """LayerScale (Touvron et al. 2021): a learned factor per channel, if the encoder has it."""
    return x_NPD if scale_D is None else x_NPD * scale_D


class Block(nn.Module):
    def __init__(self, *, width, heads, intermediate_size, activation, eps, layer_scale=False):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.attention_norm = nn.LayerNorm(width, eps)
        layers = [nn.Linear(width, width) for _ in range(4)]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = layers
        self.attention = Attention(causal=False)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.up_proj = nn.Linear(width, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, width)
        self.attention_scale = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if layer_scale else None

    def forward(self, x_NPD):
        normed_NPD = self.attention_norm(x_NPD)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q_NPHK, k_NPHK, v_NPHK = (f(normed_NPD).unflatten(-1, (self.heads, -1)) for f in layers)
        out_NPD = self.o_proj(self.attention(q_NPHK, k_NPHK, v_NPHK).flatten(-2))
        x_NPD = x_NPD + layer_scaled(out_NPD, self.attention_scale)
        mlp_NPD = self.down_proj(self.activation(self.up_proj(self.mlp_norm(x_NPD))))
        return x_NPD + layer_scaled(mlp_NPD, self.mlp_scale)


class VisionEncoder(nn.Module):
    """Tiles (normalized floats) tiles_NCYX -> features_NPD, one per patch, row by row.

    vision_feature_layer: the layer whose output is returned, counted as in transformers: -1 is the
    last, -2 the last but one, 3 the third. Layers after it are not built. pre_norm: a LayerNorm of
    the embeddings, before all layers. post_norm: apply the final LayerNorm to the output. The class
    token is not returned.
    """

    def __init__(
        self,
        *,
        tile,
        patch,
        width,
        layers,
        heads,
        intermediate_size,
        class_token=False,
        pre_norm=False,
        post_norm=True,
        patch_bias=True,
        activation="gelu_tanh",
        layer_scale=False,
        eps=1e-6,
        vision_feature_layer=-1,
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=patch_bias)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5) if class_token else None
        positions = sincos_positions(tile // patch, width)
        self.positions = nn.Parameter(torch.cat([torch.zeros(int(class_token), width), positions]))
        self.pre_norm = nn.LayerNorm(width, eps) if pre_norm else None
        block = dict(
            width=width,
            heads=heads,
            intermediate_size=intermediate_size,
            activation=activation,
            eps=eps,
            layer_scale=layer_scale,
        )
        depth = vision_feature_layer + (layers + 1 if vision_feature_layer < 0 else 0)
        self.layers = nn.ModuleList(Block(**block) for _ in range(depth))
        self.post_norm = nn.LayerNorm(width, eps) if post_norm else None

    def forward(self, tiles_NCYX):
        # A convolution whose stride is the patch's size is a linear layer on the pixels of each
        # patch; it gives (N, D, Y / patch, X / patch).
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
