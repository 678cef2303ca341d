"""Each kernel gives the numbers of its formula: it runs in Triton's interpreter, in float32 and
float16, and is compared with the formula in float64.

Buffers lie between margins of NaN, and outputs are NaN before a kernel fills them. So a read past
an edge shows in the result, a write past it shows in the margin, and what is left out stays NaN.
"""

import contextlib
import importlib
import itertools
import math
import os
import random
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import triton
from conftest import ROOT
from torch.distributed.fsdp import fully_shard

from nanovlm import UserError, distributed
from nanovlm.kernels import dispatch
from nanovlm.kernels import rmsnorm as _registers_its_operators  # noqa: F401
from nanovlm.kernels.cross_entropy import TABLE, fused_chunk_loss
from nanovlm.models import cross_entropy
from nanovlm.models.cross_entropy import chunk_loss, linear_cross_entropy
from nanovlm.models.decoder import Block, rope_cos_sin
from nanovlm.models.rmsnorm import add_rmsnorm, rmsnorm

# triton 3.6's interpreter
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)
MARGIN = 4096  # numbers: more than any block of a kernel at these sizes
DTYPES = (torch.float32, torch.float16)
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]


def dispatch_choice(choice):
    return mock.patch.object(dispatch, "choice", choice)


class Fences:
    """Buffers between margins of NaN; `intact` returns whether all margins still are NaN."""

    def __init__(self):
        self.stores = []

    def empty(self, shape, dtype, strides=None):
        """A tensor of NaN; strides: of the tensor in its buffer."""
        strides = strides or torch.empty(shape, device="meta").stride()
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if math.prod(shape)
            else 0
        )
        store = torch.full(
            (span + 2 * MARGIN,), math.nan if dtype.is_floating_point else -1, dtype=dtype
        )
        self.stores.append(store)
        return store.as_strided(shape, strides, MARGIN)

    def put(self, x, order=None, gap=0):
        """A copy of x.

        order: its leading dimensions as they lie in memory, outermost first. gap: numbers of NaN
        after each vector.
        """
        strides, step = [1] * x.dim(), x.shape[-1] + gap
        for i in reversed(order or range(x.dim() - 1)):
            strides[i], step = step, step * x.shape[i]
        return self.empty(x.shape, x.dtype, strides).copy_(x)

    @contextlib.contextmanager
    def around_outputs(self):
        plain = torch.Tensor.new_empty

        def new_empty(like, shape, dtype=None, device=None):
            if device is not None:  # the interpreter makes a view for itself
                return plain(like, shape, device=device)
            return self.empty(
                (shape,) if isinstance(shape, int) else tuple(shape), dtype or like.dtype
            )

        with (
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            mock.patch.object(
                torch,
                "empty_like",
                lambda like, dtype=None: self.empty(tuple(like.shape), dtype or like.dtype),
            ),
        ):
            yield

    def intact(self):
        return all(
            side.isnan().all() if side.is_floating_point() else (side == -1).all()
            for store in self.stores
            for side in (store[:MARGIN], store[-MARGIN:])
        )


def test_a_fence_sees_what_is_written_past_an_edge():
    fences = Fences()
    x = fences.put(torch.ones(2, 3), gap=2)
    assert fences.intact() and x.tolist() == [[1.0] * 3] * 2 and x.stride() == (5, 1)
    x.as_strided((9,), (1,), MARGIN)[8] = 0
    assert not fences.intact()


def close(ours, truth, dtype):
    """Returns whether the norm of the error is at most a few roundings of this dtype, relative to
    the norm of the truth, or to that of ones if the truth is smaller."""
    error = (ours.double() - truth).norm() / truth.norm().clamp(min=truth.numel() ** 0.5)
    return truth.numel() == 0 or error.item() < 4 * torch.finfo(dtype).eps  # NaN is not less


# ---- RMSNorm ----


def norms(count, seed=0):
    """Random cases: leading shapes; widths that are prime, odd, powers of two or those of models;
    with and without y; frozen weights; strides."""
    draw = random.Random(seed)
    shapes = [(1,), (5,), (3, 7), (2, 1, 5), (2, 3, 4), (0, 3)]
    for case in range(count):
        shape = draw.choice(shapes)
        yield SimpleNamespace(
            shape=(*shape, draw.choice([1, 2, 7, 37, 64, 129, 577, 1031])),
            x=draw.choice(DTYPES),
            y=draw.choice([None, *DTYPES]),
            weight=draw.choice(DTYPES),
            trains=draw.random() < 0.7,
            sum_is_used=draw.random() < 0.7,
            norm_is_used=draw.random() < 0.9,
            order=draw.sample(range(len(shape)), len(shape)),
            gap=draw.choice([0, 0, 3]),
            seed=case,
        )


