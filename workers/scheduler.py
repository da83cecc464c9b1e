"""Which micro-batch runs next on a free host. Pure: no I/O, no torch, no clock of its own.

Owns what waits. A batch is formed at the last moment, when a host is free, in three steps: the HEAD is the request
that must be served next (lane, then tenant, then arrival; a resident model's before an absent one's); the batch is
filled with everything that shares the head's key; each tenant is charged its tokens.

One thread owns it. Instants are monotonic seconds handed in by the caller.
"""

import heapq
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tasks.names import LANES, Lane

_LOWER: Final = LANES[1:]
_TENANTS_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one micro-batch. A single request beyond them runs as a batch of its own."""

    max_items: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator may want to weigh differently.

    Attributes:
        patience: a request for an absent model is overdue after this many of the model's load times.
        load_share: the share of time that loading may take while resident work waits.
        foreground_load_s: a model that loads longer is loaded in the background while resident work waits.
        unmeasured_load_s: what a first load is taken to last.
        lower_every: of this many picks one starts at a lower lane, so that every lane moves.
        tenant_weights: shares of tenants that compete in a lane; 1 unless named.
    """

    patience: float = 2.0
    load_share: float = 0.25
    foreground_load_s: float = 1.0
    unmeasured_load_s: float = 0.5
    lower_every: int = 8
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


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


@dataclass(slots=True, eq=False)
class _Group:
    """What waits under one key: queues by lane and tenant, in order of arrival. ``waiting`` counts live works."""

    name: str
    spec: str
    queues: dict[Lane, dict[str, deque[Work]]] = field(default_factory=dict)
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Head:
    """A candidate to be served next; the smallest ``rank`` wins."""

    rank: tuple[float, float]
    group: _Group
    work: Work


