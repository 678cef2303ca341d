"""Prepared sets and their order: what is written is what is read, and a batch is a function of (seed, step) alone."""
import itertools
import json
import os
import resource
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovlm import IMAGE, UNTRAINED, Mistake, data

TILE, TOKENS = 4, 3  # pixels across a tile; tokens a tile, as if the policy said so
FINGERPRINT = {"tokenizer": "abc", "template": "mistral", "policy": {"tile": TILE, "fit": "pad", "mean": [0.1, 0.2, 0.3]}}


def make_samples(count=30, seed=0, longest=12):
    """[(name, ids, trained, pictures)]: 0 to 2 pictures of 1 to 3 tiles among random words, the later words trained."""
    g, samples = np.random.default_rng(seed), []
    for number in range(count):
        pictures = [g.integers(256, size=(g.integers(1, 4), 3, TILE, TILE), dtype=np.uint8) for _ in range(g.integers(0, 3))]
        words = g.integers(0, 500, size=g.integers(4, longest)).tolist()
        places = g.integers(0, 3, size=len(pictures)).tolist()  # pictures stand anywhere before the answer
        ids = words[:2]
        for place in sorted(places, reverse=True):
            ids.insert(place, IMAGE)
        trained = [0] * len(ids) + [1] * (len(words) - 2)
        samples.append((f"sample {number} 🥚", ids + words[2:], trained, pictures))
    return samples


def write(out, samples, fingerprint=FINGERPRINT):
    with data.Writer(out, fingerprint=fingerprint, tokens_per_tile=TOKENS, tile=TILE) as writer:
        for sample in samples:
            writer.add(*sample)
    return data.Samples(out)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "set", make_samples(300))


def expanded(ids, pictures):
    """A list of ids with each IMAGE as often as its picture has tokens, one by one."""
    counts = iter([len(tiles) * TOKENS for tiles in pictures])
    return [i for x in ids for i in ([IMAGE] * next(counts) if x == IMAGE else [x])]


# ---- what is written is what is read ----

@pytest.mark.parametrize("shard_bytes, fewest, most", [(1 << 34, 1, 1), (300, 4, 12), (1, 13, 30)])
def test_a_set_read_back_is_what_was_written_in_one_shard_or_in_many(tmp_path, monkeypatch, shard_bytes, fewest, most):
    monkeypatch.setattr(data, "SHARD_BYTES", shard_bytes)
    samples = make_samples()
    read = write(tmp_path / "set", samples)
    assert fewest <= len(read.shards) <= most
    assert read.names == [name for name, *_ in samples]
    for i, (_, ids, trained, pictures) in enumerate(samples):
        ids_T, targets_T, tiles_NCYX = read.read(i)
        assert ids_T.tolist() == expanded(ids, pictures)
        assert len(ids_T) == read.table[i, data.LENGTH]
        answer = [x for x, is_trained in zip(ids, trained, strict=True) if is_trained]
        assert [x for x in targets_T.tolist() if x != UNTRAINED] == answer
        assert np.array_equal(tiles_NCYX, np.concatenate([np.zeros((0, 3, TILE, TILE), np.uint8), *pictures]))
        assert tiles_NCYX.dtype == np.uint8


def test_a_target_is_the_next_token_where_that_is_trained(tmp_path):
    read = write(tmp_path / "set", [("one", [7, IMAGE, 8, 9, 10, 11], [0, 0, 0, 1, 1, 0], [np.zeros((1, 3, TILE, TILE), np.uint8)])])
    ids_T, targets_T, _ = read.read(0)
    assert ids_T.tolist() == [7, IMAGE, IMAGE, IMAGE, 8, 9, 10, 11]
    assert targets_T.tolist() == [UNTRAINED] * 4 + [9, 10, UNTRAINED, UNTRAINED]


def test_a_set_without_pictures_is_a_set(tmp_path):
    read = write(tmp_path / "set", [("words", [1, 2], [0, 1], [])])
    assert read.read(0)[2].shape == (0, 3, TILE, TILE)
    assert data.collate(read, [[0]])[0]["tiles_NCYX"].shape == (0, 3, TILE, TILE)


@given(st.lists(st.integers(1, 9), max_size=5), st.integers(0, 3))
def test_expanding_repeats_each_picture_by_its_own_count(counts, words):
    ids = [x for _ in counts for x in (*range(words), IMAGE)]
    want = [x for count in counts for x in (*range(words), *[IMAGE] * count)]
    assert data.expand(ids, counts).tolist() == want