def run_norm(case, x, y, weight, grads):
    """Returns (sum or None, norm, gradients) of rmsnorm or add_rmsnorm.

    grads: of the outputs; the case says which outputs are used.
    """
    inputs = [t for t in (x, y, weight) if t is not None and t.requires_grad]
    outputs = (None, rmsnorm(x, weight, 1e-5)) if y is None else add_rmsnorm(x, y, weight, 1e-5)
    pulled = [
        (out, grad)
        for out, grad, used in zip(
            outputs, grads, (case.sum_is_used, case.norm_is_used), strict=True
        )
        if used and out is not None
    ]
    if not pulled:
        return *outputs, [None] * len(inputs)
    return *outputs, torch.autograd.grad(
        [out for out, _ in pulled],
        inputs,
        [grad.to(out.dtype) for out, grad in pulled],
        allow_unused=True,
    )


@pytest.mark.parametrize(
    "case", list(norms(60)), ids=lambda case: "-".join(map(str, case.shape)) + f"-{case.seed}"
)
def test_rmsnorm_is_its_formula(case):
    g = torch.Generator().manual_seed(case.seed)
    new = lambda shape, dtype: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    plain = [
        new(case.shape, case.x),
        None if case.y is None else new(case.shape, case.y),
        new(case.shape[-1:], case.weight),
    ]
    grads = [new(case.shape, torch.float32) for _ in range(2)]
    wide = [
        None if t is None else t.double().requires_grad_(i < 2 or case.trains)
        for i, t in enumerate(plain)
    ]
    truth = run_norm(case, *wide, [grad.double() for grad in grads])

    fences = Fences()
    fenced = [
        None
        if t is None
        else fences.put(t, case.order if t.dim() > 1 else None, case.gap).requires_grad_(
            i < 2 or case.trains
        )
        for i, t in enumerate(plain)
    ]
    with fences.around_outputs(), dispatch_choice("triton"):
        ours = run_norm(case, *fenced, [fences.put(grad, case.order[::-1], 5) for grad in grads])
    coarsest = max(
        (t.dtype for t in fenced if t is not None), key=lambda dtype: torch.finfo(dtype).eps
    )
    for own, true in zip([*ours[:2], *ours[2]], [*truth[:2], *truth[2]], strict=True):
        assert (own is None) == (true is None)
        assert own is None or (own.shape == true.shape and close(own, true, coarsest))
    for own, given in zip(
        ours[2], [t for t in fenced if t is not None and t.requires_grad], strict=True
    ):
        assert own is None or own.dtype == given.dtype
    assert fences.intact()


@pytest.mark.parametrize("shape", [(3, 7, 37), (1, 1, 64)])
def test_the_norms_operators_pass_opcheck(shape):
    x, y, weight = (
        torch.randn(shape, requires_grad=True),
        torch.randn(shape).half(),
        torch.randn(shape[-1], requires_grad=True),
    )
    for more in (None, y):
        torch.library.opcheck(torch.ops.nanovlm.rmsnorm, (x, more, weight, 1e-5, torch.float32))
    scale = torch.rand(shape[:-1])
    for rest, trains in itertools.product((None, y), (True, False)):
        torch.library.opcheck(
            torch.ops.nanovlm.rmsnorm_backward,
            (x.detach(), rest, x.detach(), weight.detach(), scale, trains),
        )


def test_the_formula_passes_gradcheck_in_float64():
    x, y, weight = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 7), (2, 3, 7), (7,))
    )
    assert torch.autograd.gradcheck(lambda *a: add_rmsnorm(*a, 1e-5), (x, y, weight))


def test_the_gradient_of_a_weight_repeats_itself_to_the_bit_and_counts_every_vector_once():
    """There are more vectors than programs: each program sums several, then the sums are added in
    order."""
    x, weight, grad = torch.randn(101, 64), torch.ones(64, requires_grad=True), torch.randn(101, 64)
    with dispatch_choice("triton"):
        one, two = (
            torch.autograd.grad(rmsnorm(x, weight, 1e-5), weight, grad)[0] for _ in range(2)
        )
    wide = x.double()
    assert torch.equal(one, two)
    assert close(
        one,
        (grad.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).sum(0),
        torch.float32,
    )


