"""What has to change for the config DB to say what files say, and the one epoch that changes it."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from config_db.config_files import STAMPED, ConfigFiles
from config_db.epochs import lock_epoch
from config_db.owners import belongs_in_files, check_owners
from config_db.publish import Change, Delete, Published, Put, live, planned, publish
from config_db.schema import Kind, ModelRow


def plan_files(session: Session, files: ConfigFiles, *, prune: bool) -> tuple[Change, ...]:
    """What ``apply_files`` would change; nothing is written.

    Raises:
        ConfigError: as ``apply_files``.
    """
    changes = planned(session, _writes(session, files, prune=prune))
    check_owners(session, changes)
    return changes


def apply_files(
    session: Session, files: ConfigFiles, *, prune: bool, actor: str, reason: str, expected: int | None = None
) -> Published:
    """Publish what the files say as one epoch.

    Args:
        session: the caller's; the caller commits.
        files: without faults.
        prune: also delete what they do not name: models, and those other kinds that some file speaks of. A pool that
            a client holds under a lease is none of the files' business and stays, as does a model that was registered
            from the Hub by being asked for.
        actor: who changes it, for the history.
        reason: why, for the history.
        expected: the epoch the caller has read.

    Raises:
        EpochConflictError: something else was published since.
        ConfigError: two models would share a name, or a pool or a key would belong to a tenant that is not there.
    """
    lock_epoch(session)
    writes = _writes(session, files, prune=prune)
    published = publish(session, writes, actor=actor, reason=reason, expected=expected)
    check_owners(session, published.changes)
    return published


def _writes(session: Session, files: ConfigFiles, *, prune: bool) -> list[Put | Delete]:
    pools = live(session, "pool") if "pool" in files.spoken_of else {}
    puts = [_with_stamp(put, pools.get(put.name)) for put in files.puts]
    if not prune:
        return [*puts]
    kinds: set[Kind] = {"model", *files.spoken_of}
    kept = {(put.kind, put.name) for put in puts} | {("model", name) for name in _registered(session)}
    gone = [
        Delete(kind, name)
        for kind in sorted(kinds)
        for name, content in live(session, kind).items()
        if (kind, name) not in kept and belongs_in_files(kind, content)
    ]
    return [*puts, *gone]


def _registered(session: Session) -> Collection[str]:
    """Models that came from the Hub because somebody asked for them."""
    return session.scalars(select(ModelRow.id).where(ModelRow.origin == "auto", ModelRow.deleted_at.is_(None))).all()


def _with_stamp(put: Put, row: Mapping[str, Any] | None) -> Put:
    """A pool that is there keeps the instant at which it was made."""
    if put.kind != "pool" or row is None or STAMPED not in row:
        return put
    return msgspec.structs.replace(put, spec={**put.spec, STAMPED: row[STAMPED]})
