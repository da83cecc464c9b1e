"""The document of the API: as it is checked in, whole, and without an end that leads nowhere."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from jsonschema import Draft202012Validator

from webapp.app import bare_app
from webapp.openapi.document import document
from webapp.openapi.routes import UNDESCRIBED, UndeclaredRouteError


@pytest.fixture(scope="module")
def app() -> Flask:
    return bare_app()


@pytest.fixture(scope="module")
def said(app: Flask) -> dict[str, Any]:
    return document(app)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def test_every_route_is_described(app: Flask, said: dict[str, Any]) -> None:
    rules = [rule for rule in app.url_map.iter_rules() if rule.endpoint.partition(".")[0] not in UNDESCRIBED]
    assert {(path, method.upper()) for path, methods in said["paths"].items() for method in methods} == {
        (re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in rules
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    names = [operation["operationId"] for methods in said["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


def test_a_route_that_says_nothing_of_itself_is_refused() -> None:
    app = bare_app()
    app.add_url_rule("/v1/new", endpoint="new", view_func=lambda: "")
    with pytest.raises(UndeclaredRouteError, match=r"new \(/v1/new\)"):
        document(app)


def test_every_reference_leads_to_a_valid_schema(said: dict[str, Any]) -> None:
    for schema in said["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    references = {node["$ref"] for node in nodes(said) if "$ref" in node}
    assert references
    for reference in references:
        place: Any = said
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    operations = {operation["operationId"] for path in said["paths"].values() for operation in path.values()}
    links = [link for node in nodes(said) for link in node.get("links", {}).values()]
    assert links
    assert {link["operationId"] for link in links} <= operations


def test_everything_is_said_in_words(said: dict[str, Any]) -> None:
    for path in said["paths"].values():
        for operation in path.values():
            assert operation["summary"].endswith("."), operation["operationId"]
            assert all(one["description"] for one in operation.get("parameters", []))
            assert all("$ref" in answer or answer["description"] for answer in operation["responses"].values())
    schemas = said["components"]["schemas"]
    assert [name for name, schema in schemas.items() if not schema.get("description")] == []


def test_examples_are_as_their_schemas_say(said: dict[str, Any]) -> None:
    bodies = [
        content
        for path in said["paths"].values()
        for operation in path.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if "example" in content
    ]
    assert bodies
    for content in bodies:
        schema = {**content["schema"], "components": said["components"]}
        json.dumps(content["example"])
        Draft202012Validator(schema).validate(content["example"])
