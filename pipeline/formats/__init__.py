"""Input formats: how each is found, cut into chunks and read as samples.

`contract.py` says what a format gives; `detect.py` tells which format an input has; `tar.py` and `jsonlines.py` read
the two streams underneath. Adding a format is one module and one line in `FORMATS`.
Not covered: fetching and decoding images, and prompts.
"""

from pipeline.formats import images, jsonl, parquet, webdataset
from pipeline.formats.contract import Format, ImageRef, ImageSource, Sample
from pipeline.formats.detect import detect_format

FORMATS: dict[str, Format] = {
    "parquet": parquet.FORMAT,
    "webdataset": webdataset.FORMAT,
    "jsonl": jsonl.FORMAT,
    "images": images.FORMAT,
}

__all__ = ["FORMATS", "Format", "ImageRef", "ImageSource", "Sample", "detect_format"]
