"""API keys in the config DB, which knows of each only a hash. Every write is one epoch; the caller commits.

A key reads ``fh_<id>_<secret>``. Its secret leaves this module once, in the ``NewKey`` that ``create`` returns, and
stands in no row, history, log or error.
"""

import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
from sqlalchemy.orm import Session

from common.errors import ConfigError, NotFoundError
from common.logs import get_logger
from config_db.access import KeySpec, Scope
from config_db.documents import convert
from config_db.engine import time_now
from config_db.epochs import lock_epoch
from config_db.publish import Put, live, publish
from config_db.rows import read_rows
from config_db.spec import LatencyClass, plain
from config_db.tenants import require

log = get_logger("config_db")

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32
_ID: Final = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")
_KEY: Final = re.compile(rf"fh_([0-9a-f]{{{2 * ID_BYTES}}})_([0-9a-f]{{{2 * SECRET_BYTES}}})")
_NOBODYS: Final = "0" * 64


class NewKey(msgspec.Struct, frozen=True):
    """A key just made: its id, and all of it, to be shown to its owner once."""

    id: str
    key: str

    def __repr__(self) -> str:
        """Without the secret, so that no log or traceback shows it."""
        return f"NewKey(id={self.id!r})"


def create(
    session: Session,
    *,
    tenant: str,
    actor: str,
    reason: str,
    scopes: Sequence[Scope] = ("infer",),
    latency_class: LatencyClass = "interactive",
    expires_at: datetime | None = None,
    note: str | None = None,
    expected: int | None = None,
) -> NewKey:
    """Make a key for a tenant.

    Raises:
        ConfigError: there is no such tenant or scope, or the key would have expired already.
        EpochConflictError: as ``publish``.
    """
    lock_epoch(session)
    key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES)
    spec = KeySpec(
        tenant=tenant,
        secret_sha256=_hash(secret),
        prefix=f"fh_{key_id}",
        created_at=time_now(session),
        scopes=tuple(scopes),
        latency_class=latency_class,
        expires_at=expires_at,
        note=note,
    )
    content = plain(convert(plain(spec), KeySpec))
    if not spec.is_usable(spec.created_at):
        raise ConfigError("expires_at: this instant has passed", param="expires_at")
    require(session, tenant)
    publish(session, [Put("key", key_id, content)], actor=actor, reason=reason, expected=expected)
    return NewKey(key_id, f"fh_{key_id}_{secret}")


def find(session: Session, presented: str) -> tuple[str, KeySpec] | None:
    """Id and spec of the key that a caller presents; None if it is no key, a wrong, revoked or expired one."""
    rows = live(session, "key", [_parts(presented)[0]])
    return match(_understood(rows), presented, time_now(session))


def match(keys: Mapping[str, KeySpec], presented: str, at: datetime) -> tuple[str, KeySpec] | None:
    """As ``find``, among ``keys`` by their ids, at an instant.

    It takes as long for a wrong secret as for a right one and for an unknown id, so that nothing is learnt by guessing.
    """
    key_id, secret = _parts(presented)
    spec = keys.get(key_id)
    is_right = hmac.compare_digest(_hash(secret), spec.secret_sha256 if spec is not None else _NOBODYS)
    return (key_id, spec) if is_right and spec is not None and spec.is_usable(at) else None


def listed(session: Session) -> dict[str, KeySpec]:
    """Every key by its id, the revoked and expired ones, too."""
    return read_rows(KeySpec, live(session, "key"))


def revoke(session: Session, key_id: str, *, actor: str, reason: str, expected: int | None = None) -> None:
    """Refuse a key from now on; one that was revoked before stays as it was.

    Raises:
        NotFoundError: there is no such key.
        EpochConflictError: as ``publish``.
    """
    lock_epoch(session)
    # what is given may be a whole key by mistake: it goes into no statement and no message
    content = live(session, "key", [key_id]).get(key_id) if _ID.fullmatch(key_id) else None
    if content is None:
        raise NotFoundError("there is no key of this id", param="id")
    revoked_at = content.get("revoked_at") or msgspec.to_builtins(time_now(session))
    # laid over the row as it stands: a newer release may have written more than this one knows
    revoked = {**content, "revoked_at": revoked_at}
    publish(session, [Put("key", key_id, revoked)], actor=actor, reason=reason, expected=expected)


def _understood(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, KeySpec]:
    """The rows that this release knows all of: what another has added to a key may be a restriction."""
    specs = {}
    for key_id, content in rows.items():
        try:
            specs[key_id] = msgspec.convert(content, KeySpec)
        except msgspec.ValidationError as error:
            log.warning("row_unreadable", kind="key", row=key_id, error=str(error))
    return specs


def _parts(presented: str) -> tuple[str, str]:
    """Id and secret of a presented key; empty if it has not the form of one."""
    found = _KEY.fullmatch(presented)
    return (found[1], found[2]) if found is not None else ("", "")


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()
