"""Prepare models and data for training:

    python prepare.py fridge --out=data/demo/fridge         draw the data of the demonstration
    python prepare.py random_init --source=FILE.json        a tokenizer and random weights
    python prepare.py stitch --vision=DIR --decoder=DIR     join two models by a new projector
    python prepare.py data --model=M --source=FILE.json --images=DIR --out=data/NAME
    python prepare.py show --data=data/NAME --sample=ID     a sample as the model gets it
    python prepare.py check --data=data/NAME                checksums, lengths, time of an epoch
    python prepare.py estimate --stage=sft --model=M        memory and days of a training run
    python prepare.py plot out/*/log.jsonl                  the curves of training runs
    python prepare.py figures                               the figures of the READMEs
    python prepare.py experiment --name=projector           train with it and without it; compare
    python prepare.py export --model=M --out=DIR            a folder for transformers and vLLM
    python prepare.py merge_lora --model=RUN --out=DIR      LoRA folded into the weights
    python prepare.py export_lora --model=RUN --base=DIR --out=DIR    LoRA as peft's adapter

`data` cuts images into tiles and text into tokens, once, before training.
COMMAND --help lists its settings.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C prints nothing while torch is imported, which takes seconds. cli.run_script ends that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovlm import UserError, cli
from nanovlm.checkpoints.checkpoint import (
    build_like_files,
    load_checkpoint,
    load_checkpoint_info,
    save_checkpoint,
)
from nanovlm.checkpoints.hf_nanovlm import export_hf_nanovlm
from nanovlm.checkpoints.idefics3 import export_idefics3
from nanovlm.checkpoints.llava import export_checkpoint
from nanovlm.checkpoints.lora import add_lora
from nanovlm.checkpoints.peft import export_adapter, merge_adapter
from nanovlm.checkpoints.random_init import create_model
from nanovlm.checkpoints.stitch import stitch_folders
from nanovlm.data.chat_template import TEMPLATES
from nanovlm.data.dataset import PreparedDataset, verify_checksums
from nanovlm.data.image_processing import FITS, GRID_CHOICES, check_image_config
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.demo.experiments import EXPERIMENTS, run_experiment
from nanovlm.demo.figures import draw_figures
from nanovlm.demo.fridge import write_fridges
from nanovlm.files import name_file, size_rules
from nanovlm.preprocess.build import measure_pixels, prepare_dataset
from nanovlm.preprocess.readers import read_texts
from nanovlm.training.memory import print_estimate
from nanovlm.training.recipes import freeze_parts, load_settings, parse_dataset_weights
from nanovlm.visualize.curves import plot_curves, read_curves
from nanovlm.visualize.sample_page import draw_tiles, sample_page
from nanovlm.visualize.samples import sample_as_text, summarize_dataset
from train import train


def fridge(
    *,
    out: str = "data/demo/fridge",  # folder of images, captions, chats, text and questions
    scenes: int = 8000,  # training fridges
    text: int = 12000,  # conversations without images
    eval_scenes: int = 500,  # held-out fridges with questions
    seed: int = 0,  # the same seed draws the same fridges
):
    """Draw the fridges of the demonstration: JPEGs, and JSON in LLaVA's format."""
    check_command(fridge, locals())
    with name_file(out):
        write_fridges(out=out, scenes=scenes, text=text, eval_scenes=eval_scenes, seed=seed)


