"""``/v1/embeddings`` and ``/v1/rerank``: the routes that public clients of other servers know."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import FarmError, RequestError
from tasks.names import Operation
from webapp import inference
from webapp.admission import admit_encode
from webapp.farm import farm
from webapp.openapi.declared import Answered, Body, declared
from webapp.openapi.headers import INFERS, REPLAYED
from webapp.openapi.inference import EMBEDDER, OUTCOMES, RERANKER
from webapp.score_admission import admit_score
from webapp.wire import bodies
from webapp.wire import openai as wire
from webapp.wire.bodies import EncodeBody, EncodeParams, Item, ScoreBody
from webapp.wire.headers import JSON, MSGPACK

bp = Blueprint("openai", __name__)
bp.register_error_handler(FarmError, wire.problem)

FORMATS: Final = ("float", "base64")


@bp.post("/v1/embeddings")
@declared(
    Answered(wire.EmbeddingList, "The vectors.", headers=(REPLAYED,)),
    body=Body(
        wire.EmbeddingsBody,
        {"model": EMBEDDER, "input": ["The lake freezes in January.", "Ada lives in Turin."]},
        (JSON, MSGPACK),
    ),
    parameters=INFERS,
    errors=OUTCOMES,
)
def embeddings() -> ResponseReturnValue:
    """Encode texts into dense vectors, in order."""
    body = bodies.read(wire.EmbeddingsBody, max_bytes=farm().settings.max_body_bytes)
    if body.encoding_format not in FORMATS:
        raise RequestError(f"encoding_format is one of {', '.join(FORMATS)}", param="encoding_format")
    options = None if body.dimensions is None else {"dimensions": body.dimensions}
    params = EncodeParams(output_types=["dense"], options=options)
    request = EncodeBody([Item(text=text) for text in wire.texts_of(body.input)], params)
    outcome = inference.run(Operation.ENCODE, body.model, request, admit_encode)
    return wire.embeddings(outcome, as_base64=body.encoding_format == "base64")


@bp.post("/v1/rerank")
@declared(
    Answered(wire.Ranking, "The ranking.", headers=(REPLAYED,)),
    body=Body(
        wire.RerankBody,
        {
            "model": RERANKER,
            "query": "When does the lake freeze?",
            "documents": ["The lake freezes in January.", {"text": "Ada lives in Turin."}],
            "return_documents": True,
        },
        (JSON, MSGPACK),
    ),
    parameters=INFERS,
    errors=OUTCOMES,
)
def rerank() -> ResponseReturnValue:
    """Score documents against a query, best first."""
    body = bodies.read(wire.RerankBody, max_bytes=farm().settings.max_body_bytes)
    if body.top_n is not None and body.top_n < 1:
        raise RequestError("top_n is at least 1", param="top_n")
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    request = ScoreBody(Item(text=body.query), [Item(text=text) for text in texts], options=body.options)
    outcome = inference.run(Operation.SCORE, body.model, request, admit_score)
    return wire.ranking(outcome, body)
