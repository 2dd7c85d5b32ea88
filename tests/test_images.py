"""`prepare_image`: each way in which bytes fail has its own error, and each kind of image has the right pixels.

Covers limits, damage, transparency, more than 8 bits, CMYK, EXIF orientation, animation, which files travel as they
are, and shrinking.
Not covered: decoders that hang, crash or eat memory, which `test_sandbox` has.
"""

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.errors import SampleError
from pipeline.images import FORMATS, ImageLimits, open_prepared, prepare_image, to_rgb
from pipeline.records import EncodedImage
from pipeline.tiling import R4B_TILING, Tiling
from tests.builders import encode, png_bytes

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, max_frames=10)
ROOMY = ImageLimits(kept_bytes=0, lossless_pixels=1 << 30)
"""Whatever must not travel as it is becomes a PNG."""
SMALL_TILES = Tiling(tuple((56 * rows, 56 * columns) for rows in range(1, 7) for columns in range(1, 7)), 56, 14)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def decode(data: bytes | None) -> Image.Image:
    """As an engine sees it."""
    prepared = prepare_image(data, LIMITS)
    image = open_prepared(prepared)
    assert image.mode == "RGB"
    assert image.size == (prepared.width, prepared.height)
    return image


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    color = image.getpixel((x, y))
    assert isinstance(color, tuple)
    return color


def noise(width: int = 64, height: int = 64) -> Image.Image:
    """An image that no format makes small, so that a cut falls into its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def crafted_png(width: int, height: int, pixels: bytes, bits: int = 8) -> bytes:
    """An RGB PNG that says what it likes of its size."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif_with_small_screen(side: int) -> bytes:
    data = encode(Image.new("L", (side, side)), "GIF")
    return data[:6] + struct.pack("<HH", 5, 5) + data[10:]


