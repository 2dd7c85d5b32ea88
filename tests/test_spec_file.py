"""`load_spec`: the YAML file, `--set key=value`, and what is said when either is wrong."""

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.spec_file import apply_override, load_spec, read_yaml
from pipeline.errors import SpecError

SPEC = """\
name: caption
input: {url: in/}
prompts:
  - id: caption
    template: "Describe this image."
  - id: count
    template: "How many?"
engine:
  max_num_seqs: 4
output: {url: out/}
"""


@pytest.fixture
def spec_path(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return str(path)


def test_load_spec_file_gives_the_job(spec_path: str) -> None:
    job = load_spec(spec_path)
    assert job.name == "caption"
    assert [prompt.id for prompt in job.spec_prompts] == ["caption", "count"]
    assert job.engine.max_num_seqs == 4


def test_load_spec_overrides_reach_keys_lists_and_new_sections(spec_path: str) -> None:
    job = load_spec(
        spec_path,
        [
            "engine.max_num_seqs=128",
            "prompts.1.template=What color = this?",
            "prompts.0.thinking_mode='{{ mode }}'",
            "sampling.temperature=0.5",
            "engine.replicas.max=8",
            "engine.args.enforce_eager=true",
            "input.url=[a/, b/]",
            "input.limit=7",
            "input.limit=null",
            "output.keep_columns=[label]",
        ],
    )
    assert job.engine.max_num_seqs == 128
    assert job.spec_prompts[1].template == "What color = this?"
    assert job.spec_prompts[0].thinking_mode == "{{ mode }}"
    assert job.sampling.temperature == 0.5
    assert job.engine.replicas.max == 8
    assert job.engine.args == {"enforce_eager": True}
    assert job.input.urls == [f"{os.getcwd()}/a/", f"{os.getcwd()}/b/"]
    assert job.input.limit is None
    assert job.output.keep_columns == ["label"]


def test_load_spec_local_paths_become_absolute_and_urls_stay(
    tmp_path: Path, spec_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_spec(spec_path, ["engine.model=./small"])
    assert (job.input.url, job.output.url, job.engine.model) == (
        f"{tmp_path}/in/",
        f"{tmp_path}/out/",
        f"{tmp_path}/small",
    )
    job = load_spec(spec_path, ["input.url=[s3://b/in/, x]", "output.url=s3://b/out/", "engine.model=YannQi/R-4B"])
    assert (job.input.url, job.output.url, job.engine.model) == (
        ["s3://b/in/", f"{tmp_path}/x"],
        "s3://b/out/",
        "YannQi/R-4B",
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1", {"a": 1, "list": [1, 2], "deep": {"x": 1}}),
        ("deep.x=[3]", {"a": 0, "list": [1, 2], "deep": {"x": [3]}}),
        ("deep.new.key=v", {"a": 0, "list": [1, 2], "deep": {"x": 1, "new": {"key": "v"}}}),
        ("list.1={b: c}", {"a": 0, "list": [1, {"b": "c"}], "deep": {"x": 1}}),
        ("a=", {"a": None, "list": [1, 2], "deep": {"x": 1}}),
        ("a='1'", {"a": "1", "list": [1, 2], "deep": {"x": 1}}),
    ],
)
def test_apply_override_value_is_yaml_and_changes_one_place(override: str, expected: dict[str, Any]) -> None:
    data: dict[str, Any] = {"a": 0, "list": [1, 2], "deep": {"x": 1}}
    apply_override(data, override)
    assert data == expected


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.max_num_seqs", "write it as key=value"),
        ("=5", "write it as key=value"),
        ("", "write it as key=value"),
        ("name={a: [", "the value is not valid YAML"),
        ("name=2024-13-45", "the value is not valid YAML"),  # looks like a date to YAML
        ("prompts.2.id=x", "there is no key '2' there"),
        ("prompts.-1.id=x", "there is no key '-1' there"),
        ("prompts.one.id=x", "there is no key 'one' there"),
        ("prompts.²=x", "there is no key '²' there"),
        ("prompts.2=x", "there is no key '2' there"),
        ("name.first=x", "there is no key 'first' there"),
        ("name.first.letter=x", "there is no key 'first' there"),
    ],
)
def test_load_spec_bad_override_is_named(spec_path: str, override: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_path, [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert says in str(caught.value)


def test_load_spec_override_of_an_unknown_key_names_the_allowed_ones(spec_path: str) -> None:
    with pytest.raises(SpecError, match=r"engine\.max_seqs: unknown key; allowed here: .*max_num_seqs"):
        load_spec(spec_path, ["engine.max_seqs=5"])


def test_load_spec_override_of_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("")
    with pytest.raises(SpecError):
        load_spec(str(tmp_path / "job.yaml"), ["name=x"])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name: a\ninput:\n\turl: x\n", "(line 3, column 1)"),
        ("name: a\ninput: {url: x\nprompts: []\n", "(line 3, column 8)"),
        ('name: "never closed\n', "(line 2, column 1)"),
        ("name: a\n  input: b\n", "(line 2, column 8)"),
        ("name: !!python/object:os.system x\n", "(line 1, column 7)"),
    ],
)
def test_read_yaml_wrong_yaml_names_file_and_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_yaml(str(path))
    assert str(caught.value).startswith(f"{path}: not valid YAML: ")
    assert where in str(caught.value)


@pytest.mark.parametrize("text", ["name: 2024-13-45\n", "name: a\x07b\n"])
def test_read_yaml_value_that_yaml_cannot_make_is_a_spec_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match="not valid YAML"):
        read_yaml(str(path))


def test_read_yaml_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.yaml: the job spec cannot be read: No such file"):
        read_yaml(str(tmp_path / "absent.yaml"))
    with pytest.raises(SpecError, match="the job spec cannot be read: Is a directory"):
        read_yaml(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(SpecError, match=r"latin\.yaml: the job spec is not UTF-8 text"):
        read_yaml(str(tmp_path / "latin.yaml"))


def test_load_spec_yaml_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    prompts = "[&first {id: a, template: x, thinking_mode: long}, {<<: *first, id: b}]"
    path.write_text(f"input: {{url: in}}\nprompts: {prompts}\noutput: {{url: out}}\n")
    assert [(prompt.id, prompt.thinking_mode) for prompt in load_spec(str(path)).spec_prompts] == [
        ("a", "long"),
        ("b", "long"),
    ]


def test_read_yaml_key_given_twice_is_refused_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SPEC + "engine:\n  num_gpus: 0\n")  # max_num_seqs: 4 above would be lost without a word
    with pytest.raises(SpecError, match="engine"):
        load_spec(str(path))
