"""Cross-entropy over the trained tokens only, a chunk at a time.

    loss = sum over trained tokens of  logsumexp(logits) - logits[target]       with  logits = hidden · headᵀ

The logits of one row of 4,096 tokens over 131,072 words are 2 GB in float32, their gradient as much again, and most of them belong to tokens
that nobody trains. So: take the trained tokens first, and for one chunk of them at a time compute the logits, the loss and *already* the
gradient, softmax(logits) - onehot(target), fold it into the gradients of hidden and head, and forget the chunk. The backward pass then only
multiplies by the gradient it is given.

Between the products stands a pass over the logits. Of one logit in bfloat16, PyTorch's steps in float32 move about 52 bytes: 6 to widen it, 24
for logsumexp, 16 for the exponential of the difference, 6 to narrow it. The kernel below reads it twice and writes the gradient in its place: 6
bytes, or 4 where the second reading comes from the cache. At the rates of an H200 (4.3 TB/s, 790 TFLOP/s) and a width of 4,096 the three products
take 31 ps a logit, PyTorch's steps 12 and the kernel 1.4. That is counted, not measured; tests/bench/gpu.py measures it.
"""
import torch
from torch import Tensor

from . import kernels
from .kernels import tl, triton

CHUNK = 1024  # trained tokens whose logits exist at once: with their gradient 8 bytes each, 128 MB for a vocabulary of 16k
TABLE = {  # compute capability: bytes of logits that a program reads at once, its warps, stages of loads. Large programs are few, so that the rows
    (8, 0): (16384, 16, 2),  # at which all of them are at work fit into the card's cache (50 MB) between the two readings
    (9, 0): (32768, 32, 2),
    (10, 0): (32768, 32, 2),
}
LOWEST = tl.constexpr(-1e38)  # of logits; not -inf, whose difference to itself is no number


def linear_cross_entropy(hidden_ND, head_VD, targets_N):
    """The summed loss (a float32 scalar) of N trained tokens with head_VD as the output layer; logits never exist for more than a chunk of them."""
    if kernels.run(hidden_ND) or torch.compiler.is_compiling():
        wants = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, head_VD))
        return torch.ops.nanovlm.linear_cross_entropy(hidden_ND, head_VD, targets_N, kernels.autocast_dtype(hidden_ND), *wants)[0]
    return LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N)


def by_chunks(hidden_ND, head_VD, targets_N, dtype, wants_hidden, wants_head, score, chunk):
    """(loss, its gradient to hidden, its gradient to head), None for a gradient that nobody wants.

    dtype: of the products, None for that of hidden and head; score: as `scores` is; chunk: tokens.
    """
    products_ND, products_VD = hidden_ND.to(dtype or hidden_ND.dtype), head_VD.to(dtype or head_VD.dtype)
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_head_VD = torch.zeros_like(head_VD, dtype=wide) if wants_head else None
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        chunk_loss, grad_nV = score(products_ND[part] @ products_VD.T, targets_N[part], wants_hidden or wants_head)
        loss += chunk_loss
        if wants_hidden:
            grad_hidden_ND[part] = grad_nV @ products_VD
        if wants_head:
            grad_head_VD += grad_nV.T @ products_ND[part]
    return loss, grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)


def scores(logits_nV, targets_n, wanted):
    """(summed loss, gradient to the logits if it is wanted) of a chunk."""
    dtype, targets_n1 = logits_nV.dtype, targets_n[:, None]
    logits_nV = logits_nV.to(torch.float64 if dtype == torch.float64 else torch.float32)
    logsumexp_n1 = logits_nV.logsumexp(-1, keepdim=True)
    loss = (logsumexp_n1 - logits_nV.gather(-1, targets_n1)).sum()
    if not wanted:
        return loss, None
    grad_nV = (logits_nV - logsumexp_n1).exp_()
    grad_nV.scatter_add_(-1, targets_n1, grad_nV.new_full(targets_n1.shape, -1.0))
    return loss, grad_nV.to(dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N):
        loss, *grads = by_chunks(hidden_ND, head_VD, targets_N, kernels.autocast_dtype(hidden_ND), *ctx.needs_input_grad[:2], scores, CHUNK)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None


