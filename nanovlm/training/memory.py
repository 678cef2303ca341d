"""Memory that a training step takes on one rank, estimated from shapes before any weight is read."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # what torch.compile plans with
from torch.multiprocessing.reductions import StorageWeakRef

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, distributed
from ..loss import CHUNK, linear_cross_entropy
from . import flops as cost


class Shapes(torch.nn.Module):
    """What VLM.forward does, where there are shapes and no numbers to count: `words` tokens are trained."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, words):
        model, tiles = self.model, batch["tiles_NCYX"]
        features = model.see(tiles if len(tiles) else tiles.new_empty(1, 3, model.tile, model.tile))
        x_BTD = model.decoder.embed(batch["ids_BT"].clamp(min=0))
        if "places" in batch:
            features = features[batch["places"]]
        x_BTD = x_BTD.masked_scatter(
            (batch["ids_BT"] == IMAGE_TOKEN_ID)[..., None], features.to(x_BTD.dtype)
        )
        hidden_BTD = model.decoder(
            x_BTD, batch["positions_BT"], None
        )  # who sees whom is no tensor that is kept
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1)[:words],
            model.decoder.head.weight,
            batch["targets_BT"].flatten()[:words],
        )


def kept_for_backward(model, batch, device, dtype, narrow):
    """Bytes that the forward pass of a batch keeps for the backward pass, the parameters themselves aside. Nothing is computed nor held: the
    model may be of any size, and on the meta device. narrow: its parameters are of `dtype`, and not only its products."""
    shapes, words, kept = Shapes(model), int((batch["targets_BT"] != IGNORE_INDEX).sum()), {}
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not narrow)

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (
            storage.nbytes(),
            StorageWeakRef(storage),
        )  # a frozen block that would be computed again keeps nothing in the end
        return tensor

    with FakeTensorMode():
        new = lambda x, dtype: torch.empty(x.shape, dtype=dtype, device=device)  # noqa: E731
        weights = {
            name: new(p, dtype if narrow else torch.float32).requires_grad_(p.requires_grad)
            for name, p in shapes.named_parameters()
        }
        rest = {name: new(x, x.dtype) for name, x in shapes.named_buffers()}
        batch = {name: new(x, x.dtype) for name, x in batch.items()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed:
            loss = torch.func.functional_call(shapes, weights | rest, (batch, words))
        own = {p.untyped_storage()._cdata for p in weights.values()}
        total = sum(
            size
            for pointer, (size, storage) in kept.items()
            if pointer not in own and not storage.expired()
        )
        del loss  # held until we have counted
    return total


def estimate_memory(
    model,
    row,
    micro,
    device,
    dtype,
    *,
    how="none",
    shards=1,
    recompute="none",
    accumulates=False,
    offload=False,
):
    """{what: bytes} of a rank at the height of a training step, `micro` rows like `row`, a batch of one, at once; how: as parallel.wrap has it.

    One row and the same row twice are looked at, for a part of what is kept (bfloat16 copies of the weights) does not grow with the rows.
    recompute: blocks keep what enters them; the backward pass holds one of them whole at a time, and no logits any more. fsdp: a rank holds its
    share, and gathers what it works on; accumulates: gradients of several micro-batches add up whole, and are cut at the end of the step;
    offload: that share lies in the host's memory, and is not counted.
    """

    def activations(blocks):
        distributed.checkpoint_activations(blocks)
        one, two = (
            kept_for_backward(
                model,
                {name: torch.cat([x] * n) for name, x in row.items()},
                device,
                dtype,
                how == "fsdp",
            )
            for n in (1, 2)
        )
        for block in blocks:
            del block.forward
        return one + (micro - 1) * (two - one)

    again = distributed.transformer_blocks(model, recompute)
    kept = activations(again)
    block = activations(again[:-1]) - kept
    size = {
        on: 4 * sum(p.numel() for p in model.parameters() if p.requires_grad is on)
        for on in (True, False)
    }
    words = min(CHUNK, micro * int((row["targets_BT"] != IGNORE_INDEX).sum()))
    logits = 2 * words * model.decoder.head.weight.shape[0] * 4  # they and their gradient, float32
    sizes = {
        "weights": (size[True] + size[False]) // shards,
        "gradients": size[True] // shards,
        "optimizer": 2 * size[True] // shards,
        "activations": kept + max(0, block - logits),
        "logits": logits,
    }
    if offload:
        sizes = {name: size for name, size in sizes.items() if name in ("activations", "logits")}
    if how == "fsdp":
        sizes["gathered"] = bytes_gathered(model, dtype) + accumulates * size[True]
    return sizes


def bytes_gathered(model, dtype):
    """Bytes that FSDP gathers at once: what is held all along, a block and the next one, and the gradients of one of them and of the rest."""
    *layers, _ = distributed.fsdp_units(model)
    numbers = [
        (
            sum(p.numel() for p in block.parameters()),
            sum(p.numel() for p in block.parameters() if p.requires_grad),
        )
        for block in layers
    ]
    every = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    rest, largest = (
        [total - sum(sizes), max(sizes)]
        for total, sizes in zip(every, zip(*numbers, strict=True), strict=True)
    )
    return (rest[0] + 2 * largest[0] + rest[1] + largest[1]) * dtype.itemsize


def print_plan(model, rates, sizes):
    """What trains at which rate (a frozen part has none), and how much memory a rank will take, as `estimate_memory` has it."""
    print(f"{'part':10} {'parameters':>13} {'trained':>13} {'rate':>9}")
    for part, module in model.named_children():
        count = sum(p.numel() for p in module.parameters())
        print(
            f"{part:10} {count:13,} {count if part in rates else 0:13,} {f'{rates[part]:.1e}' if part in rates else 'frozen':>9}",
            flush=True,
        )
    sizes = sizes | {"in all": sum(sizes.values())}
    print(
        "memory, about: "
        + ", ".join(f"{what} {size / 2**20:,.0f} MiB" for what, size in sizes.items()),
        flush=True,
    )


def print_estimate(run, model, policy, speed):
    """Print what a training step would take on 1, 8 and 64 cards, and how long the run; run: the settings of train.py; model: on the meta device;
    speed: operations a second of a card."""
    row, tiles, trained = cost.assumed_row(run.row, policy)
    products = torch.float32 if run.dtype == "float32" else torch.bfloat16

    def needed(how, cards):
        micro = min(run.micro, -(-run.batch // cards))
        return estimate_memory(
            model,
            row,
            micro,
            torch.device("cpu"),
            products,
            how=how,
            shards=cards if how == "fsdp" else 1,
            recompute=run.recompute,
            accumulates=micro * cards < run.batch,
            offload=run.offload and how == "fsdp",
        )

    print(
        f"{run.stage}: {run.steps:,} steps of {run.batch} rows of {run.row:,} tokens, {trained:,} of them trained, and {tiles} tiles (assumed)"
    )
    print_plan(model, run.rates, needed("none", 1))
    flops = cost.flops(
        model, run.rates, run.batch, run.row, run.batch * tiles, run.batch * trained, run.recompute
    )
    print(
        f"operations of a step: {sum(flops.values()):.2e} ({', '.join(f'{part} {count:.1e}' for part, count in flops.items())})"
    )
    for cards in (cards for cards in (1, 8, 64) if cards <= run.batch):  # each needs a row
        ways = (
            {" a card by ddp": "ddp", " by fsdp": "fsdp"}
            if cards > 1
            else {"": "fsdp" if run.offload else "none"}
        )
        told = ",".join(
            f" {sum(needed(how, cards).values()) / 2**30:,.0f} GiB{way}"
            for way, how in ways.items()
        )
        print(
            f"{cards:3} card{'s' * (cards > 1)}:{told}; {sum(flops.values()) * run.steps / speed / cards / 86400:,.1f} days at "
            f"{speed / 1e12:,.0f} TFLOP/s a card"
        )
