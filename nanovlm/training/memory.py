"""Memory of a training step on one rank, estimated from shapes before any weight is read."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # torch.compile plans with it, too
from torch.multiprocessing.reductions import StorageWeakRef

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..distributed import (
    checkpoint_activations,
    choose_parallelism,
    fsdp_units,
    get_rank,
    resting_dtypes,
    transformer_blocks,
)
from ..models.cross_entropy import CHUNK, linear_cross_entropy
from .flops import assumed_sequence, step_flops


class FakeForward(torch.nn.Module):
    """VLM.forward for fake tensors. They have shapes but no values: nothing can be counted in them,
    so the number of labelled tokens is an argument, `labels`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, labels):
        model, tiles = self.model, batch["tiles_NCYX"]
        features = model.encode_images(
            tiles if len(tiles) else tiles.new_empty(1, 3, model.tile, model.tile)
        )
        x_BTD = model.decoder.embed_tokens(batch["ids_BT"].clamp(min=0))
        if "image_feature_index" in batch:
            features = features[batch["image_feature_index"]]
        x_BTD = x_BTD.masked_scatter(
            (batch["ids_BT"] == IMAGE_TOKEN_ID)[..., None], features.to(x_BTD.dtype)
        )
        # No attention mask: the backward pass keeps none.
        hidden_BTD = model.decoder(x_BTD, batch["positions_BT"], None)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1)[:labels],
            model.decoder.lm_head.weight,
            batch["targets_BT"].flatten()[:labels],
        )


def saved_activation_bytes(model, batch, device, dtype, low_precision_weights):
    """Returns the bytes that a forward pass saves for the backward pass, without the parameters.

    Nothing is computed or allocated: the model may have any size, and may be on the meta device.
    low_precision_weights: parameters are in `dtype`, as under FSDP, not only the matrix products.
    """
    forward, saved = FakeForward(model), {}
    labels = int((batch["targets_BT"] != IGNORE_INDEX).sum())
    autocast = torch.autocast(
        device.type, dtype, enabled=dtype != torch.float32 and not low_precision_weights
    )

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        # The weak reference tells afterwards whether the tensor is still alive: a frozen block
        # under activation checkpointing keeps nothing.
        saved[storage._cdata] = storage.nbytes(), StorageWeakRef(storage)
        return tensor

    def fake(x, dtype):
        return torch.empty(x.shape, dtype=dtype, device=device)

    with FakeTensorMode():
        weights, resting = {}, resting_dtypes(model, dtype)
        for name, p in forward.named_parameters():
            weight_dtype = dtype if low_precision_weights else resting[p]
            weights[name] = fake(p, weight_dtype).requires_grad_(p.requires_grad)
        buffers = {name: fake(x, x.dtype) for name, x in forward.named_buffers()}
        batch = {name: fake(x, x.dtype) for name, x in batch.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor), autocast:
            loss = torch.func.functional_call(forward, weights | buffers, (batch, labels))
        own = {p.untyped_storage()._cdata for p in weights.values()}
        total = 0
        for pointer, (size, storage) in saved.items():
            if pointer not in own and not storage.expired():
                total += size
        del loss  # it keeps the saved tensors alive until they are counted
    return total


