"""Compile all kernels ahead of time for GPUs that are not here; print their registers and memory.

    python tests/bench/aot.py                              a table, in tests/bench/results/aot.md
    python tests/bench/aot.py --of=4,096 --out=/tmp/a.md   only cases of this width

A kernel that spills registers, or needs more shared memory than the GPU has, is an error.

Operators are called on small tensors of the true widths, as if a GPU of that capability held them.
Their launches are compiled instead of run, so blocks, warps and stages are those of the operators.
ptxas and cuobjdump come with Triton.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from nanovlm import UserError, cli  # noqa: E402
from nanovlm.kernels import (  # noqa: E402
    attention_backward,
    attention_forward,
    cross_entropy,
    decode_attention,
    dispatch,
    rmsnorm,
)

# Shared memory of a program, in bytes (CUDA C++ Programming Guide, table 30).
SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# The instructions that multiply matrices on 9.0, on 10.0, and on all of them.
PRODUCTS = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
RESULTS = Path(__file__).parent / "results" / "aot.md"


def launches(call, capability):
    """Returns [(kernel, {parameter: argument}, options)] that `call` launches on a GPU of this
    capability; nothing is computed."""
    found = []

    def catch(kernel, *args, grid, warmup, **named):
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        found.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | named, options))

    with (
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(dispatch, "capability", lambda device: capability),
        mock.patch.object(dispatch, "choice", "triton"),
        mock.patch.object(dispatch, "num_sms", lambda device: 132),
    ):
        call()
    return found


def specialised(parameter, x):
    """Returns (type, constant or None, attributes) by Triton's rules.

    The integer 1 is a constant; a multiple of 16 is marked as one.
    """
    if (
        parameter.is_constexpr
        or x is None
        or (isinstance(x, int) and not isinstance(x, bool) and x == 1)
    ):
        return "constexpr", (x,), []
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype], None, [["tt.divisibility", 16]] * (x.data_ptr() % 16 == 0)
    if isinstance(x, (bool, float)):
        return ("i1" if isinstance(x, bool) else "fp32"), None, []
    return (
        ("i32" if -(2**31) <= x < 2**31 else "i64"),
        None,
        [["tt.divisibility", 16]] * (x % 16 == 0),
    )


def compiled(kernel, arguments, options, capability):
    """Returns the registers of a thread, the bytes of local memory (spilled registers) and of
    shared memory of a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        kind, constant, known = specialised(parameter, arguments[parameter.name])
        signature[parameter.name] = kind
        constants |= {(i,): constant[0]} if constant else {}
        attributes |= {(i,): known} if known else {}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    done = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options
    )
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    cubin = next(Path(p) for p in done.metadata_group.values() if str(p).endswith(".cubin"))
    command = [cuobjdump, "--dump-resource-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return SimpleNamespace(
        kernel=f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}",
        warps=done.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=done.metadata.shared,
        products=", ".join(sorted(set(PRODUCTS.findall(done.asm["ptx"])))),
    )


# ---- cases: {name: a call as the model makes it} ----


def norm(width, x=torch.bfloat16, y=torch.bfloat16, add=True):
    """A norm, of a sum if `add`, and its gradients, of vectors x and y of these dtypes."""

    def call():
        given, more, weight = (
            torch.ones(48, width, dtype=x),
            torch.ones(48, width, dtype=y),
            torch.ones(width, dtype=x),
        )
        rmsnorm.rmsnorm_forward(given, more if add else None, weight, 1e-5, y)
        rmsnorm.rmsnorm_backward(more, given if add else None, given, weight, torch.ones(48), True)

    return call


def scores(vocabulary, dtype=torch.bfloat16):
    return lambda: cross_entropy.fused_chunk_loss(
        torch.ones(16, vocabulary, dtype=dtype), torch.ones(16, dtype=torch.int64), True
    )


def heads(K, dtype=torch.bfloat16, documents=False, **rules):
    """Attention forward and backward, 4 query heads to a head of keys, and one new token's."""

    def call():
        q, k = torch.ones(1, 48, 8, K, dtype=dtype), torch.ones(1, 48, 2, K, dtype=dtype)
        documents_BS = torch.ones(1, 48, dtype=torch.int32) if documents else None
        ends, window = (
            attention_forward.document_bounds(documents_BS) if documents else (None, None),
            rules.get("window"),
        )
        rest = *ends, rules.get("causal", True), window
        out, lse = attention_forward.attention_forward(q, k, k, *rest)
        attention_backward.attention_backward(out, q, k, k, out, lse, *rest)
        if rules.get("causal", True):
            decode_attention.decode_attention(q[:, :1], k, k, documents_BS, None, window)

    return call