# ---- loss ----


@pytest.mark.parametrize(
    "n, vocabulary, dtype, wanted",
    [
        (1, 1, torch.float32, True),
        (5, 37, torch.float16, True),
        (7, 64, torch.float32, False),
        (3, 129, torch.float16, False),
        (6, 1009, torch.float32, True),
        (2, 4099, torch.float16, True),
        (4, 512, torch.float32, True),
    ],
)
def test_logits_of_a_chunk_become_the_loss_and_its_gradient_in_place(n, vocabulary, dtype, wanted):
    g = torch.Generator().manual_seed(n)
    plain, targets_n = (
        (torch.randn(n, vocabulary, generator=g) * 5).to(dtype),
        torch.randint(vocabulary, (n,), generator=g),
    )
    targets_n[0] = vocabulary - 1
    loss, grad_nV = chunk_loss(plain.double(), targets_n, wanted)
    fences = Fences()
    given, targets_n = fences.put(plain), fences.put(targets_n)
    with (
        fences.around_outputs(),
        dispatch_choice("triton"),
        mock.patch.dict(TABLE, {(8, 0): (128 * dtype.itemsize, 4, 2)}),
    ):  # blocks of 128 logits
        ours, theirs = fused_chunk_loss(given, targets_n, wanted)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5) and fences.intact()
    assert (
        (theirs is given and close(given, grad_nV, dtype)) if wanted else torch.equal(given, plain)
    )


@pytest.mark.parametrize(
    "trains_hidden, trains_head", [(True, True), (True, False), (False, True), (False, False)]
)
def test_the_loss_with_kernels_is_cross_entropy_in_float64_over_all_chunks(
    trains_hidden, trains_head
):
    hidden_ND = torch.randn(53, 8).requires_grad_(trains_hidden)
    head_VD = torch.randn(313, 8).requires_grad_(trains_head)
    targets_N = torch.randint(313, (53,))
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden_ND, head_VD)]
    truth = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, targets_N, reduction="sum")
    with dispatch_choice("triton"), mock.patch.object(cross_entropy, "CHUNK", 5):
        ours = linear_cross_entropy(hidden_ND, head_VD, targets_N)
    assert ours.item() == pytest.approx(truth.item(), rel=1e-6)
    if trained := [
        (x, y) for x, y in zip((hidden_ND, head_VD), wide, strict=True) if x.requires_grad
    ]:
        own, theirs = (
            torch.autograd.grad(ours * 0.3, [x for x, _ in trained]),
            torch.autograd.grad(truth * 0.3, [y for _, y in trained]),
        )
        assert all(close(a, b, torch.float32) for a, b in zip(own, theirs, strict=True))


def test_logits_that_the_gradient_cannot_overwrite_are_refused():
    with pytest.raises(AssertionError, match="overwrites the logits"):
        fused_chunk_loss(torch.randn(37, 5).T, torch.zeros(5, dtype=torch.int64), True)


def test_without_labels_the_loss_is_zero():
    hidden_ND, head_VD = (
        torch.randn(0, 8, requires_grad=True),
        torch.randn(313, 8, requires_grad=True),
    )
    with dispatch_choice("triton"):
        ours = linear_cross_entropy(hidden_ND, head_VD, torch.empty(0, dtype=torch.int64))
    ours.backward()
    assert ours.item() == 0 and head_VD.grad.abs().sum() == 0


