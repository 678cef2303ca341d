"""Kernels on a GPU: each is compared in bfloat16 with the formula in float64, then timed beside
other implementations, in one process.

    python tests/bench/gpu.py                 a table, and tests/bench/results/gpu.json
    python tests/bench/gpu.py --only=loss     one part of it
    python tests/bench/gpu.py --dry=true      no GPU: small checks only, in Triton's interpreter
    python tests/bench/gpu.py --tune=true     finds blocks, warps and stages for this GPU, and
                                              rewrites the tables in the kernels' files

Inputs are random. Results are NaN before a kernel fills them. The implementations take turns, over
inputs that rotate, so that none is in the cache. A time is a median. All kernels are compiled
first, on all cores at once. The bounds are the speeds of this GPU, measured in the same run.
A baseline whose package is missing is named.
"""

import contextlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if "--dry=true" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import gpu_attention  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from triton.errors import TritonError  # noqa: E402
from triton.runtime._async_compile import active_mode  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from nanovlm import UserError, cli  # noqa: E402
from nanovlm.evals import runner  # noqa: E402
from nanovlm.inference.generate import generate  # noqa: E402
from nanovlm.inference.optimize import optimize  # noqa: E402
from nanovlm.kernels import cross_entropy as cross_entropy_kernel  # noqa: E402
from nanovlm.kernels import dispatch  # noqa: E402
from nanovlm.kernels import rmsnorm as rmsnorm_kernel  # noqa: E402
from nanovlm.models.cross_entropy import linear_cross_entropy  # noqa: E402
from nanovlm.models.decoder import Decoder  # noqa: E402
from nanovlm.models.rmsnorm import add_rmsnorm, rmsnorm  # noqa: E402
from nanovlm.models.vlm import VLM  # noqa: E402

WARM = 3  # rounds before those that count
HEAD_START = 2_000_000  # cycles that the GPU waits, 1 ms, until Python has launched its kernels
TOLERANCE = 1e-2  # relative error of bfloat16
MISTRAL = dict(
    vocab_size=32768,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate_size=14336,
    head_dim=128,
    rope_theta=1e6,
)  # 7B Instruct v0.3
SMOLLM2 = dict(
    vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, intermediate_size=1536, tied=True
)  # 135M
# of models that get no image
TINY_VISION = dict(tile=2, patch=1, width=4, layers=1, heads=1, intermediate_size=1)


# ---- correct first ----


def dispatch_choice(choice):
    return mock.patch.object(dispatch, "choice", choice)


@contextlib.contextmanager
def poisoned():
    """Memory that operators allocate is NaN until they fill it."""
    empty, like = torch.Tensor.new_empty, torch.empty_like
    fill = lambda x: x.fill_(math.nan) if x.is_floating_point() else x  # noqa: E731
    with (
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(like(*a, **k))),
    ):
        yield


