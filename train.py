"""Train a vision-language model:

    python train.py                                 the demonstration: minutes on two CPU cores
    python train.py --stage=pretrain                align a stitched model: train its projector
    python train.py --stage=sft --data=data/mine    fine-tune what `pretrain` left, on your data
    torchrun --nproc_per_node=8 train.py --stage=sft --data=data/mine    the same on eight GPUs

--help lists the settings.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C prints nothing while torch is imported, which takes seconds. cli.run_script ends that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import itertools
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovlm import IGNORE_INDEX, UserError, cli
from nanovlm.checkpoints.checkpoint import base_source, load_checkpoint, load_deferred_weights
from nanovlm.checkpoints.lora import add_lora
from nanovlm.data.dataset import PreparedDataset, write_subset
from nanovlm.data.packing import PackedDataLoader
from nanovlm.demo.run import run_demonstration
from nanovlm.distributed import (
    all_gather_object,
    all_reduce_sum,
    check_compiler,
    checkpoint_activations,
    clip_grad_norm,
    compile_blocks,
    get_rank,
    init_distributed,
    on_rank_0,
    pick_device,
    raise_on_all_ranks,
    sync_gradients_if,
    transformer_blocks,
    wrap_model,
)
from nanovlm.evals.benchmarks import load_questions
from nanovlm.evals.runner import evaluate
from nanovlm.kernels import dispatch
from nanovlm.training.flops import micro_batch_flops
from nanovlm.training.logger import Logger
from nanovlm.training.memory import choose_dtype, plan_memory
from nanovlm.training.profiler import profile_steps
from nanovlm.training.recipes import (
    check_demonstration,
    check_inputs,
    describe_run,
    freeze_parts,
    load_settings,
    parse_dataset_weights,
)
from nanovlm.training.resume import (
    Saver,
    find_resume_checkpoint,
    load_optimizer,
    move_old_run_aside,
    resume_step,
    settings_to_keep,
)
from nanovlm.training.signals import SignalHandler
from nanovlm.training.validation import pack_validation_set, validate


def train(
    *,
    # --- model and data
    stage: str = "",  # decoder, vision, pretrain (projector only) or sft; unset: the demonstration
    recipe: str = "megatron",  # whose values pretrain and sft take: megatron or llava (LLaVA-1.5)
    model: str | None = None,  # checkpoint to start from; unset: the stage's, as out/stitched
    data: str | None = None,  # data of `prepare.py data`; several: a,b or with shares a:0.7,b:0.3
    out: str | None = None,  # folder of the run; unset: out/STAGE or out/demo/STAGE
    resume: bool = False,  # continue from the newest checkpoint in --out
    seq_len: int | None = None,  # tokens in a sequence; whole samples are packed into it
    seed: int = 0,  # of the order of the samples
    # --- optimization
    steps: int | None = None,  # optimizer steps in all
    epochs: float | None = None,  # instead of --steps: passes over the data; 0.5 is half a pass
    patience: int = 0,  # stop after this many validations without a lower val_loss; 0: never
    global_batch_size: int | None = None,  # sequences in a step, over all ranks
    micro_batch_size: int = 16,  # sequences in a forward pass of a rank
    freeze: str = "",  # parts not to train: vision,projector,decoder or none; unset: the stage's
    lora_rank: int = 0,  # LoRA: rank of the two matrices that train beside a weight; 0: no LoRA
    lora_alpha: float | None = None,  # their product is scaled by alpha / rank; unset: 2 × rank
    lora_target: str = "decoder",  # whose blocks have LoRA, frozen or not: decoder, vision or both
    lr: float | None = None,  # peak learning rate of every trained part
    vision_lr: float | None = None,  # of the vision encoder; unset: --lr
    projector_lr: float | None = None,  # of the projector; unset: --lr
    decoder_lr: float | None = None,  # of the language model; unset: --lr
    min_lr: float | None = None,  # --lr at the end of the cosine schedule
    warmup_ratio: float | None = None,  # share of the steps with linear warmup
    weight_decay: float | None = None,  # of AdamW, for matrices only
    grad_clip: float | None = None,  # maximum norm of the gradient
    beta1: float = 0.9,  # of AdamW: decay of the mean of gradients
    beta2: float | None = None,  # of AdamW: decay of the mean of squared gradients
    # --- parallelism and speed
    device: str = "auto",  # auto, cpu, cuda, cuda:1 (or another GPU's number) or mps
    dtype: str = "auto",  # of matrix products: float32 or bfloat16; auto: bfloat16 on CUDA
    parallel: str = "auto",  # of several processes: ddp, fsdp, or auto: ddp if the model fits
    hsdp_shard_size: int = 0,  # FSDP: ranks that share one copy of the model; 0: all ranks
    cpu_offload: bool = False,  # FSDP: keep parameters and optimizer state in host memory
    activation_checkpointing: str = "none",  # of blocks: none, decoder or all
    compile: bool = False,  # torch.compile the blocks: slow start, faster steps
    kernels: str = "auto",  # auto: our Triton kernels on CUDA; torch: formulas in PyTorch
    # --- logging and checkpoints
    log_every: int = 20,  # steps between log lines
    save_every: int = 500,  # steps between checkpoints
    keep_checkpoints: int = 1,  # newest checkpoints to keep; from 2 on also the best
    profile: bool = False,  # print the slowest operations, write a trace of three steps
    tensorboard: bool = False,  # write the log for tensorboard, too
    # --- validation and evaluation
    validate_every: int = 100,  # steps between validation losses
    eval_questions: str = "",  # questions to answer during training: see sample.py --questions
    eval_images: str = "",  # folder or zip of their images; unset: where the questions are
    eval_every: int = 500,  # steps between evaluations; the last step has one, too
    eval_benchmark: str = "exact",  # how to read and score: see sample.py --benchmark
):
    """Train one stage or, without --stage, run the demonstration.

    Exit codes: 0 finished, 1 user error, 130 or 143 stopped by Ctrl-C or SIGTERM and saved.
    """
    given = dict(locals())
    if not stage:
        check_demonstration(train, given)
        return run_demonstration(train)
    device = pick_device(device)
    rank, world = init_distributed(device)

    # ---- model, data, and the step to start from ----
    with raise_on_all_ranks():
        run = load_settings(given, world)
        dispatch.choice = run.kernels
        saved = find_resume_checkpoint(run)
        check_inputs(run)
        checkpoint = load_for_training(saved or run.model, run)
        vlm = checkpoint.model
        samples = load_samples(run, checkpoint)
        must_agree = settings_to_keep(run, samples)
        start_step, last_step = resume_step(saved, must_agree) if saved else (0, 0)
        if last_step == run.steps or is_out_of_patience(run, start_step, last_step):
            print_on_rank_0(f"{stage}: {run.out} is finished, at step {last_step} of {run.steps}")
            return
        loader = make_loader(
            samples,
            run,
            global_batch_size=run.global_batch_size,
            micro_batch_size=run.micro_batch_size,
            rank=rank,
            world_size=world,
            start_step=start_step,
            pin_memory=device.type == "cuda",
        )
        # One packed sequence, for which the memory is estimated.
        ((sequence, _),) = next(make_loader(samples, run, global_batch_size=1, micro_batch_size=1))
        validation_set = load_validation_set(run, samples)
        questions = load_eval_questions(run)
        print_on_rank_0(describe_run(run, saved, device, world))

    # ---- DDP, FSDP or one process ----
    dtype = choose_dtype(run, device)
    plan_memory(run, vlm, sequence, device, dtype, world)
    with raise_on_all_ranks():
        if run.compile:
            check_compiler(device)
        if rank == 0:
            move_old_run_aside(run)
    checkpoint_activations(transformer_blocks(vlm, run.activation_checkpointing))
    if run.compile:
        compile_blocks(transformer_blocks(vlm))
    wrapped, autocast = wrap_model(
        vlm, run.parallel, device, dtype, run.hsdp_shard_size, run.cpu_offload
    )
    load_deferred_weights(checkpoint)
    optimizer = make_optimizer(vlm, run.peak_lrs, run.weight_decay, (run.beta1, run.beta2))
    if saved:
        load_optimizer(saved, vlm, optimizer)
    saver = Saver(
        checkpoint, optimizer, run.out, must_agree, run.keep_checkpoints, keep_best=patience > 0
    )

    validate_at = partial(
        run_validation, run, checkpoint, samples, validation_set, questions, autocast
    )
    stopped_by = training_loop(
        run, start_step, vlm, wrapped, autocast, loader, optimizer, validate_at, saver
    )
    if stopped_by:
        stopped_by.exit(train, given)


def training_loop(run, start_step, vlm, wrapped, autocast, loader, optimizer, validate_at, saver):
    """Train from `start_step` on. Returns the SignalHandler if a signal stopped it, else None.

    With --patience, the run ends with its best checkpoint: later ones are deleted.
    vlm: the model; wrapped: the same under DDP or FSDP; validate_at: `run_validation` of a step.
    """
    step, ended, stopping, device = start_step, False, False, vlm.mean_C11.device
    with (
        Logger(run.out, start_step, run.steps, run.tensorboard) as logger,
        ThreadPoolExecutor(1) as prefetcher,
        SignalHandler() as signals,
        profile_steps(run.profile, vlm, run.out) as profile,
    ):
        next_micro_batches = prefetcher.submit(next, loader)  # read during the step before
        while not (ended or stopping):
            micro_batches = logger.wait(next_micro_batches)
            next_micro_batches = prefetcher.submit(next, loader)
            lr_now = set_learning_rates(optimizer, step, run)
            stats = compute_gradients(wrapped, micro_batches, device, autocast, signals)
            norms = clip_grad_norm(vlm, run.peak_lrs, run.grad_clip)
            step += 1
            check_finite(step, stats, norms["grad_norm"], micro_batches, loader.samples, run.out)
            optimizer.step()
            optimizer.zero_grad()
            if profile:
                profile.step()

            is_last, stopping = step == run.steps, stats.stopping
            saving = is_last or stopping or step % run.save_every == 0
            metrics = validate_at(step)
            logger.count_step(stats, micro_batch_flops(vlm, run.peak_lrs, micro_batches))
            if metrics or saving or step % run.log_every == 0:
                logger.log(
                    step,
                    metrics,
                    loss=stats.loss,
                    lr=lr_now,
                    label_fraction=stats.labels / stats.tokens,
                    **norms,
                )
            best_step = logger.best[1]
            is_best = run.patience > 0 and best_step == step
            if saving or is_best:
                saver.save(step, is_last or is_best, metrics)
            ended = is_last or is_out_of_patience(run, best_step, step)
    logger.print_summary(step, run.stage)
    if ended and run.patience:
        on_rank_0(saver.delete_after_best, step)
    return None if ended else signals


def is_out_of_patience(run, best_step, step):
    """Whether --patience validations up to this step have not improved on that of best_step."""
    waited = step - best_step
    return run.patience > 0 and best_step > 0 and waited >= run.patience * run.validate_every


# ---- the optimizer and a step ----


def learning_rate(step, *, steps, warmup_steps, min_ratio):
    """Learning rate at a step, as a share of the peak.

    Linear warmup, then half a cosine down to `min_ratio` (Loshchilov & Hutter 2016).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer, step, run):
    """Set the learning rate of each parameter group; returns that of --lr."""
    ratio = learning_rate(
        step,
        steps=run.steps,
        warmup_steps=max(1, round(run.warmup_ratio * run.steps)),
        min_ratio=run.min_lr / run.lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * ratio
    return run.lr * ratio


def make_optimizer(model, peak_lrs, weight_decay, betas):
    """AdamW for the trained parts, with weight decay on matrices only.

    Vectors (norms, biases, a class token) have no reason to be near 0. peak_lrs: {part: peak
    learning rate}.
    """
    groups = []
    for part, peak_lr in peak_lrs.items():
        for is_matrix in (True, False):
            params = [p for p in getattr(model, part).parameters() if p.requires_grad]
            params = [p for p in params if (p.dim() >= 2) == is_matrix]
            decay = weight_decay if is_matrix else 0.0
            if params:
                groups.append({"params": params, "peak_lr": peak_lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def compute_gradients(wrapped, micro_batches, device, autocast, signals):
    """Gradients of one step: the summed loss over the labelled tokens, divided by their number.

    Both are over all ranks and micro-batches, so a step does not depend on how it is split.
    Returns `loss`; the numbers of `labels`, `tokens` and `samples` over all ranks; `stopping`,
    whether any rank received a signal; `loss_sums`, one for each micro-batch of this rank.
    """
    labels = sum(int((batch["targets_BT"] != IGNORE_INDEX).sum()) for batch, _ in micro_batches)
    tokens = sum(int((batch["documents_BT"] >= 0).sum()) for batch, _ in micro_batches)
    samples = sum(len(members) for _, members in micro_batches)
    labels, tokens, samples, world = all_reduce_sum([labels, tokens, samples, 1], device)
    loss_sums = []
    # Gradient accumulation: one micro-batch after another adds to the gradients.
    for number, (batch, _) in enumerate(micro_batches, 1):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with sync_gradients_if(number == len(micro_batches), wrapped):
            with autocast:
                loss_sum = wrapped(**batch)
            # DDP and FSDP divide gradients by the number of ranks: `world` undoes that.
            (loss_sum * (world / labels if labels else math.nan)).backward()
        loss_sums.append(loss_sum.detach())
    loss_sums = torch.stack(loss_sums).tolist()
    total, stopping = all_reduce_sum([sum(loss_sums), signals.received > 0], device)
    return SimpleNamespace(
        loss=total / labels if labels else math.nan,
        loss_sums=loss_sums,
        labels=labels,
        tokens=tokens,
        samples=samples,
        stopping=stopping > 0,
    )


def check_finite(step, stats, grad_norm, micro_batches, samples, out):
    """Raises UserError if the loss or the gradient is NaN or infinite, before the weights change.

    The message names the samples of the micro-batches with such a loss, or else all samples of the
    step. They are written to a data folder of their own.
    """
    if math.isfinite(stats.loss) and math.isfinite(grad_norm):
        return
    samples_here, suspects_here = [], []
    for loss_sum, (_, members) in zip(stats.loss_sums, micro_batches, strict=True):
        samples_here += members
        suspects_here += members if not math.isfinite(loss_sum) else []
    suspects, all_samples = [], []
    for rank_suspects, rank_samples in all_gather_object((suspects_here, samples_here)):
        suspects += rank_suspects
        all_samples += rank_samples
    suspects = suspects or all_samples
    folder = Path(out) / f"not-finite-{step:06d}"
    names = [samples.names[i] for i in suspects]
    shown = ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")
    problem = f"loss {stats.loss}, gradient norm {grad_norm}"
    if not stats.labels:
        problem = "no loss, as no token has a label"
    with raise_on_all_ranks():
        on_rank_0(write_subset, samples, suspects, folder)
        raise UserError(
            f"step {step}: {problem}; earlier checkpoints are unchanged. Samples: {shown}. "
            f"Look at one: python prepare.py show --data={folder} --sample={shlex.quote(names[0])}"
        )


def run_validation(run, checkpoint, samples, validation_set, questions, autocast, step):
    """Validation metrics of a step; identical on every rank.

    Returns val_loss and blank_image_loss every --validate_every steps, eval_score every
    --eval_every steps, all of them at the last step, {} at other steps.
    """
    is_last, metrics = step == run.steps, {}
    if is_last or step % run.validate_every == 0:
        metrics = validate(checkpoint, samples, validation_set, autocast)
    if questions and (is_last or step % run.eval_every == 0):
        table = evaluate(checkpoint, questions, benchmark=run.eval_benchmark, autocast=autocast)
        metrics["eval_score"] = table[-1].score
    return metrics


# ---- model and data ----


def load_for_training(folder, run):
    """Load a checkpoint, add LoRA if the run has it, and freeze what does not train.

    Sharded weights stay in their files until it is known which rank needs which
    (`load_deferred_weights`), but not below LoRA.
    """
    checkpoint = load_checkpoint(
        folder, dtype=None, defer_weights=not run.lora, merge=not run.resume
    )
    vlm = checkpoint.model.train()
    if run.lora and not run.resume:
        torch.manual_seed(run.seed)
        add_lora(vlm, **run.lora)
        base = base_source(checkpoint.history["folder"])
        checkpoint = checkpoint._replace(lora=run.lora | {"trained": [*run.peak_lrs], "base": base})
    freeze_parts(vlm, run.peak_lrs, run.lora)
    dtypes = {name: p.dtype for name, p in vlm.named_parameters() if not p.requires_grad}
    return checkpoint._replace(dtypes=dtypes)


def load_samples(run, checkpoint):
    """Returns the samples, after a check that they are for this model.

    Sets run.weights, the shares of the data folders, and run.steps if there are --epochs. Then the
    checkpoint's history notes the stage.
    """
    folders, run.weights = parse_dataset_weights(run.data)
    samples = PreparedDataset(*folders)
    samples.check_fingerprint(checkpoint.fingerprint())
    samples.check_ids(checkpoint.shapes["decoder"]["vocab_size"])
    if run.epochs:
        options = dict(global_batch_size=run.global_batch_size, micro_batch_size=1)
        run.steps = make_loader(samples, run, **options).count_steps(run.epochs)
    checkpoint.history[run.stage] = f"{run.steps} steps from {run.model} on {run.data}"
    return samples


def make_loader(samples, run, **options):
    """Packs the samples in the order of this run. options: see PackedDataLoader."""
    return PackedDataLoader(
        samples, seq_len=run.seq_len, seed=run.seed, weights=run.weights, **options
    )


def load_validation_set(run, samples):
    """Packs the validation set. Raises UserError if --patience would wait for its loss in vain."""
    sequences = pack_validation_set(samples, run.seq_len)
    held_out = itertools.chain(*sequences)
    if run.patience and not any((samples.read(i)[1] != IGNORE_INDEX).any() for i in held_out):
        raise UserError(
            f"--patience={run.patience} needs a val_loss: no held-out sample of {run.data} has "
            "labels; one sample in 64 is held out, so add samples"
        )
    return sequences


def load_eval_questions(run):
    """The questions that are answered during training; [] without --eval_questions."""
    if not run.eval_questions:
        unused = "eval_images eval_every eval_benchmark"
        rule = (unused, lambda x, s: False, "changes nothing without --eval_questions=FILE")
        cli.check_rules(cli.changed_settings(train, vars(run)), [rule], run)
        return []
    questions = load_questions(run.eval_benchmark, run.eval_questions, images=run.eval_images)
    if without := [q["id"] for q in questions if not q["answers"]]:
        raise UserError(
            f"--eval_questions={run.eval_questions}: question {without[0]} has no reference answer"
        )
    return questions


def print_on_rank_0(text):
    if get_rank() == 0:
        print(text)


if __name__ == "__main__":
    cli.run_script(train)
