"""Pools for callers: which they may see and use, and what they do to their own.

A pool is its tenant's; one without a tenant is everyone's to use and the operator's to change. What is read comes from
the snapshot, what is changed goes to the config DB, and a caller that has just heard of a pool from another web process
is given a moment for this one to hear of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Final

import gevent
import msgspec
from sqlalchemy.orm import Session

from common.errors import ContentConflictError, ForbiddenError, NotFoundError, RequestError
from config_db import pools as repository
from config_db.access import DEFAULT_LEASE_S, PoolSpec
from tasks.live_workers import WorkerView
from tasks.names import Lane, queue_name
from webapp.auth.principals import ANYBODY, Principal, principal
from webapp.config_store import config_store
from webapp.farm import Farm
from webapp.machine_profiles import check_profile

MOST_POOLS: Final = 100
"""A tenant holds no more at a time: every process looks at all of them."""
HEARD_OF_WITHIN_S: Final = 0.5
SEEN_WITHIN_S: Final = 1.0
_LOOK_EVERY_S: Final = 0.01


def standing(here: Farm) -> Mapping[str, PoolSpec]:
    """The pools that stand, by name. While the config DB is away no lease runs out: it cannot be renewed."""
    pools = here.served.pools
    if not pools or not here.snapshots.is_connected:
        return pools
    now = datetime.now(UTC)
    return {name: spec for name, spec in pools.items() if not spec.is_expired(now)}


def find(here: Farm, name: str) -> PoolSpec | None:
    """A pool that the caller may use; None if there is none, as this process knows."""
    spec = here.served.pools.get(name)
    if spec is None or not _may_use(spec, principal()):
        return None
    return None if here.snapshots.is_connected and spec.is_expired(datetime.now(UTC)) else spec


def find_soon(here: Farm, name: str) -> PoolSpec | None:
    """As ``find``; a pool that is not known is looked for in the config DB first, for half a second at most."""
    if name not in here.served.pools:
        here.snapshots.poll_soon()
        until = monotonic() + HEARD_OF_WITHIN_S
        while name not in here.served.pools and monotonic() < until:
            gevent.sleep(_LOOK_EVERY_S)
    return find(here, name)


def visible(here: Farm) -> dict[str, PoolSpec]:
    """The pools that the caller may use, by name."""
    caller = principal()
    return {name: spec for name, spec in sorted(standing(here).items()) if _may_use(spec, caller)}


def serving(workers: Iterable[WorkerView], name: str, spec: PoolSpec) -> Sequence[WorkerView]:
    """Those of the live workers that are ready and consume the pool's queues now."""
    queues = {queue_name(name, profile, Lane.INTERACTIVE) for profile in spec.machine_profiles}
    return [worker for worker in workers if worker.is_ready and queues & worker.queues]


def hold(
    here: Farm, name: str, machine_profiles: Mapping[str, int], *, lease_s: float = DEFAULT_LEASE_S
) -> tuple[PoolSpec, bool]:
    """Make a pool for the caller, or make it what is asked for, and let its lease run from now; whether it is new.

    Raises:
        ForbiddenError: the name is the farm's, or an operator's pool has it, or the tenant holds too many.
        ContentConflictError: another tenant has the name.
        RequestError: some machine profile is nowhere.
        ConfigUnavailableError: PostgreSQL does not answer.
        QueueUnavailableError: Redis does not answer.
    """
    if name == here.settings.pool or any(worker.pool == name for worker in here.fleet.workers()):
        raise ForbiddenError(f"pool {name!r} is the farm's own: choose another name", param="name")
    for profile in machine_profiles:
        check_profile(here, profile, param="gpus")
    caller = principal()
    spec = PoolSpec(machine_profiles=dict(machine_profiles), tenant=caller.tenant, lease_s=lease_s, client=caller.name)
    here.client.note_pool(name, machine_profiles)  # before there is a pool: what is sent to it can then be found
    with config_store().change() as session:
        held, is_new = _hold(session, name, spec)
    _catch_up(here, name, held)
    return held, is_new


def renew(here: Farm, name: str) -> PoolSpec:
    """Let the lease of the caller's pool run from now; raises as ``drop``."""
    with config_store().change() as session:
        _own(session, name)
        renewed = repository.renew(session, name, actor=principal().name)
    _catch_up(here, name, renewed)
    return renewed


def drop(here: Farm, name: str) -> None:
    """Give the workers of the caller's pool back.

    Raises:
        NotFoundError: there is no such pool for the caller.
        ForbiddenError: it is the operator's.
        ConfigUnavailableError: PostgreSQL does not answer.
    """
    if name == here.settings.pool:
        raise ForbiddenError(f"pool {name!r} is the farm's own and stays", param="name")
    with config_store().change() as session:
        _own(session, name)
        repository.delete(session, name, actor=principal().name, reason="deleted by its client")
    _catch_up(here, name, None)


def may_make_by_asking() -> bool:
    """Whether a request that names an unknown pool makes it.

    Not where nobody shows a key: there a slip of the pen would take the farm's workers away.
    """
    return principal() is not ANYBODY and principal().may("pools")


def _may_use(spec: PoolSpec, caller: Principal) -> bool:
    return spec.tenant is None or spec.tenant == caller.tenant


def _is_own(spec: PoolSpec, caller: Principal) -> bool:
    return spec.is_leased and spec.tenant == caller.tenant


def _hold(session: Session, name: str, spec: PoolSpec) -> tuple[PoolSpec, bool]:
    caller = principal()
    before = repository.find(session, name)
    if before is None:
        held = sum(other.tenant == caller.tenant for other in repository.listed(session).values())
        if held >= MOST_POOLS:
            raise ForbiddenError(f"the tenant holds {held} pools already: delete one", param="name")
    elif not _may_use(before, caller):
        raise ContentConflictError(f"the name {name!r} is taken: choose another", param="name")
    elif not _is_own(before, caller):
        raise ForbiddenError(f"pool {name!r} is the operator's: it stays as it is", param="name")
    elif _is_as_asked(before, spec):
        return repository.renew(session, name, actor=caller.name), False
    return repository.lease(session, name, spec, actor=caller.name, reason="asked for by its client"), before is None


def _is_as_asked(before: PoolSpec, asked: PoolSpec) -> bool:
    return msgspec.structs.replace(asked, created_at=before.created_at, expires_at=before.expires_at) == before


def _own(session: Session, name: str) -> None:
    """NotFoundError or ForbiddenError unless the pool is the caller's to change."""
    spec = repository.get(session, name)
    if not _may_use(spec, principal()):
        raise NotFoundError(f"there is no pool {name[:64]!r}", param="name")
    if not _is_own(spec, principal()):
        raise ForbiddenError(f"pool {name!r} is the operator's: it stays as it is", param="name")


def _catch_up(here: Farm, name: str, spec: PoolSpec | None) -> None:
    """Wait until this process has read what it wrote: who makes a pool asks for it next."""
    here.snapshots.poll_soon()
    until = monotonic() + SEEN_WITHIN_S
    while here.served.pools.get(name) != spec and monotonic() < until:
        gevent.sleep(_LOOK_EVERY_S)


def check_name(name: str, *, param: str) -> str:
    """A pool's name as it is kept; RequestError for what can be none."""
    lower = name.lower()
    if not 0 < len(name) <= 64 or not all(one.isascii() and (one.isalnum() or one == "-") for one in lower):
        raise RequestError("the name of a pool is up to 64 letters, digits and hyphens", param=param)
    if lower.startswith("-"):
        raise RequestError("the name of a pool begins with a letter or a digit", param=param)
    return lower
