"""Things that are started once for all tests."""

import os
import secrets
from collections.abc import Iterator

import boto3
import pytest

from tests.engines import REAL_SPEC, RunningEngine, running_engine
from tests.s3_server import S3Server, credentials_in_environment, running_s3
from tests.serving import Served, serving, small_settings

# Ray listens on all addresses: it must ask for a token, and ours keeps it from writing one into the home folder.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="session")
def real_engine() -> Iterator[RunningEngine]:
    """vLLM with the small checkpoint; it takes half a minute to start."""
    with running_engine(REAL_SPEC) as engine:
        yield engine


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`r4b serve` with the small checkpoint, shared by all tests that only speak HTTP to it."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, small_settings(access_log=str(folder / "access.log"))) as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 store; its credentials are in the environment for the rest of the session."""
    with running_s3() as server, credentials_in_environment(server):
        boto3.DEFAULT_SESSION = None  # it may have read other credentials before
        yield server
