"""Which queue a request goes to, its deadline, and whether its caller waits: from headers, model and settings."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Final

from flask import request

from common.errors import ForbiddenError, NotFoundError, RequestError
from config_db.access import LATENCY_CLASSES
from config_db.spec import ModelSpec
from tasks.names import LANES, Lane, queue_name
from webapp.auth.principals import Principal, principal
from webapp.farm import Farm

POOL_HEADER: Final = "X-SIE-Pool"
PROFILE_HEADER: Final = "X-SIE-MACHINE-PROFILE"
LANE_HEADER: Final = "X-Farmhand-Lane"
PRIORITY_HEADER: Final = "X-Priority"
"""Another name of the same."""
TIMEOUT_HEADER: Final = "X-Farmhand-Timeout"
DEADLINE_HEADER: Final = "X-Deadline-Ms"
"""The same in milliseconds; it goes before the other."""
MAX_TIMEOUT_S: Final = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes."""

    pool: str
    machine_profile: str
    lane: Lane


def is_async() -> bool:
    """Whether the caller asks for a task id instead of waiting: ``Prefer: respond-async`` or ``?mode=async``."""
    environ = request.environ
    if "respond-async" in environ.get("HTTP_PREFER", "").lower():
        return True
    if not environ.get("QUERY_STRING"):
        return False
    mode = request.args.get("mode", "sync")
    if mode not in ("sync", "async"):
        raise RequestError(f"mode {mode!r} is neither sync nor async", param="mode")
    return mode == "async"


def choose(farm: Farm, spec: ModelSpec, *, asynchronous: bool) -> Route:
    """Pool and machine profile as asked for, else the model's, else this farm's own.

    Raises:
        NotFoundError: no live worker serves the pool or machine profile that was asked for, or that the model needs.
        ForbiddenError: the caller may not use this lane.
    """
    environ, settings = request.environ, farm.settings
    asked_pool = environ.get("HTTP_X_SIE_POOL", "").strip().lower()
    asked_profile = environ.get("HTTP_X_SIE_MACHINE_PROFILE", "").strip().lower()
    own_profile = settings.machine_profile
    allowed = spec.placement.machine_profiles
    if allowed and own_profile not in allowed:
        own_profile = allowed[0]
    pool = _reserved_pool(farm, spec, asked_pool) if spec.placement.tenants else asked_pool or settings.pool
    route = Route(pool, asked_profile or own_profile, _lane(farm, spec, asynchronous=asynchronous))
    if pool != settings.pool or (asked_profile and asked_profile != own_profile):
        _check_served(farm, route, is_pool_asked=pool != settings.pool)
    return route


def timeout_s(farm: Farm, spec: ModelSpec, *, asynchronous: bool) -> float:
    """Seconds until the deadline: the caller's, else the model's, else the default of its kind."""
    name, unit, per_s = DEADLINE_HEADER, "milliseconds", 1000.0
    asked = request.environ.get("HTTP_X_DEADLINE_MS")
    if asked is None:
        name, unit, per_s = TIMEOUT_HEADER, "seconds", 1.0
        asked = request.environ.get("HTTP_X_FARMHAND_TIMEOUT")
    if asked is None:
        settings = farm.settings
        return settings.async_timeout_s if asynchronous else spec.limits.timeout_s or settings.sync_timeout_s
    try:
        seconds = float(asked) / per_s
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise RequestError(f"{name} takes {unit} between 0 and {MAX_TIMEOUT_S * per_s:.0f}", param=name)
    return seconds


def _reserved_pool(farm: Farm, spec: ModelSpec, asked: str) -> str:
    """The caller's pool in which a model runs that is reserved to pools of tenants; of several, the one asked for.

    Raises:
        NotFoundError: the caller's tenant has no pool, or the pool asked for is not its own.
    """
    tenant, now = principal().tenant, datetime.now(UTC)
    own = [name for name, pool in farm.served.pools.items() if pool.tenant == tenant and not pool.is_expired(now)]
    if asked in own:
        return asked
    if asked or not own:
        has = f"; it has {', '.join(sorted(own))}" if own else ", and it has none"
        raise NotFoundError(f"model {spec.id!r} runs only in pools of the tenant {tenant!r}{has}", param=POOL_HEADER)
    return min(own)


def _lane(farm: Farm, spec: ModelSpec, *, asynchronous: bool) -> Lane:
    """The lane asked for, which a key cannot raise above its own class; else the model's, else that of the request.

    Of a tenant that may not use the latter, the next lower one that it may.
    """
    caller = principal()
    own, tenant = Lane(caller.latency_class), farm.served.tenants.get(caller.tenant)
    may = LATENCY_CLASSES if tenant is None else tenant.latency_classes
    name = PRIORITY_HEADER if "HTTP_X_PRIORITY" in request.environ else LANE_HEADER
    asked = request.headers.get(name)
    if asked is None:
        usual = spec.placement.latency_class or (Lane.STANDARD if asynchronous else Lane.INTERACTIVE)
        first = max(LANES.index(own), LANES.index(Lane(usual)))
        lane = next((lane for lane in LANES[first:] if lane in may), None)
        if lane is None:
            raise _forbidden_lane(caller, LANES[first], may)
        return lane
    if asked not in LANES:
        raise RequestError(f"{name} is one of {', '.join(LANES)}", param=name)
    if LANES.index(Lane(asked)) < LANES.index(own):
        raise ForbiddenError(f"the key is of the class {own}, which cannot be raised to {asked}", param=name)
    if asked not in may:
        raise _forbidden_lane(caller, asked, may)
    return Lane(asked)


def _forbidden_lane(caller: Principal, lane: str, may: Collection[str]) -> ForbiddenError:
    message = f"the tenant {caller.tenant!r} may not use the class {lane}; it may use {', '.join(may)}"
    return ForbiddenError(message, param=LANE_HEADER)


def _check_served(farm: Farm, route: Route, *, is_pool_asked: bool) -> None:
    if queue_name(route.pool, route.machine_profile, route.lane) in farm.fleet.queues():
        return
    pools = {queue.split(".")[1] for queue in farm.fleet.queues() if queue.count(".") >= 3}
    if is_pool_asked and route.pool not in pools | {farm.settings.pool}:
        raise NotFoundError(f"there is no pool {route.pool[:100]!r}", param=POOL_HEADER)
    raise NotFoundError(
        f"pool {route.pool[:100]!r} has no machine profile {route.machine_profile[:100]!r}", param=PROFILE_HEADER
    )
