"""`read_prompt_table`: all rows of a prompt shard, by sample and in their order.

Covers both formats and their compressions, sample ids, rows that belong to no sample, and what is wrong with a shard.
Not covered: what is wrong with a row (`test_prompt_rows`), memory, which is measured by hand, and lines that are no
JSON (`test_jsonlines`).
"""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ShardChangedError, SpecError
from pipeline.prompt_rows import PromptRow
from pipeline.prompt_shards import read_prompt_table, stem_of
from pipeline.spec import StorageSpec
from tests.prompt_files import PARTS, Row, message_of, prompt, read_bytes, read_rows, to_bytes, to_parquet, user
from tests.s3_server import S3Server

FORMATS = ["p.jsonl", "p.ndjson", "p.jsonl.gz", "p.ndjson.zst", "p.parquet", "P.PQ"]


@pytest.mark.parametrize("file_name", FORMATS)
def test_read_prompt_table_five_prompts_a_sample_keep_the_order_of_the_shard(tmp_path: Path, file_name: str) -> None:
    pairs = [(f"s{n % 40}", f"p{n * 7 % 200}") for n in range(200)]  # samples interleaved, ids in no order
    table = read_rows(tmp_path, [prompt(s, p, text=f"{s} {p}") for s, p in pairs], file_name)
    for sample in range(40):
        expected = [p for s, p in pairs if s == f"s{sample}"]
        assert len(expected) == 5
        assert [row.prompt_id for row in table.of(f"s{sample}")] == expected
        assert [row.messages[0]["content"] for row in table.of(f"s{sample}")] == [f"s{sample} {p}" for p in expected]
    assert sorted(table.keys()) == sorted(pairs)
    assert (table.num_rows, table.num_unreadable, table.unreadable_examples) == (200, 0, ())
    assert table.of("s40") == ()


@pytest.mark.parametrize(
    ("sample_id", "found_as"),
    [
        (7, "7"),
        (-3, "-3"),
        (10**30, "1" + "0" * 30),
        ("007", "007"),
        (" a ", " a "),
        ("日本/é.jpg", "日本/é.jpg"),
        ("\ud800", "?"),
        ("\ud800", "\udfff"),  # both are written as `?`
    ],
)
def test_read_prompt_table_ids_are_compared_as_text(tmp_path: Path, sample_id: Any, found_as: str) -> None:
    table = read_rows(tmp_path, [prompt(sample_id)])
    assert [row.error for row in table.of(found_as)] == [None]
    assert len(list(table.keys())) == 1


def test_read_prompt_table_number_and_its_text_are_one_sample(tmp_path: Path) -> None:
    table = read_rows(tmp_path, [prompt(7, "a"), prompt("7", "b"), prompt(7, "b")])
    assert [row.prompt_id for row in table.of("7")] == ["a", "b", "b#2"]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.int32()])
def test_read_prompt_table_integer_column_of_ids_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"sample_id": pa.array([5, None, 0], kind), "prompt_id": ["a", "b", "c"], "text": ["x"] * 3})
    prompts = read_bytes(tmp_path, to_parquet(table))
    assert list(prompts.keys()) == [("5", "a"), ("0", "c")]
    assert prompts.num_unreadable == 1
    assert prompts.unreadable_examples[0].startswith("p.parquet: Row #1 belongs to no sample: sample_id is null;")


