"""`iter_tar_samples`: every file of a tar comes out in its sample, or a gap says which bytes cannot be read.

Covers keys and grouping, all header formats, damage of every kind in plain and gzipped tars, reading from the middle,
memory, and index files. Not covered: images and JSON inside the members, and where tars are stored.
"""

import gzip
import io
import random
import re
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pipeline.errors import SampleError
from pipeline.formats.tar import MAX_EXTENSION_BYTES, TarSample, iter_tar_samples
from pipeline.formats.tar_index import TarIndex, check_index, parse_tar_index

Files = Sequence[tuple[str, bytes]]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
THREE = [(f"{key}.{ext}", key.encode() * size) for key in "abc" for ext, size in (("jpg", 600), ("txt", 5))]
"""As a tar: a.jpg stands at byte 0, its data at 512, a.txt at 1536 and 2048; b at 2560, c at 5120, zeros from 7680."""


def make_tar(files: Files, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tar_format, encoding="utf-8") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A header with a true checksum, whatever its fields say."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:148] = b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, **fields: Any) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    lines = [f" {key.replace('__', '.')}={value}\n".encode() for key, value in records.items()]
    sized = [next(b"%d" % n + line for n in range(999) if n == len(b"%d" % n + line)) for line in lines]
    return member(b"PaxHeader", b"".join(sized), kind=b"x")


def read(tar: bytes, **options: Any) -> list[TarSample]:
    return list(iter_tar_samples(io.BytesIO(tar), **options))


def plain(samples: Sequence[TarSample]) -> list[tuple[object, ...]]:
    """The samples as values that can be compared."""
    return [
        (sample.index, sample.key, sample.offset, sample.damage)
        + tuple((extension, getattr(value, "message", value)) for extension, value in (sample.members or {}).items())
        for sample in samples
    ]


def assert_rest_is_the_same(data: bytes, samples: Sequence[TarSample], index: int, **options: Any) -> None:
    """Reading from the sample at this index gives what reading from 0 gives from there on."""
    rest = read(data, first_index=index, first_offset=samples[index].offset, **options)
    assert plain(rest) == plain(samples[index:])


def gap_of(sample: TarSample) -> tuple[int, int]:
    """From which byte to which the gap says it goes."""
    assert sample.damage is not None
    assert sample.damage.endswith(".")
    assert sample.damage.splitlines() == [sample.damage]
    numbers = re.findall(r"[Bb]ytes? (\d+)(?: to (\d+))?", sample.damage)[0]
    return int(numbers[0]), int(numbers[1] or numbers[0])


def outline(samples: Sequence[TarSample]) -> list[str]:
    """`key:ext+ext` for each sample, `first-last` for each gap; checks what holds of all."""
    assert [sample.index for sample in samples] == list(range(len(samples)))
    lines = []
    for sample in samples:
        if sample.damage is None:
            lines.append(f"{sample.key}:{'+'.join(sample.members or ())}")
        else:
            assert (sample.key, sample.members, sample.offset) == ("", None, gap_of(sample)[0])
            lines.append(f"{gap_of(sample)[0]}-{gap_of(sample)[1]}")
    return lines


WHOLE = ["a:jpg+txt", "b:jpg+txt", "c:jpg+txt"]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("a/b/0001.left.jpg", "a/b/0001", "left.jpg"),
        ("a.b/c.d/0001.seg.PNG", "a.b/c.d/0001", "seg.png"),
        ("./0001.JPG", "./0001", "jpg"),
        ("0001.", "0001", ""),
        ("a/README", "a/README", ""),
        ("a b/ü 1.jpg", "a b/ü 1", "jpg"),
        ("a\nb.jpg", "a\nb", "jpg"),
        ("\udcff\udc80.jpg", "\udcff\udc80", "jpg"),
        ("__meta.jpg", "__meta", "jpg"),
        ("a/__init__/b.jpg", "a/__init__/b", "jpg"),
    ],
)
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_iter_tar_samples_name_gives_key_and_extension(name: str, key: str, extension: str, tar_format: int) -> None:
    (sample,) = read(make_tar([(name, b"data")], tar_format))
    assert (sample.key, sample.members, sample.damage) == (key, {extension: b"data"}, None)


GROUPINGS: list[tuple[str, list[str], list[str]]] = [
    ("one member each", ["a.jpg", "b.jpg"], ["a:jpg", "b:jpg"]),
    ("order of the tar", ["a.txt", "a.jpg", "a.json"], ["a:txt+jpg+json"]),
    ("a key comes back", ["a.jpg", "b.jpg", "a.txt"], ["a:jpg", "b:jpg", "a:txt"]),
    ("an extension twice", ["a.jpg", "a.txt", "a.jpg", "a.json"], ["a:jpg+txt", "a:jpg+json"]),
    ("an extension twice but for case", ["a.jpg", "a.JPG"], ["a:jpg", "a:jpg"]),
    ("the same base in two folders", ["x/a.jpg", "y/a.jpg"], ["x/a:jpg", "y/a:jpg"]),
    ("hidden files in between", ["a.jpg", "._a.jpg", "x/.DS_Store", "a.txt"], ["a:jpg+txt"]),
    ("macOS's folder", ["__MACOSX/a.jpg", "x/__MACOSX/y/a.jpg", "a.jpg"], ["a:jpg"]),
    ("WebDataset's meta files", ["__info__/a.jpg", "__info__", "a.jpg"], ["a:jpg"]),
    ("nothing but passed over", [".a.jpg", "__MACOSX/b.jpg"], []),
]


