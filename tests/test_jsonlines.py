"""`iter_json_rows`: every line is a row or the reason why it is none, from wherever the reading begins.

Covers good and bad lines, three compressions, long lines, breaks at every byte, and how the file is asked.
Not covered: compressed files of other programs than Python and Arrow.
"""

import errno
import gzip
import io
import itertools
import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import pyarrow as pa
import pytest

from pipeline.errors import SampleError, StorageError
from pipeline.formats.jsonlines import REQUEST_BYTES, JsonRow, compression_of, iter_json_rows, parse_json

COMPRESSIONS: list[str | None] = [None, "gzip", "zstd"]
DAMAGED = "shard_damaged"


def pack(data: bytes, compression: str | None) -> bytes:
    if compression is None:
        return data
    return gzip.compress(data, mtime=0) if compression == "gzip" else pa.compress(data, codec="zstd", asbytes=True)


def read(data: bytes, compression: str | None = None, **options: Any) -> list[JsonRow]:
    return list(iter_json_rows(io.BytesIO(data), compression, **options))


def contents(rows: list[JsonRow]) -> list[Any]:
    """Each row's object, or its error_type."""
    return [row.row.error_type if isinstance(row.row, SampleError) else row.row for row in rows]


def plain(rows: list[JsonRow]) -> list[Any]:
    """Rows that compare by value, messages too."""
    return [(row.index, row.offset, row.row.args if isinstance(row.row, SampleError) else row.row) for row in rows]


def message_of(row: JsonRow) -> str:
    assert isinstance(row.row, SampleError)
    return row.row.message


def noisy_lines(num_rows: int, seed: int = 0) -> bytes:
    """Rows that no compression makes small, of all lengths up to 3,000, with blank lines and bad lines among them."""
    draw = random.Random(seed)
    lines = []
    for n in range(num_rows):
        lines.append(json.dumps({"n": n, "noise": draw.randbytes(draw.randrange(1500)).hex()}).encode())
        lines.extend(draw.choices([b"", b" \t", b"\r", b"{bad", b"[1]"], k=draw.randrange(3)))
    return b"\n".join(lines) + b"\n"


# file, rows as (offset, object)
GOOD: list[tuple[str, bytes, list[tuple[int, Any]]]] = [
    ("no bytes", b"", []),
    ("only blank lines", b"\n \n\r\n\t\n", []),
    ("two rows", b'{"a":1}\n{"a":2}\n', [(0, {"a": 1}), (8, {"a": 2})]),
    ("no newline at the end", b'{"a":1}\n{"a":2}', [(0, {"a": 1}), (8, {"a": 2})]),
    ("CRLF", b'{"a":1}\r\n\r\n{"a":2}\r\n', [(0, {"a": 1}), (11, {"a": 2})]),
    ("blank lines between", b'\n\n{"a":1}\n  \n{"a":2}\n\n', [(2, {"a": 1}), (13, {"a": 2})]),
    ("spaces around", b'  {"a": 1}\t\n', [(0, {"a": 1})]),
    ("a BOM", b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [(0, {"a": 1}), (11, {"a": 2})]),
    ("a BOM and nothing else", b"\xef\xbb\xbf", []),
    ("a BOM on a blank line", b'\xef\xbb\xbf\r\n{"a":1}', [(5, {"a": 1})]),
    ("no keys", b"{}\n", [(0, {})]),
    ("UTF-8", '{"é": "日本 🙂"}\n{"a":1}'.encode(), [(0, {"é": "日本 🙂"}), (22, {"a": 1})]),
    ("Unicode's line ends in a string", '{"a": "\u2028\u0085x"}\n'.encode(), [(0, {"a": "\u2028\u0085x"})]),
    ("an escaped newline", b'{"a": "x\\ny"}\n', [(0, {"a": "x\ny"})]),
    ("a lone surrogate as an escape", b'{"a": "\\ud800"}\n', [(0, {"a": "\ud800"})]),
    ("a key twice: the last counts", b'{"a":1,"a":2}\n', [(0, {"a": 2})]),
    ("an integer of 100 digits", b'{"a":' + b"9" * 100 + b"}", [(0, {"a": 10**100 - 1})]),
    ("the kinds of numbers", b'{"a":[-0,1.5,1e3,true,null]}', [(0, {"a": [0, 1.5, 1000.0, True, None]})]),
]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("name", "data", "expected"), GOOD, ids=[case[0] for case in GOOD])
def test_iter_json_rows_good_lines_give_objects(
    name: str, data: bytes, expected: list[tuple[int, Any]], compression: str | None
) -> None:
    rows = read(pack(data, compression), compression)
    assert [(row.offset, row.row) for row in rows] == expected
    assert [row.index for row in rows] == list(range(len(expected)))