def test_read_prompt_table_unreadable_lines_are_counted_and_some_are_shown(tmp_path: Path) -> None:
    bad: list[Row | str] = [
        "{not json",
        "[1]",
        '{"sample_id": "\udcff"}',  # an invalid byte
        {"prompt_id": "p", "text": "x"},
        prompt(None),
        prompt(""),
        prompt(True),
        prompt(1.0),
        prompt(["s"]),
        prompt({"s": 1}),
        '{"sample_id": NaN}',
        "null",
    ]
    between: list[Row | str] = ["", prompt("s", "p")] * 6
    table = read_rows(tmp_path, [row for pair in zip(bad, between, strict=True) for row in pair])
    assert table.num_unreadable == 12
    assert table.num_rows == 6
    assert next(table.keys()) == ("s", "p")
    assert table.unreadable_examples[:2] == (
        "p.jsonl: Line 1 is not valid JSON: Expecting property name enclosed in double quotes at character 1.",
        "p.jsonl: Line 3 is not a JSON object but a list.",
    )
    ending = "it must be a string or an integer."
    assert table.unreadable_examples[5:] == (
        f"p.jsonl: Row #7 belongs to no sample: sample_id is ''; {ending}",
        f"p.jsonl: Row #9 belongs to no sample: sample_id is True; {ending}",
        f"p.jsonl: Row #10 belongs to no sample: sample_id is 1.0; {ending}",
        f"p.jsonl: Row #12 belongs to no sample: sample_id is a list; {ending}",
        f"p.jsonl: Row #13 belongs to no sample: sample_id is an object; {ending}",
    )


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
PARTS_MESSAGE = pa.struct([("content", pa.large_list(PART)), ("role", pa.large_string())])


def parquet_of(num_rows: int, **columns: Any) -> bytes:
    """Rows of sample_id `s0`, `s1`, ... and prompt_id `p`, and these columns."""
    ids = {"sample_id": [f"s{n}" for n in range(num_rows)], "prompt_id": ["p"] * num_rows}
    return to_parquet(pa.table({**ids, **columns}))


def test_read_prompt_table_parquet_structs_give_messages_and_sampling(tmp_path: Path) -> None:
    kinds = {"max_tokens": pa.int64(), "temperature": pa.float32(), "seed": pa.int8(), "stop": pa.list_(pa.string())}
    sampling = [{"max_tokens": 5}, None, {"stop": ["."], "temperature": 0.5}, {"seed": 0}]
    data = parquet_of(
        4,
        text=[None, "x", None, "y"],
        messages=pa.array([[user("a")], None, [{"role": "system", "content": "b"}, user("c")], []], pa.list_(MESSAGE)),
        sampling=pa.array(sampling, pa.struct(kinds.items())),
        thinking_mode=pa.array([None, "long", None, None]).dictionary_encode(),
    )
    table = read_bytes(tmp_path, data)
    assert table.of("s0") == (PromptRow("p", (user("a"),), None, {"max_tokens": 5}),)
    assert table.of("s1") == (PromptRow("p", (user("x"),), "long", {}),)
    expected = ({"role": "system", "content": "b"}, user("c"))
    assert table.of("s2") == (PromptRow("p", expected, None, {"stop": ["."], "temperature": 0.5}),)
    assert message_of(table.of("s3")[0]) == "Row #3 of p.parquet: it has both text and messages."


def test_read_prompt_table_parquet_structs_of_parts_are_messages(tmp_path: Path) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "é"}]
    messages = [[user(content)], [user([{"type": "text", "text": None}])], [user(None)], None]
    table = read_bytes(tmp_path, parquet_of(4, messages=pa.array(messages, pa.large_list(PARTS_MESSAGE))))
    assert table.of("s0")[0].messages == (user([{"type": "image"}, {"type": "text", "text": "é"}]),)
    assert message_of(table.of("s1")[0]) == f"Row #1 of p.parquet: messages[0].content[0] {PARTS}."
    assert message_of(table.of("s2")[0]).endswith("messages[0].content is null; it must be a string.")
    assert message_of(table.of("s3")[0]).endswith("it has neither text nor messages.")


def test_read_prompt_table_parquet_struct_of_unknown_sampling_fails_only_rows_that_have_it(tmp_path: Path) -> None:
    sampling = pa.array([{"top_kk": None, "top_k": 3}, {"top_kk": 1, "top_k": None}])
    table = read_bytes(tmp_path, parquet_of(2, text=["x", "y"], sampling=sampling))
    assert table.of("s0")[0].sampling == {"top_k": 3}
    assert message_of(table.of("s1")[0]).startswith("Row #1 of p.parquet: sampling has the key 'top_kk'; it may have ")


