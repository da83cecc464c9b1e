"""The bytes of a request's body, as they come off the connection: bounded in size and in time.

A body that cannot be read to its end leaves its connection useless; ``gunicorn_worker`` closes that.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import gevent
from flask import current_app, g, request
from gunicorn.http.errors import ParseException

from common.errors import BodyTimeoutError, BodyTooLargeError, MediaTypeError, RequestError

BODY_SILENCE_S: Final = 30.0
"""A client that sends nothing of its body for this long is cut off."""
TIMEOUT: Final = "BODY_TIMEOUT_S"
"""The application's configuration says under this name how long a whole body may take."""


class _TooSlowError(Exception):
    """The body as a whole takes too long, though something of it comes now and then."""


def read_raw(max_bytes: int) -> bytes:
    """The body as it came, of a stated length or chunked.

    Raises:
        MediaTypeError: it is compressed.
        BodyTooLargeError: more than ``max_bytes``.
        BodyTimeoutError: nothing more of it came, or it came too slowly.
        RequestError: it ended early, or its chunks are broken.
    """
    environ = request.environ
    if "HTTP_IDEMPOTENCY_KEY" not in environ:
        return _read_whole(environ, max_bytes)
    if "read_ahead" in g:
        ahead: bytes = g.pop("read_ahead")
        return ahead
    raw = _read_whole(environ, max_bytes)
    g.body_digest = sha256(raw).digest()
    return raw


def body_digest(max_bytes: int) -> bytes:
    """A digest of the body, which is read ahead unless it was; for requests with an idempotency key only.

    Raises:
        MediaTypeError, BodyTooLargeError, BodyTimeoutError, RequestError: as ``read_raw``.
    """
    if "body_digest" not in g:
        g.read_ahead = read_raw(max_bytes)
    digest: bytes = g.body_digest
    return digest


def _read_whole(environ: Mapping[str, Any], max_bytes: int) -> bytes:
    if (coding := environ.get("HTTP_CONTENT_ENCODING", "identity")).lower() not in ("", "identity"):
        what = f"a body in content encoding {coding[:100]!r} is not read here: send it uncompressed"
        raise MediaTypeError(what, param="Content-Encoding")
    stated = environ.get("CONTENT_LENGTH")
    if stated and not (stated.isascii() and stated.isdigit()):
        raise RequestError("Content-Length is not a number")
    length = int(stated) if stated else None
    if length is not None and length > max_bytes:
        raise _too_large(max_bytes)
    raw = _read(environ["wsgi.input"], max_bytes + 1 if length is None else length, environ.get("gunicorn.socket"))
    if len(raw) > max_bytes:
        raise _too_large(max_bytes)
    if length is not None and len(raw) < length:
        raise RequestError("the body ended before its stated length")
    return raw


def _read(body: Any, size: int, sock: Any) -> bytes:
    """Up to ``size`` bytes; without a connection, as in tests, nothing is waited for."""
    if sock is None:
        raw: bytes = body.read(size)
        return raw
    timeout_s = current_app.config[TIMEOUT]
    sock.settimeout(BODY_SILENCE_S)
    try:
        with gevent.Timeout(timeout_s, _TooSlowError):
            raw = body.read(size)
    except _TooSlowError as error:
        raise BodyTimeoutError(f"the body did not arrive within {timeout_s:g} s") from error
    except TimeoutError as error:
        raise BodyTimeoutError(f"nothing of the body arrived for {BODY_SILENCE_S:g} s") from error
    except ParseException as error:
        raise RequestError(f"the body is not sent in valid chunks: {str(error)[:200]}") from error
    except OSError as error:  # gunicorn's NoMoreData is one, too
        raise RequestError("the body ended early") from error
    finally:
        sock.settimeout(None)
    return raw


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body is larger than the {max_bytes} bytes that this route takes: send less in one request"
    )
