"""A file becomes the pixels that its maker saw, or a UserError that names it. Pixels become the
tiles that published vision encoders were trained on."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from nanovlm import UserError
from nanovlm.data import image_files, image_processing

IMAGE_CONFIG = {
    "tile": 24,
    "patch": 4,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.5] * 3,
}
SPLIT = {"fit": "split", "longest_edge": 90, "tile_texts": "idefics3"}
TILES = {"fit": "tiles", "tiles": 12, "choice": "aspect", "thumbnail": True, "tags": False}
SHAPES = [
    (24, 24),
    (50, 31),
    (31, 50),
    (100, 7),
    (7, 100),
    (23, 25),
    (9, 5),
    (1, 1),
    (1, 200),
    (200, 1),
    (30, 700),
    (700, 30),
]


def noise(width, height, channels=3, seed=0, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(
        0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True
    )


def pixels(path):
    image = image_files.read_image(path)[0]
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(path, image, **how):
    image.save(path, **how)
    return path


def cut(image, image_config, max_tiles=None):
    """The tiles of an RGB image."""
    return image_processing.process_image(image, image.size, image_config, max_tiles).tiles


def near(found, want, levels):
    """Whether two uint8 arrays have one shape and differ by at most so many levels of 255."""
    return found.shape == want.shape and np.abs(found.astype(int) - want).max() <= levels


def png(path, width, height, depth, kind, rows, *extra):
    """Write a PNG by its specification, because Pillow does not write all that it reads.

    kind: 0 is gray, 2 color; rows: bytes of each row, or None.
    """

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    data = zlib.compress(b"".join(b"\0" + row for row in rows)) if rows else b""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(chunk(*c) for c in [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")])
    )
    return path


# ---- opening ----


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_give_back_their_pixels(tmp_path, suffix):
    want = noise(17, 11)
    how = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(
        pixels(saved(tmp_path / f"a.{suffix}", Image.fromarray(want), **how)), want
    )


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(tmp_path, suffix, orientation):
    """EXIF 2.32, 4.6.4 A: where the stored row 0 and column 0 lie in the upright image."""
    # blocks of one color, which even JPEG nearly keeps
    upright = np.repeat(np.repeat(noise(3, 2), 16, 0), 16, 1)
    over = upright.swapaxes(0, 1)
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: over,  # left, top
        6: over[::-1],  # right, top
        7: over[::-1, ::-1],  # right, bottom
        8: over[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    found = pixels(
        saved(
            tmp_path / f"a.{suffix}",
            Image.fromarray(np.ascontiguousarray(stored)),
            exif=exif,
            **how,
        )
    )
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("a.png", None),
        ("little.tiff", "<u2"),
        ("big.tiff", ">u2"),
        ("wide.tiff", "<i4"),
        ("a.pgm", None),
    ],
)
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name, prefix):
    gray = np.array([[0, 255, 256, 32768, 65535, 40000]], dtype=np.uint16)
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 6 1 65535\n" + gray.astype(">u2").tobytes())
    else:
        Image.fromarray(gray.astype(prefix or "<u2")).save(path)
    with Image.open(path) as stored:
        assert stored.mode in ("I", "I;16", "I;16B")
    assert pixels(path).tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255, 156)]]


def test_16_bit_gray_is_the_same_gray_in_16_bit_color(tmp_path):
    gray = noise(8, 5, channels=1, dtype=np.uint16).astype(">u2")
    one = png(tmp_path / "gray.png", 8, 5, 16, 0, [row.tobytes() for row in gray])
    three = png(tmp_path / "color.png", 8, 5, 16, 2, [np.repeat(row, 3).tobytes() for row in gray])
    assert np.array_equal(pixels(one), pixels(three))


def test_gray_outside_16_bits_and_floats_are_refused(tmp_path):
    for values, message in [
        (np.array([[0, 65536]], np.int32), "0 to 65536"),
        (np.array([[-1, 5]], np.int32), "-1 to 5"),
        (np.ones((1, 2), np.float32), "float"),
    ]:
        with pytest.raises(UserError, match=message):
            image_files.read_image(saved(tmp_path / "a.tiff", Image.fromarray(values)))


def test_modes_without_transparency_keep_their_colors(tmp_path):
    color = Image.fromarray(noise(13, 9))
    palette, gray, bits = color.quantize(16), color.convert("L"), color.convert("1")
    for image in (palette, gray, bits):
        assert np.array_equal(
            pixels(saved(tmp_path / "a.png", image)), np.asarray(image.convert("RGB"))
        )
    ink = np.array(
        [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8
    )
    # an ink absorbs its complement
    colors = [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]]
    assert pixels(saved(tmp_path / "a.tiff", Image.fromarray(ink, "CMYK"))).tolist() == colors
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # in a JPEG Adobe stores it inverted
    assert (
        np.abs(pixels(saved(tmp_path / "a.jpg", flat, quality=95)).astype(int) - [255, 0, 0]).max()
        <= 3
    )


def test_transparent_pixels_lie_on_white(tmp_path):
    """color · alpha + white · (1 − alpha), the definition of compositing over white."""
    rgba, la = noise(13, 9, 4), noise(13, 9, 2)
    for pixels_YXC, path in [
        (rgba, saved(tmp_path / "rgba.png", Image.fromarray(rgba))),
        (la, saved(tmp_path / "la.png", Image.fromarray(la))),
    ]:
        alpha = pixels_YXC[..., -1:] / 255
        assert np.abs(pixels(path) - (pixels_YXC[..., :-1] * alpha + 255 * (1 - alpha))).max() <= 1
    indices = noise(13, 9, 1) % 4
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    want = np.array([[10, 20, 30], [40, 50, 60], [255] * 3, [100, 110, 120]])[indices]
    for name, transparency in [("one.png", 2), ("table.png", b"\xff\xff\x00\xff"), ("one.gif", 2)]:
        assert np.array_equal(
            pixels(saved(tmp_path / name, palette, transparency=transparency)), want
        ), name


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3)])
def test_the_transparent_color_of_a_png_is_white(tmp_path, kind, channels):
    rows = [b"".join(struct.pack("B", v) * channels for v in (5, 7, 9))]
    transparent = (b"tRNS", struct.pack(">H", 7) * channels)
    path = png(tmp_path / "a.png", 3, 1, 8, kind, rows, transparent)
    assert pixels(path)[0].tolist() == [[5] * 3, [255] * 3, [9] * 3]


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3)])
def test_a_png_of_16_bits_with_a_transparent_color_is_read(tmp_path, kind, channels):
    """The color does not count there, but the file is no error."""
    rows = [b"".join(struct.pack(">H", v) * channels for v in (0x500, 0x700, 0x900))]
    transparent = (b"tRNS", struct.pack(">H", 0x701) * channels)
    path = png(tmp_path / "a.png", 3, 1, 16, kind, rows, transparent)
    assert pixels(path)[0].tolist() == [[5] * 3, [7] * 3, [9] * 3]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_animation_is_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (12, 8), color) for color in ("red", "lime", "blue")]
    how = {"webp": {"lossless": True}}.get(suffix, {})
    path = saved(
        tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **how
    )
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert pixels(path).reshape(-1, 3).tolist() == [[255, 0, 0]] * 96


def png_chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6
TURNED = EXIF_TURNED.tobytes()[6:]
LONG = zlib.compress(bytes(3 << 20))
PROFILE = zlib.compress(np.random.default_rng(0).bytes(5 << 20))
NOTES = {
    "EXIF that is none": png_chunk(b"eXIf", b"no exif"),
    "EXIF with a wrong checksum": png_chunk(b"eXIf", TURNED.replace(b"\6", b"\1"), 1),
    "3 MB of zTXt": png_chunk(b"zTXt", b"a\0\0" + LONG),
    "3 MB of iTXt": png_chunk(b"iTXt", b"a\0\1\0\0\0" + LONG),
    "3 MB of tEXt": png_chunk(b"tEXt", b"a\0" + b"x" * (3 << 20)),
    "a profile of 5 MB": png_chunk(b"iCCP", b"a\0\0" + PROFILE),
    "a text with a wrong checksum": png_chunk(b"tEXt", b"a\0b", 1),
    "a text that is not packed": png_chunk(b"zTXt", b"a\0\0xxxx"),
    "a time with a wrong checksum": png_chunk(b"tIME", bytes(7), 1),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_the_notes_of_a_png_do_not_matter(tmp_path, name, place):
    """The same pixels, turned by the EXIF that is intact; a wrong checksum of pixels is an error."""
    image = Image.fromarray(noise(17, 11))
    plain = saved(tmp_path / "a.png", image).read_bytes()
    start = plain.index(place) - 4
    noted = plain[:start] + NOTES[name] + plain[start:]
    (tmp_path / "b.png").write_bytes(noted)
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "a.png"))
    assert image_files.open_image(noted, lambda image: image.size) == (17, 11)
    if "EXIF" not in name:
        turned = plain[:33] + png_chunk(b"eXIf", TURNED) + noted[33:]
        assert image_files.read_image(turned)[1] == (11, 17)
    with pytest.raises(UserError, match="no image|broken"):
        broken = bytearray(noted)
        broken[noted.index(b"IDAT") + 9] ^= 255
        image_files.read_image(bytes(broken))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0\0garbage", b"Exif\0\0" + bytes(20)])
def test_an_image_with_broken_exif_is_read(tmp_path, suffix, exif):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise(17, 11)), exif=exif)
    for size in (None, lambda size: (2, 2)):
        assert image_files.read_image(path, required_size=size)[1] == (17, 11)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_only_regular_files_are_opened(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{name}: not a regular file") as caught:
        image_files.read_image(tmp_path / name)
    assert caught.value.reason == "image cannot be read"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.png", None, "No such file"),
        ("nul\0.png", None, "null byte"),
        ("empty.png", b"", "not an image that can be read here"),
        ("text.png", b"not an image at all", "not an image that can be read here"),
        (
            "page.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image that can be read here",
        ),  # would run ghostscript
        (
            "page.svg",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "not an image that can be read here",
        ),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        image_files.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    reasons = {"missing.png": "image cannot be read", "nul\0.png": "image broken"}
    assert caught.value.reason == reasons.get(name, "no image")


def test_an_error_of_the_system_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    saved(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    for name, message in [
        ("loop.png", "symbolic links"),
        ("x" * 300, "too long"),
        ("a.png/b.png", "Not a directory"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            image_files.read_image(tmp_path / name)
        assert "broken" not in str(caught.value)


def test_more_transparencies_than_a_palette_can_have_are_named(tmp_path):
    """Pillow finds this only when it converts, after all was decoded."""
    path = png(
        tmp_path / "a.png", 2, 1, 8, 3, [b"\0\1"], (b"PLTE", bytes(6)), (b"tRNS", bytes(300))
    )
    with pytest.raises(UserError, match="broken or cut short, or too large: palette"):
        image_files.read_image(path)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"):
        image_files.read_image(str(tmp_path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_locked_file_is_named(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        image_files.read_image(path)


# Pillow warns of the first and refuses the others.
@pytest.mark.parametrize("width, height", [(10_001, 10_000), (20_000, 20_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_by_the_header(tmp_path, width, height):
    # nothing that could be decoded follows the header
    path = png(tmp_path / "bomb.png", width, height, 8, 2, None)
    with pytest.raises(UserError) as caught:
        image_files.read_image(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "pixels" in message
    if width < 20_000:
        assert f"is {width} x {height} pixels: an image may have 100,000,000 pixels" in message
    else:
        assert f"{width * height} pixels" in message


def test_extreme_shapes_are_refused(tmp_path):
    assert pixels(saved(tmp_path / "a.png", Image.new("RGB", (400, 2)))).shape == (2, 400, 3)
    for size in [(401, 2), (2, 401)]:
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]}.*200 times the other"):
            image_files.read_image(saved(tmp_path / "a.png", Image.new("RGB", size)))


def test_a_side_that_no_square_should_have_is_refused(tmp_path):
    """20,001 x 101 is few pixels, its square 400 million."""
    for size in [(20_001, 101), (101, 20_001)]:
        with pytest.raises(
            UserError, match=f"{size[0]} x {size[1]} pixels: .* 20,000 along a side"
        ):
            image_files.read_image(png(tmp_path / "a.png", *size, 8, 2, None))


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
    """A small image in every format that is read: {format: bytes}."""
    image, exif, files = Image.fromarray(noise(20, 14)), Image.Exif(), {}
    exif[0x0112] = 6
    for name in image_files.IMAGE_FORMATS:
        how = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        image.save(file := io.BytesIO(), name, **how)
        files[name] = file.getvalue()
    image.save(file := io.BytesIO(), "TIFF", compression="tiff_lzw")
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
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 30


@settings(max_examples=300, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.binary(max_size=8),
)
def test_corrupted_bytes_give_an_image_or_a_user_error(tmp_path_factory, name, changes, tail):
    content = bytearray(FILES[name])
    for where, byte in changes:
        # squared, because headers break in more ways than pixels
        content[int(where**2 * len(content))] = byte
    path = tmp_path_factory.getbasetemp() / "corrupted"
    path.write_bytes(bytes(content) + tail)
    try:
        assert image_files.read_image(path)[0].mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


# ---- JPEGs ----


def photo(width, height, seed=0):
    """Slow waves of color with a little noise, as photographs have."""
    wave = np.sin(
        np.arange(width)[None, :, None] / (30, 41, 53)
        + np.arange(height)[:, None, None] / (67, 43, 29)
        + seed
    )
    return Image.fromarray(
        (128 + 100 * wave + np.random.default_rng(seed).normal(0, 4, wave.shape))
        .clip(0, 255)
        .astype(np.uint8)
    )


def jpeg(image, **how):
    image.save(file := io.BytesIO(), "JPEG", **how)
    return file.getvalue()


def turned_jpeg(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


def ycck(width, height):
    """A JPEG of the kind that Photoshop writes: CMYK's inks turned to YCC and K. The last byte of
    Adobe's marker says so."""
    content = jpeg(photo(width, height).convert("CMYK"), quality=95)
    adobe = content.index(b"Adobe")
    return content[: adobe + 11] + b"\2" + content[adobe + 12 :]


