"""`R4BMediaConnector`: the pixels are batch's, and nothing else than images by allowed ways gets in.

Covers every way that vLLM has into a connector, kinds of images, sources in all spellings, slow images, closing.
Not covered: which bytes are an image (`test_images`), the walls around decoders (`test_sandbox`) and fetches
(`test_remote`, `test_addresses`), and how vLLM finds the connector.
"""

import asyncio
import base64
import inspect
import os
import struct
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import ExifTags, Image
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.multimodal.media import MediaConnector

from pipeline.engine.media import MediaError, MediaSettings, R4BMediaConnector, close_media, configure_media
from pipeline.images import ImageLimits, open_fitted, prepare_image
from pipeline.remote import FetchLimits
from pipeline.sandbox import Decode
from pipeline.tiling import R4B_TILING, Tiling
from tests.builders import encode, png_bytes
from tests.test_sandbox import misbehave

SMALL_TILES = Tiling(tuple((56 * rows, 56 * columns) for rows in range(1, 7) for columns in range(1, 7)), 56, 14)
PNG = png_bytes()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = len(mode)
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8), mode)


def deep_png() -> bytes:
    """16 bits a color, which Pillow reads but does not write."""
    width, height = 9, 7
    rows = b"".join(b"\0" + os.urandom(width * 6) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(40, 20), "JPEG", exif=exif)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fetch(url: str, connector: R4BMediaConnector | None = None) -> Image.Image:
    picture = asyncio.run((connector or R4BMediaConnector()).fetch_image_async(url))
    assert isinstance(picture, Image.Image)
    return picture


def refusal(url: str) -> MediaError:
    """Why an image is not taken; both of the connector's ways must agree."""
    with pytest.raises(MediaError) as caught:
        fetch(url)
    with pytest.raises(MediaError) as blocking:
        R4BMediaConnector().fetch_image(url)
    assert str(caught.value) == str(blocking.value)
    return caught.value


BY_DATA_URL = MediaSettings(SMALL_TILES, images=ImageLimits(max_bytes=1 << 21, max_pixels=4_000_000))
BY_URL_TOO = MediaSettings(
    SMALL_TILES,
    allow_urls=True,
    fetch=FetchLimits(timeout_s=10.0, max_attempts=1, allow_networks=("127.0.0.1/32",)),
)
_configured: list[MediaSettings | None] = [None]


def configure(settings: MediaSettings | None, decode: Decode = prepare_image) -> None:
    """Unless it is so already: processes take their time to start."""
    if settings is None:
        close_media()
    elif _configured[0] != settings or decode is not prepare_image:
        configure_media(settings, decode)
    _configured[0] = settings if decode is prepare_image else None


@pytest.fixture(scope="module", autouse=True)
def closed_afterwards() -> Iterator[None]:
    yield
    configure(None)


@pytest.fixture
def without_urls() -> None:
    configure(BY_DATA_URL)


@pytest.fixture
def with_urls() -> None:
    configure(BY_URL_TOO)


IMAGES: dict[str, Callable[[], bytes]] = {
    "rgb png": lambda: encode(noise(30, 20)),
    "rgba png": lambda: encode(noise(30, 20, "RGBA")),
    "gray and alpha": lambda: encode(noise(30, 20, "LA")),
    "gray": lambda: encode(noise(30, 20, "L")),
    "16-bit color": deep_png,
    "16-bit gray": lambda: encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
    "palette": lambda: encode(noise(30, 20).quantize(8)),
    "palette with a transparent color": lambda: encode(noise(30, 20).quantize(8), transparency=3),
    "black and white": lambda: encode(noise(30, 20, "L").convert("1")),
    "jpeg": lambda: encode(noise(64, 48), "JPEG", quality=90),
    "cmyk jpeg": lambda: encode(noise(64, 48).convert("CMYK"), "JPEG"),
    "turned jpeg": turned_jpeg,
    "lossless webp": lambda: encode(noise(30, 20), "WEBP", lossless=True),
    "animated gif": lambda: encode(
        noise(30, 20), "GIF", save_all=True, append_images=[noise(30, 20, "L").convert("RGB")]
    ),
    "bmp": lambda: encode(noise(30, 20), "BMP"),
    "tiff": lambda: encode(noise(30, 20), "TIFF"),
    "one pixel": lambda: encode(noise(1, 1)),
    "wide": lambda: encode(noise(1500, 3)),
    "tall": lambda: encode(noise(2, 1200)),
    "more than nine tiles": lambda: encode(noise(56 * 5, 56 * 5)),
    "much more than nine tiles": lambda: encode(noise(900, 700)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_fetch_image_gives_the_pixels_of_batch(without_urls: None, name: str) -> None:
    data = IMAGES[name]()
    expected = open_fitted(prepare_image(data, BY_DATA_URL.images, SMALL_TILES), SMALL_TILES)
    for picture in (fetch(data_url(data)), R4BMediaConnector().fetch_image(data_url(data))):
        assert (picture.mode, picture.size) == ("RGB", expected.size)
        assert picture.tobytes() == expected.tobytes()


def test_fetch_image_transparent_is_put_on_white_and_turned_upright(without_urls: None) -> None:
    clear = fetch(data_url(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))))
    assert clear.getpixel((3, 3)) == (255, 255, 255)
    assert fetch(data_url(turned_jpeg())).size == (20, 40)


