"""``POST /v1/extract/<model>``: texts in, entities, relations, classes and data out, at once or as a task."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import ProvisioningError
from tasks.names import Operation
from webapp import inference
from webapp.extract_admission import admit_extract
from webapp.openapi.inference import EXTRACTOR, serves
from webapp.wire.bodies import ExtractBody
from webapp.wire.provisioning import provisioning
from webapp.wire.results import ExtractAnswer

bp = Blueprint("extract", __name__)
bp.register_error_handler(ProvisioningError, provisioning)

_EXAMPLE: Final = {"items": [{"text": "Ada lives in Turin."}], "params": {"labels": ["person", "city"]}}


@bp.post("/v1/extract/<path:model>")
@serves(EXTRACTOR, ExtractBody, ExtractAnswer, _EXAMPLE)
def extract(model: str) -> ResponseReturnValue:
    """Extract from the items of one request, in order; an item that cannot be served carries its own error."""
    return inference.serve(Operation.EXTRACT, model, ExtractBody, admit_extract)
