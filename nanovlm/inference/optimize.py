"""Faster steps for one token at a time. A step sends one vector through the whole model, so every
weight is loaded for a single product:

    seconds a token >= bytes of the weights and of the KV cache / memory bandwidth

Two things keep a decoder from that bound. On a CPU, products of one vector that read a weight in
the wrong order run at a third of the bandwidth: PackedLinear. On a GPU, hundreds of small kernels
take Python longer to launch than the GPU to run: CUDAGraphStep.
"""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# oneDNN's call takes 8 µs longer than F.linear's. A weight of this size (576 × 576, not 256 × 256),
# or this many vectors for a weight of any size, make up for it.
MIN_WEIGHT, MIN_VECTORS = 1 << 17, 32
# A CPU without 16-bit instructions multiplies 32 vectors up to ten times as fast in float32, one
# vector more slowly, since it is bound by memory. They are level between two and four.
MIN_FLOAT32_VECTORS = 4
ONEDNN_DTYPES = {  # dtype: whether this CPU has the instructions for it
    torch.float32: lambda: True,
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class PackedLinear(nn.Module):
    """x · [A; B; …]ᵀ + bias: linear layers of the same input, joined to one.

    On a CPU the weight is packed once in oneDNN's own order, with the operators that torch.compile
    uses for frozen weights. For one vector in bfloat16 this is 1.4 to 2 times as fast as F.linear,
    depending on the CPU; for many vectors in float32 up to 2 times. A small weight is kept in both
    orders, and the packed one serves at least `min_vectors` vectors. On a CPU without instructions
    for a 16-bit weight, several vectors are multiplied in float32, one in the weight's dtype.
    """

    def __init__(self, *layers):
        super().__init__()
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.packed, self.min_vectors = None, 0
        supported = ONEDNN_DTYPES.get(self.weight.dtype, bool)()
        on_cpu = self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.has_slow_dtype = on_cpu and self.weight.itemsize == 2 and not supported
        if on_cpu and supported:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
            self.min_vectors = 1 if self.weight.numel() >= MIN_WEIGHT else MIN_VECTORS
        if self.min_vectors == 1:
            self.weight = self.packed

    def forward(self, x):
        vectors = x.numel() // x.shape[-1]
        if self.has_slow_dtype and vectors >= MIN_FLOAT32_VECTORS:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        if self.packed is None or vectors < self.min_vectors:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class JoinedLinear:
    """x -> (A · x, B · x, …): linear layers of the same input, computed as one product.

    It takes the place of a method of Block, so it is not a module.
    """

    def __init__(self, *layers):
        self.product = PackedLinear(*layers)
        self.widths = [layer.out_features for layer in layers]

    def __call__(self, x):
        return self.product(x).split(self.widths, dim=-1)


def optimize(model):
    """Replaces the model's linear layers by packed ones, and returns the model.

    In a block of the decoder, q, k and v become one product, and so do gate and up. The model can
    neither be trained nor saved afterwards. Each layer is freed once its replacement exists. A tied
    weight is copied: the embedding reads rows of it, the head all of it.
    """
    for block in model.decoder.layers:
        block.qkv_proj = JoinedLinear(block.q_proj, block.k_proj, block.v_proj)
        del block.q_proj, block.k_proj, block.v_proj
        block.gate_up_proj = JoinedLinear(block.gate_proj, block.up_proj)
        del block.gate_proj, block.up_proj
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))
    for parameter in model.parameters():
        # A safetensors file stays mapped, all of it, as long as one tensor lies in it.
        parameter.data = parameter.data.clone()
    model.decoder.graph_step = None  # see take_graph_step: the weights stay as they are
    return model


def take_graph_step(decoder, positions_BS, documents_BS):
    """Returns the CUDAGraphStep that an optimized decoder has kept, or None if there is none for an
    answer of this shape. While an answer uses it, no other can."""
    step = getattr(decoder, "graph_step", None)
    if step is None or step.positions_BS.shape != positions_BS.shape:
        return None
    if (step.documents_BS is None) != (documents_BS is None):
        return None
    decoder.graph_step = None
    return step


