"""Exercise 3: the document mask of a packed sequence.

Samples differ in length. To pad them all to the longest wastes most of a step, so several samples
are packed into one sequence:

    tokens       A A A B B C C C C
    documents    0 0 0 1 1 2 2 2 2

They must not see each other: the loss of a packed sample equals its loss alone. So a query may
attend to a key only if both stand in the same document, and the key is not later than the query.

Fill in `document_mask`, then run

    python -m pytest -n 0 tests/exercises/03_document_mask.py

The core's answer: `attention_mask` in nanovlm/models/attention.py.
"""

import torch
import torch.nn.functional as F
from checking import check, check_equal


def document_mask(documents_BT):
    """Returns a bool mask_BTT: mask[b, t, s] is True where query t may attend to key s.

    documents_BT: the number of each token's document.
    """
    ...


def test_a_mask_written_by_hand():
    found = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    )[None]
    check_equal(found, expected, "documents 0 0 1 1 1, a row for each query")
    check(found.dtype == torch.bool, f"the mask is of type {found.dtype}, and should be torch.bool")


def test_every_sequence_has_documents_of_its_own():
    found = document_mask(torch.tensor([[0, 0, 0], [4, 5, 5]]))
    expected = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]])
    check_equal(found, expected, "two sequences with documents 0 0 0 and 4 5 5")


def test_packed_is_unpacked():
    torch.manual_seed(0)
    x_BTK = torch.randn(1, 9, 4)  # queries, keys and values at once
    lengths = [3, 2, 4]
    mask_BTT = document_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]]))
    check(mask_BTT is not None, "the function returns None; fill in its body")
    packed = F.scaled_dot_product_attention(x_BTK, x_BTK, x_BTK, attn_mask=mask_BTT)
    alone = [
        F.scaled_dot_product_attention(x_BtK, x_BtK, x_BtK, is_causal=True)
        for x_BtK in x_BTK.split(lengths, dim=1)
    ]
    check_equal(packed, torch.cat(alone, dim=1), "attention of packed samples equals theirs alone")
