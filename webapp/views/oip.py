"""``/v2``: the Open Inference Protocol, for texts into dense vectors."""

import re
from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import FarmError, ModelNotFoundError, NotFoundError
from config_db.families import why_unsupported
from config_db.spec import ModelSpec
from tasks.names import Operation
from webapp import inference
from webapp.admission import admit_encode, check_access
from webapp.auth.principals import principal
from webapp.farm import farm
from webapp.views.health import readyz
from webapp.wire import answers
from webapp.wire import oip as wire
from webapp.wire.bodies import EncodeBody, EncodeParams, Item
from webapp.wire.headers import CONTRACT_VERSION

bp = Blueprint("oip", __name__)
probes = Blueprint("oip_health", __name__)
bp.register_error_handler(FarmError, wire.problem)

_PLACE: Final = re.compile(r"(?P<model>.+?)(?:/versions/(?P<version>[^/]+))?(?:/(?P<what>ready|infer))?")
"""Ids of models hold slashes, so a route is read from its end."""


@probes.get("/v2/health/live")
def live() -> ResponseReturnValue:
    """Alive."""
    return answers.answer({"live": True})


@probes.get("/v2/health/ready")
def ready() -> ResponseReturnValue:
    """200 once a request would succeed."""
    return readyz()


@bp.get("/v2")
def server() -> ResponseReturnValue:
    """What this server is."""
    return answers.answer({"name": "farmhand", "version": CONTRACT_VERSION, "extensions": ["binary_tensor_data"]})


@bp.get("/v2/models/<path:place>")
def show(place: str) -> ResponseReturnValue:
    """A model's tensors, or whether it can be asked."""
    model, what = _read(place)
    if what == "infer":
        raise NotFoundError("inference is asked for with POST")
    spec = _spec(model)
    if what == "ready":
        reason = why_unsupported(spec)
        return answers.answer({"name": spec.id, "ready": reason is None}, status=200 if reason is None else 400)
    return answers.answer(wire.metadata(spec))


@bp.post("/v2/models/<path:place>")
def infer(place: str) -> ResponseReturnValue:
    """Encode the texts of one tensor, in order."""
    model, what = _read(place)
    if what != "infer":
        raise NotFoundError("there is no such route")
    body, texts = wire.read(farm().settings.max_body_bytes)
    binary = wire.wants_binary(body)
    request = EncodeBody([Item(text=text) for text in texts], EncodeParams(output_types=["dense"]))
    spec, outcome = inference.run(Operation.ENCODE, model, request, admit_encode)
    return wire.vectors(spec, body, outcome.result, binary=binary)


def _read(place: str) -> tuple[str, str | None]:
    """The model of a route, and what is asked of it."""
    found = _PLACE.fullmatch(place)
    if found is None:
        raise NotFoundError("there is no such route")
    if found["version"] not in (None, wire.VERSION):
        raise ModelNotFoundError(f"model {found['model'][:200]!r} has the version {wire.VERSION} only")
    return found["model"], found["what"]


def _spec(model: str) -> ModelSpec:
    spec = farm().served.model(model)
    check_access(spec, principal().tenant)
    return spec
