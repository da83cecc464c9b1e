"""Whether a worker is there for a request, and what is done where none is: scale from zero.

What a worker can be, as its callers meet it:

- starting, before its heartbeat: nobody knows of it. As without any worker.
- starting, from its first heartbeat on: it takes messages, and runs them once a host is up. Requests are queued.
- alive: requests are queued.
- stopping: its heartbeat stands until it has gone. Requests are queued, and wait for a successor.
- silent: killed, frozen or cut off. Its heartbeat ends after 5 s, and still for ``FARMHAND_WORKER_GRACE_S`` requests
  are queued, since most workers are started again at once. A restart is thus a delay, and no refusal.
- gone for longer: the demand is recorded (``tasks.demand``). Synchronous callers are told when to come back;
  asynchronous requests are queued nevertheless, and whoever starts workers sees both.

A web process knows this of the workers that it has seen itself: one that has just started, and finds none, says so.
"""

from typing import Final

from common.errors import ProvisioningError
from tasks.demand import Wait
from tasks.names import queue_name
from tasks.submitting import Call
from webapp.farm import Farm

MOVE_S: Final = 3.0
"""A worker that lives already and joins the pool, as one does of a pool just made, is there after so long."""


def has_worker(here: Farm, call: Call) -> bool:
    """Whether a worker is there for the call, or was until just now.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    return here.fleet.is_served(queue_name(call.pool, call.machine_profile, call.lane))


def ask_for_worker(here: Farm, call: Call) -> Wait:
    """Record the demand of a call that has found no worker; when to look for one.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    can_move = any(worker.machine_profile == call.machine_profile for worker in here.fleet.workers())
    return here.client.record_demand(
        pool=call.pool,
        machine_profile=call.machine_profile,
        model=call.model,
        default_start_s=MOVE_S if can_move else here.settings.worker_start_s,
    )


def refusal(call: Call, wait: Wait) -> ProvisioningError:
    """What a caller who would wait is told."""
    return ProvisioningError(
        f"no worker of machine profile {call.machine_profile!r} runs in pool {call.pool!r}; one has been asked for",
        details={
            "machine_profile": call.machine_profile,
            "pool": call.pool,
            "estimated_wait_s": round(wait.expected_s, 1),
        },
        retry_after_s=wait.retry_after_s,
    )
