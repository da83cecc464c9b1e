"""Pools in the config DB: workers set aside under a name, for good or under a lease that their client renews.

A pool whose lease has run out is none any more, whether or not ``sweep`` has taken its row away. Every write is one
epoch; the caller commits.
"""

from datetime import datetime, timedelta
from typing import Final

import msgspec
from sqlalchemy.orm import Session

from common.errors import ConfigError, NotFoundError
from config_db.access import PoolNamed, PoolSpec
from config_db.documents import convert
from config_db.engine import time_now
from config_db.epochs import lock_epoch
from config_db.publish import Delete, Put, live, publish
from config_db.rows import read_rows
from config_db.spec import plain
from config_db.tenants import require

RENEWED_FROM: Final = 0.75
"""A lease with more than this share left is long enough: clients renew every minute, and each write is an epoch."""


def create(
    session: Session, name: str, spec: PoolSpec, *, actor: str, reason: str, expected: int | None = None
) -> PoolSpec:
    """Add or replace a pool, which stays until its ``expires_at``, or for good; return it as it now stands.

    Raises:
        ConfigError: the name or the spec is none, its tenant is not there, or it would have expired already.
        EpochConflictError: as ``publish``.
    """
    lock_epoch(session)
    return _write(session, name, spec, time_now(session), actor=actor, reason=reason, expected=expected)


def lease(
    session: Session, name: str, spec: PoolSpec, *, actor: str, reason: str, expected: int | None = None
) -> PoolSpec:
    """Add or replace a pool, which stays for ``spec.lease_s`` from now; raises as ``create``."""
    lock_epoch(session)
    now = time_now(session)
    leased = msgspec.structs.replace(spec, expires_at=_end(now, spec))
    return _write(session, name, leased, now, actor=actor, reason=reason, expected=expected)


def find(session: Session, name: str) -> PoolSpec | None:
    """One pool; None if there is none of this name or its lease has run out."""
    return _standing(session, [name]).get(name)


def get(session: Session, name: str) -> PoolSpec:
    """One pool; NotFoundError if there is none of this name or its lease has run out."""
    spec = find(session, name)
    if spec is None:
        raise NotFoundError(f"there is no pool {name[:64]!r}", param="pool")
    return spec


def listed(session: Session) -> dict[str, PoolSpec]:
    """Every pool by its name, without those whose lease has run out."""
    return _standing(session)


def renew(session: Session, name: str, *, actor: str, reason: str = "lease renewed") -> PoolSpec:
    """Let the lease run from now again and return the pool. A permanent pool stays so.

    A lease of which more than ``RENEWED_FROM`` is left stays as it is, without a new epoch.

    Raises:
        NotFoundError: there is no such pool, or its lease has run out.
    """
    lock_epoch(session)
    spec, now = get(session, name), time_now(session)
    if spec.expires_at is None or (spec.expires_at - now).total_seconds() > RENEWED_FROM * spec.lease_s:
        return spec
    renewed = msgspec.structs.replace(spec, expires_at=_end(now, spec))
    # laid over the row as it stands: a newer release may have written more than this one knows
    content = {**live(session, "pool", [name])[name], "expires_at": plain(renewed)["expires_at"]}
    publish(session, [Put("pool", name, content)], actor=actor, reason=reason)
    return renewed


def delete(session: Session, name: str, *, actor: str, reason: str, expected: int | None = None) -> None:
    """Give a pool's workers back; NotFoundError if there is no such pool. Otherwise raises as ``publish``."""
    lock_epoch(session)
    get(session, name)
    publish(session, [Delete("pool", name)], actor=actor, reason=reason, expected=expected)


def sweep(session: Session, *, actor: str) -> list[str]:
    """Delete the pools whose lease has run out, in one epoch, and name them."""
    lock_epoch(session)
    now = time_now(session)
    pools = read_rows(PoolSpec, live(session, "pool"))
    expired = [name for name, spec in pools.items() if spec.is_expired(now)]
    publish(session, [Delete("pool", name) for name in expired], actor=actor, reason="lease expired")
    return expired


def _standing(session: Session, names: list[str] | None = None) -> dict[str, PoolSpec]:
    now = time_now(session)
    pools = read_rows(PoolSpec, live(session, "pool", names))
    return {name: spec for name, spec in pools.items() if not spec.is_expired(now)}


def _write(
    session: Session, name: str, spec: PoolSpec, now: datetime, *, actor: str, reason: str, expected: int | None
) -> PoolSpec:
    convert({"name": name}, PoolNamed)
    spec = convert(plain(spec), PoolSpec)
    if spec.is_expired(now):
        raise ConfigError("expires_at: this instant has passed", param="expires_at")
    if spec.tenant is not None:
        require(session, spec.tenant)
    before = find(session, name)
    written = msgspec.structs.replace(spec, created_at=now if before is None else before.created_at)
    publish(session, [Put("pool", name, plain(written))], actor=actor, reason=reason, expected=expected)
    return written


def _end(now: datetime, spec: PoolSpec) -> datetime:
    return now + timedelta(seconds=spec.lease_s)
