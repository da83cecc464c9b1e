"""``POST /v1/extract/<model>``: texts in, entities, relations, classes and data out, at once or as a task."""

from flask import Blueprint
from flask.typing import ResponseReturnValue

from tasks.names import Operation
from webapp import inference
from webapp.extract_admission import admit_extract
from webapp.wire.bodies import ExtractBody

bp = Blueprint("extract", __name__)


@bp.post("/v1/extract/<path:model>")
def extract(model: str) -> ResponseReturnValue:
    """Extract from the items of one request, in order; an item that cannot be served carries its own error."""
    return inference.serve(Operation.EXTRACT, model, ExtractBody, admit_extract)
