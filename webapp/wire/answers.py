"""Answers: an outcome as JSON or msgpack, with the headers that say how long it took.

For msgpack the result is copied from the reply as it stands, undecoded. For JSON its arrays become lists of numbers.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from math import ceil
from typing import Any, Final

import msgspec
from flask import Response

from tasks import codec
from tasks.messages import RESULT_FIELD, Outcome, head_fields
from tasks.names import Operation
from tasks.records import TaskView
from webapp.wire.headers import ERROR_CODE, JSON, MSGPACK, set_common, wants_msgpack
from webapp.wire.results import Accepted, ErrorBody, NotReady

_encoder: Final = msgspec.msgpack.Encoder()
_TIME_HEADERS: Final = {
    "queue_ms": "X-Queue-Time",
    "tokenization_ms": "X-Tokenization-Time",
    "inference_ms": "X-Inference-Time",
    "postprocessing_ms": "X-Postprocessing-Time",
    "total_ms": "X-Total-Time",
}
_UNIT_HEADERS: Final = {
    "input_tokens": "X-SIE-Units-Input-Tokens",
    "images": "X-SIE-Units-Images",
    "pairs": "X-SIE-Units-Pairs",
}


def answer(body: Mapping[str, Any], *, status: int = 200) -> Response:
    """A plain JSON answer."""
    response = Response(codec.dump_json(body), status, content_type=JSON)
    set_common(response)
    return response


def result_fields(outcome: Outcome, operation: Operation, *, as_msgpack: bool) -> dict[str, Any]:
    """A successful outcome as the body of its answer."""
    result = outcome.result if as_msgpack else codec.jsonable(codec.unpack(outcome.result))
    fields: dict[str, Any] = {
        **head_fields(outcome, operation),
        RESULT_FIELD[operation]: result,
        "timing": outcome.timing,
    }
    if outcome.usage:
        fields["usage"] = outcome.usage
    return fields


def outcome_answer(outcome: Outcome, operation: Operation, *, total_ms: float, msgpack_by_default: bool) -> Response:
    """The answer to a synchronous request that succeeded."""
    as_msgpack = wants_msgpack(by_default=msgpack_by_default)
    outcome.timing["total_ms"] = round(total_ms, 3)
    fields = result_fields(outcome, operation, as_msgpack=as_msgpack)
    response = Response(
        _encoder.encode(fields) if as_msgpack else codec.dump_json(fields), content_type=MSGPACK if as_msgpack else JSON
    )
    set_common(response)
    headers = response.headers
    for name, value in outcome.timing.items():
        if name in _TIME_HEADERS:
            headers[_TIME_HEADERS[name]] = f"{value:.2f}"
    headers["X-SIE-Model-Revision"] = outcome.spec
    for unit, name in _UNIT_HEADERS.items():
        if unit in outcome.usage:
            headers[name] = str(outcome.usage[unit])
    return response


def accepted(task_id: str, *, retry_after_s: float | None = None) -> Response:
    """The answer to an asynchronous request: where to ask for its outcome, and when, if that is known to take long."""
    response = answer(Accepted(task_id=task_id, state="queued"), status=202)
    response.headers["Location"] = f"/v1/tasks/{task_id}"
    response.headers["Preference-Applied"] = "respond-async"
    if retry_after_s is not None:
        response.headers["Retry-After"] = whole_seconds(retry_after_s)
    return response


def task_answer(view: TaskView) -> Response:
    """What is known of an asynchronous task."""
    as_msgpack = wants_msgpack(by_default=False)
    fields: dict[str, Any] = {
        "task_id": view.task_id,
        "state": view.state,
        "model": view.model,
        "operation": view.operation.value,
        "submitted": instant(view.submitted),
    }
    if view.outcome is not None and view.outcome.error is None:
        fields["result"] = result_fields(view.outcome, view.operation, as_msgpack=as_msgpack)
    elif view.outcome is not None:
        fields["error"] = view.outcome.error
    if not as_msgpack:
        return answer(fields)
    response = Response(_encoder.encode(fields), content_type=MSGPACK)
    set_common(response)
    return response


def not_ready(reasons: list[str]) -> Response:
    """The answer of a farm that cannot serve yet."""
    error = ErrorBody(code="NOT_READY", message="; ".join(reasons))
    response = answer(NotReady(status="not_ready", reasons=reasons, error=error), status=503)
    response.headers[ERROR_CODE] = "NOT_READY"
    response.headers["Retry-After"] = "1"
    return response


def whole_seconds(seconds: float) -> str:
    """A ``Retry-After``: rounded up, since zero would be honoured as "again at once"."""
    return str(max(1, ceil(seconds)))


def instant(seconds: float) -> str:
    """An instant of the farm's clock as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