def tiff_with_tile(side: int) -> bytes:
    """An uncompressed gray TIFF whose only tile is far larger than its 10 x 10 pixels."""
    size = {256: 10, 257: 10, 258: 8, 259: 1, 262: 1, 277: 1}
    tags = {**size, 322: side, 323: side, 324: 8, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(104)


def webp_on_canvas(canvas: int, side: int = 10) -> bytes:
    """A WebP with a header of its own in front, as files with metadata have it."""
    inner = encode(Image.new("RGB", (side, side)), "WEBP", lossless=True)[12:]
    outer = b"VP8X" + struct.pack("<II", 10, 0) + (canvas - 1).to_bytes(3, "little") * 2 + inner
    return b"RIFF" + struct.pack("<I", 4 + len(outer)) + b"WEBP" + outer


def jpeg2000_called_small(side: int) -> bytes:
    data = encode(Image.new("RGB", (side, side)), "JPEG2000")
    at = data.index(b"ihdr") + 4
    return data[:at] + struct.pack(">II", 10, 10) + data[at + 8 :]


def frames(file_format: str, count: int) -> bytes:
    """An animation, or a file of pages, of small pictures that all differ."""
    pictures = [Image.new("RGB", (8, 8), (250, 23 * number, 7)) for number in range(count)]
    return encode(pictures[0], file_format, save_all=True, append_images=pictures[1:])


def cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def flipped(data: bytes, first: int, count: int = 40) -> bytes:
    """The data with some bytes inverted."""
    return data[:first] + bytes(255 - byte for byte in data[first : first + count]) + data[first + count :]


# name, bytes, error_type
BAD: list[tuple[str, Callable[[], bytes | None], str]] = [
    ("null", lambda: None, "image_null"),
    ("no bytes", lambda: b"", "image_empty"),
    ("one byte too many", lambda: png_bytes() + bytes(LIMITS.max_bytes), "image_too_many_bytes"),
    ("text", lambda: b"this is not a PNG\nbut a text of two lines", "image_unrecognized"),
    ("a web page", lambda: b"<!DOCTYPE html><html>404</html>", "image_unrecognized"),
    ("a PDF, which Pillow could only write", lambda: b"%PDF-1.7\n%\xe2\xe3", "image_unrecognized"),
    ("an EPS, which would start Ghostscript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "image_unrecognized"),
    ("an EPS that Pillow wrote", lambda: encode(noise(), "EPS"), "image_unrecognized"),
    ("an ICO, a kind of image that is not taken", lambda: encode(noise(), "ICO"), "image_unrecognized"),
    ("a TGA, which has no signature", lambda: encode(noise(), "TGA"), "image_unrecognized"),
    ("only the PNG signature", lambda: b"\x89PNG\r\n\x1a\n", "image_unrecognized"),
    ("truncated JPEG", lambda: cut(encode(noise(), "JPEG")), "image_truncated"),
    ("JPEG without its last bytes", lambda: encode(noise(), "JPEG")[:-400], "image_truncated"),
    ("truncated PNG", lambda: cut(encode(noise())), "image_truncated"),
    ("truncated GIF", lambda: cut(encode(noise(), "GIF")), "image_truncated"),
    ("truncated BMP", lambda: cut(encode(noise(), "BMP")), "image_truncated"),
    ("60,000 x 60,000 pixels", lambda: crafted_png(60_000, 60_000, zlib.compress(b"")), "image_too_many_pixels"),
    ("one row too many", lambda: crafted_png(1000, 1001, zlib.compress(b"")), "image_too_many_pixels"),
    ("a GIF whose frame is larger than its screen", lambda: gif_with_small_screen(2000), "image_too_many_pixels"),
    ("a TIFF of 10 x 10 pixels in one huge tile", lambda: tiff_with_tile(60_000), "image_too_many_pixels"),
    ("a WebP that names a huge canvas around a small one", lambda: webp_on_canvas(16_383), "image_too_many_pixels"),
    ("a WebP that names a small canvas around a large one", lambda: webp_on_canvas(10, 4000), "image_corrupt"),
    ("a JPEG2000 whose header names fewer pixels", lambda: jpeg2000_called_small(2000), "image_corrupt"),
    ("a GIF of eleven frames", lambda: frames("GIF", 11), "image_too_many_frames"),
    ("an animated PNG of eleven frames", lambda: frames("PNG", 11), "image_too_many_frames"),
    ("an animated WebP of eleven frames", lambda: frames("WEBP", 11), "image_too_many_frames"),
    ("a TIFF of eleven pages", lambda: frames("TIFF", 11), "image_too_many_frames"),
    ("zero pixels wide", lambda: crafted_png(0, 5, zlib.compress(b"")), "image_unrecognized"),
    ("no zlib data", lambda: crafted_png(8, 8, b"no zlib data at all, but many words"), "image_corrupt"),
    ("damaged PNG header", lambda: flipped(png_bytes(), 18, 2), "image_unrecognized"),
    ("damaged JPEG tables", lambda: flipped(encode(noise(), "JPEG"), 170, 3), "image_corrupt"),
    ("WEBP of a header only", lambda: cut(encode(noise(), "WEBP"), 0.1), "image_corrupt"),
]


@pytest.mark.parametrize(("data", "error_type"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_prepare_image_bad_bytes_give_their_error_in_one_line(
    data: Callable[[], bytes | None], error_type: str
) -> None:
    with pytest.raises(SampleError) as caught:
        decode(data())
    assert caught.value.error_type == error_type
    assert caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.message.splitlines() == [caught.value.message]


def test_prepare_image_each_kind_of_failure_has_its_own_error_type() -> None:
    assert {case[2] for case in BAD} == {
        "image_null",
        "image_empty",
        "image_too_many_bytes",
        "image_too_many_pixels",
        "image_too_many_frames",
        "image_unrecognized",
        "image_truncated",
        "image_corrupt",
    }


@pytest.mark.parametrize("first", [60, 400, 4000])
def test_prepare_image_damaged_png_pixels_are_corrupt_or_truncated(first: int) -> None:
    with pytest.raises(SampleError) as caught:
        decode(flipped(encode(noise()), first))
    assert caught.value.error_type in ("image_corrupt", "image_truncated")


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "JPEG2000", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_prepare_image_cut_file_of_any_format_is_a_sample_error(file_format: str, share: float) -> None:
    with pytest.raises(SampleError):
        decode(cut(encode(noise(), file_format), share))


def test_prepare_image_huge_header_is_refused_before_pixels_are_allocated() -> None:
    data = crafted_png(60_000, 60_000, zlib.compress(bytes(1000)))
    assert len(data) < 200
    start = time.process_time()
    with pytest.raises(SampleError, match=r"60000 x 60000 pixels, the limit is 1000000 pixels"):
        decode(data)
    assert time.process_time() - start < 1.0  # 10.8 GB of pixels take longer, where they fit at all


@pytest.mark.parametrize("file_format", FORMATS)
def test_prepare_image_of_a_format_that_is_not_allowed_is_refused_by_name(file_format: str) -> None:
    others = ImageLimits(formats=tuple(name for name in FORMATS if name != file_format))
    for data in (encode(noise(), file_format), encode(noise(), file_format)[:100]):  # refused by its first bytes
        with pytest.raises(SampleError, match=rf"is a {file_format} file; the formats allowed are {others.formats[0]}"):
            prepare_image(data, others)
    assert prepare_image(encode(noise(), file_format), ImageLimits(formats=(file_format,))).width == 64


def test_prepare_image_of_many_pictures_in_one_jpeg_counts_as_jpeg() -> None:
    data = encode(noise(), "MPO", save_all=True, append_images=[noise()])
    image = prepare_image(data, ImageLimits(formats=("JPEG",)))
    assert open_prepared(image).size == (64, 64)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_prepare_image_of_as_many_frames_as_allowed_is_its_first(file_format: str) -> None:
    assert pixel(decode(frames(file_format, 10)), 4, 4) == pytest.approx((250, 0, 7), abs=6)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF"])
def test_prepare_image_with_a_damaged_later_frame_is_its_first(file_format: str) -> None:
    data = frames(file_format, 3)
    assert decode(data[: int(len(data) * 0.8)]).size == (8, 8)


def test_prepare_image_at_its_limits_decodes() -> None:
    data = png_bytes(size=(20, 10))
    image = prepare_image(data, ImageLimits(max_bytes=len(data), max_pixels=200, max_frames=1))
    assert (image.width, image.height) == (20, 10)
    with pytest.raises(SampleError, match=f"more than {len(data) - 1} bytes"):
        prepare_image(data, ImageLimits(max_bytes=len(data) - 1, max_pixels=200))
    with pytest.raises(SampleError, match="20 x 10 pixels, the limit is 199"):
        prepare_image(data, ImageLimits(max_bytes=len(data), max_pixels=199))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_prepare_image_every_format_gives_its_colors_row_by_row(file_format: str) -> None:
    drawn = Image.new("RGB", (40, 24), (220, 40, 40))
    drawn.paste((40, 60, 220), (20, 0, 40, 24))
    image = decode(encode(drawn, file_format))
    assert (image.width, image.height) == (40, 24)
    assert pixel(image, 4, 20) == pytest.approx((220, 40, 40), abs=12)
    assert pixel(image, 36, 20) == pytest.approx((40, 60, 220), abs=12)


def half_transparent_palette() -> Image.Image:
    """Index 0 red and fully transparent, index 1 green."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    return image


# name, bytes, the first pixel, the second pixel
COLORS: list[tuple[str, Callable[[], bytes], tuple[int, int, int], tuple[int, int, int]]] = [
    (
        "RGBA: transparent red is white, half transparent black is gray",
        lambda: encode(Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8), "RGBA")),
        WHITE,
        (127, 127, 127),
    ),
    (
        "LA: transparent black is white, opaque gray stays",
        lambda: encode(Image.fromarray(np.array([[[0, 0], [90, 255]]], np.uint8), "LA")),
        WHITE,
        (90, 90, 90),
    ),
    (
        "palette with a transparent color",
        lambda: encode(half_transparent_palette(), transparency=0),
        WHITE,
        (0, 200, 0),
    ),
    (
        "palette with an alpha for each color",
        lambda: encode(half_transparent_palette(), transparency=b"\x00\x80"),
        WHITE,
        (127, 227, 127),
    ),
    (
        "palette of a GIF with a transparent color",
        lambda: encode(half_transparent_palette(), "GIF", transparency=0),
        WHITE,
        (0, 200, 0),
    ),
    (
        "RGB with a transparent color",
        lambda: encode(Image.fromarray(np.array([[[9, 8, 7], [0, 200, 0]]], np.uint8)), transparency=(9, 8, 7)),
        WHITE,
        (0, 200, 0),
    ),
    (
        "gray with a transparent level",
        lambda: encode(Image.fromarray(np.array([[5, 90]], np.uint8)), transparency=5),
        WHITE,
        (90, 90, 90),
    ),
    ("gray", lambda: encode(Image.fromarray(np.array([[0, 90]], np.uint8))), BLACK, (90, 90, 90)),
    ("1 bit", lambda: encode(Image.fromarray(np.array([[False, True]]))), BLACK, WHITE),
    (
        "16-bit gray PNG",
        lambda: encode(Image.fromarray(np.array([[32768, 65535]], np.uint16))),
        (128, 128, 128),
        WHITE,
    ),
    (
        "16-bit gray PNG, dark as can be",
        lambda: encode(Image.fromarray(np.array([[0, 1]], np.uint16))),
        BLACK,
        BLACK,
    ),
    (
        "16-bit gray PNG, no level above 255",
        lambda: encode(Image.fromarray(np.array([[0, 250]], np.uint16))),
        BLACK,
        (1, 1, 1),
    ),
    (
        "16-bit gray TIFF",
        lambda: encode(Image.fromarray(np.array([[32768, 65535]], np.uint16)), "TIFF"),
        (128, 128, 128),
        WHITE,
    ),
    (
        "float TIFF from 0 to 1",
        lambda: encode(Image.fromarray(np.array([[0.5, 1.0]], np.float32)), "TIFF"),
        (128, 128, 128),
        WHITE,
    ),
    (
        "float TIFF with a hole in it",
        lambda: encode(Image.fromarray(np.array([[np.nan, 0.5]], np.float32)), "TIFF"),
        BLACK,
        (128, 128, 128),
    ),
    (
        "32-bit gray TIFF, negative is black",
        lambda: encode(Image.fromarray(np.array([[-5, 32768]], np.int32)), "TIFF"),
        BLACK,
        (128, 128, 128),
    ),
]


@pytest.mark.parametrize(("data", "first", "second"), [case[1:] for case in COLORS], ids=[case[0] for case in COLORS])
def test_prepare_image_each_mode_gives_its_colors_on_white(
    data: Callable[[], bytes], first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    image = decode(data())
    assert image.size == (2, 1)
    assert pixel(image, 0, 0) == pytest.approx(first, abs=1)
    assert pixel(image, 1, 0) == pytest.approx(second, abs=1)


def test_prepare_image_16_bit_levels_are_scaled_not_clipped() -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = decode(encode(Image.fromarray(levels)))
    assert list(image.tobytes()[::3]) == pytest.approx(list(range(256)), abs=1)


@pytest.mark.parametrize(
    ("ink", "color"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 0), WHITE),
        ((0, 0, 0, 255), BLACK),
    ],
)
def test_prepare_image_cmyk_jpeg_keeps_its_colors(ink: tuple[int, int, int, int], color: tuple[int, int, int]) -> None:
    image = decode(encode(Image.new("CMYK", (16, 16), ink), "JPEG"))
    assert pixel(image, 8, 8) == pytest.approx(color, abs=30)


def test_prepare_image_ycck_jpeg_as_photoshop_writes_it_keeps_its_colors() -> None:
    """Little red, no black: stored inverted, and in Adobe's second transform, these inks are white."""
    data = encode(Image.new("CMYK", (16, 16), (255, 127, 127, 0)), "JPEG")
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    assert pixel(decode(data[:transform] + b"\2" + data[transform + 1 :]), 8, 8) == pytest.approx(WHITE, abs=3)


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (32, 16), (0, 0)), (3, (32, 16), (31, 15)), (6, (16, 32), (15, 0)), (8, (16, 32), (0, 31))],
)
def test_prepare_image_exif_orientation_turns_the_image_upright(
    orientation: int, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    drawn = Image.new("RGB", (32, 16), WHITE)
    drawn.paste((200, 0, 0), (0, 0, 8, 8))  # a mark at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(drawn, "JPEG", exif=exif, quality=95))
    assert (image.width, image.height) == size
    reds = [
        (x, y)
        for x, y in [(0, 0), (size[0] - 1, 0), (0, size[1] - 1), (size[0] - 1, size[1] - 1)]
        if pixel(image, x, y)[1] < 100
    ]
    assert reds == [corner]


def test_prepare_image_orientation_of_a_16_bit_png_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encode(Image.fromarray(np.array([[0, 65535, 65535]], np.uint16)), exif=exif))
    assert (image.width, image.height) == (1, 3)
    assert [pixel(image, 0, y) for y in range(3)] == [BLACK, WHITE, WHITE]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_prepare_image_of_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((220, 0, 0), (0, 220, 0), (0, 0, 220))]
    image = decode(encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100))
    assert (image.width, image.height) == (8, 8)
    assert pixel(image, 4, 4) == pytest.approx((220, 0, 0), abs=6)


