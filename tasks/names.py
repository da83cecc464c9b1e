"""Names of tasks, queues, lanes and Redis keys. Nothing else spells them."""

from enum import StrEnum
from functools import cache


class Operation(StrEnum):
    """What is asked of a model."""

    ENCODE = "encode"
    SCORE = "score"
    EXTRACT = "extract"


class Lane(StrEnum):
    """Urgency classes, most urgent first. Each is a queue of its own."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"
    EXPERIMENT = "experiment"


LANES: tuple[Lane, ...] = tuple(Lane)

TASK_NAMES: dict[Operation, str] = {operation: f"farm.{operation}" for operation in Operation}
"""The Celery task of each operation; ``workers.app`` registers a body under every one of them."""

QUEUE_PREFIX = "farm."
OPEN = "farm:open"
"""Sorted set of open tasks: ids of admitted tasks without an outcome.

The score is an instant on the farm clock, in seconds: the deadline and 60 s in which those who hold the task, or wait
for it, are to settle it. Once it lies a minute back, anybody may close the task (``close_overdue.lua``). A synchronous
task has no record to say that it has started: from then on its score lies half a second later (``start.lua``), and
whoever cancels only what has not started compares it.
"""
OPEN_BY_MODEL, OPEN_BY_TENANT, OPEN_BY_QUEUE = "farm:open:model:", "farm:open:tenant:", "farm:open:queue:"
"""Sorted sets of the same ids with the same scores, by what admission counts: see ``slots``.

What is overdue counts no more, on Redis' own clock, so a process that dies leaks no slot.
"""
TENANT_CLOCKS = "farm:clock:"
"""Prefix of ``token_clock``."""
CANCELLED = "farm:cancelled"
"""Sorted set of settled task ids whose message may still be queued, scored by when to forget them (farm clock)."""
LOST = "farm:lost"
"""Hash from message digest to the number of incarnations lost while that message was running."""
INCARNATIONS = "farm:incarnations"
"""Hash from incarnation to a JSON description of its process."""
WEB_PROCESSES = "farm:web"
"""Hash from web process to a JSON description of it and of when it told so; it counts for ten seconds."""
DEMANDS = "farm:demands"
"""Sorted set of the places where work is asked for and no worker lives, scored by when it was last (farm clock)."""
START_TIMES = "farm:start-times"
"""Hash from place to the seconds that the last start of a worker there took."""
DEAD_LETTERS = "farm:dead"
"""List of messages given up: JSON lines with the raw message, the queue, the reason and the instant."""
POOL_QUEUES = "farm:pool-queues"
"""Sorted set of ``<pool>.<machine profile>`` of pools, scored by when somebody last knew them to be there."""
SHARED_POOL = "default"
"""The pool whose workers others may reserve, and where what waits for a pool goes when that is no more."""
SELF_TEST_QUEUE = "farm.self-test.{incarnation}"


def queue_name(pool: str, machine_profile: str, lane: Lane) -> str:
    """The queue of a pool's machine profile and lane."""
    return f"{QUEUE_PREFIX}{pool}.{machine_profile}.{lane}"


def pool_queue(pool: str, machine_profile: str) -> str:
    """What the queues of a pool's machine profile have in common, as ``POOL_QUEUES`` names them."""
    return f"{pool}.{machine_profile}"


@cache
def place_of(queue: str) -> str | None:
    """The place of a queue; None for one that is named otherwise."""
    inner, dot, lane = queue.removeprefix(QUEUE_PREFIX).rpartition(".")
    return inner if dot and "." in inner and lane in LANES and queue.startswith(QUEUE_PREFIX) else None


def demand(place: str) -> str:
    """Hash that says what was asked of a place without a worker: ``tasks.demand``."""
    return f"farm:demand:{place}"


@cache
def lane_of(queue: str) -> Lane:
    """The lane a queue name ends in; a queue without one is served as standard."""
    tail = queue.rpartition(".")[2]
    return Lane(tail) if tail in LANES else Lane.STANDARD


def bell(queue: str) -> str:
    """List that holds at most one token while the queue may be non-empty."""
    return f"farm:bell:{queue}"


def beat(incarnation: str) -> str:
    """Heartbeat key of one worker process incarnation."""
    return f"farm:beat:{incarnation}"


def closing(incarnation: str) -> str:
    """Set while an incarnation shuts down: its pops return nothing."""
    return f"farm:closing:{incarnation}"


def unacked(incarnation: str) -> str:
    r"""Hash from tag to ``queue\nraw message`` of what an incarnation holds."""
    return f"farm:unacked:{incarnation}"


def started(incarnation: str) -> str:
    """Hash of the tags an incarnation has started to run."""
    return f"farm:started:{incarnation}"


def slots(model: str, tenant: str, queue: str) -> tuple[str, str, str]:
    """The sets besides ``OPEN`` in which an open task stands: its model's, its tenant's in this lane, its queue's.

    A profile counts as its model.
    """
    base = base_model(model)
    return OPEN_BY_MODEL + base, f"{OPEN_BY_TENANT}{tenant}:{lane_of(queue)}", OPEN_BY_QUEUE + queue


def base_model(model: str) -> str:
    """The model that a name is counted under, which may be that of a profile."""
    return model.partition(":")[0]


def token_clock(tenant: str) -> str:
    """The instant (farm clock, in seconds) at which the tenant's tokens admitted so far are paid for by its rate."""
    return TENANT_CLOCKS + tenant


def task_record(task_id: str) -> str:
    """Hash that says an asynchronous task exists: state, model, operation, and the instants submitted and deadline."""
    return f"farm:task:{task_id}"


def body_key(task_id: str) -> str:
    """Where a body over 512 KiB travels."""
    return f"farm:body:{task_id}"


def result_key(task_id: str) -> str:
    """Where a result over 4 MiB travels."""
    return f"farm:result:{task_id}"


def celery_meta(task_id: str) -> str:
    """Celery's result backend key; AsyncResult and Flower read it."""
    return f"celery-task-meta-{task_id}"


def reply_list(process: str) -> str:
    """The list on which one web process receives its replies."""
    return f"farm:replies:{process}"


def settled_keys(task_id: str) -> list[str]:
    """What ``settle.lua`` touches to close one task, in its order."""
    return [OPEN, CANCELLED, task_record(task_id), celery_meta(task_id), body_key(task_id)]


def once_key(tenant: str, digest: str) -> str:
    """What stands under an idempotency key of a tenant: the fingerprint of the request and the task's id."""
    return f"farm:once:{tenant}:{digest}"


def usage_key(day: str) -> str:
    """Hash of booked usage for one UTC day, ``YYYY-MM-DD``: ``tenant|model|unit`` to an integer."""
    return f"farm:usage:{day}"
