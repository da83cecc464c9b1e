"""How long a request of each queue occupies a host when there is more to do than hosts can: what admission goes by.

A micro-batch occupies its host from when it was sent, or from the end of the one before it, to its results; that time
is parted among its works by their tokens and booked to the queues they came from. Only micro-batches that left others
waiting, or are full, say what a worker can do: small ones cost more a request. Loads are not counted.
Owned by the event loop thread; instants are monotonic seconds handed in by the caller.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Final, NamedTuple

MEMORY_S: Final = 5.0
"""Seconds of computing in which what was measured before loses most of its weight."""
FORGET_S: Final = 30.0
"""A queue that was not busy for so long has no known pace: what it would be asked next may be something else."""
LEAD_FORGET_S: Final = 5.0
LEAD_WEIGHT: Final = 0.3
"""Of the newest micro-batch in what one of its model takes."""


class Part(NamedTuple):
    """A work of a finished micro-batch: where it came from, its tokens, its share of a request, and its deadline."""

    queue: str
    tokens: int
    requests: float
    deadline: float


@dataclass(slots=True)
class _Queue:
    seconds: float = 0.0
    requests: float = 0.0
    measured_at: float = 0.0


@dataclass(slots=True)
class _Lead:
    seconds: float
    measured_at: float


@dataclass(slots=True)
class _Sent:
    spec: str
    at: float
    counts: bool


class Throughput:
    """What was measured of each queue, and the seconds computed in all. ``late_s``: for who could not wait for it.

    ``lead_s`` is how long micro-batches of a spec took of late from being sent to their results, while others waited.
    """

    def __init__(self) -> None:
        self.computed_s = 0.0
        self.late_s = 0.0
        self.lead_s: dict[str, float] = {}
        self._leads: dict[str, _Lead] = {}
        self._queues: dict[str, _Queue] = {}
        self._sent: dict[int, _Sent] = {}
        self._done_at: dict[int, float] = {}

    def sent(self, batch: int, spec: str, now: float, *, counts: bool) -> None:
        """A host was given a micro-batch; ``counts``: its model is there, and others wait or it is full."""
        self._sent[batch] = _Sent(spec, now, counts)

    def done(self, host: int, batch: int, now: float, parts: Iterable[Part]) -> bool:
        """Its results are there; whether a queue's pace is known by it that was not."""
        sent = self._sent.pop(batch, None)
        if sent is None:
            return False
        spent_s = now - max(sent.at, self._done_at.get(host, 0.0))
        self._done_at[host] = now
        self.computed_s += spent_s
        parts = list(parts)
        per_token = spent_s / max(1, sum(part.tokens for part in parts))
        self.late_s += sum(part.tokens for part in parts if part.deadline < now) * per_token
        known = len(self._queues)
        if sent.counts:
            self._learn_lead(sent, now)
            self._learn(parts, per_token, spent_s, now)
        return len(self._queues) > known

    def lost(self, host: int, batches: Iterable[int]) -> None:
        """A host died with these."""
        self._done_at.pop(host, None)
        for batch in batches:
            self._sent.pop(batch, None)

    def forget_running(self) -> None:
        """Nothing is expected of what was sent."""
        self._sent.clear()

    def tend(self, now: float) -> None:
        """Forget what is too old to say anything of the present; called now and then."""
        self._queues = {name: one for name, one in self._queues.items() if now - one.measured_at < FORGET_S}
        self._leads = {spec: one for spec, one in self._leads.items() if now - one.measured_at < LEAD_FORGET_S}
        self.lead_s = {spec: one.seconds for spec, one in self._leads.items()}

    def request_s(self) -> dict[str, float]:
        """Seconds of one host that a request takes, by queue, as far as it is known; three digits."""
        return {name: float(f"{one.seconds / one.requests:.3g}") for name, one in self._queues.items()}

    def _learn_lead(self, sent: _Sent, now: float) -> None:
        took_s, former = now - sent.at, self._leads.get(sent.spec)
        if former is not None:
            took_s = LEAD_WEIGHT * took_s + (1 - LEAD_WEIGHT) * former.seconds
        self._leads[sent.spec] = _Lead(took_s, now)
        self.lead_s[sent.spec] = took_s

    def _learn(self, parts: Iterable[Part], per_token: float, spent_s: float, now: float) -> None:
        keep, met = exp(-spent_s / MEMORY_S), set()
        for part in parts:
            queue = self._queues.setdefault(part.queue, _Queue())
            if part.queue not in met:
                met.add(part.queue)
                queue.seconds, queue.requests, queue.measured_at = queue.seconds * keep, queue.requests * keep, now
            queue.seconds += part.tokens * per_token
            queue.requests += part.requests
