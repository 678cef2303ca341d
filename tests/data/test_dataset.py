"""Prepared datasets: what is written is what is read, a shard is complete or missing, and altered
files are refused."""

import itertools
import json
import os
import resource

import numpy as np
import pytest
from conftest import write_set
from hypothesis import given
from hypothesis import strategies as st

import prepare
from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from nanovlm.data import dataset, image_processing

TILE, TOKENS = 6, 4  # pixels across a tile; tokens per tile: patches of 3 pixels
IMAGE_CONFIG = {
    "tile": TILE,
    "patch": 3,
    "shuffle": 1,
    "fit": "tiles",
    "tiles": 3,
    "thumbnail": False,
    "choice": "aspect",
    "tags": False,
    "resample": "bicubic",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}
FINGERPRINT = {"tokenizer": "abc", "chat_template": "mistral", "image_config": IMAGE_CONFIG}


def make_image(g, tiles):
    tiles_NCYX = g.integers(256, size=(tiles, 3, TILE, TILE), dtype=np.uint8)
    return image_processing.ProcessedImage(
        tiles_NCYX, np.arange(tiles * TOKENS), (int(g.integers(9, 99)), int(g.integers(9, 99)))
    )


def make_samples(count=30, seed=0, longest=12):
    """[(name, ids, loss_mask, images)]: 0 to 2 images of 1 to 3 tiles among random words; the later
    words are labels."""
    g, samples = np.random.default_rng(seed), []
    for number in range(count):
        images = [make_image(g, g.integers(1, 4)) for _ in range(g.integers(0, 3))]
        words = g.integers(0, 500, size=g.integers(4, longest)).tolist()
        # images stand anywhere before the answer
        positions = g.integers(0, 3, size=len(images)).tolist()
        ids = words[:2]
        for position in sorted(positions, reverse=True):
            ids.insert(position, IMAGE_TOKEN_ID)
        loss_mask = [0] * len(ids) + [1] * (len(words) - 2)
        samples.append((f"sample {number} 🥚", ids + words[2:], loss_mask, images))
    return samples


def write(out, *shards):
    return dataset.PreparedDataset(write_set(out, FINGERPRINT, *shards))


def expanded(ids, images):
    """A list of ids with each image token as often as its image has tokens."""
    counts, found = iter([len(tiles) * TOKENS for tiles, _, _ in images]), []
    for x in ids:
        found += [x] * (next(counts) if x == IMAGE_TOKEN_ID else 1)
    return found


# ---- what is written is what is read ----


@pytest.mark.parametrize("cuts", [[], [7], [0, 7, 7, 29, 30]])
def test_a_dataset_is_read_as_it_was_written_in_one_shard_or_in_many_or_empty_ones(tmp_path, cuts):
    samples = make_samples()
    read = write(
        tmp_path / "set", *(samples[start:end] for start, end in itertools.pairwise([0, *cuts, 30]))
    )
    assert read.names == [name for name, *_ in samples]
    for i, (_, ids, loss_mask, images) in enumerate(samples):
        ids_T, targets_T, found = read.read(i)
        assert ids_T.tolist() == expanded(ids, images)
        assert len(ids_T) == read.table[i, dataset.LENGTH]
        answer = [x for x, has_loss in zip(ids, loss_mask, strict=True) if has_loss]
        assert [x for x in targets_T.tolist() if x != IGNORE_INDEX] == answer
        for (tiles_NCYX, feature_index, size), wanted in zip(found, images, strict=True):
            assert np.array_equal(tiles_NCYX, wanted.tiles) and tiles_NCYX.dtype == np.uint8
            assert np.array_equal(feature_index, wanted.feature_index) and size == wanted.size


def test_several_datasets_are_read_one_after_another(tmp_path):
    first, second = make_samples(5), make_samples(7, seed=1)
    write(tmp_path / "a", first[:2], first[2:]), write(tmp_path / "b", second)
    read = dataset.PreparedDataset(tmp_path / "b", tmp_path / "a")
    assert (
        read.names == [name for name, *_ in second + first]
        and read.dataset_of.tolist() == [0] * 7 + [1] * 5
    )
    assert read.read(7)[0].tolist() == expanded(first[0][1], first[0][3])


def test_some_samples_are_written_as_a_dataset_of_their_own(tmp_path):
    read = write(tmp_path / "set", make_samples(9))
    dataset.write_subset(read, [7, 2, 3], tmp_path / "subset")
    subset = dataset.PreparedDataset(tmp_path / "subset")
    assert subset.names == [read.names[i] for i in (7, 2, 3)]
    for new, old in enumerate((7, 2, 3)):
        (ids, targets, images), (old_ids, old_targets, old_images) = (
            subset.read(new),
            read.read(old),
        )
        assert np.array_equal(ids, old_ids) and np.array_equal(targets, old_targets)
        for image, old_image in zip(images, old_images, strict=True):
            assert np.array_equal(image.tiles, old_image.tiles) and image.size == old_image.size


