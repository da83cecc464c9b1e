"""What every answer tells browsers, whoever made it: guess no types, keep nothing, show it in no frame, run nothing.

The pages of the API's own documentation run what they bring along, and nothing from elsewhere. What a view has set
stays.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_ALWAYS: Final = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))
DATA: Final = (*_ALWAYS, ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"))
PAGES: Final = (
    *_ALWAYS,
    (
        "Content-Security-Policy",
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
)
PAGES_AT: Final = "/docs"


class SecurityHeaders:
    """Around a WSGI application."""

    def __init__(self, application: "WSGIApplication") -> None:
        self._application = application

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        wanted = PAGES if environ["PATH_INFO"].startswith(PAGES_AT) else DATA

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            given = {name.lower() for name, _ in headers}
            headers += [pair for pair in wanted if pair[0].lower() not in given]
            return start_response(status, headers, *rest)

        return self._application(environ, start)
