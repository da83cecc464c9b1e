"""``/v2``: the Open Inference Protocol, for texts into dense vectors."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import FarmError, ModelNotFoundError
from config_db.families import why_unsupported
from config_db.spec import ModelSpec
from tasks.names import Operation
from webapp import inference
from webapp.admission import admit_encode, check_access
from webapp.auth.principals import principal
from webapp.farm import farm
from webapp.openapi.declared import Answered, Body, Parameter, declared
from webapp.openapi.headers import INFERS, REPLAYED, Count
from webapp.openapi.inference import EMBEDDER, OUTCOMES
from webapp.views.health import NOT_READY, Ready, readyz
from webapp.wire import answers
from webapp.wire import oip as wire
from webapp.wire.bodies import EncodeBody, EncodeParams, Item
from webapp.wire.headers import BINARY, CONTRACT_VERSION, JSON

bp = Blueprint("oip", __name__)
probes = Blueprint("oip_health", __name__)
bp.register_error_handler(FarmError, wire.problem)

_MODEL: Final = "/v2/models/<path:model>"
_VERSION: Final = f"{_MODEL}/versions/<version>"
_PARTS: Final = {"model": EMBEDDER, "version": wire.VERSION}
_JSON_LENGTH: Final = Parameter(
    name=wire.JSON_LENGTH, kind=Count, meaning="Bytes of the JSON, where the tensors follow it."
)
_EXAMPLE: Final = {
    "inputs": [{"name": wire.TEXT, "shape": [1], "datatype": "BYTES", "data": ["The lake freezes in January."]}]
}


@probes.get("/v2/health/live")
@declared(wire.Live)
def live() -> ResponseReturnValue:
    """Alive."""
    return answers.answer(wire.Live(live=True))


@probes.get("/v2/health/ready")
@declared(Ready, more={503: NOT_READY})
def ready() -> ResponseReturnValue:
    """200 once a request would succeed."""
    return readyz()


@bp.get("/v2")
@declared(wire.ServerMetadata)
def server() -> ResponseReturnValue:
    """What this server is."""
    said = wire.ServerMetadata(name="farmhand", version=CONTRACT_VERSION, extensions=["binary_tensor_data"])
    return answers.answer(said)


@bp.get(_MODEL)
@bp.get(_VERSION)
@declared(wire.ModelMetadata, errors=(ModelNotFoundError,), path=_PARTS)
def show(model: str, version: str = wire.VERSION) -> ResponseReturnValue:
    """A model's tensors."""
    return answers.answer(wire.metadata(_spec(model, version)))


@bp.get(f"{_MODEL}/ready")
@bp.get(f"{_VERSION}/ready")
@declared(
    wire.ModelReady,
    more={400: Answered(wire.ModelReady, "It cannot be served.")},
    errors=(ModelNotFoundError,),
    path=_PARTS,
)
def model_ready(model: str, version: str = wire.VERSION) -> ResponseReturnValue:
    """Whether a model can be asked."""
    spec = _spec(model, version)
    can_serve = why_unsupported(spec) is None
    return answers.answer(wire.ModelReady(name=spec.id, ready=can_serve), status=200 if can_serve else 400)


@bp.post(f"{_MODEL}/infer")
@bp.post(f"{_VERSION}/infer")
@declared(
    Answered(wire.InferAnswer, "The vectors.", (JSON, BINARY), (_JSON_LENGTH, REPLAYED)),
    body=Body(wire.InferBody, _EXAMPLE, (JSON, BINARY)),
    parameters=(*INFERS, _JSON_LENGTH),
    errors=OUTCOMES,
    path=_PARTS,
)
def infer(model: str, version: str = wire.VERSION) -> ResponseReturnValue:
    """Encode the texts of one tensor, in order."""
    _check_version(model, version)
    body, texts = wire.read(farm().settings.max_body_bytes)
    binary = wire.wants_binary(body)
    request = EncodeBody([Item(text=text) for text in texts], EncodeParams(output_types=["dense"]))
    outcome = inference.run(Operation.ENCODE, model, request, admit_encode)
    return wire.vectors(body, outcome, binary=binary)


def _spec(model: str, version: str) -> ModelSpec:
    _check_version(model, version)
    spec = farm().served.model(model)
    check_access(spec, principal().tenant)
    return spec


def _check_version(model: str, version: str) -> None:
    if version != wire.VERSION:
        raise ModelNotFoundError(f"model {model[:200]!r} has the version {wire.VERSION} only")