@pytest.mark.parametrize("places, counts", [(2, [4]), (0, [4]), (1, []), (1, [4, 4])])
def test_places_and_pictures_that_differ_in_number_are_told_with_both(places, counts):
    with pytest.raises(Mistake, match=f"{places} places for pictures but {len(counts)} pictures"):
        data.expand([5, *[IMAGE] * places], counts)


# ---- a set is whole or not there ----

def test_an_error_while_writing_leaves_nothing_and_the_next_try_succeeds(tmp_path):
    with pytest.raises(KeyboardInterrupt), data.Writer(tmp_path / "set", fingerprint={}, tokens_per_tile=TOKENS, tile=TILE) as writer:
        writer.add("one", [1], [1], [])
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
    assert write(tmp_path / "set", make_samples(3)).names == [name for name, *_ in make_samples(3)]


def test_what_a_killed_writer_leaves_is_no_set_and_in_nobodys_way(tmp_path):
    writer = data.Writer(f"{tmp_path}/set/", fingerprint={}, tokens_per_tile=TOKENS, tile=TILE)  # never closed, as if killed
    for sample in make_samples(5):
        writer.add(*sample)
    for file in writer.files.values():
        file.close()
    assert os.listdir(tmp_path) == ["set.tmp"]
    for folder in ("set", "set.tmp"):
        with pytest.raises(Mistake, match=f"{folder} is no prepared data"):
            data.Samples(tmp_path / folder)
    write(tmp_path / "set", make_samples(3))
    assert os.listdir(tmp_path) == ["set"]


