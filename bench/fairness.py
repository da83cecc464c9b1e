"""What admission and fairness are worth, and what they cost: overload, a noisy neighbour, keys and limits, routes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from statistics import median
from typing import Any, Final

import msgspec
import redis
from sqlalchemy.orm import Session

from bench.farm import DEMO, ROOT, Farm, running
from bench.figures import Effort, Measured, in_turns, shares
from bench.streams import Stream
from config_db import keys, tenants
from config_db.access import Quotas, TenantSpec
from config_db.engine import open_engine
from tasks import names
from tests.services import wait_until

OVERLOAD: Final = 3.0
OVERLOAD_TEXTS: Final = 32
DEADLINE_MS: Final = 2000.0
WHO: Final[dict[str, Any]] = {"actor": "bench", "reason": "bench"}
PLENTY: Final = 1_000_000_000
EXPECTED: Final = frozenset(("200", "429", "503", "504"))
QUIET_RATE: Final = 20.0
"""Requests a second of the tenant whose neighbour is noisy."""


def overload_in_deadline_pct(effort: Effort) -> Measured:
    """Three times what the farm can, requests of 32 texts, 2 s each: of those admitted, in time, in percent."""
    return _overload(effort)[0]


def overload_goodput_ratio(effort: Effort) -> Measured:
    """The same: answers in time a second, over those of the farm when it is asked for no more than it can."""
    return _overload(effort)[1]


def expired_work_pct(effort: Effort) -> Measured:
    """The same: seconds computed for requests that were late when they were done, of all seconds, in percent."""
    return _overload(effort)[2]


def neighbour_p99_ratio(effort: Effort) -> Measured:
    """A tenant's interactive p99 while another floods the batch lane, then its own lane, over that while it is busy.

    Busy: two callers of 32 texts, enough to keep every host computing. Flooding: 128 of them. The lane whose median is
    the larger counts.
    """
    measured = Measured()
    ratios: dict[str, list[float]] = {"batch": [], "interactive": []}
    with _tenants("quiet", "noisy") as (farm, tokens):
        quiet = Stream(name="quiet", model=DEMO, rate=QUIET_RATE, headers=_bearer(tokens["quiet"]))
        seconds = max(4 * effort.seconds, 100 / QUIET_RATE)

        def p99_ms(lane: str, callers: int) -> float:
            headers = {**_bearer(tokens["noisy"]), "X-Priority": lane}
            noisy = Stream(name="noisy", model=DEMO, texts=32, callers=callers, headers=headers)
            return float(load(farm, seconds, quiet, noisy)["streams"]["quiet"]["p99_ms"])

        p99_ms("batch", 16)
        alone = load(farm, seconds, quiet)["streams"]["quiet"]["p99_ms"]
        for _ in range(effort.rounds):
            for lane, found in ratios.items():
                busy, flooded = p99_ms(lane, 2), p99_ms(lane, 128)
                found.append(flooded / busy)
                measured.note(f"{lane}: p99 {flooded:.0f} ms flooded, {busy:.0f} ms busy, {alone:.0f} ms alone")
    for lane, found in ratios.items():
        measured.note(f"{lane}: {median(found):.2f}")
    measured.samples += max(ratios.values(), key=median)
    return measured


def auth_ms(effort: Effort) -> Measured:
    """CPU of web, worker and Redis for a request of 1 text, 64 callers: with keys and every limit, less without, ms."""
    measured = Measured()
    with ExitStack() as stack:
        free = stack.enter_context(running())
        every = Quotas(in_flight=PLENTY, queued=PLENTY, tokens_per_minute=PLENTY)
        limited, tokens = stack.enter_context(_tenants("tenant", quotas=every))
        asks = Stream(name="asks", model=DEMO, callers=64)
        keyed = msgspec.structs.replace(asks, headers=_bearer(tokens["tenant"]))
        for farm, stream in ((free, asks), (limited, keyed)):
            load(farm, effort.seconds, stream)
        for more, less in in_turns(
            effort, lambda: load(limited, effort.seconds, keyed), lambda: load(free, effort.seconds, asks)
        ):
            measured.samples.append(_outside_model_ms(more) - _outside_model_ms(less))
        measured.note(f"last round, with, ms: {shares(more['cpu_ms'])}")
        measured.note(f"last round, without, ms: {shares(less['cpu_ms'])}")
    return measured


def openai_over_native(effort: Effort) -> Measured:
    """One caller, 32 texts: median latency of ``/v1/embeddings`` (base64) over that of ``/v1/encode`` (msgpack)."""
    measured = Measured()
    with running() as farm:
        native = Stream(name="asks", model=DEMO, texts=32, callers=1)
        openai = msgspec.structs.replace(native, route="openai")
        load(farm, effort.seconds, native)

        def p50_ms(stream: Stream) -> float:
            return float(load(farm, effort.seconds, stream)["streams"]["asks"]["p50_ms"])

        for theirs, ours in in_turns(effort, lambda: p50_ms(openai), lambda: p50_ms(native)):
            measured.samples.append(theirs / ours)
        measured.note(f"last round: {theirs:.1f} ms of {ours:.1f} ms")
    return measured


@cache
def _overload(effort: Effort) -> tuple[Measured, Measured, Measured]:
    """One flood tells three figures."""
    in_deadline, goodput, expired = Measured(), Measured(), Measured()
    seconds = 12 * effort.seconds
    with running() as farm:
        asks = Stream(name="asks", model=DEMO, texts=OVERLOAD_TEXTS, callers=16)
        load(farm, effort.seconds, asks)
        capacity = load(farm, 2 * effort.seconds, asks)["streams"]["asks"]["in_time_s"]
        flood = Stream(
            name="flood", model=DEMO, texts=OVERLOAD_TEXTS, rate=OVERLOAD * capacity, deadline_ms=DEADLINE_MS
        )
        load(farm, seconds / 4, flood)
        before, memory = _computed(farm), farm.pss_mb()
        found = load(farm, seconds, flood)
        after, held = _computed(farm), farm.pss_mb()
        grown = {role: held[role] - memory.get(role, 0.0) for role in held}
        seen = found["streams"]["flood"]
    statuses = {int(status): count for status, count in seen["statuses"].items()}
    admitted = statuses.get(200, 0) + statuses.get(504, 0)
    in_deadline.samples.append(100 * seen["in_time"] / max(1, admitted))
    goodput.samples.append(seen["in_time_s"] / capacity)
    late_s, computed_s = (after[name] - before[name] for name in ("late_s", "computed_s"))
    expired.samples.append(100 * late_s / max(0.1, computed_s))
    for measured in (in_deadline, goodput, expired):
        measured.note(
            f"it can {capacity:.0f} requests/s; of {sum(statuses.values())} asked {statuses.get(503, 0)} refused, "
            f"{statuses.get(504, 0)} expired, {statuses.get(200, 0) - seen['in_time']} late, "
            f"{seen['in_time']} in time; p50 {seen['p50_ms']:.0f} ms, p99 {seen['p99_ms']:.0f} ms"
        )
        measured.note(
            f"load generator: {found['cpu_share']:.0%} of a core, sent at most {seen['late_start_ms']:.0f} ms late; "
            f"ms a request: {shares(found['cpu_ms'])}"
        )
        measured.note(
            f"memory, after {seconds / 4:.0f} s of such a flood, grew by {sum(grown.values()):.0f} MiB: "
            + ", ".join(f"{role} {mib:+.0f}" for role, mib in sorted(grown.items()))
        )
    return in_deadline, goodput, expired


def load(farm: Farm, seconds: float, *streams: Stream) -> dict[str, Any]:
    """Run streams side by side; adds the farm's CPU milliseconds a request, by role, as ``cpu_ms``."""
    before = farm.cpu_s()
    words = [str(farm.port), str(seconds), msgspec.json.encode(streams).decode()]
    ran = subprocess.run([sys.executable, "-m", "bench.streams", *words], cwd=ROOT, capture_output=True, check=True)
    found: dict[str, Any] = msgspec.json.decode(ran.stdout)
    after = farm.cpu_s()
    told = found["streams"].values()
    failed = {status: count for one in told for status, count in one["statuses"].items() if status not in EXPECTED}
    if failed or not all(one["served"] for one in told):
        raise RuntimeError(f"a stream was not served, or failed: {found['streams']}")
    answered = sum(count for one in told for count in one["statuses"].values())
    used = {role: after[role] - before.get(role, 0.0) for role in after} | {"load": found["cpu_s"]}
    found["cpu_ms"] = {role: seconds * 1000 / answered for role, seconds in used.items()}
    return found


