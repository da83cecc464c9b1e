"""Headers both ways: the format of a body, the format wanted, request ids, and what every answer carries."""

import re
from typing import Final
from uuid import uuid4

from flask import Response, g, request

from common.errors import MediaTypeError, RequestError

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
BINARY: Final = "application/octet-stream"
_MSGPACK_TYPES: Final = ("application/msgpack", "application/x-msgpack")
CONTRACT_VERSION: Final = "0.10.1"
"""The version of the public HTTP contract that we speak; its SDK compares it with its own."""
SERVER_VERSION: Final = "X-SIE-Server-Version"
REQUEST_ID: Final = "X-SIE-Request-ID"
ERROR_CODE: Final = "X-SIE-Error-Code"
_KEY: Final = re.compile(r"[!-~]{1,255}")
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")


def is_msgpack_body() -> bool:
    """Whether the body is msgpack; MediaTypeError if it is neither msgpack nor JSON."""
    kind = request.environ.get("CONTENT_TYPE", "")
    if kind in ("", JSON):
        return False
    kind = kind.lower()
    if any(name in kind for name in _MSGPACK_TYPES):
        return True
    kind = kind.partition(";")[0].strip()
    if kind in (JSON, "text/json") or kind.endswith("+json"):
        return False
    raise MediaTypeError(f"content type {kind!r} is not served: send {JSON} or {MSGPACK}")


def wants_msgpack(*, by_default: bool) -> bool:
    """Whether the answer shall be msgpack; a client that does not say gets the format it sent."""
    accept = request.environ.get("HTTP_ACCEPT", "*/*")
    if accept == "*/*":
        return by_default
    accept = accept.lower()
    if any(name in accept for name in _MSGPACK_TYPES):
        return True
    return by_default and JSON not in accept


def request_id() -> str:
    """The caller's X-Request-Id if it is harmless, else one of ours; the same throughout a request."""
    known: str | None = g.get("request_id")
    if known is None:
        given = request.environ.get("HTTP_X_REQUEST_ID", "")
        known = g.request_id = given if _SANE_ID.match(given) else uuid4().hex
    return known


def read_idempotency_key() -> str | None:
    """The idempotency key, if there is one; RequestError if it can be none."""
    key: str | None = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not _KEY.fullmatch(key):
        raise RequestError("an Idempotency-Key is 1 to 255 letters of ASCII without spaces", param="Idempotency-Key")
    return key


def say_replayed() -> None:
    """The answer to the current request is that to an earlier one."""
    g.is_replayed = True


def set_common(response: Response) -> None:
    """What every answer carries."""
    if "is_replayed" in g:
        response.headers["Idempotency-Replayed"] = "true"
    response.headers[SERVER_VERSION] = CONTRACT_VERSION
    response.headers[REQUEST_ID] = request_id()
