"""Routes that the protocols served here have and this farm does not: each says so with a code, in its own shape."""

from collections.abc import Mapping
from typing import Final

from flask import Blueprint, Response, request
from flask.typing import ResponseReturnValue

from common.errors import FarmError, RouteUnsupportedError
from webapp import problems
from webapp.wire import openai as wire

METHODS: Final = ("GET", "POST", "DELETE")
SIE: Final = {
    "/v1/generate/<path:rest>": "text is not generated here",
    "/v1/estimate": "requests are not priced here; their usage is in each answer",
    "/v1/recommend": "models are not recommended here; GET /v1/models lists them",
    "/v1/jobs": "there are no jobs here; send requests with `Prefer: respond-async` and ask /v1/tasks/<id>",
    "/v1/jobs/<path:rest>": "there are no jobs here; tasks are at /v1/tasks/<id>",
    "/internal/orgs/<path:rest>": "there are no connections here: this farm has no control plane",
}
OPENAI: Final = {
    "/v1/chat/completions": "text is not generated here",
    "/v1/completions": "text is not generated here",
    "/v1/responses": "text is not generated here",
    "/v1/responses/<path:rest>": "text is not generated here",
    "/v1/audio/transcriptions": "speech is not transcribed here",
    "/v1/files": "files are not kept here; send texts to /v1/embeddings",
    "/v1/files/<path:rest>": "files are not kept here",
    "/v1/batches": "there are no batches of files here; send texts to /v1/embeddings, many in one request",
    "/v1/batches/<path:rest>": "there are no batches of files here",
}
_WORDS: Final = SIE | OPENAI


def _problem(error: FarmError) -> Response:
    return _final(problems.problem(error))


def _openai_problem(error: FarmError) -> Response:
    return _final(wire.problem(error))


def _final(response: Response) -> Response:
    """Tell the openai client that another try is no use: it would repeat whatever is 500 or more."""
    if response.status_code == 501:
        response.headers["X-Should-Retry"] = "false"
    return response


def _refuse(**_: str) -> ResponseReturnValue:
    rule = request.url_rule
    assert rule is not None  # nothing else calls it
    raise RouteUnsupportedError(f"{request.path[:200]}: {_WORDS[rule.rule]}")


def _blueprint(name: str, routes: Mapping[str, str]) -> Blueprint:
    made = Blueprint(name, __name__)
    for rule in routes:
        made.add_url_rule(rule, endpoint=rule, view_func=_refuse, methods=METHODS)
    return made


bp = _blueprint("absent", SIE)
openai_bp = _blueprint("absent_openai", OPENAI)
bp.register_error_handler(FarmError, _problem)
openai_bp.register_error_handler(FarmError, _openai_problem)
