"""What reading a shard to its end has told: how many samples it has, and where its chunks begin.

A shard whose samples were never counted is read as a stream, and its chunks get their names on the way. Its reader
writes a survey when it reaches the end; from then on the plan knows the shard's chunks. A survey says something about
the input only: it commits nothing, and a lost one costs another reading.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from pipeline.ahead import map_ahead
from pipeline.errors import JobError
from pipeline.records import Anchor, Chunk, Shard
from pipeline.spec import JobSpec
from pipeline.storage import absolute_url, join_url, open_store

READS_AT_ONCE = 16


@dataclass(frozen=True)
class Survey:
    """`positions` are where each chunk of `chunk_rows` samples begins; all 0 where only the beginning can be sought."""

    num_samples: int
    positions: tuple[int, ...]

    def chunks(self, shard: Shard, chunk_rows: int) -> Iterator[Chunk]:
        """The shard's chunks, under the names that a reader of the whole stream gives them."""
        for number, position in enumerate(self.positions):
            start, stop = number * chunk_rows, min((number + 1) * chunk_rows, self.num_samples)
            anchor = Anchor(start, position) if position else Anchor()
            yield shard.chunk(start, stop, anchor=anchor)


@dataclass
class SurveyMaker:
    """Takes down a stream's samples as they go by."""

    chunk_rows: int
    num_samples: int = 0
    positions: list[int] = field(default_factory=list)

    def add(self, index: int, position: int) -> None:
        if index % self.chunk_rows == 0:
            self.positions.append(position)
        self.num_samples = index + 1

    @property
    def survey(self) -> Survey:
        return Survey(self.num_samples, tuple(self.positions))


def surveys_url(job: JobSpec) -> str:
    """The folder of an output's surveys."""
    return join_url(absolute_url(job.output.url), "_shards")


def survey_url(job: JobSpec, shard: Shard) -> str:
    """Where a shard's survey lies. Chunks of another size have other positions."""
    identity = json.dumps([shard.url, shard.version, job.output.chunk_rows])
    return join_url(surveys_url(job), hashlib.sha256(identity.encode()).hexdigest()[:32] + ".json")


def write_survey(job: JobSpec, shard: Shard, survey: Survey) -> None:
    """Keep what was learnt; every reader of this shard learns the same."""
    url = survey_url(job, shard)
    open_store(url, job.storage).put_if_absent(url, json.dumps(asdict(survey)).encode())


def list_surveys(job: JobSpec) -> frozenset[str]:
    """URLs of all surveys of this output: one listing."""
    return frozenset(info.url for info in open_store(surveys_url(job), job.storage).list(surveys_url(job) + "/"))


def read_survey(job: JobSpec, shard: Shard) -> Survey:
    """Raises JobError for a file that is no survey."""
    url = survey_url(job, shard)
    try:
        content = json.loads(open_store(url, job.storage).read(url))
        return Survey(content["num_samples"], tuple(content["positions"]))
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{url} is not a survey of this software; delete it.") from error


def read_surveys(job: JobSpec, shards: list[Shard]) -> Iterator[Survey]:
    """Many surveys, several at a time, in order."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from map_ahead(pool, lambda shard: read_survey(job, shard), shards, READS_AT_ONCE)
