"""A pass over a shard that ends its process again and again, with a watch that is scripted."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from pipeline.errors import JobError
from pipeline.lives import MAX_READ_DEATHS, Life, counted

LIFE = Life("owner", "node", 1, 1.0)


class ScriptedWatch:
    """Knows of so many deaths; None: it says nothing."""

    def __init__(self, deaths: int | None) -> None:
        self.deaths = deaths
        self.ended: list[str] = []
        self.read = SimpleNamespace(remote=lambda life, name: self)
        self.has_read = SimpleNamespace(remote=lambda life, name: self.ended.append(name))


@pytest.fixture(autouse=True)
def ray_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(watch: ScriptedWatch, timeout: float) -> int:
        if watch.deaths is None:
            raise GetTimeoutError("no answer")
        return watch.deaths

    monkeypatch.setattr("pipeline.lives.ray.get", get)
    monkeypatch.setattr(Life, "here", classmethod(lambda cls: LIFE))


@pytest.mark.parametrize("deaths", [0, MAX_READ_DEATHS - 1, None])
def test_pass_is_made_and_told_of_at_its_end(deaths: int | None) -> None:
    watch: Any = ScriptedWatch(deaths)
    with counted(watch, "a from 0"):
        assert watch.ended == []
    assert watch.ended == ["a from 0"]


def test_pass_that_ended_too_many_processes_fails_the_job() -> None:
    watch: Any = ScriptedWatch(MAX_READ_DEATHS)
    with pytest.raises(JobError, match=r"a from 0: 10 processes that read it have ended"), counted(watch, "a from 0"):
        pytest.fail("it was made")
    assert watch.ended == []


def test_pass_that_fails_is_at_its_end_too() -> None:
    watch: Any = ScriptedWatch(0)
    with pytest.raises(ValueError, match="odd"), counted(watch, "a from 0"):
        raise ValueError("odd")
    assert watch.ended == ["a from 0"]
