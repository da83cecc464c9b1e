"""What the inference routes have in common: the model, the body, the queue, and the answer, at once or as a task."""

from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from flask import request as incoming
from flask.typing import ResponseReturnValue

from common.settings import WebSettings
from config_db.spec import ModelSpec
from tasks.messages import Outcome
from tasks.names import Operation
from tasks.once import Once, once
from tasks.submitting import Call
from webapp import admission, callers, hub_models, provisioning, routing
from webapp.adapter_admission import choose_adapter
from webapp.admission import Admitted
from webapp.auth.principals import principal
from webapp.farm import Farm, farm
from webapp.limits import bounds_of
from webapp.wire import answers, bodies, raw_bodies
from webapp.wire.headers import is_msgpack_body, read_idempotency_key, say_replayed

B = TypeVar("B")
Admit = Callable[[ModelSpec, B, WebSettings], Admitted]
"""Checks a body against its model; RequestError for what the model cannot serve."""


def serve(operation: Operation, model: str, kind: type[B], admit: Admit[B]) -> ResponseReturnValue:
    """Read the current request as ``kind``, let ``admit`` check it, run it and answer; or queue it, if so asked."""
    started_at = monotonic()
    here = farm()
    asynchronous = routing.is_async()
    use = _once(here)
    task_id = _find_once(here, use)
    if task_id is not None:
        if asynchronous:
            say_replayed()
            return answers.accepted(task_id)
        outcome = _await_once(here, task_id, model)
    else:
        spec, epoch = _find(here, operation, model)
        body = bodies.read(kind, max_bytes=here.settings.max_body_bytes)
        call = _call(here, operation, spec, epoch, body, admit, asynchronous=asynchronous)
        if asynchronous:
            wait = None if provisioning.has_worker(here, call) else provisioning.ask_for_worker(here, call)
            retry_after_s = None if wait is None else wait.retry_after_s
            return answers.accepted(_submit(here, call, use), retry_after_s=retry_after_s)
        outcome = _outcome(here, call, use)
    total_ms = (monotonic() - started_at) * 1e3
    return answers.outcome_answer(outcome, operation, total_ms=total_ms, msgpack_by_default=is_msgpack_body())


def run(operation: Operation, model: str, body: B, admit: Admit[B]) -> Outcome:
    """Run what a route of another protocol has read as ``body``, and wait for its outcome, which has succeeded."""
    here = farm()
    use = _once(here)
    task_id = _find_once(here, use)
    if task_id is not None:
        return _await_once(here, task_id, model)
    spec, epoch = _find(here, operation, model)
    return _outcome(here, _call(here, operation, spec, epoch, body, admit, asynchronous=False), use)


def _outcome(here: Farm, call: Call, use: Once | None) -> Outcome:
    """The outcome of a request, computed now or meanwhile under its idempotency key; raises the error it carries."""
    if not provisioning.has_worker(here, call):
        raise provisioning.refusal(call, provisioning.ask_for_worker(here, call))
    if use is None:
        outcome = here.client.run(call, has_left=callers.watcher())
    else:  # whoever sends a key may come back for the outcome: its request goes on without it
        outcome, is_replayed = here.client.run_once(call, use)
        if is_replayed:
            say_replayed()
    outcome.raise_error()
    return outcome


def _submit(here: Farm, call: Call, use: Once | None) -> str:
    """Publish an asynchronous request, unless that was done meanwhile under its idempotency key; the task's id."""
    if use is None:
        return here.client.submit(call, asynchronous=True)
    submitted = here.client.submit_once(call, use)
    if submitted.is_replayed:
        say_replayed()
    return submitted.task_id


def _once(here: Farm) -> Once | None:
    """The use that the current request makes of an idempotency key: the same route and body are the same request."""
    key = read_idempotency_key()
    if key is None:
        return None
    digest = raw_bodies.body_digest(here.settings.max_body_bytes)
    return once(principal().tenant, key, incoming.path.encode() + b"\n" + digest)


def _find_once(here: Farm, use: Once | None) -> str | None:
    """The task that stands under the request's idempotency key, if it has one, whatever became of its model since."""
    return None if use is None else here.client.find_once(use, tenant=principal().tenant)


def _await_once(here: Farm, task_id: str, model: str) -> Outcome:
    """The outcome of an earlier request, waited for as long as one for this model would be; raises its error."""
    timeout_s = routing.timeout_s(here, here.served.find(model), asynchronous=False)
    outcome = here.client.await_once(task_id, tenant=principal().tenant, timeout_s=timeout_s)
    say_replayed()
    outcome.raise_error()
    return outcome


def _find(here: Farm, operation: Operation, model: str) -> tuple[ModelSpec, int]:
    """The model of this name, which the caller may use for this, and the epoch it is of."""
    spec, epoch = hub_models.find(here, model)
    admission.check_access(spec, principal().tenant)
    admission.check_supported(spec)
    admission.check_operation(spec, operation)
    return spec, epoch


def _call(
    here: Farm, operation: Operation, spec: ModelSpec, epoch: int, body: B, admit: Admit[B], *, asynchronous: bool
) -> Call:
    """The request as its host reads it, checked, and how it travels there."""
    spec, request, tokens, images = admit(spec, body, here.settings)
    adapter, request.options = choose_adapter(here.served, spec, operation, request.options)
    route = routing.choose(here, spec, asynchronous=asynchronous)
    tenant = principal().tenant
    return Call(
        model=spec.id,
        spec=spec.digest,
        operation=operation,
        request=request,
        items=len(request.items),
        tokens=tokens,
        images=images,
        adapter=adapter,
        lane=route.lane,
        pool=route.pool,
        machine_profile=route.machine_profile,
        timeout_s=routing.timeout_s(here, spec, asynchronous=asynchronous),
        epoch=epoch,
        tenant=tenant,
        bounds=bounds_of(here, spec, tenant),
        query_id=getattr(request.query, "id", None),
    )