def test_fetch_image_of_more_than_nine_tiles_is_fitted(without_urls: None) -> None:
    size = (56 * 5, 56 * 5)
    assert SMALL_TILES.is_shrunk(*size)
    picture = fetch(data_url(encode(noise(*size))))
    assert not SMALL_TILES.is_shrunk(*picture.size)
    assert picture.size == SMALL_TILES.fit(*size)


@pytest.mark.parametrize("kind", ["", "image/png", "image/jpeg;name=a.jpg", "text/html", "IMAGE/PNG;charset=utf-8"])
def test_fetch_image_whatever_its_data_url_says_of_the_type_is_taken(without_urls: None, kind: str) -> None:
    assert fetch(data_url(PNG, kind)).size == (6, 4)


def test_fetch_image_of_a_message_with_settings_of_its_own_ignores_them(without_urls: None) -> None:
    connector = R4BMediaConnector(
        media_io_kwargs={"image": {"image_mode": None, "rgba_background_color": [0, 0, 0]}, "video": {"num_frames": 1}},
        connection=object(),
        allowed_local_media_path="/",
        allowed_media_domains=["127.0.0.1"],
    )
    clear = data_url(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))))
    assert fetch(clear, connector).getpixel((3, 3)) == (255, 255, 255)
    with pytest.raises(MediaError):
        fetch("file:///etc/hostname", connector)