def random_init(
    *,
    source: list[str] = [],  # LLaVA JSON whose text trains the tokenizer; may be repeated
    out: str = "out/random_init",  # folder of the new model
    vocab_size: int = 512,  # tokens to learn, without special tokens; fewer if the text has fewer
    template: str = "mistral",  # chat template: mistral, chatml, llama3, …
    seed: int = 0,  # of the random weights
    # --- images
    images: str = "",  # folder or zip: normalize pixels by its images' mean and std; unset: 0.5
    tile: int = 64,  # pixels across an image for the vision encoder
    patch: int = 8,  # pixels across a patch
    shuffle: int = 2,  # pixel shuffle: shuffle² patches become one token
    fit: str | None = None,  # of an image to a tile: squash, pad or crop; unset: squash, or --tiles
    tiles: int | None = None,  # most tiles of an image (InternVL, NVLM); unset: one tile, by --fit
    thumbnail: bool = True,  # with several tiles: the whole image as one more tile
    tile_choice: str = "aspect",  # of the grid, by aspect ratio (InternVL), or area (Megatron)
    tile_tags: bool = False,  # a numbered text before each tile (NVLM)
    draft: bool = True,  # decode large JPEGs at a lower resolution, at least twice the needed one
    # --- language model
    width: int = 128,  # size of a hidden vector
    layers: int = 4,  # transformer blocks
    heads: int = 4,  # query heads
    kv_heads: int = 2,  # key/value heads, shared by the query heads
    intermediate_size: int = 384,  # of the MLP
    # --- vision encoder
    vision_width: int = 128,  # size of a hidden vector
    vision_layers: int = 4,  # transformer blocks
    vision_heads: int = 4,  # attention heads
    vision_intermediate_size: int = 512,  # of the MLP
):
    """A model with random weights, and a tokenizer trained on your text, to train from scratch."""
    check_command(random_init, locals())
    image_config = {
        "tile": tile,
        "patch": patch,
        "shuffle": shuffle,
        "fit": fit or "squash",
        "resample": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "draft": draft,
        **tiling_config(tiles, thumbnail, tile_choice, tile_tags),
    }
    check_image_config(image_config)
    if images:
        image_config["mean"], image_config["std"] = measure_pixels(source, images, image_config)
        cli.print_status("pixels: mean {mean}, standard deviation {std}".format_map(image_config))
    create_model(
        read_texts(source),
        out=out,
        vocab_size=vocab_size,
        template=template,
        image_config=image_config,
        seed=seed,
        vision={
            "tile": tile,
            "patch": patch,
            "width": vision_width,
            "layers": vision_layers,
            "heads": vision_heads,
            "intermediate_size": vision_intermediate_size,
        },
        decoder={
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "intermediate_size": intermediate_size,
        },
    )


def tiling_config(tiles, thumbnail, tile_choice, tile_tags):
    """Returns what --tiles and its settings add to an image config: nothing without --tiles."""
    if tiles is None:
        return {}
    return {
        "tiles": tiles,
        "fit": "tiles",
        "thumbnail": thumbnail,
        "choice": tile_choice,
        "tags": tile_tags,
    }


def stitch(
    *,
    vision: str = "",  # a checkpoint, a CLIP, SigLIP or DINOv2 folder, or Hugging Face owner/name
    decoder: str = "",  # a checkpoint, a Llama, Mistral, … folder, or Hugging Face owner/name
    out: str = "out/stitched",  # folder of the new model
    template: str | None = None,  # chat template of a published language model; unset: its own
    projector: str = "mlp",  # mlp: two layers (LLaVA-1.5); linear: one without a bias (Idefics3)
    seed: int = 0,  # of the new projector
    # --- images, for a published vision encoder
    tile: int | None = None,  # pixels across an image; unset: its own
    fit: str | None = None,  # squash, pad or crop; unset: as its preprocessor, or --tiles
    tiles: int | None = None,  # most tiles of an image (InternVL, NVLM); unset: one tile, by --fit
    thumbnail: bool = True,  # with several tiles: the whole image as one more tile
    tile_choice: str = "aspect",  # of the grid, by aspect ratio (InternVL), or area (Megatron)
    tile_tags: bool = False,  # a numbered text before each tile (NVLM)
    draft: bool = False,  # decode large JPEGs at a lower resolution: faster, but other pixels
    vision_feature_layer: int | None = None,  # whose output to use; unset: CLIP -2, others the last
    shuffle: int | None = None,  # pixel shuffle: shuffle² patches become one token; unset: 1
    longest_edge: int | None = None,  # pixels of the long side, then cut into tiles (Idefics3)
):
    """Join a vision encoder and a language model by a new projector; their weights stay as is."""
    check_command(stitch, locals())
    choices = {
        "tile": tile,
        "vision_feature_layer": vision_feature_layer,
        "shuffle": shuffle,
        "draft": draft or None,
        "fit": fit,
        **tiling_config(tiles, thumbnail, tile_choice, tile_tags),
    }
    if longest_edge is not None:
        choices |= {"fit": "split", "longest_edge": longest_edge, "tile_texts": "idefics3"}
    choices = {name: value for name, value in choices.items() if value is not None}
    stitch_folders(
        vision=vision,
        decoder=decoder,
        out=out,
        vision_choices=choices,
        template=template,
        seed=seed,
        projector=projector,
    )


