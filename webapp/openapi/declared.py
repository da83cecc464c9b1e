"""What views and handlers of errors say of themselves, for the document of the API.

A declaration stands above a view and changes nothing of what it does. Only what Flask does not know is declared: the
types that are read and answered, headers, the errors to expect. Paths, methods and words are the route's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Literal, TypeVar

from common.errors import FarmError
from webapp.wire.headers import JSON

View = TypeVar("View", bound=Callable[..., Any])
Handler = TypeVar("Handler", bound=Callable[[Any], Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A header or a parameter of the query, in a request; a header, in an answer."""

    name: str
    meaning: str
    kind: Any = str
    place: Literal["header", "query"] = "header"
    is_required: bool = False
    example: Any = None


@dataclass(frozen=True, slots=True)
class Link:
    """Where an answer leads to: a view, and where in the body each part of its path stands."""

    endpoint: str
    path: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that is no error. No ``kind``: its body has no schema."""

    kind: Any = None
    meaning: str = "Done."
    media: tuple[str, ...] = (JSON,)
    headers: tuple[Parameter, ...] = ()
    links: Mapping[str, Link] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Body:
    """What a view reads. The example is sent as it stands by a test, and is answered with success."""

    kind: Any
    example: Any
    media: tuple[str, ...] = (JSON,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a view declares. ``path`` and ``query`` hold examples, which go with that of the body."""

    answers: Mapping[int, Answered]
    body: Body | None = None
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[type[FarmError], ...] = ()
    path: Mapping[str, str] = field(default_factory=dict)


_views: Final[dict[Callable[..., Any], Declaration]] = {}
_handlers: Final[dict[Callable[[Any], Any], Any]] = {}


def declared(
    answer: Any = None,
    *,
    body: Body | None = None,
    status: int = HTTPStatus.OK,
    more: Mapping[int, Answered] | None = None,
    parameters: tuple[Parameter, ...] = (),
    errors: tuple[type[FarmError], ...] = (),
    path: Mapping[str, str] | None = None,
) -> Callable[[View], View]:
    """Declare a view.

    Args:
        answer: an ``Answered``, or the type of a plain one.
        body: what it reads.
        status: of ``answer``.
        more: further answers that are no errors, by status.
        parameters: headers and parameters of the query that it heeds.
        errors: kinds of errors beside those that every route has.
        path: an example of each part of its path.
    """
    first = answer if isinstance(answer, Answered) else Answered(answer)
    declaration = Declaration(
        answers={int(status): first, **(more or {})}, body=body, parameters=parameters, errors=errors, path=path or {}
    )

    def mark(view: View) -> View:
        _views[view] = declaration
        return view

    return mark


def answers_errors_as(kind: Any) -> Callable[[Handler], Handler]:
    """Declare the type that a handler of errors answers with."""

    def mark(handler: Handler) -> Handler:
        _handlers[handler] = kind
        return handler

    return mark


def declaration_of(view: Callable[..., Any]) -> Declaration | None:
    """What a view has declared; None: nothing."""
    return _views.get(view)


def shape_of(handler: Callable[[Any], Any]) -> Any:
    """The type that a handler of errors answers with."""
    return _handlers[handler]
