"""Routes that this farm does not have: a code in the shape of their protocol, at once, and no word of trying again."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from common.settings import WebSettings
from tasks.client import FarmClient
from tests.standin import SPECS, StaticSnapshots
from webapp.app import create_app

SIE = [
    ("POST", "/v1/generate/org__m"),
    ("POST", "/v1/estimate"),
    ("POST", "/v1/recommend"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/x"),
    ("POST", "/v1/jobs/x/cancel"),
    ("POST", "/v1/jobs/x/execute"),
    ("POST", "/v1/jobs/x/repair"),
    ("DELETE", "/internal/orgs/o/connections/c"),
]
OPENAI = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/files?purpose=batch&filename=a"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/file-1/content"),
    ("DELETE", "/v1/files/file-1"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/b"),
    ("POST", "/v1/batches/b/cancel"),
]


@pytest.fixture(scope="module")
def web() -> FlaskClient:
    """An application whose Redis is away: nothing here may reach for it."""
    settings = WebSettings(redis_url="redis://127.0.0.1:1/0")
    client = FarmClient(settings.redis_url, queue_limit=10, result_ttl_s=60)
    return create_app(settings, StaticSnapshots(*SPECS), client).test_client()


def refused(web: FlaskClient, method: str, path: str) -> dict[str, Any]:
    response = web.open(path, method=method, data=b"\x81\xa1a", content_type="application/msgpack")
    assert (response.status_code, response.content_type) == (501, "application/json")
    assert response.headers["X-SIE-Error-Code"] == "NOT_IMPLEMENTED"
    assert response.headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in response.headers
    error: dict[str, Any] = response.json["error"]  # type: ignore[index]  # the content type says so
    assert (error["code"], " here" in error["message"]) == ("NOT_IMPLEMENTED", True)
    return error


@pytest.mark.parametrize(("method", "path"), SIE)
def test_a_sie_route_that_is_not_there_is_501(web: FlaskClient, method: str, path: str) -> None:
    assert "type" not in refused(web, method, path)


@pytest.mark.parametrize(("method", "path"), OPENAI)
def test_an_openai_route_that_is_not_there_is_501(web: FlaskClient, method: str, path: str) -> None:
    error = refused(web, method, path)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


def test_what_no_protocol_knows_is_404(web: FlaskClient) -> None:
    response = web.post("/v1/nothing")
    assert (response.status_code, response.json) == (
        404,
        {"error": {"code": "NOT_FOUND", "message": "there is no such route: /docs shows those there are"}},
    )