ENCODED = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("url", "error_type"),
    [
        ("data:", "image_name_invalid"),
        ("data:,", "image_name_invalid"),
        ("data:image/png,abc", "image_name_invalid"),
        ("data:image/png;base64", "image_name_invalid"),
        (f"data:image/png;BASE64,{ENCODED}", "image_name_invalid"),
        (f"data:image/png;base64 ,{ENCODED}", "image_name_invalid"),
        (f"data:image/png;base64;x=y,{ENCODED}", "image_name_invalid"),
        (f"data:{'x' * 1000};base64,{ENCODED}", "image_name_invalid"),
        (f"data:image/png;base64,{ENCODED}=", "image_name_invalid"),
        (f"data:image/png;base64,{ENCODED[:-1]}", "image_name_invalid"),
        (f"data:image/png;base64,{ENCODED[:9]}\n{ENCODED[9:]}", "image_name_invalid"),
        (f"data:image/png;base64, {ENCODED}", "image_name_invalid"),
        (f"data:image/png;base64,{ENCODED}{ENCODED}", "image_name_invalid"),
        ("data:image/png;base64,____", "image_name_invalid"),
        ("data:image/png;base64,%2B%2B%2B%2B", "image_name_invalid"),
        ("data:image/png;base64,\u0391\u0391\u0391\u0391", "image_name_invalid"),
        ("data:image/png;base64,AA\ud800A", "image_name_invalid"),
        ("data:image/png;base64,AA\0A", "image_name_invalid"),
        ("data:image/png;base64,", "image_empty"),
        ("data:image/png;base64," + "A" * 2_800_000, "image_too_many_bytes"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "image_unrecognized"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0"), "image_unrecognized"),
        (data_url(encode(noise(30, 20))[:900]), "image_truncated"),
        (data_url(encode(Image.new("1", (4000, 4000)))), "image_too_many_pixels"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_fetch_image_of_a_bad_data_url_is_refused(without_urls: None, url: str, error_type: str) -> None:
    assert refusal(url).error_type == error_type


def test_fetch_image_at_the_limit_of_bytes_is_taken(without_urls: None) -> None:
    for excess, taken in ((0, True), (1, False)):
        padded = PNG + bytes(BY_DATA_URL.images.max_bytes - len(PNG) + excess)
        if taken:
            assert fetch(data_url(padded)).size == (6, 4)
        else:
            assert refusal(data_url(padded)).error_type == "image_too_many_bytes"


OTHER_SOURCES = [
    *("file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "file:///../etc/x"),
    *("/etc/passwd", "../../etc/passwd", "etc/passwd", "~/x.png", "C:\\x.png", "\\\\host\\share", ".", "-", "\0"),
    *("ftp://127.0.0.1/x", "gopher://127.0.0.1/", "javascript:alert(1)", "blob:http://x/y", "about:blank"),
    *("s3://bucket/key", "DATA:image/png;base64,", "Data:image/png;base64,", " data:image/png;base64,", "\tdata:,"),
    *("dat\na:,", "data\u200b:,", "\ufb01le:///etc/passwd", "\uff44\uff41\uff54\uff41:,", "view-source:http://127.0.0.1/"),
    *("jar:file:///x!/y", "//127.0.0.1/x", "HTTP://127.0.0.1/", " http://127.0.0.1/", "http\t://127.0.0.1/"),
    *("http:/127.0.0.1/", "http:\\\\127.0.0.1\\", "\0http://x", "https:127.0.0.1", "url:http://127.0.0.1"),
    *("unix:///var/run/docker.sock", "dict://127.0.0.1:11211/", "base64," + ENCODED, ENCODED, "<img src=x>", "\ud800"),
    *("http", "data", ":", "%66ile:///etc/passwd", "netdoc:///etc/passwd", "local:x"),
]  # fmt: skip


@pytest.mark.parametrize("source", OTHER_SOURCES, ids=ascii)
def test_fetch_image_from_elsewhere_is_refused(without_urls: None, source: str) -> None:
    error = refusal(source)
    assert error.error_type == "url_refused"
    assert str(error).isascii()
    assert "passwd" not in str(error)


def test_fetch_image_by_url_is_refused_unless_allowed(without_urls: None) -> None:
    for url in ("http://example.com/a.png?token=hunter2", "https://example.com/a.png"):
        error = refusal(url)
        assert error.error_type == "url_refused"
        assert "example" not in str(error)


class Site(BaseHTTPRequestHandler):
    """A PNG, a text that says it is an image, and a 404."""

    def do_GET(self) -> None:
        body = {"/a.png": PNG, "/secret": b"TOPSECRET"}.get(self.path.partition("?")[0])
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_image_by_an_allowed_url_gives_the_picture(with_urls: None, site: str) -> None:
    expected = open_fitted(prepare_image(PNG, ImageLimits(), SMALL_TILES), SMALL_TILES)
    for picture in (fetch(site + "/a.png"), R4BMediaConnector().fetch_image(site + "/a.png")):
        assert picture.tobytes() == expected.tobytes()
    assert fetch(data_url(PNG)).size == (6, 4)


def test_fetch_image_by_url_that_fails_tells_no_secret(with_urls: None, site: str) -> None:
    missing = refusal(site + "/missing.png?token=hunter2")
    assert missing.error_type == "http_status"
    assert "hunter2" not in str(missing)
    text = refusal(site + "/secret")
    assert text.error_type == "image_unrecognized"
    assert "SECRET" not in str(text)


@pytest.mark.parametrize("source", OTHER_SOURCES, ids=ascii)
def test_fetch_image_where_urls_are_allowed_other_sources_are_not(with_urls: None, source: str) -> None:
    assert refusal(source).error_type == "url_refused"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "localhost", "[::1]", "169.254.169.254", "2130706434", "0x7f000002", "127.2", "0", "10.0.0.1"]
    + ["[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "user:pw@127.0.0.1", "168.63.129.16", "[fd00::1]", "0177.0.0.2"],
)
def test_fetch_image_where_urls_are_allowed_closed_addresses_stay_closed(with_urls: None, host: str) -> None:
    if host == "localhost":
        configure(MediaSettings(SMALL_TILES, allow_urls=True))
    error = refusal(f"http://{host}/a.png?token=hunter2")
    assert error.error_type == "url_refused"
    assert "hunter2" not in str(error)


def test_media_error_is_a_bad_request_with_our_word_and_sentence(without_urls: None) -> None:
    response = create_error_response(refusal("file:///etc/passwd"))
    assert (response.error.code, response.error.type, response.error.param) == (400, "BadRequestError", "image_url")
    assert response.error.message.startswith("url_refused: An image is taken as a data: URL")


def test_connector_every_way_of_vllms_is_ours() -> None:
    """A kind of media that a later vLLM adds would otherwise come in by vLLM's own way."""
    ways = {name for name, _ in inspect.getmembers(MediaConnector, callable) if not name.startswith("_")}
    assert ways - set(vars(R4BMediaConnector)) == set()


REFUSED = sorted(
    name
    for name, _ in inspect.getmembers(MediaConnector, callable)
    if not name.startswith("_") and name not in ("fetch_image", "fetch_image_async")
)


@pytest.mark.parametrize("name", REFUSED)
def test_connector_other_media_are_refused(without_urls: None, name: str) -> None:
    async def ask() -> None:
        result = getattr(R4BMediaConnector(), name)(data_url(PNG), None)
        if inspect.isawaitable(result):
            await result

    with pytest.raises(MediaError) as caught:
        asyncio.run(ask())
    assert caught.value.error_type == "media_refused"


def test_fetch_image_where_nothing_is_configured_fails() -> None:
    configure(None)
    with pytest.raises(RuntimeError, match="configure_media"):
        fetch(data_url(PNG))


def test_fetch_image_slow_one_lets_those_behind_it_pass() -> None:
    configure(MediaSettings(R4B_TILING, decode_timeout_s=4.0, num_processes=1), misbehave)
    order: list[str] = []

    async def ask(name: str, data: bytes) -> None:
        try:
            await R4BMediaConnector().fetch_image_async(data_url(data))
            order.append(name)
        except MediaError as error:
            order.append(error.error_type)

    async def ask_one_by_one() -> None:
        for _ in range(5):
            await ask("good", PNG)

    async def ask_all() -> None:
        await asyncio.gather(ask("hostile", b"spin"), ask_one_by_one())

    asyncio.run(ask_all())
    assert order == ["good"] * 5 + ["image_decoder_timeout"]


def test_close_media_ends_the_decoders_and_calls_off_what_waits() -> None:
    configure(None)
    others = set(psutil.Process().children())  # decoders of a dataset's reader, if one was used in this process
    configure(MediaSettings(R4B_TILING, decode_timeout_s=0.5, num_processes=1), misbehave)
    decoders = set(psutil.Process().children()) - others
    assert decoders

    async def close_while_busy() -> list[Any]:
        asks = [asyncio.ensure_future(R4BMediaConnector().fetch_image_async(data_url(b"spin"))) for _ in range(3)]
        await asyncio.sleep(0)  # each has taken its place in the queue
        await asyncio.to_thread(close_media)
        return await asyncio.gather(*asks, return_exceptions=True)

    outcomes = asyncio.run(close_while_busy())
    assert not any(isinstance(outcome, Image.Image) for outcome in outcomes)
    assert [type(outcome) for outcome in outcomes[1:]] == [asyncio.CancelledError] * 2
    assert set(psutil.Process().children()) <= others
    assert not any(child.is_running() for child in decoders)


def test_picture_is_free_of_what_vllm_would_take_for_a_name(without_urls: None) -> None:
    """vLLM names an image in its cache by its pixels, unless EXIF's ImageID is a UUID; a file cannot bring one."""
    exif = Image.Exif()
    exif[0xA420] = "550e8400-e29b-41d4-a716-446655440000"
    exif[ExifTags.Base.ImageID] = "550e8400-e29b-41d4-a716-446655440000"
    picture = fetch(data_url(encode(noise(10, 10), "JPEG", exif=exif)))
    assert not any(isinstance(value, uuid.UUID) for value in picture.getexif().values())