def test_a_dataset_of_version_2_is_read_by_its_old_names(tmp_path):
    now = write(tmp_path / "set", make_samples())
    for old, new in dataset.VERSION_2_FILES.items():
        (tmp_path / "set" / "00000" / new).rename(tmp_path / "set" / "00000" / old)
    header = (tmp_path / "set" / "header.json").read_text()
    names = {"policy": "image_config", "template": "chat_template"} | dataset.VERSION_2_FILES
    for old, new in names.items():
        header = header.replace(f'"{new}"', f'"{old}"')
    header = header.replace(f'"version": {dataset.DATASET_VERSION}', '"version": 2')
    (tmp_path / "set" / "header.json").write_text(header)
    old = dataset.PreparedDataset(tmp_path / "set")
    assert old.fingerprint == now.fingerprint and not dataset.verify_checksums(tmp_path / "set")
    for i in range(len(now.names)):
        (ids, targets, images), (old_ids, old_targets, old_images) = now.read(i), old.read(i)
        assert np.array_equal(ids, old_ids) and np.array_equal(targets, old_targets)
        for image, old_image in zip(images, old_images, strict=True):
            assert np.array_equal(image.tiles, old_image.tiles) and image.size == old_image.size


def test_ten_lines_of_numpy_read_a_dataset_as_the_format_says(tmp_path):
    """The example in the docstring of dataset.py, with another path and another size of a tile."""
    write(tmp_path, make_samples())
    code = "\n".join(line[4:] for line in dataset.__doc__.split("by numpy alone:")[1].splitlines())
    space = {"np": np}
    exec(code.replace("data/NAME", str(tmp_path)).replace("336", str(TILE)), space)
    _, ids, loss_mask, images = make_samples()[7]
    assert space["ids"].tolist() == ids and space["loss_mask"].tolist() == loss_mask
    assert (
        np.array_equal(space["pixels"], images[0].tiles)
        and (space["width"], space["height"]) == images[0].size
    )


def test_a_target_is_the_next_token_if_that_has_a_loss(tmp_path):
    image = make_image(np.random.default_rng(0), 1)
    ids_T, targets_T, _ = write(
        tmp_path / "set", [("one", [7, IMAGE_TOKEN_ID, 8, 9, 10, 11], [0, 0, 0, 1, 1, 0], [image])]
    ).read(0)
    assert ids_T.tolist() == [7, *[IMAGE_TOKEN_ID] * TOKENS, 8, 9, 10, 11]
    assert targets_T.tolist() == [IGNORE_INDEX] * 5 + [9, 10, IGNORE_INDEX, IGNORE_INDEX]


def test_a_dataset_may_have_more_shards_than_a_process_may_have_open_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        read = write(tmp_path / "set", *([sample] for sample in make_samples(60)))
        assert len(read.names) == len([read.read(i) for i in range(60)]) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@given(st.lists(st.integers(1, 9), max_size=5), st.integers(0, 3))
def test_expanding_repeats_each_image_by_its_own_count(counts, words):
    ids = [*range(words), IMAGE_TOKEN_ID] * len(counts)
    want = []
    for count in counts:
        want += [*range(words), *[IMAGE_TOKEN_ID] * count]
    assert dataset.expand_image_tokens(ids, counts).tolist() == want


@pytest.mark.parametrize("tokens, counts", [(2, [4]), (0, [4]), (1, []), (1, [4, 4])])
def test_image_tokens_and_images_that_differ_in_number_are_named_with_both(tokens, counts):
    with pytest.raises(UserError, match=f"{tokens} image tokens but {len(counts)} images"):
        dataset.expand_image_tokens([5, *[IMAGE_TOKEN_ID] * tokens], counts)