class Scheduler:
    """Holds waiting works and forms the next micro-batch."""

    def __init__(self, limits: BatchLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._works: dict[int, tuple[Work, _Group | None]] = {}
        self._groups: dict[str, _Group] = {}
        self._by_lane: dict[Lane, dict[str, _Group]] = {lane: {} for lane in LANES}
        self._together: deque[tuple[Work, ...]] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._tenant_waiting: Counter[str] = Counter()
        self._served: dict[str, float] = {}
        self._virtual = 0.0
        self._load_s: dict[str, float] = {}
        self._no_load_before = float("-inf")
        self._concurrency: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._picks = 0
        self._lower_turn = 0

    def __len__(self) -> int:
        return len(self._works)

    @property
    def waiting_by_lane(self) -> dict[Lane, int]:
        """Works that wait, by lane; a full count, for those who ask now and then."""
        counts = Counter(work.lane for work, _ in self._works.values())
        return {lane: counts[lane] for lane in LANES}

    # -- what waits ---------------------------------------------------------------------------------------------

    def add(self, work: Work) -> None:
        """Let a work wait for its turn."""
        name = f"{work.key}#{work.id}" if work.alone else work.key
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name, work.spec)
        tenants = group.queues.get(work.lane)
        if tenants is None:
            tenants = group.queues[work.lane] = {}
            self._by_lane[work.lane][name] = group
        if work.tenant not in tenants:
            tenants[work.tenant] = deque()
        tenants[work.tenant].append(work)
        group.waiting += 1
        self._keep(work, group)

    def add_together(self, works: Sequence[Work]) -> None:
        """Run exactly these as one batch before all else: a part of a batch whose host died."""
        if works:
            self._together.append(tuple(works))
        for work in works:
            self._keep(work, None)

    def remove(self, work_id: int) -> Work | None:
        """Forget a work that needs no service any more; None if it does not wait."""
        work, group = self._works.pop(work_id, (None, None))
        if work is None:
            return None
        self._tenant_waiting[work.tenant] -= 1
        if group is not None:
            group.waiting -= 1
            if group.waiting == 0:
                self._drop(group)
        return work

    def take_expired(self, now: float) -> list[Work]:
        """Remove and return the works whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, work_id = heapq.heappop(self._deadlines)
            work = self.remove(work_id)
            if work is not None:
                expired.append(work)
        return expired

    def _keep(self, work: Work, group: _Group | None) -> None:
        self._works[work.id] = (work, group)
        heapq.heappush(self._deadlines, (work.deadline, work.id))
        if self._tenant_waiting[work.tenant] == 0:  # who was away has saved up nothing
            self._served[work.tenant] = max(self._served.get(work.tenant, 0.0), self._virtual)
        self._tenant_waiting[work.tenant] += 1

    def _drop(self, group: _Group) -> None:
        self._groups.pop(group.name, None)
        for lane in group.queues:
            self._by_lane[lane].pop(group.name, None)

    # -- what the hosts tell ------------------------------------------------------------------------------------

    def note_load(self, now: float, spec: str, seconds: float) -> None:
        """A load in the foreground took this long: the next one waits until loading has had no more than its share."""
        self._load_s[spec] = seconds
        share = self._policy.load_share
        self._no_load_before = now + seconds * (1 - share) / share

    def set_concurrency(self, spec: str, limit: int | None) -> None:
        """How many micro-batches of a model may run at once; None: any number."""
        if limit is None:
            self._concurrency.pop(spec, None)
        else:
            self._concurrency[spec] = limit

    def finished(self, pick: Pick) -> None:
        """A picked batch runs no more."""
        self._running[pick.spec] -= 1
        if self._running[pick.spec] <= 0:
            del self._running[pick.spec]

    # -- picking ------------------------------------------------------------------------------------------------

    def pick(
        self,
        now: float,
        *,
        resident: Container[str],
        loading: Container[str] = (),
        elsewhere: Container[str] = (),
        hosts: int = 1,
    ) -> Pick | None:
        """Form the next micro-batch for one free host; None if nothing should run there now.

        Args:
            now: the present instant.
            resident: specs resident on this host.
            loading: specs it is loading in the background.
            elsewhere: specs resident on other hosts, which will soon be free; loaded here only when overdue.
            hosts: hosts that are free now: the batch takes its share of what waits, so that they run side by side.
        """
        again = self._pick_together(resident)
        if again is not None:
            return again
        self._picks += 1
        absent: _Head | None = None
        for lane in self._lane_order():
            here, overdue, waiting = self._heads(lane, now, resident, loading, elsewhere)
            head = overdue if overdue is not None and self._may_load(overdue.work.spec, now) else here
            if head is not None:
                return self._fill(head, now, resident, hosts)
            absent = absent or waiting
        return None if absent is None else self._fill(absent, now, resident, hosts)

    def next_absent(self, now: float, *, resident: Container[str]) -> str | None:
        """The spec that will be wanted next and is not resident; a hint to load it in the background."""
        for lane in LANES:
            _, overdue, absent = self._heads(lane, now, resident, (), ())
            head = overdue or absent
            if head is not None:
                return head.work.spec
        return None

    def _pick_together(self, resident: Container[str]) -> Pick | None:
        for _ in range(len(self._together)):
            works = tuple(work for work in self._together.popleft() if work.id in self._works)
            if works and self._has_slot(works[0].spec):
                return self._take(works, works[0].key, resident)
            if works:
                self._together.append(works)
        return None

    def _lane_order(self) -> Iterator[Lane]:
        """Lanes from the most urgent; every eighth time one of the lower ones, in turn, comes first."""
        if self._picks % self._policy.lower_every == 0:
            for _ in _LOWER:
                self._lower_turn = (self._lower_turn + 1) % len(_LOWER)
                lane = _LOWER[self._lower_turn]
                if self._by_lane[lane]:
                    yield lane
                    break
        yield from LANES

    def _heads(
        self, lane: Lane, now: float, resident: Container[str], loading: Container[str], elsewhere: Container[str]
    ) -> tuple[_Head | None, _Head | None, _Head | None]:
        """The best head of this lane whose model is resident; that is absent and overdue; that is merely absent."""
        best: list[_Head | None] = [None, None, None]
        for group in self._by_lane[lane].values():
            spec = group.spec
            if not self._has_slot(spec):
                continue
            is_here = spec in resident
            for tenant, queue in group.queues[lane].items():
                work = self._first(queue, now)
                if work is None:
                    continue
                head = _Head((self._served[tenant], work.arrived), group, work)
                if is_here:
                    _offer(best, 0, head)
                    continue
                if now - work.arrived >= self._policy.patience * self._load_time(spec) and spec not in loading:
                    _offer(best, 1, head)
                if spec not in elsewhere:
                    _offer(best, 2, head)
        return best[0], best[1], best[2]

    def _first(self, queue: deque[Work], now: float) -> Work | None:
        """The first live work of a queue; what was removed or has expired falls away."""
        while queue:
            work = queue[0]
            if work.id in self._works and work.deadline > now:
                return work
            queue.popleft()
        return None

    def _has_slot(self, spec: str) -> bool:
        limit = self._concurrency.get(spec)
        return limit is None or self._running[spec] < limit

    def _may_load(self, spec: str, now: float) -> bool:
        """Whether a load may hold up resident work now."""
        return now >= self._no_load_before and self._load_time(spec) <= self._policy.foreground_load_s

    def _load_time(self, spec: str) -> float:
        return self._load_s.get(spec, self._policy.unmeasured_load_s)

    def _fill(self, head: _Head, now: float, resident: Container[str], hosts: int) -> Pick:
        """The head and all that shares its key, up to the limits and to this host's share."""
        group, first = head.group, head.work
        most = min(self._limits.max_items, max(1, -(-group.waiting // hosts)) * max(1, first.items))
        self._virtual = max(self._virtual, self._served[first.tenant])
        works = [first]
        group.queues[first.lane][first.tenant].popleft()
        items, tokens = first.items, first.tokens
        for queue in self._queues_of(group, first):
            while (work := self._first(queue, now)) is not None:
                if items + work.items > most or tokens + work.tokens > self._limits.max_tokens:
                    break
                works.append(queue.popleft())
                items += work.items
                tokens += work.tokens
        return self._take(tuple(works), first.key, resident)

    def _queues_of(self, group: _Group, first: Work) -> Iterator[deque[Work]]:
        """The group's queues, the head's lane first, and in each lane the least served tenant first."""
        lanes = [first.lane, *(lane for lane in LANES if lane is not first.lane and lane in group.queues)]
        for lane in lanes:
            tenants = group.queues[lane]
            for tenant in sorted(tenants, key=lambda one: self._served.get(one, 0.0)) if len(tenants) > 1 else tenants:
                yield tenants[tenant]

    def _take(self, works: tuple[Work, ...], key: str, resident: Container[str]) -> Pick:
        spec, items, tokens = works[0].spec, 0, 0
        for work in works:
            items += work.items
            tokens += work.tokens
            self._served[work.tenant] += work.tokens / self._policy.tenant_weights.get(work.tenant, 1.0)
            self.remove(work.id)
        self._running[spec] += 1
        self._forget_idle_tenants()
        return Pick(works, key, spec, spec not in resident, tokens, items)

    def _forget_idle_tenants(self) -> None:
        """Keep no book on tenants that wait for nothing and owe nothing."""
        if len(self._served) <= _TENANTS_REMEMBERED:
            return
        for tenant in [one for one, served in self._served.items() if served <= self._virtual]:
            if self._tenant_waiting[tenant] == 0:
                del self._served[tenant], self._tenant_waiting[tenant]


def _offer(best: list[_Head | None], place: int, head: _Head) -> None:
    """Keep the better of two candidates."""
    present = best[place]
    if present is None or head.rank < present.rank:
        best[place] = head
