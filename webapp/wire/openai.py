"""The shapes of the public embeddings and rerank routes: bodies in, answers and errors out."""

import base64
import re
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
from flask import Response, request

from common.errors import (
    CapacityError,
    FarmError,
    ForbiddenError,
    ModelNotFoundError,
    QueueFullError,
    RateLimitError,
    RequestError,
    TenantLimitError,
    UnauthenticatedError,
)
from tasks import codec
from tasks.messages import Outcome
from webapp import problems
from webapp.openapi.declared import answers_errors_as
from webapp.wire import answers

_CODES: Final[dict[type[FarmError], str]] = {
    ModelNotFoundError: "model_not_found",
    QueueFullError: "server_overloaded",
    TenantLimitError: "rate_limit_exceeded",
    RateLimitError: "rate_limit_exceeded",
    UnauthenticatedError: "invalid_api_key",
}
"""What stands under ``error.code`` where public clients look for a word of their own; else the code is ours."""
_TYPES: Final[dict[type[FarmError], str]] = {
    UnauthenticatedError: "authentication_error",
    ForbiddenError: "permission_error",
    RequestError: "invalid_request_error",
    TenantLimitError: "rate_limit_error",
    RateLimitError: "rate_limit_error",
    CapacityError: "overloaded_error",
    FarmError: "server_error",
}


_TEXT: Final = {"type": "string", "minLength": 1}
_TEXTS: Final = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}


class EmbeddingsBody(msgspec.Struct):
    """The body of an embeddings request. Fields that are not named here are ignored, as clients expect."""

    model: str
    input: Annotated[Any, msgspec.Meta(description="A text, or a list of texts.", extra_json_schema=_TEXTS)]
    encoding_format: str = "float"
    dimensions: int | None = None


class Document(msgspec.Struct):
    """One document to rank, where it is given as an object."""

    text: str


class RerankBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a rerank request."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool = False
    options: dict[str, Any] | None = None


class OpenAiError(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAiProblem(TypedDict):
    """An error as the public clients of these routes read it."""

    error: OpenAiError


class TokenUsage(TypedDict):
    """Tokens, as the model has read them."""

    prompt_tokens: int
    total_tokens: int
    sie_token_source: NotRequired[Literal["worker"]]


class Embedding(TypedDict):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """One vector for each text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokenUsage


class RankedText(TypedDict):
    """A document that was ranked."""

    text: str


class Ranked(TypedDict):
    """One document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: NotRequired[RankedText]


class Ranking(TypedDict):
    """The documents, best first."""

    model: str
    results: list[Ranked]
    usage: TokenUsage


def texts_of(given: Any) -> list[str]:
    """The texts of an embeddings request: one, or a list of them; RequestError for anything else."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise RequestError("input is a text or a list of at least one", param="input")
    if all(isinstance(one, int) and not isinstance(one, bool) for one in texts) or isinstance(texts[0], list):
        raise RequestError("input is given as token ids; each model here has its own, so send texts", param="input")
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError("input is a text or a list of texts", param=f"input[{at}]")
        if not text:
            raise RequestError("an input is empty", param=f"input[{at}]" if len(texts) > 1 else "input")
    return texts


def embeddings(outcome: Outcome, *, as_base64: bool) -> Response:
    """The answer to an embeddings request: little-endian float32 in base64, or numbers."""
    rows = [codec.array_of(item["dense"]["values"]) for item in codec.unpack(outcome.result)]
    data: list[Embedding] = [
        {"object": "embedding", "index": at, "embedding": _in_base64(row) if as_base64 else row}  # type: ignore[typeddict-item]  # an array is written as a list
        for at, row in enumerate(rows)
    ]
    tokens = outcome.usage.get("input_tokens", 0)
    usage: TokenUsage = {"prompt_tokens": tokens, "total_tokens": tokens, "sie_token_source": "worker"}
    return answers.answer(EmbeddingList(object="list", data=data, model=outcome.model, usage=usage))


def ranking(outcome: Outcome, body: RerankBody) -> Response:
    """The answer to a rerank request, best first."""
    results: list[Ranked] = []
    for entry in codec.unpack(outcome.result)[: body.top_n]:
        index = int(entry["item_id"].rpartition("-")[2])
        result = Ranked(index=index, relevance_score=entry["score"])
        if body.return_documents:
            document = body.documents[index]
            result["document"] = {"text": document if isinstance(document, str) else document.text}
        results.append(result)
    tokens = outcome.usage.get("input_tokens", 0)
    usage = TokenUsage(prompt_tokens=tokens, total_tokens=tokens)
    return answers.answer(Ranking(model=outcome.model, results=results, usage=usage))


@answers_errors_as(OpenAiProblem)
def problem(error: FarmError) -> Response:
    """An error as the public clients of these routes read it."""
    response = problems.problem(error)
    body = problems.error_body(error)
    body["type"] = next(_TYPES[kind] for kind in type(error).__mro__ if kind in _TYPES)
    body["param"] = _own_name(error.param)
    body["code"] = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), error.code)
    response.set_data(codec.dump_json({"error": body}))
    return response


def _own_name(param: str | None) -> str | None:
    """A field as it is called on these routes, which are translated into requests with items."""
    if param is None:
        return None
    items = "documents" if request.path.endswith("/rerank") else "input"
    param = re.sub(r"^items(\[\d+\])?(\.text)?$", rf"{items}\1", param)
    return {"query.text": "query", "params.options.dimensions": "dimensions"}.get(param, param)


def _in_base64(row: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode()