def data(
    *,
    model: str = "out/random_init",  # checkpoint whose tokenizer, template, image config to use
    source: list[str] = [],  # JSON, JSON lines, tar or parquet; may be repeated
    images: str = "",  # folder or zip of the images; unset: the folder of the source
    allow_outside_images: bool = False,  # read images outside it, too: you trust the source
    out: str = "",  # folder of the prepared data
    seq_len: int = 2048,  # most tokens of a sample; larger images get fewer tiles to fit
    split_turns: bool = False,  # each question about images becomes a sample of its own
    workers: int = 0,  # processes; 0: one for each CPU core
    max_skipped: float = 0.01,  # share of samples that may be skipped: 0.01 or 1%
):
    """Prepare images and conversations once, as tiles and token ids. It resumes if stopped."""
    check_command(data, locals())
    prepare_dataset(
        model=model,
        source=source,
        images=images,
        out=out,
        seq_len=seq_len,
        workers=workers,
        max_skipped=max_skipped,
        split_turns=split_turns,
        allow_outside_images=allow_outside_images,
    )


def show(
    *,
    data: str = "",  # prepared data
    sample: list[str] = [],  # id of a sample; several are packed into one sequence
    out: str = "sample.png",  # image of its tiles (.png), or page of its tokens and tiles (.html)
):
    """Print a sample as the model gets it, with its loss mask; write an image or a page of it."""
    check_command(show, locals())
    samples = PreparedDataset(data)
    indices = [i for i, name in enumerate(samples.names) if name in sample]
    for name in sample:
        if name not in samples.names:
            first = ", ".join(samples.names[:3])
            raise UserError(f"{data} holds no sample {name!r}; its first ones are {first}")
    tokenizer, images = Tokenizer.load(data), []
    for i in indices:
        print(sample_as_text(samples, i, tokenizer))
        images += samples.stored_sample(i)[2]
    if out.lower().endswith(".html"):
        Path(out).write_text(sample_page(samples, indices, tokenizer))
    elif images:
        draw_tiles(images, samples.image_config).save(out)
    else:
        return
    count = sum(len(image.tiles) for image in images)
    cli.print_status(f"{out}: {count} tile{'s' * (count != 1)}")


def check(
    *,
    data: str = "",  # prepared data; several: a,b or with shares a:0.7,b:0.3
    seq_len: int = 2048,  # tokens in a sequence of training
    tokens_per_s: float = 0.0,  # speed of training, to print the time of an epoch
):
    """Verify the checksums of prepared data; print its lengths, and how full sequences will be."""
    check_command(check, locals())
    folders, weights = parse_dataset_weights(data)
    if wrong := [message for folder in folders for message in verify_checksums(folder)]:
        more = f"; and {len(wrong) - 3} more files" if wrong[3:] else ""
        raise UserError(f"{'; '.join(wrong[:3])}{more}: prepare it again")
    samples = PreparedDataset(*folders)
    print(summarize_dataset(samples, weights, seq_len, tokens_per_s))
    print("all checksums are right")