@pytest.mark.parametrize(("names", "expected"), [case[1:] for case in GROUPINGS], ids=[case[0] for case in GROUPINGS])
def test_iter_tar_samples_consecutive_members_of_one_key_are_a_sample(names: list[str], expected: list[str]) -> None:
    samples = read(make_tar([(name, name.encode()) for name in names]))
    assert outline(samples) == expected
    given = [data.decode() for sample in samples for data in (sample.members or {}).values()]  # type: ignore[union-attr]
    assert [name for name in names if name in given] == given


def test_iter_tar_samples_folders_are_passed_over_and_other_kinds_refused() -> None:
    """A hard link may say how large its target is, a kind that nobody knows has its data."""
    kinds = [
        (b"a.jpg", b"1", 512),
        (b"a.png", b"2", 0),
        (b"x.y/", b"5", 0),
        (b"old.dir/", b"\0", 0),
        (b"b.jpg", b"3", 0),
    ]
    tar = b"".join(header(name, size, kind) for name, kind, size in kinds)
    tar += member(b"b.txt", b"text") + member(b"b.new", b"new", kind=b"Z") + member(b"b.old", b"old", kind=b"\0")
    samples = read(tar + bytes(1024))
    assert outline(samples) == ["a:jpg+png", "b:jpg+txt+new+old"]
    values = [value for sample in samples for value in (sample.members or {}).values()]
    assert [getattr(value, "error_type", value) for value in values] == [
        *["member_refused"] * 3,
        b"text",
        "member_refused",
        b"old",
    ]
    assert "'a.jpg'" in str(values[0])


def test_iter_tar_samples_member_above_the_limit_is_an_error_and_the_rest_is_read() -> None:
    (sample,) = read(make_tar([("a.jpg", bytes(1001)), ("a.txt", bytes(1000)), ("a.png", b"")]), max_member_bytes=1000)
    assert sample.members is not None
    refused = sample.members["jpg"]
    assert isinstance(refused, SampleError)
    assert (refused.error_type, refused.message) == (
        "image_too_many_bytes",
        "'a.jpg' has 1001 bytes, the limit is 1000.",
    )
    assert (sample.members["txt"], sample.members["png"]) == (bytes(1000), b"")


class CountingFile(io.BytesIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_iter_tar_samples_data_of_unwanted_samples_is_not_read() -> None:
    tar = make_tar([(f"{n}.jpg", bytes([n]) * 100_000) for n in range(20)])
    file = CountingFile(tar)
    samples = list(iter_tar_samples(file, wanted=lambda index: index == 7))
    assert [sample.members for sample in samples if sample.index != 7] == [None] * 19
    assert samples[7].members == {"jpg": bytes([7]) * 100_000}
    assert file.num_read < 100_000 + 21 * 512 + 10_240
    file = CountingFile(tar)
    list(iter_tar_samples(file, max_member_bytes=99_999))
    assert file.num_read < 21 * 512 + 10_240


@pytest.mark.parametrize("compressed", [False, True])
def test_iter_tar_samples_unwanted_samples_change_nothing_else(compressed: bool) -> None:
    files = [(f"{n // 2}.jpg", bytes([n]) * (n * 977 % 3000)) for n in range(40)]  # each key has a second "jpg"
    data = flip(20_000, 20_600, 21_300, 21_900)(make_tar(files))[:60_077]
    tar = gzip.compress(data) if compressed else data
    full = read(tar, compressed=compressed)
    some = read(tar, compressed=compressed, wanted=lambda index: index % 3 == 0)
    assert [sample.index for sample in full if sample.damage] == [9, 25]
    assert [(one.index, one.key, one.offset, one.damage) for one in some] == [
        (one.index, one.key, one.offset, one.damage) for one in full
    ]
    assert [one.members for one in some] == [one.members if one.index % 3 == 0 else None for one in full]


ALPHABET = "abcdefghij.-_/ äßé中文😀"


def random_files(
    rng: random.Random, count: int, alphabet: str = ALPHABET, max_name: int = 250
) -> list[tuple[str, bytes]]:
    """Distinct keys of one to three members."""
    files = []
    for number in range(count):
        name = "".join(rng.choices(alphabet.replace(".", ""), k=rng.randrange(max_name)))
        base = f"k{'/'.join(part or 'x' for part in name.split('/'))}{number}"
        extensions = rng.sample(["jpg", "txt", "seg.png", "json"], rng.randrange(1, 4))
        files += [(f"{base}.{ext}", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 1700]))) for ext in extensions]
    return files


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("seed", range(5))
def test_iter_tar_samples_long_and_odd_names_are_as_tarfile_reads_them(tar_format: int, seed: int) -> None:
    ustar = tar_format == tarfile.USTAR_FORMAT  # has no room for long names
    files = random_files(random.Random(seed), 40, max_name=60 if ustar else 250, alphabet="ab é" if ustar else ALPHABET)
    tar = make_tar(files, tar_format)
    samples = read(tar)
    found = [(f"{s.key}.{ext}", data) for s in samples for ext, data in (s.members or {}).items()]
    assert found == files
    assert not any(sample.damage for sample in samples)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        starts = {info.name: info.offset for info in archive}
    assert [sample.offset for sample in samples] == [starts[f"{s.key}.{next(iter(s.members or {}))}"] for s in samples]


