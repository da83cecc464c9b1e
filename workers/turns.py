"""Whose turn it is: which lane a micro-batch starts at, and which tenant of it. What waits is for ``scheduler``."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from typing import Final

from tasks.names import LANES, Lane

AGEING: Final = (Lane.STANDARD, Lane.BATCH)
"""Lanes that get their turns however much the more urgent ones have to do."""
SPARE: Final = 1024
"""Entries of works and tenants that wait no more are cleared away once there are so many more than live ones."""


class Tenants:
    """Who has been served how much, in tokens over weight. Who was away has saved up nothing.

    ``weights`` are shares of tenants that compete in a lane; 1 unless named.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self._served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._present = 0.0

    def enter(self, tenant: str) -> None:
        """A work of this tenant begins to wait."""
        waiting = self._waiting.get(tenant, 0)
        self._waiting[tenant] = waiting + 1
        if waiting == 0:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._present)
            if len(self._served) > 2 * len(self._waiting) + SPARE:
                self._served = {one: self._served[one] for one in self._waiting}

    def leave(self, tenant: str) -> None:
        """A work of this tenant waits no more."""
        self._waiting[tenant] -= 1
        if self._waiting[tenant] == 0:
            del self._waiting[tenant]

    def lead(self, tenant: str) -> None:
        """The head is this tenant's: whoever comes now starts no further back than it stands."""
        self._present = max(self._present, self._served[tenant])

    def charge(self, tenant: str, tokens: int) -> None:
        """A work of this tenant, which still counts as waiting, is served."""
        self._served[tenant] += tokens / self.weights.get(tenant, 1.0)

    def served(self, tenant: str) -> float:
        """What a waiting tenant has had."""
        return self._served[tenant]

    def in_turn(self, tenants: Collection[str]) -> Iterable[str]:
        """Waiting tenants, the least served first."""
        return sorted(tenants, key=self._served.__getitem__) if len(tenants) > 1 else tenants


class Turns:
    """Which lane comes first: the most urgent, but every so often a lower one that has work, which keeps its turn."""

    def __init__(self, lower_every: int) -> None:
        self._lower_every = lower_every
        self._rotation = deque(AGEING)
        self._due: list[Lane] = []
        self._count = 0

    def order(self) -> Sequence[Lane]:
        """Lanes to look for a head in."""
        return (*self._due, *LANES)

    def taken(self, lane: Lane, waiting: Mapping[Lane, Sized]) -> None:
        """The head was of this lane."""
        self._count += 1
        if lane in self._due:
            self._due.remove(lane)
        if self._count % self._lower_every == self._lower_every - 1:  # the next one is a lower lane's
            first = next((one for one in LANES if waiting[one]), None)
            lower = next(
                (one for one in self._rotation if one is not first and waiting[one] and one not in self._due), None
            )
            if lower is not None:
                self._due.append(lower)
                self._rotation.remove(lower)
                self._rotation.append(lower)
