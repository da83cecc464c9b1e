"""When a host that still computes is given its next micro-batch.

Before it is done, so that it need not wait for one, and otherwise late: what comes meanwhile joins the batch, and a
pass over many costs less each than one over few. What a batch is taken to last is the slowest that was seen of late, so
the wait is bounded, too. Owned by the event loop thread; instants are monotonic seconds handed in.
"""

from dataclasses import dataclass, field
from typing import Final

from workers.scheduler import Scheduler
from workers.work import Pick

SHARE: Final = 0.5
"""The next batch is formed when this share has passed of what the one before it is taken to last, or ``gather_s``."""


@dataclass(slots=True)
class _Host:
    """What one host holds, in order, and since when it computes the first of it."""

    picks: dict[int, Pick] = field(default_factory=dict)
    since: float = 0.0


class Ahead:
    """Sees what each host is given and done with.

    Args:
        scheduler: knows what batches last, and who else asks.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._hosts: dict[int, _Host] = {}

    def sent(self, host: int, batch: int, pick: Pick, now: float) -> None:
        """A host was given a micro-batch."""
        one = self._hosts.setdefault(host, _Host())
        if not one.picks:
            one.since = now
        one.picks[batch] = pick

    def done(self, host: int, batch: int, now: float) -> None:
        """It has computed one."""
        one = self._hosts.get(host)
        if one is not None and batch in one.picks:
            if batch == next(iter(one.picks)):  # another is done first where the first waits for its model
                one.since = now
            del one.picks[batch]

    def lost(self, host: int) -> None:
        """It is gone."""
        self._hosts.pop(host, None)

    def forget(self) -> None:
        """Nothing is expected of what was sent."""
        self._hosts.clear()

    def wait_s(self, host: int, now: float) -> float | None:
        """In how many seconds the host should be given one more; None: not before it is done with what it has."""
        one = self._hosts.get(host)
        if one is None or not one.picks:
            return 0.0
        if self._scheduler.is_enough(now, one.picks.values()):
            return None
        first = next(iter(one.picks.values()))
        if first.loads:
            return 0.0
        lasts_s = self._scheduler.pace.seconds(first.key, first.tokens) or 0.0
        return max(0.0, one.since + min(SHARE * lasts_s, self._scheduler.policy.gather_s) - now)
