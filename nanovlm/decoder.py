"""The brain: a Mistral-style decoder (Llama, Mistral and SmolLM2 differ from it in numbers only).

Every token's vector looks back at the ones before it (attention), thinks for itself (SwiGLU), and does so again layer by layer; the head turns
the last vector into a score for every next token. Position is told by rotation: RoPE turns queries and keys by an angle that grows with
their place, so that a dot product sees only how far apart they are (Su et al. 2021).
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import attention
from .rmsnorm import add_rmsnorm, rmsnorm


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x_BTD, y_BTD=None):
        """The norm of x; with y, (x + y, the norm of that)."""
        return rmsnorm(x_BTD, self.weight, self.eps) if y_BTD is None else add_rmsnorm(x_BTD, y_BTD, self.weight, self.eps)


def rope_angles(positions_BT, K, theta, scaling=None):
    """cos and sin of (B, T, 1, K): pair i of the K numbers turns by position · theta^(-2i/K) radians. float32, as bfloat16 takes 257 for 256.
    Pair i is (i, i + K/2), Hugging Face's order; the first of a pair takes its sin with a minus (see `rotate`)."""
    frequency_k = theta ** -(torch.arange(0, K, 2, device=positions_BT.device, dtype=torch.float32) / K)
    if scaling is not None:
        frequency_k = stretch(frequency_k, theta, scaling)
    angle_BTk = positions_BT[..., None].float() * frequency_k
    cos_BTk, sin_BTk = angle_BTk.cos(), angle_BTk.sin()
    if scaling is not None and scaling["rope_type"] == "yarn":
        cos_BTk, sin_BTk = cos_BTk * scaling["attention_factor"], sin_BTk * scaling["attention_factor"]
    cos_BTK, sin_BTK = torch.cat([cos_BTk, cos_BTk], dim=-1), torch.cat([-sin_BTk, sin_BTk], dim=-1)
    return cos_BTK[:, :, None], sin_BTK[:, :, None]


def stretch(frequency_k, theta, scaling):
    """The frequencies of a model taught to read texts `factor` times as long as those it grew up with, `original_max_position_embeddings`.

    A pair that turned many times over an old text knows its neighbours by it and keeps its frequency; one that turned less than once would meet
    angles it has never seen and is slowed down; between them, a ramp:  frequency · (keep + (1 - keep) / factor).
    scaling: Hugging Face's names; rope_type is linear (keep = 0), llama3 (the ramp is straight in turns) or yarn (in i; Peng et al. 2023).
    """
    k, factor = len(frequency_k), scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency_k / factor
    length = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep_k = (length * frequency_k / (2 * math.pi) - low) / (high - low)
    else:
        first, last = (k * math.log(length / (turns * 2 * math.pi)) / math.log(theta) for turns in (scaling["beta_fast"], scaling["beta_slow"]))
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * k - 1)
        i_k = torch.arange(k, device=frequency_k.device, dtype=torch.float32)
        keep_k = 1 - (i_k - first) / max(last - first, 0.001)
    keep_k = keep_k.clamp(0, 1)
    return frequency_k * (keep_k + (1 - keep_k) / factor)


