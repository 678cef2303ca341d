"""A file becomes the pixels that its maker saw, or a mistake that names it; pixels become the tiles that published eyes were trained on."""
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from nanovlm import Mistake, images

POLICY = {"tile": 24, "patch": 4, "shuffle": 2, "fit": "squash", "resample": "bicubic", "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.5] * 3}
SHAPES = [(24, 24), (50, 31), (31, 50), (100, 7), (7, 100), (23, 25), (9, 5), (1, 1), (1, 200), (200, 1), (30, 700), (700, 30)]


def noise(width, height, channels=3, seed=0, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def pixels(path):
    picture = images.open_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def saved(path, picture, **how):
    picture.save(path, **how)
    return path


def png(path, width, height, depth, kind, rows, *extra):
    """A PNG by its specification, for what Pillow reads but does not write; kind 0 is grey, 2 colour; rows: bytes of each row, or None."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    data = zlib.compress(b"".join(b"\0" + row for row in rows)) if rows else b""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]))
    return path


# ---- opening ----

@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_give_back_their_pixels(tmp_path, suffix):
    want = noise(17, 11)
    how = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(pixels(saved(tmp_path / f"a.{suffix}", Image.fromarray(want), **how)), want)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(tmp_path, suffix, orientation):
    """EXIF 2.32, 4.6.4 A: where the stored row 0 and column 0 lie in the upright picture."""
    upright = np.repeat(np.repeat(noise(3, 2), 16, 0), 16, 1)  # whole blocks of one colour, which even JPEG keeps nearly
    over = upright.swapaxes(0, 1)
    stored = {
        1: upright,              # top, left
        2: upright[:, ::-1],     # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],        # bottom, left
        5: over,                 # left, top
        6: over[::-1],           # right, top
        7: over[::-1, ::-1],     # right, bottom
        8: over[:, ::-1],        # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    found = pixels(saved(tmp_path / f"a.{suffix}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **how))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("name, prefix", [("a.png", None), ("little.tiff", "<u2"), ("big.tiff", ">u2"), ("wide.tiff", "<i4"), ("a.pgm", None)])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name, prefix):
    grey = np.array([[0, 255, 256, 32768, 65535, 40000]], dtype=np.uint16)
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 6 1 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey.astype(prefix or "<u2")).save(path)
    with Image.open(path) as stored:
        assert stored.mode in ("I", "I;16", "I;16B")
    assert pixels(path).tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255, 156)]]


def test_16_bit_grey_looks_like_the_same_grey_in_16_bit_colour(tmp_path):
    grey = noise(8, 5, channels=1, dtype=np.uint16).astype(">u2")
    one = png(tmp_path / "grey.png", 8, 5, 16, 0, [row.tobytes() for row in grey])
    three = png(tmp_path / "colour.png", 8, 5, 16, 2, [np.repeat(row, 3).tobytes() for row in grey])
    assert np.array_equal(pixels(one), pixels(three))


def test_grey_outside_16_bits_and_floats_are_refused(tmp_path):
    long, negative, real = np.array([[0, 65536]], np.int32), np.array([[-1, 5]], np.int32), np.ones((1, 2), np.float32)
    for values, said in [(long, "0 to 65536"), (negative, "-1 to 5"), (real, "float")]:
        with pytest.raises(Mistake, match=said):
            images.open_picture(saved(tmp_path / "a.tiff", Image.fromarray(values)))


def test_modes_without_transparency_keep_their_look(tmp_path):
    colour = Image.fromarray(noise(13, 9))
    palette, grey, bits = colour.quantize(16), colour.convert("L"), colour.convert("1")
    for picture in (palette, grey, bits):
        assert np.array_equal(pixels(saved(tmp_path / "a.png", picture)), np.asarray(picture.convert("RGB")))
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
    seen = [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]]  # an ink swallows its complement
    assert pixels(saved(tmp_path / "a.tiff", Image.fromarray(ink, "CMYK"))).tolist() == seen
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # as JPEG, which Adobe stores upside down
    assert np.abs(pixels(saved(tmp_path / "a.jpg", flat, quality=95)).astype(int) - [255, 0, 0]).max() <= 3


def test_transparent_pixels_lie_on_white(tmp_path):
    """Colour x alpha + white x (1 - alpha), the definition of compositing over white."""
    rgba, la = noise(13, 9, 4), noise(13, 9, 2)
    for pixels_YXC, path in [(rgba, saved(tmp_path / "rgba.png", Image.fromarray(rgba))), (la, saved(tmp_path / "la.png", Image.fromarray(la)))]:
        alpha = pixels_YXC[..., -1:] / 255
        assert np.abs(pixels(path) - (pixels_YXC[..., :-1] * alpha + 255 * (1 - alpha))).max() <= 1
    indices = noise(13, 9, 1) % 4
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    want = np.array([[10, 20, 30], [40, 50, 60], [255] * 3, [100, 110, 120]])[indices]
    for name, transparency in [("one.png", 2), ("table.png", b"\xff\xff\x00\xff"), ("one.gif", 2)]:
        assert np.array_equal(pixels(saved(tmp_path / name, palette, transparency=transparency)), want), name


@pytest.mark.parametrize("depth, kind, sample", [(8, 0, "B"), (16, 0, ">H"), (8, 2, "B"), (16, 2, ">H")])
def test_a_png_colour_that_stands_for_nothing_is_white(tmp_path, depth, kind, sample):
    channels = {0: 1, 2: 3}[kind]
    rows = [b"".join(struct.pack(sample, v) * channels for v in (5, 7, 9))]
    path = png(tmp_path / "a.png", 3, 1, depth, kind, rows, (b"tRNS", struct.pack(">H", 7) * channels))
    assert pixels(path)[0, 1].tolist() == [255] * 3
    assert pixels(path)[0, 0].max() <= 5


@pytest.mark.parametrize("depth, row, grey", [(2, 0b00_01_10_11, [0, 85, 170, 255]), (4, 0x17f4, [17, 119, 255, 68])])
def test_few_bits_of_grey_name_their_nothing_in_their_own_depth(tmp_path, depth, row, grey):
    for nothing in range(2**depth):
        path = png(tmp_path / "a.png", 4, 1, depth, 0, [row.to_bytes(depth // 2)], (b"tRNS", struct.pack(">H", nothing)))
        want = [255 if v == nothing * 255 / (2**depth - 1) else v for v in grey]
        assert pixels(path)[0, :, 0].tolist() == want, nothing


@pytest.mark.parametrize("kind, nothing", [(0, [0x0700]), (2, [0x0007, 0x0700, 0x0707])])
def test_all_16_bits_must_be_those_of_the_colour_that_stands_for_nothing(tmp_path, kind, nothing):
    values = np.random.default_rng(0).choice([0x0000, 0x0007, 0x0700, 0x0707], (20, 30, len(nothing)))
    rows = [row.astype(">u2").tobytes() for row in values]
    path = png(tmp_path / "a.png", 30, 20, 16, kind, rows, (b"tRNS", struct.pack(f">{len(nothing)}H", *nothing)))
    clear = (values == nothing).all(-1, keepdims=True)
    assert 0 < clear.sum() < 300
    assert np.array_equal(pixels(path), np.broadcast_to(np.where(clear, 255, values >> 8), (20, 30, 3)))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_animation_is_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    how = {"webp": {"lossless": True}}.get(suffix, {})
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **how)
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert pixels(path).reshape(-1, 3).tolist() == [[255, 0, 0]] * 96


@pytest.mark.parametrize("name, content, said", [
    ("missing.png", None, "No such file"),
    ("nul\0.png", None, "null byte"),
    ("empty.png", b"", r"empty \(0 bytes\)"),
    ("text.png", b"not a picture at all", "no picture that can be read here"),
    ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read here"),  # would run ghostscript
    ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture that can be read here"),
])
def test_what_is_no_picture_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Mistake, match=said) as caught:
        images.open_picture(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_system_says_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    saved(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    for name, said in [("loop.png", "symbolic links"), ("x" * 300, "too long"), ("a.png/b.png", "Not a directory")]:
        with pytest.raises(Mistake, match=said) as caught:
            images.open_picture(tmp_path / name)
        assert "broken" not in str(caught.value)


def test_more_transparencies_than_a_palette_can_have_are_named(tmp_path):
    """Pillow finds this only when it converts, after all was decoded."""
    path = png(tmp_path / "a.png", 2, 1, 8, 3, [b"\0\1"], (b"PLTE", bytes(6)), (b"tRNS", bytes(300)))
    with pytest.raises(Mistake, match="broken or cut short: palette"):
        images.open_picture(path)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(Mistake, match="is a folder"):
        images.open_picture(str(tmp_path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_locked_file_is_named(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    path.chmod(0)
    with pytest.raises(Mistake, match="Permission denied"):
        images.open_picture(path)


@pytest.mark.parametrize("width, height", [(10_001, 10_000), (20_000, 20_000), (60_000, 60_000)])  # Pillow warns of the first, refuses the others
def test_too_many_pixels_are_refused_by_the_header(tmp_path, width, height):
    path = png(tmp_path / "bomb.png", width, height, 8, 2, None)  # nothing behind the header that could be decoded
    with pytest.raises(Mistake) as caught:
        images.open_picture(path)
    assert str(caught.value) == f"{path} has {width * height:,} pixels, more than the 100,000,000 that are allowed"


def test_extreme_shapes_are_refused(tmp_path):
    assert pixels(saved(tmp_path / "a.png", Image.new("RGB", (400, 2)))).shape == (2, 400, 3)
    for size in [(401, 2), (2, 401)]:
        with pytest.raises(Mistake, match=f"{size[0]} x {size[1]}.*200 times"):
            images.open_picture(saved(tmp_path / "a.png", Image.new("RGB", size)))


def test_a_side_that_no_square_should_have_is_refused(tmp_path):
    """20,001 x 101 is few pixels, its square 400 million."""
    for size in [(20_001, 101), (101, 20_001)]:
        with pytest.raises(Mistake, match=f"{size[0]} x {size[1]} pixels, more than the 20,000 that a side may have"):
            images.open_picture(png(tmp_path / "a.png", *size, 8, 2, None))


def test_nothing_global_changes_and_no_warning_leaks(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("RGB", (15, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    before = list(warnings.filters)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pixels(path).shape == (10, 15, 3)
    assert not caught and warnings.filters == before and Image.MAX_IMAGE_PIXELS == 100


def encoded():
    """A small picture in every format that is read: {format: bytes}."""
    picture, exif, files = Image.fromarray(noise(20, 14)), Image.Exif(), {}
    exif[0x0112] = 6
    for name in images.FORMATS:
        how = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        picture.save(file := io.BytesIO(), name, **how)
        files[name] = file.getvalue()
    picture.save(file := io.BytesIO(), "TIFF", compression="tiff_lzw")
    return files | {"TIFF lzw": file.getvalue()}


FILES = encoded()


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_or_has_lost_no_pixel(tmp_path, name):
    whole, path, refused = FILES[name], tmp_path / "cut", 0
    path.write_bytes(whole)
    want = pixels(path)
    for length in sorted({*range(1, len(whole), max(1, len(whole) // 40)), len(whole) - 1}):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(pixels(path), want), length
        except Mistake as mistake:
            refused += 1
            assert str(path) in str(mistake)
    assert refused >= 30


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6), st.binary(max_size=8))
def test_corrupted_bytes_give_a_picture_or_a_mistake(tmp_path_factory, name, changes, tail):
    content = bytearray(FILES[name])
    for where, byte in changes:
        content[int(where**2 * len(content))] = byte  # squared: headers break in more ways than pixels
    path = tmp_path_factory.getbasetemp() / "corrupted"
    path.write_bytes(bytes(content) + tail)
    try:
        assert images.open_picture(path).mode == "RGB"
    except Mistake as mistake:
        assert str(path) in str(mistake)


# ---- counting ----

def test_a_tile_takes_its_patches_shuffled():
    assert images.tokens_per_tile({"tile": 336, "patch": 14, "shuffle": 1}) == 576  # LLaVA-1.5 with CLIP ViT-L/14@336
    assert images.tokens_per_tile({"tile": 448, "patch": 14, "shuffle": 2}) == 256  # InternVL
    assert images.tokens_per_tile({"tile": 64, "patch": 8, "shuffle": 2}) == 16
    assert images.picture_tokens((50, 40), POLICY) == 9


@pytest.mark.parametrize("change, said", [
    ({"patch": 5}, "24 pixels is not whole patches of 5"),
    ({"shuffle": 4}, r"6 patches across a tile \(24 pixels / 4\) do not shuffle by 4"),
    ({"tile": 0}, "tile 0"),
    ({"tile": 24.0}, "tile 24.0"),
    ({"shuffle": True}, "shuffle True"),
    ({"fit": "stretch"}, "fit 'stretch' is none of squash, pad, crop"),
    ({"resample": "nearest"}, "resample 'nearest' is none of bicubic, bilinear"),
    ({"mean": [0.5, 0.5]}, "mean"),
    ({"mean": [127.5] * 3}, "mean"),
    ({"mean": [float("nan")] * 3}, "mean"),
    ({"std": [0.5, 0.5, 0]}, "std"),
    ({"std": "0.5"}, "std"),
    ({"grid": 4}, "grid is not known"),
])
def test_a_policy_that_means_nothing_is_refused(change, said):
    images.check_policy(POLICY)
    with pytest.raises(Mistake, match=said):
        images.check_policy(POLICY | change)
    with pytest.raises(Mistake, match="fit is missing"):
        images.check_policy({name: value for name, value in POLICY.items() if name != "fit"})


# ---- cutting ----

@pytest.mark.parametrize("resample", images.FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_crop_is_clips(size, resample):
    picture, tile = Image.fromarray(noise(*size)), POLICY["tile"]
    clip = CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, resample=images.FILTERS[resample],
                                 do_rescale=False, do_normalize=False)
    want = clip(picture, return_tensors="np")["pixel_values"]
    assert np.array_equal(images.cut(picture, POLICY | {"fit": "crop", "resample": resample}), want)


@pytest.mark.parametrize("resample", images.FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_pad_is_llavas(size, resample):
    picture, tile, kind = Image.fromarray(noise(*size)), POLICY["tile"], images.FILTERS[resample]
    llava = LlavaImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, resample=kind,
                                   do_pad=True, do_rescale=False, do_normalize=False, image_mean=POLICY["mean"])
    found = images.cut(picture, POLICY | {"fit": "pad", "resample": resample})
    assert np.array_equal(found, llava(picture, return_tensors="np")["pixel_values"])
    square = Image.new("RGB", (max(size),) * 2, (122, 116, 104))  # LLaVA-1.5's grey
    square.paste(picture, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    assert np.array_equal(found[0], np.asarray(square.resize((tile, tile), kind)).transpose(2, 0, 1))


@pytest.mark.parametrize("resample", images.FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_squash_is_a_plain_resize(size, resample):
    picture = Image.fromarray(noise(*size))
    want = np.asarray(picture.resize((24, 24), images.FILTERS[resample]))
    found = images.cut(picture, POLICY | {"resample": resample})
    assert np.array_equal(found, want.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("fit", images.FITS)
def test_tiles_are_one_uint8_array_that_shows_the_file(tmp_path, fit):
    path, policy = saved(tmp_path / "a.png", Image.fromarray(noise(24, 24))), POLICY | {"fit": fit}
    tiles_NCYX = images.load_tiles(path, policy)
    assert tiles_NCYX.shape == (1, 3, 24, 24) and tiles_NCYX.dtype == np.uint8
    assert tiles_NCYX.flags.c_contiguous and tiles_NCYX.flags.writeable  # torch.from_numpy takes it without a copy or a warning
    assert np.array_equal(np.asarray(images.picture_of(tiles_NCYX[0])), noise(24, 24))


def test_resampling_matters():
    picture = Image.fromarray(noise(50, 31))
    assert len({images.cut(picture, POLICY | {"fit": f, "resample": r}).tobytes() for f in images.FITS for r in images.FILTERS}) == 6
