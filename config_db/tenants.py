"""Tenants in the config DB: weights and quotas. Every write is one epoch; the caller commits."""

from sqlalchemy.orm import Session

from common.errors import ConfigError, NotFoundError
from config_db.access import DEFAULT_TENANT, KeySpec, PoolSpec, TenantNamed, TenantSpec
from config_db.documents import convert
from config_db.engine import time_now
from config_db.epochs import lock_epoch
from config_db.publish import Delete, Put, live, publish
from config_db.rows import read_rows
from config_db.spec import plain


def put(session: Session, name: str, spec: TenantSpec, *, actor: str, reason: str, expected: int | None = None) -> None:
    """Add or replace a tenant.

    Raises:
        ConfigError: the name or the spec is none.
        EpochConflictError: as ``publish``.
    """
    convert({"name": name}, TenantNamed)
    content = plain(convert(plain(spec), TenantSpec))
    publish(session, [Put("tenant", name, content)], actor=actor, reason=reason, expected=expected)


def get(session: Session, name: str) -> TenantSpec:
    """One tenant; NotFoundError if there is none of this name."""
    spec = listed(session, [name]).get(name)
    if spec is None:
        raise NotFoundError(f"there is no tenant {name[:64]!r}", param="tenant")
    return spec


def listed(session: Session, names: list[str] | None = None) -> dict[str, TenantSpec]:
    """Every tenant by its name, or those of the given names; the default tenant is always there."""
    implied = {DEFAULT_TENANT: TenantSpec()} if names is None or DEFAULT_TENANT in names else {}
    return implied | read_rows(TenantSpec, live(session, "tenant", names))


def require(session: Session, name: str) -> None:
    """ConfigError if what is to belong to this tenant would belong to nobody."""
    if name not in listed(session, [name]):
        raise ConfigError(f"tenant: there is no tenant {name[:64]!r}: add it first", param="tenant")


def delete(session: Session, name: str, *, actor: str, reason: str, expected: int | None = None) -> None:
    """Take a tenant away; the default one falls back to what it is without a row.

    Raises:
        NotFoundError: there is no such tenant.
        ConfigError: a usable key or a pool is still the tenant's.
        EpochConflictError: as ``publish``.
    """
    lock_epoch(session)
    get(session, name)
    if name != DEFAULT_TENANT:
        _check_is_free(session, name)
    publish(session, [Delete("tenant", name)], actor=actor, reason=reason, expected=expected)


def _check_is_free(session: Session, name: str) -> None:
    now = time_now(session)
    keys = read_rows(KeySpec, live(session, "key")).items()
    pools = read_rows(PoolSpec, live(session, "pool")).items()
    held = [f"key {key}" for key, spec in keys if spec.tenant == name and spec.is_usable(now)]
    held += [f"pool {pool}" for pool, spec in pools if spec.tenant == name and not spec.is_expired(now)]
    if held:
        raise ConfigError(f"tenant {name!r} still has {', '.join(held[:10])}: take them away first", param="tenant")
