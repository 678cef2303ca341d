"""Cross-entropy of the labelled tokens, fused with the output layer, one chunk at a time.

    loss = sum over labelled tokens of  logsumexp(logits) - logits[target],  logits = hidden · headᵀ

It is F.cross_entropy(hidden @ head.T, targets, reduction="sum"), in less memory.

The logits of a sequence of 4,096 tokens over 131,072 ids are 2 GB in float32, and their gradient as
much again. So the forward pass computes, for one chunk of tokens at a time, the logits, the loss
and already the gradient, softmax(logits) - onehot(target). It adds that to the gradients of hidden
and head, and frees the chunk. The backward pass only multiplies by the gradient that it is given.
On a GPU, kernels/cross_entropy.py makes one pass over a chunk's logits instead of several.
"""

import torch
from torch import Tensor

from ..kernels import dispatch

CHUNK = 1024  # tokens whose logits exist at once: 1 GB with their gradient, for 131,072 ids


def linear_cross_entropy(hidden_ND, head_VD, targets_N):
    """Returns the summed loss of N labelled tokens, in float32 (float64 for float64).

    head_VD: the weight of the output layer.
    """
    dtype = dispatch.autocast_dtype(hidden_ND)  # inside a compiled operator autocast is off
    grads_needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, head_VD)]
    return linear_cross_entropy_op(hidden_ND, head_VD, targets_N, dtype, *grads_needed)[0]


def chunk_loss(logits_nV, targets_n, needs_grad):
    """Returns (summed loss of a chunk, its gradient with respect to the logits or None)."""
    dtype, targets_n1 = logits_nV.dtype, targets_n[:, None]
    logits_nV = logits_nV.to(torch.float64 if dtype == torch.float64 else torch.float32)
    logsumexp_n1 = logits_nV.logsumexp(-1, keepdim=True)
    loss = (logsumexp_n1 - logits_nV.gather(-1, targets_n1)).sum()
    if not needs_grad:
        return loss, None
    grad_nV = (logits_nV - logsumexp_n1).exp_()
    grad_nV.scatter_add_(-1, targets_n1, grad_nV.new_full(targets_n1.shape, -1.0))
    return loss, grad_nV.to(dtype)


def chunked_loss(hidden_ND, head_VD, targets_N, dtype, hidden_grad, head_grad):
    """Returns (loss, gradient of hidden, gradient of head), None for a gradient not asked for.
    dtype: of the matrix products; None: that of hidden and head."""
    loss_function, chunk = chunk_loss, CHUNK
    if kernel := dispatch.kernel("cross_entropy", hidden_ND):
        # The formula holds 8 bytes per logit, the kernel 2 or 4: its chunks may be larger.
        loss_function, chunk = kernel, CHUNK * 8 // (dtype or hidden_ND.dtype).itemsize
    x_ND, w_VD = hidden_ND.to(dtype or hidden_ND.dtype), head_VD.to(dtype or head_VD.dtype)
    sum_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if hidden_grad else None
    grad_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype) if head_grad else None
    needs_grad = hidden_grad or head_grad
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        # Without a name, the logits are freed as soon as loss_function has read them.
        part_loss, grad_nV = loss_function(x_ND[part] @ w_VD.T, targets_N[part], needs_grad)
        loss += part_loss
        if hidden_grad:
            grad_hidden_ND[part] = grad_nV @ w_VD
        if head_grad:
            grad_head_VD += grad_nV.T @ x_ND[part]
    return loss, grad_hidden_ND, grad_head_VD.to(head_VD.dtype) if head_grad else None


# One operator with a gradient of its own, which torch.compile does not look into.


@torch.library.custom_op("nanovlm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    dtype: torch.dtype | None,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `chunked_loss` does, an empty tensor in place of None."""
    loss, *grads = chunked_loss(hidden_ND, head_VD, targets_N, dtype, hidden_grad, head_grad)
    return loss, *(hidden_ND.new_empty(0) if g is None else g for g in grads)


@linear_cross_entropy_op.register_fake
def linear_cross_entropy_fake(hidden_ND, head_VD, targets_N, dtype, hidden_grad, head_grad):
    sum_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    grad_hidden_ND = torch.empty_like(hidden_ND) if hidden_grad else hidden_ND.new_empty(0)
    grad_head_VD = torch.empty_like(head_VD) if head_grad else hidden_ND.new_empty(0)
    return hidden_ND.new_empty((), dtype=sum_dtype), grad_hidden_ND, grad_head_VD


def setup_context(ctx, inputs, output):
    ctx.needs_grad = inputs[4:]
    ctx.save_for_backward(*output[1:])


def backward(ctx, grad, *_):
    pairs = zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
    return *(g * grad.to(g.dtype) if needed else None for g, needed in pairs), *[None] * 4


torch.library.register_autograd(
    "nanovlm::linear_cross_entropy", backward, setup_context=setup_context
)
