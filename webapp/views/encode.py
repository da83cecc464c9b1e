"""``POST /v1/encode/<model>``: texts or images in, vectors out, at once or as a task."""

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import ProvisioningError
from tasks.names import Operation
from webapp import inference
from webapp.admission import admit_encode
from webapp.openapi.inference import EMBEDDER, serves
from webapp.wire.bodies import EncodeBody
from webapp.wire.provisioning import provisioning
from webapp.wire.results import EncodeAnswer

bp = Blueprint("encode", __name__)
bp.register_error_handler(ProvisioningError, provisioning)


@bp.post("/v1/encode/<path:model>")
@serves(EMBEDDER, EncodeBody, EncodeAnswer, {"items": [{"id": "a", "text": "The lake freezes in January."}]})
def encode(model: str) -> ResponseReturnValue:
    """Encode the items of one request, in order."""
    return inference.serve(Operation.ENCODE, model, EncodeBody, admit_encode)
