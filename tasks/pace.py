"""How long a request of each queue takes the whole farm, from what its workers tell: admission predicts waits by it.

A queue that no worker was busy with of late has no pace here, and no wait is predicted for it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tasks.live_workers import WorkerView
from tasks.names import LANES, Lane, lane_of

KEPT_SHARE: Final = 0.75
"""A request is admitted if what is predicted takes no more than this of its time; the rest is for what is not."""
ONE_OF: Final[Mapping[Lane, int]] = {Lane.STANDARD: 16, Lane.BATCH: 16}
"""What a lane gets of the farm at least, however much the more urgent ones have to do: one of so many micro-batches.

Of every eight one starts at a lower lane; these two take turns.
"""


@dataclass(frozen=True, slots=True)
class _Pace:
    """Of one queue. ``weight``: of the tenants that wait in it; ``fixed``: the end of the text, the same for all."""

    request_s: float
    weight: float
    fixed: str


class Paces:
    """What is known now; replaced whole by ``read``, so any thread may ask."""

    def __init__(self) -> None:
        self._known: Mapping[str, _Pace] = {}

    def read(self, workers: Sequence[WorkerView]) -> None:
        """Take over what the live workers tell."""
        request_s = _request_s(workers)
        weights: defaultdict[str, float] = defaultdict(float)
        for worker in workers:
            for lane, weight in worker.weights.items():
                weights[lane] = max(weights[lane], weight)
        self._known = {
            queue: _Pace(own_s, weights[lane_of(queue)], _fixed(queue, request_s)) for queue, own_s in request_s.items()
        }

    def request_s(self, queue: str) -> float | None:
        """Seconds a request takes the whole farm; None if that is not known."""
        pace = self._known.get(queue)
        return None if pace is None else pace.request_s

    def text(self, queue: str, *, weight: float, timeout_s: float) -> str:
        """As ``publish.lua`` reads it for a request of a tenant of this weight; empty if nothing is known."""
        pace = self._known.get(queue)
        if pace is None:
            return ""
        others = max(1.0, pace.weight / weight)
        return f"{timeout_s * KEPT_SHARE:.3f} {pace.request_s:.6f} {others:.3f} {pace.fixed}"


def _request_s(workers: Sequence[WorkerView]) -> dict[str, float]:
    """By queue. Hosts of workers that do not know their pace, as they have just come, count as the others'."""
    known: defaultdict[str, float] = defaultdict(float)
    hosts: defaultdict[str, int] = defaultdict(int)
    knowing: defaultdict[str, int] = defaultdict(int)
    for worker in workers:
        for queue in worker.queues:
            hosts[queue] += worker.hosts
            seconds = worker.request_s.get(queue)
            if seconds and worker.hosts:
                knowing[queue] += worker.hosts
                known[queue] += worker.hosts / seconds
    return {queue: knowing[queue] / (rate * hosts[queue]) for queue, rate in known.items()}


def _fixed(queue: str, request_s: Mapping[str, float]) -> str:
    """The least share of the queue's lane, and the seconds of each more urgent one's requests."""
    lane = lane_of(queue)
    stem = queue.removesuffix(lane)
    upper = (request_s.get(stem + one, request_s[queue]) for one in LANES[: LANES.index(lane)])
    return " ".join([str(ONE_OF.get(lane, 0)), *(f"{seconds:.6f}" for seconds in upper)])
