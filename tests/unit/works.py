"""Works and schedulers with literals, for the tests of the scheduler."""

import gc
import itertools
from typing import Any

from tasks.names import Lane
from workers.policy import BatchLimits, Policy
from workers.scheduler import Scheduler
from workers.work import Pick, Work

A, B = "spec-a", "spec-b"
HERE = frozenset({A})
_numbers = itertools.count(1)


def work(key: str = "a", *, spec: str = A, lane: Lane = Lane.INTERACTIVE, tenant: str = "t", **rest: Any) -> Work:
    fields = {"items": 1, "tokens": 10, "arrived": 0.0, "deadline": 1000.0, **rest}
    return Work(id=next(_numbers), key=key, spec=spec, lane=lane, tenant=tenant, **fields)


def scheduler(*works: Work, max_items: int = 64, max_tokens: int = 1000, **policy: Any) -> Scheduler:
    made = Scheduler(BatchLimits(max_items, max_tokens), Policy(**policy))
    for one in works:
        made.add(one)
    return made


def ids(pick: Pick | None) -> list[int]:
    assert pick is not None
    return [one.id for one in pick.works]


def held_objects(root: Any) -> int:
    """How many objects hang on one: entries of its containers and what its attributes name, each counted once."""
    seen: dict[int, Any] = {}
    found = [root]
    while found:
        one = found.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen[id(one)] = one
        found += gc.get_referents(one)
    return len(seen)