def estimate_memory(run, model, sequence, device, dtype, parallel="none", gpus=1):
    """Returns {purpose: bytes} at the peak of a training step on one of `gpus` ranks.

    run: the settings, as load_settings returns them. sequence: a batch of one. The activations of n
    sequences are a + b · n: a is the bfloat16 copies of weights. One and two sequences give both.

    With activation checkpointing, blocks keep their inputs. The backward pass holds all activations
    of one block at a time, but no logits any more. With parallel="fsdp" a rank holds its shard and
    gathers what it works on; with gradient accumulation it also holds whole gradients until the
    last micro-batch of a step. With CPU offload its shard is in host memory, which is not counted.
    """
    micro_batch_size = min(run.micro_batch_size, -(-run.global_batch_size // gpus))
    is_fsdp = parallel == "fsdp"
    shards = (run.hsdp_shard_size or gpus) if is_fsdp else 1

    def activations(blocks):
        checkpoint_activations(blocks)
        sizes = []
        for count in (1, 2):
            batch = {name: torch.cat([x] * count) for name, x in sequence.items()}
            sizes.append(saved_activation_bytes(model, batch, device, dtype, is_fsdp))
        for block in blocks:
            del block.forward
        return sizes[0] + (micro_batch_size - 1) * (sizes[1] - sizes[0])

    blocks = transformer_blocks(model, run.activation_checkpointing)
    saved = activations(blocks)
    # what one block saves without checkpointing
    block = activations(blocks[:-1]) - saved if blocks else 0
    resting, trained = resting_dtypes(model, dtype), 4 * count_parameters(model, trained=True)
    weights = sum(p.numel() * resting[p].itemsize for p in resting)
    labels = micro_batch_size * int((sequence["targets_BT"] != IGNORE_INDEX).sum())
    # Logits of a chunk and their gradient, in float32.
    logits = 2 * min(CHUNK, labels) * model.decoder.lm_head.weight.shape[0] * 4
    sizes = {
        "weights": weights // shards,
        "gradients": trained // shards,
        "optimizer": 2 * trained // shards,
        "activations": saved + max(0, block - logits),
        "logits": logits,
    }
    if is_fsdp:
        if run.cpu_offload:
            del sizes["weights"], sizes["gradients"], sizes["optimizer"]
        accumulates = micro_batch_size * gpus < run.global_batch_size
        sizes["gathered"] = gathered_bytes(model, dtype) + accumulates * trained
    return sizes


def count_parameters(module, trained=False):
    """Returns the number of parameters; trained: only of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def gathered_bytes(model, dtype):
    """Returns the bytes that FSDP gathers at once.

    These are the weights of a block and of the unit around the blocks, the gradients of a block and
    twice those of that unit.
    """
    *blocks, _ = fsdp_units(model)
    weights = [count_parameters(block) for block in blocks]
    trained = [count_parameters(block, trained=True) for block in blocks]
    other_weights = count_parameters(model) - sum(weights)
    other_trained = count_parameters(model, trained=True) - sum(trained)
    return (max(weights) + other_weights + max(trained) + 2 * other_trained) * dtype.itemsize


def print_plan(model, peak_lrs, sizes):
    """Print the parameters and the peak learning rate of each part, and the memory of a rank.

    sizes: as estimate_memory returns them.
    """
    print(f"{'part':10} {'parameters':>13} {'trained':>13} {'peak lr':>9}")
    for part, module in model.named_children():
        count, trained = count_parameters(module), count_parameters(module, trained=True)
        rate = f"{peak_lrs[part]:.1e}" if part in peak_lrs else "frozen"
        print(f"{part:10} {count:13,} {trained:13,} {rate:>9}", flush=True)
    sizes = sizes | {"in all": sum(sizes.values())}
    memory = ", ".join(f"{purpose} {size / 2**20:,.0f} MiB" for purpose, size in sizes.items())
    print(f"memory, about: {memory}", flush=True)


def print_estimate(run, model, image_config, speed):
    """Print operations, memory and days of a run on 1, 8 and 64 GPUs.

    run: as load_settings returns it. model: on the meta device. speed: operations per second that
    one GPU reaches.
    """
    sequence, tiles, labels = assumed_sequence(run.seq_len, image_config)
    dtype = choose_dtype(run, torch.device("cuda"))

    def memory(parallel, gpus):
        return estimate_memory(run, model, sequence, torch.device("cpu"), dtype, parallel, gpus)

    print(
        f"{run.stage}: {run.steps:,} steps of {run.global_batch_size} sequences of "
        f"{run.seq_len:,} tokens; assumed: {labels:,} labelled tokens and {tiles} tiles in each"
    )
    print_plan(model, run.peak_lrs, memory("none", 1))
    flops = {}
    for part, count in step_flops(
        model, run.peak_lrs, sequence, run.activation_checkpointing
    ).items():
        flops[part] = run.global_batch_size * count
    parts = ", ".join(f"{part} {count:.1e}" for part, count in flops.items())
    print(f"operations of a step: {sum(flops.values()):.2e} ({parts})")
    for gpus in (1, 8, 64):
        if gpus > run.global_batch_size:  # each GPU needs a sequence
            break
        methods = {" a GPU by ddp": "ddp", " by fsdp": "fsdp"}
        if gpus == 1:
            methods = {"": "fsdp" if run.cpu_offload else "none"}
        sizes = []
        for text, parallel in methods.items():
            size = sum(memory(parallel, gpus).values())
            sizes.append(f" {size / 2**30:,.0f} GiB{text}")
        days = sum(flops.values()) * run.steps / speed / gpus / 86400
        print(
            f"{gpus:3} GPU{'s' * (gpus > 1)}:{','.join(sizes)}; "
            f"{days:,.1f} days at {speed / 1e12:,.0f} TFLOP/s a GPU"
        )


def choose_dtype(run, device):
    """Returns the dtype of matrix products; see resting_dtypes for that of the parameters."""
    if run.dtype == "bfloat16" or (run.dtype == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def plan_memory(run, model, sequence, device, dtype, world):
    """Set run.parallel by the estimated memory of a rank; print the choice and the estimate.

    sequence: a batch of one, for which the estimate is made.
    """
    sizes = estimate_memory(run, model, sequence, device, dtype, "none", world)
    run.parallel, reason = choose_parallelism(run.parallel, sum(sizes.values()), device)
    if run.parallel == "fsdp":
        sizes = estimate_memory(run, model, sequence, device, dtype, "fsdp", world)
    if get_rank() == 0:
        print(f"parallel: {run.parallel}, {reason}")
        print_plan(model, run.peak_lrs, sizes)
