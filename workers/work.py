"""What waits for a host, and the micro-batch that is made of it."""

from dataclasses import dataclass

from tasks.names import Lane


@dataclass(slots=True, eq=False)
class Work:
    """One request, or one slice of a large one. ``alone``: it was running when a worker died, so it shares no batch."""

    id: int
    key: str
    spec: str
    lane: Lane
    tenant: str
    items: int
    tokens: int
    arrived: float
    deadline: float
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Pick:
    """One micro-batch. ``loads``: its model is not resident on the host it was picked for."""

    works: tuple[Work, ...]
    key: str
    spec: str
    loads: bool
    tokens: int
    items: int
