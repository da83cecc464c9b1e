"""What waits in the scheduler: lines of one key, lane and tenant, the groups that share a micro-batch, their models."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from tasks.names import Lane
from workers.work import Work

_arrived = attrgetter("arrived")


@dataclass(slots=True, eq=False)
class ModelLoad:
    """What is known of a spec. ``running`` and ``loading`` count picks not finished, the latter those that load it."""

    load_s: float
    limit: int | None = None
    running: int = 0
    loading: int = 0

    @property
    def has_slot(self) -> bool:
        return self.limit is None or self.running < self.limit


@dataclass(slots=True, eq=False)
class Line:
    """What waits under one key, lane and tenant, in order of arrival.

    The first of ``queue`` always waits and ``arrived`` is its; further ones may have been removed meanwhile.
    """

    group: "Group"
    spec: str
    model: ModelLoad
    lane: Lane
    tenant: str
    queue: deque[Work]
    arrived: float


@dataclass(slots=True, eq=False)
class Group:
    """The lines that share a micro-batch. ``waiting`` counts their works, ``tokens`` those of the works."""

    name: str
    lines: dict[tuple[Lane, str], Line] = field(default_factory=dict)
    waiting: int = 0
    tokens: int = 0


def next_line(candidates: Iterable[list[Line]]) -> Line | None:
    """Of the first tenant that has any lines, the one that waited longest."""
    return next((min(lines, key=_arrived) for lines in candidates if lines), None)
