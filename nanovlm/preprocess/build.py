"""From collections of pictures and conversations to a prepared set: on all cores, through dirt, and through interruption.

The records of all sources, in order, are dealt out to shards, SHARD to each or what CARRIED allows, and a worker makes a whole shard of them or
none. So the set is the same byte for byte whatever the number of workers and however often it was stopped: the same command makes the shards that
are missing.

    out.tmp/plan.json    what the shards are made from and how; another command may not go on with them
    out.tmp/00012/       a shard (data.py), and with it receipt.json: how many records it was made from, which of them were skipped, and why
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
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

SHARD_RECORDS = 1024  # records; at 12 tiles of 448 pixels 8 GB, and what a stop may cost each worker
SHARD_IMAGE_BYTES = (
    1 << 26
)  # bytes of pictures that records of parquet bring along, after which a shard ends: a few of them are in memory for each worker
TILE_LIMITS = (
    12,
    8,
    6,
    4,
    2,
    1,
)  # tiles; Megatron-LM's examples/multimodal step down so where a row would not hold a sample


class BuildOptions(NamedTuple):
    """How records become samples; small, for it goes to every worker."""

    tokenizer: Tokenizer
    chat_template: str
    image_config: dict
    seq_len: int  # the most tokens of a sample
    images: str  # the folder or zip that records name their pictures from


def build_dataset(paths, out, recipe, workers, max_skipped):
    """Prepare the set `out` from the sources `paths`. max_skipped: the share of records that may be skipped before it is a UserError.
    Returns the skipped, as they are written to skipped.jsonl: id, where, reason, said."""
    raws = readers.read_records(
        paths, recipe.images
    )  # what is no source is told before anything is written
    out = Path(out)
    tmp = out.with_name(f"{out.name}.tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock_path(tmp):
            begin_build(tmp, make_plan(paths, recipe))
            if not (
                tmp / "header.json"
            ).exists():  # a run killed at its very end has left only the tidying
                count = build_missing_shards(raws, tmp, recipe, workers)
                check_plan(
                    tmp, make_plan(paths, recipe)
                )  # sources may have changed while they were read
                finish_dataset(tmp, count, recipe, max_skipped)
            remove_build_files(tmp)
            os.rename(tmp, out)
            dataset.fsync_path(out.parent)
        return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    except BrokenProcessPool:
        raise UserError(
            f"a worker was killed, for want of memory perhaps (fewer --workers need less): {resume_hint(tmp)}"
        ) from None
    except OSError as error:
        error.filename = f"{error.filename or out} ({resume_hint(tmp)})"
        raise
    except KeyboardInterrupt:
        print(f"\n{resume_hint(tmp)}", file=sys.stderr)
        raise


def resume_hint(tmp):
    return f"what is done stays in {tmp}, and the same command goes on with the rest"


def make_plan(paths, recipe):
    """What decides the bytes of a set, as far as it can be told without reading its pictures; in JSON's own types."""
    stamps = readers.source_stamps(paths, recipe.images)
    return json.loads(
        json.dumps(
            {
                "version": dataset.DATASET_VERSION,
                "shard": [SHARD_RECORDS, SHARD_IMAGE_BYTES],
                "row": recipe.seq_len,
                "fingerprint": dataset.make_fingerprint(recipe),
                "images": recipe.images,
                "sources": stamps,
                "order of sources": list(stamps),
            }
        )
    )


def check_plan(tmp, plan):
    """Raise UserError unless the set in `tmp` was begun by the same plan."""
    if wrong := dataset.list_differences(
        json.loads((tmp / "plan.json").read_text()), plan, "its", "now"
    ):
        raise UserError(f"{tmp} was begun otherwise: {'; '.join(wrong)}; remove it to begin anew")


def begin_build(tmp, plan):
    """Write down what a set is to be made from, or take up again what was begun."""
    path = tmp / "plan.json"
    for left in tmp.glob("*.tmp"):  # half a shard, or half a plan
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not path.exists():
        half = path.with_suffix(".tmp")
        half.write_text(json.dumps(plan, indent=1))
        os.rename(half, path)
    check_plan(tmp, plan)


# ---- the workers ----


