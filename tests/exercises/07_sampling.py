"""Exercise 7: nucleus sampling with a KV cache.

A model gives a probability to every next token. To take always the likeliest is dull, and to draw
from all of them goes astray, as thousands of unlikely tokens are likely together. Nucleus sampling
draws from the nucleus alone: the fewest likeliest tokens whose probabilities sum to at least top_p.

    probabilities 0.5 0.3 0.1 0.06 0.04,  top_p 0.7:   draw from the first two, with 5 : 3

Each new token attends to all tokens before it. Their keys and values do not change, so they are
kept: the KV cache. The whole prompt passes through the decoder once (prefill), and after that one
token at a time.

    cache = KVCache(decoder, 1, max_length)
    hidden_BTD = decoder(decoder.embed_tokens(ids_BT), positions_BT, None, cache)
    logits_BTV = decoder.lm_head(hidden_BTD)

Fill in `generate`, then run

    python -m pytest -n 0 tests/exercises/07_sampling.py

The core's answer: `generate` and `sample_next_token` in nanovlm/inference/generate.py.
Source: Holtzman et al. 2019.
"""

import torch
from checking import check
from conftest import make_vlm

from nanovlm.models.decoder import KVCache  # noqa: F401 (your function needs it)

PROMPT = [3, 17, 5, 29]


def generate(decoder, prompt, max_tokens, top_p, seed):
    """Returns a list of max_tokens ids that continue the prompt, a list of ids.

    Each id is drawn from the nucleus of top_p. seed: of a torch.Generator for the draws.
    """
    ...


def make_decoder():
    return make_vlm().decoder


@torch.no_grad()
def next_probabilities(decoder, ids):
    """By a forward pass over all ids, without a cache."""
    ids_1T = torch.tensor([ids])
    hidden_1TD = decoder(decoder.embed_tokens(ids_1T), torch.arange(len(ids))[None])
    return decoder.lm_head(hidden_1TD[0, -1]).softmax(-1)


def generated(decoder, *arguments):
    ids = generate(decoder, PROMPT, *arguments)
    check(ids is not None, "the function returns None; fill in its body")
    count = arguments[0]
    check(len(ids) == count, f"{len(ids)} ids are returned, and should be {count}")
    return [int(i) for i in ids]


def test_a_small_nucleus_holds_the_likeliest_token_alone():
    decoder, ids = make_decoder(), list(PROMPT)
    for _ in range(6):
        ids.append(int(next_probabilities(decoder, ids).argmax()))
    found = generated(decoder, 6, 1e-6, 0)
    check(found == ids[4:], f"top_p near 0 gives {found}; the likeliest ids are {ids[4:]}")


def test_every_token_passes_through_the_decoder_once():
    decoder, lengths = make_decoder(), []
    decoder.layers[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    generated(decoder, 5, 0.9, 0)
    expected = [4, 1, 1, 1, 1]
    check(lengths[:5] == expected, f"tokens of each pass: {lengths}, and should be {expected}")


def test_no_token_outside_the_nucleus_is_drawn():
    decoder, top_p = make_decoder(), 0.6
    for seed in range(12):
        ids = PROMPT + generated(decoder, 5, top_p, seed)
        for t in range(4, 9):
            probabilities = next_probabilities(decoder, ids[:t])
            chosen = probabilities[ids[t]]
            likelier = float(probabilities[probabilities > chosen].sum())
            check(
                likelier < top_p,
                f"id {ids[t]} was drawn, but likelier ids hold {likelier:.2f} of the probability",
            )


def test_draws_follow_the_probabilities():
    decoder, top_p, draws = make_decoder(), 0.8, 600
    probabilities, order = next_probabilities(decoder, PROMPT).sort(descending=True)
    size = int((probabilities.cumsum(0) < top_p).sum()) + 1
    expected = float(probabilities[0] / probabilities[:size].sum())
    found = sum(generated(decoder, 1, top_p, seed) == [int(order[0])] for seed in range(draws))
    share = found / draws
    check(
        abs(share - expected) < 0.08,
        f"the likeliest id is drawn in {share:.0%} of {draws} cases; in its nucleus it has "
        f"{expected:.0%} of the probability",
    )
