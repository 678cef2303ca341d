"""Any collection of images and conversations becomes a prepared dataset.

It runs on all cores, skips broken records, and can be interrupted. The records of all sources, in
order, are split into shards of SHARD_RECORDS each, or fewer if they carry more than
SHARD_IMAGE_BYTES. A worker makes a complete shard or none. So the dataset is the same byte for byte
for any number of workers and interruptions: the same command makes the missing shards.

    out.tmp/plan.json    what the shards are made from; a command with another plan is refused.
                         It stays in the dataset, so the same command knows that it is done
    out.tmp/00012/       a shard (data/dataset.py) with its receipt.json: the number of its records,
                         and which of them were skipped and why
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import UserError, cli, files
from ..checkpoints.checkpoint import load_checkpoint_info
from ..data import chat_template, dataset, image_files, image_processing, image_refs
from ..data.tokenizer import Tokenizer
from . import readers

SHARD_RECORDS = 1024  # at 12 tiles of 448 pixels 8 GB, which an interruption may cost each worker
# bytes of images that came with their records (parquet), after which a shard ends: each worker has
# a few shards in memory
SHARD_IMAGE_BYTES = 1 << 26
# the tile limits that Megatron-LM's examples/multimodal tries if a sample is too long
TILE_LIMITS = (12, 8, 6, 4, 2, 1)
NAMED_IMAGES = "images that records name"


class BuildOptions(NamedTuple):
    """How records become samples; small, because each worker gets a copy."""

    tokenizer: Tokenizer
    chat_template: str
    image_config: dict
    seq_len: int  # the most tokens of a sample
    images: str  # the folder or zip in which records name their images
    split_turns: bool = False  # each question about images is a sample of its own
    allow_outside_images: bool = False  # records may name images outside --images


def build_dataset(paths, out, options, workers, max_skipped):
    """Prepare the dataset `out` from the sources `paths`; returns the skipped records.

    They are those of skipped.jsonl: id, where, reason, error. max_skipped: the share of records
    that may be skipped; raises UserError if it is more.
    """
    # raises UserError for what is not a source before anything is written
    raws = readers.read_records(paths, options.images)
    out = Path(out)
    if (out / "plan.json").exists():
        check_plan(out / "plan.json", make_plan(paths, options))
        cli.print_status(f"{out} is done: the same command made it")
        return list(files.read_log(out / "skipped.jsonl"))
    tmp = out.with_name(f"{out.name}.tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock_path(tmp), files.name_file(tmp):
            for unfinished in tmp.glob("*.*.tmp"):  # shards of a run that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            check_plan(tmp / "plan.json", make_plan(paths, options))
            # If a run is killed at its very end, only the cleaning up is left.
            if not (tmp / "header.json").exists():
                build_missing_shards(raws, tmp, options, workers)
                # The sources may have changed while they were read.
                check_plan(tmp / "plan.json", make_plan(paths, options))
                finish_dataset(tmp, options, max_skipped)
            remove_build_files(tmp)
            os.rename(tmp, out)
            files.fsync_path(out.parent)
        return list(files.read_log(out / "skipped.jsonl"))
    except BrokenExecutor:
        raise UserError(
            "a worker was killed, perhaps for lack of memory (fewer --workers need less): finished "
            f"shards stay in {tmp}, and the same command continues"
        ) from None
    except (OSError, KeyboardInterrupt):
        cli.print_status(f"\nfinished shards stay in {tmp}, and the same command continues")
        raise


def make_plan(paths, options):
    """Returns all that decides the bytes of a dataset, except the content of its images."""
    return {
        "version": dataset.DATASET_VERSION,
        "shard": [SHARD_RECORDS, SHARD_IMAGE_BYTES],
        "seq_len": options.seq_len,
        "fingerprint": dataset.make_fingerprint(options),
        "images": options.images,
        "allow_outside_images": options.allow_outside_images,
        "split_turns": options.split_turns,
        # by number, because their order counts, too
        "sources": {
            str(n): stamp for n, stamp in enumerate(readers.source_stamps(paths, options.images))
        },
    }


def check_plan(path, plan):
    """Write plan.json, or raise UserError if it is there and holds another plan."""
    if not path.exists():
        files.write_text(path, json.dumps(plan, indent=1))
    if wrong := dataset.list_differences(files.read_json(path), plan, "its", "now"):
        raise UserError(
            f"{path.parent} was begun with other settings: {'; '.join(wrong)}; "
            "remove it to start again"
        )


# ---- the workers ----

OPTIONS = None  # of a worker process; initialize_worker sets it


def initialize_worker(options):
    """Set up a worker process: it has one thread, leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    global OPTIONS
    OPTIONS = options


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # otherwise it waits for work forever, and writes beside the run that resumes


def build_shard_in_worker(folder, raws):
    return build_shard(folder, raws, OPTIONS)


