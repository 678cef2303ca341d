"""Everything that happens before training:

python prepare.py fridge --out=data/fridge                                            draw the little world of the demonstration
python prepare.py new --source=data/fridge/text.json --out=out/newborn                a tokenizer learnt from text, a random eye and brain
python prepare.py data --model=M --source=FILE.json --images=DIR --out=data/NAME      pictures and conversations to memory-mapped shards
python prepare.py show --data=data/NAME --sample=ID                                   a sample as the model will get it
python prepare.py check --data=data/NAME                                              a whole set: bytes, lengths, how full rows will be
python prepare.py plot out/*/log.jsonl                                                the curves of several training runs in one picture
python prepare.py stitch --vision=DIR --decoder=DIR --out=out/NAME                    an eye, a brain, a fresh projector between them
python prepare.py export --model=out/NAME --out=DIR                                   a LLaVA folder for transformers, vLLM, llama.cpp
"""

import difflib
import os
from pathlib import Path
from types import SimpleNamespace

from nanovlm import UserError, cli
from nanovlm.checkpoints import random_init
from nanovlm.checkpoints.checkpoint import export_checkpoint, load_checkpoint
from nanovlm.checkpoints.stitch import stitch_folders
from nanovlm.data import chat_template, packing, tokenizer
from nanovlm.data import dataset as shards
from nanovlm.data import image_processing as pictures
from nanovlm.demo import fridge as world
from nanovlm.preprocess import build, readers
from nanovlm.visualize.curves import draw_curves, read_curves
from nanovlm.visualize.samples import describe_dataset, sample_as_text, tile_mosaic


def fridge(
    *,
    out: str = "data/fridge",  # folder for images/, text.json, captions.json, chats.json and exam.jsonl
    scenes: int = 8000,  # fridges drawn for training
    text: int = 12000,  # text-only conversations for the blind talker
    exam: int = 500,  # fridges held out for the exam
    seed: int = 0,  # the same seed draws the same world
):
    """Draw fridges, describe them, ask about them: ordinary JPEGs and ordinary LLaVA-format JSON."""
    if wrong := [
        f"--{name}={count} must be at least 1"
        for name, count in (("scenes", scenes), ("text", text), ("exam", exam))
        if count < 1
    ]:
        raise UserError("; ".join(wrong))
    refuse_to_overwrite(out)
    world.write_world(out=out, scenes=scenes, text=text, exam=exam, seed=seed)


def refuse_to_overwrite(out):
    if os.path.lexists(
        out.rstrip("/")
    ):  # a link that leads nowhere too: nothing could take its name
        raise UserError(f"--out={out} is there already: remove it, or name another")