JPEGS = {
    "L": jpeg(photo(96, 70).convert("L")),
    "4:4:4": jpeg(photo(96, 70), subsampling=0),
    "4:2:0": jpeg(photo(96, 70), subsampling=2),
    "progressive": jpeg(photo(96, 70), progressive=True),
    "CMYK": jpeg(photo(96, 70).convert("CMYK")),
    "YCCK": ycck(96, 70),
    **{f"turned {i}": turned_jpeg(photo(96, 70), i) for i in range(1, 9)},
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_of_every_mode_are_what_pillow_makes_of_them_upright(name):
    content = JPEGS[name]
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == {"L": "L", "CMYK": "CMYK", "YCCK": "CMYK"}.get(name, "RGB")
        turn = int(name[-1]) if name.startswith("turned") else 1
        turns = {
            2: "FLIP_LEFT_RIGHT",
            3: "ROTATE_180",
            4: "FLIP_TOP_BOTTOM",
            5: "TRANSPOSE",
            6: "ROTATE_270",
            7: "TRANSVERSE",
            8: "ROTATE_90",
        }
        upright = (
            stored.convert("RGB").transpose(Image.Transpose[turns[turn]])
            if turn > 1
            else stored.convert("RGB")
        )
    found = image_processing.load_image(content, IMAGE_CONFIG)
    assert found.size == upright.size == ((70, 96) if turn >= 5 else (96, 70))
    assert np.array_equal(np.asarray(image_files.read_image(content)[0]), np.asarray(upright))


@pytest.mark.parametrize("name", FILES)
def test_bytes_are_read_as_their_file_is(tmp_path, name):
    path = tmp_path / "a"
    path.write_bytes(FILES[name])
    assert np.array_equal(np.asarray(image_files.read_image(FILES[name])[0]), pixels(path))
    assert np.array_equal(
        image_processing.load_image(FILES[name], IMAGE_CONFIG).tiles,
        image_processing.load_image(path, IMAGE_CONFIG).tiles,
    )


@pytest.mark.parametrize(
    "content, message, reason",
    [
        (b"", "not an image that can be read here", "no image"),
        (b"text", "not an image that can be read here", "no image"),
        (FILES["JPEG"][:-60], "broken or cut short", "image broken"),
    ],
)
def test_an_error_about_bytes_names_their_image(content, message, reason):
    for name in (None, "a.tar, 000012.jpg"):
        with pytest.raises(UserError, match=f"^{name or 'the image'} .*{message}") as caught:
            image_processing.load_image(content, IMAGE_CONFIG, name=name)
        assert caught.value.reason == reason


def test_every_error_has_a_reason_to_be_counted_by(tmp_path):
    def reason(path):
        with pytest.raises(UserError) as caught:
            image_files.read_image(path)
        return caught.value.reason

    assert reason(tmp_path / "none.png") == reason(tmp_path) == "image cannot be read"
    for size in ((20_001, 101), (9_999, 11_000), (401, 2)):
        path = png(tmp_path / "a.png", *size, 8, 2, None)
        assert reason(path) == "image too large or too thin"
    assert reason(png(tmp_path / "a.png", 60_000, 60_000, 8, 2, None)) == "image broken"
    assert (
        reason(saved(tmp_path / "a.tiff", Image.fromarray(np.ones((1, 2), np.float32))))
        == "unsupported pixel format"
    )


# ---- draft ----


@pytest.mark.parametrize(
    "fit, to", [("squash", (24, 24)), ("crop", (30, 24)), ("pad", (24, 19)), ("tiles", (120, 48))]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_twice_as_large_as_needed_and_has_nearly_the_same_pixels(fit, to, orientation):
    """Within 4 levels, on a photograph. With pad the border moves by a quarter of a pixel. The
    features and the size are those of the whole image."""
    image_config = IMAGE_CONFIG | ({"fit": fit} if fit != "tiles" else TILES | {"tiles": 10})
    wide = {"tiles": (600, 240)}.get(fit, (600, 480))
    stored = photo(*wide) if orientation == 1 else photo(*wide).transpose(Image.Transpose.ROTATE_90)
    content = turned_jpeg(stored, orientation)
    whole, drafted = (
        image_processing.load_image(content, image_config),
        image_processing.load_image(content, image_config | {"draft": True}),
    )
    assert whole.size == drafted.size == wide and np.array_equal(
        whole.feature_index, drafted.feature_index
    )
    assert near(
        drafted.tiles, whole.tiles, levels=20 if fit == "pad" else 4
    ) and not np.array_equal(drafted.tiles, whole.tiles)
    assert image_processing.resized_size(wide, image_config) == to
    across, down = image_files.read_image(
        content, required_size=image_processing.required_size(image_config | {"draft": True})
    )[0].size
    assert across < wide[0] and across >= 2 * to[0] and down >= 2 * to[1]


def test_images_without_a_dct_or_not_large_enough_are_not_drafted():
    for image, how, image_config in [
        (photo(600, 480), "PNG", IMAGE_CONFIG),
        (photo(95, 95), "JPEG", IMAGE_CONFIG),
        (
            photo(600, 480),
            "JPEG",
            IMAGE_CONFIG | {"fit": "anyres", "pinpoints": [[48, 24], [24, 48]]},
        ),
    ]:
        image.save(file := io.BytesIO(), how)
        whole, drafted = (
            image_processing.load_image(file.getvalue(), image_config | {"draft": draft})
            for draft in (False, True)
        )
        assert near(drafted.tiles, whole.tiles, levels=2)


# ---- counting ----


def test_a_tile_takes_its_patches_shuffled():
    assert (
        image_processing.tokens_per_tile({"tile": 336, "patch": 14, "shuffle": 1}) == 576
    )  # LLaVA-1.5 with CLIP ViT-L/14@336
    assert (
        image_processing.tokens_per_tile({"tile": 448, "patch": 14, "shuffle": 2}) == 256
    )  # InternVL
    assert image_processing.tokens_per_tile({"tile": 64, "patch": 8, "shuffle": 2}) == 16
    assert len(image_processing.plan_image((50, 40), IMAGE_CONFIG).feature_index) == 9


def internvls_choice(size, tile, most, area_weighted=False):
    """(columns, rows) by InternVL's `dynamic_preprocess` and `find_closest_aspect_ratio`, or by
    Megatron-LM's area-weighted one, word for word."""
    width, height = size
    aspect_ratio, area = width / height, width * height
    ratios = {
        (i, j)
        for n in range(1, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= most and i * j >= 1
    }
    best_factor, best_difference, best = float("-inf"), float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda x: x[0] * x[1]):
        target = ratio[0] / ratio[1]
        difference = abs(aspect_ratio - target)
        factor = min((ratio[0] * ratio[1] * tile * tile) / area, 0.6) * min(
            target / aspect_ratio, aspect_ratio / target
        )
        if area_weighted and factor > best_factor:
            best_factor, best = factor, ratio
        elif not area_weighted and difference < best_difference:
            best_difference, best = difference, ratio
        elif (
            not area_weighted
            and difference == best_difference
            and area > 0.5 * tile * tile * ratio[0] * ratio[1]
        ):
            best = ratio
    return best


EDGES = [1, 2, 3, 7, 50, 99, 224, 336, 447, 448, 449, 640]
EDGES += [896, 1000, 1117, 1344, 1505, 2048, 2766, 3000, 4000]


@pytest.mark.parametrize("choice", image_processing.GRID_CHOICES)
@pytest.mark.parametrize("most", [12, 8, 6, 4, 2, 1])
def test_a_grid_is_the_reference_rules(choice, most):
    for tile in (336, 448):
        image_config = IMAGE_CONFIG | TILES | {"tile": tile, "choice": choice}
        for size in [(width, height) for width in EDGES for height in EDGES]:
            columns, rows = internvls_choice(size, tile, most, choice == "area")
            assert (
                image_processing.tile_grid(size, image_config | {"tiles": most})
                == image_processing.tile_grid(size, image_config, max_tiles=most)
                == (rows, columns)
            ), size
            # a limit never raises the image config's own
            assert image_processing.tile_grid(
                size, image_config | {"tiles": most}, max_tiles=20
            ) == (rows, columns)


def test_every_token_of_every_tile_is_counted_and_used(tmp_path):
    for change, limit, tiles in [
        ({}, None, 7),
        ({}, 4, 5),
        ({"thumbnail": False}, None, 6),
        ({}, 1, 1),
    ]:
        image_config, path = (
            IMAGE_CONFIG | TILES | change,
            saved(tmp_path / "a.png", Image.fromarray(noise(60, 40))),
        )
        image = image_processing.load_image(path, image_config, limit)
        assert (
            image_processing.tile_count((60, 40), image_config, limit) == tiles == len(image.tiles)
        )
        assert (
            image.feature_index.tolist() == list(range(tiles * 9))
            and len(image_processing.plan_image((60, 40), image_config, limit).feature_index)
            == tiles * 9
        )
        assert image.size == (60, 40)
        # the plan needs only the size of the image
        planned = image_processing.plan_image((60, 40), image_config, limit)
        assert (
            planned.size == image.size
            and np.array_equal(planned.feature_index, image.feature_index)
            and planned.tiles.shape == image.tiles.shape
        )


def megatrons_tile_tags(max_num_tiles):
    """The texts of `_get_tile_tags` in Megatron-LM's examples/multimodal/model.py, word for word,
    for the prompt formats mistral and chatml. Its models use the first tags and the last."""
    if max_num_tiles < 10:
        thumbnail_tag_text = "<tile_global_thumbnail>"
        return [f"<tile_{i}>" for i in range(1, max_num_tiles + 1)] + [thumbnail_tag_text]
    thumbnail_tag_text = "<tile_global_thumbnail0>"
    return [f"<tile_{i:02d}>" for i in range(1, max_num_tiles + 1)] + [thumbnail_tag_text]


@pytest.mark.parametrize("most", [1, 6, 9, 10, 12])
def test_tags_are_megatrons(most):
    image_config = IMAGE_CONFIG | TILES | {"tags": True, "tiles": most}
    numbers, last = megatrons_tile_tags(most)[:-1], megatrons_tile_tags(most)[-1]
    for tiles in range(1, most + 2):  # one tile is the whole image
        tags = image_processing.tile_tags(tiles, image_config)
        assert tags == [*numbers[: tiles - 1], last, ""]
    without = image_config | {"thumbnail": False}
    assert image_processing.tile_tags(most, without) == [*numbers, ""]
    for change in ({"tags": False}, {"fit": "crop", "tags": False}):
        assert image_processing.tile_tags(3, image_config | change) is None


def test_texts_of_split_images_number_rows_and_columns():
    """24 × 20 pixels become 90 × 76, then 96 × 96, which are four by four tiles of 24 pixels."""
    image_config, beside = IMAGE_CONFIG | SPLIT, "<fake_token_around_image>"
    texts = image_processing.tile_tags(17, image_config, (24, 20))
    assert texts[:2] == [f"{beside}<row_1_col_1>", f"{beside}<row_1_col_2>"]
    assert texts[4] == f"\n{beside}<row_2_col_1>"
    assert texts[16:] == [f"\n\n{beside}<global-img>", beside] and len(texts) == 18
    texts = image_processing.tile_tags(1, image_config | {"longest_edge": 24}, (24, 20))
    assert texts == [f"{beside}<global-img>", beside]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch": 25}, "0 patches of 25 pixels across a tile of 24"),
        ({"shuffle": 4}, "6 patches of 4 pixels across a tile of 24 do not shuffle by 4"),
        ({"tile": 0}, "tile 0"),
        ({"tile": 24.0}, "tile 24.0"),
        ({"shuffle": True}, "shuffle True"),
        ({"fit": "stretch"}, "fit 'stretch' is not one of squash, pad, crop, tiles, anyres"),
        ({"resample": "nearest"}, "resample 'nearest' is not one of bicubic, bilinear"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [127.5] * 3}, "mean"),
        ({"mean": [float("nan")] * 3}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"std": "0.5"}, "std"),
        ({"grid": 4}, "grid is not known"),
        ({"draft": 1}, "draft 1 is not one of True, False"),
        ({"tiles": 6}, "tiles is not known"),  # only fit=tiles has it
        ({"fit": "anyres"}, "pinpoints is missing"),
        ({"fit": "anyres", "pinpoints": []}, "pinpoints is not a list of heights and widths"),
        (
            {"fit": "anyres", "pinpoints": [[24, 30]]},
            "pinpoints is not a list of heights and widths",
        ),
        (
            {"fit": "anyres", "pinpoints": [[24], 24]},
            "pinpoints is not a list of heights and widths",
        ),
        ({"fit": "anyres", "pinpoints": "24"}, "pinpoints is not a list of heights and widths"),
        (
            {"fit": "tiles"},
            "tiles is missing; choice is missing; thumbnail is missing; tags is missing",
        ),
        (TILES | {"tiles": 0}, "tiles 0 is not a whole number from 1 on"),
        (TILES | {"choice": "best"}, "choice 'best' is not one of aspect, area"),
        (TILES | {"thumbnail": "yes"}, "thumbnail 'yes' is not one of True, False"),
        (TILES | {"tags": None}, "tags None is not one of True, False"),
        ({"fit": "split"}, "longest_edge is missing; tile_texts is missing"),
        (SPLIT | {"longest_edge": 0}, "longest_edge 0 is not a whole number from 1 on"),
        (SPLIT | {"longest_edge": 8192, "tile": 8192}, "tiles of an image have more than"),
        (SPLIT | {"tile_texts": "idefics2"}, "tile_texts 'idefics2' is not one of idefics3"),
    ],
)
def test_an_invalid_image_config_is_refused(change, message):
    anyres = {"fit": "anyres", "pinpoints": [[24, 48], [48, 24]]}
    for good in ({}, {"draft": True}, TILES, anyres, SPLIT):
        good = IMAGE_CONFIG | good
        image_processing.check_image_config(good)
    with pytest.raises(UserError, match=message):
        image_processing.check_image_config(IMAGE_CONFIG | change)
    with pytest.raises(UserError, match="fit is missing"):
        image_processing.check_image_config(
            {name: value for name, value in IMAGE_CONFIG.items() if name != "fit"}
        )