def estimate(
    *,
    stage: str = "sft",  # decoder, vision, pretrain or sft
    recipe: str = "megatron",  # whose values the stage takes: megatron or llava (LLaVA-1.5)
    model: str | None = None,  # checkpoint whose shapes to use; unset: the one of the stage before
    seq_len: int | None = None,  # tokens in a sequence
    steps: int | None = None,  # optimizer steps in all
    global_batch_size: int | None = None,  # sequences in a step, over all GPUs
    micro_batch_size: int = 16,  # sequences in a forward pass of a GPU
    freeze: str = "",  # parts not to train: vision,projector,decoder or none; unset: the stage's
    lora_rank: int = 0,  # LoRA: rank of the two matrices that train beside a weight; 0: no LoRA
    lora_target: str = "decoder",  # whose blocks have LoRA: decoder, vision or both
    dtype: str = "auto",  # of matrix products: float32 or bfloat16; auto: bfloat16
    activation_checkpointing: str = "none",  # of blocks: none, decoder or all
    cpu_offload: bool = False,  # FSDP: keep parameters and optimizer state in host memory
    mfu: float = 0.4,  # share of the GPU's peak that training reaches
    peak_tflops: float = 989.0,  # of the GPU: an H100 in bfloat16, by NVIDIA's data sheet
):
    """Print memory and days of a training run on 1, 8 and 64 GPUs; no weight or data is read."""
    run = load_settings(dict(locals()), world=1)
    info = load_checkpoint_info(run.model)
    model = build_like_files(info).train()
    if run.lora:
        with torch.device("meta"):
            add_lora(model, **run.lora)
    freeze_parts(model, run.peak_lrs, run.lora)
    print_estimate(run, model, info.image_config, speed=peak_tflops * 1e12 * mfu)


def plot(
    *,
    log: list[str] = [],  # log.jsonl of each run
    out: str = "curves.png",  # file of the figure
):
    """Plot training runs: losses, gradient norms, learning rates, speed, evaluation score."""
    check_command(plot, locals())
    plot_curves(read_curves(log), out)
    cli.print_status(f"{out}: {len(log)} runs")


def figures(
    *,
    out: str = "nanovlm/demo/figures",  # folder of the figures
):
    """Draw the figures of the READMEs from the demonstration's own run."""
    draw_figures(out)
    cli.print_status(f"{out}: answers.png, attention.png, losses.png, sequence.png")


def experiment(
    *,
    name: str = "",  # projector, image_tokens or vision_encoder: nanovlm/demo/README.md
):
    """Train the demonstration's parts in several ways that differ in one thing, and compare."""
    check_command(experiment, locals())
    run_experiment(train, name)


def export(
    *,
    model: str = "out/sft",  # checkpoint with weights, tokenizer, template and image config
    out: str = "",  # new folder
    template: str | None = None,  # chat template of a published VLM whose own is not known
):
    """Export a model as a folder for transformers, vLLM and llama.cpp, in a published layout."""
    check_command(export, locals())
    checkpoint = load_checkpoint(model, dtype=None, template=template)
    layout, write = "LLaVA", export_checkpoint
    if checkpoint.image_config["fit"] == "split":
        layout, write = "idefics3", export_idefics3
    if "nanovlm" in checkpoint.history:
        layout, write = "nanovlm", export_hf_nanovlm
    write(checkpoint, out)
    cli.print_status(f"{out}: layout {layout}, template {checkpoint.chat_template}")


def merge_lora(
    *,
    model: str = "out/sft",  # run with --lora_rank; with --adapter: any model
    adapter: str = "",  # folder of an adapter of peft, for the decoder of the model
    out: str = "",  # folder of the new model
):
    """Fold LoRA into the weights: the new model needs neither its base nor an adapter."""
    check_command(merge_lora, locals())
    if not adapter and not load_checkpoint_info(model).lora:
        raise UserError(f"--model={model} is not a run with --lora_rank; give an --adapter for it")
    checkpoint = load_checkpoint(model, dtype=None)
    if adapter:
        merge_adapter(checkpoint, adapter)
    save_checkpoint(checkpoint, out)
    cli.print_status(f"{out}: {model} with {adapter or 'its LoRA'} in its weights")


def export_lora(
    *,
    model: str = "out/sft",  # run with --lora_rank
    base: str = "",  # its base for transformers: what `export` wrote of it, or its decoder's folder
    out: str = "",  # folder of the adapter
):
    """Export the LoRA of a run as an adapter, which peft loads onto a model of transformers."""
    check_command(export_lora, locals())
    checkpoint = load_checkpoint(model, dtype=None, merge=False)
    if not checkpoint.lora:
        raise UserError(f"--model={model} is not a run with --lora_rank")
    export_adapter(checkpoint, base, out)
    cli.print_status(f"{out}: an adapter of {base} for peft")


COMMANDS = {
    command.__name__: command
    for command in (
        fridge,
        random_init,
        stitch,
        data,
        show,
        check,
        estimate,
        plot,
        figures,
        experiment,
        export,
        merge_lora,
        export_lora,
    )
}


