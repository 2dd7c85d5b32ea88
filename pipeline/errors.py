"""Everything that can go wrong, as one tree.

    R4BError
    ├── SpecError        the spec or the call is wrong: nothing was started (exit code 2)
    ├── JobError         the job cannot go on (exit code 1)
    │   ├── ErrorRateError   too many rows failed
    │   ├── EngineDiedError          the engine's processes are gone; a new engine is needed
    │   ├── BusyError                a deployment takes no more rows now; the same row may come again later
    │   ├── StorageError        the object store refused or failed after its retries
    │   │   └── StoreUnavailableError   all of it, not one object: no connection, no valid credentials, an outage
    │   └── ShardChangedError        an input shard is not what the plan saw
    └── SampleError      one row failed; it becomes an error row and the job goes on

Messages are for a person: they name the thing, the value and the way out.
"""

import errno


class R4BError(Exception):
    """Base of all errors that are reported without a traceback."""


class SpecError(R4BError):
    """The spec, the call or the place it points to is wrong."""


class JobError(R4BError):
    """The job cannot go on; what is committed stays, and a new run resumes it."""


class ErrorRateError(JobError):
    """The share of error rows is above `limits.max_error_rate`."""


class EngineDiedError(JobError):
    """The engine's processes are gone. It never recovers in its process: the actor that holds it must exit."""


class BusyError(JobError):
    """A deployment takes no more rows now: wait and send the row again."""


class StorageError(JobError):
    """The object store refused a request or kept failing."""


class StoreUnavailableError(StorageError):
    """Nothing can be had from the store: no connection, no valid credentials, an outage that outlasted the retries."""


class ShardChangedError(JobError):
    """A shard was replaced or removed between plan and read."""


class SampleError(R4BError):
    """One row cannot be answered; `error_type` is a short stable word, the message one sentence."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.message = message

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return SampleError, (self.error_type, self.message)


def is_of_machine(error: Exception) -> bool:
    """Whether a disk or its network failed, not what a file holds: gzip's and Arrow's own OSErrors have no number."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # a damaged file may cause EINVAL
