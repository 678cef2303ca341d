"""The order of samples and their packed sequences: a batch is a function of (seed, step) alone."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dataset import IMAGE_CONFIG, TOKENS, make_image, make_samples, write

from nanovlm import IGNORE_INDEX, UserError
from nanovlm.data import dataset, image_processing, packing
from nanovlm.training import recipes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "set", make_samples(200), make_samples(300)[200:]
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A dataset in which one to five samples in succession have an id and their first image in
    common."""
    g, shards = np.random.default_rng(4), ([], [])
    for number, (name, *_) in enumerate(make_samples(90)):
        image, samples = make_image(g, 2), shards[number > 50]
        for _ in range(g.integers(1, 6)):
            words, others = g.integers(0, 500, size=4).tolist(), [make_image(g, 1)]
            images = [image, *others[: g.integers(0, 2)]]
            ids = [dataset.IMAGE_TOKEN_ID] * len(images) + words
            samples.append((name, ids, [0] * len(images) + [0, 0, 1, 1], images))
    return write(tmp_path_factory.mktemp("data") / "set", *shards)


@pytest.fixture(scope="module", params=["written", "shared"])
def any_set(request):
    return request.getfixturevalue(request.param)


# ---- packing ----

LENGTHS = st.lists(st.integers(1, 30), max_size=80)


