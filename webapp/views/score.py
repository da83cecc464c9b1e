"""``POST /v1/score/<model>``: a query and items in, the items ranked by their scores, at once or as a task."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import ProvisioningError
from tasks.names import Operation
from webapp import inference
from webapp.openapi.inference import RERANKER, serves
from webapp.score_admission import admit_score
from webapp.wire.bodies import ScoreBody
from webapp.wire.provisioning import provisioning
from webapp.wire.results import ScoreAnswer

bp = Blueprint("score", __name__)
bp.register_error_handler(ProvisioningError, provisioning)

_EXAMPLE: Final = {
    "query": {"text": "When does the lake freeze?"},
    "items": [{"id": "a", "text": "The lake freezes in January."}, {"id": "b", "text": "Ada lives in Turin."}],
}


@bp.post("/v1/score/<path:model>")
@serves(RERANKER, ScoreBody, ScoreAnswer, _EXAMPLE)
def score(model: str) -> ResponseReturnValue:
    """Score the items of one request against its query, best first."""
    return inference.serve(Operation.SCORE, model, ScoreBody, admit_score)
