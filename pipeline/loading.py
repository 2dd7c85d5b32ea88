"""From what a sample says about its images to images that an engine can take: fetch, check, shrink.

One fetcher and one sandbox serve all read tasks of a process.
Not covered: which samples there are.
"""

import atexit
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeline.errors import SampleError, ShardChangedError, StorageError, StoreUnavailableError
from pipeline.formats import ImageRef, ImageSource
from pipeline.images import FORMATS, ImageLimits
from pipeline.records import EncodedImage
from pipeline.remote import FetchLimits, RemoteFetcher
from pipeline.sandbox import ImageSandbox, SandboxLimits
from pipeline.spec import JobSpec
from pipeline.storage import open_store
from pipeline.tiling import Tiling


@dataclass(frozen=True)
class ImageLoader:
    """Loads images under a job's limits; `tiling` says how large the model can use them."""

    job: JobSpec
    tiling: Tiling | None

    def load(self, sources: Iterable[ImageSource]) -> tuple[EncodedImage, ...]:
        """All images of one sample, in order; raises the SampleError of the first that fails."""
        return tuple(self._load_one(source) for source in sources)

    def _load_one(self, source: ImageSource) -> EncodedImage:
        if isinstance(source, SampleError):
            raise source
        data = self._fetch(source) if isinstance(source, ImageRef) else source
        limits = self.job.limits
        formats = tuple(limits.image_formats or FORMATS)
        images = ImageLimits(limits.max_image_bytes, limits.max_image_pixels, limits.max_image_frames, formats)
        sandbox = SandboxLimits(limits.decode_timeout_s, limits.decode_memory_bytes)
        return _sandbox(images, sandbox, self.tiling).prepare(data)

    def _fetch(self, ref: ImageRef) -> bytes:
        limits, http = self.job.limits, self.job.http
        if not ref.url.lower().startswith(("http://", "https://")):
            return self._read_file(ref)
        fetch = FetchLimits(
            timeout_s=limits.fetch_timeout_s,
            max_bytes=limits.max_image_bytes,
            max_redirects=http.max_redirects,
            max_per_host=http.max_per_host,
            max_attempts=http.max_attempts,
            allow_networks=tuple(http.allow_networks),
        )
        return _fetcher(fetch).fetch(ref.url)

    def _read_file(self, ref: ImageRef) -> bytes:
        """At most one byte more than `limits.max_image_bytes`, which is then one too many for the decoder."""
        try:
            store = open_store(ref.url, self.job.storage, self.job.limits.fetch_timeout_s)
            with store.open(ref.url, ref.version) as file:
                return file.read(self.job.limits.max_image_bytes + 1)
        except ShardChangedError as error:
            raise SampleError("image_missing", str(error)) from error
        except StoreUnavailableError:  # no fault of this image: the job stops, and resumes when the store is back
            raise
        except (StorageError, OSError) as error:
            raise SampleError("image_unreadable", str(error)) from error


@lru_cache(maxsize=1)
def _sandbox(images: ImageLimits, sandbox: SandboxLimits, tiling: Tiling | None) -> ImageSandbox:
    return ImageSandbox(images, sandbox, tiling)


@lru_cache(maxsize=1)
def _fetcher(limits: FetchLimits) -> RemoteFetcher:
    fetcher = RemoteFetcher(limits)
    atexit.register(fetcher.close)
    return fetcher
