"""``POST /v1/score/<model>``: a query and items in, the items ranked by their scores, at once or as a task."""

from flask import Blueprint
from flask.typing import ResponseReturnValue

from tasks.names import Operation
from webapp import inference
from webapp.score_admission import admit_score
from webapp.wire.bodies import ScoreBody

bp = Blueprint("score", __name__)


@bp.post("/v1/score/<path:model>")
def score(model: str) -> ResponseReturnValue:
    """Score the items of one request against its query, best first."""
    return inference.serve(Operation.SCORE, model, ScoreBody, admit_score)