# line, what its message says
BAD: list[tuple[str, bytes, str]] = [
    ("no JSON", b"hello", "is not valid JSON: Expecting value at character 0."),
    ("cut short", b'{"a": "x', "is not valid JSON: Unterminated string starting at character 6."),
    ("a comma too many", b'{"a": 1,}', "is not valid JSON: "),
    ("two objects", b'{"a":1} {"a":2}', "is not valid JSON: Extra data at character 8."),
    ("single quotes", b"{'a': 1}", "is not valid JSON: "),
    ("a control character in a string", b'{"a": "\x01"}', "Invalid control character at character 7."),
    ("a null byte", b"\x00", "is not valid JSON: "),
    ("a form feed", b"\x0c", "is not valid JSON: "),
    ("a BOM that is not the file's", b'\xef\xbb\xbf{"a":1}', "is not valid JSON: "),
    ("NaN", b'{"a": NaN}', "is not valid JSON: NaN is no JSON number."),
    ("Infinity", b'{"a": [Infinity]}', "is not valid JSON: Infinity is no JSON number."),
    ("minus Infinity", b'{"a": -Infinity}', "is not valid JSON: -Infinity is no JSON number."),
    ("a number that overflows", b'{"a": 1e999}', "is not valid JSON: the number 1e999 is too large."),
    ("an integer of 5,000 digits", b'{"a": ' + b"7" * 5000 + b"}", "an integer has too many digits."),
    ("nested lists", b'{"a": ' + b"[" * 100_000, "it is nested too deeply."),
    ("nested objects", b'{"a":' * 100_000, "it is nested too deeply."),
    ("a list", b"[1, 2]", "is not a JSON object but a list."),
    ("a string", b'"a"', "is not a JSON object but a string."),
    ("a number", b"1.5", "is not a JSON object but a number."),
    ("a boolean", b"true", "is not a JSON object but a boolean."),
    ("null", b"null", "is not a JSON object but null."),
    ("Latin-1", b'{"a": "\xe9"}', "is not valid UTF-8 at byte 7 of the line."),
    ("a surrogate in UTF-8", b'{"a": "\xed\xa0\x80"}', "is not valid UTF-8 at byte 7 of the line."),
    ("UTF-16", '{"a": 1}'.encode("utf-16")[:-1], "is not valid UTF-8 at byte 0 of the line."),
]


@pytest.mark.parametrize(("name", "line", "says"), BAD, ids=[case[0] for case in BAD])
def test_iter_json_rows_bad_line_is_an_error_row_and_reading_goes_on(name: str, line: bytes, says: str) -> None:
    rows = read(b'{"n": 1}\n\n' + line + b'\n{"n": 2}\n')
    assert contents(rows) == [{"n": 1}, "row_invalid", {"n": 2}]
    assert message_of(rows[1]).startswith("Line 3 is not ")
    assert message_of(rows[1]).endswith(says) or says.endswith(": ")
    assert says in message_of(rows[1])
    assert len(message_of(rows[1])) < 200
    (later,) = read(b"{}\n" + line, first_index=1, first_offset=3)
    assert message_of(later).startswith("Row 1 (counted from 0) is not ")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_iter_json_rows_from_any_row_gives_what_a_whole_read_gives_from_there(compression: str | None) -> None:
    data = noisy_lines(300)  # 900 kB: several blocks
    packed = pack(data, compression)
    rows = read(packed, compression)
    assert len(rows) > 400
    assert [line[: len(b'{"n": ')] for line in data.split(b"\n") if line.strip()] == [
        data[row.offset :][: len(b'{"n": ')].partition(b"\n")[0] for row in rows
    ]
    for row in rows[:: 1 if compression is None else 23]:
        later = read(packed, compression, first_index=row.index, first_offset=row.offset)
        assert [(one.index, one.offset) for one in later] == [(one.index, one.offset) for one in rows[row.index :]]
        assert contents(later) == contents(rows[row.index :])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_iter_json_rows_offset_at_the_end_or_beyond_gives_nothing(compression: str | None) -> None:
    packed = pack(b'{"a":1}\n', compression)
    assert read(packed, compression, first_index=1, first_offset=8) == []
    assert read(packed, compression, first_index=1, first_offset=900) == []


