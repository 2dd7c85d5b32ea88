"""Things that are started once for all tests."""

from collections.abc import Iterator

import boto3
import pytest

from tests.s3_server import S3Server, credentials_in_environment, running_s3


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 store; its credentials are in the environment for the rest of the session."""
    with running_s3() as server, credentials_in_environment(server):
        boto3.DEFAULT_SESSION = None  # it may have read other credentials before
        yield server
