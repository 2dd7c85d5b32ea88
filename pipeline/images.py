"""From the bytes that a dataset holds to the RGB pixels that the model sees.

Every way in which bytes can fail to be a usable image becomes a `SampleError` with its own `error_type`; limits are
checked on the header, before pixels are allocated.
Not covered: fetching, shrinking, and decoders that hang.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SampleError
from pipeline.records import DecodedImage

Image.init()  # registers all formats; `formats=` below may name only registered ones
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
FORMATS = [name for name in _WANTED if name in Image.OPEN]
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
    + (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""File names that count as images in a folder."""

# Pillow's own limit cannot be set per call; `max_pixels` below is checked in its place, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes | None, max_bytes: int, max_pixels: int) -> DecodedImage:
    """Decode one image, upright, on white, as 8-bit RGB; raises SampleError."""
    if data is None:
        raise SampleError("image_null", "The image is null.")
    if len(data) == 0:
        raise SampleError("image_empty", "The image has no bytes.")
    if len(data) > max_bytes:
        raise SampleError("image_too_many_bytes", f"The image has more than {max_bytes} bytes, the limit.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            image.load()
            rgb = to_rgb(_upright(image))
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError("image_unrecognized", f"The bytes are not an image ({_first_bytes(data)}).") from error
    except Exception as error:  # Pillow's decoders raise almost any type on hostile bytes
        what = _one_line(error)
        if "truncated" in what.lower() or "not enough" in what:
            raise SampleError("image_truncated", f"The image is cut short: {what}.") from error
        raise SampleError("image_corrupt", f"The image cannot be decoded: {what}.") from error
    return DecodedImage(rgb.width, rgb.height, rgb.tobytes())


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


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Pillow's `exif_transpose` writes all other tags anew, and fails on odd ones."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block does not make the pixels wrong
        return image
    return image if turn is None else image.transpose(turn)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        message = f"The image says it is {image.width} x {image.height} pixels, the limit is {max_pixels} pixels."
        raise SampleError("image_too_many_pixels", message)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency on white (as R-4B's own code does), 16 bits scaled down, not clipped."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or _has_transparent_color(image):
        layered = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    if image.mode.startswith(("I", "F")):
        return _deep_to_gray(np.asarray(image)).convert("RGB")
    return image.convert("RGB")


def _has_transparent_color(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info


def _deep_to_gray(values: np.ndarray) -> Image.Image:
    """Gray levels of more than 8 bits, [height, width], to 8 bits.

    Unsigned 16-bit levels are of 65,535. Wider kinds do not say what white is: it is the least of 1 (floats only),
    255, 65,535 and the largest level that holds all.
    """
    levels = np.nan_to_num(values.astype(np.float64))
    top = float(levels.max(initial=0.0))
    whole = np.issubdtype(values.dtype, np.integer)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        scale = 65535.0
    else:
        scale = next((white for white in (1.0, 255.0, 65535.0) if top <= white and not (whole and white == 1.0)), top)
    return Image.fromarray(np.clip(levels / scale * 255.0 + 0.5, 0, 255).astype(np.uint8))


def _first_bytes(data: bytes) -> str:
    return f"{len(data)} bytes, starting with {data[:8]!r}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
