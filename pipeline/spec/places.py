"""`output`, `limits`, `http` and `storage`: where rows go, what is too much, and how things are fetched."""

import ipaddress
from typing import Annotated

import pydantic
import pydantic_core
from pydantic import Field, StringConstraints

from pipeline.images import FORMATS
from pipeline.records import OUTPUT_SCHEMA
from pipeline.spec.base import NonEmpty, Section

NETWORK = r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"


class OutputSpec(Section):
    """Where the parts go."""

    url: NonEmpty
    chunk_rows: Annotated[int, Field(ge=1, le=100_000)] = 256
    keep_columns: list[NonEmpty] = []

    @pydantic.field_validator("url")
    @classmethod
    def _must_be_one_place(cls, url: str) -> str:
        if any(char in url for char in "*?["):
            raise ValueError(f"{url} holds one of * ? [, which stand for other characters; choose another name")
        return url

    @pydantic.field_validator("keep_columns")
    @classmethod
    def _must_not_clash(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("names a column twice")
        clash = sorted(set(names) & set(OUTPUT_SCHEMA.names))
        if clash:
            raise ValueError(f"{', '.join(clash)}: the output has a column of this name already")
        return names


class LimitsSpec(Section):
    """What is too much."""

    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_image_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    max_image_bytes: Annotated[int, Field(ge=1)] = 33_554_432
    max_image_frames: Annotated[int, Field(ge=1)] = 1000
    image_formats: Annotated[list[str], Field(min_length=1)] | None = None
    decode_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    decode_memory_bytes: Annotated[int, Field(ge=128 << 20)] = 1 << 30
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    stall_timeout_s: Annotated[float, Field(ge=1)] = 600.0
    """Of silence, after which an engine, a reader or a writer is killed and its work done again."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """For an engine to start, its model's download included; then it is killed, and started anew."""
    max_engine_restarts: Annotated[int, Field(ge=0)] = 100
    """In one run; an engine that goes with its node does not count."""
    preemption_grace_s: Annotated[float, Field(ge=0)] = 60.0
    """For an actor that is asked to end to finish what is in its engine."""
    yield_after_s: Annotated[float, Field(ge=0)] | None = 120.0
    """Of another job's waiting for its `replicas.min` engines, after which this one lets one go; null: never."""

    @pydantic.field_validator("image_formats")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        if unknown := sorted(set(names or ()) - set(FORMATS)):
            raise ValueError(f"{unknown[0]!r} cannot be decoded here; allowed: {', '.join(FORMATS)}")
        return names


class HttpSpec(Section):
    """How images are fetched from http(s) URLs in the input."""

    max_redirects: Annotated[int, Field(ge=0, le=20)] = 5
    max_per_host: Annotated[int, Field(ge=1)] = 8
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 4
    allow_networks: list[Annotated[str, StringConstraints(pattern=NETWORK)]] = []

    @pydantic.field_validator("allow_networks")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks


class StorageSpec(Section):
    """The S3 endpoint. Credentials come from boto3's usual places, never from the spec."""

    endpoint_url: str | None = None
    region: str | None = None

    @pydantic.field_validator("endpoint_url")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise pydantic_core.PydanticCustomError(
                "secret", "must not hold a user or a password; boto3 finds those itself"
            )
        return url
