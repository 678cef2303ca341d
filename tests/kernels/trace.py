"""Steps through the attention kernel for 8 queries and 8 keys, and prints m, l and out after each
tile of 4 queries and 2 keys.

    python tests/kernels/trace.py                    causal
    python tests/kernels/trace.py --causal=false     every query attends to all keys
    python tests/kernels/trace.py --window=3         to the last 3 keys, its own included
    python tests/kernels/trace.py --documents=3,5    two documents, of 3 and of 5 tokens

Triton's interpreter runs the kernel as Python, so that a debugger stops in it, too: write
`breakpoint()` into nanovlm/kernels/attention_forward.py.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from nanovlm import UserError, cli  # noqa: E402
from nanovlm.kernels import attention as operators  # noqa: E402
from nanovlm.kernels import attention_forward, dispatch  # noqa: E402
from nanovlm.models.attention import attention  # noqa: E402

TOKENS, K, BLOCK_M, BLOCK_N = 8, 4, 4, 2


def numbers(x):
    """The numbers of a tensor in Triton's interpreter."""
    return x.handle.data if hasattr(x, "handle") else x


def print_tile(first_query, tile):
    """tile: the variables of attention_fwd_inner after a tile."""
    s, kind = int(numbers(tile["s"]).item()), "masked" if tile["MASKED"] else "full"
    print(f"queries {first_query} to {first_query + BLOCK_M - 1}, keys {s} and {s + 1}, {kind}")
    m_T, l_T, acc_TK = (numbers(tile[name]) for name in ("m_T", "l_T", "acc_TK"))
    for row, (m, l, acc) in enumerate(zip(m_T, l_T, acc_TK, strict=True)):  # noqa: E741
        if l == 0:
            print(f"    query {first_query + row}   no key so far")
            continue
        out = " ".join(f"{number:6.2f}" for number in acc[:K] / l)
        print(f"    query {first_query + row}   m {m:6.2f}   l {l:5.2f}   out {out}")


class Tracer:
    """For sys.settrace. The line of the loop is passed before each tile and after the last."""

    def __init__(self):
        self.kernel, self.lines = None, Path(attention_forward.__file__).read_text().splitlines()

    def __call__(self, frame, event, argument):
        if frame.f_code.co_name == "attention_fwd_kernel":
            self.kernel = frame
        return self.in_loop if frame.f_code.co_name == "attention_fwd_inner" else None

    def in_loop(self, frame, event, argument):
        is_loop = self.lines[frame.f_lineno - 1].strip().startswith("for ")
        if event == "line" and is_loop and "new_m_T" in frame.f_locals:
            start = numbers(self.kernel.f_locals["start"])
            print_tile(int(start.item()), frame.f_locals)
        return self.in_loop


def trace(
    *,
    causal: bool = True,  # a query attends to no later key
    window: int = 0,  # how many keys back a query attends to, its own included; 0: all
    documents: str = "",  # lengths of documents, with commas between, 8 in all; empty: one
):
    """Print m, l and out after each tile; compare the result with the formula."""
    lengths = [int(length) for length in documents.split(",") if length] or [TOKENS]
    if sum(lengths) != TOKENS:
        raise UserError(f"--documents={documents}: {sum(lengths)} tokens, not {TOKENS}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, 1, K) for _ in range(3))
    documents_BS = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    rules = causal, window or None, documents_BS if documents else None
    formula = attention(q, k, v, *rules)
    dispatch.choice = "triton"
    block = (BLOCK_M, BLOCK_N, 4, 1)
    operators.TABLE[0, 0] = {(16, 4): (0, block, block, block)}
    sys.settrace(Tracer())
    out = attention(q, k, v, *rules)
    sys.settrace(None)
    print(f"the largest difference from the formula: {(out - formula).abs().max():.1e}")


if __name__ == "__main__":
    cli.run_script(trace)
