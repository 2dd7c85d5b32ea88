"""From the bytes that a dataset holds to the picture that travels to an engine: a checked file, no larger than needed.

Every way in which bytes can fail to be a usable image becomes a `SampleError` with its own `error_type`; limits are
checked on the header, before pixels are allocated. A plain picture keeps its very bytes, if few or if its size is
what the model uses. Any other is made upright, on white, 8 bits, and as small as the model uses; a full-size copy of
its pixels exists once, as decoded.
Not covered: fetching; decoders that hang, crash or eat memory, which `pipeline.sandbox` bounds.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pipeline.errors import SampleError
from pipeline.records import EncodedImage
from pipeline.tiling import Tiling

Image.init()  # registers all formats; `formats=` below may name only registered ones
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""Pillow's names of the formats that can be read. Its MPO, a JPEG with more pictures behind it, counts as JPEG."""
PLAIN_FORMATS = ("JPEG", "PNG", "WEBP")
WEBP_HEAD_BYTES = 8192
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
    + (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""File names that count as images in a folder."""

# Pillow's own limit cannot be set per call; `max_pixels` below is checked in its place, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
if "AVIF" in FORMATS:
    from PIL import AvifImagePlugin

    # one thread per core would each reserve address space, which the sandbox limits; images are decoded in parallel
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True)
class ImageLimits:
    """What a dataset's images may be; `formats` are of FORMATS."""

    max_bytes: int = 33_554_432
    max_pixels: int = 100_000_000
    max_frames: int = 1_000
    formats: tuple[str, ...] = FORMATS
    kept_bytes: int = 1 << 20
    """A plain file of no more travels as it is, though the model may not use all of it: a copy would be larger."""
    kept_pixels: int = 1 << 22
    """So long as it has no more pixels than these, which an engine can decode without delay."""
    lossless_pixels: int = 1 << 18
    """A copy of more pixels is a JPEG, if its source was lossy."""


def prepare_image(data: bytes | None, limits: ImageLimits, tiling: Tiling | None = None) -> EncodedImage:
    """Check one image and make it small enough for `tiling`; raises SampleError, and MemoryError when memory ends."""
    checked = check_bytes(data, limits)
    file_format = _find_format(checked, limits)
    try:
        picture = _decode(checked, file_format, limits, tiling)
        return (
            picture if isinstance(picture, EncodedImage) else _to_file(picture, limits, _is_lossy(checked, file_format))
        )
    except (SampleError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise _unrecognized(checked) from error
    except Exception as error:  # Pillow's decoders raise almost any type on hostile bytes
        what = _one_line(error)
        if "truncated" in what.lower() or "not enough" in what:
            raise SampleError("image_truncated", f"The image is cut short: {what}.") from error
        raise SampleError("image_corrupt", f"The image cannot be decoded: {what}.") from error


def open_prepared(image: EncodedImage) -> Image.Image:
    """The RGB pixels of a prepared image, for an engine."""
    with Image.open(io.BytesIO(image.data), formats=PLAIN_FORMATS) as picture:
        return picture.convert("RGB")


def open_fitted(image: EncodedImage, tiling: Tiling | None) -> Image.Image:
    """As `open_prepared`, and no larger than `tiling.fit` allows: what vLLM is given, in batch and online."""
    picture = open_prepared(image)
    size = picture.size if tiling is None else tiling.fit(*picture.size)
    return picture if size == picture.size else picture.resize(size)


def check_bytes(data: bytes | None, limits: ImageLimits) -> bytes:
    """What can be refused without looking inside."""
    if data is None:
        raise SampleError("image_null", "The image is null.")
    if len(data) == 0:
        raise SampleError("image_empty", "The image has no bytes.")
    if len(data) > limits.max_bytes:
        raise SampleError("image_too_many_bytes", f"The image has more than {limits.max_bytes} bytes, the limit.")
    return data


def _find_format(data: bytes, limits: ImageLimits) -> str:
    """By the signature alone: no decoder of a refused format sees the bytes."""
    name = next((name for name in FORMATS if _has_signature(name, data[:16])), None)
    if name is None:
        raise _unrecognized(data)
    if name not in limits.formats:
        message = f"The image is a {name} file; the formats allowed are {', '.join(limits.formats)}."
        raise SampleError("image_format_refused", message)
    return name


def _has_signature(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    return accept is not None and bool(accept(prefix))


def _unrecognized(data: bytes) -> SampleError:
    return SampleError("image_unrecognized", f"The bytes are not an image ({len(data)} bytes, starting {data[:8]!r}).")


def _decode(data: bytes, file_format: str, limits: ImageLimits, tiling: Tiling | None) -> EncodedImage | Image.Image:
    """The data itself where it can travel as it is, else the upright RGB picture."""
    if file_format == "WEBP":
        _check_size(*_webp_size(data), limits)  # opening a WebP allocates its pixels
    with Image.open(io.BytesIO(data), formats=[file_format]) as image:
        _check_size(*image.size, limits)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_size(*_tile_size(image), limits)
        _check_frames(image, limits)
        is_deep = any("16" in str(tile[3]) for tile in image.tile)  # 16-bit color, which Pillow reads as 8-bit
        image.load()
        turn = _find_turn(image)
        upright = image.size[::-1] if turn in QUARTER_TURNS else image.size
        size = upright if tiling is None else tiling.shrink(*upright)
        is_small = len(data) <= limits.kept_bytes and image.width * image.height <= limits.kept_pixels
        if (size == image.size or is_small) and turn is None and not is_deep and _is_plain(image):
            return EncodedImage(*image.size, data)
        picture = to_rgb(image, size[::-1] if turn in QUARTER_TURNS else size)
    image.close()  # frees its pixels: those of `picture` may be as many, and a turn needs as many again
    return picture if turn is None else picture.transpose(turn)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        message = f"The image says it is {width} x {height} pixels, the limit is {limits.max_pixels} pixels."
        raise SampleError("image_too_many_pixels", message)


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas of a WebP file as its first chunk says it, or 0 x 0: then the decoder refuses it."""
    chunk, head = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", head, 6)
    return width & 0x3FFF, height & 0x3FFF


def _tile_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """The decoder allocates one tile, however small the image says it is; 0 x 0 where there are none."""
    width, height = (image.tag_v2.get(tag) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _check_frames(image: Image.Image, limits: ImageLimits) -> None:
    try:
        if image.format == "TIFF":  # where counting all is slow, and seeking decodes nothing
            image.seek(limits.max_frames)
            too_many = True
        else:
            too_many = getattr(image, "n_frames", 1) > limits.max_frames
    except Exception:  # the end, or a later frame that is damaged: only the first will be decoded
        too_many = False
    if too_many:
        raise SampleError("image_too_many_frames", f"The image has more than {limits.max_frames} frames, the limit.")
    image.seek(0)


# EXIF's orientation, and what turns it upright.
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
"""Those that swap width and height."""


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """What EXIF says. Pillow's `exif_transpose` writes all other tags anew, and fails on odd ones."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block does not make the pixels wrong
        return None


def _is_plain(image: Image.Image) -> bool:
    one_picture = image.format in PLAIN_FORMATS and getattr(image, "n_frames", 1) == 1
    return one_picture and image.mode in ("RGB", "L") and "transparency" not in image.info


def _is_lossy(data: bytes, file_format: str) -> bool:
    return file_format in ("JPEG", "AVIF") or (file_format == "WEBP" and data.find(b"VP8L", 12, WEBP_HEAD_BYTES) < 0)


def _to_file(picture: Image.Image, limits: ImageLimits, is_lossy: bool) -> EncodedImage:
    """As PNG; a large picture whose source was lossy already as a JPEG that adds next to nothing to that."""
    buffer = io.BytesIO()
    if is_lossy and picture.width * picture.height > limits.lossless_pixels:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return EncodedImage(picture.width, picture.height, buffer.getvalue())


STRIP_PIXELS = 1 << 18


def to_rgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Any Pillow mode to RGB of `size`: transparency on white (as R-4B's own code does), 16 bits scaled, not clipped.

    Goes strip by strip and narrows each, for the whole image as RGB may not fit into memory; the pixels are those of
    a conversion and a resize in one go, because Pillow too resizes widths first.
    """
    white = _find_white(image) if _is_deep_gray(image) else 0.0
    narrow = Image.new("RGB", (size[0], image.height))
    for top, strip in _strips(image):
        narrow.paste(_strip_to_rgb(strip, white).resize((size[0], strip.height), Image.Resampling.BICUBIC), (0, top))
    return narrow if narrow.size == size else narrow.resize(size, Image.Resampling.BICUBIC)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(strip: Image.Image, white: float) -> Image.Image:
    if strip.mode in ("RGBA", "LA", "PA", "La", "RGBa") or _has_transparent_color(strip):
        layered = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        background = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layered).convert("RGB")
    if _is_deep_gray(strip):
        levels = _levels(strip) / white * 255.0 + 0.5
        return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")
    return strip.convert("RGB")


def _has_transparent_color(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _find_white(image: Image.Image) -> float:
    """The level that is white. Unsigned 16-bit levels are of 65,535, in either byte order.

    Wider kinds do not say: it is the least of 1 (floats only), 255, 65,535 and the largest level that holds all.
    """
    if image.mode.startswith("I;16"):
        return 65535.0
    top = max(float(_levels(strip).max(initial=0.0)) for _, strip in _strips(image))
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in whites if top <= white), top)


def _levels(strip: Image.Image) -> np.ndarray:
    """Gray levels, [height, width]; what is no number is black."""
    return np.nan_to_num(np.asarray(strip).astype(np.float64))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
