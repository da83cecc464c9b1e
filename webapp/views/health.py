"""``/healthz``: this process answers. ``/readyz``: a request would succeed."""

from typing import Final, Literal, TypedDict

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import QueueUnavailableError
from tasks.live_workers import WorkerView
from tasks.names import Lane, queue_name
from webapp.farm import Farm, farm
from webapp.openapi.declared import Answered, declared
from webapp.openapi.headers import CODE, RETRY_AFTER
from webapp.wire import answers
from webapp.wire.results import NotReady

bp = Blueprint("health", __name__)


class Alive(TypedDict):
    """This process answers."""

    status: Literal["ok"]


class Ready(TypedDict):
    """A request would succeed; ``reasons`` say what is off if the farm is degraded."""

    status: Literal["ready", "degraded"]
    reasons: list[str]
    workers: int
    models: int
    epoch: int


NOT_READY: Final = Answered(NotReady, "A request would not succeed now.", headers=(RETRY_AFTER, CODE))


@bp.get("/healthz")
@declared(Alive)
def healthz() -> ResponseReturnValue:
    """Alive."""
    return answers.answer(Alive(status="ok"))


@bp.get("/readyz")
@declared(Ready, more={503: NOT_READY})
def readyz() -> ResponseReturnValue:
    """200 once Redis answers, a config snapshot is here and a worker of this farm lives, reserved by a pool or not.

    ``degraded``: requests succeed, but a promise is off, and ``reasons`` say which.
    """
    here = farm()
    try:
        workers = here.client.workers()
    except QueueUnavailableError as error:
        return answers.not_ready([error.message])
    ready = [worker for worker in workers if worker.is_ready and _serves_here(here, worker)]
    if not ready:
        seen = f"{len(workers)} alive, none ready" if workers else "none alive"
        return answers.not_ready([f"no worker serves {_own_queue(here)} ({seen})"])
    reasons = _degradations(here, ready)
    return answers.answer(
        Ready(
            status="degraded" if reasons else "ready",
            reasons=reasons,
            workers=len(ready),
            models=len(here.served.models),
            epoch=here.served.epoch,
        )
    )


def _own_queue(here: Farm) -> str:
    return queue_name(here.settings.pool, here.settings.machine_profile, Lane.INTERACTIVE)


def _serves_here(here: Farm, worker: WorkerView) -> bool:
    """Whether it is one of this farm's own workers, be it reserved by a pool now."""
    is_own = (worker.pool, worker.machine_profile) == (here.settings.pool, here.settings.machine_profile)
    return is_own or _own_queue(here) in worker.queues


def why_degraded(here: Farm) -> list[str]:
    """Which promises are off now for want of the config DB."""
    if here.snapshots.is_connected:
        return []
    return ["the config DB does not answer: serving goes on from the last snapshot"]


def _degradations(here: Farm, workers: list[WorkerView]) -> list[str]:
    reasons = why_degraded(here)
    if any(worker.transport == "redis" for worker in workers):
        reasons.append("a worker uses the plain redis transport: what it holds when it is killed comes back late")
    if not any(_own_queue(here) in worker.queues for worker in workers):
        reasons.append("pools have reserved every worker: requests that name no pool wait")
    return reasons