def new(
    *,
    source: list[str] = [],  # LLaVA JSON whose text the tokenizer is learnt from; may be repeated
    out: str = "out/newborn",  # where the newborn goes
    vocabulary: int = 512,  # tokens to learn, special ones aside; fewer if the text has no more to join
    template: str = "mistral",  # how conversations become text: mistral, chatml, llama3 or another that chat.py knows
    tile: int = 64,  # pixels across a picture as the eye sees it
    patch: int = 8,  # pixels across a patch
    shuffle: int = 2,  # pixel shuffle: shuffle² patches become one token
    fit: str | None = None,  # squash, pad or crop: how a picture that is not square becomes so; none: squash, or what --tiles says
    tiles: int | None = None,  # the most tiles that a large picture is cut into, as InternVL and NVLM do; none: it becomes one tile, by --fit
    thumbnail: bool = True,  # the whole picture as a last tile where there are several
    tile_choice: str = "aspect",  # its grid has the picture's shape (aspect, InternVL), or as much of its area and its shape (area, Megatron)
    tile_tags: bool = False,  # a text before each tile that numbers it (NVLM)
    draft: bool = True,  # large JPEGs are decoded at a half, a quarter or an eighth, still at least twice as large as what they are cut to
    width: int = 128,  # numbers in a vector of the brain
    layers: int = 4,  # of the brain
    heads: int = 4,  # query heads of the brain
    kv_heads: int = 2,  # key/value heads, shared by the query heads
    ffn: int = 384,  # feed-forward width of the brain
    vision_width: int = 128,  # numbers in a vector of the eye
    vision_layers: int = 4,  # of the eye
    vision_heads: int = 4,  # of the eye
    vision_ffn: int = 512,  # feed-forward width of the eye
    seed: int = 0,  # of the random numbers
):
    """A newborn: a tokenizer learnt from your text, a random eye and a random brain, for growing a small model from nothing."""
    check_newborn(SimpleNamespace(**locals()))
    refuse_to_overwrite(out)
    policy = {
        "tile": tile,
        "patch": patch,
        "shuffle": shuffle,
        "fit": fit or "squash",
        "resample": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "draft": draft,
        **tiling(fit, tiles, thumbnail, tile_choice, tile_tags),
    }
    pictures.check_image_config(policy)
    random_init.create_model(
        readers.read_texts(source),
        out=out,
        vocabulary=vocabulary,
        template=template,
        image_config=policy,
        seed=seed,
        vision={
            "tile": tile,
            "patch": patch,
            "width": vision_width,
            "layers": vision_layers,
            "heads": vision_heads,
            "ffn": vision_ffn,
        },
        decoder={
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "ffn": ffn,
        },
    )


def check_newborn(new):
    """One UserError that names every setting of a newborn that cannot be."""
    wrong = [
        f"--{name}={value} must be at least 1"
        for name, value in vars(new).items()
        if type(value) is int and name != "seed" and value < 1
    ]
    rules = (
        []
        if wrong
        else [
            (new.source, "--source names no file to learn a tokenizer from"),
            (
                new.template in chat_template.TEMPLATES,
                f"--template={new.template} is not known: {', '.join(chat_template.TEMPLATES)}",
            ),
            (
                new.vocabulary >= 256,
                f"--vocabulary={new.vocabulary} must be at least 256, a token for each byte",
            ),
            (
                new.vision_width % new.vision_heads == 0,
                f"--vision_width={new.vision_width} is no multiple of --vision_heads={new.vision_heads}",
            ),
            (
                new.heads % new.kv_heads == 0,
                f"--heads={new.heads} is no multiple of --kv_heads={new.kv_heads}",
            ),
            (
                new.width % (2 * new.heads) == 0,
                f"--width={new.width} is no multiple of 2 × --heads={new.heads}: RoPE turns a head's numbers in pairs",
            ),
            (0 <= new.seed < 2**63, f"--seed={new.seed} must be at least 0 and below 2^63"),
        ]
    )
    if wrong := wrong + [said for holds, said in rules if not holds]:
        raise UserError("; ".join(wrong))


def tiling(fit, tiles, thumbnail, tile_choice, tile_tags):
    """What --tiles and the settings beside it add to a picture policy; UserError where they contradict each other or --fit."""
    beside = {
        "thumbnail": thumbnail is not True,
        "tile_choice": tile_choice != "aspect",
        "tile_tags": tile_tags is not False,
    }
    rules = [
        (fit is None or fit in pictures.FITS, f"--fit={fit} is none of {', '.join(pictures.FITS)}"),
        (
            tiles is None or fit is None,
            f"--fit={fit} makes one tile of a picture, --tiles={tiles} several: give one of the two",
        ),
        (tiles is None or tiles >= 1, f"--tiles={tiles} must be at least 1"),
        (
            tile_choice in pictures.GRID_CHOICES,
            f"--tile_choice={tile_choice} is not known: {', '.join(pictures.GRID_CHOICES)}",
        ),
        (
            tiles is not None or not any(beside.values()),
            f"{', '.join(f'--{name}' for name, given in beside.items() if given)} without --tiles",
        ),
    ]
    if wrong := [said for holds, said in rules if not holds]:
        raise UserError("; ".join(wrong))
    return (
        {}
        if tiles is None
        else {
            "tiles": tiles,
            "fit": "tiles",
            "thumbnail": thumbnail,
            "choice": tile_choice,
            "tags": tile_tags,
        }
    )


