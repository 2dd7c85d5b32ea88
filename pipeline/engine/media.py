"""Images in online requests, by the way that a dataset's take: guarded fetching, decoding behind a wall, `fit`.

vLLM makes a connector for each message and gives it settings of its own, which a request may bring. They are ignored:
what holds is what `configure_media` was told, for the whole process. Nothing is done in the caller's event loop.

The invariant: for the same bytes the model gets the pixels that it gets in batch; a source that is not allowed, and
bytes that are no image, are the request's fault (HTTP 400), and hold up other requests no longer than QUICK_S for
each such image that waits before theirs.
Not covered: what vLLM takes without asking a connector (`uuid`, embeddings, `mm_processor_kwargs`), and how many
images a request may have.
"""

import asyncio
import atexit
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import pybase64
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MediaConnector

from pipeline.errors import SampleError
from pipeline.images import ImageLimits, open_fitted, prepare_image
from pipeline.remote import FetchLimits, RemoteFetcher
from pipeline.sandbox import Decode, ImageSandbox, SandboxLimits
from pipeline.tiling import Tiling

QUICK_S = 0.5
"""Processor time after which an image leaves the common queue. A photo of 12 megapixels takes 0.3 s on a slow core."""
FETCHES_AT_ONCE = 32
"""Threads that wait for other people's servers; images in data: URLs never wait for them."""
SHORT_FETCH = FetchLimits(timeout_s=10.0, max_attempts=2, max_retry_after_s=2.0)
"""For a client that waits: at most 30 s."""
MAX_HEAD = 256
"""Characters of a data: URL before its comma."""


@dataclass(frozen=True)
class MediaSettings:
    """Which images a request may bring, and what each may cost. Limits are batch's where they decide about an image."""

    tiling: Tiling | None
    """The checkpoint's: an image of more than nine tiles would kill the engine (`pipeline.tiling`)."""
    allow_urls: bool = False
    images: ImageLimits = field(default_factory=ImageLimits)
    fetch: FetchLimits = SHORT_FETCH
    """`max_bytes` is that of `images`."""
    decode_timeout_s: float = SandboxLimits.timeout_s
    decode_memory_bytes: int = SandboxLimits.memory_bytes
    num_processes: int = 2
    """That decode; half as many more decode what takes longer than QUICK_S."""


class MediaError(VLLMValidationError):  # type: ignore[misc]  # vLLM has no types
    """An image that cannot be taken: HTTP 400 with our word and sentence, without vLLM's additions to the text."""

    def __init__(self, error: SampleError) -> None:
        super().__init__(f"{error.error_type}: {error.message}", parameter="image_url")
        self.error_type = error.error_type

    def __str__(self) -> str:
        return str(self.args[0])


