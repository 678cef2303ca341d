"""Everything that happens before training:

    python prepare.py fridge --out=data/fridge                                            draw the little world of the demonstration
    python prepare.py new --source=data/fridge/text.json --out=out/newborn                a tokenizer learnt from text, a random eye and brain
    python prepare.py data --model=M --source=FILE.json --images=DIR --out=data/NAME      pictures and conversations to memory-mapped shards
    python prepare.py stitch --vision=DIR --decoder=DIR --out=out/NAME                    an eye, a brain, a fresh projector between them
"""
import sys
import time
from pathlib import Path

import torch

from nanovlm import Mistake, chat, cli, tokenizer, weights
from nanovlm import data as shards
from nanovlm import fridge as world
from nanovlm import images as pictures


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def fridge(*,
    out: str = "data/fridge",  # folder for images/, text.json, captions.json, chats.json and exam.jsonl
    scenes: int = 8000,        # fridges drawn for training
    text: int = 12000,         # text-only conversations for the blind talker
    exam: int = 500,           # fridges held out for the exam
    seed: int = 0,             # the same seed draws the same world
):
    """Draw fridges, describe them, ask about them: ordinary JPEGs and ordinary LLaVA-format JSON."""
    world.write(out=out, scenes=scenes, text=text, exam=exam, seed=seed)
    say(f"{out}: {scenes} fridges to learn from, {text} conversations without one, {exam} held out for the exam")


def read_records(source):
    """A list of samples from a JSON file in LLaVA's format."""
    records = weights.read_json(source)
    if not isinstance(records, list) or not records:
        raise Mistake(f"{source}: not a list of samples" if records != [] else f"{source} holds no samples")
    return records