@pytest.mark.parametrize("choice", ["auto", "triton"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_loss_is_the_loss_whatever_the_number_of_tokens(choice, autocast):
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True
    )
    with dispatch_choice(choice), torch.autocast("cpu", torch.float16, enabled=autocast):
        for N in (7, 12):
            hidden_ND, head_VD, targets_N = (
                torch.randn(N, 8, requires_grad=True),
                torch.randn(37, 8, requires_grad=True),
                torch.randint(37, (N,)),
            )
            one, two = (
                [out, *torch.autograd.grad(out, (hidden_ND, head_VD))]
                for out in (
                    f(hidden_ND, head_VD, targets_N) for f in (linear_cross_entropy, compiled)
                )
            )
            assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_the_operator_of_the_loss_passes_opcheck(choice):
    hidden_ND, head_VD = (
        torch.randn(7, 8, requires_grad=True),
        torch.randn(37, 8, requires_grad=True),
    )
    with dispatch_choice(choice):
        for wants in ((True, True), (False, True)):
            given = (
                hidden_ND.detach().requires_grad_(wants[0]),
                head_VD,
                torch.randint(37, (7,)),
                None,
                *wants,
            )
            torch.library.opcheck(torch.ops.nanovlm.linear_cross_entropy, given)


# ---- kernels within a model ----


def make_block(seed=0):
    torch.manual_seed(seed)
    return Block(
        width=24,
        heads=6,
        kv_heads=2,
        head_dim=8,
        intermediate_size=36,
        eps=1e-5,
        sliding_window=None,
    )


def block_gradients(block, x_BTD, **autocast):
    """Returns the block's output, and the gradients of its input and parameters for a random
    gradient of the output."""
    x_BTD = x_BTD.clone().requires_grad_()
    angles = rope_cos_sin(torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[0], -1), 8, 10000.0)
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        out_BTD = block(x_BTD, angles, None, None, 0)
    grad_BTD = torch.randn(out_BTD.shape, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad((out_BTD * grad_BTD).sum(), [x_BTD, *block.parameters()])
    return [out_BTD.detach(), *grads]


def test_a_block_with_kernels_is_the_block():
    block, x_BTD = make_block(), torch.randn(2, 7, 24)
    plain = block_gradients(block, x_BTD)
    with dispatch_choice("triton"):
        assert all(
            close(a, b.double(), torch.float32)
            for a, b in zip(block_gradients(block, x_BTD), plain, strict=True)
        )


def test_under_autocast_the_norm_comes_in_the_dtype_that_products_take():
    block, x_BTD = make_block(), torch.randn(2, 7, 24)
    plain = block_gradients(block, x_BTD, dtype=torch.float16)
    seen = []
    block.gate_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with dispatch_choice("triton"):
        ours = block_gradients(block, x_BTD, dtype=torch.float16)
    assert seen == [torch.float16] and all(
        a.dtype == b.dtype for a, b in zip(ours, plain, strict=True)
    )
    assert all(close(a, b.double(), torch.float16) for a, b in zip(ours, plain, strict=True))


def test_activation_checkpointing_gives_the_same_gradients():
    block, x_BTD = make_block(), torch.randn(2, 7, 24)
    with dispatch_choice("triton"):
        plain = block_gradients(block, x_BTD)
        distributed.checkpoint_activations([block])
        assert all(map(torch.equal, block_gradients(block, x_BTD), plain))


def test_compiled_it_is_one_graph_whatever_the_lengths():
    weight = torch.randn(24, requires_grad=True)

    def both(x_BTD, y_BTD):
        sum_BTD, normed_BTD = add_rmsnorm(x_BTD, y_BTD, weight, 1e-5)
        return sum_BTD + rmsnorm(normed_BTD * 2, weight, 1e-5)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch_choice("triton"):
        for T in (5, 9):
            x_BTD, y_BTD = (
                torch.randn(2, T, 24, requires_grad=True),
                torch.randn(2, T, 24, requires_grad=True),
            )
            pairs = [
                (out, *torch.autograd.grad(out.square().sum(), (x_BTD, y_BTD, weight)))
                for out in (both(x_BTD, y_BTD), compiled(x_BTD, y_BTD))
            ]
            assert all(map(torch.equal, *pairs))


def test_fsdp_shards_what_kernels_read(tmp_path):
    plain, x_BTD = make_block(), torch.randn(2, 7, 24)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with dispatch_choice("triton"):
            wanted = block_gradients(plain, x_BTD)
            sharded = fully_shard(make_block())
            angles = rope_cos_sin(torch.arange(7).expand(2, -1), 8, 10000.0)
            out_BTD = sharded(x_BTD, angles, None, None, 0)
            (
                out_BTD * torch.randn(out_BTD.shape, generator=torch.Generator().manual_seed(7))
            ).sum().backward()
    finally:
        dist.destroy_process_group()
    found = [out_BTD.detach(), *(p.grad.full_tensor() for p in sharded.parameters())]
    assert all(map(torch.equal, found, [wanted[0], *wanted[2:]]))


# ---- compilation for GPUs ----


def cells(report, of_version):
    """{(kernel, case, chip): cell} and the hash of the kernels, of a version of triton in a report
    of aot.py."""
    part = next(part for part in report.split("\n## ") if part.startswith(f"triton {of_version},"))
    head, chips, _, *rows = [line for line in part.splitlines() if line]
    chips = chips.strip("| ").split(" | ")[2:]
    found = {}
    for row in rows:
        kernel, case, *numbers = row.strip("| ").split(" | ")
        found |= {(kernel, case, chip): cell for chip, cell in zip(chips, numbers, strict=True)}
    return found, head.split()[-1]


def test_kernels_compile_for_gpus_that_are_not_here_and_the_report_is_of_todays_kernels(tmp_path):
    """Blocks, warps and stages are those that the operators launch. The script fails if a kernel
    does not fit. These are a few of the cases; all of them take many minutes."""
    of = "^heads of 64$|^heads of 128, 47 tokens, documents, window$|width 4,096$|32,003"
    command = f"tests/bench/aot.py --of={of} --chips=8.6,9.0,12.0 --out={tmp_path / 'aot.md'}"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command.split(" --")[:1], *("--" + x for x in command.split(" --")[1:])],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = (ROOT / "tests/bench/results/aot.md").read_text()
    fresh, kernels = cells((tmp_path / "aot.md").read_text(), triton.__version__)
    assert len(fresh) == 3 * (2 * 5 + 2 + 1)
    assert report.count(f", kernels {kernels}\n") == 2, (
        "run python tests/bench/aot.py (both tritons)"
    )
    if triton.__version__ == PINNED:  # another version needs other registers
        kept, _ = cells(report, PINNED)
        assert fresh == {key: kept[key] for key in fresh}