def keep_graph_step(decoder, step):
    """Keeps the step of an answer that ends, or None. Only one is kept: each holds a KV cache."""
    if step and hasattr(decoder, "graph_step"):
        decoder.graph_step = step


class StaticKVCache:
    """A KVCache of which every step reads all positions, for one token at a time.

    The shapes of a step stay the same while the cache fills up, and the next position is a number
    on the GPU, so that a step can be captured once and replayed. It shares the memory of `cache`.
    """

    def __init__(self, cache):
        device = cache.layers[0][0].device
        self.layers, self.length = cache.layers, cache.length
        self.position_1 = torch.empty(1, device=device, dtype=torch.long)
        self.cache_length = torch.empty(1, device=device, dtype=torch.int32)
        self.start(cache.length)

    def start(self, length):
        """The next token gets position `length`."""
        self.position_1.fill_(length)
        self.cache_length.fill_(length + 1)  # with the new token's own position (see `attention`)
        for k_BSGK, v_BSGK in self.layers:
            # A masked position has the weight 0, but 0 · NaN, which memory may hold, is NaN.
            k_BSGK[:, length:].zero_()
            v_BSGK[:, length:].zero_()

    def update(self, layer, k_B1GK, v_B1GK):
        k_BSGK, v_BSGK = self.layers[layer]
        k_BSGK.index_copy_(1, self.position_1, k_B1GK)
        v_BSGK.index_copy_(1, self.position_1, v_B1GK)
        return k_BSGK, v_BSGK

    def advance(self):
        self.position_1 += 1
        self.cache_length += 1


class CUDAGraphStep:
    """ids_B -> logits_BV, one token a sequence. On a GPU the step is captured as a CUDA graph and
    replayed without Python's launches. On a CPU the same step runs uncaptured, for tests."""

    def __init__(self, decoder, cache, positions_BS, documents_BS):
        self.decoder, self.cache = decoder, StaticKVCache(cache)
        self.positions_BS, self.documents_BS = positions_BS, documents_BS
        device = positions_BS.device
        self.ids_B = torch.zeros(len(positions_BS), dtype=torch.long, device=device)
        self.growing_cache, self.graph = cache, None
        if device.type == "cuda":
            self.capture()

    def start(self, positions_BS, documents_BS):
        """Starts another answer in the captured memory. growing_cache holds its prompt."""
        self.positions_BS.copy_(positions_BS)
        if documents_BS is not None:
            self.documents_BS.copy_(documents_BS)
        self.cache.start(self.growing_cache.length)

    def step(self):
        positions_B1 = self.positions_BS.index_select(1, self.cache.position_1)
        x_B1D = self.decoder.embed_tokens(self.ids_B[:, None])
        hidden_B1D = self.decoder(x_B1D, positions_B1, self.documents_BS, self.cache)
        return self.decoder.lm_head(hidden_B1D[:, -1])

    def capture(self):
        """Sets `graph`, or warns that the steps run without one."""
        try:
            with torch.cuda.device(self.ids_B.device):
                self.graph = self.new_graph()
        except RuntimeError as e:
            warnings.warn(f"Without a CUDA graph, decoding is slower: {e}", stacklevel=2)

    def new_graph(self):
        """Warms up on a side stream first, where kernels are compiled and libraries allocate. These
        steps all write to the next token's position."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):  # which also restores the stream if the capture fails
            for _ in range(3):
                self.step()
            # thread_local: another thread, such as one that pins memory, may go on meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self.logits_BV = self.step()
                self.cache.advance()
        current.wait_stream(side)
        return graph

    def __call__(self, ids_B):
        self.ids_B.copy_(ids_B)
        if self.graph is None:
            logits_BV = self.step()
            self.cache.advance()
            return logits_BV
        self.graph.replay()
        return self.logits_BV
