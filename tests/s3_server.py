"""A real S3 store for the tests: SeaweedFS, one process on loopback, its files in a temporary folder.

Every port is chosen here: SeaweedFS opens each port + 10000 as well, and its defaults would clash with a second
instance on the machine. `running_s3` also puts the store's credentials into the environment, where boto3 finds them
in this process and in those that it starts.
Not covered: anything that the store itself does wrong.
"""

import contextlib
import glob
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

START_S = 30.0
"""A start takes 1 to 2 s, and was seen to take 16 s."""
STOP_S = 5.0
"""A stop takes 2.5 s, or for ever if a client of ours still holds a connection; then it is killed."""
GRPC_OFFSET = 10_000
# Below Linux's ephemeral ports (32768 and up), the ports + GRPC_OFFSET too: no outgoing connection takes one of them.
PORTS = range(12_000, 22_000)
BUCKET = "tests"
FOREIGN_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")

_prefix_numbers = count()


@dataclass(frozen=True)
class S3Server:
    """Where the store listens, and who may use it."""

    endpoint_url: str
    access_key: str
    secret_key: str
    second_key: tuple[str, str]
    """Another access key and its secret, for tests of credentials that change."""

    def client(self) -> Any:
        """A boto3 client of the tests' own, so that the code under test is not checked with itself."""
        return _make_client(self)

    def fresh_prefix(self, name: str) -> str:
        """A URL below which nothing is yet; prefixes of one bucket, because each SeaweedFS bucket takes a volume."""
        return f"s3://{BUCKET}/{name}-{next(_prefix_numbers)}"

    def put(self, url: str, data: bytes) -> None:
        bucket, key = _split(url)
        self.client().put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, url: str) -> bytes:
        bucket, key = _split(url)
        data: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def list(self, url: str) -> Sequence[str]:
        """The URLs that begin with `url`."""
        return list(self.list_etags(url))

    def list_etags(self, url: str) -> dict[str, str]:
        """The URLs that begin with `url`, with their objects' etags."""
        bucket, prefix = _split(url)
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {f"s3://{bucket}/{item['Key']}": item["ETag"] for page in pages for item in page.get("Contents", ())}


@lru_cache(maxsize=4)
def _make_client(server: S3Server) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=botocore.config.Config(retries={"max_attempts": 1}, connect_timeout=5, read_timeout=10),
    )


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


@contextlib.contextmanager
def running_s3() -> Iterator[S3Server]:
    """Start a store, wait until it takes a first object, and stop it in the end."""
    ports = free_ports(5)
    keys = [(secrets.token_hex(10).upper(), secrets.token_hex(20)) for _ in range(2)]
    server = S3Server(f"http://127.0.0.1:{ports[0]}", *keys[0], keys[1])
    with tempfile.TemporaryDirectory(prefix="r4b-s3-") as folder:
        process = _start(server, ports, Path(folder))
        try:
            _wait_until_ready(server, process, Path(folder))
            yield server
        finally:
            _stop(process, ports)


@contextlib.contextmanager
def credentials_in_environment(server: S3Server) -> Iterator[None]:
    """Let boto3, here and in processes started from here, find the store's credentials and no others."""
    own = {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    before = {name: os.environ.get(name) for name in (*own, *FOREIGN_SETTINGS)}
    for name in FOREIGN_SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_ports(count: int) -> list[int]:
    """Ports that are free on loopback, each with its port + GRPC_OFFSET."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if _is_free(port) and _is_free(port + GRPC_OFFSET):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"No {count} free ports in {PORTS}.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _start(server: S3Server, ports: list[int], folder: Path) -> "subprocess.Popen[bytes]":
    s3, master, volume, filer, admin = ports
    keys = ((server.access_key, server.secret_key), server.second_key)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": key, "secretKey": secret} for key, secret in keys],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config, data = folder / "s3.json", folder / "data"
    config.touch(mode=0o600)
    config.write_text(json.dumps({"identities": [identity]}))
    data.mkdir()
    command = [
        str(Path(sys.executable).with_name("weed")),
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",  # its default is all addresses
        "-master.telemetry=false",  # its default is to send statistics
        "-admin.ui=false",
        "-webdav=false",
        "-s3.autoCreateBucket=false",  # its default makes a bucket out of a misspelt name, as AWS never does
        f"-s3.config={config}",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-admin.port={admin}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        f"-s3.localSocket={folder / 's3.sock'}",
    ]
    with (folder / "log").open("wb") as log:
        # TMPDIR: its logs go to the temporary folder.
        environment = {**os.environ, "TMPDIR": str(folder)}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _stop(process: "subprocess.Popen[bytes]", ports: list[int]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for port in ports:  # it puts sockets into /tmp, whatever TMPDIR says, and leaves some there
        for number in (port, port + GRPC_OFFSET):
            for path in glob.glob(f"/tmp/seaweedfs-*-{number}.sock"):
                Path(path).unlink(missing_ok=True)


def _wait_until_ready(server: S3Server, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    client = server.client()
    deadline = time.monotonic() + START_S
    problem = ""
    while time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="key", Body=b"data")
            return
        except client.exceptions.BucketAlreadyOwnedByYou:
            client.put_object(Bucket=BUCKET, Key="key", Body=b"data")
            return
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            problem = str(error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break  # it ended
    raise RuntimeError(f"SeaweedFS did not start: {problem}\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
