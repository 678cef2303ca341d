"""Exercise 1: rotary position embeddings (RoPE).

Attention compares a query and a key by their dot product, which knows nothing of their places in
the text. RoPE puts the place in: it takes a vector of K numbers as K/2 points of a plane and turns
each point by an angle that grows with the position. Pair i consists of the numbers i and i + K/2,
and its angle is

    angle = position · theta^(-2i/K)            in radians

    (a, b)  becomes  (a · cos angle - b · sin angle,  b · cos angle + a · sin angle)

Two turned vectors have a dot product that depends only on the distance between their positions.
Fast pairs (small i) tell neighbors apart, slow pairs tell chapters apart.

Fill in `apply_rope`, then run

    python -m pytest -n 0 tests/exercises/01_rope.py

The core's answer: `rope_cos_sin` and `apply_rope` in nanovlm/models/decoder.py.
Source: Su et al. 2021.
"""

import torch
from checking import check_equal


def apply_rope(x_BTHK, positions_BT, theta):
    """Returns x_BTHK with each pair (i, i + K/2) turned by its angle.

    positions_BT: the position of each token. theta: the base of the angles, 10000 in Llama.
    """
    ...


def random_case():
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 20, 300]])


def test_position_0_turns_nothing():
    x_BTHK, positions_BT = random_case()
    found = apply_rope(x_BTHK, positions_BT * 0, 100.0)
    check_equal(found, x_BTHK, "all positions are 0, so the vectors stay as they are")


def test_the_first_pair_turns_by_one_radian_per_position():
    x_1111K = torch.tensor([1.0, 5.0, 0.0, 5.0])[None, None, None]  # pair 0 is (1, 0)
    for position in (1, 2, 3):
        angle = torch.tensor(float(position))
        found = apply_rope(x_1111K, torch.tensor([[position]]), 100.0)
        found = None if found is None else found[0, 0, 0, [0, 2]]
        expected = torch.stack([angle.cos(), angle.sin()])
        check_equal(found, expected, f"pair 0 is the numbers 0 and K/2, at position {position}")


def test_only_the_distance_counts():
    x_BTHK, _ = random_case()
    query, key = x_BTHK[:1, :1], x_BTHK[:1, 1:2]

    def product(query_position, key_position):
        turned = apply_rope(query, torch.tensor([[query_position]]), 100.0)
        other = apply_rope(key, torch.tensor([[key_position]]), 100.0)
        return None if turned is None else (turned * other).sum(-1)

    first = product(9, 4)
    expected = torch.zeros(1, 1, 3) if first is None else first
    found = product(19, 14)
    check_equal(found, expected, "positions 9 and 4 give the product of 19 and 14", 1e-4)


def test_it_is_a_product_of_complex_numbers():
    """A point (a, b) is a + bi; to turn it is to multiply it by e^(i · angle)."""
    x_BTHK, positions_BT = random_case()
    points = torch.complex(*x_BTHK.double().chunk(2, dim=-1))
    exponent_k = torch.arange(4).double() * 2 / 8
    angle_BT1k = (positions_BT[..., None].double() * 100.0**-exponent_k)[:, :, None]
    turned = points * torch.polar(torch.ones_like(angle_BT1k), angle_BT1k)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    found = apply_rope(x_BTHK, positions_BT, 100.0)
    check_equal(found, expected, "each pair has its own angle: theta^(-2i/K)", 1e-3)