def test_iter_tar_samples_size_and_path_of_a_pax_header_count() -> None:
    tar = pax(path="long/name.jpg", size="700", mtime="1.5") + header(b"name.jpg", 0) + b"x" * 700 + bytes(324 + 1024)
    (sample,) = read(tar)
    assert (sample.key, sample.members, sample.offset) == ("long/name", {"jpg": b"x" * 700}, 0)


def test_iter_tar_samples_global_pax_header_is_ignored() -> None:
    tar = member(b"pax_global_header", b"18 path=other.jpg\n", kind=b"g") + make_tar(THREE)
    assert outline(read(tar)) == WHOLE
    assert outline(read(pax(path="other.jpg") + make_tar(THREE))) == ["other:jpg", "a:txt", *WHOLE[1:]]


@pytest.mark.parametrize("magic", [b"\0" * 8, b"ustar  \0", b"ustar\x0000"], ids=["v7", "gnu", "ustar"])
def test_iter_tar_samples_any_magic_is_read(magic: bytes) -> None:
    tar = member(b"a.jpg", b"1", magic=magic) + member(b"b.jpg", b"2", magic=magic, kind=b"\0") + bytes(1024)
    assert outline(read(tar)) == ["a:jpg", "b:jpg"]


Damage = Callable[[bytes], bytes]


def flip(*places: int) -> Damage:
    """The bytes at these places inverted."""
    return lambda data: bytes(255 - byte if place in places else byte for place, byte in enumerate(data))


def cut(length: int) -> Damage:
    return lambda data: data[:length]


def spread(first: int, last: int, with_: bytes) -> Damage:
    return lambda data: data[:first] + with_ * (last - first) + data[last:]


DAMAGES: list[tuple[str, Damage, list[str]]] = [
    ("none", lambda data: data, WHOLE),
    ("first header", flip(5), ["0-1536", "a:txt", "b:jpg+txt", "c:jpg+txt"]),
    ("a sample's first header", flip(2563), ["a:jpg+txt", "2560-4096", "b:txt", "c:jpg+txt"]),
    ("a sample's second header", flip(4100), ["a:jpg+txt", "b:jpg", "4096-5120", "c:jpg+txt"]),
    ("both headers of a sample", flip(2563, 4100), ["a:jpg+txt", "2560-5120", "c:jpg+txt"]),
    ("a checksum", flip(2560 + 150), ["a:jpg+txt", "2560-4096", "b:txt", "c:jpg+txt"]),
    ("a size", flip(2560 + 130), ["a:jpg+txt", "2560-4096", "b:txt", "c:jpg+txt"]),
    ("last header", flip(6660), ["a:jpg+txt", "b:jpg+txt", "c:jpg", "6656-10240"]),
    (
        "from one sample's header into the next",
        spread(1900, 2700, b"\xff"),
        ["a:jpg", "1536-4096", "b:txt", "c:jpg+txt"],
    ),
    ("cut in data", cut(3100), ["a:jpg+txt", "2560-3100"]),
    ("cut in a sample's second member", cut(4610), ["a:jpg+txt", "2560-4610"]),
    ("cut in a header", cut(2800), ["a:jpg+txt", "2560-2800"]),
    ("cut in a sample's second header", cut(4200), ["a:jpg+txt", "b:jpg", "4096-4200"]),
    ("cut between members", cut(4096), ["a:jpg+txt", "b:jpg", "4096-4096"]),
    ("cut between samples", cut(5120), ["a:jpg+txt", "b:jpg+txt", "5120-5120"]),
    ("cut in padding", cut(4700), ["a:jpg+txt", "b:jpg+txt", "4700-4700"]),
    ("cut before the zeros", cut(7680), [*WHOLE, "7680-7680"]),
    ("cut in the first block of zeros", cut(7900), [*WHOLE, "7900-7900"]),
    ("one block of zeros", cut(8192), WHOLE),
    ("one and a half", cut(8500), WHOLE),
    ("garbage at the end", lambda data: data + b"garbage", [*WHOLE, "10240-10247"]),
    ("garbage in place of zeros", lambda data: data[:7680] + b"x" * 3000, [*WHOLE, "7680-10680"]),
    ("garbage, then zeros", lambda data: data[:8192] + b"garbage" + bytes(2000), [*WHOLE, "8192-10199"]),
    ("a block lost", lambda data: data[:512] + data[1024:], ["a:jpg", "1536-2048", "b:jpg+txt", "c:jpg+txt"]),
    ("two tars, the second without zeros", lambda data: data + data[:7680], [*WHOLE, *WHOLE, "17920-17920"]),
    (
        "two tars, the first cut",
        lambda data: data[:3072] + data,
        ["a:jpg+txt", "b:jpg", "4096-4608", "a:txt", *WHOLE[1:]],
    ),
    ("two tars, the first cut within a block", lambda data: data[:3100] + data, ["a:jpg+txt", "b:jpg", "4096-13340"]),
    ("two tars", lambda data: data + data, [*WHOLE, *WHOLE]),
    ("two tars without a seam", lambda data: data[:7680] + data, [*WHOLE, *WHOLE]),
    ("empty", cut(0), ["0-0"]),
    ("one block of zeros alone", lambda data: bytes(512), []),
    ("zeros alone", lambda data: bytes(10_240), []),
    ("too few zeros", lambda data: bytes(511), ["511-511"]),
    ("text", lambda data: b"<html>404</html>\n" * 100, ["0-1700"]),
    ("one byte", lambda data: b"x", ["0-1"]),
    ("gzip", lambda data: gzip.compress(random.Random(0).randbytes(2000), mtime=0), ["0-2023"]),
]