class _Intake:
    """From a URL in a request to the picture for vLLM. For many threads and event loops."""

    def __init__(self, settings: MediaSettings, decode: Decode) -> None:
        self._settings = settings
        self._is_closed = False
        images, tiling, memory = settings.images, settings.tiling, settings.decode_memory_bytes
        quick_s, num_slow = min(QUICK_S, settings.decode_timeout_s), max(1, settings.num_processes // 2)
        self._quick = ImageSandbox(images, SandboxLimits(quick_s, memory, settings.num_processes), tiling, decode)
        self._slow = ImageSandbox(images, SandboxLimits(settings.decode_timeout_s, memory, num_slow), tiling, decode)
        # as many threads as processes: a thread never waits inside a sandbox, and `close` can call off what waits
        self._quick_threads = ThreadPoolExecutor(settings.num_processes, "media-decode")
        self._slow_threads = ThreadPoolExecutor(num_slow, "media-decode-slow")
        self._fetch_threads = ThreadPoolExecutor(FETCHES_AT_ONCE, "media-fetch")
        self._fetcher = (
            RemoteFetcher(replace(settings.fetch, max_bytes=images.max_bytes)) if settings.allow_urls else None
        )

    def start(self) -> None:
        """Start the processes, 0.3 s each, before a request waits for one; raises JobError where they do not start."""
        for future in [self._quick_threads.submit(self._start_one) for _ in range(self._settings.num_processes)]:
            future.result()

    def _start_one(self) -> None:
        with contextlib.suppress(SampleError):  # these bytes are no image; a child must have said so
            self._quick.prepare(b"?")

    async def open(self, url: str) -> Image.Image:
        """The picture; raises SampleError."""
        source = await self._run(self._fetch_threads, self._fetch, url) if self._is_remote(url) else url
        try:
            picture: Image.Image = await self._run(self._quick_threads, self._decode, self._quick, source)
        except SampleError as error:
            if error.error_type != "image_decoder_timeout":
                raise
            picture = await self._run(self._slow_threads, self._decode, self._slow, source)
        return picture

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
        """In a thread; what comes after `close` is called off like what waits for it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        except RuntimeError:
            if self._is_closed:
                raise asyncio.CancelledError from None
            raise

    def open_blocking(self, url: str) -> Image.Image:
        """As `open`, in the caller's thread."""
        return self._decode(self._slow, self._fetch(url) if self._is_remote(url) else url)

    def _is_remote(self, url: str) -> bool:
        """Told by the very first characters, in one spelling: what a lenient parser may find in a URL is not asked."""
        if url.startswith("data:"):
            return False
        if self._fetcher is None:
            message = "An image is taken as a data: URL in base64; other URLs are switched off here."
            raise SampleError("url_refused", message)
        if url.startswith(("http://", "https://")):
            return True
        message = "An image is taken as a data: URL in base64, or by a URL that begins with http:// or https://."
        raise SampleError("url_refused", message)

    def _fetch(self, url: str) -> bytes:
        assert self._fetcher is not None
        return self._fetcher.fetch(url)

    def _decode(self, sandbox: ImageSandbox, source: str | bytes) -> Image.Image:
        """Of a file or a data: URL, which is unpacked only now: what waits should not be held twice."""
        max_bytes, tiling = self._settings.images.max_bytes, self._settings.tiling
        data = source if isinstance(source, bytes) else decode_data_url(source, max_bytes)
        try:
            return open_fitted(sandbox.prepare(data), tiling)
        except SampleError as error:
            if error.error_type == "image_unrecognized":  # its message quotes the bytes, and they may have been fetched
                raise SampleError(error.error_type, "The bytes are not an image of a kind that is taken.") from None
            raise

    def close(self) -> None:
        """Call off what waits, end what is being fetched, and the processes once they have answered."""
        self._is_closed = True
        pools = (self._quick_threads, self._slow_threads, self._fetch_threads)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            self._fetcher.close()
        self._quick.close()
        self._slow.close()
        for pool in pools:
            pool.shutdown()


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URL in strict base64. What it says of their type is not asked: the bytes tell."""
    comma = url.find(",", 0, MAX_HEAD)
    if comma < 0 or not url[:comma].endswith(";base64"):
        raise SampleError("image_name_invalid", "The image's data: URL does not say ';base64,' before its data.")
    if (len(url) - comma - 1) * 3 // 4 > max_bytes + 2:  # the two that padding may stand for
        raise SampleError("image_too_many_bytes", f"The image has more than {max_bytes} bytes, the limit.")
    try:
        # The standard library's takes 25 times as long, and no other thread runs meanwhile: 110 ms for 24 MiB.
        return pybase64.b64decode(url[comma + 1 :], validate=True)
    except ValueError:
        raise SampleError("image_name_invalid", "The image's data: URL does not hold base64.") from None


_intake: _Intake | None = None


def configure_media(settings: MediaSettings, decode: Decode = prepare_image) -> None:
    """Say what this process takes, and start its decoders; replaces what was said before. Raises JobError."""
    global _intake
    close_media()
    atexit.register(close_media)
    intake = _Intake(settings, decode)
    try:
        intake.start()
    except BaseException:
        intake.close()
        raise
    _intake = intake


def close_media() -> None:
    """End the decoders; from now on no image is taken. May be called again."""
    global _intake
    closing, _intake = _intake, None
    if closing is not None:
        closing.close()


def _configured() -> _Intake:
    if _intake is None:
        raise RuntimeError("configure_media was not called in this process: no image is taken.")
    return _intake


class R4BMediaConnector(MediaConnector):  # type: ignore[misc]  # vLLM has no types
    """vLLM's way to images, through ours; every other kind of media is refused."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes nothing of what vLLM gives: no local path, no connection, no `media_io_kwargs`, no cache of files."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The picture as batch has it, always RGB; blocks, and raises MediaError."""
        try:
            return _configured().open_blocking(image_url)
        except SampleError as error:
            raise MediaError(error) from None

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The picture as batch has it, always RGB; raises MediaError."""
        try:
            return await _configured().open(image_url)
        except SampleError as error:
            raise MediaError(error) from None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        message = "Of all media only images are taken, as content parts of the type image_url."
        raise MediaError(SampleError("media_refused", message))

    async def _refuse_async(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    load_from_url = fetch_audio = fetch_video = _refuse
    fetch_audio_embedding = fetch_image_embedding = fetch_video_embedding = _refuse
    load_from_url_async = fetch_audio_async = fetch_video_async = _refuse_async
    fetch_audio_embedding_async = fetch_image_embedding_async = fetch_video_embedding_async = _refuse_async
