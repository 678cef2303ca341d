"""Generating text: prefill the prompt, then one token at a time from the KV cache."""

import torch

from ..kernels import dispatch
from ..models.decoder import KVCache
from .optimize import CUDAGraphStep, keep_graph_step, take_graph_step

CAPTURE_AFTER = 16  # steps: capturing one takes as long as a few
CAPACITY_UNIT = 256  # tokens of a KV cache: answers of about one length share a captured step


def generate(
    model,
    prompts,
    tiles_NCYX,
    *,
    stop,
    image_feature_index=None,
    max_tokens=256,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    logprobs=None,
    cuda_graph=("cuda",),
):
    """Continues every prompt, a list of ids with one IMAGE_TOKEN_ID for each image token.

    Yields a list for each step: the next id of every sequence, None once it has ended. A sequence
    ends after an id of `stop`, which is yielded, or after max_tokens. Prompts of unequal length are
    padded on the left. Each sequence draws from a generator of its own, so that it does not depend
    on the others. logprobs: a list to which each step appends [(id, log-probability)] of all
    sequences, by the softmax of the logits before temperature, top_k and top_p. cuda_graph: types
    of devices on which the steps of a long answer are captured. An optimized model keeps what was
    captured for its next answers of as many sequences and about that length. A model in training
    mode is never captured: its weights may move.
    """
    decoder, device = model.decoder, model.decoder.embed_tokens.weight.device
    B, T = len(prompts), max(map(len, prompts))
    pad_B = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    ids_BT = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
    # --kernels=torch asks for what PyTorch does by itself
    captures = device.type in cuda_graph and not model.training and dispatch.choice != "torch"
    capacity = T + max_tokens
    if captures:
        capacity = -(-capacity // CAPACITY_UNIT) * CAPACITY_UNIT
    slot_BS = torch.arange(capacity, device=device).expand(B, -1)
    positions_BS = (slot_BS - pad_B[:, None]).clamp(min=0)
    # padding is a document of its own
    documents_BS = (slot_BS >= pad_B[:, None]).int() if pad_B.any() else None
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    graph_step = take_graph_step(decoder, positions_BS, documents_BS) if captures else None
    cache = graph_step.growing_cache if graph_step else KVCache(decoder, B, capacity)
    cache.length = 0
    # FSDP2 fails on tensors of inference_mode, which have no version counters.
    no_grad = torch.no_grad if model.training else torch.inference_mode

    with no_grad():
        x_BTD = model.embed(ids_BT, tiles_NCYX.to(device), image_feature_index)
        logits_BV = next_logits(decoder, cache, x_BTD, positions_BS, documents_BS)
        if graph_step:
            graph_step.start(positions_BS, documents_BS)
    finished = [False] * B
    for count in range(1, max_tokens + 1):
        next_ids = sample_next_token(logits_BV.float(), temperature, top_k, top_p, generators)
        if logprobs is not None:
            chosen_B = logits_BV.float().log_softmax(-1)[torch.arange(B), next_ids]
            logprobs.append(list(zip(next_ids, chosen_B.tolist(), strict=True)))
        yield [None if done else i for i, done in zip(next_ids, finished, strict=True)]
        finished = [done or i in stop for i, done in zip(next_ids, finished, strict=True)]
        if all(finished) or count == max_tokens:
            keep_graph_step(decoder, graph_step)
            return
        ids_B = torch.tensor(next_ids, device=device)
        with no_grad():
            if captures and not graph_step and count == CAPTURE_AFTER + 1:
                graph_step = CUDAGraphStep(decoder, cache, positions_BS, documents_BS)
            if graph_step:
                logits_BV = graph_step(ids_B)
            else:
                x_B1D = decoder.embed_tokens(ids_B[:, None])
                logits_BV = next_logits(decoder, cache, x_B1D, positions_BS, documents_BS)


def next_logits(decoder, cache, x_BtD, positions_BS, documents_BS):
    """Returns the logits (B, V) of every sequence's next token, and adds t tokens to the KV cache.

    x_BtD: embeddings of the prompt (prefill), or of one token.
    """
    start, end = cache.length, cache.length + x_BtD.shape[1]
    documents_Bs = None if documents_BS is None else documents_BS[:, :end]
    hidden_BtD = decoder(x_BtD, positions_BS[:, start:end], documents_Bs, cache)
    return decoder.lm_head(hidden_BtD[:, -1])


def sample_next_token(logits_BV, temperature, top_k, top_p, generators):
    """Returns the next id of each sequence: the likeliest (temperature 0), or a draw from
    softmax(logits / temperature), cut to the top_k likeliest ids (0: all) and to the fewest
    likeliest ids that hold top_p of the whole distribution (nucleus sampling, Holtzman et al.
    2019)."""
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    sorted_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True)
    previous_BV = sorted_BV.cumsum(-1) - sorted_BV
    rank_V = torch.arange(sorted_BV.shape[1], device=logits_BV.device)
    keep_BV = (previous_BV < top_p) & (rank_V < (top_k or sorted_BV.shape[1]))
    kept_BV = (sorted_BV * keep_BV).cpu()
    next_ids = []
    for kept_V, order_V, generator in zip(kept_BV, order_BV, generators, strict=True):
        rank = int(torch.multinomial(kept_V, 1, generator=generator))
        next_ids.append(int(order_V[rank]))
    return next_ids
