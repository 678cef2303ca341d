"""Cross-entropy of a chunk of logits in Triton: the loss, and its gradient in place of the logits.

    loss = logsumexp(logits) - logits[target]        grad = softmax(logits) - onehot(target)

It is bound by memory. For each logit in bfloat16, the formula in PyTorch moves about 52 bytes: 6 to
cast it to float32, 24 for logsumexp, 16 for the exponential of the difference, 6 to cast it back.
The kernel reads it twice and writes the gradient in its place: 6 bytes, or 4 if the second read
comes from the cache. At the rates of an H200 (4.3 TB/s, 790 TFLOP/s) and a width of 4,096, the
three matrix products take 31 ps a logit, the formula's passes 12 ps and the kernel 1.4 ps. These
are computed; tests/bench/gpu.py measures.

One program takes the logits of one token, block after block. Each lane keeps its maximum so far and
the sum of exponentials relative to it; a new maximum scales the sum down (online softmax, Milakov &
Gimelshein 2018). The lanes are merged at the end. In a name, v is a block of the V logits.
"""

import math

import torch
import triton
import triton.language as tl

from . import dispatch

TABLE = {  # compute capability: bytes of logits in a block, num_warps, num_stages. Large programs
    # are few, so that the logits of all that run at once fit into the L2 cache (50 MB)
    (8, 0): (16384, 16, 2),
    (9, 0): (32768, 32, 2),
    (10, 0): (32768, 32, 2),
    (12, 0): (16384, 16, 2),  # 1,536 threads a multiprocessor
}
LOG2E = tl.constexpr(math.log2(math.e))  # e^x = 2^(x · LOG2E): a GPU has an instruction for 2^x
MIN_LOGIT = tl.constexpr(-1e38)  # not -inf: -inf - -inf is NaN


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    vocab_size,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row, offset_v = tl.program_id(0), tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
    target = tl.load(target_ptr + row)
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    max_v, sum_v = tl.full((BLOCK,), MIN_LOGIT, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=NUM_STAGES):
        id_v = start + offset_v
        logits_v = tl.load(row_ptr + id_v, mask=id_v < vocab_size, other=0.0).to(tl.float32)
        logits_v = tl.where(id_v < vocab_size, logits_v * LOG2E, MIN_LOGIT)
        new_max_v = tl.maximum(max_v, logits_v)
        sum_v = sum_v * tl.exp2(max_v - new_max_v) + tl.exp2(logits_v - new_max_v)
        max_v = new_max_v
    max_logit = tl.max(max_v, axis=0)
    lse = max_logit + tl.log2(tl.sum(sum_v * tl.exp2(max_v - max_logit), axis=0))
    tl.store(loss_ptr + row, lse / LOG2E - target_logit)
    if GRAD:
        for start in tl.range(0, vocab_size, BLOCK, num_stages=NUM_STAGES):
            id_v = start + offset_v
            logits_v = tl.load(row_ptr + id_v, mask=id_v < vocab_size, other=0.0).to(tl.float32)
            grad_v = tl.exp2(logits_v * LOG2E - lse) - tl.where(id_v == target, 1.0, 0.0)
            tl.store(row_ptr + id_v, grad_v, mask=id_v < vocab_size)


@dispatch.register("cross_entropy")
def fused_chunk_loss(logits_nV, targets_n, needs_grad):
    """Returns (summed loss, gradient of the logits or None). The gradient overwrites the logits.
    models/cross_entropy.py calls it within its own operator."""
    size, num_warps, num_stages = dispatch.config(TABLE, logits_nV.device)
    n, vocab_size = logits_nV.shape
    assert logits_nV.is_contiguous(), "the gradient overwrites the logits, so a copy would not do"
    loss_n = logits_nV.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(logits_nV):
        cross_entropy_kernel[(n,)](
            logits_nV,
            targets_n.contiguous(),
            loss_n,
            vocab_size,
            GRAD=needs_grad,
            BLOCK=min(size // logits_nV.element_size(), triton.next_power_of_2(vocab_size)),
            NUM_STAGES=num_stages,
            num_warps=num_warps,
        )
    return loss_n.sum(), logits_nV if needs_grad else None
