"""Exercise 8: LoRA, fine-tuning with few numbers.

A linear layer of a 7B model has 16 million weights; AdamW keeps two more numbers for each of them.
LoRA leaves the weight W as it is and learns a change of low rank r beside it:

    y = W x + (alpha / r) · B (A x)        A: (r, in), B: (out, r)

For r = 16 the two hold 131 thousand numbers, less than 1% of W. A begins at random and B at zero, so
training begins with exactly the base model. Afterwards the change can be added to W:

    W' = W + (alpha / r) · B A             merged: as fast as the base

Fill in `lora_linear` and `merge`, then run

    python -m pytest -n 0 tests/exercises/08_lora.py

The core's answer: `LoRALinear` and `merged_weights` in nanovlm/checkpoints/lora.py.
Source: Hu et al. 2021.
"""

import torch
from checking import check, check_equal


def lora_linear(x_BTD, weight, A, B, alpha):
    """Returns y (B, T, out). Only A and B get gradients: the base does not train.

    weight: (out, D), A: (r, D), B: (out, r).
    """
    ...


def merge(weight, A, B, alpha):
    """Returns the weight (out, D) of one linear layer that does the same."""
    ...


def random_case():
    torch.manual_seed(0)
    return torch.randn(2, 3, 10), torch.randn(7, 10), torch.randn(4, 10), torch.randn(7, 4)


def test_b_of_zeros_is_the_base():
    x_BTD, weight, A, B = random_case()
    found = lora_linear(x_BTD, weight, A, torch.zeros_like(B), 8)
    check_equal(found, x_BTD @ weight.T, "B is zero, so y = W x")


def test_the_formula():
    x_BTD, weight, A, B = random_case()
    expected = x_BTD @ weight.T + 3.0 / 4 * (x_BTD @ A.T) @ B.T
    found = lora_linear(x_BTD, weight, A, B, 3.0)
    check_equal(found, expected, "y = W x + (alpha / r) · B (A x), with alpha 3 and r 4", 1e-4)


def test_the_base_does_not_train():
    x_BTD, *matrices = random_case()
    weight, A, B = (matrix.requires_grad_() for matrix in matrices)
    found = lora_linear(x_BTD, weight, A, B, 3.0)
    check(found is not None, "the function returns None; fill in its body")
    found.sum().backward()
    check(A.grad is not None and B.grad is not None, "A and B need gradients")
    check(weight.grad is None, "the base's weight has a gradient: detach it")


def test_merged_is_unmerged():
    x_BTD, weight, A, B = random_case()
    merged = merge(weight, A, B, 3.0)
    expected = weight + 3.0 / 4 * B @ A
    check_equal(merged, expected, "W' = W + (alpha / r) · B A", 1e-4)