def data(
    *,
    model: str = "out/newborn",  # whose tokenizer, template and picture policy to prepare for
    source: list[
        str
    ] = [],  # JSON, JSON lines, tar or parquet (nanovlm/sources.py says what may be in them); may be repeated
    images: str = "",  # the folder or zip that its pictures are named from; empty: the folder of the source
    out: str = "",  # where the prepared set goes
    row: int = 2048,  # the most tokens of a sample: tiles step down 12, 8, 6, 4, 2, 1 to fit; training needs a --row for the longest
    workers: int = 0,  # processes that cut; 0: one a core
    max_skipped: float = 0.01,  # the share of samples that may be skipped, 0.01 or 1%, before it is a mistake
):
    """Pictures and conversations, prepared once: cut, tokenised, and written to be read at memory speed. Stopped, it goes on where it was."""
    if not source or not out:
        raise UserError("prepare.py data needs --source=FILE and --out=data/NAME")
    if row < 1 or workers < 0 or not 0 <= max_skipped <= 1:
        raise UserError(
            f"--row={row} must be at least 1, --workers={workers} at least 0, --max_skipped={max_skipped} from 0 to 1"
        )
    refuse_to_overwrite(out)
    if images and not Path(images).exists():
        raise UserError(f"--images={images}: no such folder or zip")
    build.prepare_dataset(
        model=model,
        source=source,
        images=images,
        out=out,
        row=row,
        workers=workers,
        max_skipped=max_skipped,
    )


def show(
    *,
    data: str = "",  # a prepared set
    sample: str = "",  # the id of a sample
    out: str = "sample.png",  # where a picture of its tiles goes
):
    """A sample as the model will get it: every token once, a line for what is trained and for what is not, and its tiles as a picture."""
    if not data or not out.lower().endswith(".png"):
        raise UserError(
            f"prepare.py show needs --data=data/NAME, and an --out that ends in .png: --data={data} --out={out}"
        )
    samples = shards.PreparedDataset(data)
    numbers = [number for number, name in enumerate(samples.names) if name == sample]
    if not numbers:
        near = difflib.get_close_matches(sample, samples.names[:100_000], 3) or samples.names[:3]
        raise UserError(f"{data} holds no sample {sample!r}, but {', '.join(map(repr, near))}")
    words = tokenizer.Tokenizer.load(data)
    for number in numbers:
        print(sample_as_text(samples, number, words))
    tiles_NCYX = packing.collate(samples, [numbers])[0]["tiles_NCYX"].numpy()
    if len(tiles_NCYX):
        tile_mosaic(tiles_NCYX).save(out)
        cli.status(f"{out}: its {len(tiles_NCYX)} tile{'s' * (len(tiles_NCYX) > 1)}")


def check(
    *,
    data: str = "",  # a prepared set, or several: a,b or a:0.7,b:0.3
    row: int = 2048,  # tokens in a row of training
    rate: float = 0.0,  # tokens a second, if an epoch's time is asked for
):
    """Scan a whole set before a night is spent on it: its bytes, its lengths, how full rows will be, how long an epoch takes."""
    if not data or row < 1 or rate < 0:
        raise UserError(
            f"prepare.py check needs --data=data/NAME, --row={row} at least 1, --rate={rate} at least 0"
        )
    folders, shares = packing.parse_dataset_weights(data)
    samples = shards.PreparedDataset(*folders)
    if wrong := [said for folder in folders for said in shards.verify_checksums(folder)]:
        raise UserError(
            f"{'; '.join(wrong[:3])}{f'; and {len(wrong) - 3} more files' if wrong[3:] else ''}: prepare it again"
        )
    print(describe_dataset(samples, shares, row, rate))
    print("every byte is as it was written")