def build_shard(folder, raws, options):
    """Make a shard of records; records that cannot be used are listed in the shard's receipt.

    Returns the number of records, the bytes of the tiles, and where the last record stands.
    """
    skipped, counts = [], Counter()

    def samples():
        for raw in raws:
            try:
                sample = readers.make_sample(raw, options.images, options.allow_outside_images)
                counts[NAMED_IMAGES] += 0 if raw.images else len(sample.images)
                for image_count, processed in process_record(sample, options):
                    yield processed
                    counts[f"samples of {image_count} image(s)"] += 1
                counts.update(f"samples with {what}" for what in sample.counted)
            except UserError as error:
                skipped.append(
                    {
                        "id": str(readers.record_id(raw)),
                        "where": raw.where,
                        "reason": error.reason or "cannot be used",
                        "error": str(error),
                    }
                )

    receipt = {"records": len(raws), "skipped": skipped, "counts": counts}
    dataset.write_shard(folder, options.image_config, samples(), receipt)
    return len(raws), (folder / "tiles").stat().st_size, raws[-1].where


def split_conversation(turns):
    """Returns [(turns, number of images)]: each question of a conversation, as it is asked alone.

    The system turn and the images of the questions before it stand before its text.
    """
    first = int(turns[0][0] == "system")
    parts, image_count = [], 0
    for (_, question), answer in zip(turns[first::2], turns[first + 1 :: 2], strict=True):
        text = "<image>\n" * image_count + question
        image_count = text.count("<image>")
        parts.append(([*turns[:first], ("user", text), answer], image_count))
    return parts


def process_record(sample, options):
    """Returns the samples that a readers.Sample becomes: one, or one for each question about images
    with split_turns: (number of images, sample as write_shard takes it). With texts around tiles, a
    tile is an image of its own there.

    Images are cut into fewer tiles until all of them have at most seq_len tokens. Raises UserError
    if one stays longer.
    """
    config, tokenizer = options.image_config, options.tokenizer
    parts, rendered, lengths = [(sample.turns, len(sample.images))], [], []
    if options.split_turns and sample.images:
        parts = split_conversation(sample.turns)
    for turns, image_count in parts:
        ids, loss_mask = chat_template.render_conversation(turns, tokenizer, options.chat_template)
        rendered.append((ids, loss_mask, image_count))
        lengths.append(len(ids) + image_count * (image_processing.tokens_per_tile(config) - 1))
    # Images are opened only if they can fit: a sample of a thousand images fits no memory.
    opened, limits = [], []
    if max(lengths) <= options.seq_len:
        required_size, tiles = image_processing.required_size(config), config.get("tiles", 1)
        limits = [tiles, *(limit for limit in TILE_LIMITS if limit < tiles)]
        for ref in sample.images:
            content, name = image_refs.load_image_bytes(ref)
            opened.append(image_files.read_image(content, name, required_size))
    for limit in limits:
        images = [image_processing.process_image(*image, config, limit) for image in opened]
        processed, lengths = [], []
        for ids, loss_mask, count in rendered:
            tagged = chat_template.add_tile_tags(ids, loss_mask, images[:count], tokenizer, config)
            counts = [len(image.feature_index) for image in tagged[2]]
            lengths.append(len(dataset.expand_image_tokens(tagged[0], counts)))
            processed.append((count, (sample.name, *tagged)))
        if max(lengths) <= options.seq_len:
            return processed
    raise UserError(
        f"{sample.where}: at least {max(lengths):,} tokens, --seq_len={options.seq_len}",
        "longer than seq_len",
    )


# ---- all shards ----


def split_into_shards(raws):
    """Yields lists of SHARD_RECORDS records, fewer if they carry more than SHARD_IMAGE_BYTES."""
    shard, size = [], 0
    for raw in raws:
        shard.append(raw)
        for ref in raw.images:
            size += len(ref.content) if isinstance(ref, image_refs.ImageBytes) else 0
        if len(shard) == SHARD_RECORDS or size > SHARD_IMAGE_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def missing_shards(raws, tmp):
    """Yields (folder, records) of each shard that an earlier run has not made."""
    for number, shard in enumerate(split_into_shards(raws)):
        folder = tmp / f"{number:05d}"
        if not folder.exists():
            yield folder, shard


def build_missing_shards(raws, tmp, options, workers):
    """Make the shards that are missing.

    Prints a line every five seconds at most: samples, speed, size and the place in the sources.
    """
    records = size = 0
    start = last_print = time.time()
    tasks = missing_shards(raws, tmp)
    for count, tile_bytes, where in completed_shards(tasks, options, workers):
        records, size, now = records + count, size + tile_bytes, time.time()
        if now - last_print > 5:
            last_print = now
            cli.print_status(
                f"{records:,} samples, {records / (now - start):,.0f}/s, "
                f"{size / 1e9:.1f} GB of tiles, at {where}"
            )