# ---- the benchmark of kernels, which needs a GPU ----


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    return importlib.import_module("gpu")


def test_the_bench_checks_every_kernel_without_a_gpu_and_sees_a_wrong_one(bench, capsys):
    bench.gpu(dry=True, only="rmsnorm,loss,decode")
    assert capsys.readouterr().out.count("as in float64") >= 6
    with pytest.raises(UserError, match="doubled: result 0 is off by"):
        bench.assert_close(
            "doubled", lambda x: x * (2 if dispatch.choice == "triton" else 1), (torch.randn(3),)
        )
    with pytest.raises(UserError, match="unwritten: result 0 is off by nan"):
        bench.assert_close(
            "unwritten",
            lambda x: x + x.new_empty(3) if dispatch.choice == "triton" else x,
            (torch.randn(3),),
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_bench_wants_a_gpu(bench):
    with pytest.raises(UserError, match="needs a CUDA GPU, and there is none"):
        bench.gpu()


def test_the_bench_prints_a_table(bench, capsys):
    rows = [
        bench.row("norm", {"ours": 0.002, "A": 0.003, "B": "no package b"}, 0.001, "0.95"),
        bench.row(
            "loss", {"ours": "out of memory", "A": 0.5}, 0.1, "", bytes={"ours": None, "A": 2**31}
        ),
    ]
    bench.print_table(
        {"gpu": "a GPU", "rates": {"matmul": 7.9e14, "copy": 4.3e12, "read": 4e12}, "rows": rows}
    )
    output = capsys.readouterr().out
    assert "products 790 TFLOP/s, copy 4.30 TB/s, read 4.00 TB/s" in output
    assert "| norm | 2.000 ms | 0.50 | A: 1.50, B: no package b |  | 0.95 |" in output
    assert "| loss | out of memory |  | A: 0.50 s | ours ?, A 2.0 GiB |  |" in output


def test_tuning_rewrites_the_line_of_this_gpu_and_no_other(bench, tmp_path, capsys):
    """It is the fastest line that fits the GPU and is right; here the two fastest are not."""
    file = tmp_path / "kernel.py"
    file.write_text(
        "TABLE = {  # capability\n    (8, 0): (1, 2),  # why\n    (9, 0): (1, 2),  # (this)\n}\n"
    )
    module = SimpleNamespace(
        __name__="kernel", __file__=str(file), TABLE={(8, 0): (1, 2), (9, 0): (1, 2)}
    )
    of_line = lambda values: lambda *a: values[module.TABLE[9, 0][0]]  # noqa: E731
    stand_ins = dict(
        fits=of_line({1: True, 2: False, 3: True, 4: True, 8: True}),
        errors=of_line({1: [0.0], 3: [0.0, math.nan], 4: [0.0], 8: [0.0]}),
        measure=of_line({1: {"it": 3.0}, 4: {"it": 1.0}, 8: {"it": 2.0}}),
    )
    with (
        mock.patch.object(dispatch, "capability", lambda device: (9, 0)),
        mock.patch.multiple(bench, **stand_ins),
    ):
        bench.fit(
            module,
            lambda i: None,
            [(2, 2), (3, 2), (4, 2), (8, 2)],
            SimpleNamespace(device=None),
            (lambda x: x, [torch.ones(2)]),
        )
    assert (
        file.read_text()
        == "TABLE = {  # capability\n    (8, 0): (1, 2),  # why\n    (9, 0): (4, 2),  # (this)\n}\n"
    )
    assert (
        "kernel: 3 of 5 lines hold; (1, 2) took 3000.000 ms, "
        "the fastest: (4, 2) 1000.000 (8, 2) 2000.000" in capsys.readouterr().out
    )
    with (
        mock.patch.object(dispatch, "capability", lambda device: (8, 9)),
        pytest.raises(UserError, match="has no line for"),
    ):
        bench.fit(module, None, [(1, 2)], SimpleNamespace(device=None), None)


# ---- dispatch ----


def gpu_tensor(capability, dtype=torch.bfloat16, shape=(3,)):
    return SimpleNamespace(
        device=torch.device("cuda", 0), is_cuda=True, dtype=dtype, shape=shape
    ), mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability)


