"""`parse_spec`: every wrong key, type and value is named in one message; and what a job's fingerprint is made of.

Not covered: reading the YAML file and `--set` (`test_spec_file`).
"""

import copy
import traceback
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import SpecError
from pipeline.images import FORMATS
from pipeline.spec import JobSpec, fingerprint_of, fingerprint_parts, parse_spec

MINIMAL: dict[str, Any] = {
    "input": {"url": "s3://bucket/in/"},
    "prompts": [{"id": "caption", "template": "Describe this image."}],
    "output": {"url": "s3://bucket/out/"},
}


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The minimal spec with one key, such as `prompts.0.id`, set."""
    data: Any = copy.deepcopy(MINIMAL)
    place = data
    *path, last = key.split(".")
    for name in path:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = value
    result: dict[str, Any] = data
    return result


def refusal_of(data: Any) -> list[str]:
    """The lines below the first that parse_spec refuses the data with."""
    with pytest.raises(SpecError) as caught:
        parse_spec(data, "job.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == "job.yaml: the job spec is wrong."
    return lines


def test_parse_spec_minimal_has_the_documented_defaults() -> None:
    job = parse_spec(MINIMAL, "job.yaml")
    assert job.input.format == "auto"
    assert (job.input.columns.id, job.input.columns.image, job.input.limit) == ("id", "image", None)
    assert (job.spec_prompts[0].thinking_mode, job.spec_prompts[0].system) == ("auto", None)
    assert (job.sampling.temperature, job.sampling.max_tokens, job.sampling.seed) == (0.0, 1024, 0)
    assert (job.engine.kind, job.engine.model, job.engine.revision) == ("vllm", "YannQi/R-4B", None)
    assert (job.engine.replicas.min, job.engine.replicas.max, job.engine.num_gpus) == (1, 1, 1)
    assert (job.engine.tensor_parallel_size, job.engine.max_model_len, job.engine.max_num_seqs) == (1, None, 256)
    assert (job.output.chunk_rows, job.output.keep_columns) == (256, [])
    assert (job.limits.max_error_rate, job.limits.max_image_pixels) == (0.01, 100_000_000)
    assert (job.limits.max_image_bytes, job.limits.fetch_timeout_s) == (33_554_432, 30.0)
    assert (job.storage.endpoint_url, job.storage.region) == (None, None)


def test_parse_spec_its_own_dump_is_the_same_spec() -> None:
    job = parse_spec(with_value("engine.args", {"enforce_eager": True}), "job.yaml")
    assert parse_spec(job.model_dump(mode="json"), "_job.json") == job


def test_parse_spec_result_is_frozen() -> None:
    job = parse_spec(MINIMAL, "job.yaml")
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input.url", ["a/", "b/*.parquet"]),
        ("input.columns.id", None),
        ("sampling.seed", None),
        ("sampling.temperature", 1),
        ("prompts.0.thinking_mode", "{{ mode }}"),
        ("prompts.0.system", "You see {{ kind }}."),
        ("engine.num_gpus", 0),
        ("engine.num_gpus", 0.5),
        ("engine.replicas", {"min": 3, "max": 3}),
        ("engine.args", {"limit_mm_per_prompt": {"image": 1}, "dtype": "float32"}),
        ("limits.max_error_rate", 1),
        ("output.keep_columns", ["id", "label"]),
        ("input.columns.image", ["left", "right"]),
        ("input.where", [["width", ">", 200], ["lang", "in", ["en", "de"]]]),
        ("input.where", [[["width", ">", 200]], [["lang", "==", "en"]]]),
        ("input.sample", {"fraction": 0.5, "seed": 7}),
        ("prompts.0.sampling", {"max_tokens": "{{ budget }}", "temperature": 0.5}),
        ("http.allow_networks", ["127.0.0.0/8", "fd00::/8"]),
        ("limits.image_formats", ["PNG", "JPEG"]),
    ],
)
def test_parse_spec_allowed_value_is_taken(key: str, value: Any) -> None:
    place: Any = parse_spec(with_value(key, value), "job.yaml").model_dump()
    for name in key.split("."):
        place = place[int(name)] if isinstance(place, list) else place[name]
    assert place == value


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("inputs", "name, input, prompts, sampling, engine, output, limits, http, storage"),
        ("input.folder", "url, format, columns, limit, sample, where"),
        ("input.columns.text", "id, image"),
        ("prompts.0.text", "id, template, system, messages, thinking_mode, sampling"),
        ("engine.replicas.count", "min, max"),
        ("output.columns", "url, chunk_rows, keep_columns"),
        (
            "limits.max_rows",
            "max_error_rate, max_image_pixels, max_image_bytes, max_image_frames, image_formats, decode_timeout_s, "
            "decode_memory_bytes, fetch_timeout_s, stall_timeout_s, start_timeout_s, max_engine_restarts, "
            "preemption_grace_s, yield_after_s",
        ),
        ("http.proxy", "max_redirects, max_per_host, max_attempts, allow_networks"),
        ("storage.secret_key", "endpoint_url, region"),
    ],
)
def test_parse_spec_unknown_key_names_it_and_the_allowed_keys(key: str, allowed: str) -> None:
    assert refusal_of(with_value(key, 1)) == [f"  {key}: unknown key; allowed here: {allowed}"]


@pytest.mark.parametrize("section", ["sampling", "engine"])
def test_parse_spec_unknown_key_of_a_large_section_lists_its_keys(section: str) -> None:
    (line,) = refusal_of(with_value(f"{section}.nope", 1))
    known = ", ".join(type(getattr(parse_spec(MINIMAL, ""), section)).model_fields)
    assert line == f"  {section}.nope: unknown key; allowed here: {known}"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("input.limit", "10", "input.limit: input should be a valid integer (it is '10')"),
        ("input.limit", 1.5, "input.limit: input should be a valid integer (it is 1.5)"),
        ("input.limit", True, "input.limit: input should be a valid integer (it is True)"),
        ("input.limit", 0, "input.limit: input should be greater than or equal to 1 (it is 0)"),
        (
            "input.format",
            "csv",
            "input.format: input should be 'auto', 'parquet', 'webdataset', 'jsonl' or 'images' (it is 'csv')",
        ),
        ("input", None, "input: input should be a valid dictionary or instance of InputSpec (it is None)"),
        ("prompts", "Describe.", "prompts: input should be a valid list (it is 'Describe.')"),
        ("prompts", [], "prompts: list should have at least 1 item after validation, not 0"),
        ("prompts.0.template", "", "prompts.0.template: string should have at least 1 character (it is '')"),
        (
            "prompts.0.id",
            "two words",
            "prompts.0.id: string should match pattern '^[A-Za-z0-9_.-]{1,100}$' (it is 'two words')",
        ),
        (
            "prompts.0.thinking_mode",
            "sometimes",
            "prompts.0.thinking_mode: must be auto, long, short or a template such as "
            "\"{{ mode }}\" (it is 'sometimes')",
        ),
        ("sampling.temperature", -1, "sampling.temperature: input should be greater than or equal to 0 (it is -1)"),
        ("sampling.max_tokens", 0, "sampling.max_tokens: input should be greater than or equal to 1 (it is 0)"),
        ("sampling.stop", "###", "sampling.stop: input should be a valid list (it is '###')"),
        ("engine.replicas", {"min": 3, "max": 2}, "engine.replicas: min (3) is larger than max (2)"),
        ("engine.replicas.max", 0, "engine.replicas.max: input should be greater than or equal to 1 (it is 0)"),
        ("engine.kind", "tgi", "engine.kind: input should be 'vllm' or 'simulated' (it is 'tgi')"),
        ("output.url", "", "output.url: string should have at least 1 character (it is '')"),
        ("output.chunk_rows", 0, "output.chunk_rows: input should be greater than or equal to 1 (it is 0)"),
        ("output.keep_columns", ["a", "a"], "output.keep_columns: names a column twice"),
        (
            "output.keep_columns",
            ["label", "shard", "answer"],
            "output.keep_columns: answer, shard: the output has a column of this name already",
        ),
        ("limits.max_error_rate", 2, "limits.max_error_rate: input should be less than or equal to 1 (it is 2)"),
        (
            "limits.image_formats",
            ["PNG", "SVG"],
            f"limits.image_formats: 'SVG' cannot be decoded here; allowed: {', '.join(FORMATS)}",
        ),
        ("http.allow_networks", ["10.0.0.1/8"], "http.allow_networks: 10.0.0.1/8 has host bits set"),
        ("input.sample", 1.5, "input.sample.fraction: input should be less than or equal to 1 (it is 1.5)"),
        (
            "input.where",
            [],
            "input.where: has no condition; leave the key out, or write [[column, operator, value], ...]",
        ),
        (
            "input.where",
            [["width", "~", 3]],
            "input.where: '~' is no operator; allowed are =, ==, !=, <, >, <=, >=, in, not in",
        ),
        (
            "input.where",
            ["width > 3"],
            'input.where: must be a list of [column, operator, value], such as [[width, ">", 200]]',
        ),
        ("input.where", [["a", "in", 3]], "input.where: a in: in and not in take a list, the others one value"),
        ("input.where", [["a", "=", None]], "input.where: a = null: a comparison with null holds for no sample"),
        (
            "input.where",
            [["a", "in", [1, "x"]]],
            "input.where: a in: the values must be of one type, whole numbers of 64 bits",
        ),
        (
            "input.where",
            [["a", ">", 2**70]],
            "input.where: a >: the values must be of one type, whole numbers of 64 bits",
        ),
        ("prompts.0.sampling", {"best_of": 3}, "prompts.0.sampling: 'best_of' is no sampling parameter; allowed: "),
        (
            "prompts.0.sampling",
            {"top_p": 3},
            "prompts.0.sampling: sampling.top_p: input should be less than or equal to 1",
        ),
        ("prompts", {"url": ""}, "prompts.url: string should have at least 1 character (it is '')"),
        ("prompts", {"url": "a", "shape": "x"}, "prompts.shape: input should be 'aligned' or 'table' (it is 'x')"),
        (
            "prompts",
            {"url": "a", "urls": "b"},
            "prompts.urls: unknown key; allowed here: url, shape, thinking_mode, unmatched",
        ),
        ("prompts", [{"id": "p"}], "prompts.0: needs a template, or messages, and not both"),
        (
            "prompts",
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            "prompts.0: the last of messages must be the user's",
        ),
        (
            "prompts",
            [{"messages": [{"role": "user", "content": [{"type": "video"}]}]}],
            'prompts.0.messages.0.content: each part must be {type: text, text: "..."} or {type: image}',
        ),
    ],
)
def test_parse_spec_wrong_value_names_key_value_and_what_is_allowed(key: str, value: Any, says: str) -> None:
    (line,) = refusal_of(with_value(key, value))
    assert line.startswith(f"  {says}") if says.endswith(" ") else line == f"  {says}"


@pytest.mark.parametrize("value", [5, [], [""], [5]])
def test_parse_spec_wrong_input_url_names_the_key(value: Any) -> None:
    lines = refusal_of(with_value("input.url", value))
    assert lines
    assert all(line.startswith("  input.url") for line in lines)


@pytest.mark.parametrize("url", ["s3://bucket/out[1]/", "/data/out*", "out?"])
def test_parse_spec_output_that_stands_for_many_places_is_refused(url: str) -> None:
    [line] = refusal_of(with_value("output.url", url))
    assert line.startswith(f"  output.url: {url} holds one of * ? [")


@pytest.mark.parametrize("missing", ["input", "prompts", "output"])
def test_parse_spec_missing_key_is_named(missing: str) -> None:
    data = {key: value for key, value in MINIMAL.items() if key != missing}
    assert refusal_of(data) == [f"  {missing}: this key is required"]


def test_parse_spec_several_mistakes_are_told_at_once() -> None:
    data = {**with_value("engine.gpus", 1), "output": {"url": "out", "chunk_rows": -1}}
    assert [line.split(":")[0] for line in refusal_of(data)] == ["  engine.gpus", "  output.chunk_rows"]


@pytest.mark.parametrize("data", [None, [], "text", 5])
def test_parse_spec_no_mapping_says_what_a_spec_is(data: Any) -> None:
    with pytest.raises(SpecError, match=r"job.yaml: a job spec is a YAML mapping with the keys name, input, prompts"):
        parse_spec(data, "job.yaml")


@pytest.mark.parametrize("key", ["prompts.0.template", "prompts.0.system", "prompts.0.thinking_mode"])
@pytest.mark.parametrize("source", ["line one\n{{ open", "{% if x %}", "{{ x | no_such_filter }}"])
def test_parse_spec_broken_template_names_key_and_line(key: str, source: str) -> None:
    (line,) = refusal_of(with_value(key, source))
    assert line.startswith(f"  {key}: is not a valid Jinja2 template: ")
    assert f"(line {2 if source.startswith('line one') else 1})" in line


def test_parse_spec_duplicate_prompt_ids_name_the_id() -> None:
    prompts = [{"id": "a", "template": "x"}, {"id": "b", "template": "x"}, {"id": "a", "template": "y"}]
    assert refusal_of(with_value("prompts", prompts)) == ["  prompts: two prompts have the id 'a'; give each its own"]


def test_parse_spec_prompts_without_ids_clash() -> None:
    assert "'prompt'" in refusal_of(with_value("prompts", [{"template": "x"}, {"template": "y"}]))[0]


@pytest.mark.parametrize("name", ["model", "revision", "tensor_parallel_size", "max_model_len", "max_num_seqs"])
def test_parse_spec_engine_args_that_double_a_key_point_to_it(name: str) -> None:
    (line,) = refusal_of(with_value("engine.args", {"dtype": "auto", name: 1}))
    assert line == f"  engine.args: {name}: say it as engine.{name}, not in engine.args"


@pytest.mark.parametrize("url", ["http://user:hidden-word@127.0.0.1:9000", "https://hidden-word@host"])
def test_parse_spec_endpoint_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(with_value("storage.endpoint_url", url), "job.yaml")
    assert "storage.endpoint_url: must not hold a user or a password" in str(caught.value)
    assert "hidden-word" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"pool": "serve", "args": {}}, "engine: args: with pool: serve the deployment decides; leave it out"),
        (
            {"pool": "serve", "num_gpus": 1, "max_model_len": 99},
            "engine: num_gpus, max_model_len: with pool: serve the deployment decides; leave it out",
        ),
        ({"app": "other"}, "engine: app (other) names a deployment: set pool: serve, or leave it out"),
    ],
)
def test_parse_spec_keys_that_the_engines_pool_would_ignore_are_refused(engine: dict[str, Any], message: str) -> None:
    assert refusal_of(with_value("engine", engine)) == [f"  {message}"]


def test_parse_spec_actors_of_a_deployment_need_no_gpu() -> None:
    own = parse_spec(with_value("engine", {"num_gpus": 0.5, "tensor_parallel_size": 4}), "job.yaml").engine
    served = parse_spec(with_value("engine", {"pool": "serve", "app": "other", "revision": "v1"}), "job.yaml").engine
    assert (own.gpus_per_actor, served.gpus_per_actor) == (2, 0)


def test_prompt_columns_are_those_of_template_system_and_mode() -> None:
    prompt = {"id": "p", "template": "{{ a }}", "system": "{{ b }} {{ a }}", "thinking_mode": "{{ c }}"}
    assert parse_spec(with_value("prompts", [prompt]), "job.yaml").spec_prompts[0].columns == {"a", "b", "c"}


def parts_of(data: dict[str, Any]) -> dict[str, str]:
    job = parse_spec(data, "job.yaml")
    schema = pa.schema([(name, pa.string()) for name in job.output.keep_columns])
    return fingerprint_parts(job, "model-identity", job.input.format, schema)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("engine.revision", "v2", "engine.revision"),
        ("engine.kind", "simulated", "engine"),
        ("engine.max_model_len", 4096, "engine"),
        ("engine.args", {"dtype": "float32"}, "engine"),
        ("engine.simulation.thinking_share", 0.9, "engine"),
        ("prompts.0.id", "other", "prompts"),
        ("prompts.0.template", "Other.", "prompts"),
        ("prompts.0.system", "Be brief.", "prompts"),
        ("prompts.0.thinking_mode", "long", "prompts"),
        ("sampling.temperature", 0.5, "sampling"),
        ("sampling.max_tokens", 5, "sampling"),
        ("sampling.seed", 1, "sampling"),
        ("sampling.stop", ["#"], "sampling"),
        ("input.format", "images", "input.format"),
        ("input.columns.id", "key", "input.columns"),
        ("input.columns.image", "picture", "input.columns"),
        ("output.chunk_rows", 128, "output.chunk_rows"),
        ("output.keep_columns", ["label"], "output.keep_columns"),
        ("limits.max_image_pixels", 5, "limits"),
        ("limits.max_image_bytes", 5, "limits"),
        ("limits.max_image_frames", 5, "limits"),
        ("limits.image_formats", ["PNG"], "limits"),
        ("input.sample", 0.5, "input.sample"),
        ("input.where", [["a", ">", 1]], "input.where"),
        ("prompts.0.sampling", {"max_tokens": 5}, "prompts"),
        ("prompts", {"url": "s3://bucket/prompts/"}, "prompts"),
    ],
)
def test_fingerprint_parts_what_decides_an_answer_changes_its_part_alone(key: str, value: Any, part: str) -> None:
    before, now = parts_of(MINIMAL), parts_of(with_value(key, value))
    assert {name for name in before if before[name] != now[name]} == {part}
    assert fingerprint_of(before) != fingerprint_of(now)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("input.url", "s3://bucket/more/"),
        ("input.limit", 5),
        ("engine.replicas", {"min": 2, "max": 8}),
        ("engine.num_gpus", 0),
        ("engine.tensor_parallel_size", 2),
        ("engine.max_num_seqs", 5),
        ("engine.model", "a/moved/copy"),
        ("engine.pool", "serve"),
        ("engine", {"pool": "serve", "app": "other"}),
        ("output.url", "s3://bucket/other/"),
        ("limits.max_error_rate", 0.5),
        ("limits.fetch_timeout_s", 5.0),
        ("limits.stall_timeout_s", 5.0),
        ("limits.start_timeout_s", 5.0),
        ("limits.max_engine_restarts", 5),
        ("limits.preemption_grace_s", 5.0),
        ("limits.yield_after_s", None),
        ("engine.simulation.kills_engine", "x"),
        ("limits.decode_timeout_s", 5.0),
        ("limits.decode_memory_bytes", 1 << 28),
        ("http", {"max_redirects": 1}),
        ("storage.endpoint_url", "http://127.0.0.1:9000"),
        ("storage.region", "eu-central-1"),
    ],
)
def test_fingerprint_parts_where_and_how_fast_change_nothing(key: str, value: Any) -> None:
    assert parts_of(with_value(key, value)) == parts_of(MINIMAL)


def test_fingerprint_parts_another_model_changes_its_part_alone() -> None:
    job = parse_spec(MINIMAL, "job.yaml")
    before, now = (fingerprint_parts(job, model, "parquet", pa.schema([])) for model in ("one", "two"))
    assert {name for name in before if before[name] != now[name]} == {"engine.model"}


def test_fingerprint_parts_what_the_input_turned_out_to_be_counts() -> None:
    job = parse_spec(with_value("output.keep_columns", ["n"]), "job.yaml")
    kept = pa.schema([("n", pa.int64())])
    parts = fingerprint_parts(job, "model", "parquet", kept, ("prompts.jsonl", "v1"))
    for part, other in {
        "input.format": ("jsonl", kept, ("prompts.jsonl", "v1")),
        "output.keep_columns": ("parquet", pa.schema([("n", pa.int32())]), ("prompts.jsonl", "v1")),
        "prompts.url": ("parquet", kept, ("prompts.jsonl", "v2")),
    }.items():
        changed = fingerprint_parts(job, "model", *other)
        assert {name for name in parts if parts[name] != changed[name]} == {part}


def test_fingerprint_of_does_not_depend_on_the_order_of_keys() -> None:
    one = parts_of(with_value("engine.args", {"a": 1, "b": {"c": 1, "d": 2}}))
    other = parts_of(with_value("engine.args", {"b": {"d": 2, "c": 1}, "a": 1}))
    assert fingerprint_of(one) == fingerprint_of(dict(reversed(other.items())))


def test_fingerprint_every_key_of_the_spec_was_decided_upon() -> None:
    """A new key must be put into one of the tables above."""
    assert sorted(JobSpec.model_fields) == sorted(
        ["name", "input", "prompts", "sampling", "engine", "output", "limits", "http", "storage"]
    )
    job = parse_spec(MINIMAL, "job.yaml")
    in_fingerprint = {"kind", "model", "revision", "max_model_len", "args", "simulation"}
    not_in_it = {"pool", "app", "replicas", "num_gpus", "tensor_parallel_size", "max_num_seqs"}
    assert set(type(job.engine).model_fields) == in_fingerprint | not_in_it
    assert set(type(job.input).model_fields) == {"format", "columns", "sample", "where"} | {"url", "limit"}
    assert set(type(job.output).model_fields) == {"chunk_rows", "keep_columns"} | {"url"}
    in_fingerprint = {"max_image_pixels", "max_image_bytes", "max_image_frames", "image_formats"}
    not_in_it = {"max_error_rate", "fetch_timeout_s", "decode_timeout_s", "decode_memory_bytes"}
    not_in_it |= {"stall_timeout_s", "start_timeout_s", "max_engine_restarts", "preemption_grace_s", "yield_after_s"}
    assert set(type(job.limits).model_fields) == in_fingerprint | not_in_it
