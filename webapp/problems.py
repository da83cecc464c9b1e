"""Errors as clients see them: one table from error to status, one shape, the code also in a header.

Every 429, 503 and 504 carries a positive ``Retry-After``. The body of an error is always JSON.
"""

from typing import Any, Final

from flask import Flask, Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from common.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    CancelledError,
    CapacityError,
    ContentConflictError,
    DeadlineExceededError,
    EpochConflictError,
    FarmError,
    ForbiddenError,
    IdempotencyError,
    MediaTypeError,
    MethodNotAllowedError,
    ModelLoadError,
    ModelUnsupportedError,
    NotFoundError,
    RateLimitError,
    RequestError,
    RouteUnsupportedError,
    TenantLimitError,
    UnauthenticatedError,
)
from common.logs import get_logger
from tasks.codec import dump_json
from webapp.openapi.declared import answers_errors_as
from webapp.wire.answers import whole_seconds
from webapp.wire.headers import ERROR_CODE, JSON, set_common
from webapp.wire.results import Problem

log = get_logger("webapp")

STATUS: Final[dict[type[FarmError], int]] = {
    FarmError: 500,
    RequestError: 400,
    NotFoundError: 404,
    MethodNotAllowedError: 405,
    MediaTypeError: 415,
    BodyTooLargeError: 413,
    BodyTimeoutError: 408,
    CapacityError: 503,
    TenantLimitError: 429,
    RateLimitError: 429,
    ModelLoadError: 502,
    DeadlineExceededError: 504,
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    CancelledError: 409,
    EpochConflictError: 409,
    ContentConflictError: 409,
    IdempotencyError: 422,
    ModelUnsupportedError: 501,
    RouteUnsupportedError: 501,
}
DEFAULT_RETRY_AFTER_S: Final = 5.0


def status_of(error: FarmError) -> int:
    """The status of the nearest ancestor that has a row."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(error: FarmError) -> dict[str, Any]:
    """What stands under ``error``."""
    body = error.as_dict()
    body.pop("retry_after_s", None)
    return body


@answers_errors_as(Problem)
def problem(error: FarmError) -> Response:
    """Answer with the code, the message and, where it helps, the field."""
    status = status_of(error)
    response = Response(dump_json({"error": error_body(error)}), status, content_type=JSON)
    response.headers[ERROR_CODE] = error.code
    if status in (429, 503, 504):
        response.headers["Retry-After"] = whole_seconds(error.retry_after_s or DEFAULT_RETRY_AFTER_S)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    set_common(response)
    return response


def install(app: Flask) -> None:
    """Give every error of the application this shape."""
    app.register_error_handler(FarmError, problem)
    app.register_error_handler(HTTPException, _http_problem)
    app.register_error_handler(Exception, _unexpected)


def _http_problem(error: HTTPException) -> Response:
    """What Flask itself refuses."""
    if isinstance(error, MethodNotAllowed):
        allowed = sorted(error.valid_methods or ())
        response = problem(MethodNotAllowedError(f"this route takes {', '.join(allowed)}"))
        response.headers["Allow"] = ", ".join(allowed)
        return response
    if isinstance(error, NotFound):
        return problem(NotFoundError("there is no such route: /docs shows those there are"))
    if error.code is not None and error.code < 500:
        return problem(RequestError(error.description or error.name))
    return _unexpected(error)


def _unexpected(error: Exception) -> Response:
    log.error("request_broken", exc_info=error)
    return problem(FarmError("something went wrong inside the farm; the log says what"))
