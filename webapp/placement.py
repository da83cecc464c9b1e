"""Where a request runs: its pool and machine profile, from headers, the model's placement and the farm's own."""

from collections.abc import Sequence
from typing import Final

from flask import request

from common.errors import NotFoundError, RequestError
from config_db.spec import ModelSpec
from tasks import names
from tasks.names import Lane, queue_name
from webapp import pools
from webapp.auth.principals import principal
from webapp.farm import Farm
from webapp.machine_profiles import check_profile
from webapp.pools import check_name

POOL_HEADER: Final = "X-SIE-Pool"
PROFILE_HEADER: Final = "X-SIE-MACHINE-PROFILE"


def place(farm: Farm, spec: ModelSpec) -> tuple[str, str]:
    """Pool and machine profile as asked for, else as the model's placement says, else this farm's own.

    Raises:
        NotFoundError: there is no such pool for the caller, or none in which the model runs.
        RequestError: the machine profile is nowhere, is none of the pool's, or none that the model may run on.
    """
    environ, own = request.environ, farm.settings
    pool = environ.get("HTTP_X_SIE_POOL", "").strip().lower()
    profile = environ.get("HTTP_X_SIE_MACHINE_PROFILE", "").strip().lower()
    if "/" in profile:
        pool, profile = _both_in_one(pool, profile)
    if spec.placement.tenants:
        pool = _reserved_pool(farm, spec, pool)
    if pool and pool != own.pool:
        return pool, _in_pool(farm, spec, check_name(pool, param=POOL_HEADER), profile)
    if profile:
        if profile != own.machine_profile:
            check_profile(farm, profile, param=PROFILE_HEADER)
        _check_placement(spec, profile)
        return own.pool, profile
    allowed = spec.placement.machine_profiles
    if allowed and own.machine_profile not in allowed:
        return own.pool, _preferred(farm, own.pool, allowed)
    return own.pool, own.machine_profile


def _reserved_pool(farm: Farm, spec: ModelSpec, asked: str) -> str:
    """The caller's pool in which a model runs that is reserved to pools of tenants; of several, the one asked for.

    Raises:
        NotFoundError: the caller's tenant has no pool, or the pool asked for is not its own.
    """
    tenant = principal().tenant
    own = [name for name, pool in pools.visible(farm).items() if pool.tenant == tenant]
    if asked in own:
        return asked
    if asked or not own:
        has = f"; it has {', '.join(own)}" if own else ", and it has none"
        raise NotFoundError(f"model {spec.id!r} runs only in pools of the tenant {tenant!r}{has}", param=POOL_HEADER)
    return own[0]


def _both_in_one(pool: str, profile: str) -> tuple[str, str]:
    """``<pool>/<machine profile>`` in the header of the latter."""
    named, _, rest = profile.partition("/")
    if not named:
        raise RequestError(f"{PROFILE_HEADER} names a machine profile, or a pool and one", param=PROFILE_HEADER)
    if pool not in ("", named):
        raise RequestError(f"{POOL_HEADER} and {PROFILE_HEADER} name two pools", param=PROFILE_HEADER)
    return named, rest


def _in_pool(farm: Farm, spec: ModelSpec, pool: str, profile: str) -> str:
    """The machine profile that a request runs on in a pool: the one asked for, or one of the pool's."""
    profiles = _profiles_of(farm, spec, pool, profile)
    if profile:
        if profile not in profiles:
            has = ", ".join(profiles)
            raise RequestError(
                f"pool {pool!r} has no machine profile {profile[:100]!r}: it has {has}", param=PROFILE_HEADER
            )
        _check_placement(spec, profile)
        return profile
    allowed = spec.placement.machine_profiles
    fitting = [one for one in profiles if not allowed or one in allowed]
    if not fitting:
        has, may = ", ".join(profiles), ", ".join(allowed)
        raise RequestError(f"model {spec.id!r} runs on {may}, and pool {pool!r} has {has}", param=POOL_HEADER)
    return fitting[0] if len(fitting) == 1 else _preferred(farm, pool, fitting)


def _profiles_of(farm: Farm, spec: ModelSpec, pool: str, profile: str) -> Sequence[str]:
    """The machine profiles of a pool that the caller may use; an unknown one is made, for a caller who may do that."""
    found = pools.find_soon(farm, pool)
    if found is not None:
        return list(found.machine_profiles)
    if pool not in farm.served.pools:  # else it is another tenant's
        started_for_it = {worker.machine_profile for worker in farm.fleet.workers() if worker.pool == pool}
        if started_for_it:
            return sorted(started_for_it)
        if pools.may_make_by_asking():
            allowed = spec.placement.machine_profiles or (farm.settings.machine_profile,)
            made, _ = pools.hold(farm, pool, {profile or _preferred(farm, names.SHARED_POOL, allowed): 1})
            return list(made.machine_profiles)
    raise NotFoundError(f"there is no pool {pool!r}", param=POOL_HEADER)


def _preferred(farm: Farm, pool: str, profiles: Sequence[str]) -> str:
    """Of several machine profiles the farm's own, else the first that somebody serves now, else the first."""
    if farm.settings.machine_profile in profiles:
        return farm.settings.machine_profile
    queues = farm.fleet.queues()
    served = (one for one in profiles if queue_name(pool, one, Lane.INTERACTIVE) in queues)
    return next(served, profiles[0])


def _check_placement(spec: ModelSpec, profile: str) -> None:
    allowed = spec.placement.machine_profiles
    if allowed and profile not in allowed:
        raise RequestError(
            f"model {spec.id!r} does not run on {profile!r}: it runs on {', '.join(allowed)}",
            param=PROFILE_HEADER,
            details={"machine_profiles": list(allowed)},
        )
