"""Config documents and headers in; answers in the shapes that tools for public config services read, out.

Errors stand in the body twice: as everywhere here under ``error``, and as those tools read them under ``detail``.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import gevent
import msgspec
from flask import Blueprint, Response, request

from common.errors import (
    BodyTooLargeError,
    CapacityError,
    ConfigError,
    ConfigUnavailableError,
    ContentConflictError,
    DocumentError,
    EpochConflictError,
    FarmError,
    ForbiddenError,
    IdempotencyError,
    MediaTypeError,
    ModelNotFoundError,
    NotFoundError,
    RequestError,
    UnauthenticatedError,
)
from config_db.documents import MAX_DOCUMENT_BYTES, parse
from config_db.idempotency import Answer
from config_db.model_writes import Intent
from config_db.publish import Published
from tasks.codec import dump_json
from webapp import problems
from webapp.auth.principals import ANYBODY, principal
from webapp.openapi.declared import answers_errors_as
from webapp.wire.config_answers import ConfigProblem, EpochNamed
from webapp.wire.headers import JSON, set_common
from webapp.wire.raw_bodies import read_raw

YAML: Final = "application/x-yaml"
MERGE_PATCH: Final = "application/merge-patch+json"
_CODES: Final[Mapping[type[FarmError], str]] = {
    FarmError: "internal_error",
    RequestError: "invalid_request",
    UnauthenticatedError: "unauthenticated",
    ForbiddenError: "forbidden",
    MediaTypeError: "unsupported_media_type",
    NotFoundError: "not_found",
    ModelNotFoundError: "model_not_found",
    BodyTooLargeError: "payload_too_large",
    ConfigError: "validation_error",
    DocumentError: "parse_error",
    IdempotencyError: "idempotency_mismatch",
    CapacityError: "unavailable",
    ConfigUnavailableError: "registry_unavailable",
    EpochConflictError: "epoch_conflict",
    ContentConflictError: "content_conflict",
}
"""What stands under ``detail.error``, by kind of error."""
_UNPROCESSABLE: Final = 422
_EPOCH: Final = re.compile(r'(?:W/)?"?(\d{1,18})"?')
_MAX_ACTOR: Final = 100
_MAX_REASON: Final = 500
_AT_ONCE_BYTES: Final = 32 << 10
"""A document up to this size is read where it stands; a larger one in a thread, since it takes up to a second."""


class Incoming(msgspec.Struct, frozen=True):
    """What a write says: its document, None without a body, and a digest of all that makes it this write."""

    document: Any
    digest: bytes


class _Epoch(msgspec.Struct):
    epoch: int


def read_write(*, has_document: bool = True) -> Incoming:
    """The current request as a write.

    Raises:
        BodyTooLargeError: more than ``MAX_DOCUMENT_BYTES``.
        DocumentError: the body can be read neither as YAML nor as JSON.
        RequestError: it has none, or ended early.
    """
    raw = read_raw(MAX_DOCUMENT_BYTES) if has_document else b""
    if has_document and not raw.strip():
        raise RequestError("the request has no body: send a document, YAML or JSON")
    head = f"{request.method} {request.full_path}\n".encode()
    return Incoming(_parse(raw) if has_document else None, hashlib.sha256(head + raw).digest())


def _parse(raw: bytes) -> Any:
    if len(raw) <= _AT_ONCE_BYTES:
        return parse(raw)
    content, error = gevent.get_hub().threadpool.apply(_attempt, (parse, raw))
    if error is not None:
        raise error
    return content


def _attempt(function: Callable[[bytes], Any], raw: bytes) -> tuple[Any, FarmError | None]:
    """Errors as values: gevent prints those that a thread raises."""
    try:
        return function(raw), None
    except FarmError as error:
        return None, error


def read_intent() -> Intent:
    """Who writes and why, for the history, and the epoch that the write is meant for; RequestError names the header."""
    said = _words("X-Farmhand-Actor", _MAX_ACTOR)
    name = principal().name if principal() is not ANYBODY else said or ANYBODY.name
    reason = _words("X-Farmhand-Reason", _MAX_REASON) or f"{request.method} {request.path}"[:_MAX_REASON]
    return Intent(f"{name}@{request.remote_addr or 'unknown'}", reason, _expected_epoch())


def _expected_epoch() -> int | None:
    given = request.headers.get("If-Match")
    if given is None or given.strip() == "*":
        return None
    epoch = _EPOCH.fullmatch(given.strip())
    if epoch is None:
        raise RequestError('If-Match names one epoch, as "17"', param="If-Match")
    return int(epoch[1])


def _words(header: str, most: int) -> str:
    """A header that a person wrote: printable text in UTF-8."""
    given = request.headers.get(header, "").strip()
    try:
        text = given.encode("latin-1").decode()
    except UnicodeError as error:
        raise RequestError(f"{header} is not UTF-8", param=header) from error
    if len(text) > most or not text.isprintable():
        raise RequestError(f"{header} is printable text of at most {most} letters", param=header)
    return text


def epoch_named(published: Published) -> EpochNamed:
    """The epoch after a write, as every answer to one names it."""
    return {"epoch": published.epoch, "epoch_id": str(published.epoch_id), "changed": bool(published.changes)}


def encoded(body: Mapping[str, Any], *, status: int = 200) -> Answer:
    """The answer to a write, as it is kept under an idempotency key; it names the epoch."""
    return Answer(status, dump_json(body))


def epoch_of(answer: Answer) -> int:
    """The epoch that an answer names."""
    return msgspec.json.decode(answer.body, type=_Epoch).epoch


def written(answer: Answer) -> Response:
    """The answer to a write, over the wire."""
    response = Response(answer.body, answer.status, content_type=JSON)
    set_common(response)
    response.set_etag(str(epoch_of(answer)))
    if answer.is_replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def yaml_answer(text: str, *, epoch: int) -> Response:
    """A YAML document; its ETag is the epoch, which a write may name in ``If-Match``."""
    response = Response(text, content_type=YAML)
    set_common(response)
    response.set_etag(str(epoch))
    return response


def install(blueprint: Blueprint) -> None:
    """Give the errors of these routes their two forms."""
    blueprint.register_error_handler(FarmError, problem)


@answers_errors_as(ConfigProblem)
def problem(error: FarmError) -> Response:
    """Answer with an error in both forms; a document that is no model is well-formed, and so 422 here."""
    response = problems.problem(error)
    if isinstance(error, ConfigError) and not isinstance(error, DocumentError):
        response.status_code = _UNPROCESSABLE
    body = problems.error_body(error)
    response.set_data(dump_json({"error": body, "detail": _detail(error)}))
    return response


def _detail(error: FarmError) -> dict[str, Any]:
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    if type(error) is RequestError and error.param == "model_id":
        code = "invalid_model_id"
    if type(error) is ContentConflictError and error.param == "bundle":
        code = "bundle_conflict"
    detail = {**error.details, "error": code, "message": error.message}
    if code == "model_not_found":
        detail.setdefault("model_id", (request.view_args or {}).get("model"))
    if code == "validation_error":
        detail["details"] = [{"message": error.message, "field": error.param}]
    return detail
