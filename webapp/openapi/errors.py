"""The errors of each route, asked of the very handler that would answer with them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

from flask import Flask

from common.errors import (
    AuthUnavailableError,
    BodyTimeoutError,
    BodyTooLargeError,
    FarmError,
    ForbiddenError,
    MediaTypeError,
    RequestError,
    UnauthenticatedError,
)
from webapp.openapi.declared import shape_of
from webapp.openapi.headers import CODE, EVERYWHERE, RETRY_AFTER, WWW_AUTHENTICATE, referred
from webapp.openapi.routes import Route
from webapp.openapi.schemas import Schemas, summary
from webapp.wire.headers import JSON

HEADERS: Final = (*EVERYWHERE, CODE, RETRY_AFTER, WWW_AUTHENTICATE)
"""What an error may carry."""
_COMPONENT: Final = "#/components/responses/{name}"


class Errors:
    """The answers of an application to its errors. One with a single code stands among the components, once."""

    def __init__(self, app: Flask, schemas: Schemas) -> None:
        self._app = app
        self._schemas = schemas
        self.components: dict[str, Any] = {}

    def of(self, route: Route) -> dict[int, dict[str, Any]]:
        """By status, as the route's handler answers with each kind of error."""
        handler = handler_of(self._app, route)
        words: dict[int, dict[str, str]] = defaultdict(dict)
        headers: dict[int, set[str]] = defaultdict(set)
        with self._app.test_request_context(method=route.method):
            for kind in _kinds(route):
                response = handler(kind())
                words[response.status_code].setdefault(kind.code, summary(kind.__doc__))
                headers[response.status_code] |= set(response.headers.keys())
        return {
            status: self._answer(shape_of(handler), status, codes, headers[status]) for status, codes in words.items()
        }

    def _answer(self, shape: Any, status: int, codes: dict[str, str], headers: set[str]) -> dict[str, Any]:
        answer = {
            "description": "\n".join(f"- `{code}`: {what}" for code, what in sorted(codes.items())),
            "headers": referred(one for one in HEADERS if one.name in headers),
            "content": {JSON: {"schema": self._schemas.of(shape)}},
        }
        if len(codes) > 1:
            return answer
        name = ".".join((shape.__name__, str(status), *codes))
        if self.components.setdefault(name, answer) != answer:
            return answer
        return {"$ref": _COMPONENT.format(name=name)}


def handler_of(app: Flask, route: Route) -> Callable[[Any], Any]:
    """What answers with the errors of a route."""
    specs = app.error_handler_spec
    own = specs[route.blueprint][None].get(FarmError) if route.blueprint in specs else None
    return own or specs[None][None][FarmError]


def _kinds(route: Route) -> Iterator[type[FarmError]]:
    """Those that the route declares, and those that every route of its kind has."""
    said = route.declaration
    yield FarmError
    yield from said.errors
    if not route.is_open:
        yield from (UnauthenticatedError, ForbiddenError, AuthUnavailableError)
    if said.body is not None:
        yield from (RequestError, BodyTooLargeError, BodyTimeoutError, MediaTypeError)
    elif said.parameters:
        yield RequestError
