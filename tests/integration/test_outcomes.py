"""Outcomes as a worker writes them: what one request's does to its neighbours', and one incarnation's to another's."""

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kombu.asynchronous import Hub

from common.clock import FarmClock
from common.errors import DeadlineExceededError
from tasks import messages, names
from tasks.messages import INLINE_OUTCOME_BYTES, Outcome, Ticket
from tasks.names import Operation
from tests.services import RedisServer, wait_until
from workers.aside import Aside
from workers.intake import Held, Intake, IntakeLimits
from workers.outcomes import OutcomeWriter
from workers.redis_link import RedisLink
from workers.settling import Settler

EMPTY = msgspec.Raw(b"\x90")
QUOTAS = defaultdict(int, bounded=600)
REPLIES = names.reply_list("test-outcomes")


class Asked(SimpleNamespace):
    """A request as far as settling looks at it. Celery keeps it by weak reference and hash."""

    __hash__ = object.__hash__


class Worker:
    """What settles requests in a worker, over a link of its own."""

    def __init__(self, redis_url: str, incarnation: str) -> None:
        self.incarnation = incarnation
        self.hub = Hub()
        self.link = RedisLink(redis_url, on_connect=lambda: None, script_names=("outcome",))
        self.intake = Intake(IntakeLimits(100, 1000, 100_000))
        self.settled: list[tuple[str, bool]] = []
        self.outcomes = OutcomeWriter(
            self.link,
            Aside(None, FarmClock()),
            result_ttl_s=60,
            tokens_per_minute=QUOTAS.__getitem__,
            kombu_keys=None,
            on_settled=self.on_settled,
        )
        self.settler = Settler(self.intake, self.outcomes, forget=lambda _: None)
        self.link.register(self.hub)
        self.settler.register(self.hub)

    def on_settled(self, held: Held, outcome: Outcome, answered: bool) -> None:
        self.settler.on_settled(held, outcome, answered)
        self.settled.append((held.id, answered))

    def hold(self, redis: Any, task_id: str, tag: int, *, asynchronous: bool = False, tenant: str = "t") -> Held:
        """Take a request in, as a pop would have."""
        redis.hset(names.unacked(self.incarnation), tag, "queue\nraw")
        redis.zadd(names.OPEN, {task_id: 2e9})
        request: Any = Asked(
            id=task_id,
            reply_to=REPLIES,
            ignore_result=False,
            operation=Operation.ENCODE,
            message=SimpleNamespace(channel=None),
            send_event=lambda *_, **__: None,
            acknowledged=False,
        )
        ticket = Ticket(
            model="m", spec="s", operation=Operation.ENCODE, key="k", items=1, tokens=1, deadline=2e9, published=0.0,
            asynchronous=asynchronous, tenant=tenant,
        )  # fmt: skip
        held = Held(tag, self.incarnation, request, ticket, b"", "farm.default.cpu.interactive", 0, "", 0.0, 2e9)
        self.intake.add(held)
        return held

    def run(self, count: int) -> None:
        """Turn the loop until so many are settled."""

        def turn() -> bool:
            self.hub.call_later(0.01, lambda: None)
            self.hub.run_once()
            return len(self.settled) >= count

        wait_until(turn, 10, f"{count} settled requests")

    def close(self) -> None:
        self.link.close()
        self.hub.close()


@pytest.fixture
def workers(redis_url: str) -> Iterator[list[Worker]]:
    both = [Worker(redis_url, name) for name in ("one", "two")]
    yield both
    for worker in both:
        worker.close()


def test_an_outcome_that_cannot_be_written_fails_alone(workers: list[Worker], redis_server: RedisServer) -> None:
    worker, redis = workers[0], redis_server.client()
    good, bad, after = (worker.hold(redis, name, tag) for tag, name in enumerate(("good", "bad", "after"), start=1))
    worker.settler.settle(good, Outcome(task_id="good", model="m", spec="s", result=EMPTY))
    worker.settler.settle(bad, Outcome(task_id="bad", model="\udc80", spec="s", result=EMPTY))  # no UTF-8
    worker.settler.settle(after, Outcome(task_id="after", model="m", spec="s", result=EMPTY))
    worker.run(3)
    answers = [messages.decode_outcome(raw) for raw in redis.lrange(REPLIES, 0, -1)]
    assert {one.task_id: one.state for one in answers} == {"good": "succeeded", "bad": "failed", "after": "succeeded"}


def test_a_second_computing_takes_no_large_result_away(workers: list[Worker], redis_server: RedisServer) -> None:
    redis = redis_server.client()
    large = Outcome(
        task_id="t", model="m", spec="s", result=msgspec.Raw(msgspec.msgpack.encode([b"x" * INLINE_OUTCOME_BYTES]))
    )
    first = workers[0].hold(redis, "t", 1)
    second = workers[1].hold(redis, "t", 1)
    workers[0].settler.settle(first, large)
    workers[0].run(1)
    workers[1].settler.settle(second, large)
    workers[1].run(1)
    assert (workers[0].settled, workers[1].settled) == ([("t", True)], [("t", False)])
    (reply,) = redis.lrange(REPLIES, 0, -1)
    ref = messages.decode_outcome(reply).ref
    assert ref is not None
    assert redis.strlen(ref) > INLINE_OUTCOME_BYTES
    assert redis.keys(f"{names.result_key('t')}*") == [ref.encode()]


def test_tokens_that_were_not_used_are_given_back(workers: list[Worker], redis_server: RedisServer) -> None:
    """Estimated as 1 token each: one used 31, one failed before it was computed, one is nobody's who has a quota."""
    redis, worker = redis_server.client(), workers[0]
    redis.set(names.token_clock("bounded"), 1000)
    more, less, other = (worker.hold(redis, name, tag, tenant="bounded") for tag, name in enumerate("mlo", start=1))
    other.ticket = msgspec.structs.replace(other.ticket, tenant="unbounded")
    more.tokens_used = other.tokens_used = 31
    for held in (more, other):
        worker.settler.settle(held, Outcome(task_id=held.id, model="m", spec="s", result=EMPTY))
    worker.settler.fail(less, DeadlineExceededError("too late"))
    worker.run(3)
    assert float(redis.get(names.token_clock("bounded")) or 0) == pytest.approx(1000 + 30 / 10 - 1 / 10)
    assert not redis.exists(names.token_clock("unbounded"))
