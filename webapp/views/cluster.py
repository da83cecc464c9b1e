"""``/health`` and ``/ws/cluster-status``: the state of the whole farm, once or each second."""

from time import monotonic
from typing import Final
from urllib.parse import urlsplit

import msgspec
from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from common.errors import ForbiddenError, RequestError
from webapp.auth import door
from webapp.auth.principals import principal
from webapp.cluster import Viewer
from webapp.farm import farm
from webapp.openapi.declared import declared
from webapp.views.health import why_degraded
from webapp.wire import answers
from webapp.wire.cluster import Health

bp = Blueprint("cluster", __name__)
sockets = Blueprint("sockets", __name__)

CHECK_KEY_S: Final = 5.0


@bp.get("/health")
@declared(Health)
def health() -> ResponseReturnValue:
    """Workers, models and demand. Always 200: whether a request would succeed is for ``/readyz`` to say."""
    here = farm()
    return answers.answer(msgspec.to_builtins(here.cluster.health(_viewer(), why_degraded(here))))


@sockets.get("/ws/cluster-status", websocket=True)
def watch() -> ResponseReturnValue:
    """The same each second, over a WebSocket, for as long as the caller's key is valid."""
    here = farm()
    _check_origin()
    checked_at = monotonic()

    def text() -> str:
        nonlocal checked_at
        if monotonic() - checked_at > CHECK_KEY_S:
            door.check_again()
            checked_at = monotonic()
        return here.cluster.status_text(_viewer())

    return here.watchers.serve(request.environ, text)


@sockets.get("/ws/cluster-status")
def watch_without_websocket() -> ResponseReturnValue:
    """Says what to do instead."""
    raise RequestError("this route is a WebSocket: send the headers of its handshake, or ask for /health")


def _viewer() -> Viewer:
    caller = principal()
    return Viewer(None if caller.may("config") else caller.tenant)


def _check_origin() -> None:
    """ForbiddenError for a page of another site: browsers let any page open a WebSocket to anywhere."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise ForbiddenError("pages of other sites may not watch this farm", param="Origin")