@contextmanager
def _tenants(*wanted: str, quotas: Quotas | None = None) -> Iterator[tuple[Farm, dict[str, str]]]:
    """A farm that asks for keys, and one key for each of these tenants."""
    with running(FARMHAND_AUTH="keys") as farm:
        engine = open_engine(_environment(farm)["FARMHAND_DATABASE_URL"])
        tokens = {}
        for name in wanted:
            with Session(engine) as session, session.begin():
                tenants.put(session, name, TenantSpec(quotas=quotas or Quotas()), **WHO)
            with Session(engine) as session, session.begin():
                tokens[name] = keys.create(session, tenant=name, **WHO).key
        engine.dispose()
        asks = Stream(name="asks", model=DEMO, callers=1, headers=_bearer(tokens[wanted[-1]]))
        wait_until(lambda: _is_served(farm, asks), 20, "the keys to be known")
        load(farm, 3, msgspec.structs.replace(asks, callers=16, texts=8))
        yield farm, tokens


def _is_served(farm: Farm, stream: Stream) -> bool:
    try:
        load(farm, 0.1, stream)
    except RuntimeError:
        return False
    return True


def _computed(farm: Farm) -> dict[str, float]:
    """Seconds that the workers have computed, and how many of them for nobody."""
    with redis.Redis.from_url(_environment(farm)["FARMHAND_REDIS_URL"]) as client:
        told: Any = client.hgetall(names.INCARNATIONS)
    views = [msgspec.json.decode(text) for text in told.values()]
    return {name: sum(view.get(name, 0.0) for view in views) for name in ("computed_s", "late_s")}


def _environment(farm: Farm) -> dict[str, str]:
    return farm.processes()["worker"][0].environ()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _outside_model_ms(seen: dict[str, Any]) -> float:
    return sum(float(seen["cpu_ms"][role]) for role in ("web", "worker", "redis"))