def test_read_prompt_table_parquet_columns_of_nulls_are_as_if_absent(tmp_path: Path) -> None:
    nulls = {name: pa.nulls(2) for name in ("messages", "thinking_mode", "sampling")}
    table = read_bytes(tmp_path, parquet_of(2, text=["x", "y"], **nulls))
    assert [table.of(f"s{n}")[0].messages for n in range(2)] == [(user("x"),), (user("y"),)]


def test_read_prompt_table_parquet_bytes_that_are_no_utf8_fail_only_their_row(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]), pa.py_buffer(b"xa\xffz")
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    table = read_bytes(tmp_path, parquet_of(3, text=broken))
    assert [table.of(name)[0].messages for name in ("s0", "s2")] == [(user("x"),), (user("z"),)]
    assert message_of(table.of("s1")[0]) == "Row #1 of p.parquet: text is not valid UTF-8; it must be a string."
    ids = pa.table({"sample_id": broken, "prompt_id": ["p"] * 3, "text": ["x"] * 3})
    table = read_bytes(tmp_path, to_parquet(ids))
    assert list(table.keys()) == [("x", "p"), ("z", "p")]
    assert table.num_unreadable == 1


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"sample_id": ["a"], "text": ["x"]}, "has no column prompt_id; it has sample_id, text."),
        ({"prompt_id": ["a"], "text": ["x"]}, "has no column sample_id; it has prompt_id, text."),
        ({"sample_id": ["a"], "prompt_id": ["x"]}, "has no column text or messages; it has sample_id, prompt_id."),
        ({"sample_id": [1.5]}, "column 'sample_id' of {url} is double; it must hold strings or integers."),
        ({"sample_id": pa.nulls(1)}, "column 'sample_id' of {url} is null; it must hold strings or integers."),
        ({"prompt_id": [1]}, "column 'prompt_id' of {url} is int64; it must hold strings."),
        ({"text": [b"x"]}, "column 'text' of {url} is binary; it must hold strings."),
        ({"thinking_mode": [True]}, "column 'thinking_mode' of {url} is bool; it must hold strings."),
        ({"sampling": [[1]]}, "column 'sampling' of {url} is list<"),
        ({"messages": [["x"]]}, "column 'messages' of {url} is list<"),
        ({"messages": [{"role": "user"}]}, "column 'messages' of {url} is struct<"),
    ],
)
def test_read_prompt_table_wrong_columns_of_a_parquet_file_raise(
    tmp_path: Path, columns: dict[str, Any], says: str
) -> None:
    good = {"sample_id": ["a"], "prompt_id": ["p"], "text": ["x"]} if len(columns) == 1 else {}
    with pytest.raises(SpecError) as caught:
        read_bytes(tmp_path, to_parquet(pa.table({**good, **columns})))
    assert str(caught.value).startswith("prompts.url: ")
    assert says.format(url=tmp_path / "p.parquet") in str(caught.value)


@pytest.mark.parametrize("file_name", FORMATS)
def test_read_prompt_table_too_large_a_file_raises_before_it_is_read(tmp_path: Path, file_name: str) -> None:
    draw = random.Random(0)
    data = to_bytes([prompt(f"s{n}", text=draw.randbytes(300).hex()) for n in range(50)], file_name)
    assert read_bytes(tmp_path, data, file_name, max_bytes=len(data)).num_rows == 50
    with pytest.raises(SpecError, match=rf"has {len(data)} bytes, the limit is {len(data) - 1}; keep .* aligned"):
        read_bytes(tmp_path, data, file_name, max_bytes=len(data) - 1)


@pytest.mark.parametrize("file_name", ["p.jsonl.gz", "p.jsonl.zst", "p.parquet"])
@pytest.mark.parametrize(("num_rows", "text"), [(200, "x" * 5000), (3000, "x")])
def test_read_prompt_table_small_file_that_grows_too_large_raises(
    tmp_path: Path, file_name: str, num_rows: int, text: str
) -> None:
    data = to_bytes([prompt("s", f"p{n}", text=text) for n in range(num_rows)], file_name)
    assert len(data) < 100_000
    with pytest.raises(SpecError, match=r"holds more than 400000 bytes; keep .* aligned"):
        read_bytes(tmp_path, data, file_name, max_bytes=100_000)