# `scores` in Triton: one program a token. Block after block of its logits it keeps, in each of its lanes, the highest yet and the sum of exponentials
# relative to it; a higher one shrinks the sum (Milakov & Gimelshein 2018). The lanes are merged at the end.


@triton.jit
def scores_kernel(logits_ptr, target_ptr, loss_ptr, vocabulary, WANTED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    row, column_v = tl.program_id(0), tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row.to(tl.int64) * vocabulary
    target = tl.load(target_ptr + row)
    score = tl.load(row_ptr + target).to(tl.float32)
    highest_v, sum_v = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        place_v = start + column_v
        logits_v = tl.load(row_ptr + place_v, mask=place_v < vocabulary, other=0.0).to(tl.float32)
        logits_v = tl.where(place_v < vocabulary, logits_v, LOWEST)
        higher_v = tl.maximum(highest_v, logits_v)
        sum_v = sum_v * tl.exp(highest_v - higher_v) + tl.exp(logits_v - higher_v)
        highest_v = higher_v
    highest = tl.max(highest_v, axis=0)
    logsumexp = highest + tl.log(tl.sum(sum_v * tl.exp(highest_v - highest), axis=0))
    tl.store(loss_ptr + row, logsumexp - score)
    if WANTED:
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            place_v = start + column_v
            logits_v = tl.load(row_ptr + place_v, mask=place_v < vocabulary, other=0.0).to(tl.float32)
            grad_v = tl.exp(logits_v - logsumexp) - tl.where(place_v == target, 1.0, 0.0)
            tl.store(row_ptr + place_v, grad_v, mask=place_v < vocabulary)


def fused_scores(logits_nV, targets_n, wanted):
    """As `scores`; the gradient takes the place of the logits."""
    size, warps, stages = kernels.pick(TABLE, logits_nV.device)
    n, vocabulary = logits_nV.shape
    block = min(size // logits_nV.element_size(), triton.next_power_of_2(vocabulary))
    losses_n = logits_nV.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(logits_nV):
        scores_kernel[(n,)](logits_nV, targets_n.contiguous(), losses_n, vocabulary, WANTED=wanted, BLOCK=block, STAGES=stages,
                            num_warps=warps)
    return losses_n.sum(), logits_nV if wanted else None


@torch.library.custom_op("nanovlm::linear_cross_entropy", mutates_args=())
def operator(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype | None, wants_hidden: bool, wants_head: bool
             ) -> tuple[Tensor, Tensor, Tensor]:
    """`by_chunks` as one operator, with the kernel where it runs, which holds one number of 2 or 4 bytes a logit: more tokens make a chunk."""
    score, chunk = scores, CHUNK
    if kernels.run(hidden_ND):
        score, chunk = fused_scores, CHUNK * 8 // (dtype or hidden_ND.dtype).itemsize
    loss, *grads = by_chunks(hidden_ND, head_VD, targets_N, dtype, wants_hidden, wants_head, score, chunk)
    return loss, *(hidden_ND.new_empty(0) if grad is None else grad for grad in grads)


@operator.register_fake
def shapes(hidden_ND, head_VD, targets_N, dtype, wants_hidden, wants_head):
    loss = hidden_ND.new_empty((), dtype=torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32)
    return loss, *(torch.empty_like(x) if wanted else hidden_ND.new_empty(0) for x, wanted in ((hidden_ND, wants_hidden), (head_VD, wants_head)))


def setup_context(ctx, inputs, output):
    ctx.wants = inputs[4:]
    ctx.save_for_backward(*output[1:])


def differentiate(ctx, grad, *_):
    grads = (g * grad.to(g.dtype) if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True))
    return *grads, None, None, None, None


torch.library.register_autograd("nanovlm::linear_cross_entropy", differentiate, setup_context=setup_context)
