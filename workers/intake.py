"""What a worker holds: every message it has taken and not yet settled.

Bounded in messages and per lane exactly, in items and tokens to within one pop, so that a burst stays in Redis for
others. Survives broker reconnects. Owned by the event loop thread. Does not schedule (``scheduler``), run
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


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one worker's intake."""

    messages: int
    items: int
    tokens: int


@dataclass(slots=True, eq=False)
class Held:
    """One request in the intake, from the pop to its acknowledgement.

    ``arrived`` and ``deadline`` are monotonic. ``slices_left`` counts the parts of it that have no result yet.
    ``crashes`` counts hosts that died while running it alone.
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
    works: list[int] = field(default_factory=list)
    results: list[bytes | None] = field(default_factory=list)
    slices_left: int = 0
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
        return max(0, self._limits.messages - len(self._held))

    def get(self, tag: Tag) -> Held | None:
        """The held message of this tag."""
        return self._held.get(tag)

    def add(self, held: Held) -> None:
        """Take a message in."""
        self._held[held.tag] = held
        self._per_lane[held.lane] += 1
        self._items += held.ticket.items
        self._tokens += held.ticket.tokens

    def remove(self, held: Held) -> bool:
        """Forget a settled message; false if it was not held any more."""
        if self._held.get(held.tag) is not held:
            return False
        del self._held[held.tag]
        self._per_lane[held.lane] -= 1
        self._items -= held.ticket.items
        self._tokens -= held.ticket.tokens
        return True

    def clear(self) -> list[Held]:
        """Forget everything: the incarnation is over. Returns what was held."""
        gone = list(self._held.values())
        self._held.clear()
        self._per_lane.clear()
        self._items = self._tokens = 0
        return gone

    def missing(self, tags: Iterable[int]) -> list[int]:
        """Those of ``tags`` that are not held."""
        return [tag for tag in tags if tag not in self._held]