def new(*,
    source: list[str] = [],     # LLaVA JSON whose text the tokenizer is learnt from; may be repeated
    out: str = "out/newborn",   # where the newborn goes
    vocabulary: int = 512,      # tokens to learn, special ones aside
    template: str = "mistral",  # mistral or chatml: how conversations become text
    tile: int = 64,             # pixels across a picture as the eye sees it
    patch: int = 8,             # pixels across a patch
    shuffle: int = 2,           # pixel shuffle: shuffle² patches become one token
    fit: str = "squash",        # squash, pad or crop: how a picture that is not square becomes so
    width: int = 128,           # numbers in a vector of the brain
    layers: int = 4,            # of the brain
    heads: int = 4,             # query heads of the brain
    kv_heads: int = 2,          # key/value heads, shared by the query heads
    ffn: int = 384,             # feed-forward width of the brain
    vision_width: int = 128,    # numbers in a vector of the eye
    vision_layers: int = 4,     # of the eye
    vision_heads: int = 4,      # of the eye
    vision_ffn: int = 512,      # feed-forward width of the eye
    seed: int = 0,              # of the random numbers
):
    """A newborn: a tokenizer learnt from your text, a random eye and a random brain, for growing a small model from nothing."""
    if not source:
        raise Mistake("--source names no file to learn a tokenizer from")
    if template not in chat.TEMPLATES:
        raise Mistake(f"--template={template} is not known: {', '.join(chat.TEMPLATES)}")
    texts = (text for path in source for record in read_records(path) for _, text in chat.read_turns(record, path))
    words = tokenizer.learn(texts, vocabulary, chat.special_names(template))
    policy = {"tile": tile, "patch": patch, "shuffle": shuffle, "fit": fit, "resample": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    pictures.check_policy(policy)
    shapes = {
        "vision": {"tile": tile, "patch": patch, "width": vision_width, "layers": vision_layers, "heads": vision_heads, "ffn": vision_ffn},
        "decoder": {"vocabulary": words.vocab_size, "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn},
        "shuffle": shuffle,
    }
    torch.manual_seed(seed)
    model = weights.build(shapes, policy)
    weights.save(weights.Checkpoint(model, words, shapes, policy, template, {"newborn": f"seed {seed}"}), out)
    say(f"{out}: {sum(p.numel() for p in model.parameters()):,} random parameters, {words.vocab_size} tokens, "
        f"{pictures.picture_tokens(1, policy)} tokens a picture")


def data(*,
    model: str = "out/newborn",  # whose tokenizer, template and picture policy to prepare for
    source: str = "",            # a JSON file in LLaVA's format
    images: str = "",            # the folder its pictures are named from; empty: the folder of the source
    out: str = "",               # where the prepared set goes
):
    """Pictures and conversations, prepared once: cut, tokenised, and written to be read at memory speed."""
    if not source or not out:
        raise Mistake("prepare.py data needs --source=FILE.json and --out=data/NAME")
    owner, records = weights.load(model), read_records(source)
    folder = Path(images) if images else Path(source).parent
    writer = shards.Writer(out, fingerprint=owner.fingerprint(), tokens_per_tile=pictures.picture_tokens(1, owner.policy), tile=owner.policy["tile"])
    began = told = time.time()
    for number, record in enumerate(records, 1):
        writer.add(*sample(record, number, folder, owner))
        if time.time() - told > 5:
            told = time.time()
            left = (told - began) / number * (len(records) - number)
            say(f"{number:,} of {len(records):,} samples, {number / (told - began):.0f}/s, {left:.0f} s left")
    writer.close()
    say(f"{out}: {len(records):,} samples in {time.time() - began:.0f} s")


def sample(record, number, folder, owner):
    """A record of the source as what Writer.add takes: name, ids, trained, and the tiles of each picture."""
    if not isinstance(record, dict):
        raise Mistake(f"sample {number} is not an object: {str(record)[:80]}")
    name = f"sample {record.get('id', number)}"
    paths = record.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    turns = chat.read_turns(record, name)
    chat.check_turns(turns, len(paths), name)
    ids, trained = chat.render(turns, owner.tokenizer, owner.template)
    try:
        tiles = [pictures.load_tiles(folder / path, owner.policy) for path in paths]
    except Mistake as mistake:
        raise Mistake(f"{name}: {mistake}") from None
    return str(record.get("id", number)), ids, trained, tiles


def stitch(*,
    vision: str = "",             # whose eye: a checkpoint, a CLIP, SigLIP or DINOv2 folder, or owner/name as on Hugging Face
    decoder: str = "",            # whose brain, tokenizer and template: a checkpoint, a Llama or Mistral folder, or owner/name
    out: str = "out/stitched",    # where the stitched model goes
    tile: int | None = None,      # pixels across a picture for a public eye; none: its own
    fit: str | None = None,       # squash, pad or crop, for a public eye; none: what its preprocessor does
    read: int | None = None,      # a public eye's layer to read un-normed, -2 the last but one; none: CLIP -2, others their normed end
    shuffle: int | None = None,   # pixel shuffle for a public eye: shuffle² patches become one token; none: 1
    template: str | None = None,  # how a public brain's conversations become text; none: what its own chat template does
    seed: int = 0,                # of the fresh projector
):
    """Join an eye and a brain by a fresh projector; no number of either changes."""
    if not vision or not decoder:
        raise Mistake("prepare.py stitch needs --vision=DIR and --decoder=DIR")
    if fit is not None and fit not in pictures.FITS:
        raise Mistake(f"--fit={fit} is not known: {', '.join(pictures.FITS)}")
    if template is not None and template not in chat.TEMPLATES:
        raise Mistake(f"--template={template} is not known: {', '.join(chat.TEMPLATES)}")
    choices = {"tile": tile, "fit": fit, "read": read, "shuffle": shuffle}
    eye = weights.eye(vision, **{name: value for name, value in choices.items() if value is not None})
    brain = weights.brain(decoder, **{} if template is None else {"template": template})
    alone = weights.alone(eye, brain)
    weights.save(weights.stitch(eye, brain, seed), out)
    del eye, brain  # their files are let go before the new one is read
    difference = weights.check_stitch(out, alone)
    say(f"{out}: the eye of {vision}, the brain of {decoder}, a projector that knows nothing yet")
    say(f"read again, it sees in a picture of noise and says over eight tokens what they do alone: the largest difference is {difference:.2g}")


if __name__ == "__main__":
    cli.run({"fridge": fridge, "new": new, "data": data, "stitch": stitch})
