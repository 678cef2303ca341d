"""The decoder: a Mistral-style language model. Options make it one of these:

                           Llama, Mistral   Qwen2, Qwen2.5   Qwen3   SmolLM3
    bias of q, k and v     no               yes              no      no
    norm of q and k        no               no               yes     no
    RoPE                   in all layers    in all           in all  in three of four

In every layer a token attends to itself and to the tokens before it (in some models, not further
back than a sliding window). Then it passes through an MLP, SwiGLU (Shazeer 2020):

    down_proj(silu(gate_proj(x)) · up_proj(x))

The head turns a token's last hidden state into one logit for each id of the vocabulary: the scores
of the next token. RoPE encodes positions: it rotates queries and keys by angles that grow with the
position. So their dot product depends on the two positions only through their difference (Su et al.
2021).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import dispatch
from .attention import Attention
from .rmsnorm import RMSNorm


def rope_cos_sin(positions_BT, K, theta, scaling=None):
    """Returns (cos, sin), each (B, T, 1, K): pair i rotates by position · theta^(-2i/K) radians.

    In the form that `apply_rope` needs: [cos, cos] and [-sin, sin], with a number for each pair.
    They are computed in float32: in bfloat16, position 257 would become 256. scaling: see
    `scale_rope`. YaRN's attention_factor multiplies q and k, so it multiplies q · k by its square.
    """
    exponent_k = torch.arange(0, K, 2, device=positions_BT.device, dtype=torch.float32) / K
    frequency_k = theta**-exponent_k
    if scaling is not None:
        frequency_k = scale_rope(frequency_k, theta, scaling)
    angle_BTk = positions_BT[..., None].float() * frequency_k
    cos_BTk, sin_BTk = angle_BTk.cos(), angle_BTk.sin()
    if scaling is not None and scaling["rope_type"] == "yarn":
        factor = scaling["attention_factor"]
        cos_BTk, sin_BTk = cos_BTk * factor, sin_BTk * factor
    cos_BTK = torch.cat([cos_BTk, cos_BTk], dim=-1)
    sin_BTK = torch.cat([-sin_BTk, sin_BTk], dim=-1)
    return cos_BTK[:, :, None], sin_BTK[:, :, None]


def scale_rope(frequency_k, theta, scaling):
    """Returns the frequencies of a model whose context was extended `factor` times.

    A pair that made many turns within the original context keeps its frequency. One that made less
    than one turn would meet unknown angles, so it is slowed down. In between it is a ramp:

        frequency · (keep + (1 - keep) / factor)

    scaling: Hugging Face's names. rope_type is linear (keep = 0), llama3 (keep is linear in the
    number of turns) or yarn (linear in the pair's number i; Peng et al. 2023).
    """
    k, factor = len(frequency_k), scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency_k / factor
    length = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep_k = (length * frequency_k / (2 * math.pi) - low) / (high - low)
    else:
        turns = scaling["beta_fast"], scaling["beta_slow"]
        first, last = (k * math.log(length / (n * 2 * math.pi)) / math.log(theta) for n in turns)
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * k - 1)
        i_k = torch.arange(k, device=frequency_k.device, dtype=torch.float32)
        keep_k = 1 - (i_k - first) / max(last - first, 0.001)
    keep_k = keep_k.clamp(0, 1)
    return frequency_k * (keep_k + (1 - keep_k) / factor)


def apply_rope(x, cos_sin):
    """Rotates each pair (a, b) of queries or keys: (a · cos - b · sin, b · cos + a · sin).

    Pair i is the numbers i and i + K/2, as in Hugging Face's models. So x is [a, b], and rolled by
    K/2 it is [b, a]: x · [cos, cos] + rolled · [-sin, sin].
    """
    cos_BT1K, sin_BT1K = cos_sin
    return (x * cos_BT1K + x.roll(x.shape[-1] // 2, dims=-1) * sin_BT1K).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far: two tensors (B, S, G, K) per layer, filled to `length`.

    These are 2 · layers · B · S · G · K numbers: query heads share keys to make them fewer. A
    sliding window does not. cache_length: None here; a StaticKVCache (inference/optimize.py) has
    its length as a number on the GPU, too.
    """

    def __init__(self, decoder, batch_size, max_length):
        block, weight = decoder.layers[0], decoder.embed_tokens.weight
        shape = (batch_size, max_length, block.kv_heads, block.head_dim)
        self.layers = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in decoder.layers]
        self.length, self.cache_length = 0, None

    def update(self, layer, k_BTGK, v_BTGK):
        """Appends a layer's new keys and values. Returns all of them, (B, S, G, K) each."""
        k_BSGK, v_BSGK = self.layers[layer]
        end = self.length + k_BTGK.shape[1]
        k_BSGK[:, self.length : end] = k_BTGK
        v_BSGK[:, self.length : end] = v_BTGK
        return k_BSGK[:, :end], v_BSGK[:, :end]


