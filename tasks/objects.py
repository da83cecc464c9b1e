"""Bodies and results too large for Redis, in an S3-compatible bucket; boto3 is imported by processes that have one.

Whoever has read an object for the last time deletes it. One that nobody came for is found by its name, which begins
with the hour from which on nobody may want it: ``<prefix>/<hour>/<id>``. Errors are ours: the store does not answer, or
refuses (``ObjectStoreError``: a later try may succeed), or there is no such object (None). No call outlasts some
seconds of silence, and none is repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

from common.errors import ObjectStoreError
from common.logs import get_logger

log = get_logger("tasks")

IN_REDIS_BYTES: Final = 8 * 2**20
"""What is larger goes to the object store, if there is one."""
CONNECT_S: Final = 1.0
SILENCE_S: Final = 5.0
CONNECTIONS: Final = 16
HOUR_S: Final = 3600
_DELETED_AT_ONCE: Final = 1000
_ABSENT: Final = ("NoSuchKey", "404", "NotFound")


class ObjectStore:
    """Everything under one ``s3://name/prefix``; thread-safe. No connection is made before its first use.

    Args:
        uri: bucket and prefix; nothing else may stand under it.
        endpoint: of an S3-compatible server; empty: that of AWS, or as boto3 is configured.
    """

    def __init__(self, uri: str, endpoint: str) -> None:
        parts = urlsplit(uri)
        self._bucket = parts.netloc
        self._prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self._client = _client(endpoint)

    def put(self, content: bytes, *, wanted_until: float) -> str:
        """Keep this until somebody deletes it, at least until an instant of the farm's clock; returns its name."""
        name = f"{int(wanted_until // HOUR_S) + 1:08d}/{uuid4().hex}"
        with self._translated():
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content)
        return name

    def get(self, name: str) -> bytes | None:
        """An object's content; None if there is none."""
        try:
            with self._translated():
                content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        except _AbsentError:
            return None
        return content

    def delete(self, name: str) -> None:
        """Delete an object, if it is there; if that fails, it is swept when its hour has come."""
        try:
            with self._translated():
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        except ObjectStoreError as error:
            log.info("object_not_deleted", object=name, error=error.message)

    def sweep(self, now: float) -> int:
        """Delete what nobody has come for, by the farm's clock; returns how many objects."""
        swept = 0
        with self._translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:  # in the order of their names, so oldest hours first
                names = [one["Key"] for one in page.get("Contents", ())]
                past = [name for name in names if self._is_past(name, now)]
                if past:
                    listed = {"Objects": [{"Key": name} for name in past[:_DELETED_AT_ONCE]], "Quiet": True}
                    self._client.delete_objects(Bucket=self._bucket, Delete=listed)
                swept += len(past)
                if len(past) < len(names):
                    break
        return swept

    def _is_past(self, key: str, now: float) -> bool:
        hour = key.removeprefix(self._prefix).partition("/")[0]
        return hour.isdigit() and int(hour) * HOUR_S <= now

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what boto3 raises into errors of ours."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _ABSENT:
                raise _AbsentError from error
            raise ObjectStoreError(f"the object store refuses ({code}); try again soon") from error
        except (BotoCoreError, HTTPClientError, OSError) as error:  # OSError: urllib3's, while a body is read
            raise ObjectStoreError(
                f"the object store does not answer ({type(error).__name__}); try again soon"
            ) from error


def object_store(uri: str, endpoint: str) -> ObjectStore | None:
    """The store of these settings; None if they name none."""
    return ObjectStore(uri, endpoint) if uri else None


class _AbsentError(Exception):
    """There is no such object."""


def _client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    # Checksums beyond what S3 asks for break servers that are merely compatible.
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=SILENCE_S,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint or None, config=config)
