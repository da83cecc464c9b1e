"""Whose a row is, the operator's or a client's, and whether the tenants that pools and usable keys are of are there."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from sqlalchemy.orm import Session

from common.errors import ConfigError
from config_db.access import DEFAULT_TENANT, KeySpec, PoolSpec
from config_db.engine import time_now
from config_db.publish import Change, live
from config_db.rows import read_rows
from config_db.schema import Kind

LEASED: Final = ("expires_at", "client")
"""What only a pool under a lease says: that one is its client's."""


def belongs_in_files(kind: Kind, content: Mapping[str, Any]) -> bool:
    """Whether a row is the operator's own and no key; a pool under a lease is its client's."""
    return kind != "key" and not (kind == "pool" and any(field in content for field in LEASED))


def check_owners(session: Session, changes: Collection[Change]) -> None:
    """ConfigError if, after these changes, a pool or a usable key is of a tenant that is not there."""
    if not any(change.kind in ("tenant", "pool") for change in changes):
        return
    now = time_now(session)
    tenants = {DEFAULT_TENANT, *_after(session, "tenant", changes)}
    keys = read_rows(KeySpec, live(session, "key"))
    pools = read_rows(PoolSpec, _after(session, "pool", changes))
    owners = [(f"key {name}", spec.tenant) for name, spec in keys.items() if spec.is_usable(now)]
    owners += [
        (f"pool {name}", spec.tenant) for name, spec in pools.items() if spec.tenant and not spec.is_expired(now)
    ]
    for what, tenant in owners:
        if tenant not in tenants:
            raise ConfigError(f"{what} is of the tenant {tenant!r}, which would not be there", param="tenants")


def _after(session: Session, kind: Kind, changes: Collection[Change]) -> dict[str, dict[str, Any]]:
    rows = live(session, kind)
    for change in changes:
        if change.kind != kind:
            continue
        if change.after is None:
            rows.pop(change.name, None)
        else:
            rows[change.name] = change.after
    return rows
