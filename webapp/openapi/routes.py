"""The routes of an application, one for each method of each path, with what their views declare."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from flask import Flask

from webapp.auth import door
from webapp.openapi.declared import Declaration, declaration_of

PAGES: Final = "pages"
"""The blueprint that shows the document to people."""
UNDESCRIBED: Final = (PAGES, "sockets", "absent", "absent_openai")
"""Blueprints that are not described: pages, WebSockets, for which there are no words, and what is not there."""
_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_PART: Final = re.compile(r"<(?:[^:<>]+:)?(\w+)>")


class UndeclaredRouteError(Exception):
    """A view that says nothing of itself; the message names it."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. ``parts`` are the variable ones of its path."""

    method: str
    path: str
    parts: tuple[str, ...]
    endpoint: str
    view: Callable[..., Any]
    declaration: Declaration
    name: str

    @property
    def blueprint(self) -> str:
        """The name of its blueprint."""
        return self.endpoint.partition(".")[0]

    @property
    def module(self) -> str:
        """The module of its view."""
        return self.view.__module__

    @property
    def is_open(self) -> bool:
        """Whether it asks nobody for a key."""
        return self.blueprint in door.OPEN


def routes_of(app: Flask) -> list[Route]:
    """All routes of an application that answer programs, in the order of their paths.

    Raises:
        UndeclaredRouteError: a view has no declaration.
    """
    return sorted(_found(app), key=lambda route: (route.path, _METHODS.index(route.method)))


def _found(app: Flask) -> Iterator[Route]:
    for rule in app.url_map.iter_rules():
        if rule.endpoint.partition(".")[0] in UNDESCRIBED:
            continue
        view = app.view_functions[rule.endpoint]
        declaration = declaration_of(view)
        if declaration is None:
            raise UndeclaredRouteError(f"{rule.endpoint} ({rule.rule}) has no declaration: see webapp.openapi.declared")
        parts = tuple(_PART.findall(rule.rule))
        others = [other.arguments for other in app.url_map.iter_rules(rule.endpoint)]
        own = (part for part in parts if not all(part in arguments for arguments in others))
        name = "_".join((*rule.endpoint.split("."), *own))
        for method in sorted((rule.methods or set()) & set(_METHODS)):
            yield Route(method, _PART.sub(r"{\1}", rule.rule), parts, rule.endpoint, view, declaration, name)
