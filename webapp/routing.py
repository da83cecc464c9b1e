"""Which queue a request goes to, its deadline, and whether its caller waits: from headers, model and settings."""

from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite
from typing import Final

from flask import request

from common.errors import ForbiddenError, RequestError
from config_db.access import LATENCY_CLASSES
from config_db.spec import ModelSpec
from tasks.names import LANES, Lane
from webapp.auth.principals import Principal, principal
from webapp.farm import Farm
from webapp.placement import place

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
    """Where the request goes; raises as ``placement.place``, and ForbiddenError if the caller may not use the lane."""
    pool, machine_profile = place(farm, spec)
    return Route(pool, machine_profile, _lane(farm, spec, asynchronous=asynchronous))


def timeout_s(farm: Farm, spec: ModelSpec | None, *, asynchronous: bool) -> float:
    """Seconds until the deadline: the caller's, else the model's, if there is one, else the default of its kind."""
    name, unit, per_s = DEADLINE_HEADER, "milliseconds", 1000.0
    asked = request.environ.get("HTTP_X_DEADLINE_MS")
    if asked is None:
        name, unit, per_s = TIMEOUT_HEADER, "seconds", 1.0
        asked = request.environ.get("HTTP_X_FARMHAND_TIMEOUT")
    if asked is None:
        settings = farm.settings
        of_model = spec.limits.timeout_s if spec is not None else None
        return settings.async_timeout_s if asynchronous else of_model or settings.sync_timeout_s
    try:
        seconds = float(asked) / per_s
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise RequestError(f"{name} takes {unit} between 0 and {MAX_TIMEOUT_S * per_s:.0f}", param=name)
    return seconds


def _lane(farm: Farm, spec: ModelSpec, *, asynchronous: bool) -> Lane:
    """The lane asked for, which a key cannot raise above its own class; else the model's, else that of the request.

    Of a tenant that may not use the latter, the next lower one that it may.
    """
    caller = principal()
    own, tenant = Lane(caller.latency_class), farm.served.tenants.get(caller.tenant)
    may = LATENCY_CLASSES if tenant is None else tenant.latency_classes
    name, asked = _asked_lane()
    if asked is None:
        usual = spec.placement.latency_class or (Lane.STANDARD if asynchronous else Lane.INTERACTIVE)
        first = max(LANES.index(own), LANES.index(Lane(usual)))
        lane = next((lane for lane in LANES[first:] if lane in may), None)
        if lane is None:
            raise _forbidden_lane(caller, LANES[first], may)
        return lane
    if LANES.index(Lane(asked)) < LANES.index(own):
        raise ForbiddenError(f"the key is of the class {own}, which cannot be raised to {asked}", param=name)
    if asked not in may:
        raise _forbidden_lane(caller, asked, may)
    return Lane(asked)


def _asked_lane() -> tuple[str, str | None]:
    """The lane asked for, if one is, and the header that says so: of the two names the second goes before the first."""
    named_by, asked = LANE_HEADER, None
    for name in (LANE_HEADER, PRIORITY_HEADER):
        given = request.headers.get(name)
        if given is not None and given not in LANES:
            raise RequestError(f"{name} is one of {', '.join(LANES)}", param=name)
        if given is not None:
            named_by, asked = name, given
    return named_by, asked


def _forbidden_lane(caller: Principal, lane: str, may: Collection[str]) -> ForbiddenError:
    message = f"the tenant {caller.tenant!r} may not use the class {lane}; it may use {', '.join(may)}"
    return ForbiddenError(message, param=LANE_HEADER)
