"""Any collection of images and conversations becomes a prepared dataset.

It runs on all cores, skips broken records, and can be interrupted. The records of all sources, in
order, are split into shards of SHARD_RECORDS each, or fewer if they carry more than
SHARD_IMAGE_BYTES. A worker makes a complete shard or none. So the dataset is the same byte for byte
for any number of workers and interruptions: the same command makes the missing shards.

    out.tmp/plan.json    what the shards are made from; another command must not continue them
    out.tmp/00012/       a shard (data/dataset.py) with its receipt.json: the number of its records,
                         and which of them were skipped and why
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

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


class BuildOptions(NamedTuple):
    """How records become samples; small, because each worker gets a copy."""

    tokenizer: Tokenizer
    chat_template: str
    image_config: dict
    seq_len: int  # the most tokens of a sample
    images: str  # the folder or zip in which records name their images


def build_dataset(paths, out, options, workers, max_skipped):
    """Prepare the dataset `out` from the sources `paths`; returns the skipped records.

    They are those of skipped.jsonl: id, where, reason, error. max_skipped: the share of records
    that may be skipped; raises UserError if it is more.
    """
    # raises UserError for what is no source before anything is written
    raws = readers.read_records(paths, options.images)
    out = Path(out)
    tmp = out.with_name(f"{out.name}.tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock_path(tmp):
            begin_build(tmp, make_plan(paths, options))
            # A run that is killed at its very end leaves only the cleaning up.
            if not (tmp / "header.json").exists():
                count = build_missing_shards(raws, tmp, options, workers)
                # Sources may have changed while they were read.
                check_plan(tmp, make_plan(paths, options))
                finish_dataset(tmp, count, options, max_skipped)
            remove_build_files(tmp)
            os.rename(tmp, out)
            files.fsync_path(out.parent)
        return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for lack of memory (fewer --workers need less): "
            + resume_hint(tmp)
        ) from None
    except OSError as error:
        error.filename = f"{error.filename or out} ({resume_hint(tmp)})"
        raise
    except KeyboardInterrupt:
        cli.print_status(f"\n{resume_hint(tmp)}")
        raise


def resume_hint(tmp):
    return f"finished shards stay in {tmp}, and the same command continues"


def make_plan(paths, options):
    """Returns all that decides the bytes of a dataset, except the content of its images.

    It has JSON's types only.
    """
    stamps = readers.source_stamps(paths, options.images)
    return json.loads(
        json.dumps(
            {
                "version": dataset.DATASET_VERSION,
                "shard": [SHARD_RECORDS, SHARD_IMAGE_BYTES],
                "seq_len": options.seq_len,
                "fingerprint": dataset.make_fingerprint(options),
                "images": options.images,
                "sources": stamps,
                "order of sources": list(stamps),
            }
        )
    )


def check_plan(tmp, plan):
    """Raises UserError if the dataset in `tmp` was begun with another plan."""
    if wrong := dataset.list_differences(
        json.loads((tmp / "plan.json").read_text()), plan, "its", "now"
    ):
        raise UserError(
            f"{tmp} was begun with other settings: {'; '.join(wrong)}; remove it to start again"
        )


def begin_build(tmp, plan):
    """Write plan.json, or check that of an earlier run, whose shards are kept."""
    path = tmp / "plan.json"
    for unfinished in tmp.glob("*.tmp"):  # a shard or a plan
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    if not path.exists():
        files.write_text(path, json.dumps(plan, indent=1))
    check_plan(tmp, plan)


# ---- the workers ----

OPTIONS = None  # of a worker process; initialize_worker sets it


def initialize_worker(options):
    """Set up a worker process.

    It has one thread, ends without a message at Ctrl-C, which its parent gets too, and ends with
    its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
    """Make a shard of records; returns the number of its records and the bytes of its tiles.

    Records that cannot be used are skipped and listed in the shard's receipt.
    """
    skipped = []

    def samples():
        for raw in raws:
            try:
                yield process_sample(readers.make_sample(raw, options.images), options)
            except UserError as error:
                skipped.append(
                    {
                        "id": readers.record_id(raw),
                        "where": raw.where,
                        "reason": error.reason or "cannot be used",
                        "error": str(error),
                    }
                )

    dataset.write_shard(
        folder, options.image_config, samples(), lambda: {"records": len(raws), "skipped": skipped}
    )
    return len(raws), (folder / "tiles").stat().st_size