@pytest.mark.parametrize(("tag", "value"), [(0x011A, "ninety"), (0x0100, -1), (0x0111, "none")])
def test_prepare_image_odd_exif_beside_the_orientation_changes_nothing(tag: int, value: object) -> None:
    """Tags that Pillow cannot write again, in images whose pixels are sound."""
    exif = struct.pack("<2sHI", b"II", 42, 8)
    kind, count, data = (2, len(str(value)) + 1, str(value).encode()) if isinstance(value, str) else (9, 1, b"")
    inline = struct.pack("<i", value) if isinstance(value, int) else struct.pack("<I", 8 + 2 + 24 + 4)
    entries = sorted([struct.pack("<HHI", tag, kind, count) + inline, struct.pack("<HHII", 0x0112, 3, 1, 6)])
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    exif += struct.pack("<H", 2) + b"".join(entries) + struct.pack("<I", 0) + data + b"\0"
    sink = io.BytesIO()
    Image.new("RGB", (20, 10), (9, 9, 9)).save(sink, "JPEG", exif=b"Exif\0\0" + exif)
    image = decode(sink.getvalue())
    assert (image.width, image.height) == (10, 20)


def test_to_rgb_of_either_byte_order_is_the_same() -> None:
    little, big = (to_rgb(Image.frombytes(mode, (1, 1), raw), (1, 1)) for mode, raw in BOTH_ORDERS)
    assert little.getpixel((0, 0)) == big.getpixel((0, 0)) == (1, 1, 1)


