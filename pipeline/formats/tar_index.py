"""Index files beside tars, as other tools write them: where each sample begins.

An index that does not fit its tar is found out by a few probes, and refused.
"""

import re
import struct
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import BinaryIO

from pipeline.formats.tar import BLOCK, MAX_SIZE, iter_tar_samples, padded, split_name

INDEX_SUFFIXES = (".idx", ".index")


@dataclass(frozen=True)
class TarIndex:
    """Where the samples of a tar start, as another tool wrote it down."""

    offsets: tuple[int, ...]
    end: int
    """Where the last sample ends."""
    keys: tuple[str, ...] | None
    """None where the index has no names."""


def parse_tar_index(data: bytes) -> TarIndex:
    """DALI's text (wds2idx, v1.1 and v1.2) or Energon's binary `.tar.idx`; raises ValueError.

    DALI names the places of the data. A sample starts where the one before it ends, however long its headers are.
    """
    if data.startswith(b"v"):
        return _parse_text_index(data.decode("utf-8", "surrogateescape"))
    if not data or len(data) % 8:
        raise ValueError(f"An index of {len(data)} bytes is neither DALI's text nor 8 bytes for each sample.")
    *offsets, end = struct.unpack(f"<{len(data) // 8}Q", data)
    return _checked_index(TarIndex(tuple(offsets), end, None))


def _parse_text_index(text: str) -> TarIndex:
    head, *lines = text.removesuffix("\n").split("\n")
    match = re.fullmatch(r"(v1\.[12]) (\d{1,18})", head.strip())
    if match is None:
        raise ValueError(f"{head[:40]!r} does not start an index of version v1.1 or v1.2.")
    if int(match[2]) != len(lines):
        raise ValueError(f"The index says it has {match[2]} samples, but has {len(lines)}.")
    # A file's name ends with its extension, which finds its end where it holds spaces.
    with_names = match[1] == "v1.2"
    component = re.compile(r"(\S*) (\d{1,18}) (\d{1,18})" + (r" (.*?\1)(?: |$)" if with_names else r"(?: |$)"))
    starts, keys = [0], []
    for line in lines:
        found, position = None, 0
        while position < len(line):
            found = component.match(line, position)
            if found is None:
                raise ValueError(f"The index has a line that cannot be read: {line[:80]!r}.")
            if position == 0 and with_names:
                keys.append(split_name(found[4])[0])
            position = found.end()
        if found is None:
            raise ValueError("The index has an empty line.")
        starts.append(padded(int(found[2]) + int(found[3])))
    return _checked_index(TarIndex(tuple(starts[:-1]), starts[-1], tuple(keys) if with_names else None))


def _checked_index(index: TarIndex) -> TarIndex:
    places = [*index.offsets, index.end]
    if not index.offsets:
        raise ValueError("The index has no samples.")
    if any(place % BLOCK or place > MAX_SIZE for place in places):
        raise ValueError(f"The index has offsets that are not multiples of {BLOCK}, as a tar's are.")
    if any(second <= first for first, second in pairwise(places)):
        raise ValueError("The index has offsets that do not ascend.")
    return index


def check_index(file: BinaryIO, index: TarIndex) -> None:
    """Raise ValueError unless the first, middle and last sample are where the index says, with none before or after.

    Reads a few headers only. Not covered: the samples between.
    """
    last = len(index.offsets) - 1
    for number in sorted({0, last // 2, last}):
        here = _heads(file, index.offsets[number], 2)
        after = _heads(file, index.end if number == last else index.offsets[number + 1], 1)
        fits = bool(here) and here[0][2] is None and here[1:] == after
        fits = fits and (index.keys is None or here[0][0] == index.keys[number])
        if number == 0:
            fits = fits and _heads(file, 0, 1) == here[:1]
        if number == last:
            fits = fits and all(damage is not None for _, _, damage in after)
        if not fits:
            raise ValueError(f"The index does not fit the tar at its sample {number}, byte {index.offsets[number]}.")


def _heads(file: BinaryIO, offset: int, num_samples: int) -> list[tuple[str, int, str | None]]:
    """Key, offset and damage of the first samples from there on."""
    samples = islice(iter_tar_samples(file, lambda index: False, first_offset=offset), num_samples)
    return [(sample.key, sample.offset, sample.damage) for sample in samples]
