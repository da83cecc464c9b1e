"""Which queue a request goes to, its deadline, and whether its caller waits: from headers, model and settings."""

from dataclasses import dataclass
from math import isfinite
from typing import Final

from flask import request

from common.errors import ForbiddenError, NotFoundError, RequestError
from config_db.spec import ModelSpec
from tasks.names import LANES, Lane, queue_name
from webapp.auth.principals import principal
from webapp.farm import Farm

POOL_HEADER: Final = "X-SIE-Pool"
PROFILE_HEADER: Final = "X-SIE-MACHINE-PROFILE"
LANE_HEADER: Final = "X-Farmhand-Lane"
PRIORITY_HEADER: Final = "X-Priority"
"""Another name of the same."""
TIMEOUT_HEADER: Final = "X-Farmhand-Timeout"
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
        NotFoundError: no live worker serves the pool or machine profile that was asked for.
    """
    environ, settings = request.environ, farm.settings
    asked_pool = environ.get("HTTP_X_SIE_POOL", "").strip().lower()
    asked_profile = environ.get("HTTP_X_SIE_MACHINE_PROFILE", "").strip().lower()
    own_profile = settings.machine_profile
    allowed = spec.placement.machine_profiles
    if allowed and own_profile not in allowed:
        own_profile = allowed[0]
    route = Route(asked_pool or settings.pool, asked_profile or own_profile, _lane(asynchronous=asynchronous))
    if (asked_pool and asked_pool != settings.pool) or (asked_profile and asked_profile != own_profile):
        _check_served(farm, route, is_pool_asked=bool(asked_pool))
    return route


def timeout_s(farm: Farm, spec: ModelSpec, *, asynchronous: bool) -> float:
    """Seconds until the deadline: the caller's, else the model's, else the default of its kind."""
    asked = request.environ.get("HTTP_X_FARMHAND_TIMEOUT")
    if asked is None:
        settings = farm.settings
        return settings.async_timeout_s if asynchronous else spec.limits.timeout_s or settings.sync_timeout_s
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise RequestError(f"{TIMEOUT_HEADER} takes seconds between 0 and {MAX_TIMEOUT_S:.0f}", param=TIMEOUT_HEADER)
    return seconds


def _lane(*, asynchronous: bool) -> Lane:
    """The lane asked for, which a key cannot raise above its own class; else that of the kind of request."""
    own = Lane(principal().latency_class)
    name = PRIORITY_HEADER if "HTTP_X_PRIORITY" in request.environ else LANE_HEADER
    asked = request.headers.get(name)
    if asked is None:
        return max(own, Lane.STANDARD if asynchronous else Lane.INTERACTIVE, key=LANES.index)
    if asked not in LANES:
        raise RequestError(f"{name} is one of {', '.join(LANES)}", param=name)
    if LANES.index(Lane(asked)) < LANES.index(own):
        raise ForbiddenError(f"the key is of the class {own}, which cannot be raised to {asked}", param=name)
    return Lane(asked)


def _check_served(farm: Farm, route: Route, *, is_pool_asked: bool) -> None:
    if queue_name(route.pool, route.machine_profile, route.lane) in farm.fleet.queues():
        return
    pools = {queue.split(".")[1] for queue in farm.fleet.queues() if queue.count(".") >= 3}
    if is_pool_asked and route.pool not in pools | {farm.settings.pool}:
        raise NotFoundError(f"there is no pool {route.pool[:100]!r}", param=POOL_HEADER)
    raise NotFoundError(
        f"pool {route.pool[:100]!r} has no machine profile {route.machine_profile[:100]!r}", param=PROFILE_HEADER
    )
