"""Which micro-batch runs next on a free host. Pure: no I/O, no torch, no clock of its own.

Owns what waits, and how often each model and tenant was served. A batch is formed at the last moment, when a host is
free: the HEAD is the request that must be served next (lane, then tenant, then arrival; a resident model's before an
absent one's, until that is overdue); the batch is filled with all that shares the head's key; each tenant is charged
its tokens. An experiment starts, and has a model loaded, only while nothing of another lane waits, and shares no batch
with other lanes. ``dispatch`` asks; one thread owns it; instants are monotonic seconds handed in by the caller.
"""

import heapq
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from tasks.names import LANES, Lane
from workers.lines import Group, Line, ModelLoad, next_line
from workers.pace import Pace
from workers.policy import BatchLimits, Policy
from workers.sharing import Sharing
from workers.turns import SPARE, Tenants, Turns
from workers.work import Pick, Work

_NO_LEADS: Mapping[str, float] = {}


class Scheduler:
    """Holds waiting works and forms the next micro-batch."""

    def __init__(self, limits: BatchLimits, policy: Policy) -> None:
        self._limits = limits
        self.policy = policy
        self.pace = Pace()
        self.gathers_s: float | None = None
        self._sharing = Sharing()
        self._works: dict[int, tuple[Work, Line | None]] = {}
        self._groups: dict[str, Group] = {}
        self._lanes: dict[Lane, dict[str, dict[str, Line]]] = {lane: {} for lane in LANES}
        self._together: deque[tuple[Work, ...]] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._expired: list[Work] = []
        self._tenants = Tenants(policy.tenant_weights)
        self._models: dict[str, ModelLoad] = {}
        self._loads_running = 0
        self._running: Counter[str] = Counter()
        self._no_load_before = float("-inf")
        self._pick_turns = Turns(policy.lower_every)
        self._hint_turns = Turns(policy.lower_every)

    def __len__(self) -> int:
        return len(self._works)

    @property
    def waiting_by_lane(self) -> dict[Lane, int]:
        """Works that wait, by lane; a full count, for those who ask now and then."""
        counts = Counter(work.lane for work, _ in self._works.values())
        return {lane: counts[lane] for lane in LANES}

    def weight_by_lane(self) -> dict[Lane, float]:
        """The weights of the tenants that wait, added up, by lane."""
        weights = self._tenants.weights
        return {
            lane: sum(weights.get(tenant, 1.0) for tenant in tenants)
            for lane, tenants in self._lanes.items()
            if tenants
        }

    def has_waiting(self, spec: str) -> bool:
        """Whether any work waits for this spec; looks through all, for those who ask now and then."""
        return any(work.spec == spec for work, _ in self._works.values())

    # -- what waits ---------------------------------------------------------------------------------------------

    def add(self, work: Work) -> None:
        """Let a work wait for its turn."""
        name = f"{work.key}#{work.id}" if work.alone else work.key
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = Group(name)
        line = group.lines.get((work.lane, work.tenant)) or self._open(group, work)
        line.queue.append(work)
        group.waiting += 1
        group.tokens += work.tokens
        self._keep(work, line)

    def add_together(self, works: Sequence[Work]) -> None:
        """Run exactly these as one batch before all else: a part of a batch whose host died."""
        if works:
            self._together.append(tuple(works))
        for work in works:
            self._keep(work, None)

    def remove(self, work_id: int) -> Work | None:
        """Forget a work that needs no service any more; None if it does not wait."""
        work, line = self._works.pop(work_id, (None, None))
        if work is None:
            return None
        self._tenants.leave(work.tenant)
        if line is not None:
            line.group.waiting -= 1
            line.group.tokens -= work.tokens
            if line.queue[0] is work:
                self._advance(line)
        return work

    def take_expired(self, now: float) -> list[Work]:
        """Remove and return the works whose deadline has passed; each is returned once."""
        self._expire(now)
        expired, self._expired = self._expired, []
        return expired

    def _open(self, group: Group, work: Work) -> Line:
        line = Line(group, work.spec, self._model(work.spec), work.lane, work.tenant, deque(), work.arrived)
        group.lines[work.lane, work.tenant] = line
        self._lanes[work.lane].setdefault(work.tenant, {})[group.name] = line
        return line

    def _keep(self, work: Work, line: Line | None) -> None:
        self._sharing.note(work.lane, work.tenant, work.arrived)
        self._works[work.id] = (work, line)
        self._tenants.enter(work.tenant)
        heapq.heappush(self._deadlines, (work.deadline, work.id))
        if len(self._deadlines) > 2 * len(self._works) + SPARE:  # most were served long before their deadline
            self._deadlines = [(waiting.deadline, work_id) for work_id, (waiting, _) in self._works.items()]
            heapq.heapify(self._deadlines)

    def _advance(self, line: Line) -> None:
        """The first of the line has left: bring the next one that waits to its place, or close the line."""
        queue = line.queue
        queue.popleft()
        while queue and queue[0].id not in self._works:
            queue.popleft()
        if queue:
            line.arrived = queue[0].arrived
        else:
            self._close(line)

    def _close(self, line: Line) -> None:
        group, tenants = line.group, self._lanes[line.lane]
        del group.lines[line.lane, line.tenant]
        if not group.lines:
            del self._groups[group.name]
        del tenants[line.tenant][group.name]
        if not tenants[line.tenant]:
            del tenants[line.tenant]

    def _expire(self, now: float) -> None:
        """Set aside what is too late to be served, for ``take_expired``."""
        while self._deadlines and self._deadlines[0][0] <= now:
            work = self.remove(heapq.heappop(self._deadlines)[1])
            if work is not None:
                self._expired.append(work)

    # -- what the hosts tell ------------------------------------------------------------------------------------

    def note_load(self, now: float, spec: str, seconds: float) -> None:
        """A load took this long. If a picked batch waited for it, the next load waits until its share allows it."""
        model, share = self._model(spec), self.policy.load_share
        model.load_s = seconds
        if model.loading:
            self._no_load_before = max(self._no_load_before, now + seconds * (1 - share) / share)

    def set_concurrency(self, spec: str, limit: int | None) -> None:
        """How many micro-batches of a model may run at once; None: any number."""
        self._model(spec).limit = limit

    def weigh_tenants(self, weights: Mapping[str, float]) -> None:
        """The shares of tenants from now on; 1 unless named. What each has been served stays counted as it was."""
        self._tenants.weights = weights

    def finished(self, pick: Pick) -> None:
        """A picked batch runs no more. To be called once for every pick."""
        model = self._model(pick.spec)
        model.running -= 1
        model.loading -= pick.loads
        self._loads_running -= pick.loads
        self._running[pick.key] -= 1
        if not self._running[pick.key]:
            del self._running[pick.key]

    def _model(self, spec: str) -> ModelLoad:
        model = self._models.get(spec)
        if model is None:
            model = self._models[spec] = ModelLoad(self.policy.unmeasured_load_s)
        return model

    # -- picking ------------------------------------------------------------------------------------------------

    def pick(
        self,
        now: float,
        *,
        resident: Container[str],
        loading: Container[str] = (),
        elsewhere: Container[str] = (),
        hosts: int = 1,
        spread: int | None = None,
        lead_s: Mapping[str, float] = _NO_LEADS,
    ) -> Pick | None:
        """Form the next micro-batch for one free host; None if nothing should run there now.

        Args:
            now: the present instant.
            resident: specs resident on this host.
            loading: specs it is loading in the background.
            elsewhere: specs resident on other hosts, which will soon be free; loaded here only when overdue.
            hosts: hosts that are free now: the batch takes its share of what waits, so that they run side by side.
            spread: over how many more of them the small batches of one key may be spread; none left: such a batch
                gathers company, and ``gathers_s`` tells for how long yet. None: over any number.
            lead_s: how long a micro-batch of a spec takes, as far as it is known: what would be late by then is set
                aside with what is late already.
        """
        self._expire(now)
        self.gathers_s = None
        again = self._pick_together(resident)
        if again is not None:
            return again
        gather_at = now if spread is not None and spread <= 0 else None
        head = self._head(now, resident, loading, elsewhere, gather_at)
        while head is not None:
            free = min(hosts, max(1, spread)) if spread is not None and self._is_small(head.group, hosts) else hosts
            works = self._fill(head, free, now, done_at=now + lead_s.get(head.spec, 0.0))
            if works:
                self._pick_turns.taken(head.lane, self._lanes)
                return self._take(works, resident)
            head = self._head(now, resident, loading, elsewhere, gather_at)
        return None

    def is_enough(self, now: float, picks: Iterable[Pick]) -> bool:
        """Whether these are enough for one host: others ask, too, and would wait for what is put behind them."""
        if not self._sharing.is_mixed(now):
            return False
        lasts_s = sum(self.pace.seconds(pick.key, pick.tokens) or 0.0 for pick in picks)
        return lasts_s > self.policy.shared_s / 2

    def next_absent(self, now: float, *, resident: Container[str]) -> str | None:
        """The spec that will be wanted next and is not resident; a hint to load it in the background."""
        self._expire(now)
        for lane in self._order(self._hint_turns):
            line = self._overdue(lane, now, resident) or self._absent(lane, resident, ())
            if line is not None:
                self._hint_turns.taken(lane, self._lanes)
                return line.spec
        return None

    def _pick_together(self, resident: Container[str]) -> Pick | None:
        for _ in range(len(self._together)):
            works = tuple(work for work in self._together.popleft() if work.id in self._works)
            if works and self._model(works[0].spec).has_slot:
                return self._take(works, resident)
            if works:
                self._together.append(works)
        return None

    def _head(
        self,
        now: float,
        resident: Container[str],
        loading: Container[str],
        elsewhere: Container[str],
        gather_at: float | None,
    ) -> Line | None:
        """The line to serve next: of the first lane that has one ready, else an absent model's.

        Overdue work is served before resident work only in its turn: a flood for absent models cannot starve the rest.
        """
        may_load = self._loads_running == 0 and now >= self._no_load_before
        lanes = self._order(self._pick_turns)
        for lane in lanes:
            overdue = self._overdue(lane, now, resident, loading, self.policy.foreground_load_s) if may_load else None
            ready = [line for line in (overdue, self._resident(lane, resident, gather_at)) if line is not None]
            if ready:
                return min(ready, key=self._turn)
        absent = (self._absent(lane, resident, elsewhere) for lane in lanes)
        return next((line for line in absent if line is not None), None)

    def _order(self, turns: Turns) -> Sequence[Lane]:
        """Lanes to look in: experiments only while nothing else waits, whether or not it could run now."""
        if any(self._lanes[lane] for lane in LANES if lane is not Lane.EXPERIMENT):
            return tuple(lane for lane in turns.order() if lane is not Lane.EXPERIMENT)
        return (Lane.EXPERIMENT,)

    # Comprehensions over lines, not a candidate object each: of 1000 keys the next is found in 0.1 ms instead of 0.7.

    def _resident(self, lane: Lane, resident: Container[str], gather_at: float | None) -> Line | None:
        """The next line of a lane whose model is resident; with an instant, of those that gather no company then."""
        return next_line(
            [
                line
                for line in lines
                if line.spec in resident
                and line.model.has_slot
                and not (gather_at is not None and self._gathers(line, gather_at))
            ]
            for lines in self._tenants_of(lane)
        )

    def _gathers(self, line: Line, now: float) -> bool:
        """Whether this line's batch is better served later, by more."""
        group = line.group
        left_s = line.arrived + self.policy.gather_s - now
        if left_s <= 0 or group.name not in self._running or not self._is_small(group, 1):
            return False
        self.gathers_s = left_s if self.gathers_s is None else min(self.gathers_s, left_s)
        return True

    def _is_small(self, group: Group, hosts: int) -> bool:
        """Whether a host's share of the group lasts so short that it had better be larger."""
        lasts_s = self.pace.seconds(group.name, group.tokens // hosts)
        return lasts_s is not None and lasts_s < self.policy.gather_s

    def _overdue(
        self,
        lane: Lane,
        now: float,
        resident: Container[str],
        loading: Container[str] = (),
        load_s: float = float("inf"),
    ) -> Line | None:
        """The next line of a lane that waited beyond patience for an absent model which loads within ``load_s``."""
        patience = self.policy.patience
        return next_line(
            [
                line
                for line in lines
                if line.model.load_s <= load_s
                and now - line.arrived >= patience * line.model.load_s
                and line.spec not in resident
                and line.spec not in loading
                and line.model.has_slot
            ]
            for lines in self._tenants_of(lane)
        )

    def _absent(self, lane: Lane, resident: Container[str], elsewhere: Container[str]) -> Line | None:
        """The next line of a lane whose model is resident nowhere."""
        return next_line(
            [line for line in lines if line.spec not in resident and line.spec not in elsewhere and line.model.has_slot]
            for lines in self._tenants_of(lane)
        )

    def _tenants_of(self, lane: Lane) -> Iterator[Iterable[Line]]:
        """The lines of a lane, tenant by tenant, the least served first."""
        tenants = self._lanes[lane]
        for tenant in self._tenants.in_turn(tenants):
            yield tenants[tenant].values()

    def _turn(self, line: Line) -> tuple[float, float]:
        return self._tenants.served(line.tenant), line.arrived

    def _fill(self, head: Line, hosts: int, now: float, *, done_at: float) -> list[Work]:
        """The head and all that shares its key, up to the limits and to this host's share; none if all are late.

        What would be late when this is done is set aside, for ``take_expired``.
        """
        first = head.queue[0]
        share = -(-head.group.waiting // hosts) * max(1, first.items)
        most_items, most_tokens = min(self._limits.max_items, share), self._most_tokens(head, now)
        works: list[Work] = []
        late: list[Work] = []
        items = tokens = 0
        for line in self._in_turn(head):
            for work in line.queue:
                if work.id not in self._works:
                    continue
                if work.deadline <= done_at:
                    late.append(work)
                    continue
                if works and (items + work.items > most_items or tokens + work.tokens > most_tokens):
                    break
                works.append(work)
                items += work.items
                tokens += work.tokens
        if works:
            self._tenants.lead(first.tenant)
        for work in late:
            self.remove(work.id)
        self._expired += late
        return works

    def _most_tokens(self, head: Line, now: float) -> int:
        """A batch's bound: shorter while there are others to whom it must not be long."""
        most = self._limits.max_tokens
        short = self.pace.tokens(head.group.name, self.policy.shared_s) if self._sharing.is_mixed(now) else None
        return most if short is None else min(most, short)

    def _in_turn(self, head: Line) -> Sequence[Line]:
        """The lines of the head's group: its own, its lane's, the other lanes'; the least served tenant first.

        Experiments stay among themselves.
        """

        def turn(line: Line) -> tuple[bool, bool, int, float]:
            other_lane = line.lane is not head.lane
            return line is not head, other_lane, LANES.index(line.lane), self._tenants.served(line.tenant)

        experiment = head.lane is Lane.EXPERIMENT
        lines = [line for line in head.group.lines.values() if (line.lane is Lane.EXPERIMENT) is experiment]
        return sorted(lines, key=turn) if len(lines) > 1 else (head,)

    def _take(self, works: Sequence[Work], resident: Container[str]) -> Pick:
        """Remove these from what waits, charge their tenants, and count their batch as running."""
        key, spec = works[0].key, works[0].spec
        items = tokens = 0
        for work in works:
            items += work.items
            tokens += work.tokens
            self._tenants.charge(work.tenant, work.tokens)
            self.remove(work.id)
        loads, model = spec not in resident, self._model(spec)
        model.running += 1
        model.loading += loads
        self._loads_running += loads
        self._running[key] += 1
        return Pick(tuple(works), key, spec, loads, tokens, items)