def completed_shards(tasks, options, workers):
    """Yields what build_shard returns for each task, (folder, records), when it is done.

    The first shard is made in this process, because most sources need only one.
    """
    for folder, raws in itertools.islice(tasks, None if workers == 1 else 1):
        yield build_shard(folder, raws, options)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initialize_worker, (options,)) as pool:
        running = set()
        try:
            for task in tasks:
                running.add(pool.submit(build_shard_in_worker, *task))
                if len(running) > workers:  # one waits; its records may hold images in memory
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(running))
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def finish_dataset(tmp, options, max_skipped):
    """Make a folder of shards a dataset; raises UserError if too much was skipped."""
    records, skipped, counts, shards = 0, [], Counter(), []
    while (path := tmp / f"{len(shards):05d}" / "receipt.json").exists():
        receipt = files.read_json(path)
        records += receipt["records"]
        skipped += receipt["skipped"]
        counts += Counter(receipt.get("counts"))
        shards.append(receipt["files"])
    (tmp / "skipped.jsonl").write_text("".join(json.dumps(one) + "\n" for one in skipped))
    if len(skipped) > max_skipped * records or len(skipped) == records:
        limit = f"more than --max_skipped={max_skipped * 100:g}%"
        raise UserError(
            f"{len(skipped):,} of {records:,} samples cannot be used, "
            f"{'so none is left' if len(skipped) == records else limit} "
            f"({dict(count_reasons(skipped))}): "
            f"{'; '.join(one['error'] for one in skipped[:3])}; all are in {tmp}/skipped.jsonl; "
            f"correct them, then remove {tmp}"
        )
    if options.images and NAMED_IMAGES not in counts:
        found = f"{dict(counts)}; leave it out, or name the images in a field `image`"
        if not skipped and counts.keys() == {"samples of 0 image(s)"}:  # and all fields are used
            found = "the source has only text; leave it out"
        raise UserError(
            f"no sample names an image in --images={options.images}: {found}, then remove {tmp}"
        )
    for what, count in sorted(counts.items()):
        cli.print_status(image_refs.printable(f"{what}: {count:,}"))
    options.tokenizer.save(tmp)
    for path in tmp.iterdir():
        files.fsync_path(path)
    dataset.write_header(tmp, dataset.make_fingerprint(options), shards)


def remove_build_files(tmp):
    """Remove the files that only the workers needed, the receipts."""
    for path in tmp.glob("*/receipt.json"):
        path.unlink()
    files.fsync_path(tmp)


def count_reasons(skipped):
    """Returns [(reason, count)], the most frequent first."""
    return Counter(one["reason"] for one in skipped).most_common()


def measure_pixels(paths, images, image_config, count=512):
    """Returns the mean and the standard deviation of each channel, over about `count` images.

    paths, images: as in read_records. They are of pixels from 0 to 1, for an image config. Images
    that cannot be read are left out; raises UserError if there is no other.
    """
    records = sum(1 for _ in readers.read_records(paths, images))
    moments, error = [], UserError(f"the records of {', '.join(paths)} have no images")
    for raw in itertools.islice(readers.read_records(paths, images), 0, None, -(-records // count)):
        try:
            for ref in readers.make_sample(raw, images).images:
                content, name = image_refs.load_image_bytes(ref)
                image = image_processing.load_image(content, image_config, name=name)
                pixels_NCYX = image.tiles / 255.0
                moments.append([(pixels_NCYX**power).mean((0, 2, 3)) for power in (1, 2)])
        except UserError as problem:
            error = problem
    if not moments:
        raise error
    mean_C, square_C = np.mean(moments, axis=0)
    # at least 0.05: images of one color have no deviation to divide by
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0.05**2))
    return mean_C.round(4).tolist(), std_C.round(4).tolist()


def prepare_dataset(
    *,
    model,
    source,
    images,
    out,
    seq_len,
    workers=0,
    max_skipped=0.01,
    split_turns=False,
    allow_outside_images=False,
):
    """Prepare the dataset `out` for the tokenizer, chat template and image config of `model`.

    The arguments are the settings of `prepare.py data`.
    """
    checkpoint = load_checkpoint_info(model)
    template = checkpoint.chat_template
    # raises UserError if the tokenizer lacks the token
    chat_template.end_token_id(checkpoint.tokenizer, template)
    options = BuildOptions(
        checkpoint.tokenizer,
        template,
        checkpoint.image_config,
        seq_len,
        images,
        split_turns,
        allow_outside_images,
    )
    workers = workers or len(os.sched_getaffinity(0))
    skipped = build_dataset(source, out, options, workers, max_skipped)
    table = dataset.PreparedDataset(out).table
    cli.print_status(
        f"{out}: {len(table):,} samples, {table[:, dataset.IS_VALIDATION].sum():,} of them held "
        f"out, the longest of {table[:, dataset.LENGTH].max():,} tokens"
    )
    for reason, times in count_reasons(skipped):
        cli.print_status(f"skipped {times:,}: {reason} (listed in {out}/skipped.jsonl)")