class Block(nn.Module):
    def __init__(
        self,
        *,
        width,
        heads,
        kv_heads,
        head_dim,
        intermediate_size,
        eps,
        sliding_window,
        rope=True,
        qkv_bias=False,
        qk_norm=False,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.rope = heads, kv_heads, head_dim, rope
        self.attention_norm = RMSNorm(width, eps)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.attention = Attention(window=sliding_window)
        self.mlp_norm = RMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, x_BTD, cos_sin, documents_BS, cache, layer_index, bounds=None):
        qkv = self.qkv_proj(self.attention_norm(x_BTD))
        q_BTHK, k_BTGK, v_BTGK = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        if self.q_norm is not None:
            # Under autocast the norm's weight is float32, and so would be its result.
            q_BTHK = self.q_norm(q_BTHK).to(v_BTGK.dtype)
            k_BTGK = self.k_norm(k_BTGK).to(v_BTGK.dtype)
        if self.rope:
            q_BTHK, k_BTGK = apply_rope(q_BTHK, cos_sin), apply_rope(k_BTGK, cos_sin)
        if cache is None:
            out_BTHK = self.attention(q_BTHK, k_BTGK, v_BTGK, documents_BS, None, bounds)
        else:
            k_BSGK, v_BSGK = cache.update(layer_index, k_BTGK, v_BTGK)
            rules = documents_BS, cache.cache_length, bounds
            out_BTHK = self.attention(q_BTHK, k_BSGK, v_BSGK, *rules)
        # x + attention, and its norm, in one call: a GPU has one kernel for both.
        x_BTD, normed_BTD = self.mlp_norm(x_BTD, self.o_proj(out_BTHK.flatten(-2)))
        gate_BTF, up_BTF = self.gate_up_proj(normed_BTD)
        return x_BTD + self.down_proj(F.silu(gate_BTF) * up_BTF)

    # inference/optimize.py joins the layers of each of these two to one matrix product.
    def qkv_proj(self, x_BTD):
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def gate_up_proj(self, x_BTD):
        return self.gate_proj(x_BTD), self.up_proj(x_BTD)


class Decoder(nn.Module):
    """Embeddings x_BTD -> normed hidden states hidden_BTD; lm_head maps those to logits (B, T, V).

    rope_theta, rope_scaling: see `rope_cos_sin`. sliding_window: how far back a token attends, in
    all layers, or a list with one number per layer (Ministral); None: to the start. tied: lm_head
    and embed_tokens share a weight. qkv_bias: q_proj, k_proj and v_proj have a bias. qk_norm: an
    RMSNorm of each query and key, before RoPE. rope_layers: 1 for each layer with RoPE, 0 for each
    without, which knows the order of tokens from the others (Yang et al. 2025); None: all have it.
    """

    def __init__(
        self,
        *,
        vocab_size,
        width,
        layers,
        heads,
        kv_heads,
        intermediate_size,
        head_dim=None,
        rope_theta=10000.0,
        rope_scaling=None,
        eps=1e-5,
        sliding_window=None,
        tied=False,
        qkv_bias=False,
        qk_norm=False,
        rope_layers=None,
    ):
        super().__init__()
        self.head_dim = head_dim or width // heads
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        windows = sliding_window if isinstance(sliding_window, list) else [sliding_window] * layers
        block = dict(width=width, heads=heads, kv_heads=kv_heads, head_dim=self.head_dim)
        block |= dict(intermediate_size=intermediate_size, eps=eps)
        block |= dict(qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(
            Block(sliding_window=windows[i], rope=not rope_layers or bool(rope_layers[i]), **block)
            for i in range(layers)
        )
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        # With a standard deviation of 1 / sqrt(width), a product has the size of its input. Llama's
        # 0.02 is this for a width of 2,500.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # Divided by sqrt(2 · layers), for the sum of 2 · layers residuals to have an RMS of about 1
        # at any depth (GPT-2, section 2.3).
        for layer in self.layers:
            nn.init.normal_(layer.o_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(layer.down_proj.weight, std=(2 * layers * intermediate_size) ** -0.5)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x_BTD, positions_BT, documents_BS=None, cache=None):
        """documents_BS: see `attention`. S counts the cached tokens, too; without a cache S = T."""
        cos_sin = rope_cos_sin(positions_BT, self.head_dim, self.rope_theta, self.rope_scaling)
        bounds = None
        if documents_BS is not None and x_BTD.shape[1] > 1:
            find_bounds = dispatch.kernel("document_bounds", x_BTD)
            bounds = find_bounds and find_bounds(documents_BS)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, cos_sin, documents_BS, cache, i, bounds)
        if cache is not None:
            cache.length += x_BTD.shape[1]
        return self.norm(x_BTD)
