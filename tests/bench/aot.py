"""Compile all kernels ahead of time for GPUs that are not here; print their registers and memory.

    python tests/bench/aot.py                       all of it, into tests/bench/results/aot.md
    python tests/bench/aot.py --of=4,096            only cases of this width
    python tests/bench/aot.py --chips=8.6,9.0       only these compute capabilities
    PYTHONPATH=folder python tests/bench/aot.py     with another triton, from `pip install -t folder`

The file has a part for each version of triton; a run writes its own part. A kernel that spills more
than 64 bytes of registers, or needs more shared memory than its table says or the GPU has, is an
error. All of it takes 10 minutes of CPU; what is in triton's cache takes seconds.

Operators are called on small tensors of the true widths, as if a GPU of that capability held them.
Their launches are compiled instead of run, so blocks, warps and stages are those of the operators.
ptxas, cuobjdump and nvdisasm come with Triton.
"""

import ast
import hashlib
import multiprocessing
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
from nanovlm.kernels import attention, cross_entropy, decode_attention, dispatch, rmsnorm  # noqa: E402

# Shared memory of a program, in bytes (CUDA C++ Programming Guide, table 30).
SHARED = {
    (8, 0): 163 << 10,  # A100
    (8, 6): 99 << 10,  # A10, A40, RTX 3090
    (8, 9): 99 << 10,  # L4, L40S, RTX 4090
    (9, 0): 227 << 10,  # H100, H200
    (10, 0): 227 << 10,  # B200
    (12, 0): 99 << 10,  # RTX 5090, RTX PRO 6000
}
MAX_SPILLED = 64  # bytes of a thread: a store and a load or two outside of the loop
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# The instructions that multiply matrices on 9.0, on 10.0, and on all of them: in PTX, in machine
# code.
PRODUCTS = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
MACHINE_PRODUCTS = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
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


def loop_instructions(machine_code):
    """Returns how many instructions the shortest loop with a product of matrices has: the loop over
    full tiles. 0: there is none."""
    labels, number, found = {}, 0, []
    products = []
    for line in machine_code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            number += 1
            products += [number] if MACHINE_PRODUCTS.search(instruction[1]) else []
            target = re.search(r"\bBRA.*(\.L_x_\d+)", instruction[1])
            begin = labels.get(target[1]) if target else None
            if begin is not None and any(begin < product <= number for product in products):
                found.append(number - begin)
    return min(found, default=0)