# ---- a shard is complete or missing ----


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def interrupted():
        yield from make_samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write_shard(tmp_path / "00000", IMAGE_CONFIG, interrupted())
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may not grow beyond this. Like a full disk, it is an OSError.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            dataset.write_shard(tmp_path / "00000", IMAGE_CONFIG, make_samples(300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


IMAGE = image_processing.ProcessedImage(
    np.zeros((1, 3, TILE, TILE), np.uint8), np.arange(TOKENS), (5, 7)
)


@pytest.mark.parametrize(
    "sample, message",
    [
        (("a\nb", [1], [1], []), r"'a\\nb' is not one line"),
        (("a\u2028b", [1], [1], []), "not one line"),
        (("\ud800", [1], [1], []), "not one line"),
        (("", [1], [1], []), "not one line"),
        (("x", [1, 2], [1], []), "x: 2 ids but a loss mask of 1"),
        (("x", [IMAGE_TOKEN_ID], [0], []), "1 image tokens but 0 images"),
        (("x", [IMAGE_TOKEN_ID], [0], [IMAGE, IMAGE]), "1 image tokens but 2 images"),
        (
            ("x", [IMAGE_TOKEN_ID], [0], [IMAGE._replace(tiles=IMAGE.tiles.astype(np.float32))]),
            "x: tiles are float32",
        ),
        (
            ("x", [IMAGE_TOKEN_ID], [0], [IMAGE._replace(tiles=IMAGE.tiles[..., :3])]),
            r"x: tiles are uint8 \[3, 6, 3\], the dataset's uint8 \[3, 6, 6\]",
        ),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_not_written(tmp_path, sample, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", [sample])
    assert not (tmp_path / "set").exists() or not os.listdir(tmp_path / "set")


# ---- a dataset that is not as it was written is refused ----


@pytest.mark.parametrize("kind", dataset.FILE_DTYPES)
@pytest.mark.parametrize("how", ["cut", "grown", "gone"])
def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path, kind, how):
    write(tmp_path / "set", make_samples(2), make_samples(5))
    path = tmp_path / "set" / "00001" / kind
    before = path.read_bytes()
    after = {"cut": before[:-1], "grown": before + b"\n", "gone": b""}[how]
    path.write_bytes(after) if after else path.unlink()
    with pytest.raises(
        UserError, match=f"{path} has {len(after)} bytes, its header has {len(before)}"
    ):
        dataset.PreparedDataset(tmp_path / "set")


@pytest.mark.parametrize("kind", dataset.FILE_DTYPES)
def test_a_single_altered_bit_is_named_by_its_file(tmp_path, kind):
    write(tmp_path / "set", make_samples(2), make_samples(5))
    assert dataset.verify_checksums(tmp_path / "set") == []
    path = tmp_path / "set" / "00001" / kind
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (message,) = dataset.verify_checksums(tmp_path / "set")
    assert str(path) in message


@pytest.mark.parametrize(
    "kind, place, value",
    [
        ("samples", (3, dataset.LENGTH), 2**55),
        ("samples", (3, dataset.LENGTH), 1),
        ("samples", (3, dataset.ID_COUNT), 2),
        ("samples", (slice(3, 5), dataset.FIRST_ID), 0),
        ("samples", (slice(3, 5),), slice(4, 2, -1)),  # two samples in the other order
        ("images", (1, 1), 2**55),
        ("images", (1, 0), 0),
        ("images", (slice(0, 2),), slice(1, None, -1)),  # two images in the other order
        ("ids", (0,), IMAGE_TOKEN_ID),
        ("names", (2,), ord("\n")),
    ],
)
def test_altered_tables_are_refused_with_the_command_that_names_the_file(
    tmp_path, kind, place, value
):
    read = write(tmp_path / "set", make_samples(9))
    assert read.stored_sample(0)[0][0] >= 0
    path = tmp_path / "set/00000" / kind
    table = np.fromfile(path, dataset.FILE_DTYPES[kind])
    if kind in ("samples", "images"):
        table = table.reshape(-1, {"samples": 6, "images": 4}[kind])
    table[place] = table[value] if isinstance(value, slice) else value
    table.tofile(path)
    with pytest.raises(
        UserError, match=rf"00000 has .*prepare.py check --data={tmp_path}/set` names"
    ):
        dataset.PreparedDataset(tmp_path / "set")
    with pytest.raises(UserError, match=f"{path}: its bytes have the checksum"):
        prepare.check(data=str(tmp_path / "set"))


@pytest.mark.parametrize("i", [-2, 500])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, i):
    path = tmp_path / "set/00000/ids"
    write(tmp_path / "set", make_samples(9)).check_ids(500)
    ids = np.fromfile(path, "<i4")
    ids[np.flatnonzero(ids >= 0)[-1]] = i
    ids.tofile(path)
    with pytest.raises(
        UserError, match=f"ids from .*{i}.* but the vocabulary has 500: see `python "
    ):
        dataset.PreparedDataset(tmp_path / "set").check_ids(500)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "header.json cannot be read"),
        ('{"version": 1', "header.json cannot be read"),
        ("[]", "header.json cannot be read"),
        ("{}", "header.json cannot be read"),
        ("\xff", "header.json cannot be read"),
        (
            json.dumps({"version": 1, "fingerprint": {}, "shards": []}),
            r"version is 1, this nanovlm reads \(2, 3, 4\)\): prepare it again",
        ),
        (json.dumps({"version": dataset.DATASET_VERSION}), "holds no fingerprint"),
        (
            json.dumps(
                {"version": dataset.DATASET_VERSION, "fingerprint": FINGERPRINT, "shards": []}
            ),
            "holds no samples",
        ),
    ],
)
def test_a_header_that_is_broken_or_of_another_version(tmp_path, text, message):
    (tmp_path / "header.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        dataset.PreparedDataset(tmp_path)


@pytest.mark.parametrize(
    "letters, other, message",
    [
        ('"image_config"', '"image_confik"', "KeyError: 'image_config'"),
        ('"fit"', '"fir"', "image config: fit is missing"),
        ('"samples"', '"simples"', "a shard has .*'simples'.*, it must have .*'samples'"),
        ('"fingerprint": {', '"fingerprint": 7, "lost": {', "cannot be read"),
        ('"shards": [', '"shards": [3, ', "cannot be read"),
        ('"tiles": [', '"tiles": [1.5, ', "cannot be read"),
        ('"tiles": [', '"tiles": ["x", ', "cannot be read"),
    ],
)
def test_a_header_of_which_a_letter_was_altered_is_named(tmp_path, letters, other, message):
    write(tmp_path / "set", make_samples(20))
    path = tmp_path / "set" / "header.json"
    text = path.read_text()
    assert letters in text
    path.write_text(text.replace(letters, other, 1))
    with pytest.raises(UserError, match=f"{path}.*{message}.*: prepare it again"):
        dataset.PreparedDataset(tmp_path / "set")


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_that_is_no_dataset(tmp_path, folder):
    with pytest.raises(UserError, match="it has no header.json"):
        dataset.PreparedDataset(tmp_path / folder)


@pytest.mark.parametrize(
    "other, message",
    [
        (
            FINGERPRINT | {"tokenizer": "xyz"},
            "another model: its tokenizer is abc, the model's xyz$",
        ),
        (
            FINGERPRINT | {"chat_template": "chatml"},
            "its chat_template is mistral, the model's chatml$",
        ),
        (
            FINGERPRINT | {"image_config": IMAGE_CONFIG | {"fit": "crop"}},
            "its image_config fit is tiles, the model's crop$",
        ),
        (
            FINGERPRINT | {"image_config": IMAGE_CONFIG | {"tile": 8, "mean": [0.4]}},
            r"image_config tile is 6, .* 8; its image_config mean is \[0.1, .*\], .* \[0.4\]$",
        ),
        (
            FINGERPRINT | {"image_config": IMAGE_CONFIG | {"grid": 12}},
            "its image_config grid is None, the model's 12$",
        ),
    ],
)
def test_a_dataset_of_another_model_is_refused_with_the_part_that_differs(tmp_path, other, message):
    read = write(tmp_path / "set", make_samples(2))
    read.check_fingerprint(json.loads(json.dumps(FINGERPRINT)))
    with pytest.raises(UserError, match=message):
        read.check_fingerprint(other)


def test_datasets_of_different_models_do_not_go_together(tmp_path):
    write(tmp_path / "a", make_samples(2))
    write_set(tmp_path / "b", FINGERPRINT | {"chat_template": "chatml"}, make_samples(2))
    with pytest.raises(
        UserError, match="b and .*a were prepared for different models: its chat_template is chatml"
    ):
        dataset.PreparedDataset(tmp_path / "a", tmp_path / "b")


# ---- validation samples ----


def test_validation_samples_are_chosen_by_a_hash_of_the_id_in_every_dataset(tmp_path):
    read = write(tmp_path / "set", make_samples(300))
    other = write(tmp_path / "other", make_samples(300, seed=1)[::-1])
    held_out = {read.names[i] for i in read.split(validation=True)}
    assert held_out == {other.names[i] for i in other.split(validation=True)}
    assert held_out == set(filter(dataset.is_validation, read.names)) and 0 < len(held_out) < 20
    assert set(read.split(False)) | set(read.split(True)) == set(range(300))


def test_one_sample_in_64_is_held_out():
    share = np.mean([dataset.is_validation(f"{number}") for number in range(64_000)])
    assert abs(share - 1 / 64) < 4 * (1 / 64 / 64_000) ** 0.5  # four standard deviations
    these = [number for number in range(300) if dataset.is_validation(f"{number}")]
    # A new version with another hash would train on them.
    assert these == [9, 79, 95, 98, 114, 130, 144, 169, 211, 233, 290]
