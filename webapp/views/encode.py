"""``POST /v1/encode/<model>``: texts in, vectors out, at once or as a task."""

from time import monotonic

from flask import Blueprint
from flask.typing import ResponseReturnValue

from tasks.names import Operation
from tasks.submitting import Call
from webapp import admission, hub_models, routing
from webapp.farm import Farm, farm
from webapp.wire import answers, bodies
from webapp.wire.headers import is_msgpack_body

bp = Blueprint("encode", __name__)


@bp.post("/v1/encode/<path:model>")
def encode(model: str) -> ResponseReturnValue:
    """Encode the items of one request, in order."""
    started_at = monotonic()
    here = farm()
    asynchronous = routing.is_async()
    call = _read_call(here, model, asynchronous=asynchronous)
    if asynchronous:
        return answers.accepted(here.client.submit(call, asynchronous=True))
    outcome = here.client.run(call)
    outcome.raise_error()
    total_ms = (monotonic() - started_at) * 1e3
    return answers.outcome_answer(outcome, call.operation, total_ms=total_ms, msgpack_by_default=is_msgpack_body())


def _read_call(here: Farm, model: str, *, asynchronous: bool) -> Call:
    """The model of this name and the request as its host reads it, checked."""
    settings = here.settings
    spec, epoch = hub_models.find(here, model)
    admission.check_supported(spec, settings.family_places)
    admission.check_operation(spec, Operation.ENCODE)
    body = bodies.read(bodies.EncodeBody, max_bytes=settings.max_body_bytes)
    spec = admission.choose_profile(spec, body.params)
    request = admission.encode_request(
        spec, body, max_items=settings.max_items, max_item_text_bytes=settings.max_item_text_bytes
    )
    route = routing.choose(here, spec, asynchronous=asynchronous)
    return Call(
        model=spec.id,
        spec=spec.digest,
        operation=Operation.ENCODE,
        request=request,
        items=len(request.items),
        tokens=admission.estimate_tokens(request),
        lane=route.lane,
        pool=route.pool,
        machine_profile=route.machine_profile,
        timeout_s=routing.timeout_s(here, spec, asynchronous=asynchronous),
        epoch=epoch,
    )
