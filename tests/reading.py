"""Input read for tests, as a job's read tasks do it, without Ray."""

from collections.abc import Callable, Sequence

from pipeline.images import open_prepared
from pipeline.plan import Plan, make_plan, make_readings
from pipeline.readers import ReadSettings, read_chunks
from pipeline.records import CommittedChunk, FailedShard, ReadChunk, Reading, Task, Work
from pipeline.spec import JobSpec
from tests.builders import number_of


def settings_of(job: JobSpec, plan: Plan) -> ReadSettings:
    """What the driver would give to the read tasks."""
    return ReadSettings(job, plan.format, plan.schema, None, plan.prompt_table)


def readings_of(plan: Plan) -> list[Reading]:
    """All of a plan, to be read from nothing."""
    return make_readings([Work(chunk) for chunk in plan.chunks], plan.streams)


def try_all(
    job: JobSpec, plan: Plan | None = None, is_committed: Callable[[str], bool] = lambda chunk_id: False
) -> list[ReadChunk | FailedShard]:
    """Every pass of a plan; a fresh one by default."""
    plan = plan or make_plan(job)
    settings = settings_of(job, plan)
    everything = [made for reading in readings_of(plan) for made in read_chunks(reading, settings, is_committed)]
    return [made for made in everything if not isinstance(made, CommittedChunk)]


def read_all(job: JobSpec, plan: Plan | None = None) -> list[ReadChunk]:
    """Every chunk of a plan; no shard may fail."""
    chunks = []
    for made in try_all(job, plan):
        assert isinstance(made, ReadChunk), made
        chunks.append(made)
    return chunks


def tasks_of(job: JobSpec, plan: Plan | None = None) -> list[Task]:
    """Every row to be."""
    return [task for chunk in read_all(job, plan) for task in chunk.tasks]


def text_of(task: Task) -> str:
    """What the last message says."""
    content = task.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def numbers_of(tasks: Sequence[Task]) -> list[int | str]:
    """The number that each task's image shows, or its error_type."""
    return [
        task.error.error_type if task.error else number_of(open_prepared(task.images[0]).tobytes()) for task in tasks
    ]