# ---- cutting ----


@pytest.mark.parametrize("resample", image_processing.RESAMPLE_FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_crop_is_clips(size, resample):
    image, tile = Image.fromarray(noise(*size)), IMAGE_CONFIG["tile"]
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        resample=image_processing.RESAMPLE_FILTERS[resample],
        do_rescale=False,
        do_normalize=False,
    )
    want = clip(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(cut(image, IMAGE_CONFIG | {"fit": "crop", "resample": resample}), want)


@pytest.mark.parametrize("resample", image_processing.RESAMPLE_FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_pad_is_llavas(size, resample):
    image, tile, kind = (
        Image.fromarray(noise(*size)),
        IMAGE_CONFIG["tile"],
        image_processing.RESAMPLE_FILTERS[resample],
    )
    llava = LlavaImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        resample=kind,
        do_pad=True,
        do_rescale=False,
        do_normalize=False,
        image_mean=IMAGE_CONFIG["mean"],
    )
    found = cut(image, IMAGE_CONFIG | {"fit": "pad", "resample": resample})
    assert np.array_equal(found, llava(image, return_tensors="np")["pixel_values"])
    square = Image.new("RGB", (max(size),) * 2, (122, 116, 104))  # LLaVA-1.5's gray
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    assert np.array_equal(
        found[0], np.asarray(square.resize((tile, tile), kind)).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("resample", image_processing.RESAMPLE_FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_squash_is_a_plain_resize(size, resample):
    image = Image.fromarray(noise(*size))
    want = np.asarray(image.resize((24, 24), image_processing.RESAMPLE_FILTERS[resample]))
    found = cut(image, IMAGE_CONFIG | {"resample": resample})
    assert np.array_equal(found, want.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("fit", [*image_processing.FITS, "tiles"])
def test_tiles_are_one_uint8_array_with_the_pixels_of_the_file(tmp_path, fit):
    path, image_config = (
        saved(tmp_path / "a.png", Image.fromarray(noise(24, 24))),
        IMAGE_CONFIG | TILES | {"fit": fit},
    )
    tiles_NCYX = image_processing.load_image(path, image_config).tiles
    assert tiles_NCYX.shape == (1, 3, 24, 24) and tiles_NCYX.dtype == np.uint8
    # so torch.from_numpy takes it without a copy or a warning
    assert tiles_NCYX.flags.c_contiguous and tiles_NCYX.flags.writeable
    assert np.array_equal(np.asarray(image_processing.tile_to_image(tiles_NCYX[0])), noise(24, 24))


def test_resampling_matters():
    image, found = Image.fromarray(noise(50, 31)), set()
    for fit in image_processing.FITS:
        for resample in image_processing.RESAMPLE_FILTERS:
            found.add(cut(image, IMAGE_CONFIG | {"fit": fit, "resample": resample}).tobytes())
    assert len(found) == 9


EDGE = st.sampled_from([1, 2, 3, 5, 17, 24, 64, 101, 224, 333, 600])


@settings(max_examples=150, derandomize=True, database=None)
@given(
    EDGE,
    EDGE,
    EDGE.filter(lambda columns: columns > 1),  # torch without AVX2 gets a width of one wrong
    EDGE,
    st.sampled_from(sorted(image_processing.RESAMPLE_FILTERS)),
)
def test_resizing_is_pillows_and_within_two_levels_with_draft(
    width, height, columns, rows, resample
):
    """Smaller or larger, height or width first, lines of one pixel; noise is the worst case."""
    image, config = noise(width, height), IMAGE_CONFIG | {"resample": resample}
    want = Image.fromarray(image).resize(
        (columns, rows), image_processing.RESAMPLE_FILTERS[resample]
    )
    found, drafted = (
        image_processing.resize_image(image, (columns, rows), config | {"draft": draft})
        for draft in (False, True)
    )
    assert np.array_equal(found, np.asarray(want).transpose(2, 0, 1))
    assert near(drafted, found, levels=2)


def test_a_color_gradient_is_resized_as_by_pillow():
    """With draft, 17% of these numbers differ by one level and 0.65% by two, with AVX2."""
    y, x = np.mgrid[:480, :640]
    gradient = np.stack([x, y, x + y], -1).astype(np.uint8)
    want = Image.fromarray(gradient).resize((448, 336), Image.Resampling.BICUBIC)
    found, drafted = (
        image_processing.resize_image(gradient, (448, 336), IMAGE_CONFIG | {"draft": draft})
        for draft in (False, True)
    )
    assert np.array_equal(found, np.asarray(want).transpose(2, 0, 1))
    assert near(drafted, found, levels=2)


@pytest.mark.parametrize("size", [(640, 480), (480, 640)])
def test_resizing_is_the_same_on_any_count_of_threads_and_in_a_batch(size):
    pixels_YXC, before = noise(*size), torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        config = IMAGE_CONFIG | {"draft": True}
        found.append(image_processing.resize_image(pixels_YXC, (336, 336), config))
    torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    if size == (640, 480):  # its width is resized first, as F.interpolate does
        batch = torch.from_numpy(np.stack([noise(*size, seed=1), pixels_YXC])).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(batch, (336, 336), mode="bicubic", antialias=True)
        assert np.array_equal(resized[1].numpy(), found[0])


@pytest.mark.parametrize("resample", image_processing.RESAMPLE_FILTERS)
@pytest.mark.parametrize("size", SHAPES)
def test_tiles_are_pillows_resize_and_crop(size, resample):
    """InternVL's `dynamic_preprocess`: squashed to the grid and cut row by row. The whole image is
    the last tile if there are several."""
    image, image_config, tile = (
        Image.fromarray(noise(*size)),
        IMAGE_CONFIG | TILES | {"resample": resample},
        24,
    )
    columns, rows = internvls_choice(size, tile, 12)
    squashed, parts = (
        image.resize((columns * tile, rows * tile), image_processing.RESAMPLE_FILTERS[resample]),
        [],
    )
    for i in range(columns * rows):
        left, top = i % columns * tile, i // columns * tile
        parts.append(squashed.crop((left, top, left + tile, top + tile)))
    parts += [image.resize((tile, tile), image_processing.RESAMPLE_FILTERS[resample])] * (
        len(parts) > 1
    )
    want = np.stack([np.asarray(part).transpose(2, 0, 1) for part in parts])
    assert np.array_equal(cut(image, image_config), want)
    assert np.array_equal(cut(image, image_config | {"thumbnail": False}), want[: columns * rows])


@pytest.mark.parametrize("size", SHAPES)
def test_tiles_are_those_of_internvl_in_transformers(size):
    image = Image.fromarray(noise(*size))
    theirs = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        size={"height": 24, "width": 24},
        resample=3,
        do_rescale=False,
        do_normalize=False,
    )
    assert np.array_equal(
        cut(image, IMAGE_CONFIG | TILES), theirs(image, return_tensors="np")["pixel_values"]
    )


def test_a_limit_makes_fewer_tiles_of_the_same_image():
    image, image_config = Image.fromarray(noise(96, 72)), IMAGE_CONFIG | TILES
    assert [len(cut(image, image_config, limit)) for limit in (None, 12, 8, 6, 4, 2, 1)] == [
        13,
        13,
        7,
        7,
        5,
        1,
        1,
    ]
    assert np.array_equal(
        cut(image, image_config, 1), cut(image, IMAGE_CONFIG)
    )  # one tile is the image, squashed


def test_patches_need_not_fill_a_tile():
    """SigLIP so400m: 27 × 27 patches of 14 pixels in a tile of 384."""
    config = IMAGE_CONFIG | {"tile": 384, "patch": 14, "shuffle": 3}
    image_processing.check_image_config(config)
    assert len(image_processing.plan_image((500, 400), config).feature_index) == 81