BOTH_ORDERS = (("I;16", (200).to_bytes(2, "little")), ("I;16B", (200).to_bytes(2, "big")))


def tall_noise(channels: int) -> np.ndarray:
    """Noise of more pixels than are converted at once; the last axis goes away for one channel."""
    return np.random.default_rng(1).integers(0, 256, (600, 500, channels), dtype=np.uint8).squeeze()


def brightest_at_its_end() -> np.ndarray:
    levels = tall_noise(1).astype(np.float32)
    levels[-1] *= 3
    return levels


def colors() -> Image.Image:
    return Image.fromarray(tall_noise(3))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(colors(), "JPEG", exif=exif)


PLAIN: list[tuple[str, Callable[[], bytes]]] = [
    ("RGB JPEG", lambda: encode(colors(), "JPEG")),
    ("RGB JPEG that says it is upright", lambda: turned(1)),
    ("gray JPEG", lambda: encode(colors().convert("L"), "JPEG")),
    ("RGB PNG", lambda: encode(colors())),
    ("gray PNG", lambda: encode(colors().convert("L"))),
    ("RGB WebP", lambda: encode(colors(), "WEBP")),
]
ODD: list[tuple[str, Callable[[], bytes]]] = [
    ("RGBA", lambda: encode(Image.fromarray(tall_noise(4), "RGBA"))),
    ("RGBA WebP", lambda: encode(Image.fromarray(tall_noise(4), "RGBA"), "WEBP", method=0)),
    ("LA", lambda: encode(Image.fromarray(tall_noise(2), "LA"))),
    ("palette", lambda: encode(colors().convert("P"))),
    ("palette with alpha", lambda: encode(colors().convert("P"), transparency=bytes(range(256)))),
    ("RGB with a transparent color", lambda: encode(colors(), transparency=colors().getpixel((5, 5)))),
    ("1 bit", lambda: encode(colors().convert("1"))),
    ("CMYK JPEG", lambda: encode(colors().convert("CMYK"), "JPEG")),
    ("CMYK TIFF", lambda: encode(Image.fromarray(tall_noise(4), "CMYK"), "TIFF")),
    ("Lab TIFF", lambda: encode(Image.frombytes("LAB", (500, 600), tall_noise(3).tobytes()), "TIFF")),
    ("16-bit gray", lambda: encode(Image.fromarray(tall_noise(2).view("<u2")[:, :, 0]))),
    (
        "16-bit gray, big-endian",
        lambda: encode(Image.frombytes("I;16B", (500, 600), tall_noise(2).tobytes()), "TIFF"),
    ),
    ("32-bit gray TIFF", lambda: encode(Image.fromarray(tall_noise(4).view("<i4")[:, :, 0]), "TIFF")),
    ("float TIFF, brightest at its end", lambda: encode(Image.fromarray(brightest_at_its_end()), "TIFF")),
    ("16-bit RGB PNG", lambda: crafted_png(500, 600, zlib.compress((b"\0" + bytes(range(200)) * 15) * 600, 1), 16)),
    ("animated WebP", lambda: encode(colors(), "WEBP", save_all=True, append_images=[noise(500, 600)], method=0)),
    ("animated PNG", lambda: encode(colors(), save_all=True, append_images=[noise(500, 600)], compress_level=1)),
    ("two pictures in one JPEG", lambda: encode(colors(), "MPO", save_all=True, append_images=[noise()])),
    ("GIF", lambda: encode(colors().convert("P"), "GIF")),
    ("BMP", lambda: encode(colors(), "BMP")),
    ("JPEG upside down", lambda: turned(3)),
]


