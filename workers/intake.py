"""What a worker holds: every message it has taken and not yet settled.

Bounded in messages and per lane exactly, in items and tokens to within one pop, so that a burst stays in Redis for
others. Parked messages, which wait for their ETA, take no room: as in Celery, further ones are taken beside them, up to
``PARKED_FREE``. Survives broker reconnects. Owned by the event loop thread. Does not schedule (``scheduler``), run
(``dispatch``) or answer (``outcomes``).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tasks.messages import Ticket
from tasks.names import Lane, lane_of

if TYPE_CHECKING:
    from workers.request import FarmRequest

Tag = int | str
"""Names a held message: our transport's counter, or kombu's own delivery tag on the fallback."""

LANE_SHARES: Final = {Lane.INTERACTIVE: 1.0, Lane.STANDARD: 0.75, Lane.BATCH: 0.5, Lane.EXPERIMENT: 0.25}
"""Share of the intake a lane may fill: a flood in one leaves room for the more urgent ones."""


PARKED_FREE: Final = 10_000
"""This many parked messages take no room; further ones count like all others, which bounds the worker's memory."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one worker's intake."""

    messages: int
    items: int
    tokens: int


@dataclass(slots=True, eq=False)
class Held:
    """One request in the intake, from the pop to its acknowledgement.

    ``arrived``, ``deadline`` and ``parked_until`` are monotonic; the last is set while it waits for its ETA.
    ``slices_left`` counts the parts of it that have no result yet. ``crashes`` counts hosts that died while running it
    alone. ``served`` is the digest of the spec it runs on.
    """

    tag: Tag
    incarnation: str
    request: "FarmRequest"
    ticket: Ticket
    body: bytes
    queue: str
    lost: int
    lost_digest: str
    arrived: float
    deadline: float
    parked_until: float | None = None
    works: list[int] = field(default_factory=list)
    results: list[bytes | None] = field(default_factory=list)
    slices_left: int = 0
    served: str = ""
    crashes: int = 0
    started_at: float | None = None
    is_settling: bool = False
    tokens_used: int = 0
    timing: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The task's id."""
        return self.request.id

    @property
    def lane(self) -> Lane:
        """The lane of the queue it came from."""
        return lane_of(self.queue)


class Intake:
    """The held messages by tag, with their bounds."""

    def __init__(self, limits: IntakeLimits) -> None:
        self._limits = limits
        self._held: dict[Tag, Held] = {}
        self._parked: dict[Tag, Held] = {}
        self._per_lane: Counter[Lane] = Counter()
        self._lane_limits = {lane: max(1, int(limits.messages * share)) for lane, share in LANE_SHARES.items()}
        self._items = 0
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(tuple(self._held.values()))

    def __contains__(self, tag: Tag) -> bool:
        return tag in self._held

    def room(self, queue: str) -> int:
        """How many messages of this queue may be taken now."""
        lane = lane_of(queue)
        return max(0, self._lane_limits[lane] - self._per_lane[lane])

    def total_room(self) -> int:
        """How many messages may be taken now over all queues; none while items or tokens are over their bound."""
        if self._items >= self._limits.items or self._tokens >= self._limits.tokens:
            return 0
        parked_free = min(len(self._parked), PARKED_FREE)
        return max(0, self._limits.messages - len(self._held) + parked_free)

    def get(self, tag: Tag) -> Held | None:
        """The held message of this tag."""
        return self._held.get(tag)

    def add(self, held: Held) -> None:
        """Take a message in, parked if it waits for its ETA."""
        self._held[held.tag] = held
        if held.parked_until is None:
            self._count(held, 1)
        else:
            self._parked[held.tag] = held

    def parked(self) -> list[Held]:
        """The messages that wait for their ETA."""
        return list(self._parked.values())

    def unpark(self, held: Held) -> None:
        """The ETA of a message has come: from now on it counts like all others."""
        if self._parked.pop(held.tag, None) is not None:
            held.parked_until = None
            self._count(held, 1)

    def remove(self, held: Held) -> bool:
        """Forget a settled message; false if it was not held any more."""
        if self._held.get(held.tag) is not held:
            return False
        del self._held[held.tag]
        if self._parked.pop(held.tag, None) is None:
            self._count(held, -1)
        return True

    def clear(self) -> list[Held]:
        """Forget everything: the incarnation is over. Returns what was held."""
        gone = list(self._held.values())
        self._held.clear()
        self._parked.clear()
        self._per_lane.clear()
        self._items = self._tokens = 0
        return gone

    def _count(self, held: Held, change: int) -> None:
        self._per_lane[held.lane] += change
        self._items += change * held.ticket.items
        self._tokens += change * held.ticket.tokens

    def missing(self, tags: Iterable[int]) -> list[int]:
        """Those of ``tags`` that are not held."""
        return [tag for tag in tags if tag not in self._held]