def results(function, inputs, choice, dtype=None):
    """Returns the outputs of function(*inputs), then the gradients of its inputs for random
    gradients of the outputs.

    choice: of dispatch.choice. dtype: of the inputs; none: their own.
    """
    given = [
        x.detach().to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x
        for x in inputs
    ]
    with dispatch_choice(choice), poisoned() if dtype is None else contextlib.nullcontext():
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not outputs[0].requires_grad:
            return outputs
        grads = []
        for out in outputs:
            generator = torch.Generator().manual_seed(1)
            grads.append(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
        wanted = [x for x in given if x.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def errors(function, inputs):
    """Returns the relative error of each result of the kernels; the formula in float64 is true."""
    ours = results(function, inputs, "triton")
    truth = results(function, inputs, "torch", torch.float64)
    pairs = zip(ours, truth, strict=True)
    return [((own.double() - true).norm() / true.norm()).item() for own, true in pairs]


def assert_close(what, function, inputs, tolerance=TOLERANCE):
    """Raises UserError if function(*inputs) or its gradients by kernels differ from those of the
    formula in float64."""
    for i, error in enumerate(errors(function, inputs)):
        if not error < tolerance:
            raise UserError(f"{what}: result {i} is off by {error:.1e}, more than {tolerance:.0e}")
    print(f"{what}: as in float64", flush=True)


def launch(what, function, inputs, tolerance=TOLERANCE):
    """Takes the place of assert_close while kernels are only compiled: there are no results."""
    results(function, inputs, "triton")


@contextlib.contextmanager
def compile_in_parallel():
    """Kernels that are launched inside are compiled on all cores at once, and do not run.

    One after another they would keep a GPU waiting for minutes.
    """
    run = JITFunction.run
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):

        def compile_only(kernel, *args, grid, warmup, **named):
            token = active_mode.set(mode)  # autograd launches from its own thread
            try:
                return run(kernel, *args, grid=grid, warmup=True, **named)
            finally:
                active_mode.reset(token)

        with mock.patch.object(JITFunction, "run", compile_only):
            yield


def check_norms(run):
    for shape in (
        [(2, 3, 37), (1, 5, 577)]
        if run.dry
        else [(3, 577, 4096), (2, 33, 1031), (7, 129, 576), (1, 65, 16384)]
    ):
        x, y = run.random(*shape), run.random(shape[1], shape[0], shape[2]).transpose(0, 1)
        weight = run.random(shape[2])
        run.assert_close(f"RMSNorm {shape}", lambda x, w: rmsnorm(x, w, 1e-5), (x, weight))
        run.assert_close(
            f"RMSNorm of a sum {shape}", lambda x, y, w: add_rmsnorm(x, y, w, 1e-5), (x, y, weight)
        )


def check_loss(run):
    for N, D, V in [(9, 8, 37)] if run.dry else [(5000, 256, 32003), (300, 512, 131072)]:
        targets_N = torch.randint(V, (N,), device=run.device)
        run.assert_close(
            f"loss of {N} tokens, vocabulary of {V}",
            linear_cross_entropy,
            (run.random(N, D), run.random(V, D) / D**0.5, targets_N),
        )


def check_model(run):
    """A whole decoder: a right kernel can still stand in the wrong place of the model."""
    T, shapes = (
        (
            9,
            dict(
                vocab_size=41,
                width=24,
                layers=2,
                heads=6,
                kv_heads=2,
                intermediate_size=36,
                head_dim=8,
            ),
        )
        if run.dry
        else (577, SMOLLM2)
    )
    narrow, wide = (Decoder(**shapes).to(run.device, dtype) for dtype in (run.dtype, torch.float64))
    wide.load_state_dict(narrow.state_dict())
    x_BTD, positions_BT = (
        run.random(2, T, shapes["width"]),
        torch.arange(T, device=run.device).expand(2, -1),
    )
    documents_BT = (positions_BT > T // 3).int()
    run.assert_close(
        "decoder",
        lambda x: (narrow if x.dtype == run.dtype else wide)(x, positions_BT, documents_BT),
        (x_BTD,),
        tolerance=5e-2,
    )


# ---- then time ----


def measure(functions, rounds):
    """Returns {name: median seconds, or why there are none}.

    functions: {name: function of the number of a round}.
    """
    events, failed = {name: [] for name in functions}, {}
    for i in range(WARM + rounds):
        for name in [name for name in functions if name not in failed]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            try:
                start.record()
                functions[name](i)
                end.record()
            except ImportError as e:
                failed[name] = f"no package {e.name}"
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
            except Exception as e:  # a baseline may refuse a shape or have another version
                if name in ("ours", "it"):
                    raise
                print(f"{name} does not run: {str(e)[:300]}", flush=True)
                failed[name] = f"does not run: {type(e).__name__}"
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: failed.get(name)
        or statistics.median(a.elapsed_time(b) / 1000 for a, b in pairs[WARM:])
        for name, pairs in events.items()
    }


def rates(run):
    """Returns the speeds of this GPU: bfloat16 operations per second in a product of matrices,
    bytes per second of a copy (read and written) and of a read."""
    a, b = run.random(8192, 8192), run.random(8192, 8192)
    source = [torch.randn(2**29, device=run.device) for _ in range(2)]  # 2 GiB each
    target = torch.empty_like(source[0])
    took = measure(
        {
            "matmul": lambda i: a @ b,
            "copy": lambda i: target.copy_(source[i % 2]),
            "read": lambda i: source[i % 2].sum(),
        },
        run.rounds,
    )
    return {
        "matmul": 2 * 8192**3 / took["matmul"],
        "copy": 2**32 / took["copy"],
        "read": 2**31 / took["read"],
    }


def row(what, took, bound, aim, **more):
    """Returns a line of the table: our time, the share of the GPU's speed, and how many times as
    fast we are as each other implementation."""
    ours = took.pop("ours")
    beside = (
        {name: other if isinstance(other, str) else other / ours for name, other in took.items()}
        if isinstance(ours, float)
        else took
    )
    return dict(
        what=what,
        seconds=ours,
        of_bound=bound / ours if isinstance(ours, float) else None,
        beside=beside,
        aim=aim,
        **more,
    )


def time_norms(run):
    rows, width = 32768, 4096
    size = rows * width * 2
    x, y, grad = ([run.random(rows, width) for _ in range(3)] for _ in range(3))
    weight, scale = run.random(width).requires_grad_(), torch.rand(rows, device=run.device)
    norms = torch.ops.nanovlm

    def liger(i):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Liger

        return Liger.apply(x[i % 3], y[i % 3], weight.detach(), 1e-5)

    yield row(
        "RMSNorm + residual, forward, 32k × 4096",
        measure(
            {
                "ours": lambda i: norms.rmsnorm(
                    x[i % 3], y[i % 3], weight.detach(), 1e-5, run.dtype
                ),
                "F.rms_norm": lambda i: F.rms_norm(
                    x[i % 3] + y[i % 3], (width,), weight.detach(), 1e-5
                ),
                "Liger": liger,
            },
            run.rounds,
        ),
        4 * size / run.rates["copy"],
        "0.95 of the copy rate",
    )

    leaves = [t.clone().requires_grad_() for t in x]
    theirs = [F.rms_norm(t, (width,), weight, 1e-5) for t in leaves]
    pull = lambda out, i: torch.autograd.grad(
        out, (leaves[i % 3], weight), grad[i % 3], retain_graph=True
    )  # noqa: E731
    graphs = {}

    def liger_backward(i):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Liger

        graphs.setdefault(i % 3, Liger.apply(leaves[i % 3], weight, 1e-5, 0.0, "llama", False))
        return pull(graphs[i % 3], i)

    yield row(
        "RMSNorm, backward, 32k × 4096",
        measure(
            {
                "ours": lambda i: norms.rmsnorm_backward(
                    grad[i % 3], None, x[i % 3], weight.detach(), scale, True
                ),
                "F.rms_norm": lambda i: pull(theirs[i % 3], i),
                "Liger": liger_backward,
            },
            run.rounds,
        ),
        3 * size / run.rates["copy"],
        "0.75 of the copy rate, 2 × F.rms_norm, 1.5 × Liger",
    )
    yield row(
        "RMSNorm + residual, backward, 32k × 4096",
        measure(
            {
                "ours": lambda i: norms.rmsnorm_backward(
                    grad[i % 3], y[i % 3], x[i % 3], weight.detach(), scale, True
                )
            },
            run.rounds,
        ),
        4 * size / run.rates["copy"],
        "0.75 of the copy rate",
    )


def peak(call):
    """Returns the peak of additional bytes that a call allocates; None if it fails."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call(0)
    except Exception:  # measure() reports it
        return None
    return torch.cuda.max_memory_allocated() - before


def full_logits(hidden_ND, head_VD, targets_N):
    return F.cross_entropy((hidden_ND @ head_VD.T).float(), targets_N, reduction="sum")


def liger_loss(hidden_ND, head_VD, targets_N):
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Liger,
    )

    return Liger.apply(hidden_ND, head_VD, targets_N, None, None, -100, 0.0, 0.0, "sum")[0]


def trainer(function, inputs, choice="auto"):
    def call(i):
        hidden_ND, head_VD, targets_N = inputs[i % len(inputs)]
        with dispatch_choice(choice):
            return torch.autograd.grad(
                function(hidden_ND, head_VD, targets_N), (hidden_ND, head_VD)
            )

    return call


def time_loss(run):
    N, D = 32768, 4096
    for V in (32768, 131072):
        inputs = [
            (
                run.random(N, D).requires_grad_(),
                (run.random(V, D) / D**0.5).requires_grad_(),
                torch.randint(V, (N,), device=run.device),
            )
            for _ in range(2)
        ]
        functions = {
            "ours": trainer(linear_cross_entropy, inputs),
            "chunked PyTorch": trainer(linear_cross_entropy, inputs, "torch"),
            "full logits": trainer(full_logits, inputs),
            "Liger": trainer(liger_loss, inputs),
        }
        yield row(
            f"loss, 32k × {V:,}",
            measure(functions, run.rounds),
            6 * N * V * D / run.rates["matmul"],
            "a tenth of the memory at equal speed",
            bytes={name: peak(call) for name, call in functions.items()},
        )


def text_model(shapes, device, dtype):
    """A VLM with this decoder, a tiny vision encoder and random weights."""
    model = VLM(vision=TINY_VISION, decoder=shapes | {"layers": 0, "vocab_size": 1})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model.decoder = Decoder(**shapes)
    finally:
        torch.set_default_dtype(before)
    return model.to(device)


def transformers_engine(run):
    import transformers as hf

    config = hf.MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
    )
    with torch.device(run.device):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()

    def run_engine(ids, count):
        arrived = []
        streamer = SimpleNamespace(
            put=lambda ids: arrived.append(time.perf_counter()), end=lambda: None
        )
        model.generate(
            torch.tensor([ids], device=run.device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=streamer,
        )
        return arrived

    return run_engine


def time_decode(run):
    """Mistral 7B generates 128 tokens after a prompt of 1,024.

    The time of a token is the median over the second half: the CUDA graph is captured by then.
    """
    model = text_model(MISTRAL, run.device, run.dtype).eval()
    read = sum(
        p.numel() * p.element_size()
        for name, p in model.decoder.named_parameters()
        if name != "embed.weight"
    )
    cached = 2 * MISTRAL["layers"] * (1024 + 96) * MISTRAL["kv_heads"] * MISTRAL["head_dim"] * 2
    optimize(model)

    def ours(ids, count):
        return [
            time.perf_counter()
            for _ in generate(model, [ids], torch.zeros(0), stop=set(), max_tokens=count)
        ]

    engines, gaps = {"ours": ours}, {}
    try:
        engines["transformers"] = transformers_engine(run)
        engines["transformers"]([1, 2, 3], 4)
    except Exception as e:  # transformers may be missing, or not fit this machine
        engines.pop("transformers", None)
        gaps["transformers"] = f"does not run: {type(e).__name__}"
    for _ in range(3):
        for name, run_engine in engines.items():
            arrived = run_engine(torch.randint(32768, (1024,)).tolist(), 128)
            gaps.setdefault(name, []).extend(b - a for a, b in itertools.pairwise(arrived[64:]))
    took = {
        name: found if isinstance(found, str) else statistics.median(found)
        for name, found in gaps.items()
    }
    yield row(
        "7B decode, one sequence",
        took,
        (read + cached) / run.rates["read"],
        "0.80 of the bound, 3 × transformers",
    )


def time_step(run):
    """Forward and backward of SmolLM2-135M's decoder over 8 sequences of 2,048 tokens under
    autocast, by kernels and by formulas."""
    model, (B, T) = text_model(SMOLLM2, run.device, torch.float32).train(), (8, 2048)
    ids_BT = torch.randint(49152, (B, T), device=run.device)
    batch = dict(
        ids_BT=ids_BT,
        targets_BT=ids_BT.roll(-1, 1),
        positions_BT=torch.arange(T, device=run.device).expand(B, -1),
        documents_BT=torch.zeros_like(ids_BT),
        tiles_NCYX=torch.zeros(0, 3, 2, 2, dtype=torch.uint8, device=run.device),
    )

    def by(choice):
        def call(i):
            with dispatch_choice(choice), torch.autocast("cuda", torch.bfloat16):
                total = model(**batch)
            total.backward()
            model.zero_grad()

        return call

    numbers = sum(p.numel() for p in model.decoder.parameters())
    yield row(
        "training pass, SmolLM2-135M, 8 × 2,048",
        measure({"ours": by("auto"), "formulas": by("torch")}, run.rounds),
        6 * numbers * B * T / run.rates["matmul"],
        "",
    )


# ---- tables of blocks ----


def tune_norms(run):
    rows, weight, scale = (
        [run.random(32768, 4096) for _ in range(3)],
        run.random(4096),
        torch.rand(32768, device=run.device),
    )

    def call(i):
        torch.ops.nanovlm.rmsnorm(rows[i % 3], rows[(i + 1) % 3], weight, 1e-5, run.dtype)
        torch.ops.nanovlm.rmsnorm_backward(
            rows[i % 3], rows[(i + 1) % 3], rows[(i + 2) % 3], weight, scale, True
        )

    fit(
        rmsnorm_kernel,
        call,
        itertools.product((16, 32, 64), (16, 32, 64), (512, 768, 1024, 1536), (1, 2, 3)),
        run,
        (lambda x, y, w: add_rmsnorm(x, y, w, 1e-5), (rows[0][:512], rows[1][:512], weight)),
    )


def tune_loss(run):
    V, N, D = 131072, 256, 64
    logits_nV, targets_n = run.random(4096, V), torch.randint(V, (4096,), device=run.device)
    fit(
        cross_entropy_kernel,
        lambda i: cross_entropy_kernel.fused_chunk_loss(logits_nV, targets_n, True),
        itertools.product((8192, 16384, 32768, 65536), (8, 16, 32), (1, 2, 3)),
        run,
        (linear_cross_entropy, (run.random(N, D), run.random(V, D) / D**0.5, targets_n[:N])),
    )


def launched(call):
    """Returns the compiled kernels that a call launches."""
    found, run = [], JITFunction.run
    with mock.patch.object(
        JITFunction, "run", lambda *args, **named: found.append(run(*args, **named))
    ):
        call(0)
    return found


def fits(call):
    """Whether the kernels of a call fit the GPU and spill at most 64 bytes of registers."""
    try:
        return all(4 * kernel.n_spills <= 64 for kernel in launched(call))
    except (TritonError, RuntimeError):  # too little memory, or a fault of the compiler
        return False


def shared_memory(call):
    return max(kernel.metadata.shared for kernel in launched(call))


def fastest(what, table, key, candidates, call, check):
    """Returns the line of `table` with which `call` is fastest.

    It fits the GPU, and with it `check`, (function, inputs), is as in float64.
    """
    lines, times = list(dict.fromkeys([table[key], *candidates])), {}
    with compile_in_parallel():
        for line in lines:
            with mock.patch.dict(table, {key: line}):
                call(0)
                results(*check, "triton")
    for line in lines:
        with mock.patch.dict(table, {key: line}):
            if fits(call) and all(error < TOLERANCE for error in errors(*check)):
                times[line] = measure({"it": call}, 5)["it"]
    order = sorted(times, key=times.get)
    print(
        f"{what}: {len(times)} of {len(lines)} lines hold; {table[key]} took "
        f"{times.get(table[key], math.nan) * 1e3:.3f} ms, the fastest:",
        *(f"{line} {times[line] * 1e3:.3f}" for line in order[:4]),
        flush=True,
    )
    return order[0] if order else table[key]


def fit(module, call, candidates, run, check):
    capability = dispatch.capability(run.device)
    if capability not in module.TABLE:
        raise UserError(
            f"{module.__name__}.TABLE has no line for {capability}, only for "
            f"{', '.join(map(str, module.TABLE))}"
        )
    best = fastest(module.__name__, module.TABLE, capability, candidates, call, check)
    path = Path(module.__file__)
    path.write_text(
        re.sub(
            rf"^( +{re.escape(str(capability))}: )\(.*?\)",
            rf"\g<1>{best}",
            path.read_text(),
            flags=re.MULTILINE,
        )
    )


PARTS = {  # name: (its check, its timings in the order of the table, its tuning)
    "attention": (gpu_attention.check, gpu_attention.time_attention, gpu_attention.tune),
    "rmsnorm": (check_norms, time_norms, tune_norms),
    "loss": (check_loss, time_loss, tune_loss),
    "decode": (check_model, time_decode, gpu_attention.tune_decode),
    "step": (lambda run: None, time_step, lambda run: None),
}


def bench(run, parts, out):
    """Check and time all parts; write the results after each of them.

    A wrong result is raised at the end, because time on a GPU is short.
    """
    start, wrong = time.perf_counter(), []

    def report(what):
        print(f"{what} after {time.perf_counter() - start:.0f} s", flush=True)

    with compile_in_parallel():
        for part in parts:
            PARTS[part][0](SimpleNamespace(**vars(run) | {"assert_close": launch}))
    report("compiled")
    for part in parts:
        try:
            PARTS[part][0](run)
        except UserError as e:
            wrong.append(f"{part}: {e}")
    report("checked")
    run.rates = rates(run)
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nanovlm": runner.package_versions()["nanovlm"],
        "wrong": wrong,
        "rates": run.rates,
        "rows": [],
    }
    for part in parts:
        found["rows"] += PARTS[part][1](run)
        torch.cuda.empty_cache()
        out.write_text(json.dumps(found, indent=1) + "\n")
        report(f"{part} timed")
    print_table(found)
    if wrong:
        raise UserError("; ".join(wrong))


# ---- the report ----


def print_table(found):
    print(
        f"\n{found['gpu']}, torch {torch.__version__}, triton {triton.__version__}: "
        f"products {found['rates']['matmul'] / 1e12:.0f} TFLOP/s, "
        f"copy {found['rates']['copy'] / 1e12:.2f} TB/s, "
        f"read {found['rates']['read'] / 1e12:.2f} TB/s\n"
    )
    print("| | time | of this GPU's rate | times as fast as | memory | aim |")
    print("|---|---|---|---|---|---|")
    for r in found["rows"]:
        unit = "" if r["of_bound"] else " s"  # without a time of ours: the times of the others
        beside = ", ".join(
            f"{name}: {ratio if isinstance(ratio, str) else f'{ratio:.2f}{unit}'}"
            for name, ratio in r["beside"].items()
        )
        memory = ", ".join(
            f"{name} {'?' if size is None else f'{size / 2**30:.1f} GiB'}"
            for name, size in r.get("bytes", {}).items()
        )
        ours = (
            r["seconds"]
            if isinstance(r["seconds"], str)
            else f"{r['seconds'] * 1e3:.3f} ms | {r['of_bound']:.2f}"
        )
        ours = ours if "|" in ours else f"{ours} | "
        print(f"| {r['what']} | {ours} | {beside} | {memory} | {r['aim']} |")


def gpu(
    *,
    rounds: int = 20,  # timings of each function
    only: str = "",  # parts: attention, rmsnorm, loss, decode, step; empty: all
    dry: bool = False,  # no times: small checks in Triton's interpreter
    tune: bool = False,  # find the tables of blocks instead
    out: str = str(Path(__file__).parent / "results" / "gpu.json"),  # file of all numbers
):
    """Check and time the kernels; print and write the results."""
    parts = only.split(",") if only else list(PARTS)
    if strange := [part for part in parts if part not in PARTS]:
        raise UserError(f"--only={','.join(strange)} is not one of {', '.join(PARTS)}")
    if dry and tune:
        raise UserError("--tune=true times, --dry=true does not")
    if not (dry or torch.cuda.is_available()):
        raise UserError(
            "gpu.py needs a CUDA GPU, and there is none; --dry=true checks the kernels in Triton's "
            "interpreter"
        )
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    run = SimpleNamespace(
        rounds=rounds,
        dry=dry,
        device=device,
        dtype=dtype,
        random=lambda *shape: torch.randn(shape, device=device, dtype=dtype),
        assert_close=assert_close,
        measure=measure,
        row=row,
        fastest=fastest,
        fit=fit,
        shared_memory=shared_memory,
    )
    if not (dry or tune):
        return bench(run, parts, Path(out))
    for part in parts:
        PARTS[part][2 if tune else 0](run)


if __name__ == "__main__":
    cli.run_script(gpu)
