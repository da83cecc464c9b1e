"""What the inference routes declare alike: headers, errors, and the two ways to be answered."""

from collections.abc import Callable
from typing import Any, Final

from common.errors import (
    AdapterLoadingError,
    CancelledError,
    ConfigUnavailableError,
    DeadlineExceededError,
    IdempotencyError,
    InferenceError,
    InputTooLongError,
    MediaTypeError,
    ModelLoadError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnsupportedError,
    NotFoundError,
    ProvisioningError,
    QueueFullError,
    QueueUnavailableError,
    RateLimitError,
    ResidencyFullError,
    TenantLimitError,
    WorkerLostError,
)
from webapp.openapi import headers
from webapp.openapi.declared import Answered, Body, Link, View, declared
from webapp.wire.headers import JSON, MSGPACK
from webapp.wire.provisioning import Later

EMBEDDER: Final = "sentence-transformers/all-MiniLM-L6-v2"
RERANKER: Final = "BAAI/bge-reranker-v2-m3"
EXTRACTOR: Final = "urchade/gliner_multi-v2.1"
"""Models that the examples name."""
OUTCOMES: Final = (
    InputTooLongError,
    ModelNotFoundError,
    NotFoundError,
    MediaTypeError,
    ModelUnsupportedError,
    QueueFullError,
    RateLimitError,
    TenantLimitError,
    QueueUnavailableError,
    ConfigUnavailableError,
    ResidencyFullError,
    ProvisioningError,
    ModelLoadingError,
    AdapterLoadingError,
    ModelLoadError,
    InferenceError,
    WorkerLostError,
    DeadlineExceededError,
    CancelledError,
    IdempotencyError,
)
"""What may come of a request to a model, beside its answer."""
_ACCEPTED: Final = Answered(
    Later,
    "Queued: ask for the outcome of the task. Or, to who would wait: no worker is there yet, so ask again.",
    headers=(headers.LOCATION, headers.PREFERENCE_APPLIED, headers.REPLAYED, headers.RETRY_AFTER),
    links={
        "outcome": Link("tasks.show", {"task_id": "/task_id"}),
        "cancel": Link("tasks.cancel", {"task_id": "/task_id"}),
    },
)


def serves(model: str, body: type, answer: Any, example: dict[str, Any]) -> Callable[[View], View]:
    """Declare a view that runs an operation of the model in its path, at once or as a task.

    Args:
        model: of the example.
        body: what is read.
        answer: what is answered at once.
        example: of the body.
    """
    return declared(
        Answered(answer, "The results.", (JSON, MSGPACK), headers.MEASURED),
        body=Body(body, example, (JSON, MSGPACK)),
        more={202: _ACCEPTED},
        parameters=(*headers.INFERS, headers.PREFER, headers.MODE),
        errors=OUTCOMES,
        path={"model": model},
    )