def process_sample(sample, options):
    """Returns a readers.Sample as write_shard takes it: (name, ids, loss_mask, images).

    Images are cut into fewer tiles until the sample has at most seq_len tokens. Raises UserError if
    it stays longer.
    """
    ids, loss_mask = chat_template.render_conversation(
        sample.turns, options.tokenizer, options.chat_template
    )
    config, tokenizer = options.image_config, options.tokenizer
    # checked before its images are opened, because a sample of a thousand images fits no memory
    min_length = len(ids) + len(sample.images) * (image_processing.tokens_per_tile(config) - 1)
    if min_length > options.seq_len:
        raise UserError(
            f"{sample.where}: at least {min_length:,} tokens, --seq_len={options.seq_len}",
            "longer than seq_len",
        )
    required_size = image_processing.required_size(config)
    opened = [
        image_files.read_image(*image_refs.load_image_bytes(ref), required_size)
        for ref in sample.images
    ]
    for limit in tile_limits(config):
        planned = [image_processing.plan_image(size, config, limit) for _, size in opened]
        tagged_ids, _, images = chat_template.add_tile_tags(
            ids, loss_mask, planned, tokenizer, config
        )
        counts = [len(image.feature_index) for image in images]
        length = int(dataset.token_repeats(tagged_ids, counts).sum())
        if length > options.seq_len:
            continue
        processed = []
        for plan, (image, size) in zip(planned, opened, strict=True):
            tiles = image_processing.cut_into_tiles(image, config, limit, size)
            processed.append(plan._replace(tiles=tiles))
        tagged = chat_template.add_tile_tags(ids, loss_mask, processed, tokenizer, config)
        return sample.name, *tagged
    raise UserError(
        f"{sample.where}: {length:,} tokens, --seq_len={options.seq_len}", "longer than seq_len"
    )


def tile_limits(image_config):
    """Returns the limits on the number of tiles to try, one after another, as in NVLM."""
    if image_config["fit"] != "tiles":
        return [None]
    tiles = image_config["tiles"]
    return [tiles, *(limit for limit in TILE_LIMITS if limit < tiles)]


# ---- all shards ----


def mark_duplicates(raws):
    """Yields the records; one that came before gets an error, so it is skipped."""
    seen = set()
    for raw in raws:
        digest = readers.record_digest(raw)
        if digest in seen and raw.error is None:
            error = f"{raw.where}: the same as an earlier one, its id too"
            raw = raw._replace(error=("duplicate", error))
        seen.add(digest)
        yield raw


def split_into_shards(raws):
    """Yields lists of SHARD_RECORDS records, fewer if they carry more than SHARD_IMAGE_BYTES."""
    shard, size = [], 0
    for raw in mark_duplicates(raws):
        shard.append(raw)
        images = [ref for ref in raw.images if isinstance(ref, image_refs.ImageBytes)]
        size += sum(len(ref.content) for ref in images)
        if len(shard) == SHARD_RECORDS or size > SHARD_IMAGE_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def build_missing_shards(raws, tmp, options, workers):
    """Make the shards that are missing; returns the number of all shards."""
    count, before, progress = 0, 0.0, Progress()

    def missing():
        nonlocal count, before
        for shard in split_into_shards(raws):
            folder, share = tmp / f"{count:05d}", shard[-1].position - before
            count, before = count + 1, shard[-1].position
            if folder.exists():
                progress.found += share
            else:
                yield folder, shard, share

    for done in completed_shards(missing(), options, workers):
        progress.update(*done)
    return count