def plot(
    *,
    log: list[str] = [],  # log.jsonl of each run
    out: str = "curves.png",  # where the picture goes
):
    """The curves of several training runs in one picture: loss, validation loss, norm of the gradient, speed."""
    if not log:
        raise UserError("prepare.py plot needs the logs of runs: out/*/log.jsonl")
    draw_curves(read_curves(log), out)
    cli.status(f"{out}: {len(log)} runs")


def stitch(
    *,
    vision: str = "",  # whose eye: a checkpoint, a CLIP, SigLIP or DINOv2 folder, or owner/name as on Hugging Face
    decoder: str = "",  # whose brain, tokenizer and template: a checkpoint, a Llama or Mistral folder, or owner/name
    out: str = "out/stitched",  # where the stitched model goes
    tile: int | None = None,  # pixels across a picture for a public eye; none: its own
    fit: str | None = None,  # squash, pad or crop, for a public eye; none: what its preprocessor does, or what --tiles says
    tiles: int | None = None,  # for a public eye, the most tiles that a large picture is cut into, as InternVL and NVLM do; none: by --fit
    thumbnail: bool = True,  # the whole picture as a last tile where there are several
    tile_choice: str = "aspect",  # its grid has the picture's shape (aspect, InternVL), or as much of its area and its shape (area, Megatron)
    tile_tags: bool = False,  # a text before each tile that numbers it (NVLM)
    draft: bool = False,  # large JPEGs are decoded smaller, which is faster, but not pixel for pixel what a public eye was trained on
    read: int | None = None,  # a public eye's layer to read un-normed, -2 the last but one; none: CLIP -2, others their normed end
    shuffle: int | None = None,  # pixel shuffle for a public eye: shuffle² patches become one token; none: 1
    template: str | None = None,  # how a public brain's conversations become text; none: what its own chat template does
    seed: int = 0,  # of the fresh projector
):
    """Join an eye and a brain by a fresh projector; no number of either changes."""
    if not vision or not decoder:
        raise UserError("prepare.py stitch needs --vision=DIR and --decoder=DIR")
    refuse_to_overwrite(out)
    grid = tiling(fit, tiles, thumbnail, tile_choice, tile_tags)
    check_template(template)
    choices = {
        "tile": tile,
        "read": read,
        "shuffle": shuffle,
        "draft": draft or None,
        **(grid or {"fit": fit}),
    }
    choices = {name: value for name, value in choices.items() if value is not None}
    stitch_folders(
        vision=vision,
        decoder=decoder,
        out=out,
        vision_choices=choices,
        template=template,
        seed=seed,
    )


def check_template(template):
    if template not in (None, *chat_template.TEMPLATES):
        raise UserError(f"--template={template} is not known: {', '.join(chat_template.TEMPLATES)}")


def export(
    *,
    model: str = "out/sft",  # whose weights, tokenizer, template and picture policy
    out: str = "",  # the new folder
    template: str | None = None,  # of a published LLaVA whose own is not known; the new folder states it
):
    """Hand a model on: a LLaVA folder that transformers, vLLM and llama.cpp's converter read without any code of ours."""
    if not out:
        raise UserError("prepare.py export needs --out=DIR")
    refuse_to_overwrite(out)
    check_template(template)
    owner = load_checkpoint(model, dtype=None, template=template)
    export_checkpoint(owner, out)
    kind = "LLaVA-NeXT" if owner.image_config["fit"] == "anyres" else "LLaVA"
    cli.status(
        f"{out}: a {kind} folder of {sum(file.stat().st_size for file in Path(out).iterdir()):,} bytes, its template {owner.chat_template}"
    )


if __name__ == "__main__":
    cli.run(
        {
            "fridge": fridge,
            "new": new,
            "data": data,
            "show": show,
            "check": check,
            "plot": plot,
            "stitch": stitch,
            "export": export,
        }
    )
