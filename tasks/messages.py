"""What travels through the queue: the request's headers and body, and its outcome.

A request is ONE Celery message of protocol 2. What intake and scheduler need travels in the headers, as scalars we
made; items travel in the body, which nobody decodes before the host. Changes here must suit the release still running:
add, deploy, and only then remove.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson

from common.errors import FarmError, MessageError, error_from_dict
from tasks import scores
from tasks.names import TASK_NAMES, Operation

HEADER: Final = "farm"
"""Name of the one header that carries our fields, as a JSON string: a caller's words never become header names."""
INLINE_BODY_BYTES: Final = 512 * 1024
"""A body over this goes under a key of its own."""
INLINE_OUTCOME_BYTES: Final = 4 * 2**20
"""An outcome over this goes under a key of its own."""

RESULT_FIELD: Final[Mapping[Operation, str]] = {
    Operation.ENCODE: "items",
    Operation.SCORE: "scores",
    Operation.EXTRACT: "items",
}
"""Under which name the list of results stands in the answer to each operation."""


_NOTHING: Final = msgspec.Raw()


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What intake and scheduler know of a request without decoding its body.

    ``key`` is the batching key: requests that share it may share a forward pass. ``deadline`` and ``published`` are
    instants on the farm clock, in seconds. ``tokens`` is an estimate. ``spec`` is the digest of the model's spec.
    ``admitted`` says that the task stands in ``farm:open`` and is settled through it. ``query_id`` is echoed.
    ``images`` counts items that are one. ``keep_s`` is how long the result is kept, zero as long as any.
    ``body_key`` and ``body_object`` say where a body stands that does not travel in the message: in Redis, or in the
    object store.
    """

    model: str
    spec: str
    operation: Operation
    key: str
    items: int
    tokens: int
    deadline: float
    published: float
    epoch: int = 0
    tenant: str = "default"
    asynchronous: bool = False
    admitted: bool = True
    adapter: str | None = None
    body_key: str | None = None
    trace: str | None = None
    query_id: str | None = None
    images: int = 0
    keep_s: int = 0
    body_object: str | None = None


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The body: one request as the host reads it. Items are maps, checked by the web tier."""

    items: list[Any]
    query: Any = None
    output_types: list[str] | None = None
    output_dtype: str = "float32"
    instruction: str | None = None
    labels: list[str] | None = None
    output_schema: dict[str, Any] | None = None
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class Outcome(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The one answer of a request: ``result`` (a list in msgpack, arrays as in ``tasks.codec``) or ``error``.

    Times are milliseconds: ``queue_ms tokenization_ms inference_ms postprocessing_ms``; usage counts measured units.
    ``ref`` names the key under which an outcome over 4 MiB stands instead, ``object`` the same in the object store.
    ``query_id``: of a scored query.
    """

    task_id: str
    model: str = ""
    spec: str = ""
    result: msgspec.Raw = _NOTHING
    error: dict[str, Any] | None = None
    timing: dict[str, float] = msgspec.field(default_factory=dict)
    usage: dict[str, int] = msgspec.field(default_factory=dict)
    ref: str | None = None
    query_id: str | None = None
    object: str | None = None

    @property
    def state(self) -> str:
        """``succeeded``, ``failed`` or ``cancelled``."""
        if self.error is None:
            return "succeeded"
        return "cancelled" if self.error.get("code") == "CANCELLED" else "failed"

    def raise_error(self) -> None:
        """Raise the error this outcome carries, if it carries one."""
        if self.error is not None:
            raise error_from_dict(self.error)


_encoder = msgspec.msgpack.Encoder()
_ticket_decoder = msgspec.json.Decoder(Ticket)
_request_decoder = msgspec.msgpack.Decoder(tuple[tuple[str, Request], dict[str, Any], Any])
_outcome_decoder = msgspec.msgpack.Decoder(Outcome)


def encode_body(model: str, request: Request) -> bytes:
    """The Celery body ``(args, kwargs, embed)`` of an inference task, in msgpack."""
    return _encoder.encode(((model, request), {}, _EMBED))


def decode_body(body: bytes | memoryview) -> tuple[str, Request]:
    """Model and request of a body; MessageError if it is not one of ours."""
    try:
        (model, request), _, _ = _request_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise MessageError(f"the message body is not an inference request: {error}") from error
    return model, request


def read_ticket(headers: Mapping[str, Any]) -> Ticket | None:
    """Our fields of a message; None for a plain Celery producer's message; MessageError for damaged ones."""
    text = headers.get(HEADER)
    if text is None:
        return None
    try:
        return _ticket_decoder.decode(text)
    except (msgspec.DecodeError, TypeError) as error:
        raise MessageError(f"the {HEADER!r} header is damaged: {error}") from error


def encode_message(
    task_id: str, ticket: Ticket, body: bytes, *, queue: str, reply_to: str | None, origin: str
) -> bytes:
    """The kombu envelope of one request, as any Celery worker on Redis reads it. A body that travels by key is b''."""
    operation = TASK_NAMES[ticket.operation]
    headers: dict[str, Any] = {
        "lang": "py",
        "task": operation,
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "(...)",
        "kwargsrepr": "{}",
        "origin": origin,
        "ignore_result": not ticket.asynchronous,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        HEADER: msgspec.json.encode(ticket).decode(),
    }
    return orjson.dumps(
        {
            "body": base64.b64encode(body or _EMPTY_BODY).decode(),
            "content-encoding": "binary",
            "content-type": "application/x-msgpack",
            "headers": headers,
            "properties": {
                "correlation_id": task_id,
                "reply_to": reply_to,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": task_id,
            },
        }
    )


def encode_outcome(outcome: Outcome) -> bytes:
    """What travels on a reply list."""
    return _encoder.encode(outcome)


def decode_outcome(raw: bytes) -> Outcome:
    """Read a reply; MessageError if it is none of ours. Its ``result`` stays undecoded and may outlive ``raw``."""
    try:
        return _outcome_decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise MessageError(f"the reply is damaged: {error}") from error


def encode_celery_meta(outcome: Outcome, operation: Operation, *, done_at: str) -> bytes:
    """The outcome as Celery's result backend keeps it (result_serializer msgpack), so that AsyncResult reads it.

    ``done_at`` is ISO 8601. Our own readers take the extra key ``farm``, the whole outcome. Of an outcome in the object
    store, ``object`` says where: Celery's readers get no more than that.
    """
    meta: dict[str, Any] = {"task_id": outcome.task_id, "traceback": None, "children": [], "date_done": done_at}
    if outcome.error is None:
        result = {
            **head_fields(outcome, operation),
            RESULT_FIELD[operation]: outcome.result,
            "timing": outcome.timing,
            "usage": outcome.usage,
        }
        if outcome.object is not None:
            result = {"model": outcome.model, "object": outcome.object}
        return _encoder.encode({**meta, "status": "SUCCESS", "result": result, "farm": {"spec": outcome.spec}})
    error = error_from_dict(outcome.error)
    cancelled = outcome.state == "cancelled"
    kind = ("TaskRevokedError", "celery.exceptions") if cancelled else (type(error).__name__, "common.errors")
    result = {"exc_type": kind[0], "exc_message": [error.message], "exc_module": kind[1]}
    return _encoder.encode(
        {
            **meta,
            "status": "REVOKED" if cancelled else "FAILURE",
            "result": result,
            "farm": {"spec": outcome.spec, "model": outcome.model, "error": outcome.error, "timing": outcome.timing},
        }
    )


def head_fields(outcome: Outcome, operation: Operation) -> dict[str, Any]:
    """What stands before the results in the answer to each operation."""
    if operation is Operation.SCORE:
        return {"model": outcome.model, "query_id": outcome.query_id}
    return {"model": outcome.model}


class _Farm(msgspec.Struct):
    spec: str = ""
    model: str = ""
    error: dict[str, Any] | None = None
    timing: dict[str, float] = msgspec.field(default_factory=dict)


class _CeleryResult(msgspec.Struct):
    model: str = ""
    query_id: str | None = None
    object: str | None = None
    items: msgspec.Raw = _NOTHING
    scores: msgspec.Raw = _NOTHING
    timing: dict[str, float] = msgspec.field(default_factory=dict)
    usage: dict[str, int] = msgspec.field(default_factory=dict)
    exc_type: str = ""
    exc_message: Any = None


class _CeleryMeta(msgspec.Struct):
    task_id: str
    status: str
    result: _CeleryResult | None = None
    farm: _Farm = msgspec.field(default_factory=_Farm)


_meta_decoder = msgspec.msgpack.Decoder(_CeleryMeta)


def decode_celery_meta(raw: bytes) -> Outcome:
    """The outcome that ``encode_celery_meta`` wrote; MessageError for anything else under that key."""
    try:
        meta = _meta_decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise MessageError(f"the stored result is damaged: {error}") from error
    if meta.status == "SUCCESS" and meta.result is not None:
        done = meta.result
        return Outcome(
            task_id=meta.task_id,
            model=done.model,
            spec=meta.farm.spec,
            result=done.items or done.scores,
            timing=done.timing,
            usage=done.usage,
            query_id=done.query_id,
            object=done.object,
        )
    fallback = FarmError(f"the task ended as {meta.status}").as_dict()
    return Outcome(
        task_id=meta.task_id,
        model=meta.farm.model,
        spec=meta.farm.spec,
        error=meta.farm.error or fallback,
        timing=meta.farm.timing,
    )


def failed(task_id: str, error: FarmError, *, model: str = "", spec: str = "") -> Outcome:
    """The outcome that carries ``error``."""
    return Outcome(task_id=task_id, model=model, spec=spec, error=error.as_dict())


def join_results(parts: Sequence[bytes], operation: Operation) -> msgspec.Raw:
    """One msgpack list of the lists of one request's slices: in order, or for scores by rank."""
    if len(parts) == 1:
        return msgspec.Raw(parts[0])
    if operation is Operation.SCORE:
        return msgspec.Raw(scores.merged(parts))
    items: list[msgspec.Raw] = []
    for part in parts:
        items.extend(_raw_list_decoder.decode(part))
    return msgspec.Raw(_encoder.encode(items))


_raw_list_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_EMPTY_BODY: Final = msgspec.msgpack.encode(((), {}, _EMBED))