def initialize_worker(recipe):
    """A process of its own: one core's worth of threads, no last words at Ctrl-C, which its parent hears too, and no life without that parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    globals()["RECIPE"] = recipe


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # or it would wait for work forever, and write beside the run that takes its place


def build_shard_in_worker(folder, raws):
    return build_shard(folder, raws, RECIPE)  # noqa: F821  start_worker puts it there


def build_shard(folder, raws, recipe):
    """Make a shard of records; what cannot be used of them is skipped and written down in its receipt. Returns how many records and bytes it took."""
    skipped = []

    def samples():
        for raw in raws:
            try:
                yield process_sample(readers.make_sample(raw, recipe.images), recipe)
            except UserError as mistake:
                skipped.append(
                    {
                        "id": readers.record_id(raw),
                        "where": raw.where,
                        "reason": mistake.reason or "cannot be used",
                        "said": str(mistake),
                    }
                )

    dataset.write_shard(
        folder, recipe.image_config, samples(), lambda: {"records": len(raws), "skipped": skipped}
    )
    return len(raws), (folder / "tiles").stat().st_size


def process_sample(sample, recipe):
    """A sources.Sample as write_shard takes it: name, ids, trained, pictures. Pictures are cut into fewer tiles until the sample fits its row."""
    ids, trained = chat_template.render_conversation(sample.turns, recipe.tokenizer, recipe.chat_template)
    least = len(ids) + len(sample.images) * (image_processing.tokens_per_tile(recipe.image_config) - 1)
    if (
        least > recipe.seq_len
    ):  # a sample of a thousand pictures would not only fit no row, but no memory either
        raise UserError(
            f"{sample.where}: at least {least:,} tokens, --row={recipe.seq_len}", "longer than a row"
        )
    opened = [
        image_files.read_image(*image_refs.load_image_bytes(ref), image_processing.required_size(recipe.image_config))
        for ref in sample.images
    ]
    for limit in tile_limits(recipe.image_config):
        planned = [image_processing.plan_image(size, recipe.image_config, limit) for _, size in opened]
        tagged, _, pictures = chat_template.add_tile_tags(
            ids, trained, planned, recipe.tokenizer, recipe.image_config
        )
        length = int(dataset.token_repeats(tagged, [len(picture.feature_index) for picture in pictures]).sum())
        if length <= recipe.seq_len:
            cut = [
                blank._replace(tiles=image_processing.cut_into_tiles(picture, recipe.image_config, limit, size))
                for blank, (picture, size) in zip(planned, opened, strict=True)
            ]
            return sample.name, *chat_template.add_tile_tags(
                ids, trained, cut, recipe.tokenizer, recipe.image_config
            )
    raise UserError(f"{sample.where}: {length:,} tokens, --row={recipe.seq_len}", "longer than a row")


def tile_limits(policy):
    """The most tiles that a picture may be cut into, step by step (NVLM's); the policy's own numbers where it is not cut by a grid."""
    return (
        [policy["tiles"], *(most for most in TILE_LIMITS if most < policy["tiles"])]
        if policy["fit"] == "tiles"
        else [None]
    )


# ---- all of it ----


def split_into_shards(raws):
    """Lists of SHARD records, fewer if they carry more than CARRIED; a record that has been there already is marked as such."""
    seen = set()

    def once(raw):
        identity = readers.record_digest(raw)
        again = identity in seen
        seen.add(identity)
        return (
            raw._replace(
                error=("duplicate", f"{raw.where}: the same as an earlier one, its id too")
            )
            if again and raw.error is None
            else raw
        )

    shard, carried = [], 0
    for raw in map(once, raws):
        shard.append(raw)
        carried += sum(
            len(ref.content) for ref in raw.images if isinstance(ref, image_refs.ImageBytes)
        )
        if len(shard) == SHARD_RECORDS or carried > SHARD_IMAGE_BYTES:
            yield shard
            shard, carried = [], 0
    if shard:
        yield shard


def build_missing_shards(raws, tmp, recipe, workers):
    """Make every shard that is missing, and return how many there are."""
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

    for done in completed_shards(missing(), recipe, workers):
        progress.tell(*done)
    return count


def completed_shards(tasks, recipe, workers):
    """(records, bytes, share of the sources) of each shard as it is done. The first is made here: most sources need no more than one."""
    for folder, raws, share in itertools.islice(tasks, None if workers == 1 else 1):
        yield *build_shard(folder, raws, recipe), share
    first = next(tasks, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initialize_worker, (recipe,)
    )
    try:
        running = {}
        for folder, raws, share in itertools.chain([first], tasks):
            with block_interrupts():  # a worker that starts is deaf too, until start_worker: it would die with a traceback
                running[pool.submit(build_shard_in_worker, folder, raws)] = share
            if len(running) > workers:  # one lies ready; a shard of parquet holds its pictures
                yield from wait_for_shards(running)
        while running:
            yield from wait_for_shards(running)
    except BaseException:
        for (
            worker
        ) in multiprocessing.active_children():  # who have shards in hand, and more of them waiting
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def block_interrupts():
    """Ctrl-C is heard only afterwards; a process that is started meanwhile is born deaf to it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def wait_for_shards(running):
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield *future.result(), running.pop(future)


class Progress:
    """A line, every five seconds at most: how many records, how fast, how much, and how long it will take."""

    def __init__(self):
        self.began = self.told = time.time()
        self.records, self.bytes, self.share, self.found = (
            0,
            0,
            0.0,
            0.0,
        )  # shares of the sources: made, and made by an earlier run

    def tell(self, records, size, share):
        """Another shard is done, of so many records and bytes, a `share` of the sources."""
        now = time.time()
        self.records, self.bytes, self.share = (
            self.records + records,
            self.bytes + size,
            self.share + share,
        )
        if now - self.told > 5:
            self.told, spent = now, now - self.began
            left = spent * max(1 - self.found - self.share, 0) / max(self.share, 1e-9)
            print(
                f"{self.records:,} samples, {self.records / spent:,.0f}/s, {self.bytes / 1e9:.1f} GB of tiles, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def finish_dataset(tmp, count, recipe, max_skipped):
    """Make a folder of `count` shards a set, unless too much was skipped."""
    folders = [tmp / f"{number:05d}" for number in range(count)]
    receipts = [json.loads((folder / "receipt.json").read_text()) for folder in folders]
    records, skipped = (
        sum(receipt["records"] for receipt in receipts),
        [one for receipt in receipts for one in receipt["skipped"]],
    )
    (tmp / "skipped.jsonl").write_text("".join(json.dumps(one) + "\n" for one in skipped))
    if len(skipped) > max_skipped * records or len(skipped) == records:
        kinds = ", ".join(f"{reason} {times:,}" for reason, times in count_reasons(skipped))
        raise UserError(
            f"{len(skipped):,} of {records:,} samples cannot be used, more than --max_skipped={max_skipped * 100:g}% ({kinds}): "
            f"{'; '.join(one['said'] for one in skipped[:3])}; all are in {tmp}/skipped.jsonl; once they are mended, remove {tmp}"
        )
    recipe.tokenizer.save(tmp)
    for path in tmp.iterdir():
        dataset.fsync_path(path)
    dataset.write_header(
        tmp, dataset.make_fingerprint(recipe), [receipt["files"] for receipt in receipts]
    )


def remove_build_files(tmp):
    """Remove what was of use to the workers alone."""
    for path in (*tmp.glob("*/receipt.json"), tmp / "plan.json"):
        path.unlink()
    dataset.fsync_path(tmp)


def count_reasons(skipped):
    """[(reason, how often)], the most frequent first."""
    return Counter(one["reason"] for one in skipped).most_common()


def prepare_dataset(*, model, source, images, out, seq_len, workers=0, max_skipped=0.01):
    """Prepare the set `out` from the sources for the tokenizer, template and image policy of `model`; the settings are those of `prepare.py data`."""
    owner, began = load_checkpoint_info(model), time.time()
    chat_template.end_token_id(owner.tokenizer, owner.chat_template)
    recipe = BuildOptions(owner.tokenizer, owner.chat_template, owner.image_config, seq_len, images)
    skipped = build_dataset(source, out, recipe, workers or len(os.sched_getaffinity(0)), max_skipped)
    rows = dataset.PreparedDataset(out).table
    cli.print_status(
        f"{out}: {len(rows):,} samples, {rows[:, dataset.IS_VALIDATION].sum():,} of them held out, the longest of "
        f"{rows[:, dataset.LENGTH].max():,} tokens, in {time.time() - began:.0f} s"
    )
    for reason, times in count_reasons(skipped):
        cli.print_status(f"skipped {times:,}: {reason}")
    if skipped:
        cli.print_status(f"each with its reason in {out}/skipped.jsonl")
