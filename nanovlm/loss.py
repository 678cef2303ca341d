"""Cross-entropy over the trained tokens only, a chunk at a time.

    loss = sum over trained tokens of  logsumexp(logits) - logits[target]       with  logits = hidden · headᵀ

The logits of one row of 4,096 tokens over 131,072 words are 2 GB in float32, their gradient as much again, and most of them belong to tokens
that nobody trains. So: take the trained tokens first, and for one chunk of them at a time compute the logits, the loss and *already* the
gradient, softmax(logits) - onehot(target), fold it into the gradients of hidden and head, and forget the chunk. The backward pass then only
multiplies by the gradient it is given.
"""
import torch

CHUNK = 1024  # trained tokens whose logits exist at once: 64 MB in float32 for a vocabulary of 16k


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N):
        wants_hidden, wants_head, _ = ctx.needs_input_grad
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=wide) if wants_head else None
        for start in range(0, len(targets_N), CHUNK):
            part = slice(start, start + CHUNK)
            targets_n1 = targets_N[part, None]
            logits_nV = (hidden_ND[part] @ head_VD.T).to(wide)
            logsumexp_n1 = logits_nV.logsumexp(-1, keepdim=True)
            loss += (logsumexp_n1 - logits_nV.gather(-1, targets_n1)).sum()
            if not (wants_hidden or wants_head):
                continue
            grad_nV = (logits_nV - logsumexp_n1).exp_()
            grad_nV.scatter_add_(-1, targets_n1, grad_nV.new_full(targets_n1.shape, -1.0))
            grad_nV = grad_nV.to(hidden_ND.dtype)
            if wants_hidden:
                grad_hidden_ND[part] = grad_nV @ head_VD
            if wants_head:
                grad_head_VD += grad_nV.T @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_hidden_ND, grad_head_VD)]
        return *scaled, None


def linear_cross_entropy(hidden_ND, head_VD, targets_N):
    """The summed loss (a float32 scalar) of N trained tokens with head_VD as the output layer; logits never exist for more than CHUNK of them."""
    return LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N)
