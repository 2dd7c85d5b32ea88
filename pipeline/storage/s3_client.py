"""boto3's clients, as the store needs them."""

from datetime import datetime
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

import boto3
import botocore.config
import botocore.session
import botocore.utils

from pipeline.spec import StorageSpec


@lru_cache(maxsize=8)
def s3_client(spec: StorageSpec, timeout_s: float, uploads_if_absent: bool = False) -> Any:
    """A client; boto3's uploads of files take no condition, so one with `uploads_if_absent` adds it to each of them."""
    config = botocore.config.Config(
        retries={"mode": "standard", "max_attempts": 8},
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        max_pool_connections=32,
        # Stores other than AWS's reject the checksum trailers that boto3 sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = _make_session().client("s3", endpoint_url=spec.endpoint_url, region_name=spec.region, config=config)
    client.meta.events.register("after-call.s3", partial(_note_answer, client.meta.endpoint_url))
    if uploads_if_absent:
        client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", _add_if_absent)
    return client


def _make_session() -> boto3.Session:
    """One of its own, for a session keeps the credentials that it found first; its times are read by a fast parser."""
    session = botocore.session.get_session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return boto3.Session(botocore_session=session)


def _parse_time(value: Any) -> Any:
    """Botocore's own way with an ISO 8601 time takes three quarters of a listing's processor time."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return botocore.utils.parse_timestamp(value)


answered_endpoints: set[str] = set()
"""Endpoints that have answered this process: one that does not now is ill, and no mistake in the spec."""


def _note_answer(endpoint_url: str, http_response: Any, **_: Any) -> None:
    if http_response.status_code < HTTPStatus.BAD_REQUEST:
        answered_endpoints.add(endpoint_url)


def _add_if_absent(params: dict[str, Any], **_: Any) -> None:
    params["IfNoneMatch"] = "*"