# ---- rules that the settings of all commands must meet ----

NEEDED_SETTINGS = {  # settings that have no default
    random_init: "source",
    stitch: "vision decoder",
    data: "source out",
    show: "data",
    check: "data",
    plot: "log",
    experiment: "name",
    export: "out",
    merge_lora: "out",
    export_lora: "base out",
}
SIZES = (
    "scenes text eval_scenes tile patch shuffle tiles width layers heads kv_heads "
    "intermediate_size vision_width vision_layers vision_heads vision_intermediate_size seq_len"
)
# (settings, whether a value x is allowed beside settings s, what is wrong if not)
PREPARE_RULES = [
    (SIZES, lambda x, s: x >= 1, "must be at least 1"),
    *size_rules(f"{SIZES} vocab_size workers"),
    ("workers tokens_per_s", lambda x, s: x >= 0, "must be at least 0"),
    ("vocab_size", lambda x, s: x >= 256, "must be at least 256, a token for each byte"),
    ("max_skipped", lambda x, s: 0 <= x <= 1, "must be from 0 to 1"),
    ("seed", lambda x, s: 0 <= x < 2**63, "must be at least 0 and below 2^63"),
    cli.one_of("template", *TEMPLATES),
    cli.one_of("fit", *FITS),
    cli.one_of("tile_choice", *GRID_CHOICES),
    cli.one_of("name", *EXPERIMENTS),
    (
        "fit",
        lambda x, s: s.tiles is None,
        "makes one tile of an image, --tiles={tiles} several: give one of the two",
    ),
    (
        "longest_edge",
        lambda x, s: s.tiles is s.fit is None,
        "splits an image into tiles: leave out --tiles and --fit",
    ),
    cli.one_of("projector", "mlp", "linear"),
    (
        "thumbnail tile_choice tile_tags",
        lambda x, s: s.tiles is not None,
        "changes nothing without --tiles",
    ),
    (
        "vision_width vision_heads",
        lambda x, s: is_multiple(s.vision_width, s.vision_heads),
        "does not fit: --vision_width={vision_width} must be a multiple of "
        "--vision_heads={vision_heads}",
    ),
    ("patch", lambda x, s: s.tile % x == 0, "must divide --tile={tile}"),
    (
        "heads kv_heads",
        lambda x, s: is_multiple(s.heads, s.kv_heads),
        "does not fit: --heads={heads} must be a multiple of --kv_heads={kv_heads}",
    ),
    (
        "width heads",
        lambda x, s: is_multiple(s.width, 2 * s.heads),
        "does not fit: --width={width} must be a multiple of 2 × --heads={heads}: "
        "RoPE rotates pairs of numbers in a head",
    ),
    ("images", lambda x, s: Path(x).exists(), "is not a folder or zip"),
]
# commands that write one, --out
NEW_FOLDERS = (fridge, random_init, stitch, data, export, merge_lora, export_lora)


def is_multiple(number, divisor):
    return divisor < 1 or number % divisor == 0  # a divisor below 1 breaks another rule


def check_command(command, settings):
    """Raises UserError unless the settings of a command meet the rules in the tables above."""
    needed = NEEDED_SETTINGS.get(command, "").split()
    if missing := " and ".join(f"--{name}" for name in needed if not settings[name]):
        raise UserError(f"prepare.py {command.__name__} needs {missing}")
    changed = cli.changed_settings(command, settings)
    cli.check_rules(changed, PREPARE_RULES, SimpleNamespace(**settings))
    if command is show and not settings["out"].lower().endswith((".png", ".html")):
        raise UserError(f"--out={settings['out']} must end in .png or .html")
    # build_dataset compares the plan of a dataset with this command
    is_dataset = command is data and Path(settings["out"], "plan.json").is_file()
    if command in NEW_FOLDERS and not is_dataset:
        refuse_to_overwrite(settings["out"])


def refuse_to_overwrite(out):
    """Raises UserError if a file, a folder or a broken link has the name."""
    if os.path.lexists(out.rstrip("/")):
        raise UserError(f"--out={out} exists already: remove it, or choose another folder")


if __name__ == "__main__":
    cli.run_script(COMMANDS)
