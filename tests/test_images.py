"""`decode_image`: each way in which bytes fail has its own error, and each kind of image has the right pixels.

Covers limits, damage, transparency, more than 8 bits, CMYK, EXIF orientation, animation.
Not covered: decoders that hang.
"""

import io
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SampleError
from pipeline.images import decode_image, to_rgb
from pipeline.records import DecodedImage
from tests.builders import encode, png_bytes

MAX_BYTES, MAX_PIXELS = 1 << 20, 1_000_000
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def decode(data: bytes | None) -> DecodedImage:
    return decode_image(data, MAX_BYTES, MAX_PIXELS)


def pixel(image: DecodedImage, x: int, y: int) -> tuple[int, ...]:
    start = (y * image.width + x) * 3
    return tuple(image.pixels[start : start + 3])


def noise(width: int = 64, height: int = 64) -> Image.Image:
    """An image that no format makes small, so that a cut falls into its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def crafted_png(width: int, height: int, pixels: bytes) -> bytes:
    """An 8-bit RGB PNG that says what it likes of its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def flipped(data: bytes, first: int, count: int = 40) -> bytes:
    """The data with some bytes inverted."""
    return data[:first] + bytes(255 - byte for byte in data[first : first + count]) + data[first + count :]


# name, bytes, error_type
BAD: list[tuple[str, Callable[[], bytes | None], str]] = [
    ("null", lambda: None, "image_null"),
    ("no bytes", lambda: b"", "image_empty"),
    ("one byte too many", lambda: png_bytes() + bytes(MAX_BYTES), "image_too_many_bytes"),
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
    ("zero pixels wide", lambda: crafted_png(0, 5, zlib.compress(b"")), "image_unrecognized"),
    ("no zlib data", lambda: crafted_png(8, 8, b"no zlib data at all, but many words"), "image_corrupt"),
    ("damaged PNG header", lambda: flipped(png_bytes(), 18, 2), "image_unrecognized"),
    ("damaged JPEG tables", lambda: flipped(encode(noise(), "JPEG"), 170, 3), "image_corrupt"),
    ("WEBP of a header only", lambda: cut(encode(noise(), "WEBP"), 0.1), "image_corrupt"),
]


