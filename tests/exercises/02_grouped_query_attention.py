"""Exercise 2: grouped-query attention.

Every token asks a question (its query) and offers an answer (its value) under a label (its key).
A query takes an average of the values, weighted by how well their keys match it:

    weights = softmax(query · key / sqrt(K))    over the tokens up to its own
    out     = weights · values

A model keeps all keys and values while it generates: the KV cache. To make it small, several query
heads share one key/value head: with H = 6 query heads and G = 2 key/value heads, query heads 0, 1, 2
use key/value head 0, and 3, 4, 5 use key/value head 1.

Fill in `attention`, then run

    python -m pytest -n 0 tests/exercises/02_grouped_query_attention.py

The core's answer: `attention` in nanovlm/models/attention.py.
Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023.
"""

import math

import torch
from checking import check_equal


def attention(q_BTHK, k_BTGK, v_BTGK):
    """Returns out_BTHK. A token attends to itself and to the tokens before it."""
    ...


def random_case(G):
    torch.manual_seed(0)
    return torch.randn(2, 5, 6, 4), torch.randn(2, 5, G, 4), torch.randn(2, 5, G, 4)


def test_the_first_token_gets_its_own_value():
    q_BTHK, k_BTGK, v_BTGK = random_case(G=6)
    found = attention(q_BTHK, k_BTGK, v_BTGK)
    found = None if found is None else found[:, 0]
    check_equal(found, v_BTGK[:, 0], "the first token can attend to nothing but itself")


def test_the_future_changes_nothing():
    q_BTHK, k_BTGK, v_BTGK = random_case(G=6)
    before = attention(q_BTHK, k_BTGK, v_BTGK)
    k_BTGK[:, 3:], v_BTGK[:, 3:] = 9.0, 9.0
    after = attention(q_BTHK, k_BTGK, v_BTGK)
    check_equal(
        None if after is None else after[:, :3],
        torch.zeros(2, 3, 6, 4) if before is None else before[:, :3],
        "tokens 0 to 2 must not depend on tokens 3 and 4",
    )


def test_one_query_by_the_formula():
    q_BTHK, k_BTGK, v_BTGK = random_case(G=6)
    b, t, h = 1, 4, 3
    scores = [float(q_BTHK[b, t, h] @ k_BTGK[b, s, h]) / math.sqrt(4) for s in range(t + 1)]
    total = sum(math.exp(score) for score in scores)
    expected = sum(math.exp(scores[s]) / total * v_BTGK[b, s, h] for s in range(t + 1))
    found = attention(q_BTHK, k_BTGK, v_BTGK)
    found = None if found is None else found[b, t, h]
    check_equal(found, expected, "softmax(query · key / sqrt(K)) · values, with K = 4")


def test_query_heads_side_by_side_share_a_key_head():
    q_BTHK, k_BTGK, v_BTGK = random_case(G=2)
    shared = attention(q_BTHK, k_BTGK, v_BTGK)
    copied = attention(q_BTHK, *(x.repeat_interleave(3, dim=2) for x in (k_BTGK, v_BTGK)))
    expected = torch.zeros_like(q_BTHK) if copied is None else copied
    check_equal(shared, expected, "query heads 0, 1, 2 use key head 0, and 3, 4, 5 use 1")
