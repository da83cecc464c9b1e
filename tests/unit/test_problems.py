"""Every error that there is, as callers of each protocol see it."""

from collections.abc import Callable, Iterator

import pytest
from flask import Flask, Response

from common.errors import FarmError, QueueFullError
from webapp import problems
from webapp.wire import oip, openai


def all_errors(kind: type[FarmError] = FarmError) -> Iterator[type[FarmError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_errors(below)


@pytest.mark.parametrize("shape", [problems.problem, openai.problem, oip.problem], ids=["sie", "openai", "v2"])
@pytest.mark.parametrize("kind", sorted(set(all_errors()), key=lambda kind: kind.__name__))
def test_every_error_has_a_status_a_code_and_a_sane_retry_after(
    kind: type[FarmError], shape: Callable[[FarmError], Response]
) -> None:
    with Flask("webapp").test_request_context("/v1/embeddings"):
        response = shape(kind("what happened\r\nX-Injected: 1", param="items[0].text"))
    assert 400 <= response.status_code < 600
    assert response.headers["X-SIE-Error-Code"] == kind.code
    assert "X-Injected" not in response.headers
    body = response.json
    assert body is not None
    error = body["error"]
    if shape is oip.problem:
        assert isinstance(error, str)
    else:
        assert error["code"]
        assert error["message"].startswith("what happened")
        assert error["param"]
        assert "retry_after_s" not in error
    again = response.headers.get("Retry-After")
    assert (again is not None) == (response.status_code in (429, 503, 504))
    assert again is None or int(again) >= 1


@pytest.mark.parametrize("seconds", [0, 0.01, -1, 1e-9, 3.2])
def test_retry_after_is_never_zero(seconds: float) -> None:
    with Flask("webapp").test_request_context("/"):
        response = problems.problem(QueueFullError("full", retry_after_s=seconds))
    assert int(response.headers["Retry-After"]) >= max(1, seconds)