@pytest.mark.parametrize(
    "name", ["p.json", "p.csv", "p.txt", "jsonl", "p.parquet.gz", "p.jsonl.bz2", "p.jsonl.gz.zst", "p.gz", "p.tar"]
)
def test_read_prompt_table_other_endings_raise(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"prompts\.url: .* is no prompt shard; its name must end in \.jsonl"):
        read_rows(tmp_path, [prompt()], name)


@pytest.mark.parametrize(
    ("file_name", "data", "says"),
    [
        ("p.parquet", b"no parquet", "cannot be read: "),
        ("p.parquet", b"", "cannot be read: "),
        ("p.parquet", to_bytes([prompt()], "p.parquet")[:-9], "cannot be read: "),
        ("p.jsonl.gz", to_bytes([prompt(f"s{n}") for n in range(999)], "p.jsonl.gz")[:-20], "The gzip file is damaged"),
        ("p.jsonl.zst", b'{"sample_id": 1}', "The zstd file is damaged"),
        ("p.jsonl", to_bytes([prompt()], "p.jsonl.gz"), "has a usable sample_id. p.jsonl: Line 1 is not valid"),
        ("p.jsonl", b'{"id": 1, "text": "x"}\n{"id": 2}\n', "has a usable sample_id. p.jsonl: Row #0 belongs to no"),
    ],
)
def test_read_prompt_table_damaged_or_other_file_raises(tmp_path: Path, file_name: str, data: bytes, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_bytes(tmp_path, data, file_name)
    assert str(caught.value).startswith("prompts.url: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("file_name", FORMATS)
def test_read_prompt_table_shard_without_rows_is_an_empty_table(tmp_path: Path, file_name: str) -> None:
    columns = {"sample_id": pa.string(), "prompt_id": pa.string(), "text": pa.string()}
    empty = pa.table({name: pa.array([], kind) for name, kind in columns.items()})
    data = to_parquet(empty) if file_name.lower().endswith(("parquet", "pq")) else to_bytes([""], file_name)
    table = read_bytes(tmp_path, data, file_name)
    assert (table.num_rows, table.num_unreadable, list(table.keys())) == (0, 0, [])


def test_read_prompt_table_file_that_is_gone_or_changed_raises(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"prompts\.url: there is no file .*/p\.jsonl"):
        read_prompt_table(str(tmp_path / "p.jsonl"), None, StorageSpec())
    read_rows(tmp_path, [prompt()])
    with pytest.raises(ShardChangedError):
        read_prompt_table(str(tmp_path / "p.jsonl"), "another version", StorageSpec())


@pytest.mark.parametrize("file_name", FORMATS)
def test_read_prompt_table_reads_object_storage(s3: S3Server, file_name: str) -> None:
    url = f"{s3.fresh_prefix('prompts')}/{file_name}"
    s3.put(url, to_bytes([prompt(f"é {n}", text=f"{n}") for n in range(5000)], file_name))
    table = read_prompt_table(url, None, StorageSpec(endpoint_url=s3.endpoint_url, region="us-east-1"))
    assert table.num_rows == 5000
    assert table.of("é 4321") == (PromptRow("p", (user("4321"),), None, {}),)


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("s3://bucket/in/00017.tar.gz", "00017"),
        ("s3://bucket/in/00017.tar", "00017"),
        ("00017.tgz", "00017"),
        ("a/a.b.parquet", "a.b"),
        ("/x.jsonl.zst", "x"),
        ("x.NDJSON.GZ", "x"),
        ("x.pq", "x"),
        ("x.jsonl.gzip", "x"),
        ("x.tar.zstd", "x"),
        ("x", "x"),
        ("x.jpg", "x.jpg"),
        ("x.json", "x.json"),
        ("v1.0", "v1.0"),
        ("in.tar/17.parquet", "17"),
        (".parquet", ".parquet"),
        (".tar.gz", ".tar"),
        ("jsonl.gz", "jsonl"),
    ],
)
def test_stem_of_takes_the_endings_of_data_away(url: str, stem: str) -> None:
    assert stem_of(url) == stem
