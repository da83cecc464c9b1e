"""Messages of plain Celery producers: ``farm.encode(model, request)``, never admitted, without a ticket of ours."""

import msgspec

from common.errors import MessageError
from config_db.adapters import name_adapter
from config_db.snapshot import Snapshot
from tasks import messages, scores
from tasks.batching import batch_key
from tasks.messages import Ticket
from tasks.names import Operation
from workers.request import FarmRequest


def adopt(request: FarmRequest, snapshot: Snapshot, expires: float, now: float) -> tuple[Ticket, bytes]:
    """The ticket and body such a message would have had, had it come through the door. Instants: the farm's clock.

    Raises:
        MessageError: its arguments are not a model's name and a request, or the model does not do this.
        ModelNotFoundError: no such model is served.
    """
    model, wanted = read_foreign(request)
    spec = snapshot.model(model)
    if not wanted.items:
        raise MessageError("a request has at least one item", param="items")
    if request.operation not in spec.operations:
        raise MessageError(f"{model} does not do {request.operation}", param="model")
    if request.operation in (Operation.SCORE, Operation.EXTRACT):
        wanted.items = scores.named(wanted.items)
    adapter, wanted.options = name_adapter(spec, snapshot.settings, wanted.options, param="options")
    body = messages.encode_body(spec.id, wanted)
    ticket = msgspec.structs.replace(
        stub_ticket(request, expires, now),
        model=spec.id,
        spec=spec.digest,
        key=batch_key(spec.id, spec.digest, request.operation, adapter, wanted.options),
        adapter=adapter,
        items=len(wanted.items),
        tokens=max(1, len(body) // 4),
        query_id=_query_id(wanted),
        images=sum(isinstance(item, dict) and bool(item.get("images")) for item in wanted.items),
    )
    return ticket, body


def _query_id(wanted: messages.Request) -> str | None:
    own = wanted.query.get("id") if isinstance(wanted.query, dict) else None
    return own if isinstance(own, str) else None


def stub_ticket(request: FarmRequest, expires: float, now: float) -> Ticket:
    """What is known of a message that cannot be read further: enough to answer it."""
    return Ticket(
        model="",
        spec="",
        operation=request.operation,
        key="",
        items=1,
        tokens=1,
        deadline=expires,
        published=now,
        asynchronous=True,
        admitted=False,
    )


def read_foreign(request: FarmRequest) -> tuple[str, messages.Request]:
    """Model and request of a plain Celery producer's message: ``farm.encode(model, request)``, positional or by name.

    Raises:
        MessageError: the arguments are not a model's name and a request.
    """
    try:
        payload = request.message.decode()
        args, kwargs, _ = payload
        values = dict(zip(("model", "request"), args, strict=False)) | dict(kwargs)
        return msgspec.convert((values["model"], values["request"]), tuple[str, messages.Request], strict=True)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise MessageError(f"{request.type} takes a model's name and a request with items: {error}") from error
