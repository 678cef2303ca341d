"""RMSNorm: scale every vector to a root mean square of one, then stretch each of its numbers by a learnt weight.

    y = x / sqrt(mean(x²) + eps) · weight

LayerNorm without the mean and the bias (Zhang & Sennrich 2019): a decoder needs its vectors at one length, not centred.
"""
import torch


def rmsnorm(x, weight, eps):
    """x: (..., D), weight: (D,). The statistics are float32 (float64 for float64) whatever the dtype of x, as in Llama's reference."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
