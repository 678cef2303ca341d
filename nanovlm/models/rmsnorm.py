"""RMSNorm: scale every vector to a root mean square of one (Zhang & Sennrich 2019).

    y = x / sqrt(mean(x²) + eps) · weight

It is LayerNorm without the mean and the bias: as good in a language model, and cheaper. Each block
norms what its attention and its MLP read (pre-norm), not what they add to. kernels/rmsnorm.py
computes the same on a GPU.
"""

import torch
import torch.nn as nn

from ..kernels import dispatch


def rmsnorm(x, weight, eps):
    """Returns the norm of x (..., D), times a weight (D,). The statistics are float32 (float64 for
    float64) whatever the dtype of x, as in Llama's reference code."""
    if kernel := dispatch.kernel("rmsnorm", x):
        return kernel(x, None, weight, eps)[1]
    x_float = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return (x_float * scale).to(x.dtype) * weight


def add_rmsnorm(x, y, weight, eps):
    """Returns (x + y, rmsnorm(x + y)): a residual connection and the norm that follows it."""
    if kernel := dispatch.kernel("rmsnorm", x, y):
        return kernel(x, y, weight, eps)
    x = x + y
    return x, rmsnorm(x, weight, eps)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x, y=None):
        """Returns the norm of x (..., D); with y, (x + y, the norm of x + y)."""
        if y is None:
            return rmsnorm(x, self.weight, self.eps)
        return add_rmsnorm(x, y, self.weight, self.eps)