def test_a_full_disk_names_the_set_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file may not grow beyond this: as a full disk, an OSError
    try:
        with pytest.raises(OSError, match="File too large: '.*set'"):
            write(tmp_path / "set", make_samples(300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_a_set_is_never_written_over(tmp_path):
    write(tmp_path / "set", make_samples(2))
    with pytest.raises(Mistake, match="set is there already"):
        write(tmp_path / "set", make_samples(3))
    assert len(data.Samples(tmp_path / "set").names) == 2


PICTURE = np.zeros((1, 3, TILE, TILE), np.uint8)


@pytest.mark.parametrize("sample, said", [
    (("a\nb", [1], [1], []), r"'a\\nb' is not one line"),
    (("a\u2028b", [1], [1], []), "not one line"),
    (("\ud800", [1], [1], []), "not one line"),
    (("", [1], [1], []), "not one line"),
    (("x", [1, 2], [1], []), "x: 2 ids but 1 marks"),
    (("x", [IMAGE], [0], []), "1 places for pictures but 0 pictures"),
    (("x", [IMAGE], [0], [PICTURE, PICTURE]), "1 places for pictures but 2 pictures"),
    (("x", [IMAGE], [0], [PICTURE.astype(np.float32)]), "x: tiles are float32"),
    (("x", [IMAGE], [0], [PICTURE[..., :3]]), r"x: tiles are uint8 \[3, 4, 3\], the set's uint8 \[3, 4, 4\]"),
])
def test_a_sample_that_could_not_be_read_back_is_not_written(tmp_path, sample, said):
    with pytest.raises(Mistake, match=said):
        write(tmp_path / "set", [sample])
    assert not os.listdir(tmp_path)


# ---- a set that is not as it was written is refused ----

@pytest.mark.parametrize("kind", [*data.KINDS, "names"])
@pytest.mark.parametrize("how", ["cut", "grown", "gone"])
def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path, kind, how):
    write(tmp_path / "set", make_samples(5))
    path = tmp_path / "set" / f"00000.{kind}"
    before = path.read_bytes()
    after = {"cut": before[:-1], "grown": before + b"\n", "gone": b""}[how]
    path.write_bytes(after) if after else path.unlink()
    now, was = (len(after), len(before)) if kind != "names" else (after.count(b"\n"), 5)
    with pytest.raises(Mistake, match=f"{path} has {now} .*, its header says {was}"):
        data.Samples(tmp_path / "set")


@pytest.mark.parametrize("text, said", [
    ("", "header.json is broken"), ('{"version": 1', "header.json is broken"), ("[]", "header.json is broken"), ("{}", "header.json is broken"),
    ("\xff", "header.json is broken"), (json.dumps({"version": 99}), f"format 99, this reads {data.VERSION}"),
    (json.dumps({"version": data.VERSION, "tile": [3, 4, 4]}), "does not say its fingerprint, tokens_per_tile, shards"),
    (json.dumps({"version": data.VERSION, "tile": [3, 4, 4], "fingerprint": {}, "tokens_per_tile": 1, "shards": []}), "holds no samples"),
])
def test_a_header_that_is_broken_or_of_another_version(tmp_path, text, said):
    (tmp_path / "header.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Mistake, match=said):
        data.Samples(tmp_path)


@pytest.mark.parametrize("folder, said", [(".", "it has no header.json"), ("nowhere", "no such folder")])
def test_a_folder_that_is_no_set(tmp_path, folder, said):
    with pytest.raises(Mistake, match=said):
        data.Samples(tmp_path / folder)


@pytest.mark.parametrize("other, said", [
    (FINGERPRINT | {"tokenizer": "xyz"}, "another model: its tokenizer is abc, the model's xyz$"),
    (FINGERPRINT | {"template": "chatml"}, "its template is mistral, the model's chatml$"),
    (FINGERPRINT | {"policy": FINGERPRINT["policy"] | {"fit": "crop"}}, "its policy fit is pad, the model's crop$"),
    (FINGERPRINT | {"policy": {"tile": 8, "fit": "pad", "mean": [0.4]}}, r"policy tile is 4, .* 8; its policy mean is \[0.1, .*\], .* \[0.4\]$"),
    (FINGERPRINT | {"policy": FINGERPRINT["policy"] | {"grid": 12}}, "its policy grid is None, the model's 12$"),
    (FINGERPRINT | {"policy": {"tile": 4, "fit": "pad"}}, r"its policy mean is \[0.1, 0.2, 0.3\], the model's None$"),
])
def test_a_set_of_another_model_is_refused_with_the_part_that_differs_and_both_values(tmp_path, other, said):
    read = write(tmp_path / "set", make_samples(2))
    read.check_fingerprint(json.loads(json.dumps(FINGERPRINT)))
    with pytest.raises(Mistake, match=said):
        read.check_fingerprint(other)


# ---- packing ----

LENGTHS = st.lists(st.integers(1, 30), max_size=80)


@given(LENGTHS, st.integers(30, 60), st.integers(1, 9))
def test_packing_splits_and_drops_nothing_and_fits(lengths, row, window):
    rows = list(data.pack(lengths, row, window))
    assert sorted(i for members in rows for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= row for members in rows)
    assert all(members == sorted(members) for members in rows)  # in order within a row


@given(LENGTHS, st.integers(30, 60))
def test_packing_with_every_row_open_is_best_fit(lengths, row):
    """The textbook's best fit, written naively: the fullest row that has room, the earliest of equals."""
    rows = []
    for i, length in enumerate(lengths):
        room = [row - sum(lengths[j] for j in members) for members in rows]
        fits = [b for b, space in enumerate(room) if space >= length]
        if fits:
            rows[min(fits, key=lambda b: (room[b], b))].append(i)
        else:
            rows.append([i])
    assert list(data.pack(lengths, row, window=len(lengths) + 1)) == rows


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 300, size=2000)
    assert lengths.sum() / (512 * sum(1 for _ in data.pack(lengths, 512))) > 0.95


# ---- rows become tensors ----

def test_positions_restart_documents_count_up_and_targets_stay_at_home(written):
    """Every sample of a packed row is, position by position, the sample as it is read alone."""
    rows = [[3, 8, 5], [11], [2, 7]]
    batch, names = data.collate(written, rows)
    assert names == [written.names[i] for i in (3, 8, 5, 11, 2, 7)]
    T = max(sum(written.table[members, data.LENGTH]) for members in rows)
    assert {name: x.shape for name, x in batch.items() if name != "tiles_NCYX"} == dict.fromkeys(
        ("ids_BT", "targets_BT", "positions_BT", "documents_BT"), (3, T))
    for b, members in enumerate(rows):
        for document, i in enumerate(members):
            ids_T, targets_T, _ = written.read(i)
            here = batch["documents_BT"][b] == document
            assert batch["ids_BT"][b, here].tolist() == ids_T.tolist()
            assert batch["targets_BT"][b, here].tolist() == targets_T.tolist()
            assert batch["positions_BT"][b, here].tolist() == list(range(len(ids_T)))
            assert targets_T[-1] == UNTRAINED  # nothing is asked of the token before a neighbour's first
        assert (batch["documents_BT"][b].diff()[: sum(written.table[members, data.LENGTH]) - 1] >= 0).all()
        assert (batch["targets_BT"][b][batch["documents_BT"][b] == -1] == UNTRAINED).all()
    tiles_NCYX = np.concatenate([written.read(i)[2] for members in rows for i in members])
    assert np.array_equal(batch["tiles_NCYX"].numpy(), tiles_NCYX)


# ---- the order ----

def loader(samples, **how):
    return data.Loader(samples, **{"row": 64, "batch": 7, "micro": 2, "seed": 0, **how})


def names_of(step):
    """A step's names, a tuple a row (rows hold different names, so that a row is known by them)."""
    return [name for _, names in step for name in names]


def rows_of(step):
    """A step's rows, each as the ids in it: micro-batches pad to their own longest row, so padding is cut."""
    return [row[documents >= 0].tolist() for batch, _ in step for row, documents in zip(batch["ids_BT"], batch["documents_BT"], strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_step_is_the_same_rows_over_any_number_of_ranks_and_micro_batches(written, world, micro):
    whole = loader(written, micro=7)
    ranks = [loader(written, micro=micro, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):  # the set is 300 samples, so that some steps reach into the next epoch
        want, parts = rows_of(next(whole)), [next(rank) for rank in ranks]
        shared = [rows_of(part) for part in parts]
        assert sorted(itertools.chain(*shared)) == sorted(want) and len(want) == 7
        assert {len(rows) for rows in shared} <= {7 // world, -(-7 // world)}  # nobody has none, nobody two more than another
        assert all(len(batch["ids_BT"]) <= micro for part in parts for batch, _ in part)


def test_starting_at_a_step_is_having_run_up_to_it(written):
    ran = [next(step) for step in [loader(written)] for _ in range(20)]
    for start in (0, 1, 13, 19):
        batch, names = next(loader(written, start=start))[0]
        assert names == ran[start][0][1]
        assert all(x.equal(ran[start][0][0][name]) for name, x in batch.items())


def test_every_sample_is_read_once_an_epoch_and_each_epoch_in_another_order(written):
    training, lengths = written.split(validation=False), written.table[written.split(validation=False), data.LENGTH]
    rows = data.rows_forever(lengths, 64, seed=3)
    epochs = []
    for _ in range(3):
        seen = []
        while len(seen) < len(training):
            seen += next(rows).tolist()
        assert sorted(seen) == list(range(len(training)))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    steps = Counter(name for _, step in zip(range(200), loader_steps(written), strict=False) for name in names_of(step))
    assert max(steps.values()) - min(steps.values()) <= 1  # over many epochs nobody is read two more times than another


def loader_steps(samples):
    steps = loader(samples)
    while True:
        yield next(steps)


def test_seeds_differ(written):
    first = [names_of(next(loader(written, seed=seed))) for seed in range(5)]
    assert len({tuple(names) for names in first}) == 5


def test_the_order_is_pinned():
    """A run that is resumed under another version of numpy must go on in the same order; this fails if numpy ever changes it."""
    assert [row.tolist() for row in itertools.islice(data.rows_forever(np.array([3, 1, 4, 1, 5, 9, 2, 6]), 10, seed=0), 8)] == \
        [[2, 4, 3], [6, 0], [5, 1], [7], [1, 3, 7, 6], [0, 4], [2], [5]]


# ---- the held-out part ----

def test_held_out_is_a_hash_of_the_id_never_trained_on_and_the_same_in_every_set(written, tmp_path):
    other = write(tmp_path / "other", make_samples(300, seed=1)[::-1])
    held = [{samples.names[i] for i in samples.split(validation=True)} for samples in (written, other)]
    assert held[0] == held[1] == {name for name in written.names if data.held_out(name)} and 0 < len(held[0]) < 20
    steps = [next(step) for step in [loader(written)] for _ in range(60)]
    assert {name for step in steps for name in names_of(step)} == set(written.names) - held[0]
    assert set(written.split(False)) | set(written.split(True)) == set(range(300))


def test_one_sample_in_64_is_held_out():
    share = np.mean([data.held_out(f"{number}") for number in range(64_000)])
    assert abs(share - 1 / 64) < 4 * (1 / 64 / 64_000) ** 0.5  # four standard deviations
    these = [number for number in range(300) if data.held_out(f"{number}")]
    assert these == [9, 79, 95, 98, 114, 130, 144, 169, 211, 233, 290]  # a new version with another hash would train on them


# ---- what a loader refuses ----

def test_a_sample_longer_than_a_row_is_named_with_both_numbers(written):
    longest = written.table[:, data.LENGTH].argmax()
    with pytest.raises(Mistake, match=f"{written.names[longest]} takes {written.table[longest, data.LENGTH]} tokens, a row holds --row=19"):
        loader(written, row=19)
    loader(written, row=int(written.table[longest, data.LENGTH]))


def test_a_set_whose_every_sample_is_held_out_trains_nothing(tmp_path):
    name = next(f"{number}" for number in itertools.count() if data.held_out(f"{number}"))
    with pytest.raises(Mistake, match="holds no training samples"):
        loader(write(tmp_path / "set", [(name, [1, 2], [0, 1], [])]))
