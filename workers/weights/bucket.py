"""An S3-compatible bucket through boto3, imported only by processes that have one: objects, ranges, conditional puts.

Knows nothing of models but the names under which their folders lie. Credentials are found as boto3 finds them.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import boto3
import msgspec
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError

from config_db.spec import WeightsFormat
from workers.weights.failures import DamagedError, PassingError, failure, no_weights, said
from workers.weights.manifest import SAFE, Manifest, RemoteFile, chosen, has_weights, is_wanted

CONNECT_S: Final = 3.0
_READ_BYTES: Final = 1 << 17
_ABSENT: Final = ("NoSuchKey", "404", "NotFound")
_LOST: Final = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
_REFUSED: Final = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


@dataclass(frozen=True, slots=True)
class Seen:
    """One small object as it was read; ``age_s`` by the bucket's own clock."""

    content: bytes
    etag: str
    age_s: float


class Bucket:
    """Everything under one ``s3://name/prefix``.

    Args:
        endpoint: of an S3-compatible server; None: that of AWS, or as boto3 is configured.
    """

    def __init__(self, uri: str, *, endpoint: str | None, silence_s: float, connections: int) -> None:
        parts = urlsplit(uri)
        self.uri = uri
        self._bucket = parts.netloc
        self._prefix = parts.path.strip("/")
        self._transfer = TransferConfig(max_concurrency=connections)
        # Checksums beyond what S3 asks for break servers that are merely compatible; digests are our own.
        config = Config(
            connect_timeout=min(CONNECT_S, silence_s),
            read_timeout=silence_s,
            retries={"total_max_attempts": 2, "mode": "standard"},
            max_pool_connections=connections + 2,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"the bucket {self.uri}"

    def get(self, key: str) -> Seen | None:
        """A small object, None if there is none."""
        try:
            with self._translated():
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
                content = answer["Body"].read()
        except _AbsentError:
            return None
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        age_s = (parsedate_to_datetime(now) - answer["LastModified"]).total_seconds() if now else 0.0
        return Seen(content, answer["ETag"], age_s)

    def put(self, key: str, content: bytes) -> None:
        """Write a small object, whatever stands there."""
        with self._translated():
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content)

    def put_if(self, key: str, content: bytes, *, etag: str | None) -> str | None:
        """Write a small object if it is not there, or still as it was; returns its new etag, None if it is not so."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            with self._translated():
                put = self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content, **condition)
        except (_LostError, _AbsentError):
            return None
        return str(put["ETag"])

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._translated():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def upload(self, path: Path, key: str) -> None:
        """Write a file, in parallel parts if it is large."""
        with self._translated():
            self._client.upload_file(str(path), self._bucket, self._key(key), Config=self._transfer)

    def manifest(self, folder: str, formats: Sequence[WeightsFormat] = SAFE) -> Manifest | None:
        """What a folder of ours holds; it is written last, so that what it names is there.

        Args:
            folder: its name, with a slash at the end.
            formats: what its weights may be in.

        Raises:
            DamagedError: it cannot be read, or names files that no manifest of ours does.
        """
        seen = self.get(f"{folder}manifest.json")
        if seen is None:
            return None
        try:
            manifest = msgspec.json.decode(seen.content, type=Manifest)
        except msgspec.DecodeError as error:
            raise DamagedError(f"{folder}manifest.json cannot be read: {error}") from error
        if not all(is_wanted(file.name, formats) and file.sha256 for file in manifest.files):
            raise DamagedError(f"{folder}manifest.json names files that it should not, or without a digest")
        return manifest

    def listing(self, formats: Sequence[WeightsFormat]) -> tuple[RemoteFile, ...]:
        """The files under this URI that a load wants, each with the etag that its parts are held to.

        Raises:
            PassingError: the bucket does not answer.
            ModelLoadError: there is nothing to be had.
        """
        start = f"{self._prefix}/" if self._prefix else ""
        there: dict[str, RemoteFile] = {}
        with self._translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
            for one in (one for page in pages for one in page.get("Contents", ())):
                name = one["Key"].removeprefix(start)
                there[name] = RemoteFile(name=name, size=one["Size"], etag=one["ETag"])
        names = chosen(there, formats)
        if not names:
            raise failure(f"{self.uri} holds no model", "NOT_FOUND", permanent=True, remedy="correct the source")
        if not has_weights(names):
            raise no_weights(self.uri, formats)
        return tuple(there[name] for name in sorted(names))

    def folder(self, prefix: str) -> "Folder":
        """The files under a prefix, to be read."""
        return Folder(self, prefix)

    def read(self, key: str, start: int, stop: int, etag: str | None) -> Generator[bytes]:
        """The bytes of an object from ``start`` to ``stop``, of the version that has this etag."""
        condition = {"IfMatch": etag} if etag is not None else {}
        try:
            with self._translated():
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._key(key), Range=f"bytes={start}-{stop - 1}", **condition
                )
                yield from answer["Body"].iter_chunks(_READ_BYTES)
        except (_LostError, _AbsentError) as error:
            raise failure(
                f"{self.name} no longer holds {key} as it was listed", "NETWORK", permanent=False, remedy="try again"
            ) from error

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what boto3 raises into errors of ours."""
        try:
            yield
        except ClientError as error:
            raise self._refusal(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise self._forbidden("no credentials were found") from error
        except boto3.exceptions.S3UploadFailedError as error:
            raise PassingError(said(error)) from error
        except (BotoCoreError, HTTPClientError) as error:
            raise PassingError(said(error)) from error
        except OSError as error:  # urllib3's, while a body is read
            raise PassingError(said(error)) from error

    def _refusal(self, error: ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _ABSENT:
            return _AbsentError()
        if code in _LOST:
            return _LostError()
        if code in _REFUSED:
            return self._forbidden(code)
        if code == "NoSuchBucket":
            return failure(f"{self.name} does not exist", "NOT_FOUND", permanent=True, remedy="see FARMHAND_BUCKET")
        return PassingError(said(error))

    def _forbidden(self, why: str) -> Exception:
        return failure(
            f"{self.name} refuses this worker ({why})",
            "GATED",
            permanent=True,
            remedy="give the worker credentials that may read it, where boto3 finds them",
        )


class Folder:
    """Files of a bucket as a remote that a fetch reads from."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self.name = bucket.name

    def read(self, file: RemoteFile, start: int, stop: int) -> Generator[bytes]:
        """The bytes of a file from ``start`` to ``stop``."""
        return self._bucket.read(f"{self._prefix}{file.name}", start, stop, file.etag)


class _AbsentError(Exception):
    """There is no such object."""


class _LostError(Exception):
    """An object is not, or no longer, as the condition asked."""