@given(LENGTHS, st.integers(30, 60), st.integers(1, 9))
def test_packing_splits_and_drops_nothing_and_fits(lengths, seq_len, window):
    sequences = list(packing.pack_sequences(lengths, seq_len, window))
    assert sorted(i for members in sequences for i in members) == list(range(len(lengths)))
    for members in sequences:
        assert sum(lengths[i] for i in members) <= seq_len
        assert members == sorted(members)
        assert len({i // window for i in members}) == 1  # no sample leaves its window


@given(LENGTHS, st.integers(30, 60))
def test_packing_is_best_fit_decreasing(lengths, seq_len):
    """The textbook's algorithm: from the longest sample on, into the fullest sequence that has
    room; of equally full ones, into the first."""
    sequences = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [seq_len - sum(lengths[j] for j in members) for members in sequences]
        fits = [b for b, space in enumerate(room) if space >= lengths[i]]
        if fits:
            sequences[min(fits, key=lambda b: (room[b], b))].append(i)
        else:
            sequences.append([i])
    packed = packing.pack_sequences(lengths, seq_len, window=len(lengths) + 1)
    assert list(packed) == sorted(map(sorted, sequences))


def test_packing_fills_sequences():
    lengths = np.random.default_rng(0).integers(20, 300, size=2000)
    assert lengths.sum() / (512 * sum(1 for _ in packing.pack_sequences(lengths, 512))) > 0.97


# ---- sequences become tensors ----


def test_positions_restart_documents_count_up_and_no_target_crosses_a_boundary(written):
    """Each sample of a packed sequence equals, token by token, the sample that is read alone."""
    sequences = [[3, 8, 5], [11], [2, 7]]
    batch, members = packing.collate(written, sequences)
    assert members == [3, 8, 5, 11, 2, 7]
    T = max(sum(written.table[members, dataset.LENGTH]) for members in sequences)
    assert {name: x.shape for name, x in batch.items() if name.endswith("BT")} == dict.fromkeys(
        ("ids_BT", "targets_BT", "positions_BT", "documents_BT"), (3, T)
    )
    for b, members in enumerate(sequences):
        for document, i in enumerate(members):
            ids_T, targets_T, _ = written.read(i)
            here = batch["documents_BT"][b] == document
            assert batch["ids_BT"][b, here].tolist() == ids_T.tolist()
            assert batch["targets_BT"][b, here].tolist() == targets_T.tolist()
            assert batch["positions_BT"][b, here].tolist() == list(range(len(ids_T)))
            assert targets_T[-1] == IGNORE_INDEX  # else it would predict the next sample's first id
        assert (
            batch["documents_BT"][b].diff()[: sum(written.table[members, dataset.LENGTH]) - 1] >= 0
        ).all()
        assert (batch["targets_BT"][b][batch["documents_BT"][b] == -1] == IGNORE_INDEX).all()
    tiles = [image.tiles for members in sequences for i in members for image in written.read(i)[2]]
    assert np.array_equal(batch["tiles_NCYX"].numpy(), np.concatenate(tiles))
    assert batch["image_feature_index"].tolist() == list(range(TOKENS * len(batch["tiles_NCYX"])))


def test_a_batch_without_images_has_no_tiles(tmp_path):
    batch, _ = packing.collate(write(tmp_path / "set", [("words", [1, 2], [0, 1], [])]), [[0]])
    assert batch["tiles_NCYX"].shape == (0, 3, 6, 6) and batch["image_feature_index"].shape == (0,)


def test_feature_indices_of_several_images_count_all_tiles_and_newlines_stay_newlines():
    g = np.random.default_rng(0)
    first = make_image(g, 3)._replace(
        feature_index=np.array([0, 11, image_processing.IMAGE_NEWLINE])
    )
    second = make_image(g, 2)._replace(
        feature_index=np.array([7, image_processing.IMAGE_NEWLINE, 1])
    )
    assert packing.collate_images([first, second], IMAGE_CONFIG)[
        "image_feature_index"
    ].tolist() == [0, 11, -1, 3 * TOKENS + 7, -1, 3 * TOKENS + 1]


def test_samples_of_one_image_share_a_sequence_and_a_batch_has_each_image_once(shared):
    """Each image token of a batch has the feature of the very tile that its sample has alone."""
    training, tiles_of = shared.split(validation=False).tolist(), {}
    for i in training:  # groups: adjacent samples with the same tiles
        tiles_of.setdefault(shared.read(i)[2][0].tiles.tobytes(), []).append(i)
    groups = {frozenset(members) for members in tiles_of.values()}
    assert max(map(len, groups)) == 5 and min(map(len, groups)) == 1
    batches, seen = loader(shared, micro_batch_size=7, seq_len=100), Counter()
    for _ in range(12):
        ((batch, members),) = next(batches)
        sequences = [set() for _ in batch["ids_BT"]]
        for i, (b, _) in zip(members, sorted(documents_of(batch)), strict=True):
            sequences[b].add(i)
        for b, group in itertools.product(range(len(sequences)), groups):
            assert not group & sequences[b] or group <= sequences[b]
        images = [image for i in members for image in shared.read(i)[2]]
        distinct = {image.tiles.tobytes() for image in images}
        assert len(batch["tiles_NCYX"]) == sum(len(x) for x in distinct) // (3 * 6 * 6)
        # number the features of all tiles, then look where each image token's feature lies
        tile_of = batch["image_feature_index"].reshape(-1, TOKENS) // TOKENS
        alone = torch.from_numpy(np.concatenate([image.tiles for image in images]))
        assert batch["tiles_NCYX"][tile_of[:, 0]].equal(alone)
        assert (batch["image_feature_index"].reshape(-1, TOKENS) % TOKENS).tolist() == [
            list(range(TOKENS))
        ] * len(alone)
        seen.update(members)
    assert seen.keys() == set(training)


def documents_of(batch):
    """Returns (sequence, document) of each sample of a batch."""
    return {
        (b, document)
        for b, documents_T in enumerate(batch["documents_BT"].tolist())
        for document in documents_T
        if document >= 0
    }


def test_samples_of_one_image_that_do_not_fit_into_a_sequence_are_cut_into_groups_that_fit(shared):
    members = shared.split(validation=False)
    groups, lengths = packing.group_samples(shared, members, 30)
    assert packing.members_of_groups(groups).tolist() == members.tolist()
    assert lengths.tolist() == [shared.table[a:b, dataset.LENGTH].sum() for a, b in groups]
    assert lengths.max() <= 30
    for (_, end), length in zip(groups[:-1], lengths[:-1], strict=True):
        if end in members and shared.shares_image[end]:  # the next sample had no room
            assert length + shared.table[end, dataset.LENGTH] > 30


# ---- the order ----


LOADER = {"seq_len": 64, "global_batch_size": 7, "micro_batch_size": 2, "seed": 0}


def loader(samples, **options):
    return packing.PackedDataLoader(samples, **(LOADER | options))


def steps_of(samples, count, **options):
    batches = loader(samples, **options)
    return [next(batches) for _ in range(count)]


def members_of(step):
    """Returns the numbers of the samples of a step."""
    return [i for _, members in step for i in members]


def sequences_of(step):
    """Returns the ids of each sequence of a step, without padding; empty sequences are left out."""
    sequences = []
    for batch, members in step:
        if members:
            pairs = zip(batch["ids_BT"], batch["documents_BT"], strict=True)
            sequences += [ids_T[documents_T >= 0].tolist() for ids_T, documents_T in pairs]
    return sequences


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_step_has_the_same_sequences_on_any_number_of_ranks_and_micro_batches(
    any_set, world, micro
):
    single = loader(any_set, micro_batch_size=7)
    ranks = [
        loader(any_set, micro_batch_size=micro, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for _ in range(8):  # the dataset has 300 samples, so some steps reach into the next epoch
        expected, parts = sequences_of(next(single)), [next(rank) for rank in ranks]
        shared = [sequences_of(part) for part in parts]
        assert sorted(itertools.chain(*shared)) == sorted(expected) and len(expected) == 7
        # each rank has a sequence, and none has two more than another
        assert {len(sequences) for sequences in shared} <= {7 // world, -(-7 // world)}
        assert all(len(batch["ids_BT"]) <= micro for part in parts for batch, _ in part)
        # under FSDP each call of the model is collective
        assert len({len(part) for part in parts}) == 1
        for batch in (batch for part in parts for batch, members in part if not members):
            assert (
                batch["ids_BT"].shape == (1, 1)
                and batch["targets_BT"] == IGNORE_INDEX
                and batch["documents_BT"] == -1
                and not len(batch["tiles_NCYX"])
            )


def test_a_loader_that_starts_at_a_step_gives_what_the_whole_run_gives_there(any_set):
    run = steps_of(any_set, 20)
    for start in (0, 1, 13, 19):
        batch, members = next(loader(any_set, start_step=start))[0]
        assert members == run[start][0][1]
        assert all(x.equal(run[start][0][0][name]) for name, x in batch.items())


def test_each_sample_is_read_once_per_epoch_and_each_epoch_has_another_order(written):
    training = written.split(validation=False)
    lengths = written.table[training, dataset.LENGTH]
    sequences = packing.packed_sequences(lengths, 64, 3, lengths, None)
    epochs = []
    for _ in range(3):
        seen = []
        while len(seen) < len(training):
            seen += next(sequences).tolist()
        assert sorted(seen) == list(range(len(training)))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    steps = Counter(i for step in steps_of(written, 200) for i in members_of(step))
    assert max(steps.values()) - min(steps.values()) <= 1  # over many epochs


def read_in(samples, steps, **options):
    """Returns how often each sample comes in so many steps."""
    return Counter(i for step in steps_of(samples, steps, **options) for i in members_of(step))


def test_the_steps_of_an_epoch_hold_each_sample_once(any_set):
    """If an epoch does not fill its last step, the next one begins there."""
    training = any_set.split(validation=False).tolist()
    alone = loader(any_set, global_batch_size=1)
    for epochs in (1, 2):
        read = read_in(any_set, alone.count_steps(epochs), global_batch_size=1)
        assert read == dict.fromkeys(training, epochs)
    several = loader(any_set, rank=1, world_size=2)  # each rank counts the steps of all
    steps = several.count_steps(2)
    assert steps == math.ceil(alone.count_steps(2) / 7)
    assert min(read_in(any_set, steps).values()) == 2
    assert min(read_in(any_set, steps - 1).values()) == 1
    assert several.count_steps(0.5) == math.ceil(alone.count_steps(1) / 14)
    assert several.count_steps(1e-9) == 1


def test_seeds_differ(written):
    first = [members_of(next(loader(written, seed=seed))) for seed in range(5)]
    assert len({tuple(members) for members in first}) == 5


def test_the_order_is_pinned():
    """A run may resume under another version of numpy. This fails if numpy changes the order."""
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    sequences = packing.packed_sequences(lengths, 10, 0, lengths, None)
    assert [members.tolist() for members in itertools.islice(sequences, 8)] == [
        [2, 7],
        [4, 6, 0],
        [3, 5],
        [1],
        [1, 5],
        [3],
        [7, 2],
        [6, 0, 4],
    ]
    dataset_of = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    sequences = packing.packed_sequences(lengths, 10, 0, dataset_of, [0.75, 0.25])
    assert [members.tolist() for members in itertools.islice(sequences, 8)] == [
        [1, 4, 2],
        [2, 7],
        [1, 0, 0],
        [0, 1, 3, 0, 1],
        [6, 2, 2],
        [2, 3, 2, 1],
        [1, 5],
        [0, 0],
    ]


def test_no_validation_sample_is_in_a_training_batch(written):
    seen = {written.names[i] for step in steps_of(written, 60) for i in members_of(step)}
    assert seen == {name for name in written.names if not dataset.is_validation(name)}


# ---- blends ----


@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    """Three datasets of 31, 7 and 90 samples; the names of samples begin with the dataset's."""
    folder = tmp_path_factory.mktemp("blend")
    sets = [
        [
            (f"{name}{number}", *rest)
            for number, (_, *rest) in enumerate(make_samples(count, seed=count))
        ]
        for name, count in (("a", 31), ("b", 7), ("c", 90))
    ]
    for name, samples in zip("abc", sets, strict=True):
        write(folder / name, samples)
    return dataset.PreparedDataset(*(folder / name for name in "abc"))


def test_a_blend_gives_each_dataset_its_share_after_every_epoch(blended):
    """Of the samples read so far each dataset has the share of its weight, rounded down. All
    samples of a dataset are read before one is read again."""
    training = blended.split(validation=False)
    dataset_of, weights = blended.dataset_of[training], [0.5, 0.3, 0.2]
    seen = Counter()
    for epoch in range(9):
        drawn = packing.epoch_samples(dataset_of, weights, 4, epoch)
        seen.update(drawn.tolist())
        for number, weight in enumerate(weights):
            assert sum(seen[i] for i in np.flatnonzero(dataset_of == number)) == int(
                weight * len(training) * (epoch + 1)
            )
    for number in range(3):
        times = [seen[i] for i in np.flatnonzero(dataset_of == number)]
        assert max(times) - min(times) <= 1


def test_a_blend_is_the_same_on_any_ranks_and_from_any_step(blended):
    weights = [0.2, 0.5, 0.3]
    run = steps_of(blended, 30, weights=weights)
    assert members_of(next(loader(blended, weights=weights, start_step=23))) == members_of(run[23])
    ranks = [
        steps_of(blended, 30, weights=weights, rank=rank, world_size=3, micro_batch_size=1)
        for rank in range(3)
    ]
    for step, parts in zip(run, zip(*ranks, strict=True), strict=True):
        shared = [ids for part in parts for ids in sequences_of(part)]
        assert sorted(sequences_of(step)) == sorted(shared)
    assert [members_of(step) for step in steps_of(blended, 30, weights=[0.3, 0.5, 0.2])] != [
        members_of(step) for step in run
    ]


def test_an_epoch_of_a_blend_has_as_many_samples_as_all_datasets_have(blended):
    """But for what is rounded down of each dataset's share. Some samples come several times."""
    options = dict(weights=[0.7, 0.2, 0.1], global_batch_size=1)
    read = read_in(blended, loader(blended, **options).count_steps(1), **options)
    assert 0 <= len(blended.split(validation=False)) - read.total() < 3
    assert max(read.values()) > 1


def test_without_weights_each_sample_of_all_datasets_is_read_once(blended):
    seen = Counter(blended.names[i] for step in steps_of(blended, 40) for i in members_of(step))
    assert max(seen.values()) - min(seen.values()) <= 1 and {name[0] for name in seen} == {
        "a",
        "b",
        "c",
    }


@pytest.mark.parametrize(
    "text, folders, weights",
    [
        ("data/a", ["data/a"], None),
        ("a,b", ["a", "b"], None),
        ("a:3, b:1", ["a", "b"], [0.75, 0.25]),
        ("a:0.5", ["a"], [1.0]),
    ],
)
def test_dataset_weights_are_parsed(text, folders, weights):
    assert recipes.parse_dataset_weights(text) == (folders, weights)


def test_a_colon_may_be_part_of_a_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    assert recipes.parse_dataset_weights("run:2") == (["run:2"], None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a:0.5,b", "give each dataset a weight"),
        ("a:x,b:1", "give each dataset a weight"),
        ("a:0,b:1", "above 0"),
        ("a:-1", "above 0"),
        ("a:nan", "above 0"),
        ("a:inf,b:1", "above 0"),
        ("a,,b", "nothing between two commas"),
        ("a,a", "a dataset twice"),
        ("a,./a/", "a dataset twice"),
        (":1", "nothing between"),
    ],
)
def test_dataset_weights_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        recipes.parse_dataset_weights(text)


# ---- what the loader refuses ----


def test_a_sample_longer_than_seq_len_is_named_with_both_numbers(written):
    longest = written.table[:, dataset.LENGTH].argmax()
    name, length = written.names[longest], int(written.table[longest, dataset.LENGTH])
    with pytest.raises(UserError, match=f"{name} takes {length} tokens, more than --seq_len=19"):
        loader(written, seq_len=19)
    loader(written, seq_len=length)


def test_a_dataset_without_training_samples_is_refused(tmp_path):
    name = next(f"{number}" for number in itertools.count() if dataset.is_validation(f"{number}"))
    write(tmp_path / "set", [(name, [1, 2], [0, 1], [])])
    write(tmp_path / "good", make_samples(9))
    for folders in (["set"], ["good", "set"]):
        with pytest.raises(UserError, match="set holds no training samples"):
            loader(dataset.PreparedDataset(*(tmp_path / name for name in folders)))