def in_one_go(data: bytes) -> Image.Image:
    """The upright RGB picture on white, with no thought of memory."""
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image).astype(np.float64)
        white = 65535.0 if image.mode.startswith("I;16") else max(255.0, levels.max())
        white = 65535.0 if 255.0 < white < 65535.0 else white
        return Image.fromarray(np.clip(levels / white * 255.0 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@pytest.mark.parametrize("data", [case[1] for case in PLAIN], ids=[case[0] for case in PLAIN])
def test_prepare_image_of_a_plain_file_keeps_its_bytes(data: Callable[[], bytes]) -> None:
    file = data()
    image = prepare_image(file, ROOMY)
    assert image == EncodedImage(500, 600, file)
    assert image.data is file
    assert open_prepared(image).tobytes() == in_one_go(file).tobytes()


@pytest.mark.parametrize("data", [case[1] for case in ODD], ids=[case[0] for case in ODD])
def test_prepare_image_of_any_other_file_is_a_png_of_the_same_pixels(data: Callable[[], bytes]) -> None:
    file = data()
    image = prepare_image(file, ROOMY)
    assert image.data[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.data != file
    assert open_prepared(image).tobytes() == in_one_go(file).tobytes()


@pytest.mark.parametrize("data", [case[1] for case in [*PLAIN, *ODD]], ids=[case[0] for case in [*PLAIN, *ODD]])
def test_prepare_image_makes_a_large_image_of_any_kind_small_as_if_in_one_go(data: Callable[[], bytes]) -> None:
    file = data()
    image = prepare_image(file, ROOMY, SMALL_TILES)
    size = SMALL_TILES.shrink(500, 600)
    assert (image.width, image.height) == size != (500, 600)
    assert open_prepared(image).tobytes() == in_one_go(file).resize(size, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, True),
        ({"kept_bytes": 1000}, False),
        ({"kept_pixels": 500 * 600}, True),
        ({"kept_pixels": 500 * 600 - 1}, False),
    ],
)
def test_prepare_image_plain_file_travels_as_it_is_if_no_copy_would_be_smaller(
    limits: dict[str, Any], kept: bool
) -> None:
    file = encode(Image.new("RGB", (500, 600), (9, 99, 200)), "JPEG")
    image = prepare_image(file, ImageLimits(**limits), SMALL_TILES)
    assert len(file) > 1000
    assert (image.data is file) == kept
    assert (image.width, image.height) == ((500, 600) if kept else SMALL_TILES.shrink(500, 600))


@pytest.mark.parametrize(("file_format", "copy"), [("JPEG", b"\xff\xd8"), ("PNG", b"\x89PNG"), ("WEBP", b"\xff\xd8")])
def test_prepare_image_large_copy_of_a_lossy_file_is_a_jpeg_of_nearly_the_same_pixels(
    file_format: str, copy: bytes
) -> None:
    """Of a PNG it is a PNG, and so it is of a lossless WebP."""
    smooth = Image.radial_gradient("L").resize((500, 600)).convert("RGB")
    image = prepare_image(encode(smooth, file_format), ImageLimits(kept_bytes=0, lossless_pixels=1000), SMALL_TILES)
    assert image.data.startswith(copy)
    exact = prepare_image(encode(smooth, file_format), ROOMY, SMALL_TILES)
    assert exact.data.startswith(b"\x89PNG")
    pixels = [np.asarray(open_prepared(one)).astype(int) for one in (image, exact)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 4
    lossless = prepare_image(encode(smooth, "WEBP", lossless=True), ImageLimits(kept_bytes=0, lossless_pixels=1000))
    assert lossless.data[8:12] == b"WEBP"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_prepare_image_makes_a_lying_image_small_upright(orientation: int) -> None:
    """A turn after the resize rounds otherwise than one before it, and on noise only now and then by much."""
    file = turned(orientation)
    image = prepare_image(file, ROOMY, SMALL_TILES)
    assert (image.width, image.height) == SMALL_TILES.shrink(600, 500)
    expected = in_one_go(file).resize((image.width, image.height), Image.Resampling.BICUBIC)
    differences = np.abs(np.asarray(open_prepared(image)).astype(int) - np.asarray(expected))
    assert differences.mean() < 0.5
    assert differences.max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (1152, 700)])
def test_prepare_image_never_enlarges_and_leaves_what_the_model_can_use(size: tuple[int, int]) -> None:
    for file in (png_bytes(size=size), encode(Image.new("P", size), "GIF")):
        image = prepare_image(file, ROOMY, R4B_TILING)
        assert (image.width, image.height) == size
