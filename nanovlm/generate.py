"""Speaking at the pace of memory. A token is said by sending one vector through the whole model, so every weight is fetched for a single product:

    seconds a token >= bytes of the weights and of the cache / bytes that memory delivers in a second

What keeps a decoder from that is the rest: on a CPU, products of one vector that walk through a weight against its grain, at a third of the
memory's pace, and on a card, hundreds of small calls that Python makes more slowly than the card works them off.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import kernels
from .decoder import Block, FixedCache, rotate
from .rmsnorm import add_rmsnorm, rmsnorm

LARGE = 1 << 17  # numbers of a weight from which oneDNN's call, 8 µs longer than F.linear's, is made up for by its product (576 × 576, not 256 × 256)
MANY = 32  # vectors from which it is for any weight
PATIENCE = 16  # tokens said before a step is recorded
SUPPORTED = {  # dtypes that oneDNN multiplies, where this CPU has the instructions
    torch.float32: lambda: True,
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class Product(nn.Module):
    """x · [A; B; …]ᵀ + bias: linear layers that read the same vectors as one, its weight fetched in one go.

    On a CPU the weight is laid out once as oneDNN reads it (the two operators that torch.compile would put here, if its weights were frozen): 1.4
    to 2 times as fast as F.linear, by the CPU, for one vector in bfloat16, and for many in float32 up to 2 times. A small one stays there as it was,
    too, for a few vectors at a time.
    """

    def __init__(self, *linears):
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.packed, self.enough = None, 0  # enough: so many vectors are worth oneDNN's call
        if self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and SUPPORTED.get(self.weight.dtype, bool)():
            self.packed, self.enough = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1), 1 if self.weight.numel() >= LARGE else MANY
        if self.enough == 1:
            self.weight = self.packed

    def forward(self, x):
        if self.packed is None or x.numel() < self.enough * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Speaker:
    """A decoder's block with the products that read the same vector joined. It is no module: what Python does around a call of one, and around each
    look at a part of one, takes 5% of a token's time on a CPU."""

    __call__ = Block.forward

    def __init__(self, block):
        self.heads, self.kv_heads, self.head_size, self.window = block.heads, block.kv_heads, block.head_size, block.window
        before, between = ({"weight": norm.weight.detach().clone(), "eps": norm.eps} for norm in (block.attention_norm, block.mlp_norm))
        self.attention_norm, self.mlp_norm = partial(rmsnorm, **before), partial(add_rmsnorm, **between)
        self.look, self.think = Product(block.query, block.key, block.value), Product(block.gate, block.up)
        self.out, self.down = Product(block.out), Product(block.down)

    def query_key_value(self, normed_BTD, angles):
        all_heads = self.look(normed_BTD).unflatten(-1, (-1, self.head_size))
        turning, v_BTGK = all_heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q_BTHK, k_BTGK = rotate(turning, angles).split((self.heads, self.kv_heads), dim=2)
        return q_BTHK, k_BTGK, v_BTGK

    def gate_up(self, normed_BTD):
        return self.think(normed_BTD).chunk(2, dim=-1)


def ready(model):
    """The model, its layers exchanged for ones that see and speak fast, each old one let go as the new one is there. It can neither train nor be
    saved then. A weight that is both embedding and head is there twice: one fetches rows of it, the other all."""
    blocks = [*model.decoder.layers]
    del model.decoder.layers
    model.decoder.layers = [Speaker(blocks.pop(0)) for _ in range(len(blocks))]
    model.decoder.head = Product(model.decoder.head)
    for parent in [*model.vision.modules(), *model.projector.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Product(child))
    for rest in model.parameters():
        rest.data = rest.data.clone()  # a file of weights stays mapped, all of it, as long as one tensor lies there
    return model


class Steps:
    """What a decoder expects next in every row, (B, V) logits, of tokens that come one after another into its cache.

    record: let an answer of more than PATIENCE tokens be spoken by a Recorded step. Recording takes as long as a few steps, which one word would
    not make up for. --kernels=torch asks for what PyTorch does by itself, so nothing is recorded.
    """

    def __init__(self, decoder, cache, positions_BS, documents_BS, record):
        self.decoder, self.cache, self.positions_BS, self.documents_BS = decoder, cache, positions_BS, documents_BS
        self.spoken, self.recorded, self.record = 0, None, record and kernels.choice != "torch"

    def __call__(self, x_BtD):
        """Embeddings of the next tokens of every row, all of a prompt or one."""
        start, end = self.cache.length, self.cache.length + x_BtD.shape[1]
        seen_Bs = None if self.documents_BS is None else self.documents_BS[:, :end]
        return self.decoder.head(self.decoder(x_BtD, self.positions_BS[:, start:end], seen_Bs, self.cache)[:, -1])

    def one(self, ids_B):
        """The next token of every row."""
        if self.record and self.spoken == PATIENCE:
            self.recorded = Recorded(self.decoder, self.cache, self.positions_BS, self.documents_BS)
        self.spoken += 1
        return self.recorded(ids_B) if self.recorded else self(self.decoder.embed(ids_B[:, None]))


class Recorded:
    """A step of which no shape changes from token to token: on a card it is recorded as a CUDA graph, which the card then plays without waiting for
    Python's thousand calls. On a CPU, where nothing is recorded, it is the same step."""

    def __init__(self, decoder, cache, positions_BS, documents_BS):
        self.decoder, self.cache, self.positions_BS, self.documents_BS = decoder, FixedCache(cache), positions_BS, documents_BS
        self.ids_B, self.graph = torch.zeros(len(positions_BS), dtype=torch.long, device=positions_BS.device), None
        if positions_BS.device.type == "cuda":
            self.record()

    def step(self):
        positions_B1 = self.positions_BS.index_select(1, self.cache.place_1)
        hidden_B1D = self.decoder(self.decoder.embed(self.ids_B[:, None]), positions_B1, self.documents_BS, self.cache)
        return self.decoder.head(hidden_B1D[:, -1])

    def record(self):
        """First a few steps aside, in which kernels are compiled and libraries make themselves at home; they all write to the next token's place."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step()
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = self.step()
            self.cache.advance()

    def __call__(self, ids_B):
        self.ids_B.copy_(ids_B)
        if self.graph is None:
            logits_BV = self.step()
            self.cache.advance()
            return logits_BV
        self.graph.replay()
        return self.logits_BV


def choose(logits_BV, temperature, top_k, top_p, generators):
    """The next id of each row: the likeliest (temperature 0), or a draw from softmax(logits / temperature) cut to the top_k likeliest ids (0: all)
    and to the fewest likeliest ids that hold top_p of the probability (nucleus sampling, Holtzman et al. 2019)."""
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    sorted_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    keep_BV = (before_BV < top_p) & (torch.arange(sorted_BV.shape[1], device=logits_BV.device) < (top_k or sorted_BV.shape[1]))
    kept_BV = (sorted_BV * keep_BV).cpu()
    draws = [int(torch.multinomial(kept_V, 1, generator=g)) for kept_V, g in zip(kept_BV, generators, strict=True)]
    return [int(order_V[i]) for order_V, i in zip(order_BV, draws, strict=True)]