def test_iter_json_rows_unwanted_rows_are_counted_and_not_parsed() -> None:
    asked: list[int] = []

    def wanted(index: int) -> bool:
        asked.append(index)
        return index in (1, 4)

    data = b'{bad\n\n{"n":1}\n[2]\n \n{"n":3}\n' + b"x" * 99 + b'\n{"n":5}\n'
    rows = read(data, wanted=wanted, max_line_bytes=50)
    assert contents(rows) == [None, {"n": 1}, None, None, "row_too_long", None]
    assert asked == [row.index for row in rows] == list(range(6))
    assert [row.offset for row in rows] == [row.offset for row in read(data, max_line_bytes=50)]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_iter_json_rows_concatenated_members_are_one_stream(compression: str) -> None:
    pieces = [b'{"a":', b'1}\n{"a":2}\n', b"", b'\xef\xbb\xbf{"a":3}\n', b'{"a":4}']
    rows = read(b"".join(pack(piece, compression) for piece in pieces), compression)
    assert contents(rows) == [{"a": 1}, {"a": 2}, "row_invalid", {"a": 4}]  # a BOM counts at the beginning only
    assert [row.offset for row in rows] == [0, 8, 16, 27]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("limit", [70, 130_000, 300_000])
def test_iter_json_rows_line_longer_than_the_limit_is_one_error_row(limit: int, compression: str | None) -> None:
    frame = len('{"a":""}')

    def line(size: int) -> bytes:
        return b'{"a":"' + b"x" * (size - frame) + b'"}'

    lines = [line(limit), line(limit + 1), line(limit - 1), line(limit * 5), b"{}", line(limit + 1)]
    rows = read(pack(b"\n".join(lines), compression), compression, max_line_bytes=limit)
    assert [row.row if isinstance(row.row, SampleError) else len(row.row["a"]) for row in rows if row.row] == [
        limit - frame,
        rows[1].row,
        limit - 1 - frame,
        rows[3].row,
        rows[5].row,
    ]
    assert [kind for kind in contents(rows) if isinstance(kind, str)] == ["row_too_long"] * 3
    assert message_of(rows[3]) == f"Line 4 has more than {limit} bytes, the limit."
    assert [row.offset for row in rows] == list(itertools.accumulate((len(one) + 1 for one in lines[:-1]), initial=0))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_iter_json_rows_memory_stays_flat_over_large_files_and_lines(compression: str | None) -> None:
    long_line = b'{"a":"' + b"x" * (64 << 20) + b'"}\n'
    packed = pack(b'{"n":1}\n' + long_line + b'{"n":2}\n' * 2_000_000, compression)
    del long_line
    file = io.BytesIO(packed)
    tracemalloc.start()
    try:
        rows = iter_json_rows(file, compression, lambda index: index < 3, max_line_bytes=1 << 20)
        assert contents([next(rows), next(rows), next(rows)]) == [{"n": 1}, "row_too_long", {"n": 2}]
        for _ in itertools.islice(rows, 100_000):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * REQUEST_BYTES


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_iter_json_rows_cut_at_any_byte_is_told_in_one_last_row(compression: str) -> None:
    data = noisy_lines(12)
    halves = [pack(data[: len(data) // 2], compression), pack(data[len(data) // 2 :], compression)]
    packed = b"".join(halves)
    whole = read(packed, compression)
    for cut in range(len(packed)):
        rows = read(packed[:cut], compression)
        if cut == len(halves[0]):  # nothing in the bytes tells that a second member is missing
            assert plain(rows[:-1]) == plain(whole[: len(rows) - 1])
            continue
        assert contents(rows)[-1] == DAMAGED, cut
        assert plain(rows[:-1]) == plain(whole[: len(rows) - 1])
        assert rows[-1].index == len(rows) - 1
        assert rows[-1].offset == 0 or data[rows[-1].offset - 1 :].startswith(b"\n")
        ends = [row.offset for row in whole] + [len(data)]  # all rows are there when only the trailer is cut
        assert not data[rows[-1].offset : ends[len(rows) - 1]].strip()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_iter_json_rows_break_deep_in_a_file_keeps_what_stands_before(compression: str) -> None:
    data = noisy_lines(600)
    packed = pack(data, compression)
    whole = read(packed, compression)
    rows = read(packed[: len(packed) * 2 // 3], compression)
    damaged = rows[-1]
    assert len(whole) // 3 < damaged.index < len(whole) * 2 // 3 + 20
    assert plain(rows[:-1]) == plain(whole[: damaged.index])
    assert isinstance(damaged.row, SampleError)
    assert damaged.row.error_type == DAMAGED
    told = int(damaged.row.message.partition("follows byte ")[2].partition(" ")[0])
    assert damaged.offset <= told < damaged.offset + 5000
    for start in (whole[10], rows[-2], damaged):
        later = read(packed[: len(packed) * 2 // 3], compression, first_index=start.index, first_offset=start.offset)
        assert contents(later) == contents(rows[start.index :])
        assert plain(later[-1:]) == plain([damaged])
    beyond = read(packed[: len(packed) * 2 // 3], compression, first_index=900, first_offset=len(data) - 9)
    assert plain(beyond) == [(900, len(data) - 9, damaged.row.args)]


def test_iter_json_rows_gzip_cut_short_gives_all_rows_before_the_cut() -> None:
    data = noisy_lines(40)  # less than one block
    packed = pack(data, "gzip")
    whole = read(data)
    rows = read(packed[: len(packed) // 2], "gzip")
    assert len(whole) // 3 < len(rows) < len(whole)
    assert plain(rows[:-1]) == plain(whole[: len(rows) - 1])


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("name", "compression", "change"),
    [
        ("no bytes", "gzip", lambda packed: b""),
        ("no bytes", "zstd", lambda packed: b""),
        ("not compressed", "gzip", lambda packed: b'{"a": 1}\n'),
        ("not compressed", "zstd", lambda packed: b'{"a": 1}\n'),
        ("bytes after the end", "gzip", lambda packed: packed + b"garbage"),
        ("bytes after the end", "zstd", lambda packed: packed + b"garbage"),
        ("a wrong checksum", "gzip", lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:]),
        ("wrong bytes inside", "gzip", lambda packed: packed[:5000] + b"\xff" * 99 + packed[5099:]),
        ("wrong bytes at a block's start", "zstd", lambda packed: packed[:6] + b"\xff" * 99 + packed[105:]),
    ],
)
def test_iter_json_rows_corrupt_file_is_never_silent(
    name: str, compression: str, change: Callable[[bytes], bytes], wanted: bool
) -> None:
    rows = read(change(pack(noisy_lines(30), compression)), compression, wanted=lambda index: wanted)
    assert contents(rows)[-1] == DAMAGED
    assert message_of(rows[-1]).startswith(f"The {compression} file is damaged; what follows byte ")
    assert DAMAGED not in contents(rows)[:-1]


class AskedFile(io.BytesIO):
    """Notes how much is asked of it, as long as it has bytes; with an error, the second request fails."""

    def __init__(self, data: bytes, error: Exception | None = None) -> None:
        super().__init__(data)
        self.asked: list[int] = []
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.error is not None and self.asked:
            raise self.error
        if data := super().read(size):
            self.asked.append(cast(int, size))
        return data


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_iter_json_rows_asks_in_few_large_requests_and_leaves_the_file_open(compression: str | None) -> None:
    data = noisy_lines(6000)  # 9 MB as it is, 4.5 MB compressed
    file = AskedFile(pack(data, compression))
    size = len(file.getvalue())
    assert size > REQUEST_BYTES
    rows = iter_json_rows(file, compression)
    assert next(rows).row is not None
    assert len(file.asked) == 1
    assert len(list(rows)) > 6000
    assert set(file.asked) == {REQUEST_BYTES}
    assert len(file.asked) <= size // REQUEST_BYTES + 2
    del rows
    assert not file.closed


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("error", [StorageError("s3://b/k: the store answered 403."), OSError(errno.EIO, "read error")])
def test_iter_json_rows_errors_of_the_store_go_through(error: Exception, compression: str | None) -> None:
    file = AskedFile(pack(noisy_lines(6000), compression), error)
    with pytest.raises(type(error), match=r"403|read error"):
        for _ in iter_json_rows(file, compression):
            pass


def test_iter_json_rows_unknown_compression_raises() -> None:
    with pytest.raises(ValueError, match="bzip2"):
        read(b"", "bzip2")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a.jsonl", None),
        ("s3://bucket/a.jsonl.gz", "gzip"),
        ("a.JSONL.GZ", "gzip"),
        ("a.gzip", "gzip"),
        ("/data/a.ndjson.zst", "zstd"),
        ("a.zstd", "zstd"),
        ("s3://bucket/a.gz/b.jsonl", None),
        ("agz", None),
    ],
)
def test_compression_of_tells_by_the_ending(url: str, expected: str | None) -> None:
    assert compression_of(url) == expected


@pytest.mark.parametrize(("text", "value"), [('"a"', "a"), (" [1, 2.5] ", [1, 2.5]), ("null", None)])
def test_parse_json_gives_any_value(text: str, value: Any) -> None:
    assert parse_json(text) == value
