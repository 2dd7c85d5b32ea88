"""What an S3 store answers when something is wrong: what is tried again and for how long, and how the rest is told."""

import contextlib
import email.utils
import socket
import time
from collections.abc import Iterator

import botocore.exceptions
import tenacity

from pipeline.errors import StorageError, StoreUnavailableError
from pipeline.storage.s3_client import s3_client

OF_ONE_OBJECT = (403, 404, 405, 412, 416)
"""HTTP statuses that may concern one object alone."""
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
"""Answers to credentials that were good before; a new client finds out whether there are others by now."""
SKEWED = "RequestTimeTooSkewed"
OF_ALL_OBJECTS = (*EXPIRED, SKEWED, "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
BODY_ERRORS = (
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
)
CREDENTIAL_ERRORS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
    botocore.exceptions.ConfigParseError,
)
_renewals: set[float] = set()
"""When this process's credentials had expired: since then, that there are none may be a file that is being written."""
OUTAGE_S = 300.0
OUTAGE_STATUSES = (429, 500, 502, 503, 504)
OUTAGE_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turn boto3's errors into one sentence that names the object; no header, no credential."""
    try:
        yield
    except botocore.exceptions.NoCredentialsError as error:
        raise StoreUnavailableError(
            f"{url}: no S3 credentials found where boto3 looks (AWS_ACCESS_KEY_ID, a profile, a role)."
        ) from error
    except botocore.exceptions.ClientError as error:
        is_of_one = status_of(error) in OF_ONE_OBJECT and code_of(error) not in OF_ALL_OBJECTS
        kind = StorageError if is_of_one else StoreUnavailableError
        sentence = f"{url}: the store answered {code_of(error)} ({status_of(error)})"
        raise kind(sentence + (f": {_tell_skew(error)}" if code_of(error) == SKEWED else ".")) from error
    except botocore.exceptions.BotoCoreError as error:
        raise StoreUnavailableError(f"{url}: the store cannot be reached ({type(error).__name__}).") from error


def _tell_skew(error: botocore.exceptions.ClientError) -> str:
    """How wrong this machine's clock is, by the store's."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    here = f"{socket.gethostname()}'s clock"
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return f"{here} differs from the store's. Set it by NTP."
    return f"{here} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the store's. Set it by NTP."


def status_of(error: botocore.exceptions.ClientError) -> int:
    """The HTTP status of an answer, or 0."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: botocore.exceptions.ClientError) -> str:
    """The store's own name for what is wrong."""
    return str(error.response.get("Error", {}).get("Code", "an error"))


def _is_passing(error: BaseException) -> bool:
    """A lost race of conditional writes, which S3 asks to repeat, or a connection lost while a body was read."""
    if isinstance(error, botocore.exceptions.ClientError):
        # NoSuchUpload: an upload whose end was answered on a connection that broke; the next try finds the name taken.
        return status_of(error) == 409 or code_of(error) == "NoSuchUpload"
    return isinstance(error, BODY_ERRORS)


again = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_passing),
    wait=tenacity.wait_random_exponential(0.2, max=5),
    stop=tenacity.stop_after_attempt(6) | tenacity.stop_after_delay(60),  # boto3 has tried for longer by then
    reraise=True,
)
"""Calls a function until it succeeds, up to six times within a minute."""
again_long = again.copy(stop=tenacity.stop_after_attempt(6))
"""The same for what may take longer than a minute, as a large file does."""


def _is_outage(error: BaseException) -> bool:
    """The store is throttling, or not well: what boto3 has tried for some 10 to 60 seconds may succeed in a minute.

    So may credentials that have expired, and a clock that is wrong.
    """
    if isinstance(error, botocore.exceptions.ClientError):
        return status_of(error) in OUTAGE_STATUSES or code_of(error) in (*EXPIRED, SKEWED)
    return isinstance(error, OUTAGE_ERRORS) or (bool(_renewals) and isinstance(error, CREDENTIAL_ERRORS))


def _renew(state: tenacity.RetryCallState) -> None:
    """Let the next try look for credentials anew, if they are what is wrong."""
    error = state.outcome.exception() if state.outcome else None
    has_expired = isinstance(error, botocore.exceptions.ClientError) and code_of(error) in EXPIRED
    if has_expired or isinstance(error, CREDENTIAL_ERRORS):
        _renewals.add(time.monotonic())
        s3_client.cache_clear()


outlast = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_outage),
    before_sleep=_renew,
    wait=tenacity.wait_random_exponential(2, max=30),
    stop=tenacity.stop_after_delay(OUTAGE_S),
    reraise=True,
)
"""Calls a function until the store is well again."""
outlast_long = outlast.copy(stop=lambda state: state.idle_for >= OUTAGE_S)
"""The same for what may take longer: so long does it wait between its tries."""