def test_kernels_run_on_gpus_and_elsewhere_only_by_choice():
    tensor, has = gpu_tensor((8, 0))
    with has:
        assert dispatch.kernel("rmsnorm", tensor) and not dispatch.kernel("rmsnorm", torch.randn(3))
        with dispatch_choice("torch"):
            assert not dispatch.kernel("rmsnorm", tensor)
    with dispatch_choice("triton"):
        assert dispatch.kernel("rmsnorm", torch.randn(3))


@pytest.mark.parametrize(
    "capability, dtype, refused, message",
    [
        (
            (7, 5),
            torch.float16,
            "",
            "this GPU is of compute capability 7.5, older than 8.0; "
            "the formula in PyTorch runs instead",
        ),
        ((9, 0), torch.float64, "", "torch.float64 is not one of torch.float32"),
        ((9, 0), torch.bfloat16, "a head of 300", "a head of 300; the formula"),
    ],
)
def test_a_gpu_that_runs_a_formula_says_why_once(capability, dtype, refused, message):
    tensor, has = gpu_tensor(capability, dtype)
    own = mock.patch.dict(dispatch.KERNELS, {"own": (len, lambda *_: refused)})
    with has, own, mock.patch.object(dispatch, "warned", set()):
        with pytest.warns(UserWarning, match=re.escape(message)):
            assert not dispatch.kernel("own", tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not dispatch.kernel("own", tensor)


def test_the_shared_memory_of_a_gpu_is_what_its_driver_reports():
    properties = SimpleNamespace(
        name="NVIDIA A10", major=8, minor=6, shared_memory_per_block_optin=101_376
    )
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties):
        found = dispatch.shared_memory(torch.device("cuda", 0))
    assert found == ("NVIDIA A10 (8.6)", 101_376)


def test_a_norm_that_is_too_wide_runs_its_formula():
    x, weight = torch.randn(2, 16385), torch.ones(16385)
    with (
        dispatch_choice("triton"),
        mock.patch.object(dispatch, "warned", set()),
        pytest.warns(UserWarning, match="an RMSNorm wider than 16384"),
    ):
        ours = rmsnorm(x, weight, 1e-5)
    assert torch.equal(ours, rmsnorm(x, weight, 1e-5))


def test_tables_go_by_the_oldest_capability_that_they_are_for():
    table = {(8, 0): "a", (9, 0): "b"}
    for capability, wanted in [
        ((0, 0), "a"),
        ((8, 0), "a"),
        ((8, 9), "a"),
        ((9, 0), "b"),
        ((12, 1), "b"),
    ]:
        with mock.patch.object(
            dispatch, "capability", lambda device, capability=capability: capability
        ):
            assert dispatch.config(table, torch.device("cuda")) == wanted


def test_without_triton_the_formula_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from nanovlm.kernels import dispatch\n"
        "from nanovlm.models import vlm\n"
        "from nanovlm.models.rmsnorm import rmsnorm\n"
        "print(rmsnorm(torch.ones(2, 3), torch.ones(3), 0.0).sum().item())\n"
        "dispatch.choice = 'triton'\n"
        "rmsnorm(torch.ones(3), torch.ones(3), 0.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout == "6.0\n"
        and "kernels: triton is not installed; the formula in PyTorch runs" in done.stderr
    )
