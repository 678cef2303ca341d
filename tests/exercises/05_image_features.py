"""Exercise 5: image features take the places of image tokens.

This is where two models become one. The ids of a prompt hold an image token for every image
feature. The text's ids become embeddings; the image features replace the image tokens; from there
on the language model reads vectors and does not know which of them were words.

    ids         [ 7, -1, -1, -1, 5, 6]         -1 is IMAGE_TOKEN_ID: no vocabulary has it
    becomes     [e7, f0, f1, f2, e5, e6]       e: embeddings, f: image features, in order

Features are taken in order, through all sequences of a batch. If their number is not the number of
image tokens, an image was lost on the way: raise a UserError.

Fill in `embed`, then run

    python -m pytest -n 0 tests/exercises/05_image_features.py

The core's answer: `VLM.embed` in nanovlm/models/vlm.py.
"""

import pytest
import torch
from checking import check, check_equal
from torch import nn

from nanovlm import IMAGE_TOKEN_ID, UserError


def embed(ids_BT, features, embed_tokens):
    """Returns x_BTD: embeddings of the text, and image features in place of image tokens.

    features: (number of image tokens, D). embed_tokens: an nn.Embedding, which takes ids from 0 on.
    """
    ...


def random_case():
    torch.manual_seed(0)
    ids_BT = torch.tensor([[7, -1, -1, 5, 6], [-1, 2, 3, -1, 0]])
    assert IMAGE_TOKEN_ID == -1
    return ids_BT, torch.randn(4, 6), nn.Embedding(8, 6)


def test_the_text_keeps_its_embeddings():
    ids_BT, features, embed_tokens = random_case()
    found = embed(ids_BT, features, embed_tokens)
    is_text_BT = ids_BT >= 0
    found = None if found is None else found[is_text_BT]
    check_equal(found, embed_tokens(ids_BT[is_text_BT]), "the vectors of ids 7 5 6 2 3 0")


def test_features_come_in_order():
    ids_BT, features, embed_tokens = random_case()
    found = embed(ids_BT, features, embed_tokens)
    found = None if found is None else found[ids_BT == IMAGE_TOKEN_ID]
    check_equal(found, features, "two image tokens of the first sequence, then two of the second")


def test_gradients_reach_the_features():
    """Otherwise the projector would never learn."""
    ids_BT, features, embed_tokens = random_case()
    features.requires_grad_()
    found = embed(ids_BT, features, embed_tokens)
    check(found is not None, "the function returns None; fill in its body")
    found.sum().backward()
    message = "the sum of the result has a gradient of 1 for each number of the features"
    check_equal(features.grad, torch.ones_like(features), message)


def test_a_lost_image_is_an_error():
    ids_BT, features, embed_tokens = random_case()
    for wrong in (features[:3], torch.cat([features, features[:1]])):
        try:
            embed(ids_BT, wrong, embed_tokens)
        except UserError:
            continue
        pytest.fail(f"4 image tokens and {len(wrong)} features: raise a UserError", pytrace=False)