CASES = {
    "heads of 64": heads(64),  # SmolLM2
    "heads of 64, all keys": heads(64, causal=False),  # CLIP
    "heads of 72, all keys": heads(72, causal=False),  # SigLIP
    "heads of 80": heads(80),
    "heads of 96": heads(96),
    "heads of 128": heads(128),  # Mistral
    "heads of 128, documents": heads(128, documents=True),
    "heads of 128, documents, window": heads(128, documents=True, window=4096),
    "heads of 128, float16": heads(128, torch.float16),
    "heads of 256": heads(256),
    "heads of 256, documents, window": heads(256, documents=True, window=4096),
    "heads of 64, float32": heads(64, torch.float32),
    "heads of 128, float32": heads(128, torch.float32),
    "width 576": norm(576),  # SmolLM2-135M
    "width 4,096": norm(4096),  # Mistral 7B
    "width 4,096, no sum": norm(4096, add=False),
    "width 4,096, float16": norm(4096, torch.float16, torch.float16),
    "width 4,096, autocast": norm(4096, torch.float32),
    "width 4,096, float32": norm(4096, torch.float32, torch.float32),
    "width 5,120": norm(5120),  # Mistral Nemo
    "width 8,191": norm(8191),
    "width 16,384": norm(16384),  # Llama 3.1 405B
    "vocabulary 32,768": scores(32768),  # Mistral 7B v0.3
    "vocabulary 131,072": scores(131072),  # Mistral Nemo
    "vocabulary 32,003": scores(32003),
    "vocabulary 32,768, float32": scores(32768, torch.float32),
}


# Cases with blocks large enough for wgmma.
WGMMA = [
    what for what in CASES if re.match("heads of (64|72|80|96|128)", what) and "float32" not in what
]


def table(of):
    """Returns {(kernel, case): {capability: its usage}} of each launch of each case on each GPU."""
    found = {}
    for what, call in CASES.items():
        for capability in SHARED if re.search(of, what) else ():
            for launch in launches(call, capability):
                done = compiled(*launch, capability)
                found.setdefault((done.kernel, what), {})[capability] = done
    return found


def faults(found):
    """Yields a sentence for each kernel that does not fit a GPU."""
    for (kernel, what), by_capability in found.items():
        for capability, done in by_capability.items():
            if done.spilled or done.shared > SHARED[capability]:
                yield (
                    f"{kernel}, {what}, on {capability}: {done.spilled} bytes spilled, "
                    f"{done.shared:,} of {SHARED[capability]:,} shared"
                )
            wants_wgmma = capability == (9, 0) and kernel.startswith("attention") and what in WGMMA
            if wants_wgmma and "wgmma" not in done.products:
                yield f"{kernel}, {what}, on {capability}: no wgmma, Hopper's own product"


def aot(
    *,
    of: str = "",  # regular expression: only cases whose names match
    out: str = str(RESULTS),  # file of the table
):
    """Compile the kernels; print and write the table. Raises UserError if a kernel does not fit."""
    found = table(of)

    def cell(done):
        numbers = f"{done.warps} · {done.registers} · {done.spilled} · {done.shared:,}"
        return f"{numbers} {done.products}".rstrip()

    lines = [
        f"Compiled by triton {triton.__version__}, without a GPU, by `python tests/bench/aot.py`. "
        "A cell holds: warps of a program · registers of a thread · bytes of spilled registers · "
        "bytes of shared memory, and the instruction that multiplies matrices.\n",
        f"| kernel | of | {' | '.join('.'.join(map(str, capability)) for capability in SHARED)} |",
        "|---|---|" + "---|" * len(SHARED),
    ]
    lines += [
        f"| `{kernel}` | {what} | {' | '.join(map(cell, by_capability.values()))} |"
        for (kernel, what), by_capability in found.items()
    ]
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if wrong := list(faults(found)):
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    cli.run_script(aot)