def completed_shards(tasks, options, workers):
    """Yields (records, bytes, share of the sources) of each shard when it is done.

    The first shard is made in this process, because most sources need only one.
    """
    for folder, raws, share in itertools.islice(tasks, None if workers == 1 else 1):
        yield *build_shard(folder, raws, options), share
    first = next(tasks, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initialize_worker, (options,)
    )
    try:
        running = {}
        for folder, raws, share in itertools.chain([first], tasks):
            # A worker that starts blocks them too, until initialize_worker: no traceback.
            with block_interrupts():
                running[pool.submit(build_shard_in_worker, folder, raws)] = share
            if len(running) > workers:  # one waits; a shard of parquet holds its images in memory
                yield from wait_for_shards(running)
        while running:
            yield from wait_for_shards(running)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def block_interrupts():
    """Delay Ctrl-C until the end; a process that is started meanwhile inherits the block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def wait_for_shards(running):
    """Yields (records, bytes, share) of the next shards that are done."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield *future.result(), running.pop(future)


class Progress:
    """Prints a line every five seconds at most: records, speed, size and the time that is left."""

    def __init__(self):
        self.start = self.last_print = time.time()
        self.records = self.bytes = 0
        self.share = self.found = 0.0  # of the sources: done by this run, and by an earlier one

    def update(self, records, size, share):
        """Count one more shard; share: its share of the sources."""
        now = time.time()
        self.records += records
        self.bytes += size
        self.share += share
        if now - self.last_print > 5:
            self.last_print, elapsed = now, now - self.start
            left = elapsed * max(1 - self.found - self.share, 0) / max(self.share, 1e-9)
            cli.print_status(
                f"{self.records:,} samples, {self.records / elapsed:,.0f}/s, "
                f"{self.bytes / 1e9:.1f} GB of tiles, {left:,.0f} s left"
            )


def finish_dataset(tmp, count, options, max_skipped):
    """Make a folder of `count` shards a dataset; raises UserError if too much was skipped."""
    folders = [tmp / f"{number:05d}" for number in range(count)]
    receipts = [json.loads((folder / "receipt.json").read_text()) for folder in folders]
    records = sum(receipt["records"] for receipt in receipts)
    skipped = [one for receipt in receipts for one in receipt["skipped"]]
    (tmp / "skipped.jsonl").write_text("".join(json.dumps(one) + "\n" for one in skipped))
    if len(skipped) > max_skipped * records or len(skipped) == records:
        kinds = ", ".join(f"{reason} {times:,}" for reason, times in count_reasons(skipped))
        raise UserError(
            f"{len(skipped):,} of {records:,} samples cannot be used, more than "
            f"--max_skipped={max_skipped * 100:g}% ({kinds}): "
            f"{'; '.join(one['error'] for one in skipped[:3])}; all are in {tmp}/skipped.jsonl; "
            f"correct them, then remove {tmp}"
        )
    options.tokenizer.save(tmp)
    for path in tmp.iterdir():
        files.fsync_path(path)
    dataset.write_header(
        tmp, dataset.make_fingerprint(options), [receipt["files"] for receipt in receipts]
    )


def remove_build_files(tmp):
    """Remove the files that only the workers needed."""
    for path in (*tmp.glob("*/receipt.json"), tmp / "plan.json"):
        path.unlink()
    files.fsync_path(tmp)


def count_reasons(skipped):
    """Returns [(reason, count)], the most frequent first."""
    return Counter(one["reason"] for one in skipped).most_common()


def prepare_dataset(*, model, source, images, out, seq_len, workers=0, max_skipped=0.01):
    """Prepare the dataset `out` for the tokenizer, chat template and image config of `model`.

    The arguments are the settings of `prepare.py data`.
    """
    checkpoint, start = load_checkpoint_info(model), time.time()
    tokenizer, template = checkpoint.tokenizer, checkpoint.chat_template
    chat_template.end_token_id(tokenizer, template)
    options = BuildOptions(tokenizer, template, checkpoint.image_config, seq_len, images)
    workers = workers or len(os.sched_getaffinity(0))
    skipped = build_dataset(source, out, options, workers, max_skipped)
    table = dataset.PreparedDataset(out).table
    cli.print_status(
        f"{out}: {len(table):,} samples, {table[:, dataset.IS_VALIDATION].sum():,} of them held "
        f"out, the longest of {table[:, dataset.LENGTH].max():,} tokens, "
        f"in {time.time() - start:.0f} s"
    )
    for reason, times in count_reasons(skipped):
        cli.print_status(f"skipped {times:,}: {reason}")
    if skipped:
        cli.print_status(f"each with its reason in {out}/skipped.jsonl")