def compiled(kernel, arguments, options, capability):
    """Returns the registers of a thread, the bytes of local memory (spilled registers) and of
    shared memory, and the instructions of the main loop of a launch."""
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
    cubin = next(Path(p) for p in done.metadata_group.values() if str(p).endswith(".cubin"))

    def read(*command):
        return subprocess.run([*command, cubin], capture_output=True, text=True, check=True).stdout

    report = read(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return SimpleNamespace(
        kernel=f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}",
        warps=done.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=done.metadata.shared,
        loop=loop_instructions(read(triton.knobs.nvidia.nvdisasm.path, "-c")),
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
        if rmsnorm.unsupported(given):
            return
        rmsnorm.rmsnorm_forward(given, more if add else None, weight, 1e-5, y)
        rmsnorm.rmsnorm_backward(more, given if add else None, given, weight, torch.ones(48), True)

    return call


def scores(vocabulary, dtype=torch.bfloat16):
    return lambda: cross_entropy.fused_chunk_loss(
        torch.ones(16, vocabulary, dtype=dtype), torch.ones(16, dtype=torch.int64), True
    )


def heads(K, dtype=torch.bfloat16, T=48, documents=False, causal=True, window=None):
    """Attention forward and backward, 4 query heads to a head of keys, and one new token's."""

    def call():
        q, k = torch.ones(1, T, 8, K, dtype=dtype), torch.ones(1, T, 2, K, dtype=dtype)
        documents_BS = torch.ones(1, T, dtype=torch.int32) if documents else None
        bounds = attention.document_bounds(documents_BS) if documents else (None, None)
        rest = *bounds, causal, window
        out, lse = attention.attention_forward(q, k, k, *rest)
        attention.attention_backward(out, q, k, k, out, lse, *rest)
        if causal:
            decode_attention.decode_attention(q[:, :1], k, k, documents_BS, None, window)

    return call


CASES = {}
for size in (64, 72, 80, 96, 128, 256):  # SmolLM2 has 64, SigLIP 72, Mistral 128
    odd = dict(T=47, documents=True, window=4096)
    CASES |= {
        f"heads of {size}": heads(size),
        f"heads of {size}, 47 tokens, documents, window": heads(size, **odd),
    }
CASES |= {
    "heads of 64, 577 tokens, all keys": heads(64, T=577, causal=False),  # CLIP
    "heads of 72, 729 tokens, all keys": heads(72, T=729, causal=False),  # SigLIP
    "heads of 128, 1 token": heads(128, T=1),
    "heads of 64, float32": heads(64, torch.float32),
    "heads of 128, 47 tokens, documents, window, float32": heads(128, torch.float32, **odd),
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


def all_launches():
    """Returns [(case, capability, launch)] of each kernel of each case on each GPU."""
    return [
        (what, capability, launch)
        for what, call in CASES.items()
        for capability in SHARED
        for launch in launches(call, capability)
    ]


def digest(jobs):
    """Returns a hash of what the compiler gets: the kernels' code, without comments and docstrings,
    and their launches."""
    digest = hashlib.sha256()
    for file in sorted(Path(dispatch.__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            decorators = getattr(node, "decorator_list", [])
            if any("triton.jit" in ast.unparse(decorator) for decorator in decorators):
                if ast.get_docstring(node):
                    node.body = node.body[1:]
                digest.update(ast.unparse(node).encode())
    for what, capability, (kernel, arguments, options) in jobs:
        tensors = {name for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        known = {name: x for name, x in (arguments | options).items() if name not in tensors}
        known = sorted(known.items())
        digest.update(f"{what} {capability} {kernel.__name__} {known}".encode())
    return digest.hexdigest()[:16]


JOBS = []  # what the processes of `table` compile: they are forked, as kernels cannot be pickled


def compile_job(number):
    what, capability, (kernel, arguments, options) = JOBS[number]
    done = compiled(kernel, arguments, options, capability)
    done.limit = SHARED[capability]
    if kernel.__name__.startswith("attention"):  # what is compared with the GPU at run time
        with mock.patch.object(dispatch, "capability", lambda device: capability):
            q = arguments["q"]
            done.limit = attention.launch_config(q)[0]
    return what, capability, done


def table(jobs):
    """Returns {(kernel, case): {capability: its usage}}, compiled on all cores."""
    JOBS[:], found = jobs, {}
    with multiprocessing.get_context("fork").Pool() as pool:
        for what, capability, done in pool.imap(compile_job, range(len(jobs))):
            found.setdefault((done.kernel, what), {})[capability] = done
    return found


def faults(found):
    """Yields a sentence for each kernel that does not fit a GPU."""
    for (kernel, what), by_capability in found.items():
        for capability, done in by_capability.items():
            if done.spilled > MAX_SPILLED or done.shared > min(done.limit, SHARED[capability]):
                yield (
                    f"{kernel}, {what}, on {capability}: {done.spilled} bytes spilled, "
                    f"{done.shared:,} of {done.limit:,} shared"
                )
            wants_wgmma = capability == (9, 0) and kernel.startswith("attention") and what in WGMMA
            if wants_wgmma and "wgmma" not in done.products:
                yield f"{kernel}, {what}, on {capability}: no wgmma, Hopper's own product"


HEADER = """Compiled without a GPU by `python tests/bench/aot.py`. A cell holds: warps of a program ·
registers of a thread · bytes of spilled registers · bytes of shared memory · instructions of the
loop over full tiles, and the instruction that multiplies matrices.
"""


def report(found, kernels):
    """Returns the part of the file for this version of triton."""

    def cell(done):
        if done is None:
            return "the formula runs"
        numbers = f"{done.warps} · {done.registers} · {done.spilled} · {done.shared:,}"
        return f"{numbers} · {done.loop} {done.products}" if done.products else numbers

    chips = list(next(iter(found.values())))
    rows = [
        f"| `{kernel}` | {what} | {' | '.join(map(cell, map(by_capability.get, chips)))} |"
        for (kernel, what), by_capability in found.items()
    ]
    return "\n".join(
        [
            f"## triton {triton.__version__}, kernels {kernels}\n",
            f"| kernel | of | {' | '.join(f'{major}.{minor}' for major, minor in chips)} |",
            "|---|---|" + "---|" * len(chips),
            *rows,
        ]
    )


def aot(
    *,
    of: str = "",  # regular expression: only cases whose names match
    chips: str = "",  # compute capabilities, with commas between; empty: all
    out: str = "",  # file of the tables; empty: results/aot.md if everything is compiled
):
    """Compile the kernels; print and write the table. Raises UserError if a kernel does not fit."""
    jobs = all_launches()
    kernels = digest(jobs)
    wanted = [tuple(map(int, chip.split("."))) for chip in chips.split(",") if chip] or list(SHARED)
    jobs = [job for job in jobs if re.search(of, job[0]) and job[1] in wanted]
    found = table(jobs)
    part = report(found, kernels)
    print(part)
    if out or not (of or chips):
        path = Path(out or RESULTS)
        parts = path.read_text().split("\n## ")[1:] if path.exists() else []
        own = f"triton {triton.__version__},"
        parts = [f"## {old.strip()}" for old in parts if not old.startswith(own)]
        path.write_text("\n\n".join([HEADER.strip(), *sorted([*parts, part], reverse=True)]) + "\n")
    if wrong := list(faults(found)):
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    cli.run_script(aot)
