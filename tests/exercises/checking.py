"""What the exercises' tests share: a failure is one line that says what is wrong."""

import pytest
import torch


def check(is_right, message):
    """Fails with the message alone, without a traceback."""
    if not is_right:
        pytest.fail(message, pytrace=False)


def check_equal(found, expected, what, tolerance=1e-5):
    """Fails unless two tensors agree. what: names the result and says where to look."""
    check(found is not None, f"{what}: the function returns None; fill in its body")
    check(torch.is_tensor(found), f"{what}: a tensor is expected, not {type(found).__name__}")
    shapes = tuple(found.shape), tuple(expected.shape)
    check(shapes[0] == shapes[1], f"{what}: the shape is {shapes[0]}, and should be {shapes[1]}")
    difference = (found.double() - expected.double()).abs().max().item()
    check(difference <= tolerance, f"{what}: the largest difference is {difference:.2g}")
