"""The answer to what gunicorn cannot read as a request: the shape of every other error, without an application."""

import ssl
from http import HTTPStatus
from typing import Final
from uuid import uuid4

from gunicorn.http import errors

from common.errors import FarmError, InputTooLongError, RequestError, RouteUnsupportedError
from common.logs import get_logger
from tasks.codec import dump_json
from webapp.wire.headers import CONTRACT_VERSION, ERROR_CODE, JSON, REQUEST_ID, SERVER_VERSION

log = get_logger("webapp")

_OURS: Final = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName, errors.ConfigurationProblem)
"""The fault of the farm, though gunicorn calls them errors of parsing."""
_STATUS: Final = {
    errors.LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    errors.UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
    errors.ForbiddenProxyRequest: HTTPStatus.FORBIDDEN,
}
_KINDS: Final[dict[HTTPStatus, type[FarmError]]] = {
    HTTPStatus.REQUEST_URI_TOO_LONG: InputTooLongError,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: InputTooLongError,
    HTTPStatus.NOT_IMPLEMENTED: RouteUnsupportedError,
}
_SHOWN: Final = 200


def answer(error: BaseException) -> bytes:
    """All bytes of the answer, which says that the connection ends with it."""
    status, problem = _problem(error)
    body = dump_json({"error": problem.as_dict()})
    head = {
        "Connection": "close",
        "Content-Type": JSON,
        "Content-Length": str(len(body)),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
        ERROR_CODE: problem.code,
        SERVER_VERSION: CONTRACT_VERSION,
        REQUEST_ID: uuid4().hex,
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join((*lines, "", "")).encode("ascii") + body


def _problem(error: BaseException) -> tuple[HTTPStatus, FarmError]:
    if not isinstance(error, (errors.ParseException, ssl.SSLError)) or isinstance(error, _OURS):
        log.error("request_broken", exc_info=error)
        return HTTPStatus.INTERNAL_SERVER_ERROR, FarmError("something went wrong inside the farm; the log says what")
    status = _STATUS.get(type(error), HTTPStatus.BAD_REQUEST)
    log.info("request_unreadable", status=status.value, reason=type(error).__name__)
    kind = _KINDS.get(status, RequestError)
    return status, kind(f"this cannot be read as a request: {str(error)[:_SHOWN]}")