@pytest.mark.parametrize(("damage", "expected"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_iter_tar_samples_damage_is_a_gap_and_the_rest_is_read(damage: Damage, expected: list[str]) -> None:
    assert outline(read(damage(make_tar(THREE)))) == expected


def test_iter_tar_samples_data_around_damage_is_the_original() -> None:
    samples = read(flip(2563)(make_tar(THREE)))
    assert [dict(sample.members or {}) for sample in samples] == [
        {"jpg": b"a" * 600, "txt": b"a" * 5},
        {},
        {"txt": b"b" * 5},
        {"jpg": b"c" * 600, "txt": b"c" * 5},
    ]


NEXT = member(b"z.jpg", b"z") + bytes(1024)
LINK = header(b"x" * 100, 3000, b"K") + b"l" * 3000 + bytes(72)
LONG = header(b"././@LongLink", 7, b"L") + b"a1.jpg\0" + bytes(505)
# name, blocks before NEXT, what comes out before it
HOSTILE: list[tuple[str, bytes, list[str]]] = [
    ("a size below zero in base 256", header(b"a.jpg", b"\xff" * 10 + b"\xfe\x00"), ["0-512"]),
    ("a size below zero in octal", header(b"a.jpg", b"-0000001000\0"), ["0-512"]),
    ("a size of 2**86", header(b"a.jpg", b"\x80\x40" + bytes(10)), ["0-512"]),
    ("a long name of a size below zero", header(b"@LongLink", b"\xff" * 10 + b"\xfe\x00", b"L"), ["0-512"]),
    ("a long name of a size of 2**86", header(b"@LongLink", b"\x80\x40" + bytes(10), b"L"), ["0-512"]),
    ("a size that is no number", header(b"a.jpg", b"123 not oct\0"), ["0-512"]),
    ("a file without a name", member(b"", b"data"), ["0-1024"]),
    ("a GNU sparse file", header(b"a.jpg", 512, b"S") + b"x" * 512, ["0-1024"]),
    ("a pax sparse file", pax(GNU__sparse__map="0,1") + member(b"GNUSparseFile.1/a.jpg", b"x"), ["0-2048"]),
    ("a long name, then zeros", LONG + bytes(1024), ["0-2048"]),
    ("a long name, then garbage", LONG + b"x" * 512, ["0-1536"]),
    ("a long name and a pax header: the first counts", LONG + pax(path="a2.jpg") + member(b"a", b"x"), ["a1:jpg"]),
    ("a pax header and a long name", pax(path="a2.jpg") + LONG + member(b"a", b"x"), ["a2:jpg"]),
    ("a long link name", LINK + header(b"a.jpg", 0, b"2"), ["a:jpg"]),
    ("a pax size that is no number", pax(size="1e3") + member(b"a.jpg", b"x"), ["0-2048"]),
    ("a pax size below zero", pax(size="-512") + member(b"a.jpg", b"x"), ["0-2048"]),
    ("a pax size beyond all files", pax(size="9" * 400) + member(b"a.jpg", b"x"), ["0-2048"]),
    ("an empty pax path, which means none", pax(path="") + member(b"a.jpg", b"x"), ["a:jpg"]),
    (
        "pax records with a wrong length",
        member(b"p", b"18 path=a.jpg\n", kind=b"x") + member(b"b.jpg", b""),
        ["0-1536"],
    ),
    (
        "a pax record without its newline",
        member(b"p", b"15 path=a.jpg\nX", kind=b"x") + member(b"b.jpg", b""),
        ["0-1536"],
    ),
    (
        "a broken pax header before a tar",
        member(b"p", b"x", kind=b"x") + member(b"i.tar", member(b"i.jpg", b"x")),
        ["0-2560"],
    ),
    ("pax records of length 0", member(b"p", b"0 path=a.jpg\n", kind=b"x") + member(b"b.jpg", b""), ["0-1536"]),
    ("pax records that are none", member(b"p", b"\xff" * 600, kind=b"x") + member(b"b.jpg", b"x"), ["0-2560"]),
    ("a pax header of megabytes", member(b"p", b"x" * 3_000_000, kind=b"x") + member(b"b.jpg", b""), ["0-3001344"]),
    (
        "a long name of megabytes",
        member(b"L", b"a.jpg" + bytes(3_000_000), kind=b"L") + member(b"b", b""),
        ["0-3001344"],
    ),
    ("5,000 pax headers", pax(path="x" * 300) * 5000 + member(b"a.jpg", b"x"), ["x" * 300 + ":"]),
    ("5,000 long names", LONG * 5000 + member(b"a.jpg", b"x"), ["a1:jpg"]),
    ("data that looks like an old header", b"x" * 512 + header(b"a.jpg", magic=bytes(8)), ["0-1024"]),
]


@pytest.mark.parametrize(("blocks", "expected"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_iter_tar_samples_hostile_headers_are_gaps_and_the_rest_is_read(blocks: bytes, expected: list[str]) -> None:
    assert outline(read(blocks + NEXT)) == [*expected, "z:jpg"]
    assert outline(read(blocks + NEXT, wanted=lambda index: False))[-1] == "z:"


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g"], ids=["file", "pax", "long name", "global pax"])
@pytest.mark.parametrize("compressed", [False, True])
def test_iter_tar_samples_size_beyond_the_end_takes_no_memory(kind: bytes, compressed: bool) -> None:
    tar = (
        make_tar(THREE)[:7680] + header(b"d.jpg", b"\x80" + bytes(3) + (1 << 50).to_bytes(8, "big"), kind) + b"x" * 5000
    )
    data = gzip.compress(tar) if compressed else tar
    tracemalloc.start()
    samples = read(data, compressed=compressed, max_member_bytes=1 << 62)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outline(samples) == [*WHOLE, f"7680-{len(tar)}"]
    assert peak < 4 * MAX_EXTENSION_BYTES


def test_iter_tar_samples_large_pax_header_takes_no_memory() -> None:
    data = gzip.compress(header(b"PaxHeader", 1 << 26, b"x") + bytes(1 << 26) + NEXT + NEXT, 1)
    tracemalloc.start()
    samples = read(data, compressed=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outline(samples) == [f"0-{(1 << 26) + 2560}", "z:jpg"]
    assert peak < 6 * MAX_EXTENSION_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_iter_tar_samples_random_fields_with_true_checksums_never_raise(seed: int) -> None:
    rng = random.Random(seed)
    blocks = []
    for _ in range(60):
        kind = rng.choice(["0", "0", "1", "2", "5", "6", "x", "g", "L", "K", "S", "X"]).encode()
        block = bytearray(header(b"a%d.jpg" % rng.randrange(5), rng.choice([0, 3, 600]), kind))
        for _ in range(rng.randrange(4)):
            block[rng.randrange(512)] = rng.choice(b"\0 07-\x80\xff")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks.append(bytes(block) + rng.randbytes(rng.choice([0, 0, 512, 1024])))
    tar = b"".join(blocks)
    outline(samples := read(tar))
    for sample in samples:
        assert_rest_is_the_same(tar, samples, sample.index)


NOISE = [(f"{n:02}.{ext}", random.Random(n).randbytes(50_000)) for n in range(12) for ext in ("jpg", "txt")]
"""Hardly smaller gzipped, so that a place in the one is about the same place in the other."""


@pytest.fixture(scope="module")
def noise() -> bytes:
    return make_tar(NOISE)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


GZIPS: list[tuple[str, Callable[[bytes], bytes], int, bool]] = [
    ("whole", packed, 12, False),
    ("two gzip members", lambda tar: packed(tar[:300_001]) + packed(tar[300_001:]), 12, False),
    ("zeros behind", lambda tar: packed(tar) + bytes(100), 12, False),
    ("cut in the middle", lambda tar: packed(tar)[:600_000], 5, True),
    ("cut in the header", lambda tar: packed(tar)[:5], 0, True),
    ("without its last byte", lambda tar: packed(tar)[:-1], 12, True),
    ("flipped in the middle", lambda tar: flip_range(packed(tar), 600_000, 40), 5, True),
    ("flipped in its first half", lambda tar: flip_range(packed(tar), 250_000, 100_000), 2, True),
    ("one byte lost", lambda tar: packed(tar)[:600_000] + packed(tar)[600_001:], 5, True),
    ("garbage behind", lambda tar: packed(tar) + b"garbage", 12, True),
    ("no gzip", lambda tar: tar, 0, True),
    ("empty", lambda tar: b"", 0, True),
    ("a tar that is cut, in whole gzip", lambda tar: packed(tar[:600_000]), 5, True),
    ("a tar with a broken header, in whole gzip", lambda tar: packed(flip_range(tar, 202_760, 1)), 2, True),
]


def flip_range(data: bytes, first: int, count: int) -> bytes:
    return data[:first] + bytes(255 - byte for byte in data[first : first + count]) + data[first + count :]


@pytest.mark.parametrize(
    ("pack", "num_whole", "damaged"), [case[1:] for case in GZIPS], ids=[case[0] for case in GZIPS]
)
def test_iter_tar_samples_gzip_gives_what_is_whole_and_a_gap(
    noise: bytes, pack: Callable[[bytes], bytes], num_whole: int, damaged: bool
) -> None:
    data = pack(noise)
    samples = read(data, compressed=True)
    outline(samples)
    assert any(sample.damage for sample in samples) == damaged
    assert plain(samples[:num_whole]) == plain(read(noise)[:num_whole])
    for index in (0, len(samples) // 2, len(samples) - 1):
        assert_rest_is_the_same(data, samples, index, compressed=True)
    unwanted = read(data, compressed=True, wanted=lambda index: False)
    assert [(one.key, one.offset, one.damage) for one in unwanted] == [(s.key, s.offset, s.damage) for s in samples]


def test_iter_tar_samples_gzip_that_breaks_off_in_a_gap_is_named(noise: bytes) -> None:
    data = packed(flip_range(noise, 202_760, 200_000))
    samples = read(data[:330_000], compressed=True)
    assert len(samples) == 3
    assert "gzip breaks off" in str(samples[-1].damage)


@pytest.mark.parametrize("compressed", [False, True])
def test_iter_tar_samples_file_that_was_read_before_is_read_from_its_beginning(compressed: bool) -> None:
    file = io.BytesIO(packed(make_tar(THREE)) if compressed else make_tar(THREE))
    file.read(2)
    assert outline(list(iter_tar_samples(file, compressed=compressed))) == WHOLE


def test_iter_tar_samples_gzip_with_a_wrong_checksum_ends_in_a_gap() -> None:
    """The data is then wrong somewhere, which nobody knows before the end."""
    data = bytearray(packed(make_tar(THREE)))
    data[-8] ^= 1
    samples = read(bytes(data), compressed=True)
    assert outline(samples) == [*WHOLE, "10240-10240"]
    assert "CRC check failed" in str(samples[-1].damage)


def random_damage(rng: random.Random, tar: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """A damaged tar and the ranges that differ, of kinds that make the checksum of each header they hit wrong."""
    first = rng.randrange(len(tar))
    kind = rng.randrange(4)
    if kind == 0:
        return tar[:first], [(first, len(tar))]
    if kind == 1:
        last = min(len(tar), first + rng.randrange(1, 6000))
        return spread(first, last, b"\xff")(tar), [(first, last)]
    # One flip for each block: two could cancel out.
    blocks = rng.sample(range(len(tar) // 512), 1 if kind == 2 else 8)
    places = sorted(block * 512 + rng.randrange(512) for block in blocks)
    damaged = bytearray(tar)
    for place in places:
        damaged[place] ^= rng.randrange(1, 256)
    return bytes(damaged), [(place, place + 1) for place in places]


def touches(ranges: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    return any(start < last and first < end for start, end in ranges)


@pytest.mark.parametrize("seed", range(400))
def test_iter_tar_samples_random_damage_loses_nothing_silently(seed: int) -> None:
    """Whatever does not come out whole was hit, and if its header was hit or it was cut, a gap covers it."""
    rng = random.Random(seed)
    tar = make_tar(random_files(rng, rng.randrange(1, 9), max_name=60, alphabet="ab "))
    damaged, hits = random_damage(rng, tar)
    samples = read(damaged)
    outline(samples)
    gaps = [gap_of(sample) for sample in samples if sample.damage]
    found = {f"{one.key}.{ext}": value for one in samples for ext, value in (one.members or {}).items()}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            end = info.offset_data + info.size
            value = found.pop(info.name, None)
            if value is None:
                assert touches(hits, info.offset, end) or (len(damaged) < len(tar) and gaps[-1][0] <= info.offset)
                assert touches(gaps, info.offset, info.offset_data) or info.offset >= gaps[-1][0]
            elif not touches(hits, info.offset_data, end):
                assert value == tar[info.offset_data : end]
            else:
                assert value == damaged[info.offset_data : end]
    assert found == {}
    for sample in samples:
        assert_rest_is_the_same(damaged, samples, sample.index)


@pytest.mark.parametrize("seed", range(100))
def test_iter_tar_samples_random_damage_of_gzip_or_headers_ends_in_a_gap_or_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    tar = make_tar(random_files(rng, rng.randrange(1, 9)), tarfile.GNU_FORMAT)
    whole = packed(tar)
    data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
    for _ in range(rng.randrange(1, 4)):
        if data:
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    samples = read(bytes(data), compressed=True)
    outline(samples)
    if plain(samples) != plain(read(tar)):
        assert samples[-1].damage
    for sample in samples:
        assert_rest_is_the_same(bytes(data), samples, sample.index, compressed=True)


@pytest.mark.parametrize("seed", range(60))
def test_iter_tar_samples_random_rubbish_over_long_names_never_raises(seed: int) -> None:
    rng = random.Random(seed)
    tar = bytearray(make_tar(random_files(rng, 6), rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    for _ in range(rng.randrange(1, 9)):
        first = rng.randrange(len(tar))
        tar[first : first + rng.randrange(200)] = rng.choice([rng.randbytes(rng.randrange(700)), bytes(512), b""])
    samples = read(bytes(tar))
    outline(samples)
    for sample in samples:
        assert_rest_is_the_same(bytes(tar), samples, sample.index)


class LargeTar(io.RawIOBase):
    """A tar of many samples with long names, made as it is read."""

    num_samples, stride = 9_000, 512 * 3 + 32_768

    def __init__(self) -> None:
        self.position = 0
        self.size = self.num_samples * self.stride + 1024

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        number, place = divmod(self.position, self.stride)
        if number == self.num_samples:
            piece = bytes(self.size - self.position)
        elif place < 1536:
            name = b"x" * 120 + b"%d.jpg\0" % number
            piece = (header(b"././@LongLink", len(name), b"L") + name.ljust(512, b"\0") + header(name, 32_768))[place:]
        else:
            piece = bytes(self.stride - place)
        piece = piece[: len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def test_iter_tar_samples_memory_stays_flat_over_a_large_tar() -> None:
    tar = LargeTar()
    assert tar.size > 300_000_000
    tracemalloc.start()
    num_samples = sum(len(dict(s.members or {})["jpg"]) == 32_768 for s in iter_tar_samples(io.BufferedReader(tar)))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_samples == LargeTar.num_samples
    assert peak < 1_000_000


class BreakingFile(io.BytesIO):
    """A store that fails behind its first bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 3000:
            raise OSError("the connection is gone")
        return super().read(size)


@pytest.mark.parametrize("compressed", [False, True])
def test_iter_tar_samples_error_of_the_store_is_raised_not_taken_for_damage(noise: bytes, compressed: bool) -> None:
    file = BreakingFile(packed(noise) if compressed else make_tar(THREE))
    with pytest.raises(OSError, match="connection is gone"):
        list(iter_tar_samples(file, compressed=compressed))


class DribblingFile(io.BytesIO):
    """Gives fewer bytes than asked for, as raw readers may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 100))


def test_iter_tar_samples_short_reads_are_no_damage() -> None:
    assert plain(list(iter_tar_samples(DribblingFile(make_tar(THREE))))) == plain(read(make_tar(THREE)))


def text_index(tar: bytes, version: str = "v1.2") -> bytes:
    """As DALI's wds2idx writes it without GNU tar."""
    lines: list[tuple[str, list[str]]] = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            dot = info.name.find(".", info.name.rfind("/") + 1)
            fields = [info.name[dot + 1 :], str(info.offset_data), str(info.size), info.name]
            if not lines or lines[-1][0] != info.name[:dot]:
                lines.append((info.name[:dot], []))
            lines[-1][1].extend(fields if version == "v1.2" else fields[:3])
    return "\n".join([f"{version} {len(lines)}", *(" ".join(fields) for _, fields in lines), ""]).encode()


def binary_index(tar: bytes) -> bytes:
    """As Megatron-Energon's prepare writes it."""
    offsets: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            offsets.setdefault(info.name[: info.name.find(".", info.name.rfind("/") + 1)], info.offset)
        return struct.pack(f"<{len(offsets) + 1}Q", *offsets.values(), archive.offset)


INDEXERS = [text_index, lambda tar: text_index(tar, "v1.1"), binary_index]


@pytest.mark.parametrize("indexer", INDEXERS, ids=["v1.2", "v1.1", "binary"])
@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_parse_tar_index_fits_its_tar_and_reading_can_start_at_each_offset(
    indexer: Callable[[bytes], bytes], tar_format: int, count: int
) -> None:
    long = "" if tar_format == tarfile.USTAR_FORMAT else "n" * 120
    files = [(f"x/{long} {n}.{ext}", bytes([n]) * n * 99) for n in range(count) for ext in ("jpg", "json", "seg.png")]
    tar = make_tar(files, tar_format)
    index = parse_tar_index(indexer(tar))
    samples = read(tar)
    check_index(io.BytesIO(tar), index)
    assert len(index.offsets) == len(samples) == count
    assert index.keys in (None, tuple(sample.key for sample in samples))
    assert (index.keys is None) == (indexer is not text_index)
    for number, offset in enumerate(index.offsets):
        assert plain(read(tar, first_index=number, first_offset=offset)) == plain(samples[number:])
    assert read(tar, first_offset=index.end) == []


def test_check_index_fits_with_passed_over_members_around() -> None:
    names = ["__info__/a.b", "._a.jpg", "a.jpg", "a.txt", "._b.jpg", "b.jpg", ".hidden.jpg"]
    tar = make_tar([(name, name.encode()) for name in names])
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        starts = {info.name: info.offset for info in archive}
    check_index(io.BytesIO(tar), TarIndex((starts["a.jpg"], starts["b.jpg"]), starts[".hidden.jpg"], None))
    check_index(io.BytesIO(tar), TarIndex((0, starts["._b.jpg"]), 1024 * len(names), ("a", "b")))


TEN = [(f"{n}.{ext}", bytes([n]) * 600) for n in range(10) for ext in ("jpg", "txt")]
# name, the tar that the index stands beside
MISFITS: list[tuple[str, bytes]] = [
    ("other keys", make_tar([("x" + name, data) for name, data in TEN])),
    ("other sizes", make_tar([(name, data * 2) for name, data in TEN])),
    ("one sample more", make_tar([*TEN, ("x.jpg", b"")])),
    ("one sample less", make_tar(TEN[:-2])),
    ("one sample more in front", make_tar([("x.jpg", b""), *TEN])),
    ("one sample less in front", make_tar(TEN[2:])),
    ("one member less", make_tar(TEN[:-1])),
    ("headers of another kind", make_tar([("n" * 101 + name, data) for name, data in TEN], tarfile.GNU_FORMAT)),
    ("a broken header", flip(5)(make_tar(TEN))),
    ("a broken sample", flip(5, 1541)(make_tar(TEN))),
    ("a broken sample at the end", flip(9 * 3072 + 5, 9 * 3072 + 1541)(make_tar(TEN))),
    ("a cut tar", make_tar(TEN)[:20_000]),
    ("an empty tar", make_tar([])),
    ("an empty file", b""),
    ("no tar", b"text" * 1000),
]


@pytest.mark.parametrize("indexer", INDEXERS, ids=["v1.2", "v1.1", "binary"])
@pytest.mark.parametrize("tar", [case[1] for case in MISFITS], ids=[case[0] for case in MISFITS])
def test_check_index_index_of_another_tar_raises(tar: bytes, indexer: Callable[[bytes], bytes]) -> None:
    if indexer is not text_index and tar == MISFITS[0][1]:
        check_index(io.BytesIO(tar), parse_tar_index(indexer(make_tar(TEN))))  # the same places, and no names to tell
        return
    with pytest.raises(ValueError, match="does not fit"):
        check_index(io.BytesIO(tar), parse_tar_index(indexer(make_tar(TEN))))


@pytest.mark.parametrize("part", [slice(1, None), slice(None, -1)], ids=["first", "last"])
def test_check_index_that_leaves_out_a_sample_at_an_end_raises(part: slice) -> None:
    index = parse_tar_index(text_index(make_tar(TEN)))
    assert index.keys is not None
    end = index.end if part.stop is None else index.offsets[-1]
    with pytest.raises(ValueError, match="does not fit"):
        check_index(io.BytesIO(make_tar(TEN)), TarIndex(index.offsets[part], end, index.keys[part]))


def test_check_index_places_that_wds2idx_takes_from_gnu_tar_for_pax_headers_raise() -> None:
    """GNU tar numbers the block behind a pax header, so wds2idx has the data of every sample in the wrong place."""
    tar = make_tar([("n" * 120 + f"{n}.jpg", b"x" * 600) for n in range(5)], tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        infos = archive.getmembers()
    nexts = [info.offset_data - 512 for info in infos[1:]] + [infos[-1].offset_data + 1024]
    lines = [f"jpg {(place - 600) // 512 * 512} 600 {info.name}" for place, info in zip(nexts, infos, strict=True)]
    index = parse_tar_index("\n".join(["v1.2 5", *lines]).encode())
    with pytest.raises(ValueError, match="does not fit the tar at its sample 0"):
        check_index(io.BytesIO(tar), index)


def test_check_index_reads_a_few_headers() -> None:
    tar = make_tar([(f"{n}.jpg", bytes(10_000)) for n in range(500)])
    file = CountingFile(tar)
    check_index(file, parse_tar_index(binary_index(tar)))
    assert file.num_read < 20 * 512 + 2 * 10_240


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 512), "no samples"),
        (struct.pack("<3Q", 0, 2048, 1024), "do not ascend"),
        (struct.pack("<3Q", 0, 1024, 1024), "do not ascend"),
        (struct.pack("<3Q", 0, 1000, 2048), "not multiples"),
        (struct.pack("<2Q", 0, (1 << 64) - 512), "not multiples"),
        (b"v1.0 1\njpg 512 10\n", "v1.0"),
        (b"v1.3 1\njpg 512 10 a.jpg\n", "v1.3"),
        (b"v1.2\njpg 512 10 a.jpg\n", "does not start"),
        (b"v1.2 2\njpg 512 10 a.jpg\n", "2 samples, but has 1"),
        (b"v1.2 0\n", "no samples"),
        (b"v1.2 1\n\n", "an empty line"),
        (b"v1.2 1\njpg 512 10\n", "cannot be read"),
        (b"v1.2 1\njpg 512 10 a.txt\n", "cannot be read"),
        (b"v1.2 1\njpg 512 10 a.jpg txt\n", "cannot be read"),
        (b"v1.1 1\njpg 512 -10\n", "cannot be read"),
        (b"v1.1 2\njpg 512 10\njpg 512 10\n", "do not ascend"),
        (b"v1.1 1\njpg 10 512\n" + b"\xff\xfe", "samples, but has 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "does not start"),
    ],
)
def test_parse_tar_index_that_is_none_raises(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_tar_index(data)


def test_parse_tar_index_names_with_spaces_and_dots() -> None:
    text = b"v1.2 2\njpg 512 600 x y/a b.jpg seg.png 2048 5 x y/a b.seg.png\njpg 3072 5 jpg.jpg\n"
    assert parse_tar_index(text) == TarIndex((0, 2560), 3584, ("x y/a b", "jpg"))