def rotate(x, angles):
    """Queries or keys, (B, T, heads, K), each pair turned by the angle of its position: (a, b) -> (a · cos - b · sin, b · cos + a · sin)."""
    cos_BT1K, sin_BT1K = angles
    return (x * cos_BT1K + x.roll(x.shape[-1] // 2, dims=-1) * sin_BT1K).to(x.dtype)


class Cache:
    """Keys and values of the tokens already read: one (B, S, G, K) pair a layer, allocated once, filled from the left."""

    def __init__(self, decoder, rows, capacity):
        block, weight = decoder.layers[0], decoder.embed.weight
        shape = (rows, capacity, block.kv_heads, block.head_size)
        self.pairs = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in decoder.layers]
        self.length, self.filled = 0, None

    def extend(self, layer, k_BTGK, v_BTGK):
        """Store a layer's new keys and values after the old; return all of them, (B, S, G, K) each."""
        end = self.length + k_BTGK.shape[1]
        for stored, new in zip(self.pairs[layer], (k_BTGK, v_BTGK), strict=True):
            stored[:, self.length : end] = new
        return tuple(stored[:, :end] for stored in self.pairs[layer])


class FixedCache:
    """A Cache with all its places in sight, for one token at a time: the shapes of a step stay the same while it fills up, and where the token goes
    is a number on the device, so that the step can be recorded once and played again. It shares the memory of the Cache that it goes on from."""

    def __init__(self, cache):
        device = cache.pairs[0][0].device
        self.pairs, self.length = cache.pairs, cache.length
        self.place_1 = torch.tensor([cache.length], device=device)
        self.filled = torch.tensor([cache.length + 1], device=device, dtype=torch.int32)  # the token's own place among them (see `attention`)
        for stored in (tensor[:, cache.length :] for pair in self.pairs for tensor in pair):
            stored.zero_()  # what is hidden counts 0 times, which a number left behind in memory may survive as NaN

    def extend(self, layer, k_B1GK, v_B1GK):
        for stored, new in zip(self.pairs[layer], (k_B1GK, v_B1GK), strict=True):
            stored.index_copy_(1, self.place_1, new)
        return self.pairs[layer]

    def advance(self):
        self.place_1 += 1
        self.filled += 1


class Block(nn.Module):
    def __init__(self, *, width, heads, kv_heads, head_size, ffn, eps, window):
        super().__init__()
        self.heads, self.kv_heads, self.head_size, self.window = heads, kv_heads, head_size, window
        self.attention_norm = RMSNorm(width, eps)
        self.query = nn.Linear(width, heads * head_size, bias=False)
        self.key = nn.Linear(width, kv_heads * head_size, bias=False)
        self.value = nn.Linear(width, kv_heads * head_size, bias=False)
        self.out = nn.Linear(heads * head_size, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.gate, self.up = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x_BTD, angles, documents_BS, cache, layer):
        q_BTHK, k_BTGK, v_BTGK = self.query_key_value(self.attention_norm(x_BTD), angles)
        k_BSGK, v_BSGK = (k_BTGK, v_BTGK) if cache is None else cache.extend(layer, k_BTGK, v_BTGK)
        filled = None if cache is None else cache.filled
        seen_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, window=self.window, documents_BS=documents_BS, filled=filled)
        x_BTD, normed_BTD = self.mlp_norm(x_BTD, self.out(seen_BTHK.flatten(-2)))
        gate_BTF, up_BTF = self.gate_up(normed_BTD)
        return x_BTD + self.down(F.silu(gate_BTF) * up_BTF)

    def query_key_value(self, normed_BTD, angles):
        q_BTHK, k_BTGK, v_BTGK = (part(normed_BTD).unflatten(-1, (-1, self.head_size)) for part in (self.query, self.key, self.value))
        return rotate(q_BTHK, angles), rotate(k_BTGK, angles), v_BTGK

    def gate_up(self, normed_BTD):
        return self.gate(normed_BTD), self.up(normed_BTD)


class Decoder(nn.Module):
    """Embeddings x_BTD in, normed hidden states hidden_BTD out; `head.weight` (V, D) turns those into logits.

    window: how far back a token sees, for all layers or a list of one a layer (Ministral); None: to the start.
    scaling: how RoPE is stretched for longer texts (see `stretch`).
    """

    def __init__(self, *, vocabulary, width, layers, heads, kv_heads, ffn, head_size=None, theta=10000.0, scaling=None, eps=1e-5, window=None,
                 tied=False):
        super().__init__()
        self.head_size, self.theta, self.scaling = head_size or width // heads, theta, scaling
        windows = window if isinstance(window, list) else [window] * layers
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            Block(width=width, heads=heads, kv_heads=kv_heads, head_size=self.head_size, ffn=ffn, eps=eps, window=windows[i])
            for i in range(layers)
        )
        self.norm = RMSNorm(width, eps)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in [p for p in self.parameters() if p.dim() == 2]:
            nn.init.normal_(weight, std=width**-0.5)  # Llama's 0.02 is this for a width of 2,500; small widths need more
        for layer in self.layers:  # 2 · layers additions to the residual stream keep it near the embeddings' size (GPT-2, section 2.3)
            nn.init.normal_(layer.out.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(layer.down.weight, std=(2 * layers * ffn) ** -0.5)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x_BTD, positions_BT, documents_BS=None, cache=None):
        angles = rope_angles(positions_BT, self.head_size, self.theta, self.scaling)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, angles, documents_BS, cache, i)
        if cache is not None:
            cache.length += x_BTD.shape[1]
        return self.norm(x_BTD)