@pytest.mark.parametrize(("data", "error_type"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_decode_image_bad_bytes_give_their_error_in_one_line(data: Callable[[], bytes | None], error_type: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode(data())
    assert caught.value.error_type == error_type
    assert caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.message.splitlines() == [caught.value.message]


def test_decode_image_each_kind_of_failure_has_its_own_error_type() -> None:
    assert {case[2] for case in BAD} == {
        "image_null",
        "image_empty",
        "image_too_many_bytes",
        "image_too_many_pixels",
        "image_unrecognized",
        "image_truncated",
        "image_corrupt",
    }


@pytest.mark.parametrize("first", [60, 400, 4000])
def test_decode_image_damaged_png_pixels_are_corrupt_or_truncated(first: int) -> None:
    with pytest.raises(SampleError) as caught:
        decode(flipped(encode(noise()), first))
    assert caught.value.error_type in ("image_corrupt", "image_truncated")


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "JPEG2000", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_decode_image_cut_file_of_any_format_is_a_sample_error(file_format: str, share: float) -> None:
    with pytest.raises(SampleError):
        decode(cut(encode(noise(), file_format), share))


def test_decode_image_huge_header_is_refused_before_pixels_are_allocated() -> None:
    data = crafted_png(60_000, 60_000, zlib.compress(bytes(1000)))
    assert len(data) < 200
    start = time.process_time()
    with pytest.raises(SampleError, match=r"60000 x 60000 pixels, the limit is 1000000 pixels"):
        decode(data)
    assert time.process_time() - start < 1.0  # 10.8 GB of pixels take longer, where they fit at all


def test_decode_image_at_its_limits_decodes() -> None:
    data = png_bytes(size=(20, 10))
    image = decode_image(data, max_bytes=len(data), max_pixels=200)
    assert (image.width, image.height) == (20, 10)
    with pytest.raises(SampleError, match=f"more than {len(data) - 1} bytes"):
        decode_image(data, max_bytes=len(data) - 1, max_pixels=200)
    with pytest.raises(SampleError, match="20 x 10 pixels, the limit is 199"):
        decode_image(data, max_bytes=len(data), max_pixels=199)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_decode_image_every_format_gives_its_colors_row_by_row(file_format: str) -> None:
    drawn = Image.new("RGB", (40, 24), (220, 40, 40))
    drawn.paste((40, 60, 220), (20, 0, 40, 24))
    image = decode(encode(drawn, file_format))
    assert (image.width, image.height) == (40, 24)
    assert len(image.pixels) == 40 * 24 * 3
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
def test_decode_image_each_mode_gives_its_colors_on_white(
    data: Callable[[], bytes], first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    image = decode(data())
    assert len(image.pixels) == image.width * image.height * 3 == 6
    assert pixel(image, 0, 0) == pytest.approx(first, abs=1)
    assert pixel(image, 1, 0) == pytest.approx(second, abs=1)


def test_decode_image_16_bit_levels_are_scaled_not_clipped() -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = decode(encode(Image.fromarray(levels)))
    assert list(image.pixels[::3]) == pytest.approx(list(range(256)), abs=1)


@pytest.mark.parametrize(
    ("ink", "color"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 0), WHITE),
        ((0, 0, 0, 255), BLACK),
    ],
)
def test_decode_image_cmyk_jpeg_keeps_its_colors(ink: tuple[int, int, int, int], color: tuple[int, int, int]) -> None:
    image = decode(encode(Image.new("CMYK", (16, 16), ink), "JPEG"))
    assert pixel(image, 8, 8) == pytest.approx(color, abs=30)


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (32, 16), (0, 0)), (3, (32, 16), (31, 15)), (6, (16, 32), (15, 0)), (8, (16, 32), (0, 31))],
)
def test_decode_image_exif_orientation_turns_the_image_upright(
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


def test_decode_image_orientation_of_a_16_bit_png_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encode(Image.fromarray(np.array([[0, 65535, 65535]], np.uint16)), exif=exif))
    assert (image.width, image.height) == (1, 3)
    assert [pixel(image, 0, y) for y in range(3)] == [BLACK, WHITE, WHITE]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_decode_image_of_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((220, 0, 0), (0, 220, 0), (0, 0, 220))]
    image = decode(encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100))
    assert (image.width, image.height) == (8, 8)
    assert pixel(image, 4, 4) == pytest.approx((220, 0, 0), abs=6)


@pytest.mark.parametrize(("tag", "value"), [(0x011A, "ninety"), (0x0100, -1), (0x0111, "none")])
def test_decode_image_odd_exif_beside_the_orientation_changes_nothing(tag: int, value: object) -> None:
    """Tags that Pillow cannot write again, in images whose pixels are sound."""
    exif = struct.pack("<2sHI", b"II", 42, 8)
    kind, count, data = (2, len(str(value)) + 1, str(value).encode()) if isinstance(value, str) else (9, 1, b"")
    inline = struct.pack("<i", value) if isinstance(value, int) else struct.pack("<I", 8 + 2 + 24 + 4)
    entries = sorted([struct.pack("<HHI", tag, kind, count) + inline, struct.pack("<HHII", 0x0112, 3, 1, 6)])
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    exif += struct.pack("<H", 2) + b"".join(entries) + struct.pack("<I", 0) + data + b"\0"
    sink = io.BytesIO()
    Image.new("RGB", (20, 10), (9, 9, 9)).save(sink, "JPEG", exif=b"Exif\0\0" + exif)
    image = decode_image(sink.getvalue(), 1 << 20, 1 << 20)
    assert (image.width, image.height) == (10, 20)


def test_deep_to_gray_of_either_byte_order_is_the_same() -> None:
    little, big = (to_rgb(Image.frombytes(mode, (1, 1), raw)) for mode, raw in BOTH_ORDERS)
    assert little.getpixel((0, 0)) == big.getpixel((0, 0)) == (1, 1, 1)


BOTH_ORDERS = (("I;16", (200).to_bytes(2, "little")), ("I;16B", (200).to_bytes(2, "big")))
