"""The OpenAPI document of an application: its routes, what views declare of them, and the types that they name.

Nothing of it is written twice. A route's path and methods are Flask's, its words the docstring's, its schemas those of
the types that parse, its scope the door's; errors are asked of the handler that would answer with them.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from flask import Flask

from webapp.auth import door
from webapp.openapi.declared import Answered, Body, Declaration, Parameter, shape_of
from webapp.openapi.errors import HEADERS, Errors, handler_of
from webapp.openapi.headers import EVERYWHERE, referred
from webapp.openapi.routes import Route, routes_of
from webapp.openapi.schemas import Schemas, details, summary, title
from webapp.wire.headers import BINARY, CONTRACT_VERSION

_ABOUT: Final = """\
Embeddings, reranking and extraction by the models of one farm, and the config DB that says what they are.

Bodies and answers are JSON. Where `application/msgpack` is named too, either may be sent, and asked for with `Accept`;
there an array of numbers is a map as msgpack-numpy writes it (`nd`, `type`, `kind`, `shape`, `data`), in JSON a list.
Ids of models hold slashes: in a path they stand as they are, or as `%2F`.

Every error names a code that programs can branch on, which also stands in the header `X-SIE-Error-Code`; every 429, 503
and 504 has a positive `Retry-After`.
"""
_KEY: Final = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key, a token of the issuer or a static token, as `FARMHAND_AUTH` says. A farm may ask for none.",
}
_PARTS: Final[Mapping[str, str]] = {
    "model": "The id of a model.",
    "task_id": "The id of a task, as the answer 202 names it.",
    "bundle": "The name of a bundle.",
    "version": "The version of a model: `1`.",
    "pool": "The name of a pool.",
}
"""What the parts of paths are."""


def document(app: Flask) -> dict[str, Any]:
    """What can be asked of an application, and what it answers.

    Raises:
        UndeclaredRouteError: a view has no declaration.
    """
    routes = routes_of(app)
    schemas = Schemas(chain(_types(routes), (shape_of(handler_of(app, route)) for route in routes)))
    errors = Errors(app, schemas)
    paths: dict[str, Any] = defaultdict(dict)
    for route in routes:
        paths[route.path][route.method.lower()] = _operation(route, schemas, errors)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Farmhand",
            "version": CONTRACT_VERSION,
            "description": _ABOUT,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "tags": [
            {"name": _tag(module), "description": summary(sys.modules[module].__doc__)}
            for module in _modules(app, routes)
        ],
        "paths": dict(paths),
        "components": {
            "schemas": schemas.components,
            "responses": dict(sorted(errors.components.items())),
            "headers": _known_headers(routes, schemas),
            "securitySchemes": {"key": _KEY},
        },
    }


def document_text(app: Flask) -> str:
    """The same as a file."""
    return json.dumps(document(app), indent=2, ensure_ascii=False) + "\n"


def _modules(app: Flask, routes: Sequence[Route]) -> Iterable[str]:
    """The modules of all views, in the order in which the application names them."""
    order = list(app.blueprints)
    return dict.fromkeys(route.module for route in sorted(routes, key=lambda route: order.index(route.blueprint)))


def _types(routes: Sequence[Route]) -> Iterator[Any]:
    yield from (one.kind for one in HEADERS)
    for route in routes:
        said = route.declaration
        yield from (one.kind for one in said.parameters)
        if said.body is not None:
            yield said.body.kind
        for answer in said.answers.values():
            yield from (one.kind for one in answer.headers)
            if answer.kind is not None:
                yield answer.kind


def _operation(route: Route, schemas: Schemas, errors: Errors) -> dict[str, Any]:
    said, words = route.declaration, route.view.__doc__
    operation: dict[str, Any] = {"operationId": route.name, "tags": [_tag(route.module)], "summary": title(words)}
    if more := details(words):
        operation["description"] = more
    parameters = [_part(part, said) for part in route.parts]
    parameters += [_parameter(one, schemas) for one in said.parameters]
    if parameters:
        operation["parameters"] = parameters
    if said.body is not None:
        operation["requestBody"] = _body(said.body, schemas)
    answers = {status: _answer(answer, schemas) for status, answer in said.answers.items()}
    responses = {**errors.of(route), **answers}  # a view that answers with a status itself knows better
    operation["responses"] = {str(status): responses[status] for status in sorted(responses)}
    scope = door.scope_of(route.blueprint, route.endpoint, route.method)
    operation["security"] = [] if route.is_open else [{"key": [scope]}]
    return operation


def _part(name: str, said: Declaration) -> dict[str, Any]:
    part = {"name": name, "in": "path", "required": True, "description": _PARTS[name], "schema": {"type": "string"}}
    return part | ({"example": said.path[name]} if name in said.path else {})


def _parameter(one: Parameter, schemas: Schemas) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": one.name,
        "in": one.place,
        "description": one.meaning,
        "schema": schemas.of(one.kind),
    }
    if one.is_required:
        said["required"] = True
    return said | ({} if one.example is None else {"example": one.example})


def _body(body: Body, schemas: Schemas) -> dict[str, Any]:
    content = _content(body.kind, body.media, schemas)
    content[body.media[0]]["example"] = body.example
    return {"required": True, "content": content}


def _answer(answer: Answered, schemas: Schemas) -> dict[str, Any]:
    said: dict[str, Any] = {
        "description": answer.meaning,
        "headers": referred((*EVERYWHERE, *answer.headers)),
    }
    if answer.kind is not None:
        said["content"] = _content(answer.kind, answer.media, schemas)
    if answer.links:
        said["links"] = {
            name: {
                "operationId": "_".join(link.endpoint.split(".")),
                "parameters": {part: f"$response.body#{pointer}" for part, pointer in link.path.items()},
            }
            for name, link in answer.links.items()
        }
    return said


def _content(kind: Any, media: Iterable[str], schemas: Schemas) -> dict[str, Any]:
    """By media type; raw bytes have no schema."""
    return {one: {} if one == BINARY else {"schema": schemas.of(kind)} for one in media}


def _known_headers(routes: Sequence[Route], schemas: Schemas) -> dict[str, Any]:
    """Every header that some answer carries."""
    answers = chain.from_iterable(route.declaration.answers.values() for route in routes)
    known = {one.name: one for one in chain(HEADERS, *(answer.headers for answer in answers))}
    return {name: {"description": one.meaning, "schema": schemas.of(one.kind)} for name, one in sorted(known.items())}


def _tag(module: str) -> str:
    return module.rpartition(".")[2]
